//! One guest of a keeper.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tracing::{debug, error, info, warn};
use understudy_proto::heartbeat::Heartbeat;
use understudy_proto::ids::{EpochId, Generation, GuestId};
use understudy_proto::ownership::Owner;
use understudy_proto::policy::GuestSettings;
use understudy_proto::rpc::Failure;

use super::fencing::{Fenced, Fencing};
use super::handing::Handing;
use super::hands::{self, Hands};
use super::host::{Place, Seen};
use super::renew::Renewal;
use super::reports::{Finished, Reports};
use super::{Answer, Settings};
use crate::arbiter::Arbiter;
use crate::keeper::Host;
use crate::owner::{Command, Engine, Event, Input, Output, Policies, QemuCrash, Role, Seeded, Takeover};

/// A guest that runs alone and is not there for so long was ended.
const GONE: Duration = Duration::from_secs(5);

/// A full copy whose backup is lost for so long is given up.
const LOST: Duration = Duration::from_secs(10);

/// How long a report waits for what the backup agent says of the promotion.
const REPORT: Duration = Duration::from_secs(60);

pub(super) struct Kept {
    pub(super) guest: GuestId,
    /// Empty until an agent has said it.
    pub(super) name: String,
    pub(super) engine: Engine,
    pub(super) hands: Hands,
    pub(super) handing: Handing,
    /// The host the guest was protected on first.
    pub(super) home: Option<String>,
    /// Those of the watchdog.
    defaults: Policies,
    /// Those of the guest.
    policies: Policies,
    /// How the guest is protected, or was last.
    settings: Option<GuestSettings>,
    pub(super) fencing: Fencing,
    peer: Option<Heartbeat>,
    last: Option<Seen>,
    /// As the last look found it.
    protecting: bool,
    crashed: bool,
    beats: u64,
    /// Commands that open the gate and are not done; until then the agent's word about a protection is of before.
    opening: u32,
    /// The look under way began before the gate was open.
    outdated: bool,
    renewal: Renewal,
    gone_since: Option<Instant>,
    lost_since: Option<Instant>,
    takeover: Option<(Takeover, Fenced, Instant)>,
    reports: Reports,
}

impl Kept {
    pub(super) fn new(
        guest: GuestId,
        settings: &Settings,
        arbiter: Arc<dyn Arbiter>,
        host: Arc<dyn Host>,
        outbox: mpsc::Sender<Answer>,
        now: Instant,
    ) -> Self {
        let known = settings.reports.settings(guest);
        let policies = known.as_ref().map_or(settings.policies, |known| settings.policies.of(&known.policy));
        Self {
            guest,
            name: String::new(),
            engine: Engine::new(settings.host.clone(), policies, settings.timing, now),
            hands: hands::start(guest, arbiter, host, outbox),
            handing: Handing::default(),
            home: settings.reports.home(guest),
            defaults: settings.policies,
            policies,
            settings: known,
            fencing: Fencing::new(settings.fence.clone()),
            peer: None,
            last: None,
            protecting: false,
            crashed: false,
            beats: 0,
            opening: 0,
            outdated: false,
            renewal: Renewal::new(settings.spares.clone()),
            gone_since: None,
            lost_since: None,
            takeover: None,
            reports: settings.reports.clone(),
        }
    }

    pub(super) fn event(&mut self, event: Event, now: Instant) {
        self.step(Input::Event(event), now);
    }

    pub(super) fn tick(&mut self, now: Instant) {
        self.step(Input::Tick, now);
    }

    /// An operator wants it here.
    pub(super) fn claim(&mut self, now: Instant) {
        self.step(Input::Claim, now);
    }

    /// The arbiter has answered, or not. If it is lost as the other host is, fencing may be the way.
    pub(super) fn arbiter(&mut self, answered: bool, now: Instant) {
        self.fencing.arbiter(answered, now);
        let (role, suspicion) = (self.engine.protocol().role(), self.engine.suspicion());
        if let Some(command) = self.fencing.due(role, suspicion, self.policies.lost_backup, now) {
            self.hands.fence(command);
        }
    }

