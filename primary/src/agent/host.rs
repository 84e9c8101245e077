//! What protection asks of a guest's host beside the capture itself. All of it blocks.

use std::os::fd::BorrowedFd;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::mpsc;
use understudy_libvirt::{
    Connection, Domain, DomainEvent, DomainState, LibvirtError, Monitor, MonitorError, RunState, XmlFlags,
    domain_xml, qmp,
};

use super::capturer::failure;
use crate::capture::{self, CaptureError};
use crate::egress::{self, Port};
use crate::engine::CaptureFailure;

/// How often a thread that waits for events looks whether anyone still wants them.
const EVENT_POLL: Duration = Duration::from_secs(1);

/// A guest as its host sees it.
pub trait GuestHost: Send + Sync {
    /// The domain's XML for the backup, with its secrets.
    ///
    /// # Errors
    /// In words, here and below.
    fn describe(&self) -> Result<String, String>;

    /// QEMU's run state.
    fn run_state(&self) -> Result<RunState, String>;

    /// Stops the guest for good. A guest that does not exist any more is stopped.
    fn pause(&self) -> Result<(), String>;

    /// The devices of this host that the guest sends through now.
    ///
    /// # Errors
    /// Also if one of its interfaces cannot be gated.
    fn ports(&self) -> Result<Vec<Port>, String> {
        Ok(Vec::new())
    }

    /// Brings QEMU out of COLO after a capture that could not.
    ///
    /// # Errors
    /// Why it is still in it.
    fn rescue(&self) -> Result<(), CaptureFailure>;

    /// From now on the guest's events go to `events`, until it is closed or libvirt goes away, which is the last event.
    fn subscribe(&self, events: mpsc::Sender<DomainEvent>) -> Result<(), String>;
}

/// A domain of libvirt. When libvirt's daemon is restarted, [`GuestHost::subscribe`] opens a new connection, and
/// whoever uses this as a monitor goes on by it.
#[derive(Debug)]
pub struct LibvirtGuest {
    domain: RwLock<Domain>,
}

impl LibvirtGuest {
    /// For a domain that was just looked up.
    pub fn new(domain: Domain) -> Self {
        Self { domain: RwLock::new(domain) }
    }

    fn domain(&self) -> Domain {
        self.domain.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn reconnected(&self) -> Result<Domain, LibvirtError> {
        let domain = self.domain();
        if domain.connection().is_alive() {
            return Ok(domain);
        }
        self.reopened()
    }

    fn reopened(&self) -> Result<Domain, LibvirtError> {
        let domain = self.domain();
        let domain = Connection::open(domain.connection().uri())?.find_domain(&domain.uuid().to_string())?;
        *self.domain.write().unwrap_or_else(PoisonError::into_inner) = domain.clone();
        Ok(domain)
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl GuestHost for LibvirtGuest {
    fn describe(&self) -> Result<String, String> {
        let domain = self.reconnected().map_err(text)?;
        let migratable = XmlFlags { migratable: true, secure: true, inactive: false };
        let migratable = domain.xml(migratable).map_err(text)?;
        let live = domain.xml(XmlFlags::default()).map_err(text)?;
        domain_xml::portable_xml(&migratable, &live).map_err(text)
    }

    fn run_state(&self) -> Result<RunState, String> {
        qmp::query_status(&self.domain()).map_err(text)
    }

    fn pause(&self) -> Result<(), String> {
        let domain = self.reconnected().map_err(text)?;
        match domain.state() {
            Err(LibvirtError::NoDomain { .. })
            | Ok(DomainState::Paused | DomainState::ShutOff | DomainState::Crashed) => {}
            _ => match domain.suspend() {
                Ok(()) | Err(LibvirtError::NoDomain { .. }) => {}
                Err(error) => return Err(text(error)),
            },
        }
        // libvirt may not have noticed what the end of COLO did.
        match qmp::query_status(&domain) {
            Ok(RunState::Running) => qmp::stop(&domain).map_err(text),
            Ok(_) | Err(MonitorError::Gone { .. }) => Ok(()),
            Err(error) => Err(text(error)),
        }
    }

    fn ports(&self) -> Result<Vec<Port>, String> {
        let xml = self.reconnected().and_then(|domain| domain.xml(XmlFlags::default())).map_err(text)?;
        let facts = domain_xml::DomainFacts::parse(&xml).map_err(text)?;
        egress::ports(&facts).map_err(|refusals| {
            refusals.into_iter().map(|refusal| refusal.reason).collect::<Vec<_>>().join("; ")
        })
    }

    fn rescue(&self) -> Result<(), CaptureFailure> {
        let domain = self.reconnected().map_err(|error| CaptureFailure {
            gone: matches!(error, LibvirtError::NoDomain { .. }),
            reason: error.to_string(),
            left_stopped: true,
        })?;
        capture::rescue(&domain).map(drop).map_err(|error: CaptureError| failure(&error))
    }

    fn subscribe(&self, events: mpsc::Sender<DomainEvent>) -> Result<(), String> {
        // On a connection of its own: libvirt refuses a second subscription to a domain on the same one, and the last
        // owner's may not have ended yet.
        let domain = self.reopened().map_err(text)?;
        let stream = domain.connection().subscribe(&domain).map_err(text)?;
        if !stream.has_qmp_events() {
            return Err("this libvirt does not report QEMU's events; they are needed".to_owned());
        }
        let pump = move || {
            while !events.is_closed() {
                match stream.recv_timeout(EVENT_POLL) {
                    Ok(event) => {
                        if events.blocking_send(event).is_err() {
                            return;
                        }
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        };
        std::thread::Builder::new().name("events".to_owned()).spawn(pump).map(drop).map_err(text)
    }
}

impl Monitor for LibvirtGuest {
    fn execute(&self, command: &str, arguments: Value) -> Result<Value, MonitorError> {
        self.domain().execute(command, arguments)
    }

    fn execute_with_fd(
        &self,
        command: &str,
        arguments: Value,
        fd: BorrowedFd<'_>,
    ) -> Result<Value, MonitorError> {
        self.domain().execute_with_fd(command, arguments, fd)
    }
}
