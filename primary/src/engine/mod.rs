//! The decisions of one guest's protection, without clock, socket or lock: events in, commands out.
//!
//! Two things go on side by side, the stream to the backup and the capture of the guest:
//!
//! ```text
//! link      Down --Connect--> Connecting --HelloAck--> Up --lost--> Down ...
//!
//! capture   Idle --Arm--> Arming --Start--> Waiting --ready--> Ready --Checkpoint--> Stopping --+
//!            ^                                 ^                                                |
//!            |                                 +-----------------WaitReady----------------------+
//!            +-- Disarming <-- a failure, the need of a full copy, the end of the protection
//! ```
//!
//! A checkpoint is taken when all of this holds: capture is Ready, the link is Up and the backup's base is ours, no
//! epoch is in flight ([`MAX_EPOCHS_IN_FLIGHT`] is 1), the epoch has lasted long enough, and the guest is known to
//! run (invariant 9). Everything that goes wrong ends in a full copy (invariant 6), and none of it stops the guest.

mod end;
mod event;
mod handover;
mod link;
mod output;
mod pace;
mod view;

use std::time::{Duration, Instant};

use understudy_libvirt::{DomainEvent, RunState};
use understudy_proto::epoch::{Captured, EpochKind};
use understudy_proto::ids::{EpochId, Incarnation};
use understudy_proto::limits::MAX_EPOCHS_IN_FLIGHT;

use crate::capture::run_state::{Question, RunTracker, Verdict, WaitReason};

pub use event::{CaptureFailure, Command, Event, Outcome, OutcomeKind, Settings, View};

use end::End;
use handover::Handover;
use link::Link;
use pace::Pace;

/// Between two questions to a QEMU whose answer does not help.
const ASK_INTERVAL: Duration = Duration::from_millis(500);

/// Before the second full copy in a row; doubles with every further one.
const ARM_BACKOFF: Duration = Duration::from_secs(1);

/// The longest wait between two full copies.
const ARM_BACKOFF_MAX: Duration = Duration::from_secs(30);

/// Between two attempts to bring QEMU out of COLO, or to pause a superseded guest.
const REPEAT_INTERVAL: Duration = Duration::from_secs(1);

const _: () = assert!(MAX_EPOCHS_IN_FLIGHT == 1, "the window below holds one epoch");

/// See the module's description.
#[derive(Debug)]
pub struct Engine {
    settings: Settings,
    run: RunTracker,
    link: Link,
    capture: Capture,
    /// The epoch that is not committed yet.
    window: Option<InFlight>,
    /// The life of the backup that acknowledged `committed` or receives the window.
    incarnation: Option<Incarnation>,
    committed: Option<EpochId>,
    /// Why a full copy is needed, if one is.
    needs_full: Option<String>,
    next_epoch: EpochId,
    pace: Pace,
    arm_at: Instant,
    arm_failures: u32,
    asking: Asking,
    /// QEMU's last answer, if it was not `running`.
    run_state: Option<RunState>,
    resubscribing: bool,
    /// Whether our migration has reached its end: one that starts afterwards is somebody else's.
    precopy_over: bool,
    /// The guest is to stand still for the other host.
    handover: Option<Handover>,
    end: Option<End>,
    over: Option<Outcome>,
}

/// How far the capture is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Capture {
    Idle,
    Arming {
        interrupted: bool,
    },
    /// The guest is stopped until its epoch is committed, or this moment comes.
    Held {
        until: Instant,
        kind: EpochKind,
    },
    /// `since` until the guest has been seen running after it was held or copied.
    Waiting {
        interrupted: bool,
        since: Option<EpochKind>,
    },
    Ready,
    Stopping {
        hold: bool,
    },
    Disarming,
    /// QEMU may still be in COLO.
    Stuck {
        rescue_at: Instant,
    },
    Rescuing,
}

#[derive(Debug)]
struct InFlight {
    epoch: EpochId,
    kind: EpochKind,
    /// Set when the last byte is here.
    captured: Option<Captured>,
}

/// The question to QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asking {
    /// May be asked from then on.
    From(Instant),
    /// Not answered yet.
    Asked(Question),
}

