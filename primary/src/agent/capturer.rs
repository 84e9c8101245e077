//! The thread a guest's capture runs on: one call at a time, each answered by one report.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use bytes::Bytes;
use tokio::sync::mpsc;
use tracing::{info, warn};
use understudy_proto::epoch::{Committed, EpochKind};
use understudy_proto::ids::EpochId;

use super::host::GuestHost;
use crate::capture::{CaptureError, CheckpointSource, Interrupter};
use crate::egress::{Sealing, SharedKeeper};
use crate::engine::{CaptureFailure, Event};
use crate::replicate::EpochSink;

/// Calls that wait. The engine makes the next one when the last was answered.
const CALLS: usize = 4;

/// What must be done while the guest is stopped at the end of an epoch.
pub type Barrier = Box<dyn FnMut(EpochId) -> Result<(), String> + Send>;

/// A call of the capture.
#[derive(Debug)]
pub(super) enum Call {
    Arm {
        epoch: EpochId,
        sink: EpochSink,
    },
    /// The guest is still stopped for the full copy that is committed: lets everything out that is held. No report
    /// unless it fails.
    Flush(Committed),
    Start,
    WaitReady,
    Checkpoint {
        epoch: EpochId,
        /// The guest stays stopped until it is started.
        hold: bool,
        sink: EpochSink,
    },
    Disarm,
    Rescue,
}

/// What a call came to.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) event: Event,
    /// Of a checkpoint.
    pub(super) pages: Option<u64>,
    /// Of a full copy: bytes of the guest's memory.
    pub(super) memory_bytes: Option<u64>,
}

impl From<Event> for Report {
    fn from(event: Event) -> Self {
        Self { event, pages: None, memory_bytes: None }
    }
}

/// The thread's handle. The thread ends when it is dropped; the source, dropped with it, lets the guest run.
#[derive(Debug)]
pub(super) struct Capturer {
    calls: SyncSender<Call>,
    interrupter: Interrupter,
}

impl Capturer {
    pub(super) fn spawn(
        name: &str,
        source: Box<dyn CheckpointSource>,
        host: Arc<dyn GuestHost>,
        barrier: Barrier,
        gate: Option<SharedKeeper>,
    ) -> std::io::Result<(Self, mpsc::Receiver<Report>)> {
        let (calls, inbox) = sync_channel(CALLS);
        let (reports, outbox) = mpsc::channel(CALLS);
        let interrupter = source.interrupter();
        let worker = Worker { source, host, barrier, gate, unproven: None, reports };
        // 15 bytes is all a thread's name may have.
        let name: String = format!("cap-{name}").chars().take(15).collect();
        std::thread::Builder::new().name(name).spawn(move || worker.run(&inbox))?;
        Ok((Self { calls, interrupter }, outbox))
    }

    pub(super) fn call(&self, call: Call) {
        if self.calls.try_send(call).is_err() {
            // The engine makes one call at a time, so the thread is gone, and the closed report channel tells.
            warn!("the capture thread takes no calls");
        }
    }

    pub(super) fn interrupt(&self) {
        self.interrupter.interrupt();
    }
}

struct Worker {
    source: Box<dyn CheckpointSource>,
    host: Arc<dyn GuestHost>,
    barrier: Barrier,
    gate: Option<SharedKeeper>,
    /// A full copy that is not handed over before QEMU has taken READY: the proof that the guest was stopped until then,
    /// and that the gate was sealed at the right moment (invariant 7).
    unproven: Option<(EpochSink, Bytes)>,
    reports: mpsc::Sender<Report>,
}

impl Worker {
    fn run(mut self, calls: &Receiver<Call>) {
        while let Ok(call) = calls.recv() {
            if self.answer(call).is_err() {
                break;
            }
        }
    }

    /// An error is an owner that does not listen any more.
    fn answer(&mut self, call: Call) -> Result<(), ()> {
        let report = match call {
            Call::Arm { epoch, sink } => return self.arm(epoch, sink),
            Call::Checkpoint { epoch, hold, sink } => return self.checkpoint(epoch, hold, sink),
            Call::Flush(committed) => {
                return match self.flush(&committed) {
                    Ok(()) => Ok(()),
                    Err(reason) => self.report(Event::OutputFailed(reason).into()),
                };
            }
            Call::Start => {
                if let Some(gate) = &self.gate {
                    gate.resuming();
                }
                let unproven = self.unproven.take();
                match self.source.start().and_then(|()| self.source.wait_ready()) {
                    Ok(()) => {
                        if let Some((sink, device)) = unproven {
                            // A stream that was lost meanwhile is the engine's to notice.
                            let _ = sink.finish(device);
                        }
                        Event::Ready
                    }
                    Err(error) => failed(&error),
                }
            }
            Call::WaitReady => match self.source.wait_ready() {
                Ok(()) => Event::Ready,
                Err(error) => failed(&error),
            },
            Call::Disarm => {
                self.unproven = None;
                Event::Disarmed(self.source.disarm().map_err(|error| failure(&error)))
            }
            Call::Rescue => Event::Rescued(self.host.rescue()),
        };
        self.report(report.into())
    }

