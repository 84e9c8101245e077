//! Page codecs: from a page, and what the other side has of it, to the payload of a record and back. What a record
//! looks like is said in [`crate::frame`].
//!
//! No policy is in here: which codecs are tried is the caller's choice, within what both sides have agreed on.

mod decode;
mod encode;
mod lz4;

pub use decode::{apply, decode};
pub use encode::{Encoded, MAX_LZ4_BYTES, MAX_XBZRLE_BYTES, PageEncoder};
pub use lz4::Lz4;
pub(crate) use lz4::unpack as unpack_lz4;

use crate::limits;
use crate::negotiate::{Agreement, FEATURE_LONG_BATCHES, FEATURE_LZ4, FEATURE_XBZRLE};

/// The codecs that may be used beyond zero and raw.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CodecSet {
    /// Unchanged pages and XBZRLE.
    pub xbzrle: bool,
    /// LZ4, of pages and of batches.
    pub lz4: bool,
    /// Batches of LZ4 may be long.
    pub long_batches: bool,
}

impl CodecSet {
    /// Zero and raw only.
    pub const NONE: Self = Self { xbzrle: false, lz4: false, long_batches: false };

    /// All that this build has.
    pub const ALL: Self = Self { xbzrle: true, lz4: true, long_batches: true };

    /// What both sides have agreed on.
    pub fn agreed(agreement: &Agreement) -> Self {
        let has = |name: &str| agreement.features.contains(name);
        let (xbzrle, lz4) = (has(FEATURE_XBZRLE), has(FEATURE_LZ4));
        Self { xbzrle, lz4, long_batches: lz4 && has(FEATURE_LONG_BATCHES) }
    }

    /// Bytes that the records of a batch may have.
    pub fn batch_bytes(self) -> usize {
        if self.long_batches { limits::MAX_BATCH_BYTES } else { limits::SHORT_BATCH_BYTES }
    }
}

#[cfg(test)]
mod tests;
