//! One domain (guest) of libvirt.

use std::ffi::CString;
use std::os::fd::BorrowedFd;

use serde_json::Value;
use uuid::Uuid;
use virt::error::{Error, ErrorNumber};

use crate::connection::{Connection, HostVersion};
use crate::domain_xml;
use crate::error::LibvirtError;
use crate::monitor::{Monitor, MonitorError, outcome, request};
use crate::sys;

/// The first libvirt that can carry a descriptor to QEMU's monitor.
const FILES_SINCE: HostVersion = HostVersion { major: 8, minor: 2, micro: 0 };

/// A domain. Cheap to clone; keeps its connection open.
///
/// As a [`Monitor`] it uses libvirt's passthrough, which has no time limit of its own: a QEMU that does not answer
/// its monitor blocks the caller until QEMU goes away. While libvirt itself works on the domain a command waits, after
/// 30 s it fails without having reached QEMU. The domain is marked as tainted (`custom-monitor`).
#[derive(Debug, Clone)]
pub struct Domain {
    // Before the connection: a domain must be given back while its connection is open.
    inner: virt::domain::Domain,
    connection: Connection,
    name: String,
    uuid: Uuid,
}

/// What libvirt says a domain does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DomainState {
    /// vCPUs run (or wait for the CPU).
    Running,
    /// vCPUs are stopped.
    Paused,
    /// The guest is shutting down.
    ShuttingDown,
    /// It does not run.
    ShutOff,
    /// It does not run because it crashed.
    Crashed,
    /// The guest sleeps (S3).
    PmSuspended,
    /// None of these: libvirt's number.
    Other(u32),
}

/// Which XML of a domain is wanted. The default is the live XML of a running domain.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct XmlFlags {
    /// Suitable for another host: what this libvirt added by itself is left out.
    pub migratable: bool,
    /// With passwords.
    pub secure: bool,
    /// The persistent definition, as used at the next start.
    pub inactive: bool,
}

impl XmlFlags {
    fn bits(self) -> u32 {
        let mut bits = 0;
        if self.migratable {
            bits |= virt_sys::VIR_DOMAIN_XML_MIGRATABLE;
        }
        if self.secure {
            bits |= virt_sys::VIR_DOMAIN_XML_SECURE;
        }
        if self.inactive {
            bits |= virt_sys::VIR_DOMAIN_XML_INACTIVE;
        }
        bits
    }
}

impl Domain {
    pub(crate) fn new(connection: &Connection, inner: virt::domain::Domain) -> Result<Self, LibvirtError> {
        let refused = |error| LibvirtError::new("identify a domain", &error);
        let name = inner.get_name().map_err(refused)?;
        let uuid = inner.get_uuid().map_err(refused)?;
        Ok(Self { inner, connection: connection.clone(), name, uuid })
    }

    /// The name it had when it was looked up.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The UUID, the same for its whole life and on every host.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// The connection it was looked up on.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// What it does just now.
    ///
    /// # Errors
    /// [`LibvirtError::NoDomain`] if it does not exist any more (a transient one that has ended), and the other
    /// errors of libvirt; here and below.
    pub fn state(&self) -> Result<DomainState, LibvirtError> {
        let (state, _reason) =
            self.inner.get_state().map_err(|error| self.refused("get the state of", &error))?;
        Ok(match state {
            virt_sys::VIR_DOMAIN_RUNNING | virt_sys::VIR_DOMAIN_BLOCKED => DomainState::Running,
            virt_sys::VIR_DOMAIN_PAUSED => DomainState::Paused,
            virt_sys::VIR_DOMAIN_SHUTDOWN => DomainState::ShuttingDown,
            virt_sys::VIR_DOMAIN_SHUTOFF => DomainState::ShutOff,
            virt_sys::VIR_DOMAIN_CRASHED => DomainState::Crashed,
            virt_sys::VIR_DOMAIN_PMSUSPENDED => DomainState::PmSuspended,
            other => DomainState::Other(other),
        })
    }

    /// Whether there is a QEMU for it (its vCPUs may be stopped).
    pub fn is_active(&self) -> Result<bool, LibvirtError> {
        self.inner.is_active().map_err(|error| self.refused("look at", &error))
    }

    /// Whether it stays defined when it ends.
    pub fn is_persistent(&self) -> Result<bool, LibvirtError> {
        self.inner.is_persistent().map_err(|error| self.refused("look at", &error))
    }

    /// Its XML.
    pub fn xml(&self, flags: XmlFlags) -> Result<String, LibvirtError> {
        self.inner.get_xml_desc(flags.bits()).map_err(|error| self.refused("get the XML of", &error))
    }

    /// The XML of the running domain for use on another host, with its passwords and with the CPU the guest sees:
    /// what a standby is made from. See [`domain_xml::portable_xml`].
    pub fn portable_xml(&self) -> Result<String, LibvirtError> {
        let migratable = self.xml(XmlFlags { migratable: true, secure: true, inactive: false })?;
        let live = self.xml(XmlFlags::default())?;
        domain_xml::portable_xml(&migratable, &live).map_err(|error| LibvirtError::Invalid {
            action: format!("use the XML of domain {}", self.name),
            reason: error.to_string(),
        })
    }

