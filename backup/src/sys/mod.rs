//! The only unsafe code of this crate: memory for an image, anonymous at first, moved into shared files later; and what the
//! allocator keeps.
#![allow(unsafe_code)]

mod heap;

pub(crate) use heap::keep_freed_memory;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use std::os::fd::AsFd;
use std::ptr::NonNull;

/// Private zeroed memory of its own mapping: a page costs nothing until it is written, a size the host cannot
/// give is an error and no abort, and dropping it gives the memory back at once.
#[derive(Debug)]
pub(crate) struct ZeroedMemory {
    start: NonNull<u8>,
    len_bytes: usize,
}

// SAFETY: the mapping belongs to this value, like the allocation of a Vec. Parts that were moved into a file are also
// mapped by the QEMU that will run the guest; see `bytes`.
unsafe impl Send for ZeroedMemory {}
// SAFETY: shared access only reads.
unsafe impl Sync for ZeroedMemory {}

impl ZeroedMemory {
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
                MapFlags::PRIVATE,
            )
        }?;
        let start = NonNull::new(start.cast::<u8>()).ok_or(std::io::ErrorKind::OutOfMemory)?;
        // A full copy writes most of it, and a fault for each small page would be the larger part of that.
        // SAFETY: exactly what was mapped; the advice changes no content.
        if let Err(error) = unsafe { madvise(start.as_ptr().cast(), len_bytes, Advice::LinuxHugepage) } {
            tracing::debug!(%error, "no huge pages for the image");
        }
        Ok(Self { start, len_bytes })
    }

    /// Moves a part of the memory into `file`, at the same offset: copies it, then puts the file's pages where the
    /// others were. The place and the content stay as they are at every moment; the pages that were there before
    /// go back to the kernel. `from_bytes` and `len_bytes` must be multiples of the page size.
    ///
    /// The file must have all of its pages (see `fallocate`), or the kernel ends the process when there is no room
    /// for one.
    ///
    /// # Errors
    /// If the range is not in this memory, or the kernel refuses. The memory is as before then.
    pub(crate) fn share(
        &mut self,
        from_bytes: usize,
        len_bytes: usize,
        file: impl AsFd,
    ) -> std::io::Result<()> {
        let invalid = || std::io::Error::from(std::io::ErrorKind::InvalidInput);
        let range = from_bytes..from_bytes.checked_add(len_bytes).ok_or_else(invalid)?;
        let source = self.bytes().get(range).filter(|s| !s.is_empty()).ok_or_else(invalid)?;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a null hint lets the kernel choose a place, so no mapping of ours is replaced.
        let place = unsafe {
            mmap(std::ptr::null_mut(), len_bytes, prot, MapFlags::SHARED, &file, from_bytes as u64)
        }?;
        // SAFETY: `place` is a fresh mapping of `len_bytes` that nobody else has a pointer to; the source is
        // elsewhere in this process, even where both show the same page of the file.
        unsafe {
            std::ptr::copy_nonoverlapping(source.as_ptr(), place.cast::<u8>(), len_bytes);
        }
        // SAFETY: exactly what was mapped above, and no reference to it was made.
        unsafe { munmap(place, len_bytes) }?;
        // SAFETY: the range lies within the mapping that this value owns, and `&mut self` excludes references to
        // it. Memory that replaces it has the same length, protection and content.
        unsafe {
            mmap(
                self.start.as_ptr().add(from_bytes).cast(),
                len_bytes,
                prot,
                MapFlags::SHARED | MapFlags::FIXED,
                &file,
                from_bytes as u64,
            )
        }?;
        Ok(())
    }

    /// The memory.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping is `len_bytes` long, readable, initialised by the kernel, and lives as long as self.
        // A QEMU that shares it does not write while it waits; when it is loaded or runs, nothing here reads the
        // parts it shares (`Image::shared`).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len_bytes) }
    }

    /// The memory, to be written.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `bytes`, and writable; `&mut self` excludes every other reference.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len_bytes) }
    }
}

impl Drop for ZeroedMemory {
    fn drop(&mut self) {
        // SAFETY: exactly what was mapped, and no reference outlives self.
        if let Err(e) = unsafe { munmap(self.start.as_ptr().cast(), self.len_bytes) } {
            tracing::warn!(error = %e, len_bytes = self.len_bytes, "image memory could not be given back");
        }
    }
}
