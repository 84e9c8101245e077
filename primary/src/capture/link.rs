//! Our end of the migration socket: one reused buffer, every wait bounded and interruptible.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use understudy_proto::qemu::StreamBuffer;

use super::{CaptureError, Interrupter, Phase};

/// Bytes asked of the kernel at once. More gains nothing, less costs calls.
const BUFFER_BYTES: usize = 1 << 20;

/// How long a wait with the guest stopped looks again and again before it sleeps. A reader that sleeps has QEMU's migration
/// thread wake it with every write, in the middle of the stop; and the stopped guest leaves a CPU free. A disk that is slow to
/// flush is waited for asleep.
const AWAKE: Duration = Duration::from_millis(1);

/// Pauses of the CPU between two looks: each takes a lock of the socket that its writer needs.
const PAUSES: u32 = 16;

/// Whether there is more to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Filled {
    /// There are new bytes in [`Link::unread`].
    Data,
    /// None came in time.
    Quiet,
}

/// See the module's description.
#[derive(Debug)]
pub(super) struct Link {
    socket: OwnedFd,
    interrupter: Interrupter,
    buffer: StreamBuffer,
    received_bytes: u64,
}

impl Link {
    pub(super) fn new(socket: OwnedFd, interrupter: Interrupter) -> Self {
        Self { socket, interrupter, buffer: StreamBuffer::new(BUFFER_BYTES), received_bytes: 0 }
    }

    /// Bytes received and not yet read by a reader.
    pub(super) fn unread(&self) -> &[u8] {
        self.buffer.unread()
    }

    /// Says that all but the last `count` bytes of [`Link::unread`] were read.
    pub(super) fn keep(&mut self, count: usize) {
        self.buffer.keep(count);
    }

    /// All bytes ever received.
    pub(super) fn received_bytes(&self) -> u64 {
        self.received_bytes
    }

    /// Receives more, waiting until `deadline` for it.
    pub(super) fn fill(&mut self, phase: Phase, deadline: Instant) -> Result<Filled, CaptureError> {
        let stopped = matches!(phase, Phase::Stop | Phase::Transfer);
        let asleep = stopped.then(|| deadline.min(Instant::now() + AWAKE));
        loop {
            match self.try_fill(phase)? {
                Filled::Data => return Ok(Filled::Data),
                Filled::Quiet if asleep.is_some_and(|from| Instant::now() < from) => {
                    (0..PAUSES).for_each(|_| std::hint::spin_loop());
                    // QEMU has other threads, and a host other guests.
                    std::thread::yield_now();
                }
                Filled::Quiet if !self.wait(phase, PollFlags::IN, deadline)? => return Ok(Filled::Quiet),
                Filled::Quiet => {}
            }
        }
    }

    /// Receives what is there.
    pub(super) fn try_fill(&mut self, phase: Phase) -> Result<Filled, CaptureError> {
        if self.interrupter.is_interrupted() {
            return Err(CaptureError::Interrupted);
        }
        loop {
            match recv(&self.socket, self.buffer.space(), RecvFlags::DONTWAIT) {
                Ok((_, 0)) | Err(Errno::CONNRESET | Errno::PIPE) => {
                    return Err(CaptureError::Closed { phase, detail: None });
                }
                Ok((_, count)) => {
                    self.buffer.filled(count);
                    self.received_bytes += count as u64;
                    return Ok(Filled::Data);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(Filled::Quiet),
                Err(source) => return Err(CaptureError::Socket { phase, source }),
            }
        }
    }

    /// Sends all of `bytes`.
    pub(super) fn send(&self, phase: Phase, mut bytes: &[u8], limit: Duration) -> Result<(), CaptureError> {
        let deadline = Instant::now() + limit;
        while !bytes.is_empty() {
            match send(&self.socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if !self.wait(phase, PollFlags::OUT, deadline)? {
                        return Err(CaptureError::Silent { phase, waited: limit });
                    }
                }
                Err(Errno::CONNRESET | Errno::PIPE) => {
                    return Err(CaptureError::Closed { phase, detail: None });
                }
                Err(source) => return Err(CaptureError::Socket { phase, source }),
            }
        }
        Ok(())
    }

    fn wait(&self, phase: Phase, flags: PollFlags, deadline: Instant) -> Result<bool, CaptureError> {
        wait_for(&self.interrupter, PollFd::new(&self.socket, flags), phase, deadline)
    }
}

/// Waits for a descriptor until `deadline`; false if it was not ready in time.
pub(super) fn wait_for(
    interrupter: &Interrupter,
    fd: PollFd<'_>,
    phase: Phase,
    deadline: Instant,
) -> Result<bool, CaptureError> {
    let interrupt = interrupter.as_fd();
    let mut fds = [PollFd::new(&interrupt, PollFlags::IN), fd];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 });
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) => return Ok(false),
            Ok(_) if interrupter.is_interrupted() => return Err(CaptureError::Interrupted),
            Ok(_) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(source) => return Err(CaptureError::Socket { phase, source }),
        }
    }
}
