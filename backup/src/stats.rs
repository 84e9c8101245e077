//! Counters of a guest for its status.

use std::collections::VecDeque;
use understudy_proto::epoch::EpochKind;

/// Epochs whose page counts are remembered.
const REMEMBERED: usize = 512;

/// Counters since the agent started.
#[derive(Debug, Default)]
pub struct Stats {
    /// Committed epochs.
    pub epochs: u64,
    /// Full ones among them.
    pub full_copies: u64,
    /// Bytes of their frames and device buffers.
    pub bytes: u64,
    pages: VecDeque<u64>,
}

impl Stats {
    /// Counts a committed epoch.
    pub fn committed(&mut self, kind: EpochKind, pages: u64, bytes: u64) {
        self.epochs += 1;
        self.bytes = self.bytes.saturating_add(bytes);
        match kind {
            EpochKind::Full => self.full_copies += 1,
            EpochKind::Delta => {
                if self.pages.len() == REMEMBERED {
                    self.pages.pop_front();
                }
                self.pages.push_back(pages);
            }
        }
    }

    /// The page count that so many per cent of the last deltas do not exceed.
    pub fn pages_percentile(&self, percent: usize) -> Option<u64> {
        let mut sorted: Vec<_> = self.pages.iter().copied().collect();
        sorted.sort_unstable();
        let rank = (sorted.len() * percent).div_ceil(100).max(1);
        sorted.get(rank - 1).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_deltas_only() {
        let mut stats = Stats::default();
        assert_eq!(stats.pages_percentile(50), None);
        stats.committed(EpochKind::Full, 100_000, 1);
        for pages in 1..=600 {
            stats.committed(EpochKind::Delta, pages, 1);
        }
        // The last 512 are 89 to 600.
        assert_eq!((stats.pages_percentile(50), stats.pages_percentile(99)), (Some(344), Some(595)));
        assert_eq!((stats.epochs, stats.full_copies, stats.bytes), (601, 1, 601));
    }
}
