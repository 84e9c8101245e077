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

/// Those of the second way.
const THREADS: usize = 2;
const SMALL_PAGES: usize = 200;
const DELTA_PAGES: usize = 4000;
#[allow(clippy::cast_possible_truncation, reason = "a few thousand")]
const ALL_PAGES: usize = GUEST_PAGES as usize;

/// What is measured, and what a second thread must bring.
struct Case {
    name: &'static str,
    plan: Plan,
    kind: EpochKind,
    pages: usize,
    /// Of the page cache: without it every page is new.
    cache_bytes: usize,
    goal: Goal,
}

#[derive(PartialEq)]
enum Goal {
    None,
    /// So many times the speed of encoding.
    Faster(f64),
    /// No thread is to be woken for it, or not to its harm.
    NotSlower,
}

const CASES: [Case; 8] = {
    const fn case(name: &'static str, plan: Plan, kind: EpochKind, pages: usize, goal: Goal) -> Case {
        Case { name, plan, kind, pages, cache_bytes: 128 << 20, goal }
    }
    [
        case("full, raw", Plan::Raw, EpochKind::Full, ALL_PAGES, Goal::None),
        case("full, LZ4", Plan::Lz4, EpochKind::Full, ALL_PAGES, Goal::Faster(1.5)),
        case("delta, raw", Plan::Raw, EpochKind::Delta, DELTA_PAGES, Goal::None),
        case("delta, LZ4", Plan::Lz4, EpochKind::Delta, DELTA_PAGES, Goal::Faster(1.5)),
        Case {
            cache_bytes: 0,
            ..case("delta, batches, new", Plan::DeltaBatch, EpochKind::Delta, DELTA_PAGES, Goal::Faster(1.3))
        },
        case("delta, batches, known", Plan::DeltaBatch, EpochKind::Delta, DELTA_PAGES, Goal::None),
        case("small, batches, known", Plan::DeltaBatch, EpochKind::Delta, SMALL_PAGES, Goal::NotSlower),
        case("small, LZ4", Plan::Lz4, EpochKind::Delta, SMALL_PAGES, Goal::NotSlower),
    ]
};

pub(crate) fn run(report: &mut Report, rounds: usize) -> anyhow::Result<()> {
    for case in CASES {
        let is_small = case.goal == Goal::NotSlower;
        let measured = measure(&case, if is_small { rounds * 10 } else { rounds })?;
        if is_small {
            let whole = [0, 1].map(|way| {
                let [encode, verify, apply] =
                    [&measured.encode, &measured.verify, &measured.apply].map(|times| times[way].iter());
                let times = encode.zip(verify).zip(apply).map(|((one, two), three)| *one + *two + *three);
                let times = times.map(|time| time.as_secs_f64() * 1e6).collect();
                report.row(case.name, &format!("whole, threads: {}", [1, THREADS][way]), "us", times)
            });
            let [one, two] = whole;
            report.at_most(&format!("{}, time of 2 threads by that of 1", case.name), 1.05, two / one);
        }
        for (what, times) in
            [("encode", measured.encode), ("verify", measured.verify), ("apply", measured.apply)]
        {
            // Nothing is done, or next to nothing.
            if (case.plan, what) == (Plan::Raw, "encode") || (case.kind, what) == (EpochKind::Full, "apply") {
                continue;
            }
            let name = format!("{}, {what}", case.name);
            for (threads, times) in [1, THREADS].iter().zip(&times) {
                let speed = times.iter().map(|time| case.pages as f64 / time.as_secs_f64() / 1e3);
                report.row(&name, &format!("threads: {threads}"), "1000 pages/s", speed.collect());
            }
            let [one, two] = times;
            let ratio = one.iter().zip(two).map(|(one, two)| one.as_secs_f64() / two.as_secs_f64());
            let ratio = report.row(&name, "speed of 2 by that of 1", "ratio", ratio.collect());
            if let (Goal::Faster(least), "encode") = (&case.goal, what) {
                report.at_least(&format!("{name}, speed of 2 threads by that of 1"), *least, ratio);
            }
        }
    }
    Ok(())
}

