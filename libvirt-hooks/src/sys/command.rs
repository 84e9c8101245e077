//! Single calls.

use std::ffi::{CStr, CString, c_char, c_uint};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use virt::domain::Domain;
use virt::error::Error;

/// `virDomainQemuMonitorCommandWithFiles` with one descriptor; returns the reply line.
pub(crate) fn monitor_command_with_fd(
    domain: &Domain,
    command: &CStr,
    fd: BorrowedFd<'_>,
) -> Result<String, Error> {
    let mut fds = [fd.as_raw_fd()];
    let mut reply: *mut c_char = ptr::null_mut();
    // SAFETY: the domain pointer is valid while `domain` lives; `command` is NUL-terminated; `fds` holds exactly the
    // one descriptor announced, open for the whole call because it is borrowed; null for both output arguments says
    // that none are wanted; `reply` is only written.
    let status = unsafe {
        virt_sys::virDomainQemuMonitorCommandWithFiles(
            domain.as_ptr(),
            command.as_ptr(),
            1,
            fds.as_mut_ptr(),
            ptr::null_mut::<c_uint>(),
            ptr::null_mut(),
            &raw mut reply,
            virt_sys::VIR_DOMAIN_QEMU_MONITOR_COMMAND_DEFAULT,
        )
    };
    if status < 0 || reply.is_null() {
        return Err(Error::last_error());
    }
    // SAFETY: on success `reply` is a NUL-terminated string allocated by libvirt with malloc and given to the caller;
    // it is not used after `free`.
    unsafe {
        let owned = CString::from(CStr::from_ptr(reply));
        libc::free(reply.cast());
        Ok(owned.to_string_lossy().into_owned())
    }
}
