//! What others see of a guest's protection.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tracing::info;
use understudy_proto::epoch::EpochKind;
use understudy_proto::ids::GuestId;
use understudy_proto::rpc::admin::{AgentRole, GuestState, GuestStatus};
use understudy_proto::rpc::epoch::Hello;

use super::Guest;
use crate::agent::output::Gate;

/// How often numbers in the status are brought up to date while the state stays the same.
pub(super) const STATUS_INTERVAL: Duration = Duration::from_millis(200);

pub(super) fn initial_status(hello: &Hello, to: &str, libvirt_version: &str) -> GuestStatus {
    let mut status =
        GuestStatus::new(hello.guest_name.clone(), hello.guest, AgentRole::Primary, GuestState::Seeding);
    status.peer = to.to_owned();
    status.detail = format!("connecting to {to}");
    status.generation = hello.generation;
    status.qemu.clone_from(&hello.qemu_version);
    status.libvirt = libvirt_version.to_owned();
    status
}

/// A status for a guest whose protection waits for something outside of it.
pub(in crate::agent) fn waiting_status(guest: GuestId, name: &str, to: &str, detail: String) -> GuestStatus {
    let mut status = GuestStatus::new(name, guest, AgentRole::Primary, GuestState::Degraded);
    status.peer = to.to_owned();
    status.detail = detail;
    status
}

impl Guest {
    /// Brings what others see up to date: at once when the state changed, now and then when only numbers did.
    pub(super) fn publish(&mut self, last: bool) {
        let view = self.engine.view();
        let first = self.snapshots.borrow().status.committed_epoch.is_none() != view.committed.is_none();
        let old_state = self.shown.0;
        let changed = (old_state, self.shown.1.as_str()) != (view.state, view.detail.as_str()) || first;
        if !(changed || last || self.published_at.elapsed() >= STATUS_INTERVAL) {
            return;
        }
        if old_state != view.state {
            info!(from = old_state.label(), to = view.state.label(), detail = view.detail, "state");
        }
        self.published_at = Instant::now();
        self.shown = (view.state, view.detail.clone());
        let output = Gate::seen(self.gate.as_mut(), view.state, last);
        let ms = |pause: Duration| pause.as_secs_f64() * 1000.0;
        let pauses = self.stats.pause.pauses.quantiles();
        let pages = self.stats.dirty_pages.quantiles();
        let copying = matches!(view.in_flight, Some((_, EpochKind::Full)));
        self.snapshots.send_modify(|snapshot| {
            let status = &mut snapshot.status;
            status.state = view.state;
            status.detail = [view.detail, output.remark]
                .into_iter()
                .filter(|part| !part.is_empty())
                .collect::<Vec<_>>()
                .join("; ");
            status.output = output.text;
            status.output_waiting_bytes = output.held.map(|held| held.bytes);
            status.output_dropped_total = output.held.map(|held| held.dropped);
            status.committed_epoch = view.committed;
            status.epochs_total = self.stats.epochs_total;
            status.full_copies_total = self.stats.full_copies_total;
            status.pause_p50_ms = pauses.map(|(p50, _)| ms(p50));
            status.pause_p99_ms = pauses.map(|(_, p99)| ms(p99));
            status.dirty_pages_p50 = pages.map(|(p50, _)| p50);
            status.dirty_pages_p99 = pages.map(|(_, p99)| p99);
            if status.pace != view.pace {
                info!(ms = view.epoch.as_millis(), why = view.pace, "length of epochs");
            }
            status.epoch_ms = u32::try_from(view.epoch.as_millis()).ok();
            status.pace = view.pace;
            status.bytes_total = self.sent_bytes.load(Ordering::Relaxed);
            let connections = self.connections.load(Ordering::Relaxed);
            status.connections = u32::try_from(connections).ok().filter(|connections| *connections > 0);
            status.encoding = Some(self.encoder.report());
            snapshot.committed_at = self.committed_at;
            snapshot.handed_over = view.handed_over;
            snapshot.percent = copying.then(|| self.progress.percent());
            if last {
                snapshot.outcome = self.outcome.clone();
            }
        });
    }
}
