//! When an epoch ends: after its length, which is fixed or found while epochs run ([`crate::autopilot`]), or before, when
//! output waits and an end is cheap enough.

use std::time::{Duration, Instant};

use understudy_proto::epoch::EpochKind;
use understudy_proto::pace::EpochGoals;

use super::{Engine, Settings};
use crate::autopilot::{Autopilot, Change, Seen};

/// A guest whose output waits runs at least so many times as long as its last checkpoints kept it stopped.
const RUN_PER_STOP: u32 = 2;

/// When the epoch began and what ending one costs.
#[derive(Debug)]
pub(super) struct Pace {
    began: Instant,
    /// The checkpoint under way.
    stopping: Option<Instant>,
    costs: Costs,
    /// Of the epoch in flight: how long the guest ran, and when its checkpoint began.
    last: Option<(Duration, Instant)>,
    /// Output waits since the epoch began; whether so much that nothing else matters.
    pub(super) waiting: Option<bool>,
    /// Bytes in the gate when they were counted last.
    pub(super) held_bytes: u64,
    autopilot: Option<Autopilot>,
    /// Why epochs are as long as they are.
    reason: String,
}

impl Pace {
    pub(super) fn new(settings: &Settings, now: Instant) -> Self {
        let (autopilot, reason) = length(settings);
        Self {
            began: now,
            stopping: None,
            costs: Costs::default(),
            last: None,
            waiting: None,
            held_bytes: 0,
            autopilot,
            reason,
        }
    }

    pub(super) fn reason(&self) -> &str {
        &self.reason
    }

    pub(super) fn stopping(&mut self, now: Instant) {
        self.stopping = Some(now);
        self.last = Some((now.saturating_duration_since(self.began), now));
    }
}

/// What the last three checkpoints have cost the guest, the newest first: its stop by QEMU's clock, or, until that is known,
/// the time from the order to the last byte. One that a busy host has drawn out must not make the next answers wait.
#[derive(Debug, Default)]
struct Costs([Duration; 3]);

impl Costs {
    fn push(&mut self, cost: Duration) {
        if self.0 == [Duration::ZERO; 3] {
            self.0 = [cost; 3];
        }
        self.0.rotate_right(1);
        self.0[0] = cost;
    }

    fn newest(&self) -> Duration {
        self.0[0]
    }

    /// The newest one was this in truth.
    fn correct(&mut self, cost: Duration) {
        self.0[0] = cost;
    }

    fn median(&self) -> Duration {
        let mut sorted = self.0;
        sorted.sort_unstable();
        sorted[1]
    }
}

/// What finds the length of epochs, if it is not fixed, and why they are as long as they are.
fn length(settings: &Settings) -> (Option<Autopilot>, String) {
    let autopilot = settings.goals.map(|goals| Autopilot::new(goals.into(), settings.epoch));
    let reason = if autopilot.is_some() { "finding it out".to_owned() } else { String::new() };
    (autopilot, reason)
}

impl Engine {
    /// Another length, from the epoch on that is under way.
    pub(super) fn repace(&mut self, epoch: Duration, goals: Option<EpochGoals>) {
        (self.settings.epoch, self.settings.goals) = (epoch, goals);
        (self.pace.autopilot, self.pace.reason) = length(&self.settings);
    }

    /// What the guest has sent before belongs to the epoch that is over.
    pub(super) fn end_epoch(&mut self, now: Instant) {
        if let Some(since) = self.pace.stopping.take() {
            self.pace.costs.push(now.saturating_duration_since(since));
        }
        self.pace.waiting = None;
        self.run_on(now);
    }

    /// The guest runs, if it did not before.
    pub(super) fn run_on(&mut self, now: Instant) {
        self.pace.began = now;
    }

    /// How long the guest runs between two stops while nothing waits.
    pub(super) fn epoch_length(&self) -> Duration {
        self.pace.autopilot.as_ref().map_or(self.settings.epoch, Autopilot::length)
    }

    /// When the epoch ends.
    pub(super) fn next_stop(&self) -> Instant {
        let length = self.epoch_length();
        let floor = self.settings.floor.max(self.pace.costs.median().saturating_mul(RUN_PER_STOP));
        let goal = self.pace.autopilot.as_ref().map_or(Duration::ZERO, Autopilot::floor);
        let lasts = match self.pace.waiting {
            None => length,
            Some(false) => floor.max(goal).min(length),
            Some(true) => Duration::ZERO,
        };
        self.pace.began + lasts
    }

    /// The epoch in flight is acknowledged, and was like this.
    pub(super) fn measured(&mut self, stop: Option<Duration>, bytes: u64, now: Instant) {
        let delta = self.window.as_ref().is_some_and(|w| w.kind == EpochKind::Delta && w.captured.is_some());
        let (Some((ran, stopped_at)), true) = (self.pace.last.take(), delta) else { return };
        let stop = stop.unwrap_or(self.pace.costs.newest());
        self.pace.costs.correct(stop);
        let Some(autopilot) = &mut self.pace.autopilot else { return };
        let transfer = now.saturating_duration_since(stopped_at).saturating_sub(stop);
        if let Some(Change { reason, .. }) = autopilot.step(&Seen { ran, stop, transfer, bytes }) {
            self.pace.reason = reason;
        }
    }
}
