//! Between capture and stream: frames of raw pages become frames of encoded ones, on a thread of its own, so that the
//! capture, which QEMU may be waiting for, never waits for an encoder.
//!
//! [`governor`] says how an epoch is encoded, [`cache`] has what differences are taken from, [`Recoder`] does it,
//! [`thread`] is the thread, `group` what other threads do for it. An epoch that is sent raw passes as it is: its frames are not even looked at.

pub mod cache;
mod encoder;
pub mod governor;
mod group;
pub mod thread;

pub use encoder::{Encoder, Encoding};

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use understudy_proto::ProtocolError;
use understudy_proto::codec::{self, CodecSet, PageEncoder};
use understudy_proto::epoch::EpochKind;
use understudy_proto::frame::{Codec, FrameBuilder, FrameReader, FrameTotals, RECORD_HEADER_BYTES, Record};
use understudy_proto::ids::{EpochId, Generation};
use understudy_proto::layout::MemoryLayout;
use understudy_proto::pool::Pool;
use understudy_proto::rpc::admin::EncodingReport;
use understudy_proto::units::{PAGE_BYTES, PageData};

use cache::{CacheCounters, Known, PageCache};
use governor::{Governor, Plan, Seen, Work};
use group::{Crew, Spent};

/// Frames that the cache may be behind: what they take is held twice.
const BEHIND_FRAMES: usize = 64;

/// How often the status hears why a plan stays.
const OUTLOOK_EPOCHS: u64 = 64;

/// How pages are encoded, as the operator wants it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Compress {
    /// As the governor finds worthwhile, of what both sides have agreed on.
    #[default]
    Auto,
    /// Never: zero pages and raw ones.
    Off,
    /// By every codec both sides have agreed on, worthwhile or not: for measurements.
    Always,
}

impl Compress {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Off => "off",
            Self::Always => "always",
        }
    }
}

/// What was encoded since the protection began.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes of frames as captured.
    pub raw_bytes: u64,
    /// Bytes of frames as sent.
    pub wire_bytes: u64,
    /// Pages by codec, in the order of [`Codec::ALL`], of epochs that did not pass as they were.
    pub pages: [u64; Codec::ALL.len()],
    /// Of the page cache.
    pub cache: CacheCounters,
    /// Bytes the page cache takes.
    pub cache_bytes: u64,
    /// The plan in use; empty before the first epoch.
    pub plan: &'static str,
    /// Why.
    pub reason: String,
}

impl Counters {
    /// For the status.
    pub fn report(&self, mode: Compress) -> EncodingReport {
        let pages: u64 = self.pages.iter().sum();
        let percent = |part: u64| part.saturating_mul(100).checked_div(pages).unwrap_or(0);
        let mix = Codec::ALL.iter().zip(self.pages).filter(|(_, pages)| *pages > 0);
        let mix: Vec<_> = mix.map(|(codec, part)| format!("{} {} %", codec.name(), percent(part))).collect();
        let report = EncodingReport {
            mode: mode.name().to_owned(),
            plan: self.plan.to_owned(),
            reason: self.reason.clone(),
            raw_bytes: self.raw_bytes,
            sent_bytes: self.wire_bytes,
            cache_bytes: self.cache_bytes,
            cache_hits: self.cache.hits,
            cache_misses: self.cache.misses,
            pages: mix.join(", "),
            ..EncodingReport::default()
        };
        report.with_rates()
    }
}

/// [`Counters`] as others see them.
pub type SharedCounters = Arc<Mutex<Counters>>;

/// What the stream measured of the epoch that was acknowledged last: its bytes, how long the link took for them, and when it was.
#[derive(Debug, Default)]
pub struct LinkMeter(Mutex<Option<(u64, Duration, Instant)>>);

impl LinkMeter {
    /// An epoch was acknowledged.
    pub fn set(&self, bytes: u64, time: Duration) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((bytes, time, Instant::now()));
    }

    pub(crate) fn take(&self) -> Option<(u64, Duration, Instant)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Encodes the epochs of one guest anew.
