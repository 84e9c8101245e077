//! A backup that checks every epoch as the real one must, and can be made to fail.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::BytesMut;
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use understudy_proto::ProtocolError;
use understudy_proto::codec;
use understudy_proto::digest::{Digest, PagesDigest};
use understudy_proto::epoch::{EpochKind, EpochManifest};
use understudy_proto::frame::FrameReader;
use understudy_proto::ids::{EpochId, Incarnation};
use understudy_proto::layout::MemoryLayout;
use understudy_proto::negotiate::{self, Offer};
use understudy_proto::rpc::epoch::{
    BackupMessage, Begin, EpochRef, GoodbyeReason, Hello, HelloAck, PrimaryMessage, ProbeReply, ProbeRequest,
    Refused, Reject, RejectCode,
};
use understudy_proto::rpc::{EpochService, Failure, Inbound, Outbound, async_trait, epoch_routes, transport};
use understudy_proto::units::PAGE_BYTES;

use super::GENERATION;
use super::guest::Memory;

#[derive(Clone)]
pub(crate) struct StubBackup {
    inner: Arc<Mutex<Inner>>,
    /// Streams end when this changes.
    cuts: watch::Sender<u64>,
    address: SocketAddr,
}

struct Inner {
    incarnation: u128,
    committed: Option<u64>,
    /// The last it ever committed, in any life.
    ever_committed: Option<u64>,
    image: BTreeMap<u64, u8>,
    full_copies: u64,
    goodbyes: Vec<GoodbyeReason>,
    refuse: Option<Refused>,
    reject_next: bool,
    /// The next epoch is committed, and the stream ends before that is said.
    swallow_ack: bool,
    sessions: Vec<u64>,
}

/// What of an epoch is here.
struct Open {
    begin: Begin,
    memory: Memory,
    digest: PagesDigest,
    frames: u64,
    pages: u64,
    frame_bytes: u64,
    device: BytesMut,
}

impl StubBackup {
    pub(crate) async fn listen() -> Self {
        let incoming = transport::listen("127.0.0.1:0".parse().expect("an address")).expect("listens");
        let address = incoming.local_addr().expect("has an address");
        let inner = Inner {
            incarnation: 1,
            committed: None,
            ever_committed: None,
            image: BTreeMap::new(),
            full_copies: 0,
            goodbyes: vec![],
            refuse: None,
            reject_next: false,
            swallow_ack: false,
            sessions: vec![],
        };
        let stub = Self { inner: Arc::new(Mutex::new(inner)), cuts: watch::channel(0).0, address };
        let routes = epoch_routes(Arc::new(stub.clone()));
        tokio::spawn(transport::server().add_routes(routes).serve_with_incoming(incoming));
        stub
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("not poisoned")
    }

    pub(crate) fn address(&self) -> String {
        self.address.to_string()
    }

    pub(crate) fn committed(&self) -> Option<u64> {
        self.lock().committed
    }

    /// As [`Self::committed`], but not forgotten at a restart: what was acknowledged before may be released after it.
    pub(crate) fn ever_committed(&self) -> Option<u64> {
        self.lock().ever_committed
    }

    pub(crate) fn full_copies(&self) -> u64 {
        self.lock().full_copies
    }

    pub(crate) fn goodbyes(&self) -> Vec<GoodbyeReason> {
        self.lock().goodbyes.clone()
    }

    pub(crate) fn image(&self) -> (u64, Memory) {
        let inner = self.lock();
        (inner.committed.expect("an epoch"), inner.image.clone())
    }

    /// Streams that were opened.
    pub(crate) fn attempts(&self) -> usize {
        self.lock().sessions.len()
    }

    pub(crate) fn refuse(&self, refused: Option<Refused>) {
        self.lock().refuse = refused;
    }

    pub(crate) fn reject_next(&self) {
        self.lock().reject_next = true;
    }

    /// Ends all streams; if wished, at the next commit and before it is acknowledged.
    pub(crate) fn cut(&self, at_next_ack: bool) {
        if at_next_ack {
            self.lock().swallow_ack = true;
        } else {
            self.cuts.send_modify(|cuts| *cuts += 1);
        }
    }

    pub(crate) fn restart(&self) {
        let mut inner = self.lock();
        inner.incarnation += 1;
        inner.committed = None;
        inner.image.clear();
        drop(inner);
        self.cut(false);
    }

    fn greet(&self, hello: &Hello) -> Result<HelloAck, Refused> {
        let mut inner = self.lock();
        assert!(inner.sessions.last().is_none_or(|last| *last < hello.session), "sessions grow");
        inner.sessions.push(hello.session);
        if let Some(refused) = &inner.refuse {
            return Err(refused.clone());
        }
        Ok(HelloAck {
            agreement: negotiate::select(&Offer::ours(), &hello.offer).expect("a common version"),
            incarnation: Incarnation(uuid::Uuid::from_u128(inner.incarnation)),
            last_committed: inner
                .committed
                .map(|epoch| EpochRef { generation: GENERATION, epoch: EpochId(epoch) }),
            host: "beta".to_owned(),
            qemu_version: None,
            libvirt_version: None,
        })
    }

