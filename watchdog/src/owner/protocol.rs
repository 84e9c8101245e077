//! The claim/confirm protocol of one guest on one host, without time: what a record means for this host, and which
//! record it wants next.
//!
//! The record is the only authority. What came of a swap is never concluded from its answer, only from a later read, so
//! an answer that is lost, late or doubled does no harm. Suspicion may be wrong at any time: it costs output that waits,
//! never a second instance (invariant 4).
//!
//! ```text
//!   Pair(A,B) --A: backup lost---------------> Solo(A) --A: full copy on B complete--> Pair(A,B)
//!       |                                        ^  \--A: copy given up, restart-----> Solo(A), next term
//!       +-----B: primary lost--> Claim(B from A) |
//!                                   |     \------+ A: not confirmed in time (promotion failed)
//!                                   +--B: loaded--> Solo(B)
//! ```

use understudy_proto::ids::{EpochId, Generation, Incarnation};
use understudy_proto::ownership::{Owner, Ownership, Term};

use super::event::{Command, Event, Local, LostBackup, Policies, Role, Seeded};

/// See the module's description.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Protocol {
    me: String,
    policies: Policies,
    role: Role,
    /// The newest record read.
    record: Option<Ownership>,
    local: Local,
    /// Generation of the guest under the newest record by which it ran here.
    led: Option<Generation>,
    /// A claim of the other host has waited long enough.
    impatient: bool,
    /// What the backup has committed of the guest that runs here.
    seeded: Option<Seeded>,
    /// The guest was shut down here; the record is to say so.
    ended: bool,
    #[cfg(test)]
    pub(super) bug: super::model::Bug,
}

impl Protocol {
    /// For a guest on host `me`, which knows nothing yet: also after every restart.
    pub fn new(me: impl Into<String>, policies: Policies) -> Self {
        Self {
            me: me.into(),
            policies,
            role: Role::Unknown,
            record: None,
            local: Local::default(),
            led: None,
            impatient: false,
            seeded: None,
            ended: false,
            #[cfg(test)]
            bug: super::model::Bug::None,
        }
    }

    /// The operator has chosen otherwise.
    pub fn set_policies(&mut self, policies: Policies) {
        self.policies = policies;
        if self.role == Role::Asking && policies.lost_backup == LostBackup::Hold {
            self.role = Role::Protected;
        }
    }

    /// What this host is to the guest.
    pub fn role(&self) -> &Role {
        &self.role
    }

    /// The newest record read.
    pub fn record(&self) -> Option<&Ownership> {
        self.record.as_ref()
    }

    /// Term of the newest record read.
    pub fn term(&self) -> Term {
        self.record.as_ref().map_or(Term::NONE, |record| record.term)
    }

    /// What is here of the guest.
    pub fn local(&self) -> Local {
        self.local
    }

    /// The term under which output is let go by commits only, if it is. The agent here is to promise that nothing that was
    /// ordered up to then lets it go otherwise: without that promise no backup counts ([`super::Sending::seeded`]).
    pub fn holds(&self) -> Option<Term> {
        let holds = match self.role {
            Role::Protected | Role::Asking | Role::Seeding { .. } | Role::Recovering { .. } => true,
            Role::Held | Role::Ended => true,
            Role::Unknown | Role::Solo | Role::Standby | Role::Claiming => false,
            Role::Loading | Role::Loaded | Role::Stale => false,
        };
        Some(self.term()).filter(|_| holds)
    }

    /// The host on the other side, as far as the record names one.
    pub fn peer(&self) -> Option<&str> {
        let (one, other) = match &self.record.as_ref()?.owner {
            Owner::Pair { primary, backup, .. } => (primary, backup),
            Owner::Claim { by, from, .. } => (by, from),
            Owner::Solo { owner } | Owner::Ended { by: owner } => (owner, owner),
        };
        [one, other].into_iter().find(|host| **host != self.me).map(String::as_str)
    }

