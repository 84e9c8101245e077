//! Typed QMP commands over any [`Monitor`].
//!
//! Replies are read leniently: a field that QEMU adds is ignored, a run state it adds is [`RunState::Other`].

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::BorrowedFd;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::monitor::{Monitor, MonitorError};

/// The run state of a guest, as `query-status` names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunState {
    /// vCPUs run.
    Running,
    /// Stopped by `stop`.
    Paused,
    /// Stopped within a checkpoint.
    Colo,
    /// Stopped at the end of a migration, or between the first full copy and the peer's READY.
    FinishMigrate,
    /// Waiting for an incoming stream.
    InMigrate,
    /// Stopped after a completed migration.
    PostMigrate,
    /// Stopped by a disk error.
    IoError,
    /// The guest has shut down, QEMU lives on.
    Shutdown,
    /// The guest has panicked.
    GuestPanicked,
    /// KVM could not run a vCPU.
    InternalError,
    /// The guest sleeps (S3).
    Suspended,
    /// Started with `-S`, never run.
    Prelaunch,
    /// Any other state, by QEMU's name.
    Other(String),
}

impl RunState {
    /// The state of that name.
    pub fn from_name(name: &str) -> Self {
        match name {
            "running" => Self::Running,
            "paused" => Self::Paused,
            "colo" => Self::Colo,
            "finish-migrate" => Self::FinishMigrate,
            "inmigrate" => Self::InMigrate,
            "postmigrate" => Self::PostMigrate,
            "io-error" => Self::IoError,
            "shutdown" => Self::Shutdown,
            "guest-panicked" => Self::GuestPanicked,
            "internal-error" => Self::InternalError,
            "suspended" => Self::Suspended,
            "prelaunch" => Self::Prelaunch,
            other => Self::Other(other.to_owned()),
        }
    }

    /// QEMU's name of the state.
    pub fn name(&self) -> &str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Colo => "colo",
            Self::FinishMigrate => "finish-migrate",
            Self::InMigrate => "inmigrate",
            Self::PostMigrate => "postmigrate",
            Self::IoError => "io-error",
            Self::Shutdown => "shutdown",
            Self::GuestPanicked => "guest-panicked",
            Self::InternalError => "internal-error",
            Self::Suspended => "suspended",
            Self::Prelaunch => "prelaunch",
            Self::Other(name) => name,
        }
    }
}

impl fmt::Display for RunState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A version of QEMU. Ordered by its numbers, then by the packager's text.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct QemuVersion {
    /// 7 of 7.2.22.
    pub major: u32,
    /// 2 of 7.2.22.
    pub minor: u32,
    /// 22 of 7.2.22.
    pub micro: u32,
    /// What the packager added, for example `Debian 1:7.2+dfsg-7+deb12u18`; may be empty.
    pub package: String,
}

impl QemuVersion {
    /// The three numbers, for comparisons.
    pub fn numbers(&self) -> (u32, u32, u32) {
        (self.major, self.minor, self.micro)
    }
}

impl fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// What `query-migrate` says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrateInfo {
    /// QEMU's name of the migration's state; `None` if there never was one.
    #[serde(default)]
    pub status: Option<String>,
    /// Why it failed.
    #[serde(default)]
    pub error_desc: Option<String>,
    /// Why the guest cannot be migrated at all, one reason per device; empty if it can.
    #[serde(default)]
    pub blocked_reasons: Vec<String>,
}

/// Runs a command and reads its reply as `T`.
fn query<T: DeserializeOwned>(
    monitor: &dyn Monitor,
    command: &str,
    arguments: Value,
) -> Result<T, MonitorError> {
    let value = monitor.execute(command, arguments)?;
    serde_json::from_value(value)
        .map_err(|error| MonitorError::failed(command, format!("unexpected reply: {error}")))
}

/// Runs a command whose reply does not matter.
fn order(monitor: &dyn Monitor, command: &str, arguments: Value) -> Result<(), MonitorError> {
    monitor.execute(command, arguments).map(drop)
}

/// The guest's run state.
///
/// # Errors
/// Those of [`Monitor::execute`], here and below.
pub fn query_status(monitor: &dyn Monitor) -> Result<RunState, MonitorError> {
    #[derive(Deserialize)]
    struct Reply {
        status: String,
    }
    query::<Reply>(monitor, "query-status", Value::Null).map(|reply| RunState::from_name(&reply.status))
}

/// QEMU's version.
pub fn query_version(monitor: &dyn Monitor) -> Result<QemuVersion, MonitorError> {
    #[derive(Deserialize)]
    struct Numbers {
        major: u32,
        minor: u32,
        micro: u32,
    }
    #[derive(Deserialize)]
    struct Reply {
        qemu: Numbers,
        #[serde(default)]
        package: String,
    }
    let Reply { qemu: Numbers { major, minor, micro }, package } =
        query(monitor, "query-version", Value::Null)?;
    Ok(QemuVersion { major, minor, micro, package })
}

/// Whether the guest runs on KVM.
pub fn query_kvm_enabled(monitor: &dyn Monitor) -> Result<bool, MonitorError> {
    #[derive(Deserialize)]
    struct Reply {
        enabled: bool,
    }
    query::<Reply>(monitor, "query-kvm", Value::Null).map(|reply| reply.enabled)
}

