//! The stream to the backup: opening, losing and resuming it.

use std::time::{Duration, Instant};

use understudy_proto::epoch::EpochKind;
use understudy_proto::rpc::epoch::{EpochRef, HelloAck, Refused, RefusedCode, Reject};

use super::{Command, Engine};

/// Before the second attempt in a row; doubles with every further one.
const BACKOFF: Duration = Duration::from_millis(100);

/// The longest wait between two attempts.
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// Refusals in a row, of kinds that may pass, after which an operator is told instead of kept waiting: about 3 s.
const PASSING_REFUSALS: u32 = 6;

#[derive(Debug)]
pub(super) struct Link {
    /// Number of the stream at hand, or of the next one.
    session: u64,
    state: State,
    /// Attempts since the last sign of success.
    failures: u32,
    /// Why there is no stream.
    trouble: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Down,
    Connecting,
    Up,
}

impl Link {
    pub(super) fn new(session: u64) -> Self {
        Self { session, state: State::Down, failures: 0, trouble: None }
    }

    pub(super) fn is_up(&self) -> bool {
        self.state == State::Up
    }

    pub(super) fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }

    /// What opens a stream, if none is being opened.
    pub(super) fn connect(&mut self) -> Option<Command> {
        if self.state != State::Down {
            return None;
        }
        self.state = State::Connecting;
        let after = match self.failures {
            0 => Duration::ZERO,
            n => BACKOFF.saturating_mul(1 << (n - 1).min(8)).min(BACKOFF_MAX),
        };
        Some(Command::Connect { session: self.session, after })
    }

    /// Whether a refusal may have to do with an earlier protection whose end is not over yet.
    fn may_pass(&self, code: RefusedCode) -> bool {
        matches!(code, RefusedCode::Busy | RefusedCode::Internal) && self.failures < PASSING_REFUSALS
    }

    fn is_current(&self, session: u64) -> bool {
        session == self.session && self.state != State::Down
    }

    fn lost(&mut self, reason: String) {
        self.state = State::Down;
        self.session += 1;
        self.failures += 1;
        self.trouble = Some(reason);
    }
}

impl Engine {
    pub(super) fn connected(&mut self, session: u64, ack: &HelloAck, out: &mut Vec<Command>) {
        if session != self.link.session || self.link.state != State::Connecting {
            return;
        }
        self.link.state = State::Up;
        self.link.trouble = None;
        let theirs =
            ack.last_committed.filter(|at| at.generation == self.settings.generation).map(|at| at.epoch);
        if let Some(theirs) = theirs {
            // Numbers never go back within a generation, not even over a restart of this agent (invariant 5).
            self.next_epoch = self.next_epoch.max(theirs.next());
        }
        let same_life = self.incarnation.replace(ack.incarnation) == Some(ack.incarnation);
        if self.needs_full.is_some() {
            return;
        }
        let Some(window) = &self.window else {
            if !same_life || theirs.is_none() || theirs != self.committed {
                self.need_full(unlike(same_life), out);
            }
            return;
        };
        let (epoch, kind) = (window.epoch, window.kind);
        if same_life && theirs == Some(epoch) && window.captured.is_some() {
            // Only the acknowledgement was lost.
            self.commit(EpochRef { generation: self.settings.generation, epoch }, out);
        } else if same_life && kind == EpochKind::Delta && theirs.is_some() && theirs == self.committed {
            out.push(Command::Resend);
        } else {
            self.need_full(unlike(same_life), out);
        }
    }

    pub(super) fn disconnected(&mut self, session: u64, reason: String, out: &mut Vec<Command>) {
        if !self.link.is_current(session) {
            return;
        }
        self.link.lost(reason);
        // A delta is kept until it is known what the backup has; a full copy is too large for that.
        if self.window.as_ref().is_some_and(|w| w.kind == EpochKind::Full && w.captured.is_none()) {
            self.need_full("the backup was lost during the full copy".to_owned(), out);
        }
    }

    /// An acknowledgement from before may be of a guest that runs on the backup since: nothing is released before the
    /// backup has confirmed on a new stream that it is still one (invariant 4).
    pub(super) fn stood_still(&mut self, still: Duration, out: &mut Vec<Command>) {
        if self.link.is_up() && self.window.as_ref().is_some_and(|window| window.captured.is_some()) {
            let reason = format!("this agent stood still for {} ms", still.as_millis());
            self.disconnected(self.link.session, reason, out);
        }
    }

    pub(super) fn refused(&mut self, session: u64, refused: Refused, out: &mut Vec<Command>) {
        if !self.link.is_current(session) {
            return;
        }
        let text = match refused.remedy.as_str() {
            "" => refused.text.clone(),
            remedy => format!("{}; {remedy}", refused.text),
        };
        self.disconnected(session, format!("refused: {text}"), out);
        if refused.code == RefusedCode::Superseded {
            self.superseded(&refused.text);
        } else if self.settings.attended && self.committed.is_none() && !self.link.may_pass(refused.code) {
            self.fail(format!("{} refuses the guest: {}", self.settings.peer, refused.text), refused.remedy);
        }
    }

    pub(super) fn acked(&mut self, session: u64, at: EpochRef, out: &mut Vec<Command>) {
        if self.link.is_up() && session == self.link.session {
            self.commit(at, out);
        }
    }

    /// Turns the epoch in flight into a committed one; there is no other way to a release.
    fn commit(&mut self, at: EpochRef, out: &mut Vec<Command>) {
        let Some(window) = self.window.take() else {
            let text = format!("the backup acknowledged epoch {}, none was in flight", at.epoch);
            // What was dropped here may have been committed there in the same moment.
            if self.needs_full.is_none() {
                self.need_full(text, out);
            }
            return;
        };
        if at.generation == self.settings.generation && at.epoch < window.epoch {
            // Of an epoch that was dropped here while its acknowledgement was on the way.
            self.window = Some(window);
            return;
        }
        let Some(captured) = window.captured else {
            self.window = Some(window);
            self.need_full(format!("the backup acknowledged epoch {} before its end", at.epoch), out);
            return;
        };
        match captured.acknowledged(at.generation, at.epoch) {
            Ok(committed) => {
                self.committed = Some(committed.epoch());
                self.link.failures = 0;
                if window.kind == EpochKind::Delta {
                    self.arm_failures = 0;
                }
                out.push(Command::Release(committed));
                if !self.stands_still() {
                    self.let_held_run(out);
                }
            }
            Err((captured, error)) => {
                self.window = Some(super::InFlight { captured: Some(captured), ..window });
                self.need_full(error.to_string(), out);
            }
        }
    }

    pub(super) fn rejected(&mut self, session: u64, reject: &Reject, now: Instant, out: &mut Vec<Command>) {
        if self.link.is_up() && session == self.link.session && self.window.is_some() {
            self.arm_later(now);
            self.need_full(format!("the backup dropped epoch {}: {}", reject.at.epoch, reject.text), out);
        }
    }
}

fn unlike(same_life: bool) -> String {
    if same_life {
        "the backup does not hold the epoch before the next one".to_owned()
    } else {
        "the backup agent has been restarted".to_owned()
    }
}
