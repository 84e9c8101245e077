//! A backup agent on loopback, a primary that does as it is told, and a promoter that records what it was given.
#![allow(dead_code, unreachable_pub, reason = "every test file uses a part of it")]
#![allow(clippy::cast_possible_truncation, reason = "tests are small")]

pub mod daemon;

use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use understudy_backup::agent::Agent;
use understudy_backup::control_store::ControlFolder;
use understudy_backup::guest::Tools;
use understudy_backup::image::{AnonymousMemory, Image};
use understudy_backup::promoter::{
    Activation, HostFacts, LocalDomain, PromoteError, Promoter, Standby, StandbySpec,
};
use understudy_backup::server::Sockets;
use understudy_backup::shared::{SharedFile, SharedMemory};
use understudy_proto::codec::{CodecSet, PageEncoder};
use understudy_proto::control::{self, ControlFile};
use understudy_proto::epoch::{EpochKind, EpochManifest};
use understudy_proto::frame::FrameBuilder;
use understudy_proto::ids::{EpochId, Generation, GuestId};
use understudy_proto::layout::{MemoryLayout, RamBlock};
use understudy_proto::negotiate::Offer;
use understudy_proto::pool::Pool;
use understudy_proto::rpc::admin::{FailoverRequest, GuestStatus, Progress, StatusRequest};
use understudy_proto::rpc::epoch::{
    BackupMessage, Begin, DevicePiece, EpochRef, Hello, HelloAck, Pages, PrimaryMessage, Seed,
};
use understudy_proto::rpc::{AdminClient, EpochsClient, Failure, FallibleStream, transport};
use understudy_proto::units::{BlockIndex, PAGE_BYTES, PageData, PageIndex};

pub const GUEST: GuestId = GuestId(uuid::Uuid::from_u128(0x17));

/// What libvirt calls it by.
pub const FAKE_ID: u32 = 23;

/// Far more than anything here takes: only a test that would hang reaches it.
const PATIENCE: Duration = Duration::from_secs(60);

pub async fn in_time<T>(what: &str, f: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, f).await.unwrap_or_else(|_| panic!("timed out: {what}"))
}

pub fn layout(pages: &[u64]) -> MemoryLayout {
    let blocks = pages
        .iter()
        .enumerate()
        .map(|(i, pages)| RamBlock { name: format!("block{i}"), used_bytes: pages * PAGE_BYTES as u64 })
        .collect();
    MemoryLayout::new(blocks, b"config".to_vec(), 2).unwrap()
}

/// What an image held: memory of every block, device state, epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    pub blocks: Vec<Vec<u8>>,
    pub device: Bytes,
    pub at: EpochRef,
}

impl Content {
    fn of(image: &Image) -> Self {
        Self {
            blocks: image.blocks().map(|(_, _, memory)| memory.to_vec()).collect(),
            device: image.device().clone(),
            at: image.at().unwrap(),
        }
    }
}

#[derive(Debug, Default)]
pub struct FakePromoter {
    /// What was called, in order.
    pub calls: Mutex<Vec<String>>,
    /// What the last load brought.
    pub loaded: Mutex<Option<Content>>,
    /// The control file as it was on disk when the guest was let run.
    pub control_at_activation: Mutex<Option<ControlFile>>,
    pub fail_load: AtomicBool,
    pub fail_activate: AtomicBool,
    /// Whether standbys have the first block of the guest in a file, and the last such file.
    pub warm: AtomicBool,
    pub memory: Mutex<Option<(tempfile::TempDir, Arc<SharedMemory>)>>,
    /// How many loads found the image in the standby's memory.
    pub warm_loads: AtomicU64,
    pub local: Mutex<Option<LocalDomain>>,
    pub state_dir: Mutex<Option<std::path::PathBuf>>,
}

impl FakePromoter {
    fn note(&self, call: &str) {
        self.calls.lock().unwrap().push(call.to_owned());
    }

    pub fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap().clone()
    }
}

impl Promoter for FakePromoter {
    fn host_facts(&self) -> HostFacts {
        HostFacts { qemu_version: Some("7.2.22".into()), ..HostFacts::default() }
    }

