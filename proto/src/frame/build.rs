//! Frames from pages.

use super::{Codec, RECORD_HEADER_BYTES};
use crate::codec::{CodecSet, Encoded, Lz4};
use crate::digest::{Digest, PagesDigest};
use crate::limits;
use crate::units::{BlockIndex, PAGE_BYTES, PageData, PageIndex, ZERO_PAGE};
use bytes::{BufMut, Bytes, BytesMut};

/// Builds the frames of one epoch: every page is copied once, into the buffer that is sent.
#[derive(Debug)]
pub struct FrameBuilder {
    open: BytesMut,
    /// The open batch, if records go into batches.
    batch: Option<Batch>,
    /// `None` if the pages were digested before.
    digest: Option<PagesDigest>,
    pages: u64,
    frames: u64,
    frame_bytes: u64,
}

#[derive(Debug)]
struct Batch {
    records: Vec<u8>,
    /// Of records, at most.
    most_bytes: usize,
    lz4: Lz4,
}

/// Batches of an epoch that are full and not compressed yet, so that several threads may compress them. Keeps its buffers.
#[derive(Debug, Default)]
pub struct Batches {
    full: Vec<FullBatch>,
    spare: Vec<FullBatch>,
}

/// A batch that is full.
#[derive(Debug, Default)]
pub struct FullBatch {
    records: Vec<u8>,
    lz4: Vec<u8>,
    pays: bool,
}

impl Batch {
    /// Whether another page might be too much.
    fn is_full(&self) -> bool {
        self.records.len() + RECORD_HEADER_BYTES + PAGE_BYTES > self.most_bytes
    }
}

impl Batches {
    /// To be compressed.
    pub fn full_mut(&mut self) -> &mut [FullBatch] {
        &mut self.full
    }
}

