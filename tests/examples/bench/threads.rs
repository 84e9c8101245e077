//! What a second thread brings: epochs encoded, verified and applied by one thread and by two, in turn, so that a busy machine
//! slows both alike. Ratios are of the two measurements of a round.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use understudy_backup::assembly::{Assembly, Attempt};
use understudy_backup::decode::Crew;
use understudy_backup::image::{AnonymousMemory, Image};
use understudy_primary::encode::Recoder;
use understudy_primary::encode::governor::{Governor, Plan};
use understudy_proto::codec::CodecSet;
use understudy_proto::digest::Digest;
use understudy_proto::epoch::{EpochKind, EpochManifest};
use understudy_proto::frame::FrameTotals;
use understudy_proto::ids::{EpochId, Generation};
use understudy_proto::layout::{MemoryLayout, RamBlock};
use understudy_proto::pool::Pool;
use understudy_proto::rpc::epoch::{Begin, Seed};
use understudy_proto::units::PAGE_BYTES;

use crate::Report;
use crate::trace::{Epochs, GUEST_PAGES, Maker, Pages, Trace};
use crate::wire::captured;

const CODECS: CodecSet = CodecSet { xbzrle: true, lz4: true };
/// Those of the second way.
const THREADS: usize = 2;
/// An epoch that no thread is to be woken for, or not to its harm.
const SMALL_PAGES: usize = 200;
const DELTA_PAGES: usize = 4000;

/// What is measured: its plan, its kind, its pages, and how much a second thread must bring at least.
const CASES: [(&str, Plan, EpochKind, usize, Option<f64>, Option<f64>); 6] = [
    ("full, raw", Plan::Raw, EpochKind::Full, usize::MAX, None, None),
    ("full, LZ4", Plan::Lz4, EpochKind::Full, usize::MAX, Some(1.5), Some(1.2)),
    ("delta, LZ4", Plan::Lz4, EpochKind::Delta, DELTA_PAGES, Some(1.5), Some(1.2)),
    ("delta, batches", Plan::DeltaBatch, EpochKind::Delta, DELTA_PAGES, Some(1.2), None),
    ("small delta, batches", Plan::DeltaBatch, EpochKind::Delta, SMALL_PAGES, None, None),
    ("small delta, LZ4", Plan::Lz4, EpochKind::Delta, SMALL_PAGES, None, None),
];

pub(crate) fn run(report: &mut Report, rounds: usize) -> anyhow::Result<()> {
    for (name, plan, kind, count, encode_goal, decode_goal) in CASES {
        let small = count == SMALL_PAGES;
        let measured = measure(plan, kind, count, if small { rounds * 10 } else { rounds })?;
        for (what, measured, goal) in
            [("encode", &measured.encode, encode_goal), ("verify and apply", &measured.decode, decode_goal)]
        {
            if plan == Plan::Raw && what == "encode" {
                continue;
            }
            let name = format!("{name}, {what}");
            for (threads, times) in [1, THREADS].iter().zip(measured) {
                let speed = times.iter().map(|time| measured_pages(kind, count) / time.as_secs_f64() / 1e3);
                report.row(&name, &format!("{threads} threads"), "1000 pages/s", speed.collect());
            }
            let [one, two] = measured;
            let ratio = one.iter().zip(two).map(|(one, two)| one.as_secs_f64() / two.as_secs_f64());
            let ratio = report.row(&name, "2 threads / 1", "ratio", ratio.collect());
            if let Some(goal) = goal {
                report.at_least(&format!("{name}, speed of 2 threads by that of 1"), goal, ratio);
            }
            if small {
                report.at_most(&format!("{name}, time of 2 threads by that of 1"), 1.05, 1.0 / ratio);
            }
        }
    }
    Ok(())
}

fn measured_pages(kind: EpochKind, count: usize) -> f64 {
    let all = usize::try_from(GUEST_PAGES).unwrap_or(usize::MAX);
    if kind == EpochKind::Full { all as f64 } else { count.min(all) as f64 }
}

#[derive(Default)]
struct Measured {
    encode: [Vec<Duration>; 2],
    decode: [Vec<Duration>; 2],
}

/// From captured frames to an image, by so many threads.
struct Way {
    recoder: Recoder,
    crew: Crew,
    image: Option<Arc<Image>>,
    seed: Arc<Seed>,
    epoch: u64,
}