#[derive(Debug)]
pub struct Recoder {
    cache: PageCache,
    governor: Governor,
    encoder: PageEncoder,
    reader: FrameReader,
    /// Of the last full epoch.
    layout: Option<Arc<MemoryLayout>>,
    /// Frames of the epoch that went as they are, which the cache has yet to follow.
    behind: Vec<Bytes>,
    builder: FrameBuilder,
    seen: Option<Seen>,
    epochs: u64,
    epoch: OpenEpoch,
    link: Arc<LinkMeter>,
    counters: SharedCounters,
    crew: Crew,
}

/// The epoch at hand.
#[derive(Debug)]
struct OpenEpoch {
    plan: Plan,
    kind: EpochKind,
    /// When its first page came.
    began: Option<Instant>,
    known: Work,
    fresh: Work,
    zeros: Work,
    /// Of a trial: pages it is still made with. `None` if all are.
    trial: Option<u64>,
    /// Beside those: pages that went as they were.
    rest: Work,
    spent: Spent,
    raw_bytes: u64,
    pages: [u64; Codec::ALL.len()],
}

impl OpenEpoch {
    fn new(plan: Plan, kind: EpochKind) -> Self {
        let [known, fresh, zeros, rest] = [Work::default(); 4];
        let (spent, pages) = Default::default();
        Self { plan, kind, began: None, known, fresh, zeros, trial: None, rest, spent, raw_bytes: 0, pages }
    }

    /// Spent on the pages that were looked at, by all threads.
    fn time(&self) -> Duration {
        self.known.time + self.fresh.time + self.zeros.time
    }
}

impl Recoder {
    /// With a governor and a cache of at most so many bytes.
    pub fn new(
        governor: Governor,
        cache_bytes: usize,
        link: Arc<LinkMeter>,
        counters: SharedCounters,
    ) -> Self {
        Self {
            cache: PageCache::new(cache_bytes),
            governor,
            encoder: PageEncoder::new(),
            reader: FrameReader::new(),
            layout: None,
            behind: Vec::new(),
            builder: FrameBuilder::new(),
            seen: None,
            epochs: 0,
            epoch: OpenEpoch::new(Plan::Raw, EpochKind::Full),
            link,
            counters,
            crew: Crew::new(Pool::single()),
        }
    }

    /// With other threads to help with [`Recoder::frames`].
    #[must_use]
    pub fn with_pool(self, pool: Pool) -> Self {
        Self { governor: self.governor.with_threads(pool.threads()), crew: Crew::new(pool), ..self }
    }

    /// The layout of the guest from now on.
    pub fn layout(&mut self, layout: &MemoryLayout) {
        self.layout = Some(Arc::new(layout.clone()));
    }

    /// An epoch begins; the one before was acknowledged or given up. `spare_cpus` are those without work.
    pub fn begin(
        &mut self,
        generation: Generation,
        epoch: EpochId,
        kind: EpochKind,
        codecs: CodecSet,
        spare_cpus: f64,
    ) {
        self.settle();
        let transfer = self.link.take();
        if let Some(seen) = self.seen.take() {
            let whole = transfer.zip(self.epoch.began).map(|((.., answered), began)| answered - began);
            let transfer = transfer.map(|(bytes, time, _)| (bytes, time));
            let seen = Seen { transfer, whole, spare_cpus, ..seen };
            self.epochs = self.epochs.wrapping_add(1);
            if let Some(change) = self.governor.step(&seen, codecs) {
                tracing::info!(
                    from = change.from.name(),
                    to = change.to.name(),
                    why = change.reason,
                    "encoding"
                );
                let mut counters = self.counters.lock().unwrap_or_else(PoisonError::into_inner);
                (counters.plan, counters.reason) = (change.to.name(), change.reason);
            } else if self.epochs % OUTLOOK_EPOCHS == 1 {
                let mut counters = self.counters.lock().unwrap_or_else(PoisonError::into_inner);
                counters.reason = self.governor.outlook(codecs);
            }
        }
        let trial =
            self.governor.trial().filter(|(plan, _)| kind == EpochKind::Delta && plan.is_allowed(codecs));
        let mut plan = trial.map_or(self.governor.plan(), |(plan, _)| plan);
        if kind == EpochKind::Full {
            // It has nothing to refer to.
            plan = if matches!(plan, Plan::DeltaLz4 | Plan::DeltaBatch) { Plan::Lz4 } else { plan };
            plan = if plan == Plan::Delta { Plan::Raw } else { plan };
        }
        if !plan.is_allowed(codecs) {
            plan = Plan::Raw;
        }
        if plan.uses_cache() {
            self.cache.begin(generation, epoch, kind);
        } else {
            self.cache.release();
        }
        let builder =
            if plan == Plan::DeltaBatch { FrameBuilder::batched(codecs) } else { FrameBuilder::new() };
        self.builder = builder.again();
        self.epoch = OpenEpoch { trial: trial.map(|(_, pages)| pages), ..OpenEpoch::new(plan, kind) };
    }