impl FullBatch {
    /// Compresses it, if that makes it shorter.
    pub fn compress(&mut self, lz4: &mut Lz4) {
        let Self { records, lz4: out, pays } = self;
        out.clear();
        out.extend_from_slice(compressed(lz4, records).unwrap_or_default());
        *pays = !out.is_empty();
    }
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
        Self {
            open: BytesMut::new(),
            batch: None,
            digest: Some(PagesDigest::new()),
            pages: 0,
            frames: 0,
            frame_bytes: 0,
        }
    }

    /// For a new epoch whose records go into batches, as long as `codecs` allow. LZ4 must be among them.
    pub fn batched(codecs: CodecSet) -> Self {
        let most_bytes = codecs.batch_bytes();
        let records = Vec::with_capacity(most_bytes);
        Self { batch: Some(Batch { records, most_bytes, lz4: Lz4::new() }), ..Self::new() }
    }

    /// Adds a page, detecting zero pages; gives a frame whenever one is full.
    #[must_use = "the frame must be sent"]
    pub fn push(&mut self, block: BlockIndex, page: PageIndex, content: Option<&PageData>) -> Option<Bytes> {
        let content = content.filter(|c| **c != ZERO_PAGE);
        let encoded = match content {
            None => Encoded { codec: Codec::Zero, payload: &[] },
            Some(content) => Encoded { codec: Codec::Raw, payload: content },
        };
        self.push_encoded(block, page, content, encoded)
    }

    /// Adds a page that is `content` (`None` if zeros) and was encoded by [`crate::codec::PageEncoder`]; gives a frame
    /// whenever one is full.
    #[must_use = "the frame must be sent"]
    pub fn push_encoded(
        &mut self,
        block: BlockIndex,
        page: PageIndex,
        content: Option<&PageData>,
        encoded: Encoded<'_>,
    ) -> Option<Bytes> {
        self.put(block, page, content, encoded);
        if self.batch.as_ref().is_some_and(Batch::is_full) {
            self.close_batch();
        }
        self.close_if_full()
    }

    /// [`FrameBuilder::push_encoded`], but batches that are full go into `batches` and not into the frame. Whatever is
    /// pushed next but this, or ends the epoch, comes behind [`FrameBuilder::push_batches`].
    #[must_use = "the frame must be sent"]
    pub fn push_uncompressed(
        &mut self,
        block: BlockIndex,
        page: PageIndex,
        content: Option<&PageData>,
        encoded: Encoded<'_>,
        batches: &mut Batches,
    ) -> Option<Bytes> {
        self.put(block, page, content, encoded);
        if let Some(batch) = self.batch.as_mut().filter(|batch| batch.is_full()) {
            let mut full = batches.spare.pop().unwrap_or_default();
            full.records.clear();
            full.records.reserve(batch.most_bytes);
            std::mem::swap(&mut full.records, &mut batch.records);
            batches.full.push(full);
        }
        self.close_if_full()
    }

    /// Adds batches that were compressed, in order; gives the frames that are full.
    pub fn push_batches(&mut self, batches: &mut Batches, out: &mut Vec<Bytes>) {
        let Batches { full, spare } = batches;
        for batch in full.drain(..) {
            put_batch(&mut self.open, &batch.records, batch.pays.then_some(&batch.lz4));
            spare.push(batch);
            out.extend(self.close_if_full());
        }
    }

    /// Ends the epoch: the last frame, if one is open, and the totals.
    #[must_use = "the last frame must be sent"]
    pub fn finish(mut self) -> (Option<Bytes>, FrameTotals) {
        self.close_batch();
        let last = (!self.open.is_empty()).then(|| self.close());
        let totals = FrameTotals {
            frames: self.frames,
            pages: self.pages,
            frame_bytes: self.frame_bytes,
            digest: self.digest.take().unwrap_or_default().finish(),
        };
        (last, totals)
    }

    /// For pages that are encoded anew: they have been digested, so this digests nothing. See
    /// [`FrameBuilder::finish_again`].
    #[must_use]
    pub fn again(self) -> Self {
        Self { digest: None, ..self }
    }

    /// [`FrameBuilder::finish`] for pages whose digest is known from before.
    #[must_use = "the last frame must be sent"]
    pub fn finish_again(self, digest: Digest) -> (Option<Bytes>, FrameTotals) {
        let (last, totals) = self.finish();
        (last, FrameTotals { digest, ..totals })
    }

    /// Adds a frame as it is, behind what was added before: the frames that are ready now, in order.
    #[must_use = "the frames must be sent"]
    pub fn push_frame(&mut self, frame: Bytes, pages: u64) -> impl Iterator<Item = Bytes> + use<> {
        self.close_batch();
        let open = (!self.open.is_empty()).then(|| self.close());
        self.frames += 1;
        self.frame_bytes += frame.len() as u64;
        self.pages += pages;
        open.into_iter().chain([frame])
    }

    /// Compresses the open batch into the open frame; as plain records if that is not shorter.
    fn close_batch(&mut self) {
        let Some(batch) = self.batch.as_mut().filter(|batch| !batch.records.is_empty()) else { return };
        put_batch(&mut self.open, &batch.records, compressed(&mut batch.lz4, &batch.records));
        batch.records.clear();
    }

    /// Counts and digests a page, and adds its record to the batch or the frame that is open.
    fn put(&mut self, block: BlockIndex, page: PageIndex, content: Option<&PageData>, encoded: Encoded<'_>) {
        let Encoded { codec, payload } = encoded;
        // A page of zeros is digested as such, whatever form it came in.
        if let Some(digest) = &mut self.digest {
            digest.update(block, page, content.filter(|_| codec != Codec::Zero));
        }
        self.pages += 1;
        match &mut self.batch {
            Some(batch) => put_record(&mut batch.records, page.get(), block.0, codec, payload),
            None => {
                make_room(&mut self.open, payload.len());
                put_record(&mut self.open, page.get(), block.0, codec, payload);
            }
        }
    }

    fn close_if_full(&mut self) -> Option<Bytes> {
        (self.open.len() >= limits::FRAME_TARGET_BYTES).then(|| self.close())
    }

    fn close(&mut self) -> Bytes {
        self.frames += 1;
        self.frame_bytes += self.open.len() as u64;
        self.open.split().freeze()
    }
}

/// What a batch becomes, if that is shorter.
fn compressed<'a>(lz4: &'a mut Lz4, records: &[u8]) -> Option<&'a [u8]> {
    lz4.compress(records).filter(|lz4| lz4.len() + RECORD_HEADER_BYTES < records.len())
}

/// Adds a batch; as plain records without `lz4`.
fn put_batch(open: &mut BytesMut, records: &[u8], lz4: Option<impl AsRef<[u8]>>) {
    match lz4 {
        Some(payload) => {
            make_room(open, payload.as_ref().len());
            put_record(open, records.len() as u64, 0, Codec::Batch, payload.as_ref());
        }
        None => {
            make_room(open, records.len());
            open.put_slice(records);
        }
    }
}

/// Bytes that a frame is begun with: the target, and a record that goes beyond it, if that is no long batch.
const ROOM_BYTES: usize = limits::FRAME_TARGET_BYTES + (64 << 10);

fn make_room(open: &mut BytesMut, payload_bytes: usize) {
    let needed = RECORD_HEADER_BYTES + payload_bytes;
    if open.capacity() - open.len() < needed {
        open.reserve(needed.max(ROOM_BYTES));
    }
}

fn put_record(out: &mut impl BufMut, page: u64, block: u16, codec: Codec, payload: &[u8]) {
    out.put_u64_le(page);
    out.put_u16_le(block);
    out.put_u16_le(codec as u16);
    // No payload is longer than a batch.
    out.put_u32_le(u32::try_from(payload.len()).unwrap_or(u32::MAX));
    out.put_slice(payload);
}