#[derive(Default)]
struct Measured {
    encode: [Vec<Duration>; 2],
    verify: [Vec<Duration>; 2],
    apply: [Vec<Duration>; 2],
}

/// From captured frames to an image, by so many threads.
struct Way {
    recoder: Recoder,
    crew: Crew,
    image: Option<Arc<Image>>,
    seed: Arc<Seed>,
    epoch: u64,
}

fn measure(case: &Case, rounds: usize) -> anyhow::Result<Measured> {
    let mut maker = Maker::new(Trace::Database, 0x5eed);
    let (mut ways, mut measured) = ([Way::new(case, 1)?, Way::new(case, THREADS)?], Measured::default());
    let all = maker.all();
    for way in &mut ways {
        way.epoch(EpochKind::Full, &all)?;
    }
    for round in 0..rounds + 2 {
        let pages = match case.kind {
            EpochKind::Full => all.clone(),
            EpochKind::Delta => rewritten(&mut maker, case.pages),
        };
        // Who is first finds other caches.
        for at in [round % 2, 1 - round % 2] {
            let [encode, verify, apply] = ways[at].epoch(case.kind, &pages)?;
            if round >= 2 {
                measured.encode[at].push(encode);
                measured.verify[at].push(verify);
                measured.apply[at].push(apply);
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
    fn new(case: &Case, threads: usize) -> anyhow::Result<Self> {
        let block = RamBlock { name: "pc.ram".into(), used_bytes: GUEST_PAGES * PAGE_BYTES as u64 };
        let layout = MemoryLayout::new(vec![block], vec![], 2)?;
        let pool = |name| Pool::new(name, threads).map_err(anyhow::Error::msg);
        let recoder =
            Recoder::new(Governor::fixed(case.plan), case.cache_bytes, Arc::default(), Arc::default());
        let mut recoder = recoder.with_pool(pool("encode")?);
        recoder.layout(&layout);
        let seed = Arc::new(Seed { layout, domain_xml: String::new() });
        Ok(Self { recoder, crew: Crew::new(pool("decode")?), image: None, seed, epoch: 0 })
    }

    /// Time to encode, to verify, and to apply.
    fn epoch(&mut self, kind: EpochKind, pages: &Pages) -> anyhow::Result<[Duration; 3]> {
        self.epoch += 1;
        let (raw, totals) = captured(pages);
        let began = Instant::now();
        let (frames, totals) = self.encode(kind, &raw, totals)?;
        let encoded = began.elapsed();
        let [verified, applied] = self.decode(kind, &frames, totals)?;
        Ok([encoded, verified, applied])
    }

    /// As if all of it waited.
    fn encode(
        &mut self,
        kind: EpochKind,
        raw: &[Bytes],
        totals: FrameTotals,
    ) -> anyhow::Result<(Vec<Bytes>, FrameTotals)> {
        self.recoder.begin(Generation(1), EpochId(self.epoch), kind, CodecSet::ALL, 1.0);
        let mut frames = Vec::new();
        for group in raw.chunks(self.recoder.group_frames()) {
            self.recoder.frames(group, &mut frames)?;
        }
        let (last, totals) = self.recoder.finish(totals);
        frames.extend(last);
        Ok((frames, totals))
    }

    fn decode(
        &mut self,
        kind: EpochKind,
        frames: &[Bytes],
        totals: FrameTotals,
    ) -> anyhow::Result<[Duration; 2]> {
        let began = Instant::now();
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
        let manifest = EpochManifest::new(generation, epoch, kind, &totals, b"device");
        let (verified, _) = assembly.verify(&manifest).map_err(fault)?;
        let (verifying, began) = (began.elapsed(), Instant::now());
        verified.apply_by(&mut self.image, &mut self.crew).map_err(anyhow::Error::msg)?;
        Ok([verifying, began.elapsed()])
    }
}
