//! Page frames: the bytes in which pages travel. A frame is a run of records, each a fixed little-endian
//! header and its payload; it is at most [`limits::MAX_FRAME_BYTES`] long and is never split.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | page index in the block |
//! | 8 | 2 | block index |
//! | 10 | 2 | codec: 0 zero page, 1 raw |
//! | 12 | 4 | payload bytes |

use crate::digest::{Digest, PagesDigest};
use crate::layout::MemoryLayout;
use crate::units::{BlockIndex, PAGE_BYTES, PageData, PageIndex, ZERO_PAGE};
use crate::{ProtocolError, limits};
use bytes::{BufMut, Bytes, BytesMut};

/// Bytes of a record's header.
pub const RECORD_HEADER_BYTES: usize = 16;

/// Payload of a raw page, as the header says it.
#[allow(clippy::cast_possible_truncation)] // a page is far below 4 GiB
const RAW_PAYLOAD_BYTES: u32 = PAGE_BYTES as u32;

/// How the payload of a record gives the page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Codec {
    /// A page of zeros, no payload.
    Zero = 0,
    /// The page as it is.
    Raw = 1,
}

/// A page out of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRecord<'a> {
    /// The block the page is in.
    pub block: BlockIndex,
    /// The page.
    pub page: PageIndex,
    /// Its content, `None` for a page of zeros.
    pub content: Option<&'a PageData>,
}

/// Builds the frames of one epoch: every page is copied once, into the buffer that is sent.
#[derive(Debug)]
pub struct FrameBuilder {
    open: BytesMut,
    digest: PagesDigest,
    pages: u64,
    frames: u64,
    frame_bytes: u64,
}

/// What the frames of an epoch hold together; goes into its manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameTotals {
    /// Frames built.
    pub frames: u64,
    /// Records in them.
    pub pages: u64,
    /// Bytes of them.
    pub frame_bytes: u64,
    /// Digest of all pages in order.
    pub digest: Digest,
}

impl Default for FrameBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl FrameBuilder {
    /// For a new epoch.
    pub fn new() -> Self {
        Self { open: BytesMut::new(), digest: PagesDigest::new(), pages: 0, frames: 0, frame_bytes: 0 }
    }

    /// Adds a page, detecting zero pages; gives a frame whenever one is full.
    #[must_use = "the frame must be sent"]
    pub fn push(&mut self, block: BlockIndex, page: PageIndex, content: Option<&PageData>) -> Option<Bytes> {
        let content = content.filter(|c| **c != ZERO_PAGE);
        if self.open.capacity() - self.open.len() < RECORD_HEADER_BYTES + PAGE_BYTES {
            self.open.reserve(limits::MAX_FRAME_BYTES);
        }
        let (codec, payload_bytes) = match content {
            None => (Codec::Zero, 0),
            Some(_) => (Codec::Raw, RAW_PAYLOAD_BYTES),
        };
        self.open.put_u64_le(page.get());
        self.open.put_u16_le(block.0);
        self.open.put_u16_le(codec as u16);
        self.open.put_u32_le(payload_bytes);
        if let Some(c) = content {
            self.open.put_slice(c);
        }
        self.digest.update(block, page, content);
        self.pages += 1;
        (self.open.len() >= limits::FRAME_TARGET_BYTES).then(|| self.close())
    }

    /// Ends the epoch: the last frame, if one is open, and the totals.
    #[must_use = "the last frame must be sent"]
    pub fn finish(mut self) -> (Option<Bytes>, FrameTotals) {
        let last = (!self.open.is_empty()).then(|| self.close());
        let totals = FrameTotals {
            frames: self.frames,
            pages: self.pages,
            frame_bytes: self.frame_bytes,
            digest: self.digest.finish(),
        };
        (last, totals)
    }

    fn close(&mut self) -> Bytes {
        self.frames += 1;
        self.frame_bytes += self.open.len() as u64;
        self.open.split().freeze()
    }
}

/// The records of a frame, checked one by one against the layout.
#[derive(Debug)]
pub struct FrameReader<'a> {
    rest: &'a [u8],
    layout: &'a MemoryLayout,
}

impl<'a> FrameReader<'a> {
    /// Reads `frame` of a guest with this layout.
    ///
    /// # Errors
    /// If the frame is longer than [`limits::MAX_FRAME_BYTES`].
    pub fn new(frame: &'a [u8], layout: &'a MemoryLayout) -> Result<Self, ProtocolError> {
        ProtocolError::check_len("frame bytes", frame.len() as u64, limits::MAX_FRAME_BYTES as u64)?;
        Ok(Self { rest: frame, layout })
    }

