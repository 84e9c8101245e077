//! Epochs to the backup: one long-lived stream per guest.
//!
//! [`Replicator`] is a task that lives as long as the protection of its guest; streams come and go. It sends what a
//! [`Feed`] gives as it is captured, keeps a delta until it is acknowledged so that a new stream can have it again,
//! and reports what the backup says. It decides nothing: when to connect, resend or forget is the engine's business.

mod feed;
mod lanes;
mod links;
mod meter;
mod policy;
mod stream;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};
use tracing::{debug, info, warn};
use understudy_proto::epoch::EpochKind;
use understudy_proto::negotiate::FEATURE_LANES;
use understudy_proto::rpc::epoch::{
    BackupMessage, EpochRef, GoodbyeReason, Hello, HelloAck, PrimaryMessage, Refused, Reject, RejectCode,
    Standby,
};
use understudy_proto::rpc::lane::LaneKey;
use understudy_proto::rpc::transport::Security;

use feed::EpochMessages;
pub(crate) use feed::Part;
pub use feed::{EpochSink, Feed, FullProgress, feed};
use lanes::Happened;
use meter::Meter;
use policy::Policy;
use stream::{Live, Opening, SILENCE_LIMIT};

use crate::encode::LinkMeter;

/// How often a sign of life is sent.
const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(500);

/// Messages of a full copy that wait for the stream: more would only take memory.
const FULL_QUEUE_MESSAGES: usize = 8;

/// How long a farewell may take.
const GOODBYE_LIMIT: Duration = Duration::from_secs(2);

/// Orders that wait. The owner gives one at a time.
const ORDERS: usize = 16;

/// What the replicator is told to do.
#[derive(Debug)]
pub enum Order {
    /// Open a stream.
    Connect {
        /// Its number.
        session: u64,
        /// How long to wait before; jittered.
        after: Duration,
    },
    /// Send this epoch while it is captured.
    Feed(Feed),
    /// Send the kept epoch again.
    Resend,
    /// Drop the epoch at hand, acknowledged or not.
    Forget,
    /// Say farewell and end.
    Close(Option<GoodbyeReason>),
}

/// What the replicator reports.
#[derive(Debug)]
pub enum Report {
    /// The backup has accepted a stream.
    Connected(u64, HelloAck),
    /// A stream has ended or could not be opened.
    Disconnected(u64, String),
    /// The backup has refused a stream.
    Refused(u64, Refused),
    /// An epoch is committed.
    Acked(u64, EpochRef),
    /// An epoch was dropped.
    Rejected(u64, Reject),
    /// State of the standby domain.
    Standby(Standby),
}

/// The task's inside; see the module's description.
pub struct Replicator {
    host: String,
    security: Security,
    hello: Hello,
    orders: mpsc::Receiver<Order>,
    reports: mpsc::Sender<Report>,
    sent_bytes: Arc<AtomicU64>,
    opening: Option<(u64, Opening)>,
    live: Option<Live>,
    feed: Option<(EpochMessages, mpsc::Receiver<Part>)>,
    /// The unacknowledged delta, as far as it is captured.
    kept: Vec<PrimaryMessage>,
    /// Why the epoch at hand will never be whole, if it will not.
    broken: Option<Reject>,
    /// What the stream at hand has not taken yet.
    queue: VecDeque<PrimaryMessage>,
    heartbeats: u64,
    meter: Meter,
    policy: Policy,
    connections: Arc<AtomicUsize>,
}

impl std::fmt::Debug for Replicator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Replicator")
            .field("host", &self.host)
            .field("kept_messages", &self.kept.len())
            .field("queued_messages", &self.queue.len())
            .finish_non_exhaustive()
    }
}

/// The one thing that happens next.
enum Turn {
    Order(Option<Order>),
    Opened(Result<Live, String>),
    Room(bool),
    Part(Option<Part>),
    Message(Option<Result<BackupMessage, String>>),
    Lane(Happened),
    Heartbeat,
    Silence,
}

impl Replicator {
    /// For the guest of `hello` (its session and the key of its lanes are set per stream) and the backup at `host`, with at
    /// most so many connections. Reports go to `reports`.
    pub fn new(
        host: String,
        security: Security,
        hello: Hello,
        connections: usize,
        reports: mpsc::Sender<Report>,
    ) -> (Self, mpsc::Sender<Order>) {
        let (orders_in, orders) = mpsc::channel(ORDERS);
        let replicator = Self {
            host,
            security,
            hello,
            orders,
            reports,
            sent_bytes: Arc::default(),
            opening: None,
            live: None,
            feed: None,
            kept: Vec::new(),
            broken: None,
            queue: VecDeque::new(),
            heartbeats: 0,
            meter: Meter::default(),
            policy: Policy::new(connections),
            connections: Arc::default(),
        };
        (replicator, orders_in)
    }

