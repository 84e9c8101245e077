//! How long the link takes for an epoch: the time in which something waited for it, and that from the last message to
//! the answer. Time in which the stream waits for pages is not the link's.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use understudy_proto::epoch::EpochKind;

use super::policy::Sample;
use crate::encode::LinkMeter;

#[derive(Debug, Default)]
pub(super) struct Meter {
    link: Arc<LinkMeter>,
    bytes: u64,
    busy: Duration,
    waiting_since: Option<Instant>,
    sent_at: Option<Instant>,
    /// Of the epoch, if it is one.
    kind: Option<EpochKind>,
    began: Option<Instant>,
    /// Bytes and time that were told before the end of the epoch.
    told: (u64, Duration),
}

/// A part of a long epoch that is told before its end.
const PART_BYTES: u64 = 64 << 20;

/// The same.
const PART_TIME: Duration = Duration::from_millis(250);

impl Meter {
    /// Where others read it.
    pub(super) fn link(&self) -> Arc<LinkMeter> {
        Arc::clone(&self.link)
    }

    /// An epoch begins.
    pub(super) fn begin(&mut self, kind: EpochKind) {
        self.reset();
        self.kind = Some(kind);
    }

    fn reset(&mut self) {
        *self = Self { link: Arc::clone(&self.link), ..Self::default() };
    }

    /// A message waits for the link.
    pub(super) fn waits(&mut self, now: Instant) {
        self.waiting_since.get_or_insert(now);
        self.began.get_or_insert(now);
    }

    /// A message was handed over; `last` if no other one waits. What a part of a long epoch took, at the end of each.
    pub(super) fn sent(&mut self, bytes: u64, last: bool, now: Instant) -> Option<Sample> {
        self.bytes += bytes;
        self.sent_at = Some(now);
        if last && let Some(since) = self.waiting_since.take() {
            self.busy += now - since;
        }
        let busy = self.busy + self.waiting_since.map_or(Duration::ZERO, |since| now - since);
        let long = self.bytes - self.told.0 >= PART_BYTES && busy.saturating_sub(self.told.1) >= PART_TIME;
        if long { self.part(busy, now) } else { None }
    }

    /// What came since the last part.
    fn part(&mut self, busy: Duration, now: Instant) -> Option<Sample> {
        let (bytes, before) = std::mem::replace(&mut self.told, (self.bytes, busy));
        let whole = now - self.began.replace(now)?;
        Some(Sample { kind: self.kind?, bytes: self.bytes - bytes, busy: busy.saturating_sub(before), whole })
    }

    /// The epoch is committed; what it took, or its last part.
    pub(super) fn acknowledged(&mut self, now: Instant) -> Option<Sample> {
        let mut sample = None;
        if let Some(sent_at) = self.sent_at.take() {
            let busy = self.busy + (now - sent_at);
            self.link.set(self.bytes, busy);
            sample = self.part(busy, now);
        }
        self.reset();
        sample
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
        meter.begin(EpochKind::Delta);
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
