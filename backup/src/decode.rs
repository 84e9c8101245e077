//! Decoding by several threads, a few frames at a time: batches are unpacked and pages decoded side by side, and everything
//! else comes in the order of the records, so that what is verified and what is said against it is what one thread says.

use crate::image::Image;
use bytes::Bytes;
use understudy_proto::ProtocolError;
use understudy_proto::codec;
use understudy_proto::frame::{Codec, Packed, Record, Unit, records, units};
use understudy_proto::layout::MemoryLayout;
use understudy_proto::pool::Pool;
use understudy_proto::units::{PAGE_BYTES, PageData};

/// Frames that are taken at once, where so many wait.
const GROUP_FRAMES: usize = 32;

/// Bytes of frames that are worth waking a thread for: a small epoch has fewer.
const MIN_GROUP_BYTES: usize = 1 << 20;

/// Bytes of records that are held at once; what must be unpacked is held beside its frame, and may be of very many pages.
const GROUP_BYTES: usize = 8 << 20;
const UNPACKED_PART: usize = 4;

/// Records that are applied at once.
const GROUP_RECORDS: usize = 8192;

/// Pages that are held decoded at once: few enough to be in a cache still when they are digested.
const DECODED_PAGES: usize = 256;

/// Pages a thread takes at once.
const PIECE_PAGES: usize = 16;

/// Threads that decode, and their buffers.
#[derive(Debug)]
pub struct Crew {
    pub(crate) pool: Pool,
    /// A nothing for each thread.
    threads: Vec<()>,
    unpacked: Vec<Unpacked>,
    decoded: Decoded,
    min_bytes: usize,
}

/// A batch and what is wrong with it.
#[derive(Debug, Default)]
struct Unpacked {
    records: Vec<u8>,
    error: Option<ProtocolError>,
}

/// Two pieces of an epoch: one is decoded while the other is digested.
#[derive(Debug, Default)]
pub(crate) struct Decoded([Contents; 2]);

/// Pages, where they are not what the records or the image have.
#[derive(Debug, Default)]
struct Contents {
    pages: Vec<PageData>,
    errors: Vec<Option<ProtocolError>>,
}

/// Whether a record is decoded into a place of its own.
fn is_work(record: &Record<'_>) -> bool {
    matches!(record.codec, Codec::Xbzrle | Codec::Lz4)
}

impl Crew {
    /// With these threads.
    pub fn new(pool: Pool) -> Self {
        let threads = vec![(); pool.threads()];
        Self { pool, threads, unpacked: Vec::new(), decoded: Decoded::default(), min_bytes: MIN_GROUP_BYTES }
    }

    /// One that helps with whatever there is.
    #[cfg(test)]
    pub(crate) fn eager(pool: Pool) -> Self {
        Self { min_bytes: 0, ..Self::new(pool) }
    }

    /// Frames that are to be given at once, if so many wait.
    pub fn group_frames(&self) -> usize {
        if self.pool.threads() > 1 { GROUP_FRAMES } else { 1 }
    }