    /// `None` ends the stream.
    fn commit(&self, open: Open, manifest: &EpochManifest) -> Option<BackupMessage> {
        let own = EpochManifest {
            generation: open.begin.generation,
            epoch: open.begin.epoch,
            kind: open.begin.kind,
            frames: open.frames,
            pages: open.pages,
            frame_bytes: open.frame_bytes,
            pages_digest: open.digest.finish(),
            device_bytes: open.device.len() as u64,
            device_digest: Digest::of(&open.device),
        };
        assert_eq!(*manifest, own);
        let at = EpochRef { generation: own.generation, epoch: own.epoch };
        let mut inner = self.lock();
        if std::mem::take(&mut inner.reject_next) {
            let reject = Reject { at, code: RejectCode::Corrupt, text: "as the test wishes".to_owned() };
            return Some(BackupMessage::Reject(reject));
        }
        match own.kind {
            EpochKind::Full => {
                assert!(inner.committed.is_none_or(|last| last < own.epoch.0), "epochs grow");
                inner.full_copies += 1;
                inner.image.clear();
            }
            EpochKind::Delta => assert_eq!(inner.committed, Some(own.epoch.0 - 1), "base of {}", own.epoch),
        }
        inner.image.extend(open.memory);
        inner.committed = Some(own.epoch.0);
        inner.ever_committed = inner.committed;
        (!std::mem::take(&mut inner.swallow_ack)).then_some(BackupMessage::Ack(at))
    }

    async fn converse(self, mut inbound: Inbound, replies: mpsc::Sender<BackupMessage>) -> Option<()> {
        let mut cuts = self.cuts.subscribe();
        let (mut layout, mut open): (Option<MemoryLayout>, Option<Open>) = (None, None);
        loop {
            let message = tokio::select! {
                message = inbound.next() => message?.ok()?,
                _ = cuts.changed() => return None,
            };
            let reply = match message {
                PrimaryMessage::Hello(hello) => match self.greet(&hello) {
                    Ok(ack) => Some(BackupMessage::HelloAck(ack)),
                    Err(refused) => {
                        replies.send(BackupMessage::Refused(refused)).await.ok();
                        return None;
                    }
                },
                PrimaryMessage::Seed(seed) => {
                    assert_eq!(seed.domain_xml, "<domain/>");
                    layout = Some(seed.layout);
                    None
                }
                PrimaryMessage::Begin(begin) => {
                    open = Some(Open {
                        begin,
                        memory: Memory::new(),
                        digest: PagesDigest::new(),
                        frames: 0,
                        pages: 0,
                        frame_bytes: 0,
                        device: BytesMut::new(),
                    });
                    None
                }
                PrimaryMessage::Pages(pages) => {
                    let open = open.as_mut().expect("an open epoch");
                    // A stream that resumes with a delta brings no layout; this guest's never changes.
                    let layout = layout.get_or_insert_with(fake_layout);
                    open.frames += 1;
                    open.frame_bytes += pages.frame.len() as u64;
                    let read = FrameReader::new().read::<ProtocolError>(&pages.frame, layout, |record| {
                        let mut scratch = [0; PAGE_BYTES];
                        let content = codec::decode(&record, None, &mut scratch)?;
                        open.pages += 1;
                        open.digest.update(record.block, record.page, content);
                        open.memory.insert(record.page.get(), content.map_or(0, |content| content[4095]));
                        Ok(())
                    });
                    read.expect("a frame");
                    None
                }
                PrimaryMessage::Device(piece) => {
                    let device = &mut open.as_mut().expect("an open epoch").device;
                    assert_eq!(piece.offset_bytes, device.len() as u64);
                    device.extend_from_slice(&piece.data);
                    None
                }
                PrimaryMessage::Manifest(manifest) => {
                    Some(self.commit(open.take().expect("an open epoch"), &manifest)?)
                }
                PrimaryMessage::Heartbeat(counter) => Some(BackupMessage::HeartbeatReply(counter)),
                PrimaryMessage::Goodbye(reason) => {
                    self.lock().goodbyes.push(reason);
                    return None;
                }
            };
            if let Some(reply) = reply {
                replies.send(reply).await.ok()?;
            }
        }
    }
}

fn fake_layout() -> MemoryLayout {
    let block = understudy_proto::layout::RamBlock { name: "pc.ram".to_owned(), used_bytes: 300 * 4096 };
    MemoryLayout::new(vec![block], vec![], 2).expect("a layout")
}

#[async_trait]
impl EpochService for StubBackup {
    async fn replicate(&self, _peer: Option<SocketAddr>, inbound: Inbound) -> Result<Outbound, Failure> {
        let (replies, outbound) = mpsc::channel(16);
        tokio::spawn(self.clone().converse(inbound, replies));
        Ok(Box::pin(ReceiverStream::new(outbound)))
    }

    async fn probe(&self, _request: ProbeRequest) -> Result<ProbeReply, Failure> {
        Err(Failure::wrong_agent("a probe", "real backup"))
    }
}
