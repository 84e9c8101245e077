//! A replicator and a backup agent as they are shipped, and between them a relay that limits each connection.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bytes::Bytes;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;
use understudy_backup::agent::{Agent, Operator};
use understudy_backup::control_store::ControlFolder;
use understudy_backup::guest::Tools;
use understudy_backup::image::{AnonymousMemory, Image};
use understudy_backup::promoter::{
    Activation, HostFacts, LocalDomain, PromoteError, Promoter, Standby, StandbySpec,
};
use understudy_primary::capture::PageSink;
use understudy_primary::replicate::{Order, Replicator, Report, feed};
use understudy_proto::epoch::EpochKind;
use understudy_proto::ids::{EpochId, Generation, GuestId};
use understudy_proto::layout::{MemoryLayout, RamBlock};
use understudy_proto::negotiate::Offer;
use understudy_proto::pool::Pool;
use understudy_proto::rpc::admin::FailoverRequest;
use understudy_proto::rpc::epoch::Hello;
use understudy_proto::rpc::transport::{self, Security};
use understudy_proto::rpc::{AdminService, epoch_routes};
use understudy_proto::units::{BlockIndex, PAGE_BYTES, PageData, PageIndex};

/// Only a bound for what hangs.
const LIMIT: Duration = Duration::from_secs(60);
/// What the relay lets through at once.
const PIECE: usize = 64 << 10;

/// Both sides.
pub(crate) struct Pair {
    runtime: Runtime,
    agent: Arc<Agent>,
    promoter: Arc<Keeps>,
    orders: mpsc::Sender<Order>,
    reports: mpsc::Receiver<Report>,
    connections: Arc<AtomicUsize>,
    relay: Option<Arc<Relay>>,
    layout: Arc<MemoryLayout>,
    epoch: u64,
    session: u64,
    _folder: tempfile::TempDir,
}

