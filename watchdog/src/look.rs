//! Asking and telling a QEMU.

use serde::Deserialize;
use serde_json::{Value, json};
use understudy_libvirt::{Monitor, MonitorError, RunState, qmp};

use crate::engine::{Depth, Facts, Order, Seen, Trouble};

/// Looks at the guest behind `monitor`.
///
/// # Errors
/// [`Trouble`].
pub fn look(monitor: &dyn Monitor, depth: Depth) -> Result<Seen, Trouble> {
    facts(monitor, depth).map_err(|error| trouble(&error))
}

/// Carries `order` out.
///
/// # Errors
/// [`Trouble`].
pub fn order(monitor: &dyn Monitor, order: Order) -> Result<(), Trouble> {
    let done = match order {
        Order::LostHeartbeat => qmp::colo_lost_heartbeat(monitor),
        Order::Continue => qmp::cont(monitor),
    };
    done.map_err(|error| trouble(&error))
}

fn trouble(error: &MonitorError) -> Trouble {
    match error {
        MonitorError::Qmp { .. } => Trouble::Refused(error.to_string()),
        MonitorError::Gone { .. } | MonitorError::Failed { .. } | MonitorError::FdUnsupported { .. } => {
            Trouble::Unreachable(error.to_string())
        }
    }
}

fn facts(monitor: &dyn Monitor, depth: Depth) -> Result<Seen, MonitorError> {
    if depth == Depth::Glance && qmp::query_status(monitor)? == RunState::Running {
        return Ok(Seen::Running);
    }
    // The order matters; see `Facts`.
    let colo = qmp::query_colo_mode(monitor)? == "primary";
    let migrating = !colo && qmp::query_yank_has_migration(monitor)?;
    let armed = !colo && !migrating && qmp::query_capabilities(monitor)?.get("x-colo") == Some(&true);
    let runs = if colo && depth != Depth::Full { runs(monitor)? } else { None };
    Ok(Seen::Full(Facts { colo, migrating, armed, runs, state: qmp::query_status(monitor)? }))
}

/// Between two stops a vCPU leaves the guest at least once, or is interrupted while the guest idles.
const COUNTERS: [&str; 2] = ["exits", "signal_exits"];

/// How often KVM has left the vCPUs, all in all. `None` where QEMU (before 7.1) or the kernel does not tell.
fn runs(monitor: &dyn Monitor) -> Result<Option<u64>, MonitorError> {
    #[derive(Deserialize)]
    struct Counter {
        value: Value,
    }
    #[derive(Deserialize)]
    struct Vcpu {
        #[serde(default)]
        stats: Vec<Counter>,
    }
    let wanted = json!({"target": "vcpu", "providers": [{"provider": "kvm", "names": COUNTERS}]});
    let reply = match monitor.execute("query-stats", wanted) {
        Ok(reply) => reply,
        Err(MonitorError::Qmp { desc, .. }) => {
            tracing::debug!(desc, "no statistics of vCPUs");
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let vcpus: Vec<Vcpu> = serde_json::from_value(reply).unwrap_or_default();
    let values: Vec<u64> =
        vcpus.iter().flat_map(|vcpu| &vcpu.stats).filter_map(|counter| counter.value.as_u64()).collect();
    Ok((!values.is_empty()).then(|| values.iter().fold(0_u64, |sum, value| sum.wrapping_add(*value))))
}
