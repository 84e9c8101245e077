//! What a takeover was and how long each part of it took.

use std::time::{Duration, Instant};

use serde::Serialize;
use understudy_proto::ids::{EpochId, Generation};
use understudy_proto::ownership::{Ownership, Term};

use super::detector::Suspicion;
use super::event::Role;

/// A takeover, for people and for programs. Times are milliseconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Takeover {
    /// Why the primary was suspected; empty if a claim of an earlier life of the watchdog was granted.
    pub suspicion: String,
    /// The term under which the guest runs here.
    pub term: Term,
    /// The generation it has now.
    pub generation: Generation,
    /// The last epoch the record knew of; the backup agent's report has the one it went on from.
    pub recorded_epoch: Option<EpochId>,
    /// From the last sign of life of what failed to the suspicion: of the primary's host, or of QEMU if only that failed.
    pub detect_ms: u64,
    /// From the suspicion to the claim read back from the arbiter.
    pub claim_ms: u64,
    /// From there to the standby being ready to run.
    pub load_ms: u64,
    /// From there to the confirmation read back from the arbiter.
    pub confirm_ms: u64,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Timeline {
    suspicion: Option<(Suspicion, Instant, Instant)>,
    claimed: Option<Instant>,
    loaded: Option<Instant>,
}

impl Timeline {
    pub(super) fn suspected(&mut self, suspicion: Suspicion, last: Instant, now: Instant) {
        *self = Self { suspicion: Some((suspicion, last, now)), ..Self::default() };
    }

    /// Gives the report when the takeover is complete.
    pub(super) fn became(
        &mut self,
        role: &Role,
        record: Option<&Ownership>,
        now: Instant,
    ) -> Option<Takeover> {
        match role {
            Role::Loading => self.claimed = Some(now),
            Role::Loaded => self.loaded = Some(now),
            Role::Solo => {
                let Self { suspicion, claimed, loaded } = std::mem::take(self);
                let (claimed, record) = (claimed?, record?);
                let loaded = loaded.unwrap_or(now);
                let (last, suspected) = suspicion.map_or((claimed, claimed), |(_, last, at)| (last, at));
                return Some(Takeover {
                    suspicion: suspicion.map(|(what, ..)| what.to_string()).unwrap_or_default(),
                    term: record.term,
                    generation: record.generation,
                    recorded_epoch: record.epoch,
                    detect_ms: ms(suspected.saturating_duration_since(last)),
                    claim_ms: ms(claimed.saturating_duration_since(suspected)),
                    load_ms: ms(loaded.saturating_duration_since(claimed)),
                    confirm_ms: ms(now.saturating_duration_since(loaded)),
                });
            }
            Role::Claiming | Role::Standby => (self.claimed, self.loaded) = (None, None),
            _ => *self = Self::default(),
        }
        None
    }
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