impl Pair {
    /// Of a guest with so many pages, by at most so many connections of so many bytes a second each.
    pub(crate) fn open(pages: u64, connections: usize, rate: Option<f64>) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let promoter = Arc::<Keeps>::default();
        let tools = Tools {
            promoter: Arc::clone(&promoter) as Arc<dyn Promoter>,
            store: Arc::new(ControlFolder::open(folder.path())?),
            memory: Arc::new(AnonymousMemory),
            dump: Default::default(),
            versions: Default::default(),
            pool: Pool::single(),
        };
        let threads = transport::runtime_threads();
        let runtime = Builder::new_multi_thread().worker_threads(threads).enable_all().build()?;
        let (agent, address) = runtime.block_on(async {
            let agent = Agent::start(tools, 1 << 30).await?;
            let incoming = transport::listen("127.0.0.1:0".parse()?)?;
            let address = incoming.local_addr()?.to_string();
            let routes = epoch_routes(Arc::clone(&agent));
            tokio::spawn(transport::server().add_routes(routes).serve_with_incoming(incoming));
            anyhow::Ok((agent, address))
        })?;
        let relay = rate.map(|rate| Relay::start(address.clone(), rate)).transpose()?;
        let to = relay.as_ref().map_or(address, |relay| relay.address.clone());
        let hello = Hello {
            offer: Offer::ours(),
            guest: GuestId(uuid::Uuid::from_u128(0x17)),
            guest_name: "web".to_owned(),
            generation: Generation(1),
            session: 0,
            primary_host: "alpha".to_owned(),
            qemu_version: String::new(),
            machine: "pc".to_owned(),
            persistent: false,
            lane_key: None,
        };
        let (reports_in, reports) = mpsc::channel(64);
        let (replicator, orders) = Replicator::new(to, Security::Plain, hello, connections, reports_in);
        let connections = replicator.connections();
        runtime.spawn(replicator.run());
        let block = RamBlock { name: "pc.ram".into(), used_bytes: pages * PAGE_BYTES as u64 };
        let layout = Arc::new(MemoryLayout::new(vec![block], vec![], 2)?);
        let (epoch, session) = (0, 0);
        let mut pair = Self {
            runtime,
            agent,
            promoter,
            orders,
            reports,
            connections,
            relay,
            layout,
            epoch,
            session,
            _folder: folder,
        };
        pair.connect()?;
        Ok(pair)
    }

    /// Opens a stream.
    pub(crate) fn connect(&mut self) -> anyhow::Result<()> {
        self.session += 1;
        self.order(Order::Connect { session: self.session, after: Duration::ZERO })?;
        loop {
            match self.report()? {
                Report::Connected(..) => return Ok(()),
                Report::Disconnected(..) | Report::Refused(..) => bail!("no stream"),
                _ => {}
            }
        }
    }

    fn order(&self, order: Order) -> anyhow::Result<()> {
        self.runtime.block_on(self.orders.send(order)).context("the replicator is gone")
    }

    fn report(&mut self) -> anyhow::Result<Report> {
        let next = self.reports.recv();
        let next = self.runtime.block_on(async { tokio::time::timeout(LIMIT, next).await });
        next.context("nothing is heard")?.context("the replicator is gone")
    }

    /// Connections in use.
    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// Connections that the relay has carried, and those it carries.
    pub(crate) fn relay(&self) -> Option<&Relay> {
        self.relay.as_deref()
    }

    /// Sends an epoch. From its first page to its commit.
    pub(crate) fn epoch(
        &mut self,
        kind: EpochKind,
        pages: &[(u64, Box<PageData>)],
    ) -> anyhow::Result<Duration> {
        self.send(kind, pages)?;
        let began = Instant::now();
        self.committed()?;
        Ok(began.elapsed())
    }

    fn send(&mut self, kind: EpochKind, pages: &[(u64, Box<PageData>)]) -> anyhow::Result<()> {
        self.epoch += 1;
        let memory_bytes = self.layout.total_bytes();
        let (mut sink, feed) =
            feed(Generation(1), EpochId(self.epoch), kind, memory_bytes, Arc::default(), None);
        if kind == EpochKind::Full {
            sink.describe("<domain/>".to_owned());
        }
        // Made before the clock starts: a delta never waits in its sink.
        let fill = |mut sink: understudy_primary::replicate::EpochSink| -> anyhow::Result<()> {
            if kind == EpochKind::Full {
                sink.layout(&self.layout)?;
            }
            for (index, content) in pages {
                sink.page(BlockIndex(0), PageIndex::new(*index), Some(content))?;
            }
            Ok(sink.finish(Bytes::from_static(&[1; 1000]))?)
        };
        if kind == EpochKind::Full {
            self.order(Order::Feed(feed))?;
            return fill(sink);
        }
        fill(sink)?;
        self.order(Order::Feed(feed))
    }

    fn committed(&mut self) -> anyhow::Result<()> {
        loop {
            match self.report()? {
                Report::Acked(_, at) if at.epoch.0 == self.epoch => break,
                Report::Disconnected(_, reason) => {
                    told(&reason);
                    self.connect()?;
                    self.order(Order::Resend)?;
                }
                Report::Rejected(_, reject) => bail!("rejected: {}", reject.text),
                Report::Refused(_, refused) => bail!("refused: {}", refused.text),
                _ => {}
            }
        }
        self.order(Order::Forget)
    }

    /// The image as a promotion gets it.
    pub(crate) fn image(&self) -> anyhow::Result<Vec<u8>> {
        let request = FailoverRequest { domain: "web".into(), i_have_fenced: true, hold: false, term: None };
        self.runtime.block_on(async {
            use tokio_stream::StreamExt;
            // It fails, as it is told to, when the image is here.
            if let Ok(mut steps) = Operator(Arc::clone(&self.agent)).failover(request).await {
                while let Some(Ok(_)) = steps.next().await {}
            }
        });
        let image = self.promoter.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        image.context("no image was loaded")
    }
}