    fn supports_machine(&self, machine: &str) -> Option<bool> {
        Some(machine != "pc-unknown")
    }

    fn by_id(&self, id: u32) -> Option<GuestId> {
        (id == FAKE_ID).then_some(GUEST)
    }

    fn local(&self, _guest: GuestId) -> Result<LocalDomain, PromoteError> {
        Ok(self.local.lock().unwrap().unwrap_or(LocalDomain::Absent))
    }

    fn prepare(&self, spec: &StandbySpec) -> Result<Standby, PromoteError> {
        assert_eq!(spec.seed.domain_xml, "<domain/>");
        self.note("prepare");
        *self.local.lock().unwrap() = Some(LocalDomain::Waiting);
        if !self.warm.load(Ordering::Relaxed) {
            return Ok(Standby::Cold(String::new()));
        }
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let (path, block) = (dir.path().join("ram"), &spec.seed.layout.blocks()[0]);
        std::fs::File::create(&path).unwrap().set_len(block.used_bytes).unwrap();
        let file = SharedFile::open(block.name.clone(), 0, &path, block.used_bytes).unwrap();
        let memory = Arc::new(SharedMemory::new(vec![file]));
        // The one before goes away with its domain.
        *self.memory.lock().unwrap() = Some((dir, Arc::clone(&memory)));
        Ok(Standby::Warm(memory))
    }

    fn load(&self, _spec: &StandbySpec, image: &Arc<Image>) -> Result<(), PromoteError> {
        self.note("load");
        let content = Content::of(image);
        if let (Some(shared), Some((dir, memory))) = (image.shared(), &*self.memory.lock().unwrap())
            && Arc::ptr_eq(shared, memory)
        {
            // What a QEMU would find.
            assert!(std::fs::read(dir.path().join("ram")).unwrap() == content.blocks[0]);
            self.warm_loads.fetch_add(1, Ordering::Relaxed);
        }
        *self.loaded.lock().unwrap() = Some(content);
        if self.fail_load.load(Ordering::Relaxed) {
            return Err(PromoteError::new("told to fail at load"));
        }
        *self.local.lock().unwrap() = Some(LocalDomain::Loaded);
        Ok(())
    }

    fn activate(&self, guest: GuestId, spec: Option<&StandbySpec>) -> Result<Activation, PromoteError> {
        self.note(if spec.is_some_and(|s| s.persistent) { "activate and define" } else { "activate" });
        let dir = self.state_dir.lock().unwrap().clone().unwrap();
        *self.control_at_activation.lock().unwrap() = Some(control_file(&dir, guest));
        if self.fail_activate.load(Ordering::Relaxed) {
            return Err(PromoteError::new("told to fail at activation"));
        }
        *self.local.lock().unwrap() = Some(LocalDomain::Active);
        Ok(Activation::default())
    }

    fn discard(&self, _guest: GuestId) -> Result<(), PromoteError> {
        self.note("discard");
        let mut local = self.local.lock().unwrap();
        if matches!(*local, Some(LocalDomain::Waiting | LocalDomain::Loaded)) {
            *local = None;
        }
        Ok(())
    }
}

pub fn control_file(state_dir: &std::path::Path, guest: GuestId) -> ControlFile {
    let path = state_dir.join(control::FOLDER).join(control::file_name(guest));
    ControlFile::decode(&std::fs::read(path).unwrap()).unwrap()
}

/// A running backup agent.
pub struct Backup {
    pub dir: Arc<tempfile::TempDir>,
    pub promoter: Arc<FakePromoter>,
    pub address: std::net::SocketAddr,
    stop: oneshot::Sender<()>,
    served: JoinHandle<()>,
}

impl Backup {
    pub async fn start() -> Self {
        Self::start_in(Arc::new(tempfile::tempdir().unwrap()), Arc::default(), 64 << 20).await
    }

    pub async fn with_staging(staging_max_bytes: u64) -> Self {
        Self::start_in(Arc::new(tempfile::tempdir().unwrap()), Arc::default(), staging_max_bytes).await
    }