    /// Has the cache follow what went as it is. It is done when the epoch is on its way, so that such an epoch takes no longer than
    /// one that nobody looks at: it is what others are compared with.
    pub fn settle(&mut self) {
        let Self { cache, reader, layout: Some(layout), behind, seen, .. } = self else { return };
        if seen.is_none() {
            // The epoch was given up before its end: the cache is not sealed, and forgets.
            behind.clear();
        }
        if !behind.is_empty() {
            // The same if what was said to be a frame is none.
            let followed = behind.drain(..).try_for_each(|frame| follow(&frame, layout, reader, cache));
            if followed.is_ok() {
                cache.seal();
            }
        }
    }

    /// Takes a frame of raw and zero pages; gives frames that are ready.
    ///
    /// # Errors
    /// If the frame is not what a capture makes: a fault of ours.
    pub fn frame(&mut self, frame: Bytes, out: &mut Vec<Bytes>) -> Result<(), ProtocolError> {
        let Self { cache, encoder, reader, builder, epoch, behind, .. } = self;
        epoch.began.get_or_insert_with(Instant::now);
        epoch.raw_bytes += frame.len() as u64;
        let (Some(layout), false) = (&self.layout, epoch.plan == Plan::Raw) else {
            epoch.fresh.pages += pages_of(&frame);
            epoch.fresh.bytes += frame.len() as u64;
            out.extend(builder.push_frame(frame, 0));
            return Ok(());
        };
        if epoch.trial == Some(0) {
            epoch.rest.pages += pages_of(&frame);
            epoch.rest.bytes += frame.len() as u64;
            if epoch.plan.uses_cache() {
                behind.push(frame.clone());
                if behind.len() > BEHIND_FRAMES {
                    behind.drain(..).try_for_each(|frame| follow(&frame, layout, reader, cache))?;
                }
            }
            out.extend(builder.push_frame(frame, 0));
            return Ok(());
        }
        let cached = epoch.plan.uses_cache();
        let lz4 = epoch.plan.compresses_pages();
        let mut before = Instant::now();
        reader.read(&frame, layout, |record| {
            let Record { block, page, .. } = record;
            let content: Option<&PageData> =
                (record.codec == Codec::Raw).then(|| record.payload.try_into()).transpose().map_err(
                    |_| ProtocolError::invalid("page payload bytes", record.payload.len().to_string()),
                )?;
            let known = match content {
                Some(_) if cached => cache.write(block, page),
                None if cached => {
                    cache.zero(block, page);
                    Known::Nothing
                }
                _ => Known::Nothing,
            };
            let (encoded, class, place) = match known {
                Known::Before(known) => {
                    (encoder.encode(content, Some(known), lz4), &mut epoch.known, Some(known))
                }
                Known::Place(place) => (encoder.encode(content, None, lz4), &mut epoch.fresh, Some(place)),
                Known::Nothing => {
                    let class = if content.is_some() { &mut epoch.fresh } else { &mut epoch.zeros };
                    (encoder.encode(content, None, lz4), class, None)
                }
            };
            out.extend(builder.push_encoded(block, page, content, encoded));
            epoch.pages[encoded.codec as usize] += 1;
            if let (Some(place), Some(content)) = (place, content) {
                match encoded.codec {
                    Codec::Unchanged => {}
                    // Touches what changed only.
                    Codec::Xbzrle => {
                        let Record { block, page, .. } = record;
                        codec::apply(
                            &Record { block, page, codec: encoded.codec, payload: encoded.payload },
                            place,
                        )?;
                    }
                    _ => *place = *content,
                }
            }
            if content.is_some() {
                epoch.trial = epoch.trial.map(|left| left.saturating_sub(1));
            }
            let now = Instant::now();
            class.pages += 1;
            class.bytes += (RECORD_HEADER_BYTES + encoded.payload.len()) as u64;
            class.time += now - before;
            before = now;
            Ok(())
        })
    }

