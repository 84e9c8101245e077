//! What protection costs a guest that does nothing but work: rounds of writing its pages, each second.
//!
//! The same guest is measured before, during and, where protection can be ended, after, so a machine that gets busier in between is
//! seen.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::bail;

use crate::Report;
use crate::captured::Captured;
use crate::guest::{Guest, skip_reason};
use crate::pause::EPOCH;
use crate::stock::{Pair, WARM_UP, Way};

/// One sample of the work.
const SAMPLE: Duration = Duration::from_secs(1);

pub(crate) fn run(seconds: usize, pages: usize, mib: usize) -> anyhow::Result<Report> {
    if let Some(reason) = skip_reason() {
        bail!("cannot measure the slowdown: {reason}");
    }
    let command = format!("cargo xtask bench slowdown -- --seconds {seconds} --pages {pages} --mib {mib}");
    let mut report = Report::new("slowdown", command);
    let name = format!("{pages} pages, {} ms epochs", EPOCH.as_millis());

    let guest = Guest::start("pc", pages, &["-m", &mib.to_string()])?;
    let mut alone = work(&guest, seconds)?;
    let mut captured = Captured::arm(&guest)?;
    let over = AtomicBool::new(false);
    let protected = std::thread::scope(|scope| {
        let epochs = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                captured.epoch(EPOCH)?;
            }
            captured.disarm()
        });
        let protected = work(&guest, seconds);
        over.store(true, Ordering::Relaxed);
        match epochs.join() {
            Ok(ended) => ended.and(protected),
            Err(_) => bail!("the capture panicked"),
        }
    })?;
    alone.extend(work(&guest, seconds)?);
    drop(guest);
    let unprotected = report.row(&name, "unprotected", "rounds/s", alone);
    let protected = report.row(&name, "understudy", "rounds/s", protected);
    report.at_most("loss of guest work", 0.12, 1.0 - protected / unprotected);

    for way in [Way::Tcp, Way::Unix] {
        let pair = Pair::start(way, pages, mib)?;
        let alone = work(&pair.guest, seconds)?;
        pair.protect()?;
        pair.next_stops(WARM_UP)?;
        let protected = work(&pair.guest, seconds)?;
        let alone = report.row(&name, &format!("{}, before", way.subject()), "rounds/s", alone);
        let protected = report.row(&name, way.subject(), "rounds/s", protected);
        report.row(&name, &format!("{}, loss", way.subject()), "ratio", vec![1.0 - protected / alone]);
    }
    Ok(report)
}

/// Rounds a second, in samples of a second.
fn work(guest: &Guest, seconds: usize) -> anyhow::Result<Vec<f64>> {
    let mut samples = Vec::new();
    let (mut began, mut before) = (Instant::now(), guest.round()?);
    for _ in 0..seconds {
        std::thread::sleep(SAMPLE);
        let (now, round) = (Instant::now(), guest.round()?);
        samples.push(f64::from(round.wrapping_sub(before)) / (now - began).as_secs_f64());
        (began, before) = (now, round);
    }
    Ok(samples)
}
