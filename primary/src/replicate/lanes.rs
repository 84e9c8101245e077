//! The connections of a stream: its own, which everything goes by in order, and lanes, which take page frames off it. A frame
//! that goes by a lane leaves its place behind, so what the backup reads is what one connection would have brought.

use std::sync::Arc;

use futures::future::{BoxFuture, FutureExt, select_all};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use understudy_proto::limits::MAX_LANES;
use understudy_proto::rpc::epoch::{Pages, PrimaryMessage};
use understudy_proto::rpc::lane::{ByLane, LaneFrame, LaneKey, LaneOpen, MainMessage};
use understudy_proto::rpc::transport::Security;
use understudy_proto::rpc::{EpochsClient, transport};

/// Messages handed to the transport of a connection ahead: a few of 256 KiB, so that a heartbeat does not wait long.
const AHEAD: usize = 4;

/// A message, and its room of [`AHEAD`]; the place of a frame takes none.
type Queued = (MainMessage, Option<OwnedSemaphorePermit>);

/// What is sent of a stream.
pub(super) struct Connections {
    main: mpsc::Sender<Queued>,
    room: Arc<Semaphore>,
    lanes: Vec<Lane>,
    /// Lanes that may be given frames; those behind them are closed when nothing of theirs is under way.
    used: usize,
    /// Of the next frame by a lane.
    number: u64,
    /// Of the epoch at hand, by the stream itself.
    bytes: u64,
}

/// Ready when a lane has ended, with the reason.
pub(super) type End = BoxFuture<'static, String>;

/// A lane on its way.
pub(super) type Opening = BoxFuture<'static, Result<(Lane, End), String>>;

/// An open lane.
pub(super) struct Lane {
    id: u32,
    frames: mpsc::Sender<LaneFrame>,
    /// Of the epoch at hand.
    bytes: u64,
    /// Something may not have arrived.
    under_way: bool,
}

/// Opens a lane.
pub(super) fn open(host: String, security: Security, key: LaneKey, id: u32) -> Opening {
    Box::pin(async move {
        let (frames, messages) = mpsc::channel(AHEAD);
        let opening = async {
            let channel = transport::connect(&host, &security).await?;
            EpochsClient::new(channel).carry(LaneOpen { key, lane: id }, ReceiverStream::new(messages)).await
        };
        let opened = tokio::time::timeout(super::stream::SILENCE_LIMIT, opening).await;
        let end = opened.map_err(|_| format!("{host} does not answer"))?.map_err(|failure| failure.reason)?;
        Ok((Lane { id, frames, bytes: 0, under_way: false }, end))
    })
}

impl Connections {
    /// Of a new stream, and what its transport is to read.
    pub(super) fn new() -> (Self, impl Stream<Item = MainMessage> + Send + 'static) {
        let (main, messages) = mpsc::channel::<Queued>(AHEAD * (MAX_LANES + 1));
        let room = Arc::new(Semaphore::new(AHEAD));
        let connections = Self { main, room, lanes: Vec::new(), used: 0, number: 0, bytes: 0 };
        (connections, ReceiverStream::new(messages).map(|(message, _room)| message))
    }

    /// Waits until a message can be sent, a frame if `frame`; false if the stream is closed.
    ///
    /// # Cancel safety
    /// The room is not kept.
    pub(super) async fn room(&self, frame: bool) -> bool {
        let main = async {
            // Never closed: permits come back when the transport is gone.
            let room = self.room.acquire().await;
            room.is_ok() && self.main.reserve().await.is_ok()
        };
        let lanes: Vec<_> =
            self.lanes().filter(|_| frame).map(|lane| has_room(&lane.frames).boxed()).collect();
        if lanes.is_empty() {
            return main.await;
        }
        if self.main.reserve().await.is_err() {
            return false;
        }
        tokio::select! {
            open = main => open,
            _ = select_all(lanes) => true,
        }
    }

    fn lanes(&self) -> impl Iterator<Item = &Lane> {
        self.lanes.iter().take(self.used)
    }

    /// Sends a message if there is room for it, as there is after [`Connections::room`].
    pub(super) fn try_send(&mut self, message: PrimaryMessage) -> bool {
        if let PrimaryMessage::Begin(_) = message {
            self.bytes = 0;
            self.lanes.iter_mut().for_each(|lane| lane.bytes = 0);
        }
        match message {
            PrimaryMessage::Pages(pages) if self.used > 0 => self.frame(pages),
            message => self.by_main(message),
        }
    }