    /// Ends the epoch that the capture made these totals of.
    pub fn finish(&mut self, raw: FrameTotals) -> (Option<Bytes>, FrameTotals) {
        let builder = std::mem::take(&mut self.builder);
        let (last, totals) = builder.finish_again(raw.digest);
        let totals = FrameTotals { pages: raw.pages, ..totals };
        let epoch = &mut self.epoch;
        if epoch.plan.uses_cache() && self.behind.is_empty() {
            self.cache.seal();
        }
        if epoch.plan == Plan::DeltaBatch {
            // What the batches saved is shared out by size.
            let before = epoch.known.bytes + epoch.fresh.bytes + epoch.zeros.bytes;
            let sent = totals.frame_bytes.saturating_sub(epoch.rest.bytes);
            for class in [&mut epoch.known, &mut epoch.fresh, &mut epoch.zeros] {
                class.bytes = class.bytes.saturating_mul(sent).checked_div(before).unwrap_or(0);
            }
        }
        if epoch.plan == Plan::Raw {
            // Nobody has looked at them.
            epoch.zeros.pages = raw.pages.saturating_sub(epoch.fresh.pages);
            epoch.zeros.bytes = epoch.zeros.pages * RECORD_HEADER_BYTES as u64;
        }
        // A full copy tells of the link, but its pages are not what deltas are like.
        let [known, fresh, zeros, rest] = match epoch.kind {
            EpochKind::Delta => [epoch.known, epoch.fresh, epoch.zeros, epoch.rest],
            EpochKind::Full => Default::default(),
        };
        let threads = epoch.spent.threads(epoch.time());
        let (plan, spare_cpus) = (epoch.plan, 0.0);
        self.seen =
            Some(Seen { plan, known, fresh, zeros, rest, threads, transfer: None, whole: None, spare_cpus });
        let mut counters = self.counters.lock().unwrap_or_else(PoisonError::into_inner);
        if counters.plan.is_empty() {
            counters.plan = self.governor.plan().name();
        }
        counters.raw_bytes += epoch.raw_bytes;
        counters.wire_bytes += totals.frame_bytes;
        counters.pages.iter_mut().zip(epoch.pages).for_each(|(sum, pages)| *sum += pages);
        counters.cache = self.cache.counters();
        counters.cache_bytes = self.cache.bytes() as u64;
        (last, totals)
    }
}

/// About how many pages with content a frame of raw pages has.
fn pages_of(frame: &Bytes) -> u64 {
    frame.len().div_ceil(RECORD_HEADER_BYTES + PAGE_BYTES) as u64
}

/// A frame went as it is: the cache follows where it holds one of its pages.
fn follow(
    frame: &Bytes,
    layout: &Arc<MemoryLayout>,
    reader: &mut FrameReader,
    cache: &mut PageCache,
) -> Result<(), ProtocolError> {
    reader.read(frame, layout, |record| {
        if let Some(held) = cache.held(record.block, record.page) {
            // A page of zeros has no content.
            *held = record.payload.try_into().unwrap_or([0; PAGE_BYTES]);
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests;
