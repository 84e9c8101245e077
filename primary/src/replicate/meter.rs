//! How long the link takes for an epoch: the time in which something waited for it, and that from the last message to
//! the answer. Time in which the stream waits for pages is not the link's.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::encode::LinkMeter;

#[derive(Debug, Default)]
pub(super) struct Meter {
    link: Arc<LinkMeter>,
    bytes: u64,
    busy: Duration,
    waiting_since: Option<Instant>,
    sent_at: Option<Instant>,
}

impl Meter {
    /// Where others read it.
    pub(super) fn link(&self) -> Arc<LinkMeter> {
        Arc::clone(&self.link)
    }

    /// An epoch begins.
    pub(super) fn begin(&mut self) {
        *self = Self { link: Arc::clone(&self.link), ..Self::default() };
    }

    /// A message waits for the link.
    pub(super) fn waits(&mut self, now: Instant) {
        self.waiting_since.get_or_insert(now);
    }

    /// A message was handed over; `last` if no other one waits.
    pub(super) fn sent(&mut self, bytes: u64, last: bool, now: Instant) {
        self.bytes += bytes;
        self.sent_at = Some(now);
        if last && let Some(since) = self.waiting_since.take() {
            self.busy += now - since;
        }
    }

    /// The epoch is committed.
    pub(super) fn acknowledged(&mut self, now: Instant) {
        if let Some(sent_at) = self.sent_at.take() {
            self.link.set(self.bytes, self.busy + (now - sent_at));
        }
        self.begin();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_links_own_time_counts() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut meter = Meter::default();
        meter.begin();
        meter.waits(at(10));
        meter.waits(at(11));
        meter.sent(300, false, at(12));
        meter.sent(200, true, at(14));
        // For 50 ms there was nothing to send.
        meter.waits(at(64));
        meter.sent(100, true, at(65));
        meter.acknowledged(at(70));
        let taken = meter.link().take().map(|(bytes, time, _)| (bytes, time));
        assert_eq!(taken, Some((600, Duration::from_millis(4 + 1 + 5))));
        // An answer to nothing says nothing.
        meter.acknowledged(at(80));
        assert_eq!(meter.link().take(), None);
    }
}
