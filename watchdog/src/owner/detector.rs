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
    /// It says that the guest's QEMU is gone although nobody has ended the guest, and has said so for so long.
    QemuGone(Duration),
    /// It says that the guest's QEMU has died.
    QemuCrashed,
    /// It hands the guest over: planned work.
    Yields,
    /// An operator has asked for the guest here.
    Operator,
}

impl std::fmt::Display for Suspicion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Silent(time) => write!(f, "silent on all paths for {} ms", time.as_millis()),
            Self::QemuSilent(time) => write!(f, "its QEMU has been silent for {} ms", time.as_millis()),
            Self::QemuGone(time) => write!(f, "its QEMU has been gone for {} ms", time.as_millis()),
            Self::QemuCrashed => f.write_str("its QEMU has died"),
            Self::Yields => f.write_str("it hands the guest over"),
            Self::Operator => f.write_str("an operator asks for the guest here"),
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
    /// The last sign of life of the guest's QEMU there.
    qemu: Option<Instant>,
    /// It is not there any more. That may be the end of the guest, which is said a moment later.
    gone: bool,
    /// A heartbeat has said where QEMU is.
    told: bool,
    ended: bool,
    crashed: bool,
    yields: bool,
}

impl Detector {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            since: now,
            heard: None,
            newest: None,
            qemu: None,
            gone: false,
            told: false,
            ended: false,
            crashed: false,
            yields: false,
        }
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
        (self.ended, self.crashed, self.yields) = (heartbeat.ended, heartbeat.crashed, heartbeat.yields);
        self.gone = heartbeat.qemu_age.is_none();
        if let Some(age) = heartbeat.qemu_age {
            self.qemu = Some(now.checked_sub(age).unwrap_or(self.since));
        }
        true
    }

    /// The other host, which runs the guest, hands it over.
    pub(super) fn yields(&self) -> bool {
        self.yields
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
        if self.crashed {
            return Some(Suspicion::QemuCrashed);
        }
        // Up to when its host was heard: a host that is silent says nothing of its QEMU either.
        let silent = self.last().saturating_duration_since(self.last_of_qemu());
        let what = if self.gone { Suspicion::QemuGone } else { Suspicion::QemuSilent };
        (silent >= limit).then(|| what(silent))
    }

    /// When silence will be suspicious. Everything else is found when a heartbeat comes.
    pub(super) fn deadline(&self, after: Duration) -> Instant {
        self.last() + after
    }

    fn last_of_qemu(&self) -> Instant {
        self.qemu.map_or(self.since, |at| at.max(self.since))
    }

    /// The last sign of life of what is suspected, or when it began to matter.
    pub(super) fn last_of(&self, suspicion: Suspicion) -> Instant {
        match suspicion {
            // Its host lives and is heard.
            Suspicion::QemuSilent(_) | Suspicion::QemuGone(_) | Suspicion::QemuCrashed => self.last_of_qemu(),
            Suspicion::Silent(_) | Suspicion::Yields | Suspicion::Operator => self.last(),
        }
    }

    /// The same of the other host.
    fn last(&self) -> Instant {
        self.heard.map_or(self.since, |heard| heard.max(self.since))
    }
}
