//! How long a checkpoint keeps the guest stopped: from STOP to RESUME by QEMU's own clock, for idle guests and busy
//! ones, early and late acknowledgement, socket buffers and checkpoint delays.
//!
//! `cargo run --release -p understudy-primary --example capture_stop -- [CHECKPOINTS] [PAGES,PAGES,...]`

#[path = "../tests/support/mod.rs"]
mod support;

use std::time::Duration;

use anyhow::{Context, ensure};
use support::{Guest, Image, skip_reason};
use understudy_primary::capture::{Acknowledge, CheckpointSource, ColoOptions, ColoSource};

/// How long the guest runs between two checkpoints.
const EPOCH: Duration = Duration::from_millis(25);
/// Checkpoints before the measured ones.
const WARM_UP: usize = 10;

fn main() -> anyhow::Result<()> {
    if let Some(reason) = skip_reason() {
        println!("skipped: {reason}");
        return Ok(());
    }
    let mut arguments = std::env::args().skip(1);
    let checkpoints: usize = arguments.next().map_or(Ok(200), |n| n.parse()).context("CHECKPOINTS")?;
    let pages = arguments.next().unwrap_or_else(|| "0,1000,4000".to_owned());
    ensure!(checkpoints > 0, "no checkpoints wanted");

    println!(
        "pages  acknowledge  buffer  delay |  n    dirty | STOP-RESUME ms: median    p99 | transfer ms: median    p99"
    );
    for pages in pages.split(',') {
        let guest = Guest::start("pc", pages.parse().context("PAGES")?, &[])?;
        for (acknowledge, buffer, delay) in [
            (Acknowledge::Late, None, 5),
            (Acknowledge::Late, Some(32 << 20), 5),
            (Acknowledge::Early, None, 5),
            (Acknowledge::Early, Some(4 << 20), 5),
            (Acknowledge::Early, Some(32 << 20), 1),
            (Acknowledge::Early, Some(32 << 20), 5),
            (Acknowledge::Early, Some(32 << 20), 20),
        ] {
            measure(&guest, pages, acknowledge, buffer, delay, checkpoints)?;
        }
    }
    Ok(())
}

fn measure(
    guest: &Guest,
    pages: &str,
    acknowledge: Acknowledge,
    buffer: Option<usize>,
    delay: u64,
    checkpoints: usize,
) -> anyhow::Result<()> {
    let options = ColoOptions {
        acknowledge,
        socket_buffer_bytes: buffer,
        checkpoint_delay: Duration::from_millis(delay),
        ..ColoOptions::default()
    };
    let mut source = ColoSource::new(guest.monitor.clone(), options)?;
    let mut image = Image::default();
    source.arm(&mut image)?;
    source.start()?;
    let (mut dirty, mut transfers) = (Vec::new(), Vec::new());
    for n in 0..WARM_UP + checkpoints {
        source.wait_ready()?;
        std::thread::sleep(EPOCH);
        let checkpoint = source.checkpoint(&mut || Ok(()), &mut image)?;
        if n == WARM_UP {
            // The stop just made is counted, those before are not.
            std::thread::sleep(EPOCH);
            guest.stops();
        } else if n > WARM_UP {
            dirty.push(checkpoint.pages);
            transfers.push(checkpoint.timings.transfer);
        }
    }
    std::thread::sleep(EPOCH);
    let mut stops = guest.stops();
    source.disarm()?;
    let n = stops.len();
    dirty.sort_unstable();
    let buffer = buffer.map_or("default".to_owned(), |bytes| format!("{} MiB", bytes >> 20));
    println!(
        "{pages:>5}  {:<11}  {buffer:>7}  {delay:>2} ms | {n:>3}  {:>6} | {:>23.3} {:>6.3} | {:>20.3} {:>6.3}",
        format!("{acknowledge:?}"),
        dirty.get(dirty.len() / 2).copied().unwrap_or(0),
        percentile(&mut stops, 50),
        percentile(&mut stops, 99),
        percentile(&mut transfers, 50),
        percentile(&mut transfers, 99),
    );
    Ok(())
}

/// In milliseconds.
fn percentile(times: &mut [Duration], percent: usize) -> f64 {
    times.sort_unstable();
    let at = (times.len() * percent / 100).min(times.len().saturating_sub(1));
    times.get(at).map_or(0.0, |time| time.as_secs_f64() * 1e3)
}