    fn record(&mut self) -> Result<PageRecord<'a>, ProtocolError> {
        let Some((head, rest)) = self.rest.split_first_chunk::<RECORD_HEADER_BYTES>() else {
            return Err(ProtocolError::Truncated {
                what: "page record header",
                needed: RECORD_HEADER_BYTES as u64,
                available: self.rest.len() as u64,
            });
        };
        let [i0, i1, i2, i3, i4, i5, i6, i7, b0, b1, c0, c1, l0, l1, l2, l3] = *head;
        let page = PageIndex::new(u64::from_le_bytes([i0, i1, i2, i3, i4, i5, i6, i7]));
        let block = BlockIndex(u16::from_le_bytes([b0, b1]));
        let codec = u16::from_le_bytes([c0, c1]);
        let payload_bytes = u32::from_le_bytes([l0, l1, l2, l3]);
        self.layout.check_page(block, page)?;
        let expected = match codec {
            c if c == Codec::Zero as u16 => 0,
            c if c == Codec::Raw as u16 => PAGE_BYTES,
            c => return Err(ProtocolError::invalid("page codec", format!("{c}, known are 0 and 1"))),
        };
        if payload_bytes as usize != expected {
            return Err(ProtocolError::invalid(
                "page payload bytes",
                format!("{payload_bytes} for codec {codec}, which takes {expected}"),
            ));
        }
        if expected == 0 {
            self.rest = rest;
            return Ok(PageRecord { block, page, content: None });
        }
        let Some((content, rest)) = rest.split_first_chunk::<PAGE_BYTES>() else {
            return Err(ProtocolError::Truncated {
                what: "page payload",
                needed: PAGE_BYTES as u64,
                available: rest.len() as u64,
            });
        };
        self.rest = rest;
        Ok(PageRecord { block, page, content: Some(content) })
    }
}

impl<'a> Iterator for FrameReader<'a> {
    type Item = Result<PageRecord<'a>, ProtocolError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let record = self.record();
        if record.is_err() {
            self.rest = &[];
        }
        Some(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::RamBlock;

    fn layout() -> MemoryLayout {
        let block = |name: &str, pages: u64| RamBlock { name: name.into(), used_bytes: pages * 4096 };
        MemoryLayout::new(vec![block("pc.ram", 512), block("pc.bios", 64)], vec![], 2).unwrap()
    }

    #[test]
    fn frames_give_back_the_pages_and_the_digest() {
        let mut builder = FrameBuilder::new();
        let pages: Vec<_> = (0..300u64)
            .map(|i| {
                let fill = u8::try_from(i % 7).unwrap();
                (BlockIndex(0), PageIndex::new(i), (fill != 0).then_some([fill; PAGE_BYTES]))
            })
            .collect();
        let mut frames: Vec<Bytes> =
            pages.iter().filter_map(|(b, p, c)| builder.push(*b, *p, c.as_ref())).collect();
        let (last, totals) = builder.finish();
        frames.extend(last);
        assert_eq!(totals.frames, frames.len() as u64);
        assert_eq!(totals.frame_bytes, frames.iter().map(|f| f.len() as u64).sum::<u64>());

        let layout = layout();
        let mut digest = PagesDigest::new();
        let mut got = vec![];
        for frame in &frames {
            for r in FrameReader::new(frame, &layout).unwrap() {
                let r = r.unwrap();
                digest.update(r.block, r.page, r.content);
                got.push((r.block, r.page, r.content.copied()));
            }
        }
        assert_eq!(digest.finish(), totals.digest);
        assert!(got == pages);
    }

    #[test]
    fn a_raw_page_of_zeros_becomes_a_zero_record() {
        let mut builder = FrameBuilder::new();
        assert!(builder.push(BlockIndex(1), PageIndex::new(3), Some(&ZERO_PAGE)).is_none());
        let (frame, totals) = builder.finish();
        assert_eq!(frame.unwrap().len(), RECORD_HEADER_BYTES);
        assert_eq!(totals.pages, 1);
    }

    #[test]
    fn bad_frames_are_refused_with_the_field_at_fault() {
        let layout = layout();
        let first_error = |bytes: &[u8]| {
            FrameReader::new(bytes, &layout).unwrap().find_map(Result::err).unwrap().to_string()
        };
        let record = |page: u64, block: u16, codec: u16, len: u32| {
            let mut v = page.to_le_bytes().to_vec();
            v.extend(block.to_le_bytes());
            v.extend(codec.to_le_bytes());
            v.extend(len.to_le_bytes());
            v
        };
        assert_eq!(first_error(&[0; 5]), "page record header is truncated: 16 bytes announced, 5 present");
        assert_eq!(
            first_error(&record(512, 0, 0, 0)),
            "page index is invalid: 0x200 in pc.ram, which has 0x200 pages"
        );
        assert_eq!(first_error(&record(0, 2, 0, 0)), "block index is invalid: 2, the layout has 2");
        assert_eq!(first_error(&record(0, 0, 9, 0)), "page codec is invalid: 9, known are 0 and 1");
        assert_eq!(
            first_error(&record(0, 0, 0, 1)),
            "page payload bytes is invalid: 1 for codec 0, which takes 0"
        );
        assert_eq!(
            first_error(&record(0, 0, 1, 4096)),
            "page payload is truncated: 4096 bytes announced, 0 present"
        );
        assert!(FrameReader::new(&vec![0; limits::MAX_FRAME_BYTES + 1], &layout).is_err());
    }
}
