//! The protocol with time: when to suspect, to read, to lose patience.

use std::mem::discriminant;
use std::time::{Duration, Instant};

use understudy_proto::heartbeat::Heartbeat;
use understudy_proto::ids::Generation;
use understudy_proto::ownership::Ownership;

use super::detector::{Detector, Suspicion};
use super::event::{Command, Event, Policies, QemuCrash, Role};
use super::protocol::Protocol;
use super::report::{Takeover, Timeline};

/// How long things may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// Between two heartbeats on a path.
    pub heartbeat: Duration,
    /// Silence after which the primary is suspected. Longer than `backup_silent`: when both hosts are well and only the
    /// link is cut, the guest stays where it is.
    pub primary_silent: Duration,
    /// Silence after which the backup is suspected.
    pub backup_silent: Duration,
    /// Silence of a QEMU whose host is heard.
    pub qemu_silent: Duration,
    /// How long a claim may stay unconfirmed before the other host takes the guest back.
    pub claim_patience: Duration,
    /// Between two reads of the record while nothing happens.
    pub read_idle: Duration,
    /// The same while a record is wanted or expected.
    pub read_eager: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(100),
            primary_silent: Duration::from_millis(1500),
            backup_silent: Duration::from_millis(1000),
            qemu_silent: Duration::from_secs(5),
            claim_patience: Duration::from_secs(30),
            read_idle: Duration::from_secs(2),
            read_eager: Duration::from_millis(100),
        }
    }
}

/// What the engine is told beside the [`Event`]s of the protocol.
#[derive(Debug, Clone)]
pub enum Input {
    /// The time asked for by [`Engine::deadline`] has come.
    Tick,
    /// From the other host, over any path.
    Heartbeat(Heartbeat),
    /// The other host has sent something else that only a living one can: an epoch, an acknowledgement.
    Alive,
    /// An operator wants the guest here, where its image is: for a while the other host counts as suspected.
    Claim,
    /// For the protocol. Suspicion and impatience are the engine's own.
    Event(Event),
}

/// What the engine asks for, and says.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// To be carried out.
    Command(Command),
    /// The other host is suspected, or of something else than before.
    Suspected(Suspicion),
    /// It is heard again.
    Heard,
    /// The role has changed.
    Became(Role),
    /// This host has taken the guest over.
    TookOver(Takeover),
}

/// One guest on one host.
#[derive(Debug, Clone)]
pub struct Engine {
    protocol: Protocol,
    policies: Policies,
    timing: Timing,
    detector: Detector,
    suspicion: Option<Suspicion>,
    /// An operator's claim counts until then.
    claim_until: Option<Instant>,
    role_since: Instant,
    read_at: Instant,
    /// The swap asked for last, while it is wanted.
    asked: Option<Ownership>,
    timeline: Timeline,
}

impl Engine {
    /// For a guest on host `me`, of which nothing is known yet.
    pub fn new(me: impl Into<String>, policies: Policies, timing: Timing, now: Instant) -> Self {
        Self {
            protocol: Protocol::new(me, policies),
            policies,
            timing,
            detector: Detector::new(now),
            suspicion: None,
            claim_until: None,
            role_since: now,
            read_at: now,
            asked: None,
            timeline: Timeline::default(),
        }
    }

    /// The part without time.
    pub fn protocol(&self) -> &Protocol {
        &self.protocol
    }

    /// The operator has chosen otherwise.
    pub fn set_policies(&mut self, policies: Policies) {
        self.policies = policies;
        self.protocol.set_policies(policies);
    }

    /// Why the other host is suspected, if it is.
    pub fn suspicion(&self) -> Option<Suspicion> {
        self.suspicion
    }

    /// Takes what has happened and says what is to be done about it.
    pub fn step(&mut self, input: Input, now: Instant) -> Vec<Output> {
        let mut out = Vec::new();
        match input {
            Input::Tick => {}
            Input::Heartbeat(heartbeat) => {
                let known = self.protocol.record().map_or(Generation(0), |record| record.generation);
                self.detector.heartbeat(&heartbeat, known, now);
            }
            Input::Alive => self.detector.alive(now),
            Input::Claim => self.claim_until = Some(now + self.timing.claim_patience),
            Input::Event(event) => self.tell(event, now, &mut out),
        }
        self.detect(now, &mut out);
        if *self.protocol.role() == Role::Held
            && now.saturating_duration_since(self.role_since) >= self.timing.claim_patience
        {
            self.tell(Event::Impatient, now, &mut out);
        }
        if now >= self.read_at {
            // A swap that got lost is asked for again, and whatever came of it is read.
            self.asked = self.protocol.wanted();
            out.extend(self.asked.clone().map(|new| Output::Command(Command::Swap(new))));
            out.push(Output::Command(Command::Read));
            self.read_later(now);
        }
        out
    }