    /// Counts bytes of frames and device buffers handed to streams.
    pub fn sent_bytes(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.sent_bytes)
    }

    /// Connections in use; 0 without a stream.
    pub fn connections(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.connections)
    }

    /// What the link does with acknowledged epochs.
    pub fn link_meter(&self) -> Arc<LinkMeter> {
        self.meter.link()
    }

    /// Runs until it is told to close, or nobody is left to tell it anything.
    pub async fn run(mut self) {
        let mut heartbeat = tokio::time::interval(HEARTBEAT_INTERVAL);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let turn = self.select(&mut heartbeat).await;
            match turn {
                Turn::Order(None) => return,
                Turn::Order(Some(Order::Close(goodbye))) => return self.close(goodbye).await,
                Turn::Order(Some(order)) => self.order(order).await,
                Turn::Opened(result) => self.opened(result).await,
                Turn::Room(true) => self.send_next(),
                Turn::Room(false) => self.lost("the stream was closed".to_owned()).await,
                Turn::Part(part) => self.part(part).await,
                Turn::Message(Some(Ok(message))) => self.message(message).await,
                Turn::Message(Some(Err(reason))) => self.lost(reason).await,
                Turn::Message(None) => self.lost("the backup ended the stream".to_owned()).await,
                Turn::Lane(happened) => self.lane(happened).await,
                Turn::Heartbeat => {
                    self.heartbeats += 1;
                    // Before all that waits: it measures the link, not the queue.
                    self.queue.push_front(PrimaryMessage::Heartbeat(self.heartbeats));
                }
                Turn::Silence => {
                    let reason = format!("no sign of life for {} s", SILENCE_LIMIT.as_secs());
                    self.lost(reason).await;
                }
            }
        }
    }

    /// # Cancel safety
    /// Every future in it is; nothing is done here.
    async fn select(&mut self, heartbeat: &mut tokio::time::Interval) -> Turn {
        let accepted = self.live.as_ref().is_some_and(|live| live.accepted);
        let may_feed = match &self.feed {
            Some((messages, _)) => {
                messages.kind == EpochKind::Delta || self.queue.len() < FULL_QUEUE_MESSAGES
            }
            None => false,
        };
        let (outbound, inbound, ends, silent_at) = match &mut self.live {
            Some(live) => {
                let silent_at = live.heard + SILENCE_LIMIT;
                (Some(&live.outbound), Some(&mut live.inbound), Some(&mut live.ends), silent_at)
            }
            None => (None, None, None, Instant::now()),
        };
        let frame = matches!(self.queue.front(), Some(PrimaryMessage::Pages(_)));
        let is_live = inbound.is_some();
        let has_queue = is_live && accepted && !self.queue.is_empty();
        tokio::select! {
            order = self.orders.recv() => Turn::Order(order),
            opened = stream::opened(&mut self.opening) => Turn::Opened(opened),
            room = stream::room(outbound, frame), if has_queue => Turn::Room(room),
            part = feed::next(&mut self.feed), if may_feed => Turn::Part(part),
            message = stream::message(inbound), if is_live => Turn::Message(message),
            happened = lanes::happened(ends), if accepted => Turn::Lane(happened),
            _ = heartbeat.tick(), if accepted => Turn::Heartbeat,
            () = tokio::time::sleep_until(silent_at), if is_live => Turn::Silence,
        }
    }

    async fn order(&mut self, order: Order) {
        match order {
            Order::Connect { session, after } => {
                self.live = None;
                self.queue.clear();
                self.lanes_gone();
                let lane_key = self.policy.wants_lanes().then(LaneKey::random);
                let hello = Hello { session, lane_key, ..self.hello.clone() };
                let opening = stream::open(self.host.clone(), self.security.clone(), hello, after);
                self.opening = Some((session, opening));
            }
            Order::Feed(feed) => {
                self.forget();
                self.meter.begin(feed.messages.kind);
                let live = self.live.as_ref().is_some_and(|live| live.accepted);
                // A full copy is not kept, so without a stream it would be for nothing: its sink sees it closed.
                if live || feed.messages.kind == EpochKind::Delta {
                    let begin = feed.messages.begin();
                    self.feed = Some((feed.messages, feed.parts));
                    if let Some(begin) = begin {
                        self.queue_message(begin);
                    }
                }
            }
            Order::Resend if self.broken.is_some() => self.tell_broken().await,
            Order::Resend => {
                info!(messages = self.kept.len(), "sending the unacknowledged epoch again");
                self.queue.extend(self.kept.iter().cloned());
            }
            Order::Forget => self.forget(),
            Order::Close(_) => {}
        }
    }

    fn forget(&mut self) {
        self.feed = None;
        self.kept.clear();
        self.broken = None;
        self.queue.clear();
    }

    /// An epoch that cannot be sent is as good as one that the backup has dropped. Without a stream the engine asks for it
    /// again when there is one, and hears it then.
    async fn tell_broken(&mut self) {
        let session = self.live.as_ref().filter(|live| live.accepted).map(|live| live.session);
        if let (Some(session), Some(reject)) = (session, self.broken.clone()) {
            self.report(Report::Rejected(session, reject)).await;
        }
    }

    fn queue_message(&mut self, message: PrimaryMessage) {
        let delta = self.feed.as_ref().is_some_and(|(messages, _)| messages.kind == EpochKind::Delta);
        if delta {
            self.kept.push(message.clone());
        }
        if self.live.as_ref().is_some_and(|live| live.accepted) {
            self.queue.push_back(message);
            self.meter.waits(Instant::now());
        }
    }

    async fn part(&mut self, part: Option<Part>) {
        let Some((messages, _)) = &mut self.feed else { return };
        let Some(part) = part else {
            // Ended, or given up by the capture: then the engine says what becomes of it.
            self.feed = None;
            return;
        };
        if let Part::Fault(text) = part {
            warn!(epoch = %messages.at().epoch, text, "the epoch cannot be sent");
            self.broken = Some(Reject { at: messages.at(), code: RejectCode::Internal, text });
            self.feed = None;
            return self.tell_broken().await;
        }
        let complete = matches!(part, Part::End { .. });
        for message in messages.of(part) {
            self.queue_message(message);
        }
        if complete {
            self.feed = None;
        }
    }

    fn send_next(&mut self) {
        let (Some(live), Some(message)) = (&mut self.live, self.queue.pop_front()) else { return };
        let bytes = match &message {
            PrimaryMessage::Pages(pages) => pages.frame.len(),
            PrimaryMessage::Device(piece) => piece.data.len(),
            _ => 0,
        };
        let heartbeat = matches!(message, PrimaryMessage::Heartbeat(_));
        // There was room a moment ago, and nobody else sends. A heartbeat is nothing of an epoch that is under way.
        if live.outbound.try_send(message) && !heartbeat {
            self.sent_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
            let sample = self.meter.sent(bytes as u64, self.queue.is_empty(), Instant::now());
            self.measured(sample);
        }
    }

    async fn opened(&mut self, result: Result<Live, String>) {
        let Some((session, _)) = self.opening.take() else { return };
        match result {
            Ok(live) => self.live = Some(live),
            Err(reason) => self.report(Report::Disconnected(session, reason)).await,
        }
    }

    async fn message(&mut self, message: BackupMessage) {
        let Some(live) = &mut self.live else { return };
        live.heard = Instant::now();
        let session = live.session;
        match message {
            BackupMessage::HelloAck(ack) if !live.accepted => {
                live.accepted = true;
                live.lane_key.take_if(|_| !ack.agreement.features.contains(FEATURE_LANES));
                self.connections.store(1, Ordering::Relaxed);
                info!(session, backup = ack.host, version = ack.agreement.version, "stream accepted");
                self.report(Report::Connected(session, ack)).await;
            }
            BackupMessage::Refused(refused) => {
                warn!(session, code = ?refused.code, text = refused.text, "stream refused");
                self.live = None;
                self.queue.clear();
                self.lanes_gone();
                self.drop_full_feed();
                self.report(Report::Refused(session, refused)).await;
            }
            message if !live.accepted => {
                self.lost(format!("the backup answered {message:?} before accepting the stream")).await;
            }
            BackupMessage::HelloAck(_) => self.lost("the backup accepted the stream twice".to_owned()).await,
            BackupMessage::Ack(at) => {
                live.outbound.arrived();
                live.ends.retain(&live.outbound);
                let sample = self.meter.acknowledged(Instant::now());
                self.measured(sample);
                self.report(Report::Acked(session, at)).await;
            }
            BackupMessage::Reject(reject) => {
                warn!(epoch = %reject.at.epoch, code = ?reject.code, text = reject.text, "epoch rejected");
                self.report(Report::Rejected(session, reject)).await;
            }
            BackupMessage::Standby(standby) => self.report(Report::Standby(standby)).await,
            BackupMessage::HeartbeatReply(counter) => debug!(counter, "heartbeat"),
        }
    }

    async fn lost(&mut self, reason: String) {
        let Some(live) = self.live.take() else { return };
        self.queue.clear();
        self.lanes_gone();
        self.drop_full_feed();
        warn!(session = live.session, reason, "stream lost");
        self.report(Report::Disconnected(live.session, reason)).await;
    }

    /// What ends a capture that waits for a stream that does not exist any more.
    fn drop_full_feed(&mut self) {
        self.feed.take_if(|(messages, _)| messages.kind == EpochKind::Full);
    }

    async fn report(&mut self, report: Report) {
        // Nobody listens only when the protection is over.
        let _ = self.reports.send(report).await;
    }

    async fn close(mut self, goodbye: Option<GoodbyeReason>) {
        self.forget();
        let Some(Live { mut outbound, mut inbound, accepted: true, ends: _ends, .. }) = self.live.take()
        else {
            return;
        };
        let farewell = async {
            if let Some(reason) = goodbye {
                // A stream that is closed needs no farewell.
                let _ = outbound.room(false).await && outbound.try_send(PrimaryMessage::Goodbye(reason));
            }
            drop(outbound);
            // The backup ends its side when it has read everything.
            while let Some(Ok(_)) = stream::message(Some(&mut inbound)).await {}
        };
        if tokio::time::timeout(GOODBYE_LIMIT, farewell).await.is_err() {
            warn!("the backup did not end the stream in time");
        }
    }
}
