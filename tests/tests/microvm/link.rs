//! The backup agent behind a link that is cut, with everything on the other side of it, at a chosen message.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::watch;
use tokio_stream::StreamExt;
use understudy_backup::agent::Agent;
use understudy_proto::rpc::epoch::{BackupMessage, PrimaryMessage, ProbeReply, ProbeRequest};
use understudy_proto::rpc::{EpochService, Failure, Inbound, Outbound, async_trait};

/// When the primary's host dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum KillPoint {
    /// The guest runs in the epoch after this one; the time is left to chance.
    BeforeReply,
    /// The guest is stopped at the end of the epoch.
    Stopped,
    /// Nothing of the epoch has arrived.
    Opening,
    /// Some of its pages have, or all.
    Pages,
    /// Everything but the manifest has.
    BeforeManifest,
    /// All of it has, and is committed; the acknowledgement gets lost.
    BeforeAck,
    /// The primary has the acknowledgement.
    AfterAck,
}

pub(crate) const KILL_POINTS: [KillPoint; 7] = [
    KillPoint::BeforeReply,
    KillPoint::Stopped,
    KillPoint::Opening,
    KillPoint::Pages,
    KillPoint::BeforeManifest,
    KillPoint::BeforeAck,
    KillPoint::AfterAck,
];

/// What went over the link, and whether it is cut.
#[derive(Debug, Default)]
struct Seen {
    cut: bool,
    /// Epochs whose manifest has reached the backup.
    complete: BTreeSet<u64>,
    /// Epochs whose acknowledgement has reached the primary.
    acked: BTreeSet<u64>,
    pages_of_epoch: u64,
}

#[derive(Debug)]
pub(crate) struct Link {
    agent: Arc<Agent>,
    point: KillPoint,
    epoch: u64,
    /// Of [`KillPoint::Pages`]: frames that still pass.
    frames: u64,
    seen: Mutex<Seen>,
    /// Says that it is time to kill.
    due: watch::Sender<bool>,
}

impl Link {
    pub(crate) fn new(agent: Arc<Agent>, point: KillPoint, epoch: u64, frames: u64) -> Arc<Self> {
        let seen = Mutex::default();
        Arc::new(Self { agent, point, epoch, frames, seen, due: watch::channel(false).0 })
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().expect("not poisoned")
    }

    /// Nothing passes any more.
    pub(crate) fn cut(&self) {
        self.lock().cut = true;
        self.due.send_replace(true);
    }

    /// Where it is to be cut.
    pub(crate) fn at(&self) -> (KillPoint, u64) {
        (self.point, self.epoch)
    }

    pub(crate) fn due(&self) -> watch::Receiver<bool> {
        self.due.subscribe()
    }

    /// The newest epochs that were complete at the backup, and acknowledged at the primary.
    pub(crate) fn newest(&self) -> (Option<u64>, Option<u64>) {
        let seen = self.lock();
        (seen.complete.last().copied(), seen.acked.last().copied())
    }

    fn forth(&self, message: &PrimaryMessage) -> bool {
        let mut seen = self.lock();
        let kill = match message {
            PrimaryMessage::Begin(begin) => {
                seen.pages_of_epoch = 0;
                self.point == KillPoint::Opening && begin.epoch.0 == self.epoch
            }
            PrimaryMessage::Pages(pages) => {
                seen.pages_of_epoch += 1;
                let enough = seen.pages_of_epoch > self.frames;
                self.point == KillPoint::Pages && pages.epoch.0 == self.epoch && enough
            }
            // An epoch with fewer frames than were to pass.
            PrimaryMessage::Device(piece) => self.point == KillPoint::Pages && piece.epoch.0 == self.epoch,
            PrimaryMessage::Manifest(manifest) => {
                self.point == KillPoint::BeforeManifest && manifest.epoch.0 == self.epoch
            }
            _ => false,
        };
        if kill {
            seen.cut = true;
            self.due.send_replace(true);
        }
        if let (PrimaryMessage::Manifest(manifest), false) = (message, seen.cut) {
            seen.complete.insert(manifest.epoch.0);
        }
        !seen.cut
    }

    fn back(&self, message: &BackupMessage) -> bool {
        let mut seen = self.lock();
        let BackupMessage::Ack(at) = message else { return !seen.cut };
        let here = at.epoch.0 == self.epoch && !seen.cut;
        if here && self.point == KillPoint::BeforeAck {
            seen.cut = true;
        }
        if !seen.cut {
            seen.acked.insert(at.epoch.0);
        }
        let passes = !seen.cut;
        if here && self.point == KillPoint::AfterAck {
            seen.cut = true;
        }
        if here && matches!(self.point, KillPoint::BeforeAck | KillPoint::AfterAck | KillPoint::BeforeReply) {
            self.due.send_replace(true);
        }
        passes
    }
}

/// The service the primary meets.
pub(crate) struct Cuttable(pub(crate) Arc<Link>);

#[async_trait]
impl EpochService for Cuttable {
    async fn replicate(&self, peer: Option<SocketAddr>, inbound: Inbound) -> Result<Outbound, Failure> {
        let link = Arc::clone(&self.0);
        let inbound = inbound.take_while(move |item| match item {
            Ok(message) => link.forth(message),
            Err(_) => true,
        });
        let link = Arc::clone(&self.0);
        let outbound = self.0.agent.replicate(peer, Box::pin(inbound)).await?;
        Ok(Box::pin(outbound.take_while(move |message| link.back(message))))
    }

    async fn probe(&self, request: ProbeRequest) -> Result<ProbeReply, Failure> {
        self.0.agent.probe(request).await
    }
}
