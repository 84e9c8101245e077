//! Why capture has ended.

use std::fmt;
use std::time::Duration;

use rustix::io::Errno;
use understudy_libvirt::{MonitorError, QemuVersion, RunState};
use understudy_proto::qemu::StreamError;

use super::{SinkClosed, Unsupported};

/// What capture was doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Preparing QEMU and starting the migration.
    Setup,
    /// Full copy of memory, the guest runs.
    Precopy,
    /// End of the full copy, the guest is stopped.
    Switchover,
    /// Letting the guest run after the full copy.
    Start,
    /// Waiting for QEMU's REQUEST, the guest runs.
    WaitReady,
    /// REPLY is sent, the guest is being stopped.
    Stop,
    /// Reading an epoch.
    Transfer,
    /// The guest stays stopped after a copy or a checkpoint.
    Hold,
    /// Leaving COLO.
    Exit,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Setup => "while preparing QEMU",
            Self::Precopy => "during the full copy",
            Self::Switchover => "at the end of the full copy",
            Self::Start => "while starting the guest",
            Self::WaitReady => "between two checkpoints",
            Self::Stop => "while stopping the guest",
            Self::Transfer => "while reading a checkpoint",
            Self::Hold => "while the guest was held",
            Self::Exit => "while leaving COLO",
        })
    }
}

/// Why a call of a [`super::CheckpointSource`] failed. Unless it is [`CaptureError::GuestLeftStopped`] or a monitor that is
/// gone, the guest runs (or is what it was made by others) and QEMU's settings are what they were.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// Somebody called [`super::Interrupter::interrupt`].
    #[error("capture was interrupted")]
    Interrupted,
    /// Nobody takes the pages any more.
    #[error(transparent)]
    SinkClosed(#[from] SinkClosed),
    /// The caller's barrier failed.
    #[error("the barrier of a checkpoint failed: {reason}")]
    Barrier {
        /// The caller's words.
        reason: String,
    },
    /// The guest was to stay stopped and somebody else has let it run.
    #[error("the guest has run on while it was to stay stopped (it is {state}): this agent may have hung")]
    RanOn {
        /// QEMU's word.
        state: RunState,
    },
    /// QEMU sent what cannot be understood.
    #[error("{phase}: {source}")]
    Stream {
        /// What capture was doing.
        phase: Phase,
        /// What is wrong.
        source: StreamError,
    },
    /// QEMU closed the migration socket.
    #[error("QEMU closed the migration socket {phase}{}", detail.as_ref().map(|d| format!(": {d}")).unwrap_or_default())]
    Closed {
        /// What capture was doing.
        phase: Phase,
        /// QEMU's own reason, if it gave one.
        detail: Option<String>,
    },
    /// QEMU sent nothing, or not enough, for too long.
    #[error("QEMU did not go on {phase} within {} ms", waited.as_millis())]
    Silent {
        /// What capture was doing.
        phase: Phase,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The migration socket failed.
    #[error("the migration socket failed {phase}: {source}")]
    Socket {
        /// What capture was doing.
        phase: Phase,
        /// The system's reason.
        source: Errno,
    },
    /// A QMP command failed.
    #[error("{phase}: {source}")]
    Monitor {
        /// What capture was doing.
        phase: Phase,
        /// Why.
        source: MonitorError,
    },
    /// This version of QEMU cannot be captured.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// The full copy ended as an ordinary migration. The guest was started again.
    #[error(
        "QEMU {version} ended the full copy with migration status {status:?} instead of \"colo\"{}; a QEMU whose COLO \
         works is 7.2, 10.0.7 or newer of 10.0, or 11",
        detail.as_ref().map(|d| format!(" ({d})")).unwrap_or_default()
    )]
    NotEntered {
        /// The version.
        version: QemuVersion,
        /// The status it ended with.
        status: String,
        /// QEMU's own reason, if it gave one.
        detail: Option<String>,
    },
    /// QEMU is busy with a migration or a COLO that is not ours.
    #[error("cannot arm: {what}")]
    Busy {
        /// With what, and what to do.
        what: String,
    },
    /// A guest of our own, or the KVM under it, failed.
    #[cfg(target_arch = "x86_64")]
    #[error("{phase}: {source}")]
    Micro {
        /// What capture was doing.
        phase: Phase,
        /// Why.
        source: super::micro::MicroError,
    },
    /// The call does not fit what happened before.
    #[error("{call} was called on a capture that is {state}")]
    OutOfTurn {
        /// The call.
        call: &'static str,
        /// What the capture is instead.
        state: &'static str,
    },
    /// Capture failed and QEMU could not be brought out of COLO: the guest may be stopped.
    #[error("{cause}; and then QEMU could not be brought out of COLO, the guest may be stopped: {reason}")]
    GuestLeftStopped {
        /// Why capture failed.
        cause: Box<CaptureError>,
        /// Why it could not be cleaned up.
        reason: Box<CaptureError>,
    },
}

impl CaptureError {
    /// Names the phase of a failed QMP command.
    pub(super) fn monitor(phase: Phase) -> impl FnOnce(MonitorError) -> Self {
        move |source| Self::Monitor { phase, source }
    }

    /// True if there is no QEMU (or no way to it) any more.
    pub fn is_gone(&self) -> bool {
        match self {
            Self::Monitor { source, .. } => matches!(source, MonitorError::Gone { .. }),
            #[cfg(target_arch = "x86_64")]
            Self::Micro { source, .. } => matches!(source, super::micro::MicroError::Off),
            Self::GuestLeftStopped { reason, .. } => reason.is_gone(),
            _ => false,
        }
    }
}