/// The state of the present or last migration, and what blocks one.
pub fn query_migrate(monitor: &dyn Monitor) -> Result<MigrateInfo, MonitorError> {
    query(monitor, "query-migrate", Value::Null)
}

/// All migration capabilities and whether they are on.
pub fn query_capabilities(monitor: &dyn Monitor) -> Result<BTreeMap<String, bool>, MonitorError> {
    #[derive(Deserialize)]
    struct Capability {
        capability: String,
        state: bool,
    }
    let list: Vec<Capability> = query(monitor, "query-migrate-capabilities", Value::Null)?;
    Ok(list.into_iter().map(|entry| (entry.capability, entry.state)).collect())
}

/// Switches migration capabilities, all in one command: all or none take effect.
pub fn set_capabilities(monitor: &dyn Monitor, capabilities: &[(&str, bool)]) -> Result<(), MonitorError> {
    let list: Vec<Value> = capabilities
        .iter()
        .map(|(capability, state)| json!({"capability": capability, "state": state}))
        .collect();
    order(monitor, "migrate-set-capabilities", json!({ "capabilities": list }))
}

/// Sets migration parameters; `parameters` is an object of QEMU's names.
pub fn set_parameters(monitor: &dyn Monitor, parameters: Value) -> Result<(), MonitorError> {
    order(monitor, "migrate-set-parameters", parameters)
}

/// Starts an outgoing migration to `uri` (`fd:NAME`, `unix:PATH`); returns as soon as it has begun.
pub fn migrate(monitor: &dyn Monitor, uri: &str) -> Result<(), MonitorError> {
    order(monitor, "migrate", json!({ "uri": uri }))
}

/// Lets a QEMU started with `-incoming defer` read its state from `uri`; returns before it has.
pub fn migrate_incoming(monitor: &dyn Monitor, uri: &str) -> Result<(), MonitorError> {
    order(monitor, "migrate-incoming", json!({ "uri": uri }))
}

/// Gives QEMU a descriptor under `name`, for `fd:NAME`. A descriptor already kept under that name is closed.
pub fn getfd(monitor: &dyn Monitor, name: &str, fd: BorrowedFd<'_>) -> Result<(), MonitorError> {
    monitor.execute_with_fd("getfd", json!({ "fdname": name }), fd).map(drop)
}

/// Makes QEMU close a descriptor given by [`getfd`] that it has not used yet.
pub fn closefd(monitor: &dyn Monitor, name: &str) -> Result<(), MonitorError> {
    order(monitor, "closefd", json!({ "fdname": name }))
}

/// Ends checkpointing; the guest runs on. Also un-pauses a guest that an operator had paused.
pub fn colo_lost_heartbeat(monitor: &dyn Monitor) -> Result<(), MonitorError> {
    order(monitor, "x-colo-lost-heartbeat", Value::Null)
}

/// `none`, `primary` or `secondary`.
pub fn query_colo_mode(monitor: &dyn Monitor) -> Result<String, MonitorError> {
    #[derive(Deserialize)]
    struct Reply {
        mode: String,
    }
    query::<Reply>(monitor, "query-colo-status", Value::Null).map(|reply| reply.mode)
}

/// Whether a migration still holds its channel: until it does not, no new one may start.
pub fn query_yank_has_migration(monitor: &dyn Monitor) -> Result<bool, MonitorError> {
    #[derive(Deserialize)]
    struct Instance {
        #[serde(rename = "type")]
        kind: String,
    }
    let instances: Vec<Instance> = query(monitor, "query-yank", Value::Null)?;
    Ok(instances.iter().any(|instance| instance.kind == "migration"))
}

/// An object that holds guest memory in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryFile {
    /// Its id; also the name of its RAM block.
    pub id: String,
    /// The file, as QEMU sees it.
    pub path: String,
    /// What is written there is seen by others who map it.
    pub shared: bool,
    /// Its size.
    pub bytes: u64,
}

/// The guest's memory objects. One without a file is an error that names it.
pub fn query_memory_files(monitor: &dyn Monitor) -> Result<Vec<MemoryFile>, MonitorError> {
    #[derive(Deserialize)]
    struct Backend {
        id: Option<String>,
        size: u64,
    }
    let backends: Vec<Backend> = query(monitor, "query-memdev", Value::Null)?;
    let property = |id: &str, property: &str| json!({"path": format!("/objects/{id}"), "property": property});
    let file = |backend: Backend| {
        let id = backend.id.ok_or_else(|| MonitorError::failed("query-memdev", "an object without an id"))?;
        let path = query::<String>(monitor, "qom-get", property(&id, "mem-path"))?;
        let shared = query::<bool>(monitor, "qom-get", property(&id, "share"))?;
        Ok(MemoryFile { path, shared, bytes: backend.size, id })
    };
    backends.into_iter().map(file).collect()
}

/// Makes every network card of the guest announce its address to the switches: 5 frames within 1.4 s.
pub fn announce_self(monitor: &dyn Monitor) -> Result<(), MonitorError> {
    order(monitor, "announce-self", json!({"initial": 50, "max": 550, "rounds": 5, "step": 100}))
}

/// Starts the vCPUs.
pub fn cont(monitor: &dyn Monitor) -> Result<(), MonitorError> {
    order(monitor, "cont", Value::Null)
}

/// Stops the vCPUs.
pub fn stop(monitor: &dyn Monitor) -> Result<(), MonitorError> {
    order(monitor, "stop", Value::Null)
}

#[cfg(test)]
mod tests;