fn measure(plan: Plan, kind: EpochKind, count: usize, rounds: usize) -> anyhow::Result<Measured> {
    let mut maker = Maker::new(Trace::Database, 0x5eed);
    let (mut ways, mut measured) = ([Way::new(plan, 1)?, Way::new(plan, THREADS)?], Measured::default());
    let all = maker.all();
    for way in &mut ways {
        way.epoch(EpochKind::Full, &all)?;
    }
    for round in 0..rounds + 2 {
        let pages = match kind {
            EpochKind::Full => all.clone(),
            EpochKind::Delta => rewritten(&mut maker, count),
        };
        // Who is first finds other caches.
        for at in [round % 2, 1 - round % 2] {
            let [encode, decode] = ways[at].epoch(kind, &pages)?;
            if round >= 2 {
                measured.encode[at].push(encode);
                measured.decode[at].push(decode);
            }
        }
    }
    Ok(measured)
}

/// So many pages with rows changed.
fn rewritten(maker: &mut Maker, count: usize) -> Pages {
    maker.epoch();
    let mut pages = maker.all();
    pages.truncate(count);
    for (number, page) in &mut pages {
        page[100..200].iter_mut().zip(1..).for_each(|(byte, salt)| *byte ^= salt);
        page[2000..2008].copy_from_slice(&number.to_le_bytes());
    }
    pages
}

impl Way {
    fn new(plan: Plan, threads: usize) -> anyhow::Result<Self> {
        let block = RamBlock { name: "pc.ram".into(), used_bytes: GUEST_PAGES * PAGE_BYTES as u64 };
        let layout = MemoryLayout::new(vec![block], vec![], 2)?;
        let pool = |name| Pool::new(name, threads).map_err(anyhow::Error::msg);
        let recoder = Recoder::new(Governor::fixed(plan), 128 << 20, Arc::default(), Arc::default());
        let mut recoder = recoder.with_pool(pool("encode")?);
        recoder.layout(&layout);
        let seed = Arc::new(Seed { layout, domain_xml: String::new() });
        Ok(Self { recoder, crew: Crew::new(pool("decode")?), image: None, seed, epoch: 0 })
    }

    /// Time to encode, and to verify and apply.
    fn epoch(&mut self, kind: EpochKind, pages: &Pages) -> anyhow::Result<[Duration; 2]> {
        self.epoch += 1;
        let (raw, totals) = captured(pages);
        let began = Instant::now();
        let (frames, totals) = self.encode(kind, &raw, totals)?;
        let encoded = began.elapsed();
        let began = Instant::now();
        self.decode(kind, &frames, totals)?;
        Ok([encoded, began.elapsed()])
    }

    /// As if all of it waited.
    fn encode(
        &mut self,
        kind: EpochKind,
        raw: &[Bytes],
        totals: FrameTotals,
    ) -> anyhow::Result<(Vec<Bytes>, FrameTotals)> {
        self.recoder.begin(Generation(1), EpochId(self.epoch), kind, CODECS, 1.0);
        let mut frames = Vec::new();
        for group in raw.chunks(self.recoder.group_frames()) {
            self.recoder.frames(group, &mut frames)?;
        }
        let (last, totals) = self.recoder.finish(totals);
        frames.extend(last);
        Ok((frames, totals))
    }

    fn decode(&mut self, kind: EpochKind, frames: &[Bytes], totals: FrameTotals) -> anyhow::Result<()> {
        let (generation, epoch) = (Generation(1), EpochId(self.epoch));
        let begin = Begin { generation, epoch, kind };
        let fault = |fault: understudy_backup::assembly::Fault| anyhow::anyhow!("{}", fault.text);
        let seed = Arc::clone(&self.seed);
        let mut assembly = match kind {
            EpochKind::Full => Assembly::full(Attempt(1), begin, seed, &AnonymousMemory).map_err(fault)?,
            EpochKind::Delta => {
                let image = self.image.as_ref().context("no image")?;
                Assembly::delta(Attempt(1), begin, Arc::clone(image.seed()))
            }
        };
        for group in frames.chunks(self.crew.group_frames()) {
            assembly.frames(group, self.image.as_deref(), &mut self.crew).map_err(fault)?;
        }
        assembly.device(b"device");
        let manifest = EpochManifest {
            generation,
            epoch,
            kind,
            frames: totals.frames,
            pages: totals.pages,
            frame_bytes: totals.frame_bytes,
            pages_digest: totals.digest,
            device_bytes: 6,
            device_digest: Digest::of(b"device"),
        };
        let (verified, _) = assembly.verify(&manifest).map_err(fault)?;
        verified.apply_by(&mut self.image, &mut self.crew).map_err(anyhow::Error::msg)
    }
}