    fn by_main(&mut self, message: PrimaryMessage) -> bool {
        let bytes = match &message {
            PrimaryMessage::Pages(pages) => pages.frame.len() as u64,
            _ => 0,
        };
        let Ok(room) = Arc::clone(&self.room).try_acquire_owned() else { return false };
        let sent = self.main.try_send((message.into(), Some(room))).is_ok();
        if sent {
            self.bytes += bytes;
        }
        sent
    }

    /// By the connection that was given least of the epoch, of those that have room.
    fn frame(&mut self, pages: Pages) -> bool {
        let main = (self.room.available_permits() > 0).then_some(self.bytes);
        let lanes = self.lanes.iter_mut().take(self.used);
        let lane = lanes.filter(|lane| lane.frames.capacity() > 0).min_by_key(|lane| lane.bytes);
        let Some(lane) = lane.filter(|lane| main.is_none_or(|bytes| lane.bytes < bytes)) else {
            return self.by_main(PrimaryMessage::Pages(pages));
        };
        let place = ByLane { lane: lane.id, number: self.number };
        let Ok(place_room) = self.main.try_reserve() else { return false };
        let bytes = pages.frame.len() as u64;
        // A lane that is closed has ended, which is noticed next; what was lost with it ends the stream.
        if lane.frames.try_send(LaneFrame { number: self.number, pages }).is_err() {
            lane.under_way = true;
            return false;
        }
        place_room.send((MainMessage::ByLane(place), None));
        self.number += 1;
        lane.bytes += bytes;
        lane.under_way = true;
        true
    }

    /// Everything that was sent has arrived.
    pub(super) fn arrived(&mut self) {
        self.lanes.truncate(self.used);
        self.lanes.iter_mut().for_each(|lane| lane.under_way = false);
    }

    /// The number that the next lane may have.
    pub(super) fn free_id(&self) -> Option<u32> {
        let most = u32::try_from(MAX_LANES).unwrap_or(0);
        (1..=most).find(|id| self.lanes.iter().all(|lane| lane.id != *id))
    }

    /// Adds a lane; it is used when [`Connections::use_lanes`] says so.
    pub(super) fn add(&mut self, lane: Lane) {
        // Before those that are about to be closed.
        self.lanes.insert(self.used, lane);
    }

    /// Uses so many lanes.
    pub(super) fn use_lanes(&mut self, lanes: usize) {
        self.used = lanes.min(self.lanes.len());
        if self.lanes.iter().all(|lane| !lane.under_way) {
            self.lanes.truncate(self.used);
        }
    }

    /// Connections that are used.
    pub(super) fn count(&self) -> usize {
        self.used + 1
    }

    /// A lane has ended. Whether all it was given has arrived.
    pub(super) fn ended(&mut self, id: u32) -> bool {
        let Some(at) = self.lanes.iter().position(|lane| lane.id == id) else { return true };
        let lane = self.lanes.remove(at);
        if at < self.used {
            self.used -= 1;
        }
        !lane.under_way
    }

    /// Whether it is there.
    pub(super) fn has(&self, id: u32) -> bool {
        self.lanes.iter().any(|lane| lane.id == id)
    }
}

async fn has_room(frames: &mpsc::Sender<LaneFrame>) {
    if frames.reserve().await.is_err() {
        std::future::pending().await
    }
}

/// What else may happen to connections.
pub(super) enum Happened {
    /// A lane is open, or is not to be had.
    Opened(Result<(Lane, End), String>),
    /// A lane has ended, and why.
    Ended(u32, String),
}

/// The other side of each lane, and one that is being opened.
#[derive(Default)]
pub(super) struct Ends {
    ends: Vec<(u32, End)>,
    pub(super) opening: Option<Opening>,
}

impl Ends {
    /// A lane is there.
    pub(super) fn add(&mut self, lane: &Lane, end: End) {
        self.ends.push((lane.id, end));
    }

    /// Ends those that are not there any more.
    pub(super) fn retain(&mut self, connections: &Connections) {
        self.ends.retain(|(id, _)| connections.has(*id));
    }
}

/// # Cancel safety
/// The futures stay where they are until they are done.
pub(super) async fn happened(ends: Option<&mut Ends>) -> Happened {
    let Some(Ends { ends, opening }) = ends else { return std::future::pending().await };
    let ended = async {
        if ends.is_empty() {
            return std::future::pending().await;
        }
        let (why, at, _) = select_all(ends.iter_mut().map(|(_, end)| end)).await;
        (at, why)
    };
    let opened = async {
        match opening {
            Some(opening) => opening.await,
            None => std::future::pending().await,
        }
    };
    let (at, why) = tokio::select! {
        ended = ended => ended,
        lane = opened => {
            return Happened::Opened(lane);
        }
    };
    Happened::Ended(ends.swap_remove(at).0, why)
}