    fn report(&self, report: Report) -> Result<(), ()> {
        self.reports.blocking_send(report).map_err(drop)
    }

    /// Lets everything out that a full copy covers. Only while the guest is stopped for it: what it sent afterwards is in
    /// no epoch.
    fn flush(&mut self, committed: &Committed) -> Result<(), String> {
        let Some(gate) = &self.gate else { return Ok(()) };
        self.source.still_stopped().map_err(|error| error.to_string())?;
        gate.committed(committed).map_err(|error| error.to_string())
    }

    fn arm(&mut self, epoch: EpochId, mut sink: EpochSink) -> Result<(), ()> {
        self.unproven = None;
        match self.host.describe() {
            Ok(xml) => sink.describe(xml),
            Err(reason) => return self.report(Event::CaptureFailed(plain(reason)).into()),
        }
        match self.source.arm(&mut sink) {
            Ok(armed) => {
                info!(
                    %epoch, dialect = armed.dialect.map(tracing::field::display), pages = armed.pages,
                    precopy_ms = armed.timings.precopy.as_millis(), bytes = armed.timings.bytes,
                    "full copy captured"
                );
                let sealing = seal(self.gate.as_ref(), epoch, EpochKind::Full);
                let sealed = sealing.and_then(|s| (self.barrier)(epoch).map(|()| s));
                let stay_stopped = match sealed.map_err(|reason| CaptureError::Barrier { reason }) {
                    Ok(Sealing::RunOn) => false,
                    Ok(Sealing::StayStopped) => match self.source.still_stopped() {
                        Ok(()) => true,
                        Err(error) => return self.give_up(error),
                    },
                    Err(error) => return self.give_up(error),
                };
                let memory_bytes = Some(armed.layout.total_bytes());
                // Before its last bytes are on their way: the acknowledgement must not overtake this.
                let event = Event::Armed { stay_stopped };
                self.report(Report { event, pages: None, memory_bytes })?;
                if stay_stopped {
                    // It cannot wait for READY, which lets the guest run: that is asked for again before the release.
                    let _ = sink.finish(armed.device);
                } else {
                    self.unproven = Some((sink, armed.device));
                }
                Ok(())
            }
            Err(error) => self.report(failed(&error).into()),
        }
    }

    /// An epoch that was captured cannot be used.
    fn give_up(&mut self, cause: CaptureError) -> Result<(), ()> {
        let error = match self.source.disarm() {
            Ok(()) => cause,
            Err(error) => error,
        };
        self.report(failed(&error).into())
    }

    fn checkpoint(&mut self, epoch: EpochId, hold: bool, mut sink: EpochSink) -> Result<(), ()> {
        if hold {
            self.source.hold_next();
        }
        let (barrier, gate) = (&mut self.barrier, self.gate.as_ref());
        let mut at_stop = || seal(gate, epoch, EpochKind::Delta).and_then(|_| barrier(epoch));
        let captured = self.source.checkpoint(&mut at_stop, &mut sink);
        if hold
            && captured.is_ok()
            && let Err(error) = self.source.still_stopped()
        {
            return self.give_up(error);
        }
        match captured {
            Ok(checkpoint) => {
                tracing::trace!(
                    %epoch, pages = checkpoint.pages, stop_us = checkpoint.timings.stop.as_micros(),
                    transfer_us = checkpoint.timings.transfer.as_micros(), "captured"
                );
                self.report(Report {
                    event: Event::Captured,
                    pages: Some(checkpoint.pages),
                    memory_bytes: None,
                })?;
                let _ = sink.finish(checkpoint.device);
                Ok(())
            }
            Err(error) => self.report(failed(&error).into()),
        }
    }
}

/// What the guest has sent up to its stop is one epoch.
fn seal(gate: Option<&SharedKeeper>, epoch: EpochId, kind: EpochKind) -> Result<Sealing, String> {
    gate.map_or(Ok(Sealing::RunOn), |gate| gate.stopped(epoch, kind).map_err(|error| error.to_string()))
}

fn failed(error: &CaptureError) -> Event {
    Event::CaptureFailed(failure(error))
}

/// What of an error matters to the engine.
pub(super) fn failure(error: &CaptureError) -> CaptureFailure {
    CaptureFailure {
        reason: error.to_string(),
        left_stopped: matches!(error, CaptureError::GuestLeftStopped { .. }),
        gone: error.is_gone(),
    }
}

fn plain(reason: String) -> CaptureFailure {
    CaptureFailure { reason, left_stopped: false, gone: false }
}
