//! Everything Understudy says to libvirt and, through it, to QEMU.
//!
//! - [`Connection`] and [`Domain`]: the part of libvirt's API the agents need, and its events as a bounded stream;
//! - [`Monitor`]: one QMP command, by libvirt's passthrough ([`Domain`]) or straight over a socket
//!   ([`SocketMonitor`], for tests and benchmarks with a bare QEMU), and [`qmp`], the typed commands over it;
//! - [`domain_xml`]: what a domain's XML says, and the XML of a standby made from it;
//! - [`preflight`]: whether a guest can be protected, as a pure function over facts.
//!
//! Every call here blocks: make them from a thread that may wait. Nothing here is a closed world: an event, a
//! field or a run state this code has never heard of is passed on or ignored, never an error.

pub mod domain_xml;
pub mod preflight;
pub mod qmp;

mod connection;
mod domain;
mod error;
mod event;
mod host_watch;
mod monitor;
mod socket;
mod stream;
mod sys;

pub use connection::{Connection, HostVersion, HostVersions};
pub use domain::{Domain, DomainState, XmlFlags};
pub use error::LibvirtError;
pub use event::{DomainChange, DomainEvent, HostEvent, Lifecycle, QmpEvent};
pub use host_watch::HostWatch;
pub use monitor::{Monitor, MonitorError};
pub use qmp::{MigrateInfo, QemuVersion, RunState};
pub use socket::SocketMonitor;
pub use stream::EventStream;
