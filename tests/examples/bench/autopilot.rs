//! How near the autopilot comes to the best fixed length of epochs: the shortest one that keeps the goal for the slowdown, found by
//! a sweep over the same guest. The slowdown is the share of the time that the guest was stopped, by QEMU's own clock.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use understudy_primary::autopilot::{Autopilot, Goals, Seen, USUAL_SLOWDOWN};

use crate::captured::Captured;
use crate::guest::{Guest, skip_reason};
use crate::{Report, ms};

/// Lengths of the sweep, in ms: each half again as long as the one before.
const SWEEP: [u64; 10] = [5, 8, 12, 18, 27, 40, 60, 90, 135, 200];
/// What it begins with: far from anything the workloads want.
const BEGIN: Duration = Duration::from_millis(500);

pub(crate) fn run(seconds: u64, pages: &[usize], mib: usize) -> anyhow::Result<Report> {
    if let Some(reason) = skip_reason() {
        bail!("cannot measure the autopilot: {reason}");
    }
    let list = pages.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let command = format!("cargo xtask bench autopilot -- --seconds {seconds} --pages {list} --mib {mib}");
    let mut report = Report::new("autopilot", command);
    let span = Duration::from_secs(seconds);
    for &pages in pages {
        let name = format!("{pages} dirty pages");
        let guest = Guest::start("pc", pages, &["-m", &mib.to_string()])?;
        let mut captured = Captured::arm(&guest)?;
        let mut sweep = Vec::new();
        for length in SWEEP.map(Duration::from_millis) {
            let loss = fixed(&guest, &mut captured, length, span)?;
            report.row(&name, &format!("loss at {} ms", length.as_millis()), "ratio", vec![loss]);
            sweep.push((ms(length), loss));
        }
        let best = shortest(&sweep, USUAL_SLOWDOWN)
            .with_context(|| format!("{name}: no length of the sweep keeps the goal"))?;
        // Half of the time to settle.
        let found = piloted(&guest, &mut captured, span * 4)?;
        captured.disarm()?;
        report.row(&name, "best fixed length", "ms", vec![best]);
        let length = report.row(&name, "autopilot's lengths", "ms", found.lengths);
        report.row(&name, "loss with the autopilot", "ratio", vec![found.loss]);
        report.at_most(&format!("{name}: away from the best"), 0.10, (length / best - 1.0).abs());
        report.at_most(&format!("{name}: turns a second"), 2.0, found.turns);
    }
    Ok(report)
}

/// Share of the time the guest stands still with epochs of one length.
fn fixed(guest: &Guest, captured: &mut Captured, length: Duration, span: Duration) -> anyhow::Result<f64> {
    captured.epoch(length)?;
    guest.stops();
    let began = Instant::now();
    while began.elapsed() < span {
        captured.epoch(length)?;
    }
    let passed = began.elapsed();
    Ok(guest.stops().iter().sum::<Duration>().as_secs_f64() / passed.as_secs_f64())
}

/// The shortest length with at most this loss, between the two of the sweep that lie around it: a loss is about inversely
/// proportional to the length.
fn shortest(sweep: &[(f64, f64)], goal: f64) -> Option<f64> {
    let after = sweep.iter().position(|(_, loss)| *loss <= goal)?;
    let (length, loss) = *sweep.get(after)?;
    let Some((before, more)) = after.checked_sub(1).and_then(|at| sweep.get(at)) else { return Some(length) };
    let share = (more.ln() - goal.ln()) / (more.ln() - loss.ln());
    Some((before.ln() + share * (length.ln() - before.ln())).exp())
}

struct Found {
    lengths: Vec<f64>,
    loss: f64,
    /// Changes of direction a second.
    turns: f64,
}

/// What the autopilot does in the second half of `span`.
fn piloted(guest: &Guest, captured: &mut Captured, span: Duration) -> anyhow::Result<Found> {
    let mut pilot = Autopilot::new(Goals::default(), BEGIN);
    let mut stop = Duration::ZERO;
    let mut found = Found { lengths: Vec::new(), loss: 0.0, turns: 0.0 };
    let (mut stopped, mut turns, mut direction) = (Duration::ZERO, 0u32, 0);
    let began = Instant::now();
    guest.stops();
    while began.elapsed() < span {
        let settled = began.elapsed() > span / 2;
        let length = pilot.length();
        let epoch = captured.epoch(length)?;
        // Of the epochs whose events are here; the last one's may follow with the next.
        let stops = guest.stops();
        stop = stops.last().copied().unwrap_or(stop);
        let bytes = epoch.checkpoint.timings.bytes;
        let transfer = epoch.took.saturating_sub(stop);
        let change = pilot.step(&Seen { ran: epoch.ran, stop, transfer, bytes });
        if settled {
            found.lengths.push(ms(length));
            stopped += stops.iter().sum::<Duration>();
        }
        if let Some(change) = change {
            let now = if change.to > change.from { 1 } else { -1 };
            turns += u32::from(settled && now == -direction);
            direction = now;
        }
    }
    found.loss = stopped.as_secs_f64() / (span / 2).as_secs_f64();
    found.turns = f64::from(turns) / (span / 2).as_secs_f64();
    Ok(found)
}
