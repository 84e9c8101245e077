//! Decides everything the backup does for one guest. Pure: events and the time in, commands out.
//!
//! ```text
//!              Hello                 verified full epoch            Failover
//!  (released) -------> seeding ----------------------> standby --------------------> promoting
//!      ^                  |                              |  ^                     ready, loaded, recorded
//!      |     Goodbye      |           Goodbye            |  |  failed before it ran        |
//!      +------------------+------------------------------+  +-------------------------- activated
//!                                                                                          v
//!  superseded <------------- Hello of a newer generation while it runs here ----------- promoted
//! ```
//!
//! The rules, each with its test in `tests.rs`:
//! - a stream of an older generation than the one recorded is refused as superseded (invariants 4, 5);
//! - a guest has one stream; a newer session of the same host replaces it, anything else is busy;
//! - a delta needs its predecessor committed, a full epoch a seed and a number above the committed one;
//! - an acknowledgement is made of a [`Proof`] (invariant 3); an epoch cut off by a disconnect is dropped;
//! - once a promotion has begun nothing of the primary is accepted;
//! - the new generation is on disk before the guest may run (invariant 4).

mod event;
mod promotion;
mod standby;
mod stream;
#[cfg(test)]
mod tests;

use crate::assembly::{Attempt, Fault, Proof};
use crate::promoter::{LocalDomain, PromoteError};
pub use event::{Command, ConnectionId, Event, Identity, Way};
use promotion::{Hold, Promotion};
use standby::{Memory, StandbyPhase};
use std::sync::Arc;
use std::time::{Duration, Instant};
use stream::{Receiving, Stream};
use understudy_proto::control::{ControlFile, Role};
use understudy_proto::epoch::EpochKind;
use understudy_proto::ids::{Generation, GuestId};
use understudy_proto::ownership::{Orders, Outdated, Term};
use understudy_proto::rpc::admin::{FailoverReport, GuestState};
use understudy_proto::rpc::epoch::{EpochRef, Seed, Standby, StandbyState};
use understudy_proto::rpc::{Failure, FailureKind};

/// How often the control file is written only because epochs were committed.
const CONTROL_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Held {
    at: EpochRef,
    seed: Arc<Seed>,
    committed: Instant,
}

/// The decisions for one guest.
#[derive(Debug)]
pub struct Engine {
    identity: Identity,
    record: ControlFile,
    /// Domain persistent on the primary, from its last Hello.
    persistent: bool,
    stream: Option<Stream>,
    receiving: Receiving,
    attempt: Attempt,
    /// Seed that has arrived and waits for its full epoch.
    seed: Option<Arc<Seed>>,
    held: Option<Held>,
    standby: StandbyPhase,
    standby_text: String,
    /// Of the standby that is ready.
    memory: Memory,
    /// Numbers the moves.
    moves: u64,
    /// A part of the image may be the memory of a standby: a guest that runs there writes to it.
    image_shared: bool,
    /// Why there is no image although an epoch was committed, if that is known.
    image_lost: Option<String>,
    /// The seed the standby was made of.
    prepared: Option<Arc<Seed>>,
    promotion: Option<Promotion>,
    report: Option<FailoverReport>,
    detail: String,
    control_written: Option<Instant>,
    control_dirty: bool,
    orders: Orders,
    /// An earlier life of the agent has loaded the guest and recorded its generation, and has not let it run.
    loaded_before: bool,
}

impl Engine {
    /// For a guest heard of for the first time.
    pub fn new(identity: Identity, guest: GuestId, name: String) -> Self {
        let record = ControlFile {
            guest,
            name,
            role: Role::Released,
            generation: Generation::FIRST,
            last_committed: None,
            primary_host: String::new(),
            incarnation: identity.incarnation,
        };
        Self {
            identity,
            record,
            persistent: false,
            stream: None,
            receiving: Receiving::Nothing,
            attempt: Attempt(0),
            seed: None,
            held: None,
            standby: StandbyPhase::Absent,
            standby_text: String::new(),
            memory: Memory::Cold(String::new()),
            moves: 0,
            image_shared: false,
            image_lost: None,
            prepared: None,
            promotion: None,
            report: None,
            detail: String::new(),
            control_written: None,
            control_dirty: false,
            orders: Orders::default(),
            loaded_before: false,
        }
    }

