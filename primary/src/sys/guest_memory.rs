//! Memory that a guest may be writing to at the same time.

use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use understudy_proto::units::{PAGE_BYTES, PageData};

/// Zeroed anonymous memory of its own mapping. No reference to it is ever given out, only copies are made: a guest
/// may change it at any time, and a copy made meanwhile may be torn.
#[derive(Debug)]
pub(crate) struct GuestMemory {
    start: NonNull<u8>,
    len_bytes: usize,
}

// SAFETY: the mapping belongs to this value alone, and is only reached by copies through raw pointers.
unsafe impl Send for GuestMemory {}
// SAFETY: as above; copies made at the same time by several threads may be torn, which the type's description says.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    /// Maps `len_bytes`, which must not be 0.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(crate) fn new(len_bytes: usize) -> std::io::Result<Self> {
        // SAFETY: a null hint lets the kernel choose a place, so no mapping of ours is replaced.
        let start = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                len_bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
            )
        }?;
        let start = NonNull::new(start.cast()).ok_or(std::io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, len_bytes })
    }

    /// Bytes of it.
    pub(crate) fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// Where it is, for the hypervisor.
    pub(super) fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// Copies a page out; false if there is no such page.
    #[must_use]
    pub(crate) fn read_page(&self, index: usize, page: &mut PageData) -> bool {
        let Some(at) = self.at(index.saturating_mul(PAGE_BYTES), PAGE_BYTES) else { return false };
        // SAFETY: `at` is followed by a page inside the mapping; the target is ours and cannot overlap it.
        unsafe { std::ptr::copy_nonoverlapping(at, page.as_mut_ptr(), PAGE_BYTES) };
        true
    }

    /// Copies `bytes` in; false if they do not fit there.
    #[must_use]
    pub(crate) fn write(&self, offset: usize, bytes: &[u8]) -> bool {
        let Some(at) = self.at(offset, bytes.len()) else { return false };
        // SAFETY: `at` is followed by as many bytes inside the mapping; the source is a reference and so no part of it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at, bytes.len()) };
        true
    }

    fn at(&self, offset: usize, len_bytes: usize) -> Option<*mut u8> {
        let end = offset.checked_add(len_bytes)?;
        // SAFETY: the offset is inside the mapping.
        (end <= self.len_bytes).then(|| unsafe { self.start.as_ptr().add(offset) })
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // SAFETY: exactly what was mapped; nobody holds a reference, and the owner ends the guest first.
        if let Err(error) = unsafe { munmap(self.start.as_ptr().cast(), self.len_bytes) } {
            tracing::warn!(%error, len_bytes = self.len_bytes, "guest memory could not be given back");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_inside_is_copied() {
        let memory = GuestMemory::new(2 * PAGE_BYTES).unwrap();
        let mut page = [1; PAGE_BYTES];
        assert!(memory.read_page(1, &mut page) && page == [0; PAGE_BYTES]);
        assert!(memory.write(2 * PAGE_BYTES - 2, &[7, 8]));
        assert!(memory.read_page(1, &mut page) && page[PAGE_BYTES - 2..] == [7, 8]);
        assert!(!memory.write(2 * PAGE_BYTES - 1, &[7, 8]) && !memory.write(usize::MAX, &[7, 8]));
        assert!(!memory.read_page(2, &mut page) && !memory.read_page(usize::MAX, &mut page));
    }
}
