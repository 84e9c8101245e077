//! The full copy: everything from the first byte to the end of epoch 0.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tracing::{debug, warn};
use understudy_libvirt::{Monitor, QemuVersion, qmp};
use understudy_proto::qemu::{
    CheckpointReader, EndSeen, PrecopyEvent, PrecopyReader, RETURN_PATH_SHUT, StreamError,
};

use super::dialect::EndOfPrecopy;
use super::link::{Filled, Link};
use super::{ArmTimings, Armed, CaptureError, ColoOptions, Dialect, PageSink, Phase, settings};

/// How long the socket must be silent before its end is looked for.
const QUIET: Duration = Duration::from_millis(1);
/// The same where silence is all there is to go by.
const SURELY_QUIET: Duration = Duration::from_millis(20);
/// How long a QEMU that has closed the socket may take to say why.
const REASON_LIMIT: Duration = Duration::from_secs(2);

/// A full copy under way.
pub(super) struct Precopy<'a> {
    monitor: &'a Arc<dyn Monitor>,
    options: &'a ColoOptions,
    version: &'a QemuVersion,
    dialect: Dialect,
    link: &'a mut Link,
    sink: &'a mut dyn PageSink,
    reader: PrecopyReader,
    pages: u64,
    /// The last section of memory was read.
    memory_read: bool,
    /// The order to allow a longer stop, which may not be obeyed yet.
    order: Option<JoinHandle<()>>,
}

impl<'a> Precopy<'a> {
    pub(super) fn new(
        monitor: &'a Arc<dyn Monitor>,
        options: &'a ColoOptions,
        version: &'a QemuVersion,
        dialect: Dialect,
        link: &'a mut Link,
        sink: &'a mut dyn PageSink,
    ) -> Self {
        let reader = PrecopyReader::new();
        Self {
            monitor,
            options,
            version,
            dialect,
            link,
            sink,
            reader,
            pages: 0,
            memory_read: false,
            order: None,
        }
    }

    /// Reads all of it; at the end QEMU is in state `colo` and waits for READY.
    pub(super) fn run(mut self) -> Result<(Armed, CheckpointReader), CaptureError> {
        let begun = Instant::now();
        let result = self.memory(begun).and_then(|()| {
            let stopped = Instant::now();
            self.devices(stopped).map(|seen| (stopped, seen))
        });
        let (stopped, seen) = result.map_err(|error| self.explain(error))?;
        if let Some(order) = self.order.take() {
            // All is read, so QEMU answers; later it would fall into a checkpoint, or behind the end of the capture. What
            // went wrong it has said itself.
            let _ = order.join();
        }
        let reader = std::mem::take(&mut self.reader);
        let precopy = reader.finish(seen).map_err(stream_error(Phase::Switchover))?;
        if self.dialect.end_of_precopy() == EndOfPrecopy::QuietAfterDescription {
            self.shut_return_path().map_err(|error| self.explain(error))?;
        }
        let timings = ArmTimings {
            precopy: stopped - begun,
            switchover: stopped.elapsed(),
            bytes: self.link.received_bytes(),
        };
        let armed = Armed {
            layout: precopy.layout,
            device: Bytes::from(precopy.device),
            dialect: Some(self.dialect),
            pages: self.pages,
            timings,
        };
        debug!(pages = armed.pages, ?timings, "full copy complete");
        Ok((armed, precopy.checkpoints))
    }

    /// Memory, while the guest runs.
    fn memory(&mut self, begun: Instant) -> Result<(), CaptureError> {
        let phase = Phase::Precopy;
        let options = self.options;
        let mut downtime_limit = options.downtime_limit;
        let mut patience_ends = begun + options.convergence_patience;
        while !self.memory_read {
            if self.link.fill(phase, Instant::now() + options.silence_running)? == Filled::Quiet {
                return Err(CaptureError::Silent { phase, waited: options.silence_running });
            }
            self.parse(phase)?;
            let now = Instant::now();
            if now >= begun + options.arm_limit {
                return Err(CaptureError::Silent { phase, waited: options.arm_limit });
            }
            let obeyed = self.order.as_ref().is_none_or(JoinHandle::is_finished);
            if now >= patience_ends && downtime_limit < options.max_downtime_limit && obeyed {
                // The guest dirties memory faster than it is read: only a longer stop lets the copy end.
                downtime_limit = (downtime_limit * 2).min(options.max_downtime_limit);
                patience_ends = now + options.convergence_patience;
                debug!(?downtime_limit, "full copy does not converge");
                self.order = self.allow(downtime_limit);
            }
        }
        Ok(())
    }

