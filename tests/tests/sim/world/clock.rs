//! The clock of a host: it may run fast or slow, and jump ahead.

use std::time::{Duration, Instant};

/// See the module's description.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    origin: Instant,
    /// Milliseconds of the world and of the host at the last change.
    world: u64,
    local: u64,
    /// Milliseconds that pass here while a thousand pass in the world.
    rate: u64,
}

impl Clock {
    pub(crate) fn new(origin: Instant, ahead: u64, rate: u64) -> Self {
        Self { origin, world: 0, local: ahead, rate }
    }

    fn millis(&self, now: u64) -> u64 {
        self.local + (now - self.world) * self.rate / 1000
    }

    pub(crate) fn at(&self, now: u64) -> Instant {
        self.origin + Duration::from_millis(self.millis(now))
    }

    /// When the clock shows `local`, not before `now`; a little late rather than early.
    pub(crate) fn when(&self, local: Instant, now: u64) -> u64 {
        let left = local.saturating_duration_since(self.at(now));
        let left = u64::try_from(left.as_millis()).unwrap_or(u64::MAX / 2000);
        now + left * 1000 / self.rate + 1
    }

    pub(crate) fn jump(&mut self, now: u64, ahead: u64, rate: u64) {
        *self = Self { local: self.millis(now) + ahead, world: now, rate, ..*self };
    }
}
