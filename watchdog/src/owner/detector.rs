//! Whether the other host is to be suspected.

use std::time::{Duration, Instant};

use understudy_proto::heartbeat::Heartbeat;
use understudy_proto::ids::Generation;

/// Why the other host is suspected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Suspicion {
    /// Nothing was heard of it on any path for so long.
    Silent(Duration),
    /// It is heard, but its QEMU has given no sign of life for so long.
    QemuSilent(Duration),
    /// It says that the guest's QEMU is gone although nobody has ended the guest.
    QemuGone,
}

impl std::fmt::Display for Suspicion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Silent(time) => write!(f, "silent on all paths for {} ms", time.as_millis()),
            Self::QemuSilent(time) => write!(f, "its QEMU has been silent for {} ms", time.as_millis()),
            Self::QemuGone => f.write_str("its QEMU is gone"),
        }
    }
}

/// What was last heard of the other host.
#[derive(Debug, Clone)]
pub(super) struct Detector {
    /// Nothing before it counts as silence.
    since: Instant,
    heard: Option<Instant>,
    /// Life and number of the newest heartbeat: what is not newer was doubled, overtaken, or replayed.
    newest: Option<(u64, u64)>,
    /// The guest's QEMU there, with the time of its last sign of life; `None`: it is not there.
    qemu: Option<Instant>,
    /// A heartbeat has said where QEMU is.
    told: bool,
    ended: bool,
}

impl Detector {
    pub(super) fn new(now: Instant) -> Self {
        Self { since: now, heard: None, newest: None, qemu: None, told: false, ended: false }
    }

    /// The other host matters from now on.
    pub(super) fn watch_from(&mut self, now: Instant) {
        self.since = now;
    }

    /// Something that only a living other host can have sent, without a heartbeat: an epoch.
    pub(super) fn alive(&mut self, now: Instant) {
        self.heard = Some(now);
        if self.qemu.is_some() {
            self.qemu = Some(now);
        }
    }

    /// Gives whether it counts: it is the newest, and of a guest that is not older than what is known.
    pub(super) fn heartbeat(&mut self, heartbeat: &Heartbeat, known: Generation, now: Instant) -> bool {
        let number = (heartbeat.life, heartbeat.number);
        if heartbeat.generation < known || self.newest.is_some_and(|newest| newest >= number) {
            return false;
        }
        self.newest = Some(number);
        self.heard = Some(now);
        self.told = true;
        self.ended = heartbeat.ended;
        self.qemu = heartbeat.qemu_age.map(|age| now.checked_sub(age).unwrap_or(now));
        true
    }

    /// `qemu_after`: the limit for a QEMU, if it is the other host that runs the guest and its failure matters.
    pub(super) fn suspicion(
        &self,
        after: Duration,
        qemu_after: Option<Duration>,
        now: Instant,
    ) -> Option<Suspicion> {
        let silent = now.saturating_duration_since(self.last());
        if silent >= after {
            return Some(Suspicion::Silent(silent));
        }
        let limit = qemu_after.filter(|_| self.told && !self.ended)?;
        match self.qemu {
            None => Some(Suspicion::QemuGone),
            Some(at) => {
                let silent = now.saturating_duration_since(at.max(self.since));
                (silent >= limit).then_some(Suspicion::QemuSilent(silent))
            }
        }
    }

    /// When the next look can find something new.
    pub(super) fn deadline(&self, after: Duration, qemu_after: Option<Duration>) -> Instant {
        let silent = self.last() + after;
        match (qemu_after.filter(|_| self.told && !self.ended), self.qemu) {
            (Some(limit), Some(at)) => silent.min(at.max(self.since) + limit),
            _ => silent,
        }
    }

    /// The last sign of life, or when it began to matter.
    pub(super) fn last(&self) -> Instant {
        self.heard.map_or(self.since, |heard| heard.max(self.since))
    }
}