    pub async fn start_in(
        dir: Arc<tempfile::TempDir>,
        promoter: Arc<FakePromoter>,
        staging_max_bytes: u64,
    ) -> Self {
        Self::start_by(dir, promoter, staging_max_bytes, 2).await
    }

    /// With so many threads that decode.
    pub async fn with_threads(threads: usize) -> Self {
        Self::start_by(Arc::new(tempfile::tempdir().unwrap()), Arc::default(), 64 << 20, threads).await
    }

    async fn start_by(
        dir: Arc<tempfile::TempDir>,
        promoter: Arc<FakePromoter>,
        staging_max_bytes: u64,
        decode_threads: usize,
    ) -> Self {
        *promoter.state_dir.lock().unwrap() = Some(dir.path().to_owned());
        let tools = Tools {
            promoter: Arc::clone(&promoter) as Arc<dyn Promoter>,
            store: Arc::new(ControlFolder::open(dir.path()).unwrap()),
            memory: Arc::new(AnonymousMemory),
            dump: understudy_backup::dump::Dump::default(),
            pool: Pool::new("decode", decode_threads).unwrap(),
            versions: Default::default(),
        };
        let sockets = Sockets::bind("127.0.0.1:0".parse().unwrap(), dir.path()).unwrap();
        let address = sockets.address();
        let agent = Agent::start(tools, staging_max_bytes).await.unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let served = tokio::spawn(async move {
            let stopped = async { drop(stopped.await) };
            sockets.serve(agent, transport::Security::Plain, stopped).await.unwrap();
        });
        Self { dir, promoter, address, stop, served }
    }

    /// Ends the agent and starts another one with the same state directory.
    pub async fn restart(self) -> Self {
        let (dir, promoter) = (Arc::clone(&self.dir), Arc::clone(&self.promoter));
        self.stop.send(()).unwrap();
        in_time("agent ends", self.served).await.unwrap();
        Self::start_in(dir, promoter, 64 << 20).await
    }

    pub async fn epochs(&self) -> EpochsClient {
        EpochsClient::new(transport::connect_plaintext(&self.address.to_string()).await.unwrap())
    }

    pub async fn admin(&self) -> AdminClient {
        let path = self.dir.path().join(transport::BACKUP_SOCKET);
        AdminClient::new(transport::connect_unix(&path).await.unwrap())
    }

    pub async fn failover(&self, i_have_fenced: bool) -> Result<Vec<Progress>, Failure> {
        let request = FailoverRequest { domain: "web".into(), i_have_fenced, hold: false, term: None };
        let mut stream = in_time("failover answers", self.admin().await.failover(request)).await?;
        let mut steps = Vec::new();
        while let Some(step) = in_time("failover goes on", stream.next()).await {
            steps.push(step?);
        }
        Ok(steps)
    }

    /// The image as a promotion would get it. Ends the stream, if there is one.
    pub async fn peek(&self) -> Result<Content, Failure> {
        self.promoter.fail_load.store(true, Ordering::Relaxed);
        let failure = self.failover(true).await.unwrap_err();
        self.promoter.fail_load.store(false, Ordering::Relaxed);
        if failure.reason == "told to fail at load" {
            Ok(self.promoter.loaded.lock().unwrap().take().unwrap())
        } else {
            Err(failure)
        }
    }

    pub async fn status(&self) -> GuestStatus {
        let request = StatusRequest { domain: Some("web".into()) };
        self.admin().await.status(request).await.unwrap().guests.remove(0)
    }

    pub fn control(&self) -> ControlFile {
        control_file(self.dir.path(), GUEST)
    }
}

static SESSION: AtomicU64 = AtomicU64::new(1);

pub fn hello(generation: u64) -> Hello {
    Hello {
        offer: Offer::ours(),
        guest: GUEST,
        guest_name: "web".into(),
        generation: Generation(generation),
        session: SESSION.fetch_add(1, Ordering::Relaxed),
        primary_host: "alpha".into(),
        qemu_version: "7.2.22".into(),
        machine: "pc-q35-7.2".into(),
        persistent: true,
        lane_key: None,
    }
}

