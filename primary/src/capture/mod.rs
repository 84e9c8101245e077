//! Capture: epochs of a running guest, out of an unmodified QEMU (or of a [`micro`] VM of our own).
//!
//! [`ColoSource`] is the other end of QEMU's COLO migration. It reads the precopy while the guest runs, then one
//! checkpoint after the other, and decides with its REPLY when the guest is stopped:
//!
//! ```text
//!            arm                start        wait_ready          checkpoint
//! Idle ------------> Stopped --------> Running -------> Ready ------------------+
//!   ^   precopy,     at epoch 0  READY    ^   REQUEST     REPLY, SEND, barrier, |
//!   |   guest runs                        |               LOADED, RAM, device   |
//!   |                                     +-------------------------------------+
//!   +------- disarm, or an error in any call: x-colo-lost-heartbeat, guest runs on
//! ```
//!
//! Everything here blocks and belongs on a thread of its own; [`Interrupter`] makes it return from another one.
//! Whether a guest may be stopped at all is [`run_state::RunTracker`]'s business: QEMU aborts if a checkpoint
//! begins in a run state it does not expect.

#[cfg(target_arch = "x86_64")]
pub mod micro;
pub mod run_state;

mod channel;
mod checkpoint;
mod dialect;
mod error;
mod exit;
mod interrupt;
mod link;
mod options;
mod precopy;
mod settings;
mod source;

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use understudy_proto::layout::MemoryLayout;
use understudy_proto::units::{BlockIndex, PageData, PageIndex};

pub use channel::SocketBuffer;
pub use dialect::{Dialect, Unsupported};
pub use error::{CaptureError, Phase};
pub use exit::{Rescue, rescue};
pub use interrupt::Interrupter;
pub use options::{Acknowledge, ColoOptions};
pub use source::ColoSource;

/// Takes the pages of an epoch as they are read. It may block: that is how a slow backup slows the full copy
/// down. A page may come several times during a full copy; the last one counts.
pub trait PageSink {
    /// The guest's memory layout, once per full copy and before its first page.
    ///
    /// # Errors
    /// [`SinkClosed`] to end the capture.
    fn layout(&mut self, layout: &Arc<MemoryLayout>) -> Result<(), SinkClosed>;

    /// One page; `None` is a page of zeros. The content is lent for the call only.
    ///
    /// # Errors
    /// [`SinkClosed`] to end the capture.
    fn page(
        &mut self,
        block: BlockIndex,
        page: PageIndex,
        content: Option<&PageData>,
    ) -> Result<(), SinkClosed>;
}

/// Whoever takes the pages does not want any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the receiver of the pages has closed")]
pub struct SinkClosed;

/// Where checkpoints come from.
///
/// After an error from any of these calls capture has ended and the guest runs on (unless the error says
/// otherwise, see [`CaptureError::GuestLeftStopped`]); what the sink got of the epoch at hand must be thrown
/// away. The source can be armed again, after [`CheckpointSource::disarm`] if it was interrupted.
pub trait CheckpointSource: Send {
    /// Full copy while the guest runs; returns with the guest stopped at the end of epoch 0.
    ///
    /// # Errors
    /// See [`CaptureError`].
    fn arm(&mut self, sink: &mut dyn PageSink) -> Result<Armed, CaptureError>;

    /// Lets the guest run after [`CheckpointSource::arm`], or after a checkpoint that holds it: put the barrier of the
    /// first epoch before this call.
    ///
    /// # Errors
    /// See [`CaptureError`].
    fn start(&mut self) -> Result<(), CaptureError>;

    /// Blocks until the guest can be stopped for a checkpoint. It runs meanwhile, and goes on running until
    /// [`CheckpointSource::checkpoint`] is called, however long that takes.
    ///
    /// # Errors
    /// See [`CaptureError`].
    fn wait_ready(&mut self) -> Result<(), CaptureError>;

    /// One checkpoint: stops the guest, calls `barrier` while nothing of the guest moves, reads the dirty pages
    /// into `sink` and the device state, and lets the guest run.
    ///
    /// Only call it when [`run_state::RunTracker::verdict`] says so. An error of `barrier` ends capture.
    ///
    /// # Errors
    /// See [`CaptureError`].
    fn checkpoint(
        &mut self,
        barrier: &mut dyn FnMut() -> Result<(), String>,
        sink: &mut dyn PageSink,
    ) -> Result<Checkpoint, CaptureError>;

    /// The next checkpoint leaves the guest stopped, until [`CheckpointSource::start`].
    fn hold_next(&mut self);

    /// Makes sure that the guest has not run since the call that left it stopped. Somebody else may have let it run if
    /// this process hung.
    ///
    /// # Errors
    /// If it has, or that cannot be known.
    fn still_stopped(&mut self) -> Result<(), CaptureError>;

    /// Ends capture cleanly; the guest runs on, or stays suspended if an operator has suspended it. Does nothing
    /// but to forget an interruption if the source is not armed.
    ///
    /// # Errors
    /// If QEMU cannot be brought out of COLO; the guest's state is then unknown.
    fn disarm(&mut self) -> Result<(), CaptureError>;

    /// What makes a blocked call return with [`CaptureError::Interrupted`], from any thread.
    fn interrupter(&self) -> Interrupter;
}

/// A full copy is complete and the guest is stopped.
#[derive(Debug, Clone)]
pub struct Armed {
    /// The guest's memory.
    pub layout: Arc<MemoryLayout>,
    /// The device state that belongs to the full copy.
    pub device: Bytes,
    /// How this QEMU is spoken to; `None` if the guest is not one of QEMU's.
    pub dialect: Option<Dialect>,
    /// Page records handed to the sink, repeated pages counted each time.
    pub pages: u64,
    /// How long it took.
    pub timings: ArmTimings,
}

/// Where the time of a full copy went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ArmTimings {
    /// From the start of the migration to the last RAM record; the guest runs for nearly all of it.
    pub precopy: Duration,
    /// From the last RAM record to QEMU's confirmation: device state, all of it with the guest stopped.
    pub switchover: Duration,
    /// Bytes read.
    pub bytes: u64,
}

/// One captured epoch; its pages went to the sink.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// QEMU's device state, as it goes into an incoming stream.
    pub device: Bytes,
    /// Pages handed to the sink.
    pub pages: u64,
    /// Where the time went.
    pub timings: CaptureTimings,
}

/// Where the time of one checkpoint went, as seen from the agent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CaptureTimings {
    /// REPLY sent to SEND read: stop the vCPUs, drain and flush the disks.
    pub stop: Duration,
    /// Spent in the caller's barrier.
    pub barrier: Duration,
    /// SEND read to the last byte of the device buffer read, barrier included.
    pub transfer: Duration,
    /// Bytes read.
    pub bytes: u64,
}