    /// Takes an event and says what is to be done about it.
    pub fn step(&mut self, event: Event) -> Vec<Command> {
        let mut out = Vec::new();
        match event {
            Event::Record(record) => self.read(record, &mut out),
            Event::Local(local) => self.look(local, &mut out),
            Event::Suspect => self.suspect(),
            Event::Heard => match self.role {
                Role::Asking => self.role = Role::Protected,
                // A claim that is on its way may still be granted; the record will say.
                Role::Claiming => self.role = Role::Standby,
                _ => {}
            },
            Event::Impatient => self.impatient = self.role == Role::Held,
            Event::SeedBegins { after } => self.seed_begins(after, &mut out),
            Event::Seeded(seeded) => self.seeded(seeded),
            Event::SeedFailed => {
                self.seeded = None;
                if let Role::Seeding { ready, aborted, .. } = &mut self.role {
                    (*ready, *aborted) = (None, true);
                }
            }
            Event::Loaded => {
                if self.role == Role::Loading {
                    self.role = Role::Loaded;
                }
            }
            Event::LoadFailed => {
                if matches!(self.role, Role::Loading | Role::Loaded) {
                    // The claim stands: it is loaded again at the next read, unless the other host takes it back.
                    self.role = Role::Standby;
                    out.push(Command::Abandon(self.term()));
                }
            }
            Event::GuestEnded => self.ended = true,
        }
        out.extend(self.wanted().map(Command::Swap));
        out
    }

    /// The record this host wants now, if it wants one. Asked for again until a read shows it or another.
    pub fn wanted(&self) -> Option<Ownership> {
        if self.ended {
            return self.end_wanted();
        }
        let Some(record) = &self.record else { return self.first_wanted() };
        let me = || self.me.clone();
        let next = |generation, owner| {
            let epoch = self.seeded.as_ref().map(|seeded| seeded.epoch).or(record.epoch);
            Some(Ownership { term: record.term.next(), generation, epoch, owner })
        };
        if let Some(generation) = self.promoted_by_hand(record) {
            return next(generation, Owner::Solo { owner: me() });
        }
        match (&self.role, &record.owner) {
            (Role::Asking, Owner::Pair { primary, .. }) if *primary == self.me && self.local.runs => {
                next(record.generation, Owner::Solo { owner: me() })
            }
            (Role::Protected, Owner::Pair { primary, backup, incarnation }) if *primary == self.me => {
                let seeded = self.seeded.as_ref()?;
                let same = (&seeded.backup, &seeded.incarnation, seeded.generation)
                    == (backup, incarnation, record.generation);
                if same { None } else { next(seeded.generation, self.pair(seeded)) }
            }
            (Role::Held, Owner::Claim { from, .. })
                if *from == self.me && self.impatient && self.local.runs =>
            {
                next(record.generation, Owner::Solo { owner: me() })
            }
            (Role::Claiming, Owner::Pair { primary, backup, .. }) if *backup == self.me => {
                let incarnation = self.image(record.generation)?;
                let (by, from) = (me(), primary.clone());
                next(record.generation, Owner::Claim { by, from, incarnation })
            }
            (Role::Loaded, Owner::Claim { by, .. }) if *by == self.me => {
                next(record.generation.next(), Owner::Solo { owner: me() })
            }
            (Role::Seeding { ready: Some(seeded), aborted: false, .. }, Owner::Solo { owner })
                if *owner == self.me =>
            {
                next(seeded.generation, self.pair(seeded))
            }
            (Role::Seeding { aborted: true, .. } | Role::Recovering { .. }, Owner::Solo { owner })
                if *owner == self.me =>
            {
                next(record.generation, Owner::Solo { owner: me() })
            }
            (Role::Unknown | Role::Ended, Owner::Ended { .. }) => {
                let seeded = self.seeded.as_ref()?;
                if seeded.generation < record.generation {
                    return None;
                }
                next(seeded.generation, self.pair(seeded))
            }
            _ => None,
        }
    }

    /// An operator has vouched for the other host being off and started the guest here: it runs as a generation that no
    /// record has given out. The record follows.
    fn promoted_by_hand(&self, record: &Ownership) -> Option<Generation> {
        let generation = self.local.generation.filter(|_| self.local.runs)?;
        let elsewhere = match &record.owner {
            Owner::Pair { primary: owner, .. } | Owner::Solo { owner } => *owner != self.me,
            Owner::Claim { .. } => true,
            Owner::Ended { .. } => false,
        };
        (elsewhere && generation > record.generation).then_some(generation)
    }

    fn pair(&self, seeded: &Seeded) -> Owner {
        let (primary, backup) = (self.me.clone(), seeded.backup.clone());
        Owner::Pair { primary, backup, incarnation: seeded.incarnation }
    }