/// A stream to a backup.
pub struct Primary {
    tx: mpsc::Sender<PrimaryMessage>,
    rx: FallibleStream<BackupMessage>,
    pub ack: HelloAck,
}

impl Primary {
    pub async fn open(
        backup: &Backup,
        hello: Hello,
    ) -> (mpsc::Sender<PrimaryMessage>, FallibleStream<BackupMessage>) {
        let (tx, outbound) = mpsc::channel(16);
        tx.send(PrimaryMessage::Hello(hello)).await.unwrap();
        let mut client = backup.epochs().await;
        let rx = in_time("stream opens", client.replicate(ReceiverStream::new(outbound))).await.unwrap();
        (tx, rx)
    }

    pub async fn connect(backup: &Backup, hello: Hello) -> Result<Self, BackupMessage> {
        let (tx, mut rx) = Self::open(backup, hello).await;
        match in_time("hello is answered", rx.next()).await.unwrap().unwrap() {
            BackupMessage::HelloAck(ack) => Ok(Self { tx, rx, ack }),
            other => Err(other),
        }
    }

    /// Connects again, however long the backup takes to be ready for it.
    pub async fn reconnect(backup: &Backup, generation: u64) -> Self {
        in_time("reconnect", async {
            loop {
                if let Ok(primary) = Self::connect(backup, hello(generation)).await {
                    return primary;
                }
                tokio::task::yield_now().await;
            }
        })
        .await
    }

    pub async fn send(&self, message: PrimaryMessage) {
        in_time("message is taken", self.tx.send(message)).await.unwrap();
    }

    pub async fn send_all(&self, messages: impl IntoIterator<Item = PrimaryMessage>) {
        for message in messages {
            // A stream the backup has ended takes nothing more; its answer says why.
            if in_time("message is taken", self.tx.send(message)).await.is_err() {
                return;
            }
        }
    }

    /// The next message that is not about the standby; `None` at the end.
    pub async fn answer(&mut self) -> Option<BackupMessage> {
        loop {
            match in_time("the backup answers", self.rx.next()).await {
                // A reply to no heartbeat says that it lives while it works.
                Some(Ok(BackupMessage::Standby(_) | BackupMessage::HeartbeatReply(0))) => (),
                Some(Ok(message)) => return Some(message),
                Some(Err(failure)) => panic!("{failure:?}"),
                None => return None,
            }
        }
    }

    /// The error that ended the stream.
    pub async fn failure(&mut self) -> Failure {
        loop {
            match in_time("the backup answers", self.rx.next()).await {
                Some(Ok(_)) => (),
                Some(Err(failure)) => return failure,
                None => panic!("ended without an error"),
            }
        }
    }

    pub async fn commit(&mut self, epoch: &Epoch) {
        self.send_all(epoch.messages()).await;
        assert_eq!(self.answer().await, Some(BackupMessage::Ack(epoch.at)));
    }
}

pub fn at(generation: u64, epoch: u64) -> EpochRef {
    EpochRef { generation: Generation(generation), epoch: EpochId(epoch) }
}

pub type Page = (u16, u64, Option<Box<PageData>>);

pub fn page(block: u16, index: u64, fill: u8) -> Page {
    (block, index, (fill != 0).then(|| Box::new([fill; PAGE_BYTES])))
}

/// A page of ones in which `fill` bytes differ, or one of zeros: one edit away from all others.
pub fn edited(block: u16, index: u64, fill: u8) -> Page {
    let (block, index, content) = page(block, index, fill.min(1));
    let content = content.map(|mut content| {
        content[1000..].iter_mut().take(usize::from(fill)).for_each(|byte| *byte = fill);
        content
    });
    (block, index, content)
}

/// An epoch as it is sent.
#[derive(Clone)]
pub struct Epoch {
    pub at: EpochRef,
    pub kind: EpochKind,
    pub layout: MemoryLayout,
    pub frames: Vec<Bytes>,
    pub device: Bytes,
    pub manifest: EpochManifest,
}

