//! Waking a blocked capture from another thread.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

/// Makes blocked calls of a [`super::CheckpointSource`] return with [`super::CaptureError::Interrupted`].
///
/// An interruption stays in force, for calls made later as well, until [`super::CheckpointSource::disarm`] has
/// returned. It does not reach a call that is inside the caller's own sink or barrier, nor a QMP command under way.
#[derive(Debug, Clone)]
pub struct Interrupter(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Looked at while there is no need to wait.
    interrupted: AtomicBool,
    /// Waited for; readable while interrupted.
    event: OwnedFd,
}

impl Interrupter {
    /// For a new source, not interrupted.
    ///
    /// # Errors
    /// If the process has no file descriptor left.
    pub fn new() -> Result<Self, Errno> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(Arc::new(Shared { interrupted: AtomicBool::new(false), event })))
    }

    /// Interrupts.
    pub fn interrupt(&self) {
        self.0.interrupted.store(true, Ordering::Release);
        // The only failure is a counter at its maximum, which is readable as well.
        let _ = rustix::io::write(&self.0.event, &1u64.to_ne_bytes());
    }

    /// Whether an interruption is in force.
    pub fn is_interrupted(&self) -> bool {
        self.0.interrupted.load(Ordering::Acquire)
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }

    /// Ends an interruption: the source has been disarmed.
    pub fn clear(&self) {
        // Fails only if there is nothing to clear.
        let _ = rustix::io::read(&self.0.event, &mut [0u8; 8]);
        self.0.interrupted.store(false, Ordering::Release);
    }
}