    pub(super) fn look_begins(&mut self) {
        self.outdated = self.opening > 0;
    }

    pub(super) fn opened(&mut self) {
        self.opening = self.opening.saturating_sub(1);
        // What is being looked at now may be of before.
        self.outdated = true;
    }

    /// A protection that this keeper has begun is on, or could not be had.
    pub(super) fn protected(&mut self, to: &str, result: Result<(), Failure>, now: Instant) {
        match &result {
            Ok(()) => info!(guest = %self.guest, to, "protected again"),
            Err(failure) if self.renewal.is_news(&failure.reason) => {
                info!(guest = %self.guest, to, reason = failure.reason, "cannot be protected again yet");
            }
            Err(_) => {}
        }
        self.renewal.ended(result.is_ok(), now);
        self.outdated = true;
    }

    pub(super) fn heard(&mut self, heartbeat: Heartbeat, now: Instant) {
        let newer = self
            .peer
            .as_ref()
            .is_none_or(|peer| (peer.life, peer.number) < (heartbeat.life, heartbeat.number));
        if newer {
            self.peer = Some(heartbeat.clone());
            // Who runs the guest knows; here an agent may still know what was once.
            if let Some(said) = heartbeat.settings.as_ref().filter(|_| !self.protecting) {
                self.settled(said);
            }
        }
        self.step(Input::Heartbeat(heartbeat), now);
    }

    pub(super) fn seen(&mut self, mut seen: Seen, now: Instant) {
        let before = self.last.take();
        if !seen.name.is_empty() {
            self.name.clone_from(&seen.name);
        }
        // A QEMU that does not answer was alive when it last did.
        if seen.qemu.is_none() {
            let counts = seen.protecting || seen.place == Place::Hangs;
            seen.qemu = before.as_ref().and_then(|before| before.qemu).filter(|_| counts);
        }
        // An instance that has lost the guest is ended also when it hangs.
        if *self.engine.protocol().role() == Role::Stale && seen.place == Place::Hangs {
            seen.local.runs = true;
        }
        self.protecting = seen.protecting;
        if let Some(said) = &seen.settings {
            self.settled(said);
        }
        let committed = before.as_ref().is_some_and(|before| before.epoch < seen.epoch);
        if committed {
            // Both agents have had to do with it.
            self.step(Input::Alive, now);
        }
        if self.engine.protocol().local() != seen.local {
            self.step(Input::Event(Event::Local(seen.local)), now);
        }
        let let_go = before.as_ref().is_some_and(|before| before.listed) && !seen.listed && !seen.superseded;
        if self.is_over(&seen, let_go, now) {
            self.step(Input::Event(Event::GuestEnded), now);
        }
        if !self.outdated && self.opening == 0 {
            self.protection(&seen, now);
            self.renew(&seen, now);
        }
        self.have_it_held(&seen);
        self.report(&seen, now);
        self.last = Some(seen);
    }

    /// An agent that was started anew, or has not been told, knows nothing of the record under which output is held.
    fn have_it_held(&self, seen: &Seen) {
        let promised = seen.sending.and_then(|sending| sending.held);
        if let (Some(term), Some(promised)) = (self.engine.protocol().holds(), promised)
            && promised < term
        {
            self.hands.give(Command::HoldGate(term));
        }
    }

    /// How the guest is protected.
    fn settled(&mut self, said: &GuestSettings) {
        if self.settings.as_ref() == Some(said) {
            return;
        }
        self.settings = Some(said.clone());
        self.reports.remember_settings(self.guest, said);
        let policies = self.defaults.of(&said.policy);
        if policies != self.policies {
            info!(guest = %self.guest, ?policies, "the guest's own choices");
            self.policies = policies;
            self.engine.set_policies(policies);
        }
    }

