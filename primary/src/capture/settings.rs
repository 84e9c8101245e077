//! QEMU's migration capabilities and parameters: set for capture, and put back.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use understudy_libvirt::{Monitor, MonitorError, qmp};

use super::{CaptureError, ColoOptions, Dialect, Phase};

/// Capabilities that change the stream into something that is not read here, or the guest's behaviour.
const OFF: [&str; 20] = [
    "auto-converge",
    "background-snapshot",
    "block",
    "compress",
    "dirty-bitmaps",
    "dirty-limit",
    "mapped-ram",
    "multifd",
    "pause-before-switchover",
    "postcopy-blocktime",
    "postcopy-preempt",
    "postcopy-ram",
    "rdma-pin-all",
    "release-ram",
    "switchover-ack",
    "validate-uuid",
    "x-ignore-shared",
    "xbzrle",
    "zero-blocks",
    "zero-copy-send",
];

const CHECKPOINT_DELAY: &str = "x-checkpoint-delay";
const MAX_BANDWIDTH: &str = "max-bandwidth";
const DOWNTIME_LIMIT: &str = "downtime-limit";

/// What has to be put back.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Settings {
    capabilities: Vec<(String, bool)>,
    parameters: Map<String, Value>,
}

impl Settings {
    /// Sets what capture needs, and gives the dialect that QEMU turns out to speak: `dialect` is what its version
    /// says. Whether the return path has to be on for COLO, QEMU alone decides, and a wrong guess leaves the guest
    /// stopped; so it is asked to do without, and where it refuses, the path is on. What was there before is in `self`,
    /// also if it fails half-way.
    pub(super) fn apply(
        &mut self,
        monitor: &dyn Monitor,
        dialect: Dialect,
        options: &ColoOptions,
    ) -> Result<Dialect, CaptureError> {
        let error = |source| CaptureError::Monitor { phase: Phase::Setup, source };
        let present = qmp::query_capabilities(monitor).map_err(error)?;
        let parameters = monitor.execute("query-migrate-parameters", Value::Null).map_err(error)?;
        for name in [CHECKPOINT_DELAY, MAX_BANDWIDTH, DOWNTIME_LIMIT] {
            if let Some(value) = parameters.get(name) {
                self.parameters.insert(name.to_owned(), value.clone());
            }
        }
        let mut changes = changes(&present, false);
        let asked = qmp::set_capabilities(monitor, &changes);
        let dialect = dialect.with_return_path(asked.as_ref().is_err_and(wants_return_path));
        if dialect.return_path() {
            changes = self::changes(&present, true);
            qmp::set_capabilities(monitor, &changes).map_err(error)?;
        } else {
            asked.map_err(error)?;
        }
        self.capabilities = changes.into_iter().map(|(name, state)| (name.to_owned(), !state)).collect();
        let parameters = json!({
            CHECKPOINT_DELAY: millis(options.checkpoint_delay).max(1),
            MAX_BANDWIDTH: options.max_bandwidth_bytes,
            DOWNTIME_LIMIT: millis(options.downtime_limit),
        });
        qmp::set_parameters(monitor, parameters).map_err(error)?;
        Ok(dialect)
    }

    /// Puts everything back; QEMU must have left COLO. Forgets it only if that worked.
    pub(super) fn restore(&mut self, monitor: &dyn Monitor) -> Result<(), MonitorError> {
        if !self.capabilities.is_empty() {
            let list: Vec<_> =
                self.capabilities.iter().map(|(name, state)| (name.as_str(), *state)).collect();
            qmp::set_capabilities(monitor, &list)?;
            self.capabilities.clear();
        }
        if !self.parameters.is_empty() {
            qmp::set_parameters(monitor, Value::Object(self.parameters.clone()))?;
            self.parameters.clear();
        }
        Ok(())
    }
}

/// The capabilities that are not yet as capture needs them.
fn changes(present: &BTreeMap<String, bool>, return_path: bool) -> Vec<(&str, bool)> {
    let wanted = |name: &str| match name {
        "x-colo" | "events" => Some(true),
        "return-path" => Some(return_path),
        other => OFF.contains(&other).then_some(false),
    };
    present
        .iter()
        .filter_map(|(name, state)| wanted(name).filter(|w| w != state).map(|w| (name.as_str(), w)))
        .collect()
}

/// QEMU 11: "Capability 'x-colo' requires capability 'return-path'".
fn wants_return_path(error: &MonitorError) -> bool {
    matches!(error, MonitorError::Qmp { desc, .. } if desc.contains("requires capability 'return-path'"))
}

/// Raises the time for which the guest may be stopped at the end of the full copy.
pub(super) fn set_downtime_limit(
    monitor: &dyn Monitor,
    limit: std::time::Duration,
) -> Result<(), CaptureError> {
    qmp::set_parameters(monitor, json!({ DOWNTIME_LIMIT: millis(limit) }))
        .map_err(CaptureError::monitor(Phase::Precopy))
}

/// After a predecessor that died with what was set before: no COLO, QEMU's defaults.
pub(super) fn reset(monitor: &dyn Monitor) -> Result<(), MonitorError> {
    let on = qmp::query_capabilities(monitor)?;
    let off: Vec<_> =
        ["x-colo", "return-path"].into_iter().filter(|name| on.get(*name) == Some(&true)).collect();
    if !off.contains(&"x-colo") {
        return Ok(());
    }
    qmp::set_capabilities(monitor, &off.into_iter().map(|name| (name, false)).collect::<Vec<_>>())?;
    qmp::set_parameters(
        monitor,
        json!({ CHECKPOINT_DELAY: 20_000, MAX_BANDWIDTH: 128u64 << 20, DOWNTIME_LIMIT: 300 }),
    )
}

fn millis(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
