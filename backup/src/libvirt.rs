//! Promotion through libvirt: a standby domain that waits for its state and gets it over one socket. If its memory can
//! be in files on tmpfs, the image moves into them ahead of time, and only the rest goes over the socket.
//!
//! The standby is the primary's own domain (same UUID, machine type, devices) with `-incoming defer`, created paused
//! and transient. That argument in the live XML is also how a standby is told from any other domain.

use crate::image::Image;
use crate::promoter::{Activation, HostFacts, LocalDomain, PromoteError, Promoter, Standby, StandbySpec};
use crate::shared::{SharedFile, SharedMemory};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair, sockopt};
use serde_json::json;
use std::collections::HashMap;
use std::io::{BufWriter, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use understudy_libvirt::domain_xml::{DomainFacts, clean_xml, shared_standby_xml, standby_xml};
use understudy_libvirt::{
    Connection, Domain, DomainState, LibvirtError, MonitorError, RunState, XmlFlags, qmp,
};
use understudy_proto::ids::GuestId;
use understudy_proto::qemu::{IGNORE_SHARED, IncomingWriter, SharedBlock};

/// The only architecture QEMU's COLO is used on here.
const ARCH: &str = "x86_64";

/// Name under which QEMU keeps our end of the socket.
const FD_NAME: &str = "understudy-incoming";

/// Bytes asked for in the socket to QEMU, and written at a time.
const SOCKET_BYTES: usize = 4 << 20;
const WRITE_BYTES: usize = 1 << 20;

/// How long QEMU may take to read nothing at all.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);

/// How long devices may take to load once everything is sent.
const COMPLETE_TIMEOUT: Duration = Duration::from_secs(30);

/// How often QEMU announces the guest's cards by itself at the end of a load, before we let the guest run. As little
/// as can be, but not 0: with 0, QEMU 7.2 frees the announce timer of virtio-net while it loads, and crashes when the
/// guest resets the card, at its next reboot.
const LOAD_ANNOUNCE_ROUNDS: u32 = 1;

/// QEMU's own default, for whatever the operator does with the domain later.
const QEMU_ANNOUNCE_ROUNDS: u32 = 5;

/// Between two looks at a load that is about to end.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

/// How long libvirt may take to notice that a QEMU has ended, and how often it is asked. Until then it calls the domain
/// active and has nobody to put a question to.
const NOTICE_TIMEOUT: Duration = Duration::from_secs(5);
const NOTICE_INTERVAL: Duration = Duration::from_millis(20);

/// Makes standbys with a libvirt daemon, connecting anew when it was restarted.
#[derive(Debug)]
pub struct LibvirtPromoter {
    uri: String,
    /// Where a socket is made if libvirt cannot pass descriptors. QEMU must be able to reach it.
    socket_dir: PathBuf,
    warm: bool,
    connection: Mutex<Option<Connection>>,
    /// The memory of the standbys that were made with shared memory and have not been discarded.
    shared: Mutex<HashMap<GuestId, Arc<SharedMemory>>>,
}

impl From<LibvirtError> for PromoteError {
    fn from(e: LibvirtError) -> Self {
        let remedy = match &e {
            LibvirtError::Unreachable { .. } => "start libvirtd (or virtqemud) on this host",
            LibvirtError::Refused { .. } => {
                "see libvirt's own log; the standby needs the same CPU, disks, bridges and firmware files as the primary"
            }
            _ => "",
        };
        Self::new(e.to_string()).with_remedy(remedy)
    }
}

impl From<MonitorError> for PromoteError {
    fn from(e: MonitorError) -> Self {
        Self::new(e.to_string()).with_remedy("see /var/log/libvirt/qemu/ for what QEMU said")
    }
}

impl LibvirtPromoter {
    /// Uses the daemon at `uri`; nothing is connected yet. If `warm`, standbys share their memory with the image
    /// where that can be had.
    pub fn new(uri: impl Into<String>, socket_dir: impl Into<PathBuf>, warm: bool) -> Self {
        Self {
            uri: uri.into(),
            socket_dir: socket_dir.into(),
            warm,
            connection: Mutex::new(None),
            shared: Mutex::default(),
        }
    }

    fn connection(&self) -> Result<Connection, PromoteError> {
        let mut held = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(connection) = held.as_ref().filter(|c| c.is_alive()) {
            return Ok(connection.clone());
        }
        let connection = Connection::open(&self.uri)?;
        *held = Some(connection.clone());
        Ok(connection)
    }

    /// The domain, if it is active.
    fn active(&self, guest: GuestId) -> Result<Option<Domain>, PromoteError> {
        match self.connection()?.find_domain(&guest.to_string()) {
            Ok(domain) => match domain.is_active() {
                Ok(active) => Ok(active.then_some(domain)),
                Err(LibvirtError::NoDomain { .. }) => Ok(None),
                Err(e) => Err(e.into()),
            },
            Err(LibvirtError::NoDomain { .. }) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// The active domain and what it is. One that is being removed may go between two questions: it counts as gone.
    fn found(&self, guest: GuestId) -> Result<Option<(Domain, LocalDomain)>, PromoteError> {
        let deadline = Instant::now() + NOTICE_TIMEOUT;
        loop {
            let Some(domain) = self.active(guest)? else { return Ok(None) };
            match Self::classify(&domain) {
                Ok(local) => return Ok(Some((domain, local))),
                Err(e) if Instant::now() >= deadline => return Err(e),
                Err(_) => std::thread::sleep(NOTICE_INTERVAL),
            }
        }
    }

    fn classify(domain: &Domain) -> Result<LocalDomain, PromoteError> {
        let facts = DomainFacts::parse(&domain.xml(XmlFlags::default())?)
            .map_err(|e| PromoteError::new(format!("the XML of domain {}: {e}", domain.name())))?;
        if !facts.qemu_arguments.iter().any(|a| a == "-incoming") {
            return Ok(LocalDomain::Active);
        }
        Ok(match qmp::query_status(domain)? {
            RunState::InMigrate => LocalDomain::Waiting,
            // A promoted guest that an operator has suspended looks the same. Nobody discards one: the control
            // file says promoted, and no stream and so no standby is accepted while it is there.
            RunState::Paused | RunState::Prelaunch => LocalDomain::Loaded,
            _ => LocalDomain::Active,
        })
    }

    fn standby(&self, guest: GuestId, wanted: LocalDomain) -> Result<Domain, PromoteError> {
        let domain = self.active(guest)?.ok_or_else(|| {
            PromoteError::new("the standby domain is gone")
                .with_remedy("try again: it is created anew; /var/log/libvirt/qemu/ says why QEMU ended")
        })?;
        let found = Self::classify(&domain)?;
        if found != wanted {
            return Err(PromoteError::new(format!(
                "domain {} is {found:?}, expected it {wanted:?}",
                domain.name()
            )));
        }
        Ok(domain)
    }

    /// A socket whose other end QEMU reads as its incoming stream.
    fn feed(&self, domain: &Domain) -> Result<UnixStream, PromoteError> {
        let io = |what: &str| {
            let what = what.to_owned();
            move |e: std::io::Error| PromoteError::new(format!("{what}: {e}"))
        };
        let pair = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(|e| io("cannot make a socket pair")(e.into()))?;
        let (ours, theirs) = (UnixStream::from(pair.0), pair.1);
        // Larger is only faster.
        if let Err(e) = sockopt::set_socket_send_buffer_size_force(&ours, SOCKET_BYTES) {
            tracing::debug!(error = %e, "socket buffer not enlarged");
        }
        let socket = match qmp::getfd(domain, FD_NAME, theirs.as_fd()) {
            Ok(()) => {
                qmp::migrate_incoming(domain, &format!("fd:{FD_NAME}"))?;
                ours
            }
            Err(MonitorError::FdUnsupported { reason, .. }) => {
                tracing::info!(reason, "using a socket path for the incoming stream");
                let path = self.socket_dir.join(format!("incoming-{}.sock", domain.uuid()));
                let accepted = Self::feed_by_path(domain, &path);
                if let Err(e) = std::fs::remove_file(&path) {
                    tracing::debug!(path = %path.display(), error = %e, "socket not removed");
                }
                accepted?
            }
            Err(e) => return Err(e.into()),
        };
        socket.set_write_timeout(Some(STALL_TIMEOUT)).map_err(io("cannot set a time limit"))?;
        Ok(socket)
    }

    /// QEMU listens on the path; we connect.
    fn feed_by_path(domain: &Domain, path: &std::path::Path) -> Result<UnixStream, PromoteError> {
        let io = |e: std::io::Error| PromoteError::new(format!("socket {}: {e}", path.display()));
        qmp::migrate_incoming(domain, &format!("unix:{}", path.display()))?;
        UnixStream::connect(path).map_err(io)
    }

    /// Writes the image, without the blocks of `shared`: they are in the standby.
    fn write_stream(
        socket: UnixStream,
        image: &Image,
        shared: Option<&SharedMemory>,
    ) -> Result<(), PromoteError> {
        let failed = |e: &dyn std::fmt::Display| PromoteError::new(e.to_string());
        let sink = BufWriter::with_capacity(WRITE_BYTES, socket);
        let layout = Arc::new(image.layout().clone());
        let files = shared.map(|s| s.fit(&layout)).transpose().map_err(PromoteError::new)?;
        let ignored = |index| files.iter().flatten().any(|(block, _)| *block == index);
        let writer = match &files {
            None => IncomingWriter::new(sink, Arc::clone(&layout)),
            Some(files) => {
                let blocks = files.iter().map(|(block, f)| SharedBlock { block: *block, address: f.address });
                IncomingWriter::with_shared(sink, Arc::clone(&layout), blocks.collect())
            }
        };
        let mut writer = writer.map_err(|e| failed(&e))?;
        for (index, _, memory) in image.blocks().filter(|(index, ..)| !ignored(*index)) {
            writer.block(index, memory).map_err(|e| failed(&e))?;
        }
        let (mut sink, written) = writer.finish(image.device()).map_err(|e| failed(&e))?;
        sink.flush().map_err(|e| failed(&e))?;
        // QEMU waits for more as long as the write side is open.
        sink.get_ref().shutdown(Shutdown::Write).map_err(|e| failed(&e))?;
        tracing::debug!(pages = written.pages, bytes = written.stream_bytes, "stream composed");
        Ok(())
    }

    fn let_run(domain: &Domain, warnings: &mut Vec<String>) -> Result<(), PromoteError> {
        if let Err(e) = domain.resume() {
            // QEMU refuses before it starts a vCPU. An answer that was lost is no refusal.
            let never_ran = matches!(qmp::query_status(domain), Ok(RunState::Paused | RunState::Prelaunch));
            let e = PromoteError::from(e);
            return Err(if never_ran { e } else { e.having_run() });
        }
        match qmp::query_status(domain) {
            Ok(RunState::Running) => Ok(()),
            Ok(other) => {
                Err(PromoteError::new(format!("QEMU is {} after it was let run", other.name())).having_run())
            }
            // libvirt has seen QEMU's event by now.
            Err(e) if domain.state().is_ok_and(|state| state == DomainState::Running) => {
                warnings.push(format!("the guest runs, but its monitor does not answer: {e}"));
                Ok(())
            }
            Err(e) => Err(PromoteError::from(e).having_run()),
        }
    }

    fn shared(&self) -> std::sync::MutexGuard<'_, HashMap<GuestId, Arc<SharedMemory>>> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a standby of this XML that says nothing to the network.
    fn create_silent(&self, xml: &str) -> Result<Domain, PromoteError> {
        let domain = self.connection()?.create_paused(xml)?;
        let silent = qmp::set_parameters(&domain, json!({"announce-rounds": LOAD_ANNOUNCE_ROUNDS}))
            .and_then(|()| qmp::set_capabilities(&domain, &[("x-colo", false), (IGNORE_SHARED, false)]))
            .map_err(PromoteError::from)
            .and_then(|()| match Self::classify(&domain)? {
                LocalDomain::Waiting => Ok(()),
                other => Err(PromoteError::new(format!("the standby is {other:?} after its creation"))),
            });
        if let Err(e) = silent {
            // One that would speak is worse than none.
            domain.destroy()?;
            return Err(e);
        }
        Ok(domain)
    }

    /// Makes a standby whose memory is in files that are mapped here as well.
    fn create_warm(&self, spec: &StandbySpec) -> Result<Arc<SharedMemory>, String> {
        let xml = shared_standby_xml(&spec.seed.domain_xml).map_err(|e| e.to_string())?;
        let domain = self.create_silent(&xml).map_err(|e| e.reason)?;
        let memory = Self::open_memory(&domain).and_then(|memory| {
            memory.fit(&spec.seed.layout)?;
            Ok(memory)
        });
        match memory {
            Ok(memory) => Ok(Arc::new(memory)),
            Err(reason) => match domain.destroy() {
                Ok(()) | Err(LibvirtError::NoDomain { .. }) => Err(reason),
                Err(e) => Err(format!("{reason}; and that standby cannot be removed: {e}")),
            },
        }
    }

    /// Opens the files of the guest's memory where QEMU says they are.
    fn open_memory(domain: &Domain) -> Result<SharedMemory, String> {
        let mut files = qmp::query_memory_files(domain).map_err(|e| e.to_string())?;
        // With more than one, they are those of NUMA nodes, which lie one behind the other in their order.
        let node = |id: &str| id.strip_prefix("ram-node").and_then(|number| number.parse::<u32>().ok());
        if files.is_empty() || files.len() > 1 && files.iter().any(|file| node(&file.id).is_none()) {
            let ids: Vec<_> = files.iter().map(|file| file.id.as_str()).collect();
            return Err(format!("where these memory objects of the guest lie is not known: {ids:?}"));
        }
        files.sort_by_key(|file| node(&file.id));
        let mut address = 0u64;
        let mut opened = Vec::new();
        for file in files {
            if !file.shared {
                return Err(format!("memory object {} is not shared", file.id));
            }
            let at = address;
            address = address.saturating_add(file.bytes);
            opened.push(SharedFile::open(file.id, at, std::path::Path::new(&file.path), file.bytes)?);
        }
        Ok(SharedMemory::new(opened))
    }

    /// The memory that the waiting standby and the image have in common, if there is any.
    fn common(&self, guest: GuestId, image: &Image) -> Option<Arc<SharedMemory>> {
        let shared = image.shared()?;
        let known = self.shared().get(&guest).is_some_and(|known| Arc::ptr_eq(known, shared));
        (known && shared.is_there()).then(|| Arc::clone(shared))
    }

    fn load_into(
        &self,
        domain: &Domain,
        image: &Image,
        shared: Option<&SharedMemory>,
    ) -> Result<(), PromoteError> {
        let socket = self.feed(domain)?;
        if let Err(e) = Self::write_stream(socket, image, shared) {
            // What QEMU says about it explains more than a broken pipe.
            let said = qmp::query_migrate(domain).ok().and_then(|i| i.error_desc);
            return Err(match said {
                Some(said) => PromoteError::new(format!("QEMU did not load the stream: {said} ({e})")),
                None => e,
            }
            .with_remedy("see /var/log/libvirt/qemu/; QEMU here must be the same version or newer"));
        }
        Self::await_completed(domain)
    }

    /// Makes the running guest persistent, with a definition that does not wait for a stream at the next start.
    fn define(domain: &Domain) -> Result<(), String> {
        let flags = XmlFlags { inactive: true, secure: true, ..XmlFlags::default() };
        let xml = domain.xml(flags).map_err(|e| e.to_string())?;
        let clean = clean_xml(&xml).map_err(|e| e.to_string())?;
        domain.connection().define(&clean).map(drop).map_err(|e| e.to_string())
    }

    fn await_completed(domain: &Domain) -> Result<(), PromoteError> {
        let deadline = Instant::now() + COMPLETE_TIMEOUT;
        loop {
            let info = qmp::query_migrate(domain)?;
            match info.status.as_deref() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => {
                    let why = info.error_desc.unwrap_or_else(|| "QEMU gives no reason".into());
                    return Err(PromoteError::new(format!("QEMU did not load the stream: {why}"))
                        .with_remedy(
                            "see /var/log/libvirt/qemu/; QEMU here must be the same version or newer",
                        ));
                }
                status if Instant::now() >= deadline => {
                    return Err(PromoteError::new(format!(
                        "QEMU has not loaded the stream within {COMPLETE_TIMEOUT:?}, its state is {status:?}"
                    )));
                }
                _ => std::thread::sleep(POLL_INTERVAL),
            }
        }
    }
}

impl Promoter for LibvirtPromoter {
    fn host_facts(&self) -> HostFacts {
        let versions = self.connection().and_then(|c| c.versions().map_err(PromoteError::from));
        match versions {
            Ok(v) => HostFacts {
                qemu_version: Some(v.hypervisor.to_string()),
                libvirt_version: Some(v.libvirt.to_string()),
                trouble: String::new(),
            },
            Err(e) => HostFacts { trouble: e.reason, ..HostFacts::default() },
        }
    }

    fn supports_machine(&self, machine: &str) -> Option<bool> {
        let types = self.connection().ok()?.machine_types(ARCH).ok()?;
        Some(types.contains(machine))
    }

    fn by_id(&self, id: u32) -> Option<GuestId> {
        let domain = self.connection().ok()?.find_domain(&id.to_string()).ok()?;
        Some(GuestId(domain.uuid()))
    }

    fn local(&self, guest: GuestId) -> Result<LocalDomain, PromoteError> {
        Ok(self.found(guest)?.map_or(LocalDomain::Absent, |(_, local)| local))
    }

    fn prepare(&self, spec: &StandbySpec) -> Result<Standby, PromoteError> {
        self.discard(spec.guest)?;
        if self.local(spec.guest)? == LocalDomain::Active {
            return Err(PromoteError::new("a domain of this UUID is active here that is not the standby")
                .with_remedy("stop it, after making sure that it is not the one that serves"));
        }
        let xml = standby_xml(&spec.seed.domain_xml)
            .map_err(|e| PromoteError::new(format!("no standby can be made of the guest's XML: {e}")))?;
        if !self.warm {
            self.create_silent(&xml)?;
            return Ok(Standby::Cold("this agent runs with --cold-standby".into()));
        }
        match self.create_warm(spec) {
            Ok(memory) => {
                self.shared().insert(spec.guest, Arc::clone(&memory));
                Ok(Standby::Warm(memory))
            }
            Err(reason) => {
                self.create_silent(&xml)?;
                Ok(Standby::Cold(reason))
            }
        }
    }

    fn load(&self, spec: &StandbySpec, image: &Arc<Image>) -> Result<(), PromoteError> {
        let domain = self.standby(spec.guest, LocalDomain::Waiting)?;
        let Some(shared) = self.common(spec.guest, image) else {
            return self.load_into(&domain, image, None);
        };
        qmp::set_capabilities(&domain, &[(IGNORE_SHARED, true)])?;
        let loaded = self.load_into(&domain, image, Some(&shared));
        // Left on, a save or a migration by the operator would leave the memory out, and say nothing.
        let off = qmp::set_capabilities(&domain, &[(IGNORE_SHARED, false)]);
        loaded.and(off.map_err(PromoteError::from))
    }

    fn activate(&self, guest: GuestId, spec: Option<&StandbySpec>) -> Result<Activation, PromoteError> {
        let domain = self.standby(guest, LocalDomain::Loaded)?;
        let began = Instant::now();
        let mut warnings = Vec::new();
        if let Err(e) = Self::let_run(&domain, &mut warnings) {
            // It may run: what is not known to serve must not go on.
            if let Err(also) = domain.destroy() {
                return Err(PromoteError::new(format!("{e}; and it cannot be destroyed: {also}"))
                    .with_remedy("destroy the domain by hand before trying again")
                    .having_run());
            }
            return Err(e);
        }
        self.shared().remove(&guest);
        let resume = began.elapsed();
        let began = Instant::now();
        let restored = qmp::set_parameters(&domain, json!({"announce-rounds": QEMU_ANNOUNCE_ROUNDS}));
        if let Err(e) = restored.and_then(|()| qmp::announce_self(&domain)) {
            warnings.push(format!("switches were not told where the guest is now: {e}"));
        }
        let announce = began.elapsed();
        if spec.is_some_and(|s| s.persistent)
            && let Err(e) = Self::define(&domain)
        {
            warnings.push(format!("the guest runs but is not defined here: {e}"));
        }
        Ok(Activation { resume, announce, warnings })
    }

    fn discard(&self, guest: GuestId) -> Result<(), PromoteError> {
        self.shared().remove(&guest);
        match self.found(guest)? {
            Some((domain, LocalDomain::Waiting | LocalDomain::Loaded)) => match domain.destroy() {
                Ok(()) | Err(LibvirtError::NoDomain { .. }) => Ok(()),
                Err(e) => Err(e.into()),
            },
            _ => Ok(()),
        }
    }
}