impl Engine {
    /// For a guest of which nothing is captured yet.
    pub fn new(settings: Settings, now: Instant) -> Self {
        let pace = Pace::new(&settings, now);
        Self {
            link: Link::new(settings.first_session),
            settings,
            run: RunTracker::new(),
            capture: Capture::Idle,
            window: None,
            incarnation: None,
            committed: None,
            needs_full: Some("nothing is copied yet".to_owned()),
            next_epoch: EpochId(1),
            pace,
            arm_at: now,
            arm_failures: 0,
            asking: Asking::From(now),
            run_state: None,
            resubscribing: false,
            precopy_over: false,
            handover: None,
            end: None,
            over: None,
        }
    }

    /// Takes an event and says what is to be done about it.
    pub fn step(&mut self, event: Event, now: Instant) -> Vec<Command> {
        let mut out = Vec::new();
        if self.over.is_none() {
            self.take(event, now, &mut out);
            self.decide(now, &mut out);
        }
        out
    }

    /// When [`Event::Tick`] is wanted, if nothing else happens before.
    pub fn deadline(&self) -> Option<Instant> {
        if self.over.is_some() {
            return None;
        }
        // Whatever is due already has been done by the last step, so none of these lies in the past.
        let guest = match self.run.verdict() {
            _ if !self.wants_guest() => None,
            Verdict::Yes if self.capture == Capture::Ready => Some(self.next_stop()),
            Verdict::Yes => Some(self.arm_at),
            Verdict::AskQemu(_) => match self.asking {
                Asking::From(at) => Some(at),
                Asking::Asked(_) => None,
            },
            Verdict::Wait(_) | Verdict::Ended(_) => None,
        };
        let rescue = match self.capture {
            Capture::Stuck { rescue_at } => Some(rescue_at),
            Capture::Held { until, .. } => Some(until),
            _ => None,
        };
        let end = self.end.as_ref().filter(|_| self.capture == Capture::Idle).and_then(End::deadline);
        guest.into_iter().chain(rescue).chain(end).chain(self.handover_deadline()).min()
    }

    fn take(&mut self, event: Event, now: Instant, out: &mut Vec<Command>) {
        match event {
            Event::Tick => {}
            Event::Domain(event) => self.domain_event(&event),
            Event::Answer(question, state) => {
                if self.asking == Asking::Asked(question) {
                    let sign = state.is_some();
                    if let Some(state) = &state {
                        self.run.answer(question, state);
                    }
                    // A question that has become worthless is asked again at once.
                    let again = self.run.verdict() == Verdict::AskQemu(question);
                    self.run_state = state.filter(|state| again && *state != RunState::Running);
                    self.asking = Asking::From(if again { now + ASK_INTERVAL } else { now });
                    if let Some(end) = &mut self.end {
                        end.answered(sign, now);
                    }
                }
            }
            Event::Subscribed => {
                self.resubscribing = false;
                self.run.subscribed();
            }
            Event::Connected { session, ack } => self.connected(session, &ack, out),
            Event::Disconnected { session, reason } => self.disconnected(session, reason, out),
            Event::Refused { session, refused } => self.refused(session, refused, out),
            Event::Acked { session, at } => self.acked(session, at, out),
            Event::Rejected { session, reject } => self.rejected(session, &reject, now, out),
            Event::Armed { stay_stopped } => self.armed(stay_stopped, now, out),
            Event::Ready => self.ready(now),
            Event::Captured => self.captured(now, out),
            Event::CaptureFailed(failure) => self.capture_failed(failure, now, out),
            Event::Disarmed(result) => self.disarmed(result, now, out),
            Event::Rescued(result) => match result {
                Err(failure) if !failure.gone => {
                    self.capture = Capture::Stuck { rescue_at: now + REPEAT_INTERVAL };
                }
                _ => self.let_go(),
            },
            Event::Paused(result) => self.paused(result, now),
            Event::OutputWaiting { pressing } => self.output_waiting(pressing),
            Event::OutputHeld { bytes } => self.output_held(bytes),
            Event::Measured { stop, bytes } => self.measured(stop, bytes, now),
            Event::OutputFailed(reason) => self.output_failed(&reason, now, out),
            Event::StoodStill(still) => self.stood_still(still, out),
            Event::Pace { epoch, goals } => self.repace(epoch, goals),
            Event::HandOver => self.hand_over(now),
            Event::TakeBack => self.take_back(out),
            Event::Unprotect => self.unprotect(),
            Event::Shutdown => self.shutdown(),
        }
    }

