//! Encoding by several threads: a few frames at a time, with the very bytes that one thread makes of them.
//!
//! What depends on the order is done in order, by the guest's thread: the pages of the group are looked up in the cache, then
//! encoded side by side over the cache as the group found it, then put into frames and into the cache. That a page is encoded
//! before an earlier one of the group is put into the cache changes nothing: what is *known* has not been written since the
//! epoch began, and everything else is encoded without what was there. Batches are filled in order, compressed side by side,
//! and put into frames in order.

use std::ops::Range;
use std::time::{Duration, Instant};

use bytes::Bytes;
use understudy_proto::ProtocolError;
use understudy_proto::codec::{self, Encoded, Lz4, PageEncoder};
use understudy_proto::frame::{Batches, Codec, RECORD_HEADER_BYTES, Record, Unit, units};
use understudy_proto::limits::FRAME_TARGET_BYTES;
use understudy_proto::pool::Pool;
use understudy_proto::units::{PAGE_BYTES, PageData};

use super::cache::{Lookup, PageCache};
use super::governor::Plan;
use super::{OpenEpoch, Recoder};

/// Frames that are taken at once, where so many wait.
const GROUP_FRAMES: usize = 16;

/// Bytes of a group that is worth waking a thread for, under each plan. What waits for an encoder that keeps up is less.
fn min_group_bytes(plan: Plan) -> usize {
    match plan {
        Plan::Lz4 => 3 * FRAME_TARGET_BYTES / 2,
        // Known pages take as long as one thread's waking up and the other's waiting for it, others much longer.
        Plan::DeltaLz4 | Plan::DeltaBatch => 7 * FRAME_TARGET_BYTES,
        Plan::Raw | Plan::Delta => usize::MAX,
    }
}

/// Pages of a group; zero pages are many to a frame.
const GROUP_PAGES: usize = 1024;

/// Pages a thread takes at once.
const PIECE_PAGES: usize = 16;

/// What several threads need for it.
#[derive(Debug)]
pub(super) struct Crew {
    pool: Pool,
    benches: Vec<Bench>,
    batches: Batches,
    min_group_bytes: fn(Plan) -> usize,
}

/// What a thread needs for it.
#[derive(Debug)]
struct Bench {
    number: usize,
    encoder: PageEncoder,
    lz4: Lz4,
    /// Payloads of the group.
    payloads: Vec<u8>,
    /// Time spent on its batches.
    batches: Duration,
}

/// A page of the group.
struct Page<'a> {
    record: Record<'a>,
    /// `None`: zeros.
    content: Option<&'a PageData>,
    lookup: Lookup,
    codec: Codec,
    bench: usize,
    payload: Range<usize>,
    time: Duration,
}

/// Of what was done by groups in an epoch: time of all threads, and time that passed.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Spent {
    work: Duration,
    passed: Duration,
}

impl Spent {
    /// How many threads worked at a time, in an epoch whose pages took `work` altogether.
    pub(super) fn threads(&self, work: Duration) -> f64 {
        let passed = (work.saturating_sub(self.work) + self.passed).as_secs_f64();
        if passed > 0.0 { work.as_secs_f64() / passed } else { 1.0 }
    }
}

impl Crew {
    pub(super) fn new(pool: Pool) -> Self {
        let bench = |number| Bench {
            number,
            encoder: PageEncoder::new(),
            lz4: Lz4::new(),
            payloads: Vec::new(),
            batches: Duration::ZERO,
        };
        let benches = if pool.threads() > 1 { (0..pool.threads()).map(bench).collect() } else { Vec::new() };
        Self { pool, benches, batches: Batches::default(), min_group_bytes }
    }

    /// One that helps with whatever there is.
    #[cfg(test)]
    pub(super) fn eager(self) -> Self {
        Self { min_group_bytes: |plan| if plan == Plan::Raw { usize::MAX } else { 0 }, ..self }
    }

    pub(super) fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Whether these frames are to be encoded by several threads.
    fn takes(&self, frames: &[Bytes], plan: Plan) -> bool {
        self.threads() > 1 && frames.iter().map(Bytes::len).sum::<usize>() >= (self.min_group_bytes)(plan)
    }
}

impl Bench {
    fn encode(&mut self, pages: &mut [Page<'_>], cache: &PageCache, lz4: bool) {
        let mut before = Instant::now();
        for page in pages {
            let known = match page.lookup {
                Lookup::Before(at) => cache.content(at),
                _ => None,
            };
            let encoded = self.encoder.encode(page.content, known, lz4);
            (page.codec, page.bench) = (encoded.codec, self.number);
            if encoded.codec != Codec::Raw {
                let start = self.payloads.len();
                self.payloads.extend_from_slice(encoded.payload);
                page.payload = start..self.payloads.len();
            }
            let now = Instant::now();
            page.time = now - before;
            before = now;
        }
    }
}

impl Recoder {
    /// Frames that [`Recoder::frames`] is to be given at once, if so many wait.
    pub fn group_frames(&self) -> usize {
        if self.crew.threads() > 1 { GROUP_FRAMES } else { 1 }
    }

