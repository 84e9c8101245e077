//! The least a checkpoint can take here: how long one keeps the micro-VM stopped. A floor to compare QEMU's stop with.
//!
//! `cargo run --release -p understudy-primary --example micro_stop -- [CHECKPOINTS] [PAGES,PAGES,...]`

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use understudy_primary::capture::micro::{DirtyTracking, MicroSource, MicroVm, Shape, unusable};
use understudy_primary::capture::{CaptureTimings, CheckpointSource, PageSink, SinkClosed};
use understudy_proto::layout::MemoryLayout;
use understudy_proto::units::{BlockIndex, PageData, PageIndex};

/// How long the guest runs between two checkpoints: long enough to dirty all its pages again.
const EPOCH: Duration = Duration::from_millis(25);
/// Checkpoints before the measured ones.
const WARM_UP: usize = 10;

fn main() -> anyhow::Result<()> {
    if let Some(reason) = unusable() {
        println!("skipped: {reason}");
        return Ok(());
    }
    let mut arguments = std::env::args().skip(1);
    let checkpoints: usize = arguments.next().map_or(Ok(200), |n| n.parse()).context("CHECKPOINTS")?;
    let pages = arguments.next().unwrap_or_else(|| "0,1000,4000".to_owned());
    ensure!(checkpoints > 0, "no checkpoints wanted");
    println!(
        "pages  tracking        |  n    dirty | stopped ms: median    p99 | of it until stopped ms: median    p99"
    );
    for pages in pages.split(',') {
        for tracking in [DirtyTracking::Log, DirtyTracking::ManualProtect, DirtyTracking::Ring] {
            measure(pages.parse().context("PAGES")?, tracking, checkpoints)?;
        }
    }
    Ok(())
}

/// Takes pages as the replication does at least: it looks at them.
struct Sink;

impl PageSink for Sink {
    fn layout(&mut self, _: &std::sync::Arc<MemoryLayout>) -> Result<(), SinkClosed> {
        Ok(())
    }

    fn page(&mut self, _: BlockIndex, _: PageIndex, content: Option<&PageData>) -> Result<(), SinkClosed> {
        std::hint::black_box(content);
        Ok(())
    }
}

fn measure(written_pages: u64, tracking: DirtyTracking, checkpoints: usize) -> anyhow::Result<()> {
    let shape = Shape { pages: written_pages.max(1), written_pages, rounds_per_report: 1, tracking };
    let vm = MicroVm::create(&shape)?;
    if vm.tracking() != tracking {
        println!("{written_pages:5}  {tracking:14} | this KVM has none");
        return Ok(());
    }
    vm.run()?;
    let mut source = MicroSource::new(vm)?;
    source.arm(&mut Sink)?;
    source.start()?;
    let (mut stops, mut untils, mut dirty) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..WARM_UP + checkpoints {
        let until = Instant::now() + EPOCH;
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
        source.wait_ready()?;
        let checkpoint = source.checkpoint(&mut || Ok(()), &mut Sink)?;
        if round >= WARM_UP {
            let CaptureTimings { stop, transfer, .. } = checkpoint.timings;
            stops.push(stop + transfer);
            untils.push(stop);
            dirty.push(checkpoint.pages);
        }
    }
    let (stop_50, stop_99) = quantiles(&mut stops);
    let (until_50, until_99) = quantiles(&mut untils);
    dirty.sort_unstable();
    let dirty = dirty.get(dirty.len() / 2).copied().unwrap_or_default();
    println!(
        "{written_pages:5}  {:14} | {checkpoints:3} {dirty:7} | {stop_50:18.3} {stop_99:6.3} | {until_50:30.3} {until_99:6.3}",
        tracking.to_string()
    );
    Ok(())
}

/// Median and 99th percentile, ms.
fn quantiles(values: &mut [Duration]) -> (f64, f64) {
    values.sort_unstable();
    let at = |percent: usize| {
        let rank = (values.len() * percent).div_ceil(100).saturating_sub(1);
        values.get(rank).map_or(f64::NAN, |value| value.as_secs_f64() * 1e3)
    };
    (at(50), at(99))
}
