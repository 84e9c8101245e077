//! Pages from frames.

use super::{Codec, RECORD_HEADER_BYTES};
use crate::layout::MemoryLayout;
use crate::units::{BlockIndex, PAGE_BYTES, PageIndex};
use crate::{ProtocolError, codec, limits};

/// A page out of a frame, still encoded; [`codec::decode`] gives its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// The block the page is in.
    pub block: BlockIndex,
    /// The page.
    pub page: PageIndex,
    /// How it is encoded; never a batch.
    pub codec: Codec,
    /// Its encoding, of a length the codec can have.
    pub payload: &'a [u8],
}

/// Reads frames, checking every record against the layout. Keeps the buffer that batches are unpacked into.
#[derive(Debug)]
pub struct FrameReader {
    batch: Box<[u8]>,
}

impl Default for FrameReader {
    fn default() -> Self {
        Self::new()
    }
}

impl FrameReader {
    /// A reader of any number of frames.
    pub fn new() -> Self {
        Self { batch: Box::default() }
    }

    /// Gives every record of the frame to `each`, in order.
    ///
    /// # Errors
    /// If the frame is longer than [`limits::MAX_FRAME_BYTES`], at the first record that is not valid, and at the first
    /// error of `each`. What was given before stays given.
    pub fn read<E: From<ProtocolError>>(
        &mut self,
        frame: &[u8],
        layout: &MemoryLayout,
        mut each: impl FnMut(Record<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        ProtocolError::check_len("frame bytes", frame.len() as u64, limits::MAX_FRAME_BYTES as u64)?;
        // Not by `units` and `records`, which take 22 ns instead of 8 for a record without payload.
        let mut rest = frame;
        while !rest.is_empty() {
            let (head, payload) = Header::read(&mut rest)?;
            if head.codec != Codec::Batch {
                each(head.record(payload, layout)?)?;
                continue;
            }
            let records = self.unpack(&head, payload)?;
            let mut inner = records;
            while !inner.is_empty() {
                let (head, payload) = Header::read(&mut inner)?;
                if head.codec == Codec::Batch {
                    return Err(ProtocolError::invalid("page codec", "5 within a batch").into());
                }
                each(head.record(payload, layout)?)?;
            }
        }
        Ok(())
    }

    fn unpack(&mut self, head: &Header, payload: &[u8]) -> Result<&[u8], ProtocolError> {
        let bytes = head.batch_bytes()?;
        if self.batch.is_empty() {
            self.batch = vec![0; limits::MAX_BATCH_BYTES].into();
        }
        let records = self.batch.get_mut(..bytes);
        let records = records.ok_or_else(|| ProtocolError::invalid("batch bytes", bytes.to_string()))?;
        unpack(payload, records)?;
        Ok(records)
    }
}

fn unpack(payload: &[u8], records: &mut [u8]) -> Result<(), ProtocolError> {
    codec::unpack_lz4(payload, records).map_err(|reason| ProtocolError::invalid("batch", format!("{reason}")))
}

/// A part of a frame.
#[derive(Debug, Clone, Copy)]
pub enum Unit<'a> {
    /// A page.
    Page(Record<'a>),
    /// Several, packed.
    Batch(Packed<'a>),
}

/// A batch as it is in a frame.
#[derive(Debug, Clone, Copy)]
pub struct Packed<'a> {
    records_bytes: usize,
    payload: &'a [u8],
}

impl Packed<'_> {
    /// Bytes of its records.
    pub fn records_bytes(&self) -> usize {
        self.records_bytes
    }

    /// Unpacks it; what [`records`] then reads is all there is in `into`.
    ///
    /// # Errors
    /// If it is not what was announced.
    pub fn unpack(&self, into: &mut Vec<u8>) -> Result<(), ProtocolError> {
        // What is longer was refused.
        into.resize(self.records_bytes, 0);
        unpack(self.payload, into)
    }
}

/// The parts of a frame in order, for who does not unpack batches one after the other: with [`records`] the same as
/// [`FrameReader::read`]. Ends with the first error.
pub fn units<'a>(
    frame: &'a [u8],
    layout: &'a MemoryLayout,
) -> impl Iterator<Item = Result<Unit<'a>, ProtocolError>> {
    let too_long =
        ProtocolError::check_len("frame bytes", frame.len() as u64, limits::MAX_FRAME_BYTES as u64).err();
    let rest = if too_long.is_some() { &[] } else { frame };
    too_long.map(Err).into_iter().chain(until_error(rest, move |head, payload| {
        if head.codec != Codec::Batch {
            return head.record(payload, layout).map(Unit::Page);
        }
        Ok(Unit::Batch(Packed { records_bytes: head.batch_bytes()?, payload }))
    }))
}

