//! What the guest's output asks of the pace: an epoch ends early for what waits, and a guest that sends more than commits
//! can follow stays stopped until its epoch is committed.

use std::time::{Duration, Instant};

use understudy_proto::epoch::EpochKind;

use super::{Capture, Command, Engine};

/// How long a guest may be kept stopped for a commit. Beyond it the guest is worth more.
const HOLD_LIMIT: Duration = Duration::from_secs(5);

/// With so much in the gate when a commit comes, the guest runs no more while an epoch of it is on its way: the gate then
/// never holds more than the guest sends between two stops. Far below [`crate::egress::LIMIT_BYTES`], where frames would
/// be dropped, and above what a connection or two have under way.
const HOLD_BYTES: u64 = 16 << 20;

impl Engine {
    /// A request of somebody outside is answered when the epoch is committed: it ends as soon as that is cheap enough.
    pub(super) fn output_waiting(&mut self, pressing: bool) {
        if matches!(self.capture, Capture::Waiting { .. } | Capture::Ready) {
            self.pace.waiting = Some(pressing || self.pace.waiting == Some(true));
        }
    }

    /// Counted just before a commit is taken, so with what was sent while the epoch was on its way.
    pub(super) fn output_held(&mut self, bytes: u64) {
        self.pace.held_bytes = bytes;
    }

    /// Only a full copy says again what the held frames belong to.
    pub(super) fn output_failed(&mut self, reason: &str, now: Instant, out: &mut Vec<Command>) {
        self.arm_later(now);
        self.need_full(format!("the output gate failed: {reason}"), out);
    }

    /// A checkpoint begins; says whether the guest stays stopped until it is committed.
    pub(super) fn stopping(&mut self, now: Instant) -> bool {
        self.pace.stopping(now);
        std::mem::take(&mut self.pace.held_bytes) >= HOLD_BYTES
    }

    /// The epoch is captured and the guest stays stopped until it is committed.
    pub(super) fn hold(&mut self, kind: EpochKind, now: Instant) {
        self.capture = Capture::Held { until: now + HOLD_LIMIT, kind };
    }

    /// The epoch is committed: a guest that was held for it may run.
    pub(super) fn let_held_run(&mut self, out: &mut Vec<Command>) {
        if let Capture::Held { kind, .. } = self.capture {
            self.capture = Capture::Waiting { interrupted: false, since: Some(kind) };
            out.push(Command::Start);
        }
    }

    /// Gives the commit up when it will not come, or not soon; the guest runs (invariant 10), its output waits on.
    pub(super) fn decide_held(&mut self, now: Instant, out: &mut Vec<Command>) {
        if self.decide_handover(now, out) {
            return;
        }
        let Capture::Held { until, kind } = self.capture else { return };
        let hopeless = self.window.is_none() || self.end.is_some() || !self.link.is_up();
        if !hopeless && now < until {
            return;
        }
        // A delta may be committed later: what it holds is counted. What a full copy covers is not.
        if self.needs_full.is_none() && kind == EpochKind::Full {
            self.arm_later(now);
            let reason = "the full copy was not committed while the guest was stopped for it".to_owned();
            self.need_full(reason, out);
        }
        self.let_held_run(out);
    }
}
