//! A connection to libvirt.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use uuid::Uuid;
use virt::connect::Connect;
use virt::error::ErrorNumber;

use crate::domain::Domain;
use crate::domain_xml;
use crate::error::LibvirtError;
use crate::event::DomainEvent;
use crate::host_watch::{HostQueue, HostWatch};
use crate::stream::{EventStream, Queue};
use crate::sys::{self, CloseWatch, Link, Sink};

/// libvirt says "not there" after this many unanswered probes, this many seconds apart.
const KEEPALIVE_SECONDS: i32 = 5;
const KEEPALIVE_PROBES: u32 = 6;

/// An open connection to a libvirt daemon. Cheap to clone; closed with its last clone, [`Domain`] or [`EventStream`].
///
/// It does not heal: when the daemon restarts, every call fails with [`LibvirtError::Unreachable`] and every event
/// stream ends with [`DomainEvent::ConnectionClosed`]; open a new one and look the domains up again.
#[derive(Debug, Clone)]
pub struct Connection {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    connect: Link,
    uri: String,
    streams: Arc<Streams>,
    close_watch: Option<CloseWatch>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(watch) = &self.close_watch {
            watch.unregister(&self.connect);
        }
    }
}

/// The event streams of a connection: all of them learn when it closes.
#[derive(Debug, Default)]
struct Streams {
    queues: Mutex<Vec<Weak<dyn Sink>>>,
}

impl Streams {
    fn add(&self, queue: &Arc<dyn Sink>) {
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        queues.retain(|queue| queue.strong_count() > 0);
        queues.push(Arc::downgrade(queue));
    }
}

impl Sink for Streams {
    fn accept(&self, event: DomainEvent) {
        let queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner).clone();
        queues.iter().filter_map(Weak::upgrade).for_each(|queue| queue.accept(event.clone()));
    }
}

impl Sink for Queue {
    fn accept(&self, event: DomainEvent) {
        self.push(event);
    }
}

/// A version as libvirt counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostVersion {
    /// 9 of 9.0.0.
    pub major: u32,
    /// 0 of 9.0.0.
    pub minor: u32,
    /// The last 0 of 9.0.0.
    pub micro: u32,
}

impl HostVersion {
    fn from_number(number: u32) -> Self {
        Self { major: number / 1_000_000, minor: number / 1000 % 1000, micro: number % 1000 }
    }
}

impl fmt::Display for HostVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// Versions at the other end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostVersions {
    /// The libvirt daemon's.
    pub libvirt: HostVersion,
    /// The hypervisor's that new domains get: QEMU's, for a QEMU connection. A running domain may have another.
    pub hypervisor: HostVersion,
}

