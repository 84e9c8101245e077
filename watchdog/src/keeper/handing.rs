//! A guest changes hosts as planned work: what the keeper of the host it leaves does.

use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tracing::{info, warn};
use understudy_proto::ids::EpochId;
use understudy_proto::ownership::{Owner, Term};
use understudy_proto::rpc::owner::Told;
use understudy_proto::rpc::{Failure, FailureKind};

use super::hands::Hands;
use crate::owner::{Protocol, Role};

pub(super) type Reply = oneshot::Sender<Result<Told, Failure>>;

/// How long the other host may take to claim a guest that stands still: not longer than that.
const CLAIM: Duration = Duration::from_secs(15);

/// From the claim to the guest running there, or here again.
const WHOLE: Duration = Duration::from_secs(120);

/// A change of hosts under way, if one is.
#[derive(Debug, Default)]
pub(super) struct Handing(Option<Way>);

#[derive(Debug)]
struct Way {
    reply: Option<Reply>,
    to: String,
    stage: Stage,
    began: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The agent brings the guest to a stand.
    Stopping,
    /// It stands still; the other host is to claim it.
    Yielding { epoch: EpochId, until: Instant },
    /// The other host has claimed it.
    Claimed { epoch: EpochId },
}

impl Handing {
    /// The other host is told to take the guest.
    pub(super) fn yields(&self) -> bool {
        self.0.as_ref().is_some_and(|way| matches!(way.stage, Stage::Yielding { .. }))
    }

    pub(super) fn is_under_way(&self) -> bool {
        self.0.is_some()
    }

    pub(super) fn begin(&mut self, to: String, term: Term, reply: Reply, now: Instant, hands: &Hands) {
        self.0 = Some(Way { reply: Some(reply), to, stage: Stage::Stopping, began: now });
        hands.hand_over(term);
    }

    /// The guest stands still, or does not.
    pub(super) fn stands(&mut self, result: Result<EpochId, Failure>, now: Instant) {
        let Some(way) = self.0.as_mut().filter(|way| way.stage == Stage::Stopping) else { return };
        match result {
            Ok(epoch) => way.stage = Stage::Yielding { epoch, until: now + CLAIM },
            Err(failure) => self.fail(failure),
        }
    }

    /// What the record says of it.
    pub(super) fn follow(&mut self, protocol: &Protocol, now: Instant, hands: &Hands) {
        let Some(way) = &mut self.0 else { return };
        let owner = protocol.record().map(|record| &record.owner);
        let there = matches!(owner, Some(Owner::Solo { owner } | Owner::Pair { primary: owner, .. }) if *owner == way.to);
        match way.stage {
            Stage::Yielding { epoch, .. } | Stage::Claimed { epoch } if there => {
                let took = now.saturating_duration_since(way.began).as_millis();
                let (to, term) = (&way.to, protocol.term());
                let text = format!(
                    "the guest runs on {to} since term {term}, from epoch {epoch} on; nothing was lost ({took} ms)"
                );
                let json =
                    serde_json::json!({"to": to, "epoch": epoch, "term": term, "took_ms": took}).to_string();
                info!(to, epoch = epoch.0, "handed over");
                if let Some(reply) = way.reply.take() {
                    // Whoever asked may have gone.
                    let _ = reply.send(Ok(Told { text, json }));
                }
                self.0 = None;
            }
            Stage::Yielding { epoch, .. } if *protocol.role() == Role::Held => {
                way.stage = Stage::Claimed { epoch };
            }
            Stage::Yielding { until, .. } if now >= until => {
                hands.take_back(protocol.term());
                let text = format!("{} has not claimed the guest in time; it runs on here", way.to);
                self.fail(
                    Failure::new(FailureKind::Unavailable, "not-claimed", text).retryable().with_remedy(
                        "see whether the watchdogs of both hosts run and reach each other and the arbiter",
                    ),
                );
            }
            Stage::Claimed { .. } if *protocol.role() == Role::Solo => {
                let text = format!("{} could not start the guest; it runs on here", way.to);
                self.fail(
                    Failure::new(FailureKind::Internal, "not-promoted", text)
                        .with_remedy("see the logs of understudy-watchdog and understudy-backup there"),
                );
            }
            _ if now.saturating_duration_since(way.began) >= WHOLE => {
                let text =
                    "the change of hosts takes too long; what the arbiter says decides where the guest runs";
                self.fail(Failure::new(FailureKind::Unavailable, "not-ended", text));
            }
            _ => {}
        }
    }

    fn fail(&mut self, failure: Failure) {
        let Some(way) = self.0.take() else { return };
        warn!(to = way.to, reason = failure.reason, "not handed over");
        if let Some(reply) = way.reply {
            // Whoever asked may have gone.
            let _ = reply.send(Err(failure));
        }
    }
}
