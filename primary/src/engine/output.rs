//! What waiting output asks of the pace: an epoch ends early for it, and a full copy may have to be committed before
//! the guest runs on.

use std::time::{Duration, Instant};

use super::{Capture, Command, Engine};

/// How long a guest may be kept stopped for the commit of a full copy. Beyond it the guest is worth more.
const HOLD_LIMIT: Duration = Duration::from_secs(5);

/// A guest whose output waits runs at least so many times as long as its last checkpoint took.
const RUN_PER_STOP: u32 = 2;

/// When the epoch began and what ending one costs.
#[derive(Debug)]
pub(super) struct Pace {
    began: Instant,
    /// The checkpoint under way.
    stopping: Option<Instant>,
    /// What the last one took, from its order to its last byte.
    took: Duration,
}

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        Self { began: now, stopping: None, took: Duration::ZERO }
    }

    pub(super) fn stopping(&mut self, now: Instant) {
        self.stopping = Some(now);
    }
}

impl Engine {
    /// The guest runs on after a stop; what it has sent before belongs to the epoch that is over.
    pub(super) fn begin_epoch(&mut self, now: Instant) {
        if let Some(since) = self.pace.stopping.take() {
            self.pace.took = now.saturating_duration_since(since);
        }
        self.pace.began = now;
        self.next_stop = now + self.settings.epoch;
    }

    /// A request of somebody outside is answered when the epoch is committed: it ends as soon as that is cheap enough.
    pub(super) fn output_waiting(&mut self, pressing: bool, now: Instant) {
        if !matches!(self.capture, Capture::Waiting { .. } | Capture::Ready) {
            return;
        }
        let floor = self.settings.floor.max(self.pace.took.saturating_mul(RUN_PER_STOP));
        let early = if pressing { now } else { self.pace.began + floor.min(self.settings.epoch) };
        self.next_stop = self.next_stop.min(early);
    }

    /// Only a full copy says again what the held frames belong to.
    pub(super) fn output_failed(&mut self, reason: &str, now: Instant, out: &mut Vec<Command>) {
        self.arm_later(now);
        self.need_full(format!("the output gate failed: {reason}"), out);
    }

    /// The full copy is captured and the guest stays stopped until it is committed.
    pub(super) fn hold(&mut self, now: Instant) {
        self.capture = Capture::Held { until: now + HOLD_LIMIT };
    }

    /// The full copy is committed: a guest that was held for it may run.
    pub(super) fn let_held_run(&mut self, out: &mut Vec<Command>) {
        if matches!(self.capture, Capture::Held { .. }) {
            self.capture = Capture::Waiting { interrupted: false, fresh: true };
            out.push(Command::Start);
        }
    }

    /// Gives the commit up when it will not come, or not soon; the guest runs (invariant 10), its output waits on.
    pub(super) fn decide_held(&mut self, now: Instant, out: &mut Vec<Command>) {
        let Capture::Held { until } = self.capture else { return };
        let hopeless = self.window.is_none() || self.end.is_some() || !self.link.is_up();
        if !hopeless && now < until {
            return;
        }
        if self.needs_full.is_none() {
            self.arm_later(now);
            let reason = "the full copy was not committed while the guest was stopped for it".to_owned();
            self.need_full(reason, out);
        }
        self.let_held_run(out);
    }
}