impl Epoch {
    /// With zero and raw pages only.
    pub fn new(at: EpochRef, kind: EpochKind, layout: &MemoryLayout, pages: &[Page], device: &[u8]) -> Self {
        Self::built(FrameBuilder::new(), at, kind, layout, pages, device, None, false)
    }

    /// With every codec; in a delta the first record of a page refers to `before`, what the backup has committed.
    pub fn coded(
        at: EpochRef,
        kind: EpochKind,
        layout: &MemoryLayout,
        pages: &[Page],
        device: &[u8],
        before: &Model,
        batched: bool,
    ) -> Self {
        let builder = if batched { FrameBuilder::batched(CodecSet::ALL) } else { FrameBuilder::new() };
        let before = (kind == EpochKind::Delta).then_some(before);
        Self::built(builder, at, kind, layout, pages, device, before, true)
    }

    #[allow(clippy::too_many_arguments)]
    fn built(
        mut builder: FrameBuilder,
        at: EpochRef,
        kind: EpochKind,
        layout: &MemoryLayout,
        pages: &[Page],
        device: &[u8],
        before: Option<&Model>,
        lz4: bool,
    ) -> Self {
        let (mut encoder, mut seen, mut frames) = (PageEncoder::new(), BTreeSet::new(), Vec::new());
        for (block, index, content) in pages {
            let before =
                before.filter(|_| seen.insert((block, index))).map(|model| model.page(*block, *index));
            let encoded = encoder.encode(content.as_deref(), before.as_deref(), lz4);
            let (block, index) = (BlockIndex(*block), PageIndex::new(*index));
            frames.extend(builder.push_encoded(block, index, content.as_deref(), encoded));
        }
        let (last, totals) = builder.finish();
        frames.extend(last);
        let device = Bytes::copy_from_slice(device);
        let manifest = EpochManifest::new(at.generation, at.epoch, kind, &totals, &device);
        Self { at, kind, layout: layout.clone(), frames, device, manifest }
    }

    pub fn messages(&self) -> Vec<PrimaryMessage> {
        let mut messages = Vec::new();
        if self.kind == EpochKind::Full {
            let seed = Seed { layout: self.layout.clone(), domain_xml: "<domain/>".into() };
            messages.push(PrimaryMessage::Seed(seed));
        }
        let Self { at, kind, .. } = self;
        messages.push(PrimaryMessage::Begin(Begin {
            generation: at.generation,
            epoch: at.epoch,
            kind: *kind,
        }));
        let pages = |frame: &Bytes| PrimaryMessage::Pages(Pages { epoch: at.epoch, frame: frame.clone() });
        messages.extend(self.frames.iter().map(pages));
        messages.extend(DevicePiece::split(at.epoch, &self.device).map(PrimaryMessage::Device));
        messages.push(PrimaryMessage::Manifest(self.manifest.clone()));
        messages
    }
}

/// What the image must be: the naive way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Model {
    blocks: BTreeMap<u16, Vec<u8>>,
}

impl Model {
    pub fn new(layout: &MemoryLayout) -> Self {
        let blocks = (0..).zip(layout.blocks()).map(|(i, b)| (i, vec![0; b.used_bytes as usize])).collect();
        Self { blocks }
    }

    pub fn write(&mut self, pages: &[Page]) {
        for (block, index, content) in pages {
            let from = *index as usize * PAGE_BYTES;
            self.blocks.get_mut(block).unwrap()[from..from + PAGE_BYTES]
                .copy_from_slice(content.as_deref().unwrap_or(&[0; PAGE_BYTES]));
        }
    }

    pub fn page(&self, block: u16, index: u64) -> Box<PageData> {
        let from = index as usize * PAGE_BYTES;
        Box::new(self.blocks[&block][from..from + PAGE_BYTES].try_into().unwrap())
    }

    pub fn content(&self, at: EpochRef, device: &[u8]) -> Content {
        Content {
            blocks: self.blocks.values().cloned().collect(),
            device: Bytes::copy_from_slice(device),
            at,
        }
    }
}