    /// When [`Input::Tick`] is wanted, if nothing else happens before.
    pub fn deadline(&self) -> Instant {
        let mut due = self.read_at;
        if let Some((after, _)) = self.watches()
            && self.suspicion.is_none()
        {
            due = due.min(self.detector.deadline(after));
        }
        if *self.protocol.role() == Role::Held {
            due = due.min((self.role_since + self.timing.claim_patience).max(self.read_at));
        }
        due
    }

    /// Whose silence matters now, and for how long it may last.
    fn watches(&self) -> Option<(Duration, Option<Duration>)> {
        let qemu = (self.policies.qemu_crash == QemuCrash::Failover).then_some(self.timing.qemu_silent);
        Some(match watched_as(self.protocol.role())? {
            Watched::Backup => (self.timing.backup_silent, None),
            Watched::Primary => (self.timing.primary_silent, qemu),
        })
    }

    fn detect(&mut self, now: Instant, out: &mut Vec<Output>) {
        let Some((after, qemu)) = self.watches() else {
            (self.suspicion, self.claim_until) = (None, None);
            return;
        };
        let found = self.detector.suspicion(after, qemu, now).or_else(|| self.wanted_here(now));
        match (found, self.suspicion) {
            (Some(found), None) => {
                self.suspicion = Some(found);
                self.timeline.suspected(found, self.detector.last_of(found), now);
                out.push(Output::Suspected(found));
                self.tell(Event::Suspect, now, out);
                self.read_at = now + self.timing.read_eager;
            }
            (None, Some(_)) => {
                self.suspicion = None;
                out.push(Output::Heard);
                self.tell(Event::Heard, now, out);
            }
            // Its QEMU hung and now its host is silent too, or the other way round: whether it may be switched off hangs on it.
            (Some(found), Some(before)) if discriminant(&found) != discriminant(&before) => {
                self.suspicion = Some(found);
                out.push(Output::Suspected(found));
            }
            _ => {}
        }
    }

    /// Somebody wants the guest to run here, though nothing has failed.
    fn wanted_here(&self, now: Instant) -> Option<Suspicion> {
        if !matches!(self.protocol.role(), Role::Standby | Role::Claiming) {
            return None;
        }
        let operator = self.claim_until.is_some_and(|until| now < until).then_some(Suspicion::Operator);
        operator.or_else(|| self.detector.yields().then_some(Suspicion::Yields))
    }

    fn tell(&mut self, event: Event, now: Instant, out: &mut Vec<Output>) {
        let before = self.protocol.role().clone();
        let commands = self.protocol.step(event);
        let role = self.protocol.role();
        if discriminant(role) != discriminant(&before) {
            self.role_since = now;
            out.push(Output::Became(role.clone()));
            if watched_as(&before) != watched_as(role) {
                // What was suspected of a backup is no suspicion of a primary, which would never be told.
                self.suspicion = None;
                self.detector.watch_from(now);
            }
            if let Some(takeover) = self.timeline.became(role, self.protocol.record(), now) {
                out.push(Output::TookOver(takeover));
            }
            self.read_later(now);
        } else if self.protocol.wanted().is_some() {
            self.read_at = self.read_at.min(now + self.timing.read_eager);
        }
        let asked = std::mem::replace(&mut self.asked, self.protocol.wanted());
        for command in commands {
            let swap = match &command {
                Command::Swap(new) => Some(new.clone()),
                _ => None,
            };
            // Every answer of the arbiter makes the protocol say again what it wants. One that fails is asked again in
            // time, not as fast as the arbiter answers.
            if swap.is_some() && swap == asked {
                continue;
            }
            out.push(Output::Command(command));
            // Read behind it: that is how its outcome is learnt.
            out.extend(swap.map(|_| Output::Command(Command::Read)));
        }
    }

    fn read_later(&mut self, now: Instant) {
        let expects = matches!(
            self.protocol.role(),
            Role::Asking | Role::Held | Role::Claiming | Role::Loaded | Role::Recovering { .. }
        );
        let eager = expects || self.protocol.wanted().is_some();
        self.read_at = now + if eager { self.timing.read_eager } else { self.timing.read_idle };
    }
}

/// What the other host is watched as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Watched {
    Primary,
    Backup,
}

fn watched_as(role: &Role) -> Option<Watched> {
    match role {
        Role::Protected | Role::Asking => Some(Watched::Backup),
        Role::Standby | Role::Claiming => Some(Watched::Primary),
        _ => None,
    }
}
