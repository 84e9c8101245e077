//! The two hosts around a bare QEMU: no libvirt, the agents as they are shipped.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, anyhow};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;
use understudy_backup::agent::Agent;
use understudy_backup::control_store::ControlFolder;
use understudy_backup::guest::Tools;
use understudy_backup::image::{AnonymousMemory, Image};
use understudy_backup::promoter::{
    Activation, HostFacts, LocalDomain, PromoteError, Promoter, Standby, StandbySpec,
};
use understudy_libvirt::{DomainEvent, QmpEvent, RunState, SocketMonitor, qmp};
use understudy_primary::agent::{self, GuestHost, Handle, Output, Plan, Wish};
use understudy_primary::capture::{self, ColoOptions, ColoSource};
use understudy_primary::encode::{Compress, Encoding};
use understudy_primary::engine::{CaptureFailure, OutcomeKind, Settings};
use understudy_proto::ids::{Generation, GuestId};
use understudy_proto::negotiate::Offer;
use understudy_proto::pool::Pool;
use understudy_proto::rpc::admin::GuestState;
use understudy_proto::rpc::epoch::Hello;
use understudy_proto::rpc::epoch_routes;
use understudy_proto::rpc::transport::{self, Security};

use crate::guest::Guest;

/// Only a bound for a bench that hangs.
const LIMIT: Duration = Duration::from_secs(60);

/// As an agent that is told nothing has them.
const CACHE_BYTES: usize = 128 << 20;
const STAGING_MAX_BYTES: u64 = 1 << 30;

/// A host's agent lives in threads of its own, as many as in its process.
fn runtime() -> anyhow::Result<Runtime> {
    Ok(Builder::new_multi_thread().worker_threads(transport::runtime_threads()).enable_all().build()?)
}

/// The backup's host: holds an image and never promotes it.
pub(crate) struct BackupHost {
    runtime: Option<Runtime>,
    address: String,
    _folder: tempfile::TempDir,
}

impl BackupHost {
    pub(crate) fn start() -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let tools = Tools {
            promoter: Arc::new(Never),
            store: Arc::new(ControlFolder::open(folder.path())?),
            memory: Arc::new(AnonymousMemory),
            dump: Default::default(),
            versions: Default::default(),
            pool: Pool::single(),
        };
        let runtime = runtime()?;
        let address = runtime.block_on(async {
            let agent = Agent::start(tools, STAGING_MAX_BYTES).await?;
            let incoming = transport::listen("127.0.0.1:0".parse()?)?;
            let address = incoming.local_addr()?.to_string();
            let routes = epoch_routes(agent);
            tokio::spawn(transport::server().add_routes(routes).serve_with_incoming(incoming));
            anyhow::Ok(address)
        })?;
        Ok(Self { runtime: Some(runtime), address, _folder: folder })
    }
}

impl Drop for BackupHost {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

struct Never;

impl Promoter for Never {
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

    fn load(&self, _: &StandbySpec, _: &Arc<Image>) -> Result<(), PromoteError> {
        Err(PromoteError::new("nothing is promoted here"))
    }

    fn activate(&self, _: GuestId, _: Option<&StandbySpec>) -> Result<Activation, PromoteError> {
        Err(PromoteError::new("nothing is promoted here"))
    }

    fn discard(&self, _: GuestId) -> Result<(), PromoteError> {
        Ok(())
    }
}

/// Who hears of the guest's events now, and its stops.
#[derive(Default)]
struct Ears {
    agent: Option<mpsc::Sender<DomainEvent>>,
    stopped_at: Option<Duration>,
    stops: Vec<Duration>,
}

impl Ears {
    fn hear(&mut self, event: QmpEvent) {
        match event.name.as_str() {
            "STOP" => self.stopped_at = Some(event.timestamp),
            "RESUME" => {
                let at = self.stopped_at.take();
                self.stops.extend(at.map(|at| event.timestamp.saturating_sub(at)));
            }
            _ => {}
        }
        if let Some(agent) = &self.agent {
            let _ = agent.blocking_send(DomainEvent::Qmp(event));
        }
    }
}

/// The host of the guest that runs.
pub(crate) struct PrimaryHost {
    runtime: Option<Runtime>,
    guest: Arc<Watched>,
}

/// The guest as its agent sees it.
struct Watched {
    monitor: Arc<SocketMonitor>,
    ears: Arc<Mutex<Ears>>,
}

impl GuestHost for Watched {
    fn describe(&self) -> Result<String, String> {
        Ok("<domain/>".to_owned())
    }

    fn run_state(&self) -> Result<RunState, String> {
        qmp::query_status(self.monitor.as_ref()).map_err(|error| error.to_string())
    }

    fn pause(&self) -> Result<(), String> {
        qmp::stop(self.monitor.as_ref()).map_err(|error| error.to_string())
    }