/// The pages of an unpacked batch in order. Ends with the first error.
pub fn records<'a>(
    batch: &'a [u8],
    layout: &'a MemoryLayout,
) -> impl Iterator<Item = Result<Record<'a>, ProtocolError>> {
    until_error(batch, move |head, payload| match head.codec {
        Codec::Batch => Err(ProtocolError::invalid("page codec", "5 within a batch")),
        _ => head.record(payload, layout),
    })
}

fn until_error<'a, T>(
    mut rest: &'a [u8],
    each: impl Fn(Header, &'a [u8]) -> Result<T, ProtocolError>,
) -> impl Iterator<Item = Result<T, ProtocolError>> {
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let item = Header::read(&mut rest).and_then(|(head, payload)| each(head, payload));
        if item.is_err() {
            rest = &[];
        }
        Some(item)
    })
}

struct Header {
    page: u64,
    block: u16,
    codec: Codec,
}

impl Header {
    /// The next header and its payload.
    fn read<'a>(rest: &mut &'a [u8]) -> Result<(Self, &'a [u8]), ProtocolError> {
        let Some((head, behind)) = rest.split_first_chunk::<RECORD_HEADER_BYTES>() else {
            return Err(ProtocolError::Truncated {
                what: "page record header",
                needed: RECORD_HEADER_BYTES as u64,
                available: rest.len() as u64,
            });
        };
        let [i0, i1, i2, i3, i4, i5, i6, i7, b0, b1, c0, c1, l0, l1, l2, l3] = *head;
        let number = u16::from_le_bytes([c0, c1]);
        let Some(codec) = Codec::from_number(number) else {
            let last = Codec::ALL.len() - 1;
            return Err(ProtocolError::invalid("page codec", format!("{number}, known are 0 to {last}")));
        };
        let payload_bytes = u32::from_le_bytes([l0, l1, l2, l3]);
        let (from, to) = match codec {
            Codec::Zero | Codec::Unchanged => (0, 0),
            Codec::Raw => (PAGE_BYTES, PAGE_BYTES),
            Codec::Xbzrle | Codec::Lz4 => (1, PAGE_BYTES - 1),
            Codec::Batch => (1, limits::MAX_BATCH_BYTES - 1),
        };
        let payload_bytes = usize::try_from(payload_bytes)
            .ok()
            .filter(|bytes| (from..=to).contains(bytes))
            .ok_or_else(|| {
            let takes = if from == to { from.to_string() } else { format!("{from} to {to}") };
            let reason = format!("{payload_bytes} for codec {number}, which takes {takes}");
            ProtocolError::invalid("page payload bytes", reason)
        })?;
        let Some((payload, behind)) = behind.split_at_checked(payload_bytes) else {
            return Err(ProtocolError::Truncated {
                what: "page payload",
                needed: payload_bytes as u64,
                available: behind.len() as u64,
            });
        };
        *rest = behind;
        let page = u64::from_le_bytes([i0, i1, i2, i3, i4, i5, i6, i7]);
        Ok((Self { page, block: u16::from_le_bytes([b0, b1]), codec }, payload))
    }

    /// Bytes of a batch's records.
    fn batch_bytes(&self) -> Result<usize, ProtocolError> {
        let bytes = ProtocolError::check_len("batch bytes", self.page, limits::MAX_BATCH_BYTES as u64)?;
        if self.block != 0 {
            let reason = format!("{} of a batch, which has 0", self.block);
            return Err(ProtocolError::invalid("block index", reason));
        }
        usize::try_from(bytes).map_err(|_| ProtocolError::invalid("batch bytes", bytes.to_string()))
    }

    fn record<'a>(&self, payload: &'a [u8], layout: &MemoryLayout) -> Result<Record<'a>, ProtocolError> {
        let (block, page) = (BlockIndex(self.block), PageIndex::new(self.page));
        layout.check_page(block, page)?;
        Ok(Record { block, page, codec: self.codec, payload })
    }
}
