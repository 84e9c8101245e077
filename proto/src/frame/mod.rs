//! Page frames: the bytes in which pages travel. A frame is a run of records, each a fixed little-endian
//! header and its payload; it is at most [`limits::MAX_FRAME_BYTES`](crate::limits::MAX_FRAME_BYTES) long and is never
//! split.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | page index in the block; of a batch: bytes of its records |
//! | 8 | 2 | block index; of a batch: 0 |
//! | 10 | 2 | codec |
//! | 12 | 4 | payload bytes |
//!
//! | codec | payload | feature |
//! |---|---|---|
//! | 0 zero | none; the page is zeros | |
//! | 1 raw | the page | |
//! | 2 unchanged | none; the page is as in the epoch before | `codec/xbzrle` |
//! | 3 XBZRLE | difference from the page as in the epoch before, see the crate `xbzrle` | `codec/xbzrle` |
//! | 4 LZ4 | the page as an LZ4 block | `codec/lz4` |
//! | 5 batch | records of any codec but this one, as an LZ4 block | `codec/lz4`; above 60 KiB of records `codec/long-batches` |
//!
//! Codecs 2 and 3 are *by reference*. "The epoch before" is what the backup has committed and applied when the epoch
//! begins, whatever the epoch at hand has said before; so a record by reference is the first of its page in the epoch,
//! and a full epoch has none.

mod build;
mod read;

pub use build::{Batches, FrameBuilder, FrameTotals, FullBatch};
pub use read::{FrameReader, Packed, Record, Unit, records, units};

use crate::units::{BlockIndex, PageData, PageIndex};

/// Bytes of a record's header.
pub const RECORD_HEADER_BYTES: usize = 16;

/// How the payload of a record gives the page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Codec {
    /// A page of zeros, no payload.
    Zero = 0,
    /// The page as it is.
    Raw = 1,
    /// The page as in the epoch before, no payload.
    Unchanged = 2,
    /// The difference from the page as in the epoch before.
    Xbzrle = 3,
    /// The page as an LZ4 block.
    Lz4 = 4,
    /// Records as an LZ4 block.
    Batch = 5,
}

impl Codec {
    /// Every codec, in the order of its number.
    pub const ALL: [Self; 6] = [Self::Zero, Self::Raw, Self::Unchanged, Self::Xbzrle, Self::Lz4, Self::Batch];

    /// The codec of this number.
    pub fn from_number(number: u16) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }

    /// Its name in logs and status.
    pub fn name(self) -> &'static str {
        match self {
            Self::Zero => "zero",
            Self::Raw => "raw",
            Self::Unchanged => "unchanged",
            Self::Xbzrle => "xbzrle",
            Self::Lz4 => "lz4",
            Self::Batch => "batch",
        }
    }

    /// Whether it says what a page is by what it was.
    pub fn is_by_reference(self) -> bool {
        matches!(self, Self::Unchanged | Self::Xbzrle)
    }
}

/// A page and its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRecord<'a> {
    /// The block the page is in.
    pub block: BlockIndex,
    /// The page.
    pub page: PageIndex,
    /// Its content, `None` for a page of zeros.
    pub content: Option<&'a PageData>,
}

#[cfg(test)]
mod tests;