    /// For a guest known from its control file, after a restart of the agent: no image, another incarnation.
    pub fn restarted(identity: Identity, record: ControlFile, local: LocalDomain) -> Self {
        let mut engine = Self::new(identity, record.guest, record.name.clone());
        engine.record = ControlFile { incarnation: engine.record.incarnation, ..record };
        engine.control_dirty = true;
        match (engine.record.role, local) {
            (Role::Promoting, LocalDomain::Active) => {
                // It ran before the agent could say so.
                engine.record.role = Role::Promoted;
                engine.detail = "the agent restarted during the promotion; the guest runs here".into();
            }
            (Role::Promoting, LocalDomain::Loaded) => {
                engine.loaded_before = true;
                engine.detail = "the agent restarted during the promotion; the loaded guest is paused: \
                                 `understudy failover` starts it"
                    .into();
            }
            (Role::Promoting, _) => {
                engine.detail =
                    "the agent restarted during the promotion, and the loaded guest is gone".into();
            }
            (Role::Standby, _) => {
                engine.detail =
                    "the agent restarted: no image is here until the primary has sent a full copy".into();
            }
            _ => (),
        }
        engine
    }

    /// Whether an order that was given under this term counts; `None`: an operator's. To be asked before its event.
    ///
    /// # Errors
    /// [`Outdated`]: a watchdog has given orders under a newer record.
    pub fn take_order(&mut self, term: Option<Term>) -> Result<(), Outdated> {
        self.orders.take(term)
    }

    /// What the control file says, or will say.
    pub fn record(&self) -> &ControlFile {
        &self.record
    }

    /// The stream whose messages are wanted.
    pub fn connection(&self) -> Option<ConnectionId> {
        self.stream.as_ref().map(|s| s.connection)
    }

    /// The epoch held, and since when.
    pub fn committed(&self) -> Option<(EpochRef, Instant)> {
        self.held.as_ref().map(|h| (h.at, h.committed))
    }

    /// Whether the domain is persistent on the primary.
    pub fn persistent(&self) -> bool {
        self.persistent
    }

    /// The standby domain as it is told to the primary.
    pub fn standby(&self) -> Standby {
        let state = match self.standby {
            StandbyPhase::Absent | StandbyPhase::Discarding => StandbyState::None,
            StandbyPhase::Preparing => StandbyState::Preparing,
            StandbyPhase::Ready { .. } | StandbyPhase::Checking => StandbyState::Ready,
            StandbyPhase::Failed { .. } => StandbyState::Failed,
        };
        let text = match self.standby {
            StandbyPhase::Ready { .. } | StandbyPhase::Checking if self.standby_text.is_empty() => {
                self.memory.text()
            }
            _ => self.standby_text.clone(),
        };
        Standby { state, text }
    }

    /// The failover that made the guest run here.
    pub fn report(&self) -> Option<&FailoverReport> {
        self.report.as_ref()
    }

    /// What the guest is here, in a word.
    pub fn state(&self) -> GuestState {
        match (self.record.role, &self.promotion, &self.held) {
            (_, Some(_), _) => GuestState::Promoting,
            (Role::Promoted, ..) => GuestState::Promoted,
            (Role::Stale, ..) => GuestState::Superseded,
            // It can be let run at any time.
            (Role::Promoting, ..) if self.loaded_before => GuestState::Promoting,
            (Role::Promoting, ..) => GuestState::Failed,
            (Role::Released, ..) => GuestState::Unprotected,
            (Role::Standby, None, Some(_)) => GuestState::Standby,
            (Role::Standby, None, None) if self.stream.is_some() => GuestState::Seeding,
            (Role::Standby, None, None) => GuestState::Failed,
        }
    }

