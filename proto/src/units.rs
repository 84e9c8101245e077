//! Addresses and sizes that cannot be mixed up.

use crate::ProtocolError;

/// Bytes of a guest page: QEMU's target page on x86, whatever the host backs it with.
pub const PAGE_BYTES: usize = 4096;

/// One page of guest memory.
pub type PageData = [u8; PAGE_BYTES];

/// A page that holds only zeros.
pub const ZERO_PAGE: PageData = [0; PAGE_BYTES];

/// Index of a page inside its RAM block (byte offset divided by [`PAGE_BYTES`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageIndex(u64);

impl PageIndex {
    /// The page with this index.
    pub const fn new(index: u64) -> Self {
        Self(index)
    }

    /// The page at a byte offset, which must be a multiple of the page size.
    ///
    /// # Errors
    /// [`ProtocolError::Invalid`] if it is not.
    pub fn from_offset(offset_bytes: u64) -> Result<Self, ProtocolError> {
        if !offset_bytes.is_multiple_of(PAGE_BYTES as u64) {
            return Err(ProtocolError::invalid(
                "page offset",
                format!("{offset_bytes:#x} is not page-aligned"),
            ));
        }
        Ok(Self(offset_bytes / PAGE_BYTES as u64))
    }

    /// The index as a number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The byte offset of the page in its block.
    pub const fn offset_bytes(self) -> u64 {
        self.0 * PAGE_BYTES as u64
    }
}

/// Number of a RAM block: its place in [`crate::layout::MemoryLayout::blocks`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockIndex(pub u16);

impl std::fmt::Display for BlockIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl std::fmt::Display for PageIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}