/// A stream that ended is said on the way, for whoever reads the output of a test.
fn told(reason: &str) {
    eprintln!("stream lost: {reason}");
}

/// Keeps the memory it is to load.
#[derive(Default)]
struct Keeps(Mutex<Option<Vec<u8>>>);

impl Promoter for Keeps {
    fn host_facts(&self) -> HostFacts {
        HostFacts::default()
    }

    fn supports_machine(&self, _: &str) -> Option<bool> {
        Some(true)
    }

    fn local(&self, _: GuestId) -> Result<LocalDomain, PromoteError> {
        Ok(LocalDomain::Absent)
    }

    fn prepare(&self, _: &StandbySpec) -> Result<Standby, PromoteError> {
        Ok(Standby::Cold(String::new()))
    }

    fn load(&self, _: &StandbySpec, image: &Arc<Image>) -> Result<(), PromoteError> {
        let memory = image.blocks().next().map(|(_, _, memory)| memory.to_vec());
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = memory;
        Err(PromoteError::new("told to fail"))
    }

    fn activate(&self, _: GuestId, _: Option<&StandbySpec>) -> Result<Activation, PromoteError> {
        Err(PromoteError::new("nothing runs here"))
    }

    fn discard(&self, _: GuestId) -> Result<(), PromoteError> {
        Ok(())
    }
}

/// Lets so many bytes a second through on each connection.
pub(crate) struct Relay {
    address: String,
    open: Mutex<Vec<TcpStream>>,
}

impl Relay {
    fn start(to: String, rate: f64) -> anyhow::Result<Arc<Self>> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let relay = Arc::new(Self { address: listener.local_addr()?.to_string(), open: Mutex::default() });
        let shared = Arc::clone(&relay);
        std::thread::spawn(move || {
            while let Ok((near, _)) = listener.accept() {
                if shared.carry(near, &to, rate).is_err() {
                    return;
                }
            }
        });
        Ok(relay)
    }

    fn carry(&self, near: TcpStream, to: &str, rate: f64) -> std::io::Result<()> {
        let far = TcpStream::connect(to)?;
        near.set_nodelay(true)?;
        far.set_nodelay(true)?;
        self.open.lock().unwrap_or_else(PoisonError::into_inner).push(near.try_clone()?);
        let (mut from, mut into) = (near.try_clone()?, far.try_clone()?);
        std::thread::spawn(move || {
            throttle(&mut from, &mut into, rate);
            let _ = into.shutdown(std::net::Shutdown::Write);
        });
        let (mut from, mut into) = (far, near);
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut from, &mut into);
            let _ = into.shutdown(std::net::Shutdown::Both);
        });
        Ok(())
    }

    /// Cuts the connection that was opened last.
    pub(crate) fn cut_last(&self) {
        if let Some(last) = self.open.lock().unwrap_or_else(PoisonError::into_inner).pop() {
            let _ = last.shutdown(std::net::Shutdown::Both);
        }
    }
}

/// Copies so many bytes a second until either side ends.
pub(crate) fn throttle(from: &mut TcpStream, into: &mut TcpStream, rate: f64) {
    let (mut buffer, mut free) = (vec![0; PIECE], Instant::now());
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let Some(piece) = buffer.get(..count) else { return };
        free = free.max(Instant::now()) + Duration::from_secs_f64(count as f64 / rate);
        std::thread::sleep(free.saturating_duration_since(Instant::now()));
        if into.write_all(piece).is_err() {
            return;
        }
    }
}

/// Pages that no codec could shorten, different for each salt.
pub(crate) fn noise(indices: impl Iterator<Item = u64>, salt: u64) -> Vec<(u64, Box<PageData>)> {
    indices
        .map(|index| {
            let mut content = Box::new([0; PAGE_BYTES]);
            let mut state = (index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (salt + 1);
            for word in content.as_chunks_mut::<8>().0 {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                *word = state.to_le_bytes();
            }
            (index, content)
        })
        .collect()
}