impl Connection {
    /// Opens a connection, for example to `qemu:///system`.
    ///
    /// # Errors
    /// [`LibvirtError::Unreachable`] if the daemon does not answer; [`LibvirtError::Refused`] for anything else.
    pub fn open(uri: &str) -> Result<Self, LibvirtError> {
        let action = || format!("connect to libvirt at {uri}");
        LibvirtError::check_text("connect to libvirt", "the URI", uri)?;
        sys::start_event_loop().map_err(|message| LibvirtError::Refused { action: action(), message })?;
        let connect = Connect::open(Some(uri)).map_err(|error| LibvirtError::new(action(), &error))?;
        let connect = Link::new(connect);
        // A driver within this process has nobody to keep alive, and says so.
        if let Err(error) = connect.set_keep_alive(KEEPALIVE_SECONDS, KEEPALIVE_PROBES) {
            tracing::debug!(error = error.message(), uri, "no keepalive on this connection");
        }
        let streams = Arc::new(Streams::default());
        let close_watch = CloseWatch::register(&connect, Arc::clone(&streams) as Arc<dyn Sink>)
            .map_err(|error| LibvirtError::new(action(), &error))?;
        let shared = Shared { connect, uri: uri.to_owned(), streams, close_watch: Some(close_watch) };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// The URI this was opened with.
    pub fn uri(&self) -> &str {
        &self.shared.uri
    }

    /// False once the connection has broken.
    pub fn is_alive(&self) -> bool {
        self.connect().is_alive().unwrap_or(false)
    }

    /// The host's name.
    ///
    /// # Errors
    /// Those of libvirt, here and below.
    pub fn hostname(&self) -> Result<String, LibvirtError> {
        self.connect().get_hostname().map_err(|error| LibvirtError::new("get the host's name", &error))
    }

    /// The versions of libvirt and of the hypervisor.
    pub fn versions(&self) -> Result<HostVersions, LibvirtError> {
        let refused = |error| LibvirtError::new("get libvirt's version", &error);
        let libvirt = HostVersion::from_number(self.connect().get_lib_version().map_err(refused)?);
        let hypervisor = HostVersion::from_number(self.connect().get_hyp_version().map_err(refused)?);
        Ok(HostVersions { libvirt, hypervisor })
    }

    /// Free memory of the host, in bytes.
    pub fn free_memory_bytes(&self) -> Result<u64, LibvirtError> {
        self.connect()
            .get_free_memory()
            .map_err(|error| LibvirtError::new("get the host's free memory", &error))
    }

    /// Every machine type, alias or pinned, that the host's emulators can run as a full guest of `arch` (`x86_64`).
    pub fn machine_types(&self, arch: &str) -> Result<BTreeSet<String>, LibvirtError> {
        let action = "get the host's capabilities";
        let xml = self.connect().get_capabilities().map_err(|error| LibvirtError::new(action, &error))?;
        domain_xml::machine_types(&xml, arch)
            .map_err(|error| LibvirtError::Invalid { action: action.to_owned(), reason: error.to_string() })
    }

    /// The domain with that id, UUID or name, looked up in this order, as `virsh` does.
    ///
    /// # Errors
    /// [`LibvirtError::NoDomain`] if there is none.
    pub fn find_domain(&self, key: &str) -> Result<Domain, LibvirtError> {
        let action = format!("find domain {key:?}");
        LibvirtError::check_text(&action, "the name", key)?;
        let connect = self.connect();
        if let Ok(id) = key.parse::<u32>()
            && let Ok(domain) = virt::domain::Domain::lookup_by_id(connect, id)
        {
            return Domain::new(self, domain);
        }
        if let Ok(uuid) = key.parse::<Uuid>()
            && let Ok(domain) = virt::domain::Domain::lookup_by_uuid(connect, uuid)
        {
            return Domain::new(self, domain);
        }
        match virt::domain::Domain::lookup_by_name(connect, key) {
            Ok(domain) => Domain::new(self, domain),
            Err(error) => Err(LibvirtError::new(action, &error)),
        }
    }

    /// All domains, running or not.
    pub fn domains(&self) -> Result<Vec<Domain>, LibvirtError> {
        let list = self.connect().list_all_domains(0);
        let list = list.map_err(|error| LibvirtError::new("list the domains", &error))?;
        list.into_iter().map(|domain| Domain::new(self, domain)).collect()
    }

    /// Creates a transient domain (or starts the defined one of that UUID) with its vCPUs stopped.
    pub fn create_paused(&self, xml: &str) -> Result<Domain, LibvirtError> {
        let action = "create a paused domain";
        LibvirtError::check_text(action, "the XML", xml)?;
        virt::domain::Domain::create_xml(self.connect(), xml, virt_sys::VIR_DOMAIN_START_PAUSED)
            .map_err(|error| LibvirtError::new(action, &error))
            .and_then(|domain| Domain::new(self, domain))
    }

    /// Defines a persistent domain, or changes the one of that UUID; a running one becomes persistent and keeps
    /// running as it is.
    pub fn define(&self, xml: &str) -> Result<Domain, LibvirtError> {
        let action = "define a domain";
        LibvirtError::check_text(action, "the XML", xml)?;
        virt::domain::Domain::define_xml(self.connect(), xml)
            .map_err(|error| LibvirtError::new(action, &error))
            .and_then(|domain| Domain::new(self, domain))
    }

    /// Subscribes to the events of `domain`, from now on. Where the driver has no QEMU events (it is not QEMU's),
    /// only lifecycle events come: [`EventStream::has_qmp_events`] tells.
    pub fn subscribe(&self, domain: &Domain) -> Result<EventStream, LibvirtError> {
        let refused =
            |error| LibvirtError::new(format!("subscribe to events of domain {}", domain.name()), &error);
        let queue = Arc::new(Queue::default());
        let sink = || Arc::clone(&queue) as Arc<dyn Sink>;
        self.shared.streams.add(&sink());
        let mut subscriptions =
            vec![sys::subscribe_lifecycle(self.connect(), domain.raw(), sink()).map_err(refused)?];
        subscriptions.extend(sys::subscribe_devices(self.connect(), domain.raw(), &sink()).map_err(refused)?);
        let qmp = match sys::subscribe_qmp(self.connect(), domain.raw(), sink()) {
            Ok(subscription) => {
                subscriptions.push(subscription);
                true
            }
            Err(error) if error.code() == ErrorNumber::NoSupport => false,
            Err(error) => return Err(refused(error)),
        };
        // The connection may have broken before its queue was known to the close callback.
        if !self.is_alive() {
            queue.push(DomainEvent::ConnectionClosed { reason: "it was closed before".to_owned() });
        }
        Ok(EventStream::new(self.clone(), queue, subscriptions, qmp))
    }

    /// Subscribes to the starts, ends and metadata of all domains, from now on.
    pub fn watch(&self) -> Result<HostWatch, LibvirtError> {
        let (queue, events) = HostQueue::new();
        let sink = Arc::clone(&queue) as Arc<dyn Sink>;
        self.shared.streams.add(&sink);
        let subscriptions = sys::subscribe_host(self.connect(), &sink)
            .map_err(|error| LibvirtError::new("subscribe to the events of all domains", &error))?;
        // The connection may have broken before its queue was known to the close callback.
        if !self.is_alive() {
            queue.accept(DomainEvent::ConnectionClosed { reason: "it was closed before".to_owned() });
        }
        Ok(HostWatch::new(self.clone(), (queue, events), subscriptions))
    }

    fn connect(&self) -> &Link {
        &self.shared.connect
    }
}