    /// Whether these frames are to be decoded by several threads. Raw pages are not: what is done with them comes in order.
    pub(crate) fn decodes(&self, frames: &[Bytes], layout: &MemoryLayout) -> bool {
        let is_work = |unit: Result<Unit<'_>, ProtocolError>| match unit {
            Ok(Unit::Page(record)) => is_work(&record),
            Ok(Unit::Batch(_)) => true,
            Err(_) => false,
        };
        // An epoch that is encoded shows it at once.
        let seen = frames.first().map(|frame| units(frame, layout).take(PIECE_PAGES).any(is_work));
        self.applies(frames) && seen == Some(true)
    }

    /// Whether these frames are to be written into an image by several threads.
    pub(crate) fn applies(&self, frames: &[Bytes]) -> bool {
        self.pool.threads() > 1 && frames.iter().map(Bytes::len).sum::<usize>() >= self.min_bytes
    }

    /// Gives the records of all frames to `each`, in order, some at a time.
    ///
    /// # Errors
    /// At the first record that is not valid, when those before it were given; and what `each` says.
    pub(crate) fn read(
        &mut self,
        frames: &[Bytes],
        layout: &MemoryLayout,
        mut each: impl FnMut(&[Record<'_>], &Pool, &mut Decoded) -> Result<(), ProtocolError>,
    ) -> Result<(), ProtocolError> {
        let (mut parts, mut bytes, mut fault) = (Vec::new(), 0, None);
        for unit in frames.iter().flat_map(|frame| units(frame, layout)) {
            match unit {
                Ok(unit) => {
                    bytes += match unit {
                        Unit::Page(record) => record.payload.len() + size_of::<Unit<'_>>(),
                        Unit::Batch(batch) => batch.records_bytes() * UNPACKED_PART,
                    };
                    parts.push(unit);
                }
                Err(error) => {
                    fault = Some(error);
                    break;
                }
            }
            if bytes >= GROUP_BYTES {
                self.unpack(&parts, layout, &mut each)?;
                parts.clear();
                bytes = 0;
            }
        }
        self.unpack(&parts, layout, &mut each)?;
        fault.map_or(Ok(()), Err)
    }

    fn unpack(
        &mut self,
        parts: &[Unit<'_>],
        layout: &MemoryLayout,
        each: &mut impl FnMut(&[Record<'_>], &Pool, &mut Decoded) -> Result<(), ProtocolError>,
    ) -> Result<(), ProtocolError> {
        let Self { pool, threads, unpacked, decoded, .. } = self;
        let batches = parts.iter().filter_map(|unit| match unit {
            Unit::Page(_) => None,
            Unit::Batch(batch) => Some(*batch),
        });
        let batches: Vec<Packed<'_>> = batches.collect();
        if unpacked.len() < batches.len() {
            unpacked.resize_with(batches.len(), Unpacked::default);
        }
        pool.share(threads, batches.iter().zip(&mut *unpacked), |(), (batch, unpacked)| {
            unpacked.error = batch.unpack(&mut unpacked.records).err();
        });
        let (mut unpacked, mut flat) = (unpacked.iter_mut(), Vec::with_capacity(parts.len()));
        let mut flatten = || {
            for part in parts {
                match part {
                    Unit::Page(record) => flat.push(*record),
                    Unit::Batch(_) => {
                        let Some(Unpacked { records: batch, error }) = unpacked.next() else { break };
                        error.take().map_or(Ok(()), Err)?;
                        records(batch, layout)
                            .try_for_each(|record| record.map(|record| flat.push(record)))?;
                    }
                }
            }
            Ok(())
        };
        let whole: Result<(), ProtocolError> = flatten();
        flat.chunks(GROUP_RECORDS).try_for_each(|records| each(records, pool, decoded))?;
        whole
    }
}

impl Decoded {
    /// Decodes records over `before`, and gives each with its content, `None` for zeros, to `take`, in order.
    ///
    /// # Errors
    /// At the first record that does not decode, and what `take` says.
    pub(crate) fn decode(
        &mut self,
        records: &[Record<'_>],
        pool: &Pool,
        before: Option<&Image>,
        mut take: impl FnMut(&Record<'_>, Option<&PageData>) -> Result<(), ProtocolError>,
    ) -> Result<(), ProtocolError> {
        let [next, done] = &mut self.0;
        let before_of = |record: &Record<'_>| before.and_then(|image| image.page(record.block, record.page));
        let mut threads = vec![(); pool.threads()];
        let mut scratch = [0; PAGE_BYTES];
        let mut behind: &[Record<'_>] = &[];
        for records in records.chunks(DECODED_PAGES).chain([&[][..]]) {
            next.pages.resize(DECODED_PAGES, [0; PAGE_BYTES]);
            next.errors.resize(DECODED_PAGES, None);
            let pieces = records.chunks(PIECE_PAGES).zip(next.pages.chunks_mut(PIECE_PAGES));
            let pieces = pieces.zip(next.errors.chunks_mut(PIECE_PAGES));
            let decode =
                |(): &mut (), ((records, pages), errors): ((&[Record<'_>], &mut [PageData]), &mut [_])| {
                    let work = records.iter().zip(pages).zip(errors);
                    for ((record, page), error) in work.filter(|((record, _), _)| is_work(record)) {
                        *error = codec::decode(record, before_of(record), page).err();
                    }
                };
            pool.share_beside(&mut threads, pieces, decode, || {
                behind.iter().enumerate().try_for_each(|(at, record)| {
                    if !is_work(record) {
                        return take(record, codec::decode(record, before_of(record), &mut scratch)?);
                    }
                    done.errors.get_mut(at).and_then(Option::take).map_or(Ok(()), Err)?;
                    take(record, done.pages.get(at))
                })
            })?;
            std::mem::swap(next, done);
            behind = records;
        }
        Ok(())
    }
}
