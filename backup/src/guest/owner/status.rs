//! What a guest is here, for whoever asks.

use super::Owner;
use crate::engine::Engine;
use crate::stats::Stats;
use std::time::Instant;
use understudy_proto::rpc::admin::{AgentRole, GuestStatus};

pub(super) fn status(
    engine: &Engine,
    stats: &Stats,
    versions: &(String, String),
    now: Instant,
) -> GuestStatus {
    let record = engine.record();
    let standby = engine.standby();
    let mut status = GuestStatus::new(record.name.clone(), record.guest, AgentRole::Backup, engine.state());
    status.peer.clone_from(&record.primary_host);
    status.generation = record.generation;
    status.committed_epoch = record.last_committed;
    status.committed_age_ms = engine
        .committed()
        .map(|(_, at)| u64::try_from(now.saturating_duration_since(at).as_millis()).unwrap_or(u64::MAX));
    status.epochs_total = stats.epochs;
    status.full_copies_total = stats.full_copies;
    status.bytes_total = stats.bytes;
    (status.dirty_pages_p50, status.dirty_pages_p99) =
        (stats.pages_percentile(50), stats.pages_percentile(99));
    status.standby = match standby.text.as_str() {
        "" => standby.state.label().to_owned(),
        text => format!("{}: {text}", standby.state.label()),
    };
    (status.qemu, status.libvirt) = versions.clone();
    status.detail = engine.detail();
    status.failover = engine.report().cloned();
    status.incarnation = Some(record.incarnation);
    status
}

impl Owner {
    pub(super) fn publish(&self) {
        let status = status(&self.engine, &self.stats, &self.tools.versions, Instant::now());
        self.status.send_if_modified(|old| {
            let changed = *old != status;
            *old = status;
            changed
        });
        self.record.send_if_modified(|old| {
            let changed = old != self.engine.record();
            old.clone_from(self.engine.record());
            changed
        });
    }
}
