//! The stop: from STOP to RESUME by QEMU's own timestamps, of Understudy's capture and of stock COLO in the same run.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use understudy_proto::units::PAGE_BYTES;

use crate::captured::Captured;
use crate::guest::{Guest, skip_reason};
use crate::stock::{self, Way};
use crate::{Report, ms};

/// How long the guest runs between two checkpoints, Understudy's and stock COLO's alike.
pub(crate) const EPOCH: Duration = Duration::from_millis(25);
/// Checkpoints before the measured ones.
const WARM_UP: usize = 10;

/// A stock pair takes a good part of a second for each.
const STOCK_ROUNDS: usize = 40;

pub(crate) fn run(rounds: usize, pages: &[usize], mib: usize, with_stock: bool) -> anyhow::Result<Report> {
    if let Some(reason) = skip_reason() {
        bail!("cannot measure the stop: {reason}");
    }
    let list = pages.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let mut report = Report::new(
        "pause",
        format!("cargo xtask bench pause -- --rounds {rounds} --pages {list} --mib {mib}"),
    );
    let mut medians = Vec::new();
    for &pages in pages {
        let name = if pages == 0 { "idle".to_owned() } else { format!("{pages} dirty pages") };
        let (stops, dirty) = understudy(rounds, pages, mib)?;
        report.row(&name, "dirty pages", "pages", dirty);
        let median = report.row(&name, "understudy", "ms", stops);
        let floor = report.row(&name, "floor: memcpy", "ms", memcpy(pages, rounds));
        report.row(&name, "understudy / memcpy", "ratio", vec![median / floor.max(1e-6)]);
        medians.push((pages, median));
        if pages == 0 {
            report.at_most("stop of an idle guest, ms", 0.30, median);
        }
        if !with_stock {
            continue;
        }
        for (way, factor) in [(Way::Tcp, 100.0), (Way::Unix, 15.0)] {
            let stops = stock::stops(way, rounds.min(STOCK_ROUNDS), pages, mib)
                .with_context(|| format!("stock COLO, {name}"))?;
            let stock = report.row(&name, way.subject(), "ms", stops);
            if pages == 0 {
                report.at_most(
                    &format!("stop, idle, part of {}", way.subject()),
                    1.0 / factor,
                    median / stock,
                );
            }
        }
    }
    if let (Some(first), Some(last)) = (medians.first(), medians.last())
        && last.0 > first.0
    {
        let per_thousand = (last.1 - first.1) * 1000.0 / (last.0 - first.0) as f64;
        report.at_most("stop, growth per 1000 dirty pages, ms", 0.75, per_thousand);
    }
    Ok(report)
}

/// Stops in ms, and pages of each.
fn understudy(rounds: usize, pages: usize, mib: usize) -> anyhow::Result<(Vec<f64>, Vec<f64>)> {
    let guest = Guest::start("pc", pages, &["-m", &mib.to_string()])?;
    let mut captured = Captured::arm(&guest)?;
    let mut dirty = Vec::new();
    for round in 0..WARM_UP + rounds {
        if round == WARM_UP {
            std::thread::sleep(EPOCH);
            // Those before are not counted. All their events are here: the guest has run for an epoch.
            guest.stops();
        }
        let epoch = captured.epoch(EPOCH)?;
        if round >= WARM_UP {
            dirty.push(epoch.checkpoint.pages as f64);
        }
    }
    std::thread::sleep(EPOCH);
    let stops = guest.stops();
    captured.disarm()?;
    Ok((stops.into_iter().map(ms).collect(), dirty))
}

/// Copying as many pages, in ms.
fn memcpy(pages: usize, rounds: usize) -> Vec<f64> {
    let from = vec![0x5au8; pages * PAGE_BYTES];
    let mut to = vec![0u8; pages * PAGE_BYTES];
    let copy = |_| {
        let began = Instant::now();
        to.copy_from_slice(std::hint::black_box(&from));
        std::hint::black_box(&mut to);
        ms(began.elapsed())
    };
    (0..rounds).map(copy).collect()
}
