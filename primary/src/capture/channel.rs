//! The migration socket and how QEMU gets its end of it.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::sockopt;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tracing::{debug, warn};
use understudy_libvirt::{Monitor, MonitorError, qmp};

use super::link::wait_for;
use super::{CaptureError, ColoOptions, Interrupter, Phase};

/// Name under which QEMU keeps its end until `migrate` takes it.
const FD_NAME: &str = "understudy-capture";

/// What became of the wish for a large socket buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketBuffer {
    /// Left as the kernel makes it.
    Default,
    /// As large as wished.
    Full,
    /// Only as large as `net.core.wmem_max` allows: CAP_NET_ADMIN is missing.
    Limited {
        /// Bytes got, as the kernel counts them (double what it lets in).
        bytes: usize,
    },
}

/// Sets how much can be written to `socket` before its reader reads.
pub(super) fn set_buffer(socket: impl AsFd, bytes: Option<usize>) -> Result<SocketBuffer, Errno> {
    let Some(bytes) = bytes else { return Ok(SocketBuffer::Default) };
    match sockopt::set_socket_send_buffer_size_force(&socket, bytes) {
        Ok(()) => Ok(SocketBuffer::Full),
        Err(Errno::PERM) => {
            sockopt::set_socket_send_buffer_size(&socket, bytes)?;
            Ok(SocketBuffer::Limited { bytes: sockopt::socket_send_buffer_size(&socket)? })
        }
        Err(error) => Err(error),
    }
}

/// Starts the migration of QEMU to us and gives our end of its socket.
pub(super) fn open(
    monitor: &dyn Monitor,
    options: &ColoOptions,
    interrupter: &Interrupter,
) -> Result<OwnedFd, CaptureError> {
    let phase = Phase::Setup;
    let socket_error = |source| CaptureError::Socket { phase, source };
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(socket_error)?;
    // Data on its way counts against its sender, which is QEMU.
    match set_buffer(&theirs, options.socket_buffer_bytes).map_err(socket_error)? {
        SocketBuffer::Limited { bytes } => {
            warn!(
                bytes,
                "socket buffer limited by net.core.wmem_max; large epochs keep the guest stopped longer"
            );
        }
        buffer => debug!(?buffer, "migration socket made"),
    }
    match qmp::getfd(monitor, FD_NAME, theirs.as_fd()) {
        Ok(()) => {}
        Err(MonitorError::FdUnsupported { reason, .. }) => {
            let Some(dir) = &options.socket_dir else {
                return Err(CaptureError::Busy {
                    what: format!("{reason}, and no directory for a socket instead was given"),
                });
            };
            debug!(reason, "the monitor cannot carry a descriptor, using a socket path");
            return open_path(monitor, options, interrupter, dir);
        }
        Err(source) => return Err(CaptureError::Monitor { phase, source }),
    }
    // Else a QEMU that dies would not close the connection.
    drop(theirs);
    if let Err(source) = qmp::migrate(monitor, &format!("fd:{FD_NAME}")) {
        // It may or may not have been taken; there is nothing to do about a failure.
        let _ = qmp::closefd(monitor, FD_NAME);
        return Err(CaptureError::Monitor { phase, source });
    }
    Ok(ours)
}

/// The same through a listening socket. Its name cannot be guessed and it takes one connection only.
fn open_path(
    monitor: &dyn Monitor,
    options: &ColoOptions,
    interrupter: &Interrupter,
    dir: &Path,
) -> Result<OwnedFd, CaptureError> {
    let phase = Phase::Setup;
    let io_error = |error: std::io::Error| CaptureError::Socket {
        phase,
        source: Errno::from_io_error(&error).unwrap_or(Errno::IO),
    };
    let path = dir.join(format!("capture-{}", uuid::Uuid::new_v4().simple()));
    let listener = UnixListener::bind(&path).map_err(io_error)?;
    let _remove = RemoveOnDrop(&path);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).map_err(io_error)?;
    listener.set_nonblocking(true).map_err(io_error)?;
    qmp::migrate(monitor, &format!("unix:{}", path.display())).map_err(CaptureError::monitor(phase))?;
    let deadline = Instant::now() + options.silence_running;
    if !wait_for(interrupter, PollFd::new(&listener, PollFlags::IN), phase, deadline)? {
        return Err(CaptureError::Silent { phase, waited: options.silence_running });
    }
    let (stream, _) = listener.accept().map_err(io_error)?;
    Ok(stream.into())
}

struct RemoveOnDrop<'a>(&'a Path);

impl Drop for RemoveOnDrop<'_> {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{SendFlags, send};

    /// Bytes that can be written to one end before the other reads, as QEMU does: 32 pages with their heads at once.
    fn capacity(bytes: Option<usize>) -> usize {
        let (a, _b) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        set_buffer(&a, bytes).unwrap();
        let chunk = vec![0u8; 32 * 4104];
        let mut total = 0;
        while let Ok(count) = send(&a, &chunk, SendFlags::DONTWAIT) {
            total += count;
        }
        total
    }

    #[test]
    fn a_buffer_of_n_bytes_holds_n_bytes() {
        let (socket, _other) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        assert_eq!(set_buffer(&socket, None), Ok(SocketBuffer::Default));
        let wanted = 8 << 20;
        match set_buffer(&socket, Some(wanted)).unwrap() {
            SocketBuffer::Full => {
                assert!(capacity(Some(wanted)) >= wanted, "{}", capacity(Some(wanted)));
            }
            SocketBuffer::Limited { bytes } => assert!(bytes > 0),
            SocketBuffer::Default => panic!("nothing was set"),
        }
        assert!(capacity(None) < wanted);
    }
}