    fn rescue(&self) -> Result<(), CaptureFailure> {
        capture::rescue(self.monitor.as_ref()).map(drop).map_err(|error| CaptureFailure {
            reason: error.to_string(),
            left_stopped: true,
            gone: error.is_gone(),
        })
    }

    fn subscribe(&self, events: mpsc::Sender<DomainEvent>) -> Result<(), String> {
        self.ears.lock().unwrap_or_else(PoisonError::into_inner).agent = Some(events);
        Ok(())
    }
}

/// A protection that runs.
pub(crate) struct Protection<'a> {
    host: &'a PrimaryHost,
    handle: Handle,
}

impl PrimaryHost {
    /// For this guest, whose events it takes.
    pub(crate) fn start(guest: &mut Guest) -> anyhow::Result<Self> {
        let events = std::mem::replace(&mut guest.events, std::sync::mpsc::channel().1);
        let ears = Arc::new(Mutex::new(Ears::default()));
        let hearing = Arc::clone(&ears);
        std::thread::spawn(move || {
            for event in events {
                hearing.lock().unwrap_or_else(PoisonError::into_inner).hear(event);
            }
        });
        let guest = Arc::new(Watched { monitor: Arc::clone(&guest.monitor), ears });
        Ok(Self { runtime: Some(runtime()?), guest })
    }

    fn runtime(&self) -> anyhow::Result<&Runtime> {
        self.runtime.as_ref().context("no runtime")
    }

    /// Stops since this was asked last.
    pub(crate) fn stops(&self) -> Vec<Duration> {
        std::mem::take(&mut self.guest.ears.lock().unwrap_or_else(PoisonError::into_inner).stops)
    }

    /// Protects the guest until the first epochs are committed.
    pub(crate) fn protect(
        &self,
        backup: &BackupHost,
        epoch: Duration,
        floor: Duration,
        output: Output,
    ) -> anyhow::Result<Protection<'_>> {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH)?;
        let generation = Generation::FIRST;
        let source = ColoSource::new(self.guest.monitor.clone(), ColoOptions::default())?;
        let plan = Plan {
            hello: Hello {
                offer: Offer::ours(),
                guest: GuestId(uuid::Uuid::from_u128(0xf1a7)),
                guest_name: "flat".to_owned(),
                generation,
                session: 0,
                primary_host: "alpha".to_owned(),
                qemu_version: String::new(),
                machine: "pc".to_owned(),
                persistent: false,
                lane_key: None,
            },
            to: backup.address.clone(),
            security: Security::Plain,
            settings: Settings {
                generation,
                epoch,
                goals: None,
                floor,
                attended: true,
                first_session: u64::try_from(since_1970.as_micros())?,
                peer: backup.address.clone(),
            },
            libvirt_version: String::new(),
            host: Arc::clone(&self.guest) as Arc<dyn GuestHost>,
            source: Box::new(source),
            barrier: Box::new(|_| Ok(())),
            output,
            encoding: Encoding { compress: Compress::Auto, cache_bytes: CACHE_BYTES, pool: Pool::single() },
            connections: 4,
        };
        let handle = self.runtime()?.block_on(agent::start(plan)).map_err(|reason| anyhow!(reason))?;
        Ok(Protection { host: self, handle })
    }
}

impl Drop for PrimaryHost {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Protection<'_> {
    /// Waits until so many epochs are committed.
    pub(crate) fn epochs(&self, wanted: u64) -> anyhow::Result<()> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let status = self.handle.snapshot.borrow().status();
            if status.state == GuestState::Protected && status.epochs_total >= wanted {
                return Ok(());
            }
            let over = self.handle.snapshot.borrow().outcome.clone();
            anyhow::ensure!(over.is_none(), "protection has ended: {over:?}");
            anyhow::ensure!(
                Instant::now() < deadline,
                "not protected: {:?}, {}",
                status.state,
                status.detail
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub(crate) fn epochs_total(&self) -> u64 {
        self.handle.snapshot.borrow().status().epochs_total
    }

    /// Ends it; the guest runs on.
    pub(crate) fn end(self) -> anyhow::Result<()> {
        let Self { host, mut handle } = self;
        let outcome = host.runtime()?.block_on(async move {
            handle.wishes.send(Wish::Unprotect).await?;
            let over = handle.snapshot.wait_for(|snapshot| snapshot.outcome.is_some());
            let over = tokio::time::timeout(LIMIT, over).await??;
            anyhow::Ok(over.outcome.clone())
        })?;
        match outcome {
            Some(outcome) if outcome.kind == OutcomeKind::Unprotected => Ok(()),
            other => Err(anyhow!("protection has ended otherwise: {other:?}")),
        }
    }
}
