//! KVM's dirty ring: pages a vCPU has dirtied, in memory shared with the kernel.

use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::kvm_dirty_gfn;
use kvm_ioctls::VcpuFd;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Page offset of the ring in the vCPU's file (`KVM_DIRTY_LOG_PAGE_OFFSET` of x86).
const RING_OFFSET: u64 = 64 * 4096;

/// The kernel has filled the entry.
const DIRTY: u32 = 1;

/// We have taken the entry, the kernel may reset it.
const RESET: u32 = 2;

/// The dirty ring of one vCPU.
#[derive(Debug)]
pub(crate) struct DirtyRing {
    entries: NonNull<kvm_dirty_gfn>,
    count: usize,
    next: usize,
}

// SAFETY: the mapping belongs to this value alone; what it shares with the kernel is ordered by the flags.
unsafe impl Send for DirtyRing {}

impl DirtyRing {
    /// Maps the ring of a vCPU of a VM that has rings of `bytes`.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(crate) fn new(vcpu: &VcpuFd, bytes: usize) -> std::io::Result<Self> {
        // SAFETY: `VcpuFd` keeps the descriptor open for as long as it is borrowed here.
        let fd = unsafe { rustix::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(vcpu)) };
        // SAFETY: a null hint lets the kernel choose a place, so no mapping of ours is replaced.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd.as_fd(),
                RING_OFFSET,
            )
        }?;
        let entries = NonNull::new(start.cast()).ok_or(std::io::ErrorKind::OutOfMemory)?;
        Ok(Self { entries, count: bytes / size_of::<kvm_dirty_gfn>(), next: 0 })
    }

    /// Takes the oldest entry: memory slot and page in it. The kernel writes to the entry again only after
    /// `KVM_RESET_DIRTY_RINGS`.
    pub(crate) fn take(&mut self) -> Option<(u32, u64)> {
        // SAFETY: `next` is below `count`, so the entry is inside the mapping.
        let entry = unsafe { self.entries.add(self.next) }.as_ptr();
        // SAFETY: the flags are four aligned bytes that the kernel too only touches atomically.
        let flags = unsafe { AtomicU32::from_ptr(&raw mut (*entry).flags) };
        if flags.load(Ordering::Acquire) & DIRTY == 0 {
            return None;
        }
        // SAFETY: the kernel has written both before it set the flag, and leaves them alone until the entry is reset.
        let (slot, offset) = unsafe { ((*entry).slot, (*entry).offset) };
        flags.store(RESET, Ordering::Release);
        self.next = (self.next + 1) % self.count;
        Some((slot, offset))
    }
}

impl Drop for DirtyRing {
    fn drop(&mut self) {
        let bytes = self.count * size_of::<kvm_dirty_gfn>();
        // SAFETY: exactly what was mapped, and only this value knows it.
        if let Err(error) = unsafe { munmap(self.entries.as_ptr().cast(), bytes) } {
            tracing::warn!(%error, bytes, "a dirty ring could not be given back");
        }
    }
}
