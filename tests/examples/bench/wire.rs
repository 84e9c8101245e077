//! Bytes of recorded and generated epochs on the wire, by plan of the governor, and what encoding and decoding a page takes.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bytes::Bytes;
use understudy_backup::image::{AnonymousMemory, Image};
use understudy_primary::encode::Recoder;
use understudy_primary::encode::governor::{Governor, Plan};
use understudy_proto::ProtocolError;
use understudy_proto::codec::CodecSet;
use understudy_proto::epoch::EpochKind;
use understudy_proto::frame::{FrameBuilder, FrameReader};
use understudy_proto::ids::{EpochId, Generation};
use understudy_proto::layout::{MemoryLayout, RamBlock};
use understudy_proto::rpc::epoch::Seed;
use understudy_proto::units::{BlockIndex, PAGE_BYTES, PageIndex};

use crate::Report;
use crate::recorded::Recorded;
use crate::trace::{Epochs, Maker, Pages, Trace};

/// Epochs before the measured ones: the cache fills.
const WARM_UP: u64 = 10;
/// The same of recorded ones, which are few.
const RECORDED_WARM_UP: u64 = 2;

/// What is recorded, and the part of raw that it may take at most.
pub(crate) const RECORDED: [(&str, Option<f64>); 5] = [
    ("idle", Some(1.0 / 20.0)),
    ("redis", Some(1.0 / 6.0)),
    ("sqlite", Some(1.0 / 6.0)),
    ("gcc", None),
    ("gzip", None),
];

pub(crate) fn run(epochs: u64, traces: &Path) -> anyhow::Result<Report> {
    let mut report = Report::new("wire", format!("cargo xtask bench wire -- --epochs {epochs}"));
    for (name, goal) in RECORDED {
        let file = traces.join(format!("{name}.trace.gz"));
        if !file.is_file() {
            println!("{name}: not recorded, {} is missing", file.display());
            continue;
        }
        let trace = Recorded::read(&file)?;
        let count = (trace.epochs.len() as u64).saturating_sub(RECORDED_WARM_UP);
        ensure!(count > 0, "{} has {RECORDED_WARM_UP} epochs or less", file.display());
        let name = format!("{name}, recorded");
        let best = plans(&mut report, &name, RECORDED_WARM_UP, count, &|| Box::new(trace.clone()))?;
        if let Some(goal) = goal {
            report.at_most(&format!("{name}, part of raw"), goal, best);
        }
    }
    for trace in Trace::ALL {
        let maker = || -> Box<dyn Epochs> { Box::new(Maker::new(trace, 0x5eed)) };
        let best = plans(&mut report, trace.name(), WARM_UP, epochs, &maker)?;
        match trace {
            Trace::Idle => report.at_most("idle, part of raw", 1.0 / 20.0, best),
            Trace::Database => report.at_most("database, part of raw", 1.0 / 6.0, best),
            Trace::Random => {
                let worst = measure(&mut *maker(), Plan::DeltaBatch, WARM_UP, epochs)?.size;
                report.at_most("random, part of raw", 1.01, worst.into_iter().fold(0.0, f64::max));
            }
            Trace::Updates | Trace::Zeros => {}
        }
    }
    Ok(report)
}

/// Every plan over the same epochs; gives the least part of raw that all of them together took.
fn plans(
    report: &mut Report,
    name: &str,
    warm_up: u64,
    epochs: u64,
    source: &dyn Fn() -> Box<dyn Epochs>,
) -> anyhow::Result<f64> {
    let mut best = f64::INFINITY;
    for plan in Plan::ALL {
        let measured = measure(&mut *source(), plan, warm_up, epochs)
            .with_context(|| format!("{name} by {}", plan.name()))?;
        let subject = if plan == Plan::Raw { "raw" } else { plan.name() };
        best = best.min(measured.bytes as f64 / measured.raw_bytes.max(1) as f64);
        report.row(name, subject, "of raw", measured.size);
        report.row(name, subject, "us to encode a page", measured.encode_us);
        report.row(name, subject, "us to apply a page", measured.apply_us);
    }
    Ok(best)
}

#[derive(Default)]
struct Measured {
    size: Vec<f64>,
    bytes: u64,
    raw_bytes: u64,
    encode_us: Vec<f64>,
    apply_us: Vec<f64>,
}

fn measure(maker: &mut dyn Epochs, plan: Plan, warm_up: u64, epochs: u64) -> anyhow::Result<Measured> {
    let block = RamBlock { name: "pc.ram".into(), used_bytes: maker.guest_pages() * PAGE_BYTES as u64 };
    let layout = MemoryLayout::new(vec![block], vec![], 2)?;
    let seed = Arc::new(Seed { layout: layout.clone(), domain_xml: String::new() });
    let mut image = Image::new(seed, &AnonymousMemory)?;
    let mut recoder = Recoder::new(Governor::fixed(plan), 128 << 20, Arc::default(), Arc::default());
    recoder.layout(&layout);
    let mut reader = FrameReader::new();
    let mut measured = Measured::default();
    for number in 0..warm_up + epochs {
        let (kind, pages) = match number {
            0 => (EpochKind::Full, maker.all()),
            _ => (EpochKind::Delta, maker.epoch()),
        };
        let (raw, totals) = captured(&pages);
        let began = Instant::now();
        recoder.begin(Generation(1), EpochId(number + 1), kind, CodecSet::ALL, 1.0);
        let (mut frames, raw_bytes) = (Vec::new(), totals.frame_bytes);
        for frame in raw {
            recoder.frame(frame, &mut frames)?;
        }
        let (last, totals) = recoder.finish(totals);
        frames.extend(last);
        let encoded = began.elapsed();
        let began = Instant::now();
        for frame in &frames {
            reader.read::<ProtocolError>(frame, &layout, |record| image.apply(&record))?;
        }
        let applied = began.elapsed();
        anyhow::ensure!(
            pages.iter().all(|(page, content)| {
                image.page(BlockIndex(0), PageIndex::new(*page)) == Some(&**content)
            }),
            "epoch {number} is not what it was"
        );
        if number >= warm_up && !pages.is_empty() {
            measured.bytes += totals.frame_bytes;
            measured.raw_bytes += raw_bytes;
            let each = |time: Duration| time.as_secs_f64() * 1e6 / pages.len() as f64;
            measured.size.push(totals.frame_bytes as f64 / raw_bytes as f64);
            measured.encode_us.push(each(encoded));
            measured.apply_us.push(each(applied));
        }
    }
    Ok(measured)
}

pub(crate) fn captured(pages: &Pages) -> (Vec<Bytes>, understudy_proto::frame::FrameTotals) {
    let mut builder = FrameBuilder::new();
    let frame =
        |(page, content): &(u64, Box<_>)| builder.push(BlockIndex(0), PageIndex::new(*page), Some(content));
    let mut frames: Vec<_> = pages.iter().filter_map(frame).collect();
    let (last, totals) = builder.finish();
    frames.extend(last);
    (frames, totals)
}