    fn first_wanted(&self) -> Option<Ownership> {
        let seeded = self.seeded.as_ref()?;
        let (generation, epoch) = (seeded.generation, Some(seeded.epoch));
        Some(Ownership { term: Term::NONE.next(), generation, epoch, owner: self.pair(seeded) })
    }

    fn end_wanted(&self) -> Option<Ownership> {
        let record = self.record.as_ref()?;
        let mine = match &record.owner {
            Owner::Pair { primary: owner, .. } | Owner::Solo { owner } => *owner == self.me,
            // What is claimed goes on elsewhere, unless the claim is taken back.
            Owner::Claim { .. } | Owner::Ended { .. } => false,
        };
        let owner = Owner::Ended { by: self.me.clone() };
        mine.then(|| Ownership { term: record.term.next(), owner, ..record.clone() })
    }

    fn look(&mut self, local: Local, out: &mut Vec<Command>) {
        self.local = local;
        match self.role {
            // An instance that appears where the guest has been lost (an operator, autostart, a late start).
            Role::Stale if self.outlived() => out.push(Command::DestroyGuest(self.term())),
            Role::Solo if !local.runs && !self.ended && local.image.is_some() => {
                out.push(Command::Activate(self.term()));
            }
            // The image came, or another did.
            Role::Standby | Role::Claiming | Role::Stale | Role::Unknown => self.settle(out),
            _ => {}
        }
    }

    /// Whether an instance runs here that is older than what the record says runs elsewhere. One whose generation nobody
    /// knows is what ran here by an earlier record; without one it is left alone: the record may be of a past in which this
    /// host had no part.
    fn outlived(&self) -> bool {
        let Some(record) = self.record.as_ref().filter(|_| self.local.runs) else { return false };
        match &record.owner {
            Owner::Pair { primary: owner, .. } | Owner::Solo { owner } => {
                let known = self.local.generation.or(self.led);
                *owner != self.me && known.is_some_and(|known| known < record.generation)
            }
            // While it is only claimed the owner of the past may get it back.
            Owner::Claim { .. } | Owner::Ended { .. } => false,
        }
    }

    /// The life of the backup agent here that holds an image of this generation, if it does. It need not be the one the
    /// record names: that one held everything let out before it died, nothing goes out by itself under the record, and a
    /// later life has been sent everything once more before it has acknowledged anything.
    fn image(&self, generation: Generation) -> Option<Incarnation> {
        self.local.image.filter(|image| image.generation == generation).map(|image| image.incarnation)
    }

    fn suspect(&mut self) {
        match self.role {
            Role::Protected if self.policies.lost_backup == LostBackup::Solo => self.role = Role::Asking,
            Role::Standby => self.role = Role::Claiming,
            _ => {}
        }
    }

    fn seed_begins(&mut self, after: EpochId, out: &mut Vec<Command>) {
        if self.role == Role::Solo {
            self.seeded = None;
            self.role = Role::Seeding { since: self.term(), after, ready: None, aborted: false };
            #[cfg(test)]
            if self.bug == super::model::Bug::SeedWithOpenGate {
                return;
            }
            out.push(Command::HoldGate(self.term()));
        }
    }

    fn seeded(&mut self, seeded: Seeded) {
        if seeded.backup == self.me {
            return;
        }
        match &mut self.role {
            Role::Seeding { after, ready, aborted: false, .. } if seeded.epoch > *after => {
                *ready = Some(seeded.clone());
            }
            Role::Unknown | Role::Ended | Role::Protected | Role::Asking => {}
            // What was committed while output went out by itself is not what a backup may go on from.
            _ => return,
        }
        self.seeded = Some(seeded);
    }

    fn read(&mut self, record: Option<Ownership>, out: &mut Vec<Command>) {
        let Some(record) = record else { return };
        // Invariant 5. An arbiter never goes back; a read that was overtaken by another does.
        if record.term < self.term() {
            #[cfg(test)]
            if self.bug == super::model::Bug::OldRecord {
                self.record = Some(record);
                return self.settle(out);
            }
            return;
        }
        self.record = Some(record);
        self.settle(out);
    }

