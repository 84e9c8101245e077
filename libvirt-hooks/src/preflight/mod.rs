//! Can this guest be protected? Decided from facts, before anything is touched.
//!
//! [`check`] is pure and finds everything at once: an operator should not have to mend one thing to learn of the next.

mod backup;
mod gather;
mod guest;

use std::collections::BTreeSet;

use crate::domain::DomainState;
use crate::domain_xml::DomainFacts;
use crate::qmp::{MigrateInfo, QemuVersion};

pub use gather::GatherError;

/// Everything the decision rests on.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// The guest and its QEMU, on this host.
    pub guest: Guest,
    /// This host's name.
    pub host: String,
    /// The backup that already protects the guest, if one does.
    pub protected_to: Option<String>,
    /// The newest generation of the guest's protection that this host knows of; 0 if there was none.
    pub generation: u64,
    /// The backup as the operator named it.
    pub backup_address: String,
    /// What the backup answered, or why it did not.
    pub backup: Result<Backup, String>,
}

/// A guest on this host. [`Guest::gather`] asks libvirt and QEMU for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// What its XML says.
    pub facts: DomainFacts,
    /// What libvirt says it does.
    pub state: DomainState,
    /// libvirt is busy with a long job on it (save, migration, ...).
    pub busy: bool,
    /// What its QEMU says; `None` when there is no QEMU, because it does not run.
    pub qemu: Option<Qemu>,
}

/// A running QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Qemu {
    /// Its version; the version of the running process, not of the installed package.
    pub version: QemuVersion,
    /// The guest runs on KVM.
    pub kvm_enabled: bool,
    /// `query-migrate`.
    pub migrate: MigrateInfo,
    /// Capability `x-ignore-shared` is on.
    pub ignore_shared: bool,
    /// QEMU knows checkpointing (capability `x-colo`) at all.
    pub knows_colo: bool,
    /// `none`, `primary` or `secondary`.
    pub colo_mode: String,
}

/// What a backup says of itself and of this guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backup {
    /// Its host's name.
    pub host: String,
    /// Why the two agents cannot work together, if they cannot.
    pub incompatible: Option<String>,
    /// The version of its QEMU, in words.
    pub qemu: String,
    /// The machine types its QEMU has; empty if it could not tell.
    pub machine_types: BTreeSet<String>,
    /// Free memory, in bytes, if it could tell.
    pub free_memory_bytes: Option<u64>,
    /// The generation of the image it holds of this guest, if it holds one.
    pub generation: Option<u64>,
    /// Why it cannot take this guest just now (it runs there, it is being promoted, ...), if it cannot.
    pub occupied: Option<String>,
}

/// One reason why a guest cannot be protected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Stable, for programs; listed in [`CODES`].
    pub code: &'static str,
    /// What is in the way, with its value.
    pub reason: String,
    /// What a person can do about it.
    pub remedy: String,
}

impl Refusal {
    fn new(code: &'static str, reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { code, reason: reason.into(), remedy: remedy.into() }
    }
}

/// Every code of a [`Refusal`].
pub const CODES: &[&str] = &[
    "already-protected",
    "backup-incompatible",
    "backup-machine-type",
    "backup-memory",
    "backup-newer-image",
    "backup-occupied",
    "backup-same-host",
    "backup-unreachable",
    "checkpointing-active",
    "confidential-guest",
    "dirty-ring",
    "host-device",
    "ignore-shared",
    "job-active",
    "machine-type-not-pinned",
    "migration-active",
    "migration-blocked",
    "not-kvm",
    "not-running",
    "qemu-broken",
    "qemu-too-old",
    "qemu-without-colo",
    "shared-filesystem",
    "shared-memory",
    "tpm",
    "vhost-user",
    "vsock",
    "writable-disk",
];

/// Every reason why the guest cannot be protected; none means that it can.
pub fn check(inputs: &Inputs) -> Vec<Refusal> {
    if let Some(backup) = &inputs.protected_to {
        // Everything else that could be found follows from that.
        return vec![Refusal::new(
            "already-protected",
            format!("domain {} is already protected by {backup}", inputs.guest.facts.name),
            "run `understudy status` to see how it does, or `understudy unprotect` first to use another backup",
        )];
    }
    let mut refusals = Vec::new();
    guest::check(&inputs.guest, &mut refusals);
    backup::check(inputs, &mut refusals);
    refusals
}

/// Things that do not stand in the way but that an operator should know, one sentence each.
pub fn advise(guest: &Guest) -> Vec<String> {
    guest::advise(guest)
}

#[cfg(test)]
mod tests;