    /// Whether libvirt is busy with a long job on it (save, dump, migration, snapshot).
    pub fn has_job(&self) -> Result<bool, LibvirtError> {
        let job = self.inner.get_job_info().map_err(|error| self.refused("get the job of", &error))?;
        Ok(u32::try_from(job.r#type) != Ok(virt_sys::VIR_DOMAIN_JOB_NONE))
    }

    /// Starts the vCPUs.
    pub fn resume(&self) -> Result<(), LibvirtError> {
        self.inner.resume().map(drop).map_err(|error| self.refused("resume", &error))
    }

    /// Stops the vCPUs.
    pub fn suspend(&self) -> Result<(), LibvirtError> {
        self.inner.suspend().map(drop).map_err(|error| self.refused("suspend", &error))
    }

    /// Pulls the plug. A transient domain does not exist afterwards.
    pub fn destroy(&self) -> Result<(), LibvirtError> {
        self.inner.destroy().map_err(|error| self.refused("destroy", &error))
    }

    /// Removes the definition; a running domain runs on as a transient one. Its firmware variables are kept.
    pub fn undefine(&self) -> Result<(), LibvirtError> {
        let result = match self.inner.undefine_flags(virt_sys::VIR_DOMAIN_UNDEFINE_KEEP_NVRAM) {
            // Drivers without firmware variables do not know the flag.
            Err(error) if error.code() == ErrorNumber::InvalidArg => self.inner.undefine(),
            result => result,
        };
        result.map_err(|error| self.refused("undefine", &error))
    }

    /// The metadata element of that namespace, as it is in force now; libvirt takes the namespace off it.
    pub fn metadata(&self, namespace: &str) -> Result<Option<String>, LibvirtError> {
        let kind = virt_sys::VIR_DOMAIN_METADATA_ELEMENT.cast_signed();
        match self.inner.get_metadata(kind, Some(namespace), virt_sys::VIR_DOMAIN_AFFECT_CURRENT) {
            Ok(xml) => Ok(Some(xml)),
            Err(error) if error.code() == ErrorNumber::NoDomainMetadata => Ok(None),
            Err(error) => Err(self.refused("read the metadata of", &error)),
        }
    }

    /// Sets the metadata element of that namespace while the domain runs, under that prefix; `None` removes it. The
    /// persistent definition is not touched.
    pub fn set_live_metadata(
        &self,
        namespace: &str,
        prefix: &str,
        element: Option<&str>,
    ) -> Result<(), LibvirtError> {
        self.change_metadata(namespace, prefix, element, virt_sys::VIR_DOMAIN_AFFECT_LIVE)
    }

    /// Removes the metadata element of that namespace from the persistent definition.
    pub fn forget_metadata(&self, namespace: &str) -> Result<(), LibvirtError> {
        self.change_metadata(namespace, "understudy", None, virt_sys::VIR_DOMAIN_AFFECT_CONFIG)
    }

    fn change_metadata(
        &self,
        namespace: &str,
        prefix: &str,
        element: Option<&str>,
        flags: u32,
    ) -> Result<(), LibvirtError> {
        let action = format!("set the metadata of domain {}", self.name);
        LibvirtError::check_text(&action, "the element", element.unwrap_or_default())?;
        let kind = virt_sys::VIR_DOMAIN_METADATA_ELEMENT.cast_signed();
        let key = element.map(|_| prefix);
        self.inner
            .set_metadata(kind, element, key, Some(namespace), flags)
            .map(drop)
            .map_err(|error| LibvirtError::new(action, &error))
    }

    pub(crate) fn raw(&self) -> &virt::domain::Domain {
        &self.inner
    }

    fn refused(&self, verb: &str, error: &Error) -> LibvirtError {
        LibvirtError::new(format!("{verb} domain {}", self.name), error)
    }

    /// libvirt has many codes for a QEMU that died; whether there still is one settles it.
    fn monitor_error(&self, command: &str, error: &Error) -> MonitorError {
        let reason = format!("domain {}: {}", self.name, error.message());
        if self.inner.is_active() == Ok(true) {
            MonitorError::failed(command, reason)
        } else {
            MonitorError::gone(command, reason)
        }
    }
}

/// The outcome that a reply line of QEMU stands for.
fn parse_reply(command: &str, reply: &str) -> Result<Value, MonitorError> {
    let reply = serde_json::from_str(reply)
        .map_err(|error| MonitorError::failed(command, format!("the reply is not JSON: {error}")))?;
    outcome(command, reply)
}

impl Monitor for Domain {
    fn execute(&self, command: &str, arguments: Value) -> Result<Value, MonitorError> {
        let line = Value::Object(request(command, arguments)).to_string();
        let reply = self
            .inner
            .qemu_monitor_command(&line, virt_sys::VIR_DOMAIN_QEMU_MONITOR_COMMAND_DEFAULT)
            .map_err(|error| self.monitor_error(command, &error))?;
        parse_reply(command, &reply)
    }

    fn execute_with_fd(
        &self,
        command: &str,
        arguments: Value,
        fd: BorrowedFd<'_>,
    ) -> Result<Value, MonitorError> {
        let unsupported =
            |reason: String| MonitorError::FdUnsupported { command: command.to_owned(), reason };
        if let Ok(versions) = self.connection.versions()
            && versions.libvirt < FILES_SINCE
        {
            return Err(unsupported(format!("libvirt is {}, {FILES_SINCE} is needed", versions.libvirt)));
        }
        // JSON text never contains a NUL: it would be escaped.
        let line = CString::new(Value::Object(request(command, arguments)).to_string())
            .map_err(|error| MonitorError::failed(command, error.to_string()))?;
        match sys::monitor_command_with_fd(&self.inner, &line, fd) {
            Ok(reply) => parse_reply(command, &reply),
            Err(error) if error.code() == ErrorNumber::NoSupport => {
                Err(unsupported(error.message().to_owned()))
            }
            Err(error) => Err(self.monitor_error(command, &error)),
        }
    }
}

#[cfg(test)]
mod tests;
