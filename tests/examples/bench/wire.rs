//! Bytes of generated epochs on the wire, by plan of the governor, and what encoding and decoding a page takes.

use std::sync::Arc;
use std::time::{Duration, Instant};

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
use crate::trace::{GUEST_PAGES, Maker, Pages, Trace};

/// Epochs before the measured ones: the cache fills.
const WARM_UP: u64 = 10;
const CODECS: CodecSet = CodecSet { xbzrle: true, lz4: true };

pub(crate) fn run(epochs: u64) -> anyhow::Result<Report> {
    let mut report = Report::new("wire", format!("cargo xtask bench wire -- --epochs {epochs}"));
    for trace in Trace::ALL {
        let mut best = f64::INFINITY;
        for plan in Plan::ALL {
            let measured = measure(trace, plan, epochs)?;
            let subject = if plan == Plan::Raw { "raw" } else { plan.name() };
            let size = report.row(trace.name(), subject, "of raw", measured.size);
            report.row(trace.name(), subject, "us to encode a page", measured.encode_us);
            report.row(trace.name(), subject, "us to apply a page", measured.apply_us);
            best = best.min(size);
        }
        match trace {
            Trace::Idle => report.at_most("idle, part of raw", 1.0 / 20.0, best),
            Trace::Database => report.at_most("database, part of raw", 1.0 / 6.0, best),
            Trace::Random => {
                let worst = measure(trace, Plan::DeltaBatch, epochs)?.size;
                report.at_most("random, part of raw", 1.01, worst.into_iter().fold(0.0, f64::max));
            }
            Trace::Updates | Trace::Zeros => {}
        }
    }
    Ok(report)
}

#[derive(Default)]
struct Measured {
    size: Vec<f64>,
    encode_us: Vec<f64>,
    apply_us: Vec<f64>,
}

fn measure(trace: Trace, plan: Plan, epochs: u64) -> anyhow::Result<Measured> {
    let block = RamBlock { name: "pc.ram".into(), used_bytes: GUEST_PAGES * PAGE_BYTES as u64 };
    let layout = MemoryLayout::new(vec![block], vec![], 2)?;
    let seed = Arc::new(Seed { layout: layout.clone(), domain_xml: String::new() });
    let mut image = Image::new(seed, &AnonymousMemory)?;
    let mut recoder = Recoder::new(Governor::fixed(plan), 128 << 20, Arc::default(), Arc::default());
    recoder.layout(&layout);
    let mut maker = Maker::new(trace, 0x5eed);
    let mut reader = FrameReader::new();
    let mut measured = Measured::default();
    for number in 0..WARM_UP + epochs {
        let (kind, pages) = match number {
            0 => (EpochKind::Full, maker.all()),
            _ => (EpochKind::Delta, maker.epoch()),
        };
        let (raw, totals) = captured(&pages);
        let began = Instant::now();
        recoder.begin(Generation(1), EpochId(number + 1), kind, CODECS, 1.0);
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
            "{} by {}: epoch {number} is not what it was",
            trace.name(),
            plan.name()
        );
        if number >= WARM_UP {
            let each = |time: Duration| time.as_secs_f64() * 1e6 / pages.len() as f64;
            measured.size.push(totals.frame_bytes as f64 / raw_bytes as f64);
            measured.encode_us.push(each(encoded));
            measured.apply_us.push(each(applied));
        }
    }
    Ok(measured)
}

fn captured(pages: &Pages) -> (Vec<Bytes>, understudy_proto::frame::FrameTotals) {
    let mut builder = FrameBuilder::new();
    let frame =
        |(page, content): &(u64, Box<_>)| builder.push(BlockIndex(0), PageIndex::new(*page), Some(content));
    let mut frames: Vec<_> = pages.iter().filter_map(frame).collect();
    let (last, totals) = builder.finish();
    frames.extend(last);
    (frames, totals)
}
