//! Asking libvirt and QEMU for the facts about a guest.

use super::{Guest, Qemu};
use crate::domain::{Domain, XmlFlags};
use crate::domain_xml::{DomainFacts, XmlError};
use crate::error::LibvirtError;
use crate::monitor::{Monitor, MonitorError};
use crate::qmp;

/// Why the facts about a guest could not be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GatherError {
    /// libvirt did not tell.
    #[error(transparent)]
    Libvirt(#[from] LibvirtError),
    /// QEMU did not tell.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// Its XML was not understood.
    #[error(transparent)]
    Xml(#[from] XmlError),
}

impl Guest {
    /// Asks. Changes nothing; blocks.
    ///
    /// # Errors
    /// If libvirt or QEMU do not answer as they should.
    pub fn gather(domain: &Domain) -> Result<Self, GatherError> {
        let facts = DomainFacts::parse(&domain.xml(XmlFlags::default())?)?;
        let state = domain.state()?;
        let active = domain.is_active()?;
        let busy = active && domain.has_job()?;
        let qemu = if active { Some(Qemu::gather(domain)?) } else { None };
        Ok(Self { facts, state, busy, qemu })
    }
}

impl Qemu {
    /// Asks. Changes nothing; blocks.
    ///
    /// # Errors
    /// If QEMU does not answer as it should.
    pub fn gather(monitor: &dyn Monitor) -> Result<Self, MonitorError> {
        let capabilities = qmp::query_capabilities(monitor)?;
        let colo_mode = match qmp::query_colo_mode(monitor) {
            Err(error) if error.is_command_not_found() => "none".to_owned(),
            mode => mode?,
        };
        Ok(Self {
            version: qmp::query_version(monitor)?,
            kvm_enabled: qmp::query_kvm_enabled(monitor)?,
            migrate: qmp::query_migrate(monitor)?,
            ignore_shared: capabilities.get("x-ignore-shared") == Some(&true),
            knows_colo: capabilities.contains_key("x-colo"),
            colo_mode,
        })
    }
}