    /// Whether the guest that runs here by the record was ended.
    fn is_over(&mut self, seen: &Seen, let_go: bool, now: Instant) -> bool {
        let protocol = self.engine.protocol();
        let known = protocol.record().map_or(Generation(0), |record| record.generation);
        let over = seen.over.filter(|over| over.generation >= known);
        let crashed =
            over.is_some_and(|over| over.crashed) && self.policies.qemu_crash == QemuCrash::Failover;
        let leads = matches!(protocol.role(), Role::Protected | Role::Asking);
        self.crashed = crashed;
        // Alone there is nobody who could take it over: when it is gone it is over, however that came.
        let alone = matches!(protocol.role(), Role::Solo | Role::Recovering { .. });
        let gone = alone && seen.place == Place::Off && seen.local.image.is_none() && !seen.protecting;
        self.gone_since = if gone { self.gone_since.or(Some(now)) } else { None };
        let gone_for = self.gone_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        // What the agent has let go is not protected any more, however that came: no image may be started from.
        leads && !crashed && (over.is_some() || let_go) || gone_for >= GONE
    }

    /// What a protection that goes on here means.
    fn protection(&mut self, seen: &Seen, now: Instant) {
        let role = self.engine.protocol().role();
        let seeding = matches!(role, Role::Seeding { aborted: false, .. });
        // What an agent does not say for a while goes on, as far as is known.
        self.lost_since =
            if seeding && (seen.degraded || seen.busy) { self.lost_since.or(Some(now)) } else { None };
        let lost = self.lost_since.is_some_and(|since| now.saturating_duration_since(since) >= LOST);
        match role {
            Role::Solo if seen.protecting => {
                let after = seen.sending.map_or(EpochId(0), |sending| sending.committed);
                self.step(Input::Event(Event::SeedBegins { after }), now);
            }
            Role::Seeding { aborted: false, .. } if !(seen.protecting || seen.busy) || lost => {
                self.lost_since = None;
                self.step(Input::Event(Event::SeedFailed), now);
            }
            _ => {}
        }
        if let Some(seeded) = self.seeded(seen) {
            self.step(Input::Event(Event::Seeded(seeded)), now);
        }
    }

    /// A guest that runs here alone is protected again as soon as somebody can.
    fn renew(&mut self, seen: &Seen, now: Instant) {
        let alone = *self.engine.protocol().role() == Role::Solo;
        if alone && seen.local.runs && !(seen.protecting || seen.busy) && self.takeover.is_none() {
            let own = self.settings.as_ref().map_or(&[][..], |settings| &settings.policy.spares);
            if let Some(to) = self.renewal.next(own, now) {
                debug!(guest = %self.guest, to, "to be protected again");
                self.hands.protect(to, self.settings.clone(), self.engine.protocol().term());
            }
        } else {
            self.renewal.rest(now);
        }
    }

    /// What the backup agent says of the promotion completes the report of a takeover.
    fn report(&mut self, seen: &Seen, now: Instant) {
        let Some((takeover, _, since)) = &self.takeover else { return };
        let promotion =
            seen.promotion.clone().filter(|promotion| promotion.generation >= takeover.generation);
        if promotion.is_none() && now.saturating_duration_since(*since) < REPORT {
            return;
        }
        let Some((takeover, fenced, _)) = self.takeover.take() else { return };
        self.reports.write(Finished::takeover(self.guest, &self.name, takeover, &fenced, promotion));
    }

    fn seeded(&self, seen: &Seen) -> Option<Seeded> {
        seen.sending?.seeded(self.peer.as_ref()?, self.engine.protocol().term())
    }

    /// Whether a protection is on here that could be handed over.
    pub(super) fn is_protected(&self) -> bool {
        self.last.as_ref().is_some_and(|seen| seen.sending.is_some() && !seen.degraded)
    }

