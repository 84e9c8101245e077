//! A planned change of hosts: the guest stands still behind a committed epoch, so that nothing it has done is lost when the
//! other host takes it over from there.

use std::time::{Duration, Instant};

use understudy_proto::epoch::EpochKind;
use understudy_proto::ids::EpochId;

use super::{Capture, Command, Engine};

/// How long the guest stands still for it; less than what the supervisor takes for an agent that hangs.
const LIMIT: Duration = Duration::from_secs(20);

#[derive(Debug, Clone, Copy)]
pub(super) struct Handover {
    until: Instant,
    /// The epoch it stands at, once that is committed.
    at: Option<EpochId>,
}

impl Engine {
    /// The next epoch is the last one here.
    pub(super) fn hand_over(&mut self, now: Instant) {
        if self.end.is_none() {
            self.handover = Some(Handover { until: now + LIMIT, at: None });
        }
    }

    /// The guest runs on here.
    pub(super) fn take_back(&mut self, out: &mut Vec<Command>) {
        if self.handover.take().is_some() {
            self.let_held_run(out);
        }
    }

    /// Whether the epoch at hand is to be the last one.
    pub(super) fn hands_over(&self) -> bool {
        self.handover.is_some()
    }

    /// The epoch the guest stands at for the other host.
    pub(super) fn handed_over(&self) -> Option<EpochId> {
        self.handover.and_then(|handover| handover.at)
    }

    pub(super) fn handover_deadline(&self) -> Option<Instant> {
        self.handover.map(|handover| handover.until)
    }

    /// A commit; says whether the guest stands still behind it.
    pub(super) fn stands_still(&mut self) -> bool {
        let (Some(handover), Capture::Held { kind: EpochKind::Delta, until }) =
            (&mut self.handover, &mut self.capture)
        else {
            return false;
        };
        handover.at = self.committed;
        *until = handover.until;
        true
    }

    /// Ends it when it has lasted too long, or there is nothing to hand over any more; says whether it goes on.
    pub(super) fn decide_handover(&mut self, now: Instant, out: &mut Vec<Command>) -> bool {
        let Some(handover) = self.handover else { return false };
        if now < handover.until && self.end.is_none() {
            return handover.at.is_some();
        }
        self.take_back(out);
        false
    }
}
