//! What the last epochs were like.

use std::collections::VecDeque;
use std::time::Duration;

use understudy_libvirt::QmpEvent;

/// Epochs looked back at.
const WINDOW: usize = 1000;

/// The newest values of something, a bounded number of them.
#[derive(Debug, Clone, Default)]
pub struct Recent<T>(VecDeque<T>);

impl<T: Ord + Copy> Recent<T> {
    /// Adds a value and forgets the oldest beyond the window.
    pub fn push(&mut self, value: T) {
        if self.0.len() == WINDOW {
            self.0.pop_front();
        }
        self.0.push_back(value);
    }

    /// The newest one.
    pub fn newest(&self) -> Option<T> {
        self.0.back().copied()
    }

    /// Median and 99th percentile, by nearest rank; `None` before the first value.
    pub fn quantiles(&self) -> Option<(T, T)> {
        let mut sorted: Vec<T> = self.0.iter().copied().collect();
        sorted.sort_unstable();
        let at =
            |percent: usize| sorted.get((sorted.len() * percent).div_ceil(100).saturating_sub(1)).copied();
        Some((at(50)?, at(99)?))
    }
}

/// How long checkpoints stop the guest, by QEMU's own clock: from its event STOP to its event RESUME.
#[derive(Debug, Clone, Default)]
pub struct PauseMeter {
    /// Checkpoints whose events are still to come.
    expected: u32,
    stopped_at: Option<Duration>,
    /// The pauses.
    pub pauses: Recent<Duration>,
}

impl PauseMeter {
    /// A checkpoint begins.
    pub fn checkpoint(&mut self) {
        // The last one's events are here by now, or lost.
        self.expected = 1;
        self.stopped_at = None;
    }

    /// What the last checkpoint took; `None` while its events are not here.
    pub fn last(&self) -> Option<Duration> {
        self.pauses.newest().filter(|_| self.expected == 0)
    }

    /// Takes an event of QEMU. Stops that are nobody's checkpoint do not count.
    pub fn event(&mut self, event: &QmpEvent) {
        match event.name.as_str() {
            "STOP" if self.expected > 0 && self.stopped_at.is_none() => {
                self.stopped_at = Some(event.timestamp)
            }
            "RESUME" => {
                if let Some(stopped_at) = self.stopped_at.take() {
                    self.expected = 0;
                    self.pauses.push(event.timestamp.saturating_sub(stopped_at));
                }
            }
            _ => {}
        }
    }
}

/// Of one guest.
#[derive(Debug, Clone, Default)]
pub struct Stats {
    /// Stops of checkpoints.
    pub pause: PauseMeter,
    /// Pages of deltas.
    pub dirty_pages: Recent<u64>,
    /// Committed epochs.
    pub epochs_total: u64,
    /// The full copy begun last.
    pub last_full: Option<understudy_proto::ids::EpochId>,
    /// Full copies among them.
    pub full_copies_total: u64,
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn quantiles_by_nearest_rank() {
        let mut recent = Recent::default();
        assert_eq!(recent.quantiles(), None);
        recent.push(7u64);
        assert_eq!(recent.quantiles(), Some((7, 7)));
        (1..=100).for_each(|n| recent.push(n));
        let mut exact = Recent::default();
        (1..=100u64).rev().for_each(|n| exact.push(n));
        assert_eq!(exact.quantiles(), Some((50, 99)));
        (0..WINDOW).for_each(|_| exact.push(3));
        assert_eq!(exact.quantiles(), Some((3, 3)));
    }

    #[test]
    fn only_stops_of_checkpoints_count() {
        let event = |name: &str, at_us| QmpEvent {
            name: name.into(),
            timestamp: Duration::from_micros(at_us),
            data: Value::Null,
        };
        let mut meter = PauseMeter::default();
        meter.event(&event("STOP", 10));
        meter.event(&event("RESUME", 50));
        assert_eq!(meter.pauses.quantiles(), None);
        meter.checkpoint();
        meter.event(&event("STOP", 100));
        meter.event(&event("RESUME", 400));
        meter.event(&event("STOP", 500));
        meter.event(&event("RESUME", 9000));
        let pause = Duration::from_micros(300);
        assert_eq!(meter.pauses.quantiles(), Some((pause, pause)));
    }
}