    pub(super) fn heartbeat(&mut self, host: &str, life: u64, now: Instant) -> Heartbeat {
        self.beats += 1;
        let protocol = self.engine.protocol();
        let last = self.last.as_ref();
        let image = protocol.local().image;
        let known = protocol.record().map_or(Generation(0), |record| record.generation);
        let generation = image.map(|image| image.generation).or(protocol.local().generation).unwrap_or(known);
        let over = last.and_then(|seen| seen.over).is_some_and(|over| over.generation >= generation);
        Heartbeat {
            guest: self.guest,
            host: host.to_owned(),
            life,
            number: self.beats,
            term: protocol.term(),
            generation,
            epoch: last.map_or(EpochId(0), |seen| seen.epoch),
            qemu_age: last.and_then(|seen| seen.qemu).map(|at| now.saturating_duration_since(at)),
            image: image.map(|image| image.incarnation),
            ended: *protocol.role() == Role::Ended || (over && !self.crashed),
            yields: self.handing.yields() && matches!(protocol.role(), Role::Protected | Role::Held),
            crashed: self.crashed,
            settings: last.filter(|seen| seen.protecting).and_then(|seen| seen.settings.clone()),
        }
    }

    fn step(&mut self, input: Input, now: Instant) {
        let guest = self.guest;
        let recovering = matches!(self.engine.protocol().role(), Role::Recovering { .. });
        for output in self.engine.step(input, now) {
            match output {
                // The protection was begun before this life of the watchdog. Its end would open the gate; that it stays
                // as it is can do no harm, and the protection goes on.
                Output::Command(Command::OpenGate(_)) if recovering && self.protecting => {
                    info!(%guest, "a protection is under way and goes on");
                }
                Output::Command(command) => self.command(command),
                Output::Suspected(why) => {
                    self.fencing.suspected();
                    let peer = self.engine.protocol().peer().unwrap_or_default();
                    warn!(%guest, peer, %why, "the other host is suspected");
                }
                Output::Heard => info!(%guest, "the other host is heard again"),
                Output::Became(role) => {
                    let term = self.engine.protocol().term().0;
                    info!(%guest, role = role.label(), term, "this host");
                }
                Output::TookOver(report) => match serde_json::to_string(&report) {
                    Ok(text) => {
                        warn!(%guest, report = text, "the guest was taken over");
                        self.takeover = Some((report, self.fencing.report(), now));
                    }
                    Err(error) => error!(%guest, %error, "the guest was taken over"),
                },
            }
        }
        self.find_home();
        self.handing.follow(self.engine.protocol(), now, &self.hands);
    }

    fn command(&mut self, command: Command) {
        let guest = self.guest;
        match &command {
            Command::Swap(new) => {
                info!(%guest, term = new.term.0, owner = ?new.owner, "asked of the arbiter");
            }
            Command::OpenGate(_) => self.opening += 1,
            Command::DestroyGuest(_) => self.lost(),
            _ => {}
        }
        debug!(%guest, ?command, "to be carried out");
        self.hands.give(command);
    }

    /// The guest runs elsewhere, and what is here of it goes, with what it still wanted to send.
    fn lost(&self) {
        let Some(record) = self.engine.protocol().record() else { return };
        let held = self.last.as_ref().and_then(|seen| seen.held_bytes);
        let epoch = self.last.as_ref().map(|seen| seen.epoch);
        self.reports.write(Finished::lost(self.guest, &self.name, record, epoch, held));
    }

    /// The first host of a protection is its home.
    fn find_home(&mut self) {
        let Some(record) = self.engine.protocol().record() else { return };
        match &record.owner {
            Owner::Pair { primary, .. } if self.home.is_none() => {
                self.home = Some(primary.clone());
                self.reports.remember_home(self.guest, Some(primary));
            }
            Owner::Ended { .. } if self.home.take().is_some() => self.reports.remember_home(self.guest, None),
            _ => {}
        }
    }
}