    /// Raises the limit beside the reading: QEMU may be writing the last part with its monitor shut, and does not open it
    /// before that is read. Without it the copy only takes longer, so nothing waits for it.
    fn allow(&self, downtime_limit: Duration) -> Option<JoinHandle<()>> {
        let monitor = Arc::clone(self.monitor);
        let order = move || {
            if let Err(error) = settings::set_downtime_limit(monitor.as_ref(), downtime_limit) {
                warn!(%error, "the limit of the stop at the end of the full copy was not raised");
            }
        };
        let spawned = std::thread::Builder::new().name("downtime-limit".to_owned()).spawn(order);
        spawned.inspect_err(|error| warn!(%error, "cannot start a thread")).ok()
    }

    /// Device state, whose end only QEMU's state or silence tells. The guest is stopped.
    fn devices(&mut self, stopped: Instant) -> Result<EndSeen, CaptureError> {
        let phase = Phase::Switchover;
        let limit = self.options.silence_stopped;
        let mut last_byte = stopped;
        let quiet = match self.dialect.end_of_precopy() {
            EndOfPrecopy::StatusColo => QUIET,
            EndOfPrecopy::QuietAfterDescription => SURELY_QUIET,
        };
        loop {
            if self.link.fill(phase, Instant::now() + quiet)? == Filled::Data {
                self.parse(phase)?;
                last_byte = Instant::now();
            } else {
                match self.dialect.end_of_precopy() {
                    EndOfPrecopy::StatusColo if self.is_colo()? => {
                        // The state follows the last byte: what is there now is all.
                        while self.link.try_fill(phase)? == Filled::Data {
                            self.parse(phase)?;
                        }
                        return Ok(EndSeen::ColoState);
                    }
                    EndOfPrecopy::QuietAfterDescription if self.reader.looks_complete() => {
                        return Ok(EndSeen::Quiet);
                    }
                    _ => {}
                }
            }
            if last_byte.elapsed() >= limit {
                return Err(CaptureError::Silent { phase, waited: limit });
            }
        }
    }

    /// QEMU 11 enters COLO only when the return path is shut.
    fn shut_return_path(&mut self) -> Result<(), CaptureError> {
        let phase = Phase::Switchover;
        let limit = self.options.silence_stopped;
        let deadline = Instant::now() + limit;
        self.link.send(phase, &RETURN_PATH_SHUT, limit)?;
        while !self.is_colo()? {
            if Instant::now() >= deadline {
                return Err(CaptureError::Silent { phase, waited: limit });
            }
            // Nothing may come; this is a pause that notices a QEMU that closes.
            self.link.fill(phase, Instant::now() + QUIET)?;
        }
        Ok(())
    }

    /// Reads what the link has.
    fn parse(&mut self, phase: Phase) -> Result<(), CaptureError> {
        let mut input = self.link.unread();
        while let Some(event) = self.reader.read(&mut input).map_err(stream_error(phase))? {
            match event {
                PrecopyEvent::Page(record) => {
                    self.pages += 1;
                    self.sink.page(record.block, record.page, record.content)?;
                }
                PrecopyEvent::Layout(layout) => self.sink.layout(&layout)?,
                PrecopyEvent::RamSection { last, .. } => self.memory_read |= last,
                PrecopyEvent::Command(command) => debug!(?command, "command in the full copy"),
            }
        }
        let left = input.len();
        self.link.keep(left);
        Ok(())
    }

    /// Whether QEMU is in state `colo`; an error if it never will be.
    fn is_colo(&self) -> Result<bool, CaptureError> {
        let info =
            qmp::query_migrate(self.monitor.as_ref()).map_err(CaptureError::monitor(Phase::Switchover))?;
        match info.status.as_deref() {
            Some("colo") => Ok(true),
            Some(status @ ("completed" | "failed" | "cancelled")) => Err(CaptureError::NotEntered {
                version: self.version.clone(),
                status: status.to_owned(),
                detail: info.error_desc,
            }),
            _ => Ok(false),
        }
    }

    /// Why QEMU has closed the socket.
    fn explain(&self, error: CaptureError) -> CaptureError {
        let CaptureError::Closed { phase, .. } = error else { return error };
        let deadline = Instant::now() + REASON_LIMIT;
        loop {
            match self.is_colo() {
                Err(reason @ CaptureError::NotEntered { .. }) => return reason,
                Ok(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                // No reason to be had, least of all from a QEMU that is gone.
                Ok(_) => return error,
                Err(reason) => return CaptureError::Closed { phase, detail: Some(reason.to_string()) },
            }
        }
    }
}

pub(super) fn stream_error(phase: Phase) -> impl FnOnce(StreamError) -> CaptureError {
    move |source| CaptureError::Stream { phase, source }
}