    fn domain_event(&mut self, event: &DomainEvent) {
        self.run.event(event);
        if let DomainEvent::Qmp(event) = event
            && event.name == "MIGRATION"
        {
            let status = event.data.get("status").and_then(serde_json::Value::as_str);
            match status {
                Some("colo") => self.precopy_over = true,
                // QEMU 7.2 even lets it destroy the state of ours, so nothing that follows can be trusted.
                Some("setup" | "active") if self.precopy_over && self.capture != Capture::Idle => {
                    self.foreign_migration();
                }
                _ => {}
            }
        }
    }

    fn armed(&mut self, stay_stopped: bool, now: Instant, out: &mut Vec<Command>) {
        if let Capture::Arming { interrupted } = self.capture {
            self.finish_capture();
            self.end_epoch(now);
            if stay_stopped && !interrupted {
                self.hold(EpochKind::Full, now);
                return;
            }
            // Even when the copy is not wanted any more: the guest is stopped, and starting it is the way out.
            self.capture = Capture::Waiting { interrupted, since: Some(EpochKind::Full) };
            out.push(Command::Start);
        }
    }

    fn ready(&mut self, now: Instant) {
        if let Capture::Waiting { since, .. } = self.capture {
            if since == Some(EpochKind::Full) {
                // The event that says so may have been lost.
                self.precopy_over = true;
                self.run.started();
            }
            if since.is_some() {
                self.run_on(now);
            }
            self.capture = Capture::Ready;
        }
    }

    fn captured(&mut self, now: Instant, out: &mut Vec<Command>) {
        let Capture::Stopping { hold } = self.capture else { return };
        self.run.checkpoint_done();
        self.finish_capture();
        self.end_epoch(now);
        if hold {
            self.hold(EpochKind::Delta, now);
            return;
        }
        self.capture = Capture::Waiting { interrupted: false, since: None };
        out.push(Command::WaitReady);
    }

    fn finish_capture(&mut self) {
        if let Some(window) = &mut self.window {
            window.captured = Some(Captured::new(self.settings.generation, window.epoch));
        }
    }

    fn capture_failed(&mut self, failure: CaptureFailure, now: Instant, out: &mut Vec<Command>) {
        if matches!(self.capture, Capture::Stopping { .. }) {
            self.run.checkpoint_done();
        }
        let wanted = !matches!(
            self.capture,
            Capture::Arming { interrupted: true } | Capture::Waiting { interrupted: true, .. }
        );
        self.capture = if failure.left_stopped {
            Capture::Stuck { rescue_at: now }
        } else {
            // Forgets an interruption; does nothing else.
            out.push(Command::Disarm);
            Capture::Disarming
        };
        if wanted {
            self.arm_later(now);
            if self.settings.attended && self.committed.is_none() && !failure.gone {
                self.fail(failure.reason.clone(), String::new());
            }
            self.need_full(format!("capture failed: {}", failure.reason), out);
        } else if self.needs_full.is_none() {
            self.need_full("capture was interrupted".to_owned(), out);
        }
    }

    fn disarmed(&mut self, result: Result<(), CaptureFailure>, now: Instant, out: &mut Vec<Command>) {
        if self.capture != Capture::Disarming {
            return;
        }
        match result {
            Err(failure) if !failure.gone => self.capture = Capture::Stuck { rescue_at: now },
            _ => self.let_go(),
        }
        if self.needs_full.is_none() {
            self.need_full("capture was ended".to_owned(), out);
        }
    }

    /// QEMU is out of COLO. Events that a failed checkpoint owes may never come, so the guest's state is asked for.
    fn let_go(&mut self) {
        self.capture = Capture::Idle;
        self.run.started();
    }

