//! A guest stands still for the other host to take it over: what the watchdog asks for.

use std::sync::Arc;
use std::time::Duration;

use understudy_proto::ids::{EpochId, GuestId};
use understudy_proto::ownership::Term;
use understudy_proto::rpc::owner::HandoverService;
use understudy_proto::rpc::{Failure, FailureKind, async_trait};

use super::{Agent, State, Wish};

/// How long the last epoch may take; the engine gives up before.
const LIMIT: Duration = Duration::from_secs(25);

/// The service on `primary.sock`.
#[derive(Debug)]
pub struct Handover(pub Arc<Agent>);

impl Handover {
    async fn wish(&self, guest: GuestId, wish: Wish) -> Result<super::SnapshotReceiver, Failure> {
        let owner = match self.0.lock().get(&guest).map(|entry| &entry.state) {
            Some(State::Owned(handle)) => Some((handle.wishes.clone(), handle.snapshot.clone())),
            _ => None,
        };
        let refused = || {
            Failure::new(FailureKind::NotFound, "not-protected", "the guest is not protected by this host")
        };
        let (wishes, snapshot) = owner.ok_or_else(refused)?;
        wishes.send(wish).await.map_err(|_| refused())?;
        Ok(snapshot)
    }
}

#[async_trait]
impl HandoverService for Handover {
    async fn begin(&self, guest: GuestId, term: Option<Term>) -> Result<EpochId, Failure> {
        self.0.take_order(guest, term)?;
        let mut snapshot = self.wish(guest, Wish::HandOver).await?;
        let over = |now: &super::Snapshot| now.handed_over.is_some() || now.outcome.is_some();
        let reached = match tokio::time::timeout(LIMIT, snapshot.wait_for(over)).await {
            Ok(Ok(now)) => now.handed_over,
            Ok(Err(_)) | Err(_) => None,
        };
        if reached.is_none() {
            // It may have ended by itself.
            let _ = self.wish(guest, Wish::TakeBack).await;
        }
        reached.ok_or_else(|| {
            let text = "the last epoch was not committed in time; the guest runs on";
            Failure::new(FailureKind::Unavailable, "not-committed", text).retryable()
        })
    }

    async fn take_back(&self, guest: GuestId, term: Option<Term>) -> Result<(), Failure> {
        self.0.take_order(guest, term)?;
        self.wish(guest, Wish::TakeBack).await.map(drop)
    }

    async fn hold(&self, guest: GuestId, term: Term) -> Result<(), Failure> {
        self.0.hold(guest, term)
    }
}