    /// [`Recoder::frame`] for several frames, by several threads if they are worth it.
    ///
    /// # Errors
    /// If a frame is not what a capture makes: a fault of ours.
    pub fn frames(&mut self, frames: &[Bytes], out: &mut Vec<Bytes>) -> Result<(), ProtocolError> {
        let takes = self.crew.takes(frames, self.epoch.plan);
        let Some(layout) = self.layout.clone().filter(|_| takes) else {
            return frames.iter().try_for_each(|frame| self.frame(frame.clone(), out));
        };
        let cached = self.epoch.plan.uses_cache();
        let mut pages = Vec::with_capacity(GROUP_PAGES);
        let mut began = Instant::now();
        self.epoch.began.get_or_insert(began);
        for frame in frames {
            if self.epoch.trial == Some(0) {
                self.group(&mut pages, began, out)?;
                self.frame(frame.clone(), out)?;
                began = Instant::now();
                continue;
            }
            self.epoch.raw_bytes += frame.len() as u64;
            for unit in units(frame, &layout) {
                let Unit::Page(record) = unit? else {
                    return Err(ProtocolError::invalid("page codec", "a batch was captured"));
                };
                let content = match record.codec {
                    Codec::Raw => Some(record.payload.try_into().map_err(|_| {
                        let bytes = record.payload.len().to_string();
                        ProtocolError::invalid("page payload bytes", bytes)
                    })?),
                    _ => None,
                };
                let lookup = match content {
                    Some(_) if cached => self.cache.look_up(record.block, record.page),
                    None if cached => self.cache.look_up_held(record.block, record.page),
                    _ => Lookup::Nothing,
                };
                if content.is_some() {
                    self.epoch.trial = self.epoch.trial.map(|left| left.saturating_sub(1));
                }
                let (codec, payload, time) = (Codec::Zero, 0..0, Duration::ZERO);
                pages.push(Page { record, content, lookup, codec, bench: 0, payload, time });
                if pages.len() == GROUP_PAGES {
                    self.group(&mut pages, began, out)?;
                    began = Instant::now();
                }
            }
        }
        self.group(&mut pages, began, out)
    }

    /// Encodes pages that were looked up, and empties the list of them.
    fn group(
        &mut self,
        pages: &mut Vec<Page<'_>>,
        began: Instant,
        out: &mut Vec<Bytes>,
    ) -> Result<(), ProtocolError> {
        let Self { cache, builder, epoch, crew: Crew { pool, benches, batches, .. }, .. } = self;
        for bench in &mut *benches {
            bench.payloads.clear();
            bench.batches = Duration::ZERO;
        }
        let (lz4, from) = (epoch.plan.compresses_pages(), &*cache);
        let mut in_order = began.elapsed();
        pool.share(benches, pages.chunks_mut(PIECE_PAGES), |bench, pages| bench.encode(pages, from, lz4));
        let again = Instant::now();
        for page in &*pages {
            let payload = match (page.codec, page.content) {
                (Codec::Raw, Some(content)) => &content[..],
                _ => benches
                    .get(page.bench)
                    .and_then(|bench| bench.payloads.get(page.payload.clone()))
                    .unwrap_or_default(),
            };
            let Record { block, page: number, .. } = page.record;
            let encoded = Encoded { codec: page.codec, payload };
            out.extend(builder.push_uncompressed(block, number, page.content, encoded, batches));
            if let Some(place) = page.lookup.place().and_then(|at| cache.content_mut(at)) {
                match (page.codec, page.content) {
                    (_, None) => place.fill(0),
                    (Codec::Unchanged, _) => {}
                    (codec @ Codec::Xbzrle, _) => {
                        codec::apply(&Record { codec, payload, ..page.record }, place)?;
                    }
                    (_, Some(content)) => *place = *content,
                }
            }
        }
        in_order += again.elapsed();
        pool.share(benches, batches.full_mut().iter_mut(), |bench, batch| {
            let began = Instant::now();
            batch.compress(&mut bench.lz4);
            bench.batches += began.elapsed();
        });
        let again = Instant::now();
        builder.push_batches(batches, out);
        in_order += again.elapsed();
        let compressing = benches.iter().map(|bench| bench.batches).sum();
        account(epoch, pages, in_order, compressing, began);
        pages.clear();
        Ok(())
    }
}

/// Adds what a group took. What was done for all of it is shared out: what was in order by pages, compressing by bytes.
fn account(
    epoch: &mut OpenEpoch,
    pages: &[Page<'_>],
    in_order: Duration,
    compressing: Duration,
    began: Instant,
) {
    let bytes = |page: &Page<'_>| {
        let payload = if page.codec == Codec::Raw { PAGE_BYTES } else { page.payload.len() };
        (RECORD_HEADER_BYTES + payload) as u64
    };
    for page in pages {
        epoch.pages[page.codec as usize] += 1;
    }
    let all_bytes: u64 = pages.iter().map(bytes).sum();
    if pages.is_empty() {
        return;
    }
    let each = in_order / u32::try_from(pages.len()).unwrap_or(u32::MAX);
    let each_byte = compressing.as_secs_f64() / all_bytes as f64;
    let before = epoch.time();
    for page in pages {
        let class = match (page.content, page.lookup) {
            (None, _) => &mut epoch.zeros,
            (_, Lookup::Before(_)) => &mut epoch.known,
            _ => &mut epoch.fresh,
        };
        class.pages += 1;
        class.bytes += bytes(page);
        class.time += page.time + each + Duration::from_secs_f64(each_byte * bytes(page) as f64);
    }
    epoch.spent.work += epoch.time() - before;
    epoch.spent.passed += began.elapsed();
}
