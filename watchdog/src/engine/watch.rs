//! One guest.

use std::time::{Duration, Instant};

use understudy_libvirt::RunState;
use understudy_proto::ids::GuestId;
use understudy_proto::protected::ProtectedGuest;

use super::event::{About, Cause, Command, Depth, Facts, Order, Report, Seen, Trouble};
use crate::bound::{LOOK, REPEAT};
use crate::life::Life;

/// Between two looks at a guest that is being let go: QEMU needs milliseconds.
const SOON: Duration = Duration::from_millis(10);

/// Before a guest that could not be looked at is looked at again: doubled each time, up to [`LOOK`].
const AGAIN: Duration = Duration::from_millis(50);

/// An answer that takes longer is told to people.
const SILENT_AFTER: Duration = Duration::from_secs(2);

/// An answer that takes longer is not waited for any more. libvirt itself gives up after 30 s.
pub(super) const REPLACE_AFTER: Duration = Duration::from_secs(45);

/// Each way that is given up costs a thread that waits, maybe for ever.
pub(super) const MAX_REPLACED: u32 = 3;

/// One stop under a living agent.
#[derive(Debug)]
struct Stop {
    /// First seen.
    since: Instant,
    /// As long as this number stays, the guest has not run.
    runs: u64,
}

/// Checkpoints that are to end.
#[derive(Debug)]
struct Incident {
    cause: Cause,
    /// The death, or the first sight of the stop.
    since: Instant,
    /// What the guest did when it was found in COLO.
    found: Option<RunState>,
    /// The last order.
    ordered: Option<Instant>,
}

impl Incident {
    fn new(cause: Cause, since: Instant) -> Self {
        Self { cause, since, found: None, ordered: None }
    }
}

/// See the module's description.
#[derive(Debug)]
pub(super) struct Watch {
    pub(super) guest: GuestId,
    pub(super) name: String,
    /// Asked or told, and not answered, since then.
    asked: Option<Instant>,
    told_silent: bool,
    replaced: u32,
    /// The next look.
    due: Instant,
    failures: u32,
    stop: Option<Stop>,
    incident: Option<Incident>,
    /// Said once, until it changes.
    left_alone: Option<RunState>,
    told_cannot_tell: bool,
}

impl Watch {
    pub(super) fn new(guest: ProtectedGuest, life: Life, now: Instant) -> Self {
        Self {
            guest: guest.guest,
            name: guest.name,
            asked: None,
            told_silent: false,
            replaced: 0,
            due: now,
            failures: 0,
            stop: None,
            incident: (life == Life::Dead).then(|| Incident::new(Cause::Died, now)),
            left_alone: None,
            told_cannot_tell: false,
        }
    }

    fn report(&self, what: About, commands: &mut Vec<Command>) {
        commands.push(Command::Report(Report::Guest { guest: self.guest, name: self.name.clone(), what }));
    }

    /// The agent has died, come back, or nothing is known of it any more.
    pub(super) fn life(&mut self, life: Life, now: Instant, commands: &mut Vec<Command>) {
        let begun = self.incident.take().is_some_and(|incident| incident.ordered.is_some());
        if begun && life == Life::Alive {
            self.report(About::HandedOver, commands);
        }
        self.stop = None;
        self.left_alone = None;
        self.failures = 0;
        self.due = now;
        if life == Life::Dead {
            self.incident = Some(Incident::new(Cause::Died, now));
        }
    }

    /// Takes what a look has shown.
    pub(super) fn seen(
        &mut self,
        seen: Result<Seen, Trouble>,
        life: Life,
        hung_after: Duration,
        now: Instant,
        commands: &mut Vec<Command>,
    ) {
        self.answered();
        let seen = match seen {
            Ok(seen) => seen,
            Err(trouble) => return self.trouble(trouble, now, commands),
        };
        self.failures = 0;
        self.due = now + LOOK;
        match (life, seen) {
            (Life::Unknown, _) => {}
            // Asked while the agent lived: the word that stops the guest may be on its way.
            (Life::Dead, Seen::Running) => self.due = now,
            (Life::Dead, Seen::Full(facts)) => self.orphaned(&facts, now, commands),
            (Life::Alive, Seen::Running) => self.runs_on(RunState::Running, now, commands),
            (Life::Alive, Seen::Full(facts)) => self.owned(&facts, hung_after, now, commands),
        }
    }

    /// Takes the outcome of an order.
    pub(super) fn done(&mut self, done: Result<(), Trouble>, now: Instant, commands: &mut Vec<Command>) {
        self.answered();
        match done {
            Ok(()) => self.due = now,
            // What QEMU refuses is what it does not need, or not yet: looking tells.
            Err(Trouble::Refused(reason)) => {
                self.report(About::Trouble { reason }, commands);
                self.due = now + SOON;
            }
            Err(trouble) => self.trouble(trouble, now, commands),
        }
    }

    fn answered(&mut self) {
        self.asked = None;
        self.told_silent = false;
        self.replaced = 0;
    }