    /// Why, in words.
    pub fn detail(&self) -> String {
        let stream = match (self.record.role, &self.stream) {
            (Role::Standby, None) => "no stream from the primary",
            _ => "",
        };
        [stream, &self.detail].into_iter().filter(|t| !t.is_empty()).collect::<Vec<_>>().join("; ")
    }

    /// Takes an event.
    pub fn step(&mut self, event: Event, now: Instant) -> Vec<Command> {
        let mut out = Vec::new();
        match event {
            Event::Hello { connection, hello, agreement, local } => {
                self.hello(connection, *hello, agreement, local, now, &mut out);
            }
            Event::Message(connection, message) if self.connection() == Some(connection) => {
                self.message(connection, message, now, &mut out);
            }
            Event::Message(..) => (),
            Event::Disconnected(connection, reason) if self.connection() == Some(connection) => {
                self.detail = format!("the stream ended: {reason}");
                self.stream = None;
                self.drop_open_epoch(&mut out);
            }
            Event::Disconnected(..) => (),
            Event::Verified(proof) => self.verified(proof, now, &mut out),
            Event::Rejected(attempt, at, fault) if attempt == self.attempt => {
                self.rejected(at, fault, &mut out)
            }
            Event::Rejected(..) => (),
            Event::ApplyFailed(reason) => {
                self.lose_image(&reason);
                self.receiving = Receiving::Nothing;
                out.push(Command::DropImage);
                self.detail = format!("the image was lost: {reason}");
                self.refuse_stream(
                    understudy_proto::rpc::epoch::RefusedCode::Internal,
                    format!("the image was lost: {reason}"),
                    "it is made anew when the primary connects again",
                    &mut out,
                );
                self.promotion_failed(PromoteError::new(format!("the image was lost: {reason}")), &mut out);
            }
            Event::ImageReady(at) => self.image_ready(at, now, &mut out),
            Event::ControlWritten => self.control_written(now, &mut out),
            Event::ControlFailed(reason) => self.control_failed(&reason, &mut out),
            Event::ControlNotWritten => {
                self.control_dirty = true;
                self.control_written = Some(now);
            }
            Event::Prepared(result) => self.prepared(result, now, &mut out),
            Event::Adopted(number, result) => self.adopted(number, result, &mut out),
            Event::Checked(result) => self.checked(result, now, &mut out),
            Event::Loaded(result) => self.loaded(result, now, &mut out),
            Event::Activated(result) => self.activated(result, now, &mut out),
            Event::Discarded(result) => self.discarded(result, now, &mut out),
            Event::Failover { i_have_fenced } => self.failover(i_have_fenced, Hold::No, now, &mut out),
            Event::Claimed => self.failover(true, Hold::UntilConfirmed, now, &mut out),
            Event::Confirm { proceed } => self.confirm(proceed, now, &mut out),
            Event::Release => self.release("an operator gave up what was here of the guest".into(), &mut out),
            Event::Tick => self.tick(now, &mut out),
            Event::Shutdown => {
                if self.control_dirty {
                    self.write_control(false, &mut out);
                }
            }
        }
        out
    }

    fn verified(&mut self, proof: Proof, now: Instant, out: &mut Vec<Command>) {
        let (at, attempt) = (proof.at(), proof.attempt());
        if attempt != self.attempt {
            return;
        }
        let seed = match (&self.receiving, proof.kind()) {
            (Receiving::Verifying { at: wanted, seed: Some(seed) }, EpochKind::Full) if *wanted == at => {
                Arc::clone(seed)
            }
            (Receiving::Verifying { at: wanted, seed: None }, EpochKind::Delta) if *wanted == at => {
                match &self.held {
                    Some(held) => Arc::clone(&held.seed),
                    None => return,
                }
            }
            // Dropped meanwhile; the worker has been told.
            _ => return,
        };
        self.receiving = Receiving::Nothing;
        let full = proof.kind() == EpochKind::Full;
        self.held = Some(Held { at, seed: Arc::clone(&seed), committed: now });
        self.record.last_committed = Some(at.epoch);
        self.detail.clear();
        if let Some(stream) = &self.stream {
            out.push(Command::Ack(stream.connection, proof));
        }
        out.push(Command::Apply(attempt));
        if full {
            self.image_shared = false;
            self.image_lost = None;
        }
        self.control_dirty = true;
        if full || self.control_due(now) {
            self.control_written = Some(now);
            self.write_control(false, out);
        }
        let outdated = self.prepared.as_ref().is_none_or(|p| p.domain_xml != seed.domain_xml);
        let idle = matches!(
            self.standby,
            StandbyPhase::Absent | StandbyPhase::Ready { .. } | StandbyPhase::Failed { .. }
        );
        if full && idle && (outdated || self.standby == StandbyPhase::Absent) {
            self.prepare(out);
        } else if full {
            // The new image is in memory of its own.
            self.adopt(out);
        }
    }