    /// Makes the role fit the record.
    fn settle(&mut self, out: &mut Vec<Command>) {
        let Some(Ownership { term, owner, generation, .. }) = self.record.clone() else { return };
        match &owner {
            Owner::Pair { primary: at, .. } | Owner::Claim { from: at, .. } | Owner::Solo { owner: at }
                if *at == self.me =>
            {
                self.led = Some(generation);
            }
            _ => {}
        }
        match owner {
            Owner::Solo { owner } if owner == self.me => self.alone(term, out),
            Owner::Claim { by, .. } if by == self.me => {
                // An image that was gone may be there again: the agent did not answer, or has got another copy.
                if matches!(self.role, Role::Unknown | Role::Standby | Role::Claiming | Role::Stale) {
                    if self.image(generation).is_some() && !self.local.runs {
                        self.role = Role::Loading;
                        out.push(Command::Load(term));
                        #[cfg(test)]
                        if self.bug == super::model::Bug::PromoteWithoutConfirm {
                            self.role = Role::Solo;
                            out.extend([Command::Activate(term), Command::OpenGate(term)]);
                        }
                    } else if self.role != Role::Unknown {
                        self.role = Role::Stale;
                    }
                }
            }
            Owner::Claim { from, .. } if from == self.me => {
                if self.role != Role::Held {
                    self.role = Role::Held;
                    self.impatient = false;
                    out.extend([Command::HoldGate(term), Command::PauseGuest(term)]);
                }
            }
            Owner::Pair { primary, backup, incarnation } if primary == self.me => {
                self.leading(term, &backup, incarnation, out);
            }
            Owner::Pair { backup, .. }
                if backup == self.me && self.image(generation).is_some() && !self.local.runs =>
            {
                // What ended here before is over: this host has become the backup of another.
                if !matches!(self.role, Role::Standby | Role::Claiming) {
                    (self.role, self.ended, self.seeded) = (Role::Standby, false, None);
                }
            }
            Owner::Ended { .. } => {
                self.abandon(term, out);
                self.role = Role::Ended;
                self.ended = false;
                self.seeded = None;
            }
            Owner::Solo { .. } | Owner::Claim { .. } | Owner::Pair { .. } => self.lose(term, out),
        }
    }

    fn abandon(&mut self, term: Term, out: &mut Vec<Command>) {
        if matches!(self.role, Role::Loading | Role::Loaded) {
            out.push(Command::Abandon(term));
        }
    }

    /// The guest belongs to others.
    fn lose(&mut self, term: Term, out: &mut Vec<Command>) {
        self.abandon(term, out);
        let first = self.role != Role::Stale;
        self.role = Role::Stale;
        self.seeded = None;
        self.ended = false;
        if first && self.outlived() {
            out.extend([Command::HoldGate(term), Command::DestroyGuest(term)]);
        }
    }

    /// The record says Pair, and this host is its primary.
    fn leading(&mut self, term: Term, backup: &str, incarnation: Incarnation, out: &mut Vec<Command>) {
        match &self.role {
            Role::Protected | Role::Asking => {}
            Role::Seeding { ready: Some(seeded), .. }
                if seeded.backup == backup && seeded.incarnation == incarnation =>
            {
                self.role = Role::Protected;
            }
            _ => {
                self.role = Role::Protected;
                out.push(Command::HoldGate(term));
            }
        }
    }

    /// The record says Solo, and it is this host.
    fn alone(&mut self, term: Term, out: &mut Vec<Command>) {
        match self.role {
            Role::Solo => {
                // What was asked for has failed: the image is still here, and nobody else may run the guest.
                if !self.local.runs && !self.ended && self.local.image.is_some() {
                    out.push(Command::Activate(term));
                }
                return;
            }
            // The term this copy began under; only the next one says more.
            Role::Seeding { since, .. } | Role::Recovering { since } if since == term => return,
            Role::Unknown => {
                self.role = Role::Recovering { since: term };
                out.push(Command::HoldGate(term));
                #[cfg(test)]
                if self.bug == super::model::Bug::ReopenOnRestart {
                    self.role = Role::Solo;
                    out.push(Command::OpenGate(term));
                }
                return;
            }
            Role::Held => out.push(Command::ResumeGuest(term)),
            _ => {}
        }
        self.role = Role::Solo;
        self.seeded = None;
        if !self.local.runs {
            out.push(Command::Activate(term));
        }
        out.push(Command::OpenGate(term));
    }
}
