//! From a page to its payload.

use super::lz4::Lz4;
use crate::frame::Codec;
use crate::units::{PAGE_BYTES, PageData, ZERO_PAGE};
use xbzrle::{Backend, Outcome};

/// Bytes of the longest XBZRLE payload worth sending. Beyond it a page is sent otherwise: reading and decoding it costs
/// more than the quarter that is saved.
pub const MAX_XBZRLE_BYTES: usize = PAGE_BYTES * 3 / 4;

/// Bytes of the longest LZ4 payload of a page worth sending.
pub const MAX_LZ4_BYTES: usize = PAGE_BYTES * 7 / 8;

/// A page as it goes into a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Encoded<'a> {
    /// How it is encoded.
    pub codec: Codec,
    /// What it is encoded to.
    pub payload: &'a [u8],
}

/// Encodes pages, one after the other, without allocating for each.
#[derive(Debug)]
pub struct PageEncoder {
    backend: Backend,
    xbzrle: Box<[u8; MAX_XBZRLE_BYTES]>,
    lz4: Lz4,
}

impl Default for PageEncoder {
    fn default() -> Self {
        Self::new()
    }
}

impl PageEncoder {
    /// An encoder for this processor.
    pub fn new() -> Self {
        Self { backend: Backend::best(), xbzrle: Box::new([0; MAX_XBZRLE_BYTES]), lz4: Lz4::new() }
    }

    /// Encodes a page, `None` being one of zeros.
    ///
    /// With `before`, the page as the other side has it, XBZRLE is tried; then LZ4, if `lz4` says so. What does not get
    /// shorter stays raw. Give `before` and `lz4` only where the codecs were agreed on.
    pub fn encode<'a>(
        &'a mut self,
        content: Option<&'a PageData>,
        before: Option<&PageData>,
        lz4: bool,
    ) -> Encoded<'a> {
        let Some(content) = content.filter(|content| **content != ZERO_PAGE) else {
            return Encoded { codec: Codec::Zero, payload: &[] };
        };
        if let Some(before) = before {
            match self.backend.encode(before, content, &mut *self.xbzrle) {
                Outcome::Unchanged => return Encoded { codec: Codec::Unchanged, payload: &[] },
                Outcome::Encoded(bytes) => {
                    return Encoded { codec: Codec::Xbzrle, payload: &self.xbzrle[..bytes] };
                }
                Outcome::DoesNotPay => {}
            }
        }
        if lz4 && let Some(payload) = self.lz4.compress(content).filter(|lz4| lz4.len() <= MAX_LZ4_BYTES) {
            return Encoded { codec: Codec::Lz4, payload };
        }
        Encoded { codec: Codec::Raw, payload: content }
    }
}