    fn lose_image(&mut self, reason: &str) {
        self.held = None;
        self.image_shared = false;
        self.image_lost = Some(reason.to_owned());
    }

    fn rejected(&mut self, at: EpochRef, fault: Fault, out: &mut Vec<Command>) {
        let concerned = match &self.receiving {
            Receiving::Open(open) => open.at() == at,
            Receiving::Verifying { at: wanted, .. } => *wanted == at,
            _ => false,
        };
        if concerned {
            self.reject(at, fault.code, fault.text, out);
        }
    }

    fn control_due(&self, now: Instant) -> bool {
        self.control_written.is_none_or(|t| now.saturating_duration_since(t) >= CONTROL_INTERVAL)
    }

    fn write_control(&mut self, required: bool, out: &mut Vec<Command>) {
        self.control_dirty = false;
        out.push(Command::WriteControl { file: self.record.clone(), required });
    }

    fn control_failed(&mut self, reason: &str, out: &mut Vec<Command>) {
        let text = format!("the control file cannot be written: {reason}");
        self.detail.clone_from(&text);
        self.control_dirty = true;
        if !self.record_failed(&text, out) {
            self.refuse_stream(
                understudy_proto::rpc::epoch::RefusedCode::Internal,
                text,
                "make room in the state directory of the backup agent",
                out,
            );
        }
    }

    /// Whether what is here of the guest may be given up, and what that means.
    ///
    /// # Errors
    /// Why not.
    pub fn may_release(&self) -> Result<&'static str, Failure> {
        let refuse = |code, reason: String, remedy: String| {
            Err(Failure::new(FailureKind::FailedPrecondition, code, reason).with_remedy(remedy))
        };
        let (name, host) = (&self.record.name, &self.record.primary_host);
        if self.stream.is_some() {
            return refuse(
                "primary-alive",
                format!("{host} is replicating guest {name} to this host"),
                format!("run `understudy unprotect {name}` on {host}"),
            );
        }
        if self.promotion.is_some() {
            return refuse(
                "promoting",
                format!("guest {name} is being promoted"),
                "wait until `understudy status` shows how that ended".into(),
            );
        }
        Ok(match self.record.role {
            Role::Promoted => "the guest runs on here, unprotected",
            _ => "the copy that was here is dropped",
        })
    }

    /// Drops everything but the generation, which is remembered for good (invariant 5).
    fn release(&mut self, detail: String, out: &mut Vec<Command>) {
        // What was promoted is nobody's standby any more, however much it looks like one.
        if self.record.role != Role::Promoted {
            self.forget_image(out);
            if self.standby == StandbyPhase::Absent {
                // An earlier life of the agent may have left one.
                self.discard(out);
            }
        }
        self.record.role = Role::Released;
        self.record.last_committed = None;
        self.detail = detail;
        self.write_control(false, out);
    }

    fn tick(&mut self, now: Instant, out: &mut Vec<Command>) {
        if self.control_dirty && self.control_due(now) {
            self.control_written = Some(now);
            self.write_control(false, out);
        }
        self.confirmation_due(now, out);
        self.look_after_standby(now, out);
    }
}