    /// The next full copy waits longer every time, until an epoch after one is committed.
    fn arm_later(&mut self, now: Instant) {
        let wait = ARM_BACKOFF.saturating_mul(1 << self.arm_failures.min(8)).min(ARM_BACKOFF_MAX);
        self.arm_failures += 1;
        self.arm_at = now + wait;
    }

    /// From here on nothing that was captured is sent.
    fn need_full(&mut self, reason: String, out: &mut Vec<Command>) {
        if self.window.take().is_some() {
            out.push(Command::Forget);
        }
        self.needs_full = Some(reason);
    }

    fn synchronised(&self) -> bool {
        self.link.is_up() && self.needs_full.is_none() && self.window.is_none() && self.end.is_none()
    }

    /// Whether anything is waiting for the guest to be known to run.
    fn wants_guest(&self) -> bool {
        match self.capture {
            Capture::Ready => self.synchronised(),
            Capture::Idle => self.link.is_up() && self.end.is_none(),
            _ => false,
        }
    }

    fn decide(&mut self, now: Instant, out: &mut Vec<Command>) {
        if let Verdict::Ended(reason) = self.run.verdict() {
            self.guest_ended(&reason);
        }
        if self.run.verdict() == Verdict::Wait(WaitReason::NoEvents) && !self.resubscribing {
            self.resubscribing = true;
            out.push(Command::Resubscribe);
        }
        self.decide_held(now, out);
        if let Capture::Stuck { rescue_at } = self.capture
            && now >= rescue_at
        {
            self.capture = Capture::Rescuing;
            out.push(Command::Rescue);
        }
        if self.end.is_some() {
            self.decide_end(now, out);
            return;
        }
        if let Some(command) = self.link.connect() {
            out.push(command);
        }
        if self.needs_full.is_some() {
            self.wind_down(out);
        }
        if self.wants_guest() && self.guest_runs(now, out) {
            self.decide_guest(now, out);
        }
    }

    /// The guest is known to run and something is to be done with it.
    fn decide_guest(&mut self, now: Instant, out: &mut Vec<Command>) {
        match self.capture {
            Capture::Idle if now >= self.arm_at => {
                let epoch = self.take_epoch(EpochKind::Full);
                self.needs_full = None;
                self.precopy_over = false;
                self.capture = Capture::Arming { interrupted: false };
                out.push(Command::Arm(epoch));
            }
            Capture::Ready if now >= self.next_stop() || self.hands_over() => {
                let epoch = self.take_epoch(EpochKind::Delta);
                self.run.reply_sent();
                let hold = self.stopping(now) || self.hands_over();
                self.capture = Capture::Stopping { hold };
                out.push(if hold { Command::CheckpointHeld(epoch) } else { Command::Checkpoint(epoch) });
            }
            _ => {}
        }
    }

    fn take_epoch(&mut self, kind: EpochKind) -> EpochId {
        let epoch = self.next_epoch;
        self.next_epoch = epoch.next();
        self.window = Some(InFlight { epoch, kind, captured: None });
        epoch
    }

    /// Brings an active capture to its end, as far as that can be done now.
    fn wind_down(&mut self, out: &mut Vec<Command>) {
        match &mut self.capture {
            Capture::Arming { interrupted } | Capture::Waiting { interrupted, .. } if !*interrupted => {
                *interrupted = true;
                out.push(Command::Interrupt);
            }
            Capture::Ready => {
                self.capture = Capture::Disarming;
                out.push(Command::Disarm);
            }
            _ => {}
        }
    }

    /// Whether the guest is known to run; sees to it that it becomes known.
    fn guest_runs(&mut self, now: Instant, out: &mut Vec<Command>) -> bool {
        match self.run.verdict() {
            Verdict::Yes => true,
            Verdict::AskQemu(question) => {
                if let Asking::From(at) = self.asking
                    && now >= at
                {
                    self.asking = Asking::Asked(question);
                    out.push(Command::AskQemu(question));
                }
                false
            }
            Verdict::Wait(_) | Verdict::Ended(_) => false,
        }
    }
}

#[cfg(test)]
mod tests;
