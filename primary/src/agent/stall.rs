//! Notices that this agent stood still: stopped by a signal, frozen, or starved.

use std::time::{Duration, Instant};

/// Beyond what the owner of a guest takes from one turn to the next on a busy host. Nobody may take the agent for dead,
/// and start the guest elsewhere, sooner than this.
pub(super) const LIMIT: Duration = Duration::from_secs(1);

/// The time of the last turn.
#[derive(Debug)]
pub(super) struct Pulse(Instant);

impl Pulse {
    pub(super) fn new(now: Instant) -> Self {
        Self(now)
    }

    /// A turn begins; gives the time since the last one if that was too long.
    pub(super) fn beat(&mut self, now: Instant) -> Option<Duration> {
        let still = now.saturating_duration_since(std::mem::replace(&mut self.0, now));
        (still > LIMIT).then_some(still)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_long_silence_counts_and_only_once() {
        let start = Instant::now();
        let mut pulse = Pulse::new(start);
        assert_eq!(pulse.beat(start + LIMIT), None);
        let late = start + LIMIT * 2 + Duration::from_millis(1);
        assert_eq!(pulse.beat(late), Some(LIMIT + Duration::from_millis(1)));
        assert_eq!(pulse.beat(late), None);
    }
}
