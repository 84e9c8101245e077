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

/// Until the events of a stop that is over are here.
const EVENTS: Duration = Duration::from_millis(3);

/// How long the reader of the floor sleeps at the first page: longer than a stop takes.
const DOZE: Duration = Duration::from_millis(15);

/// Pages of the guests whose size is compared, and the size of the large one.
const SIZED_PAGES: usize = 500;
const LARGE_MIB: usize = 8192;

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
    let mut floors = Vec::new();
    for &pages in pages {
        let name = if pages == 0 { "idle".to_owned() } else { format!("{pages} dirty pages") };
        let Measured { stops, unread, dirty } = understudy(rounds, pages, mib)?;
        report.row(&name, "dirty pages", "pages", dirty);
        let median = report.row(&name, "understudy", "ms", stops);
        let alone = report.row(&name, "floor: QEMU, no reader", "ms", unread);
        floors.push((pages, alone));
        if pages > 0 {
            let floor = report.row(&name, "floor: memcpy", "ms", memcpy(pages, rounds));
            report.row(&name, "understudy / memcpy", "ratio", vec![median / floor.max(1e-6)]);
        }
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
    if let Some(growth) = growth(&medians) {
        report.at_most("stop, growth per 1000 dirty pages, ms", 0.75, growth);
    }
    if let Some(growth) = growth(&floors) {
        report.row("growth per 1000 dirty pages", "floor: QEMU, no reader", "ms", vec![growth]);
    }
    let mut sized = Vec::new();
    for mib in [mib, LARGE_MIB] {
        let name = format!("{SIZED_PAGES} dirty pages, {mib} MiB");
        let measured = understudy(rounds, SIZED_PAGES, mib).with_context(|| name.clone())?;
        sized.push(report.row(&name, "understudy", "ms", measured.stops));
        report.row(&name, "floor: QEMU, no reader", "ms", measured.unread);
    }
    if let [small, large] = sized[..] {
        report.at_most(&format!("stop, {LARGE_MIB} MiB against {mib} MiB"), 1.5, large / small);
    }
    Ok(report)
}

/// From the first to the last of some medians, each with its pages, in ms per 1000 pages.
fn growth(medians: &[(usize, f64)]) -> Option<f64> {
    let (first, last) = (medians.first()?, medians.last()?);
    (last.0 > first.0).then(|| (last.1 - first.1) * 1000.0 / (last.0 - first.0) as f64)
}

#[derive(Default)]
struct Measured {
    /// In ms.
    stops: Vec<f64>,
    /// The same while nobody reads what QEMU writes, which is what QEMU and the kernel take alone.
    unread: Vec<f64>,
    /// Pages of each epoch.
    dirty: Vec<f64>,
}

/// Stops of one guest. The two kinds alternate, so that a busy machine slows both alike.
fn understudy(rounds: usize, pages: usize, mib: usize) -> anyhow::Result<Measured> {
    let guest = Guest::start("pc", pages, &["-m", &mib.to_string()])?;
    let mut captured = Captured::arm(&guest)?;
    let mut measured = Measured::default();
    for round in 0..2 * (WARM_UP + rounds) {
        let read = round % 2 == 0;
        captured.doze(if read { Duration::ZERO } else { DOZE });
        std::thread::sleep(EVENTS);
        let stop = guest.stops().last().copied();
        let of = if read { &mut measured.unread } else { &mut measured.stops };
        of.extend(stop.filter(|_| round > 2 * WARM_UP).map(ms));
        let epoch = captured.epoch(EPOCH)?;
        if round >= 2 * WARM_UP {
            measured.dirty.push(epoch.checkpoint.pages as f64);
        }
    }
    captured.disarm()?;
    Ok(measured)
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