    fn trouble(&mut self, trouble: Trouble, now: Instant, commands: &mut Vec<Command>) {
        // What is stopped may have run meanwhile.
        self.stop = None;
        match trouble {
            Trouble::Off => {
                self.incident = None;
                self.failures = 0;
                self.due = now + LOOK;
            }
            Trouble::Refused(reason) | Trouble::Unreachable(reason) => {
                if self.failures == 0 {
                    self.report(About::Trouble { reason }, commands);
                }
                self.due = now + (AGAIN * 2_u32.pow(self.failures.min(8))).min(LOOK);
                self.failures = self.failures.saturating_add(1);
            }
        }
    }

    /// Its agent is dead.
    fn orphaned(&mut self, facts: &Facts, now: Instant, commands: &mut Vec<Command>) {
        use RunState::{Colo, FinishMigrate, PostMigrate, Running};
        let told = self.incident.as_ref().is_some_and(|incident| incident.ordered.is_some());
        match &facts.state {
            Running | Colo | FinishMigrate if facts.colo => {
                self.left_alone = None;
                self.order(Order::LostHeartbeat, Cause::Died, &facts.state, now, commands);
            }
            state if facts.colo => {
                if self.left_alone.as_ref() != Some(state) {
                    self.left_alone = Some(state.clone());
                    self.report(About::LeftAlone { state: state.clone() }, commands);
                }
            }
            // A full copy whose reader is gone: it fails, and the guest runs; or it comes to its end and enters COLO.
            _ if facts.migrating => {
                let since = self.incident.get_or_insert_with(|| Incident::new(Cause::Died, now)).since;
                self.due = now + (now.saturating_duration_since(since) / 10).clamp(SOON, LOOK);
            }
            state @ (Colo | FinishMigrate | PostMigrate) if facts.armed || told => {
                self.order(Order::Continue, Cause::Died, state, now, commands);
            }
            state => self.runs_on(state.clone(), now, commands),
        }
    }

    /// Its agent lives.
    fn owned(&mut self, facts: &Facts, hung_after: Duration, now: Instant, commands: &mut Vec<Command>) {
        if !facts.is_stopped_by_checkpoint() {
            self.stop = None;
            if facts.colo || !facts.migrating {
                self.runs_on(facts.state.clone(), now, commands);
            } else if self.incident.is_some() {
                self.due = now + SOON;
            }
            return;
        }
        let Some(runs) = facts.runs else {
            if !std::mem::replace(&mut self.told_cannot_tell, true) {
                self.report(About::CannotTell, commands);
            }
            return;
        };
        let since = match &self.stop {
            Some(stop) if stop.runs == runs => stop.since,
            _ => {
                self.incident = None;
                self.stop = Some(Stop { since: now, runs });
                now
            }
        };
        if now.saturating_duration_since(since) < hung_after {
            self.due = (now + LOOK).min(since + hung_after);
        } else {
            self.incident.get_or_insert_with(|| Incident::new(Cause::Hung, since));
            self.order(Order::LostHeartbeat, Cause::Hung, &facts.state, now, commands);
        }
    }

    /// No checkpoint holds it any more.
    fn runs_on(&mut self, state: RunState, now: Instant, commands: &mut Vec<Command>) {
        self.stop = None;
        let Some(incident) = self.incident.take() else { return };
        if let (Some(found), Some(_)) = (incident.found, incident.ordered) {
            let after = now.saturating_duration_since(incident.since);
            self.report(About::Freed { cause: incident.cause, found, now: state, after }, commands);
        }
    }

    /// Unless the last one may still take effect.
    fn order(
        &mut self,
        order: Order,
        cause: Cause,
        state: &RunState,
        now: Instant,
        commands: &mut Vec<Command>,
    ) {
        let incident = self.incident.get_or_insert_with(|| Incident::new(cause, now));
        incident.found.get_or_insert_with(|| state.clone());
        if incident.ordered.is_some_and(|at| now.saturating_duration_since(at) < REPEAT) {
            self.due = now + SOON;
            return;
        }
        incident.ordered = Some(now);
        self.asked = Some(now);
        commands.push(Command::Order(self.guest, order));
    }

    /// Looks if it is time, and does not wait for ever for an answer.
    pub(super) fn due(&mut self, life: Life, now: Instant, commands: &mut Vec<Command>) {
        if let Some(asked) = self.asked {
            let waited = now.saturating_duration_since(asked);
            if waited >= SILENT_AFTER && !self.told_silent {
                self.told_silent = true;
                self.report(About::Silent { waited }, commands);
            }
            if waited < REPLACE_AFTER || self.replaced >= MAX_REPLACED {
                return;
            }
            self.replaced += 1;
            self.asked = None;
            self.stop = None;
            self.due = now;
            commands.push(Command::Replace(self.guest));
        }
        if life == Life::Unknown || now < self.due {
            return;
        }
        let depth = match life {
            Life::Alive if self.incident.is_none() && self.stop.is_none() => Depth::Glance,
            Life::Alive => Depth::Count,
            Life::Dead | Life::Unknown => Depth::Full,
        };
        self.asked = Some(now);
        self.told_silent = false;
        commands.push(Command::Look(self.guest, depth));
    }

    pub(super) fn deadline(&self, life: Life) -> Option<Instant> {
        match self.asked {
            Some(asked) if !self.told_silent => Some(asked + SILENT_AFTER),
            Some(asked) if self.replaced < MAX_REPLACED => Some(asked + REPLACE_AFTER),
            Some(_) => None,
            None => (life != Life::Unknown).then_some(self.due),
        }
    }
}
