//! What further connections bring: epochs by one and by up to four, in turn, through a relay that lets 1 Gbit/s through on each
//! connection, and without a relay, where they bring nothing and should cost nothing.

#[path = "../../tests/lanes/pair.rs"]
#[allow(dead_code, reason = "the test of the same name needs more of it")]
pub(crate) mod pair;

use understudy_proto::epoch::EpochKind;

use crate::{Report, ms};
use pair::{Pair, noise};

/// 1 Gbit/s.
const LIMIT: f64 = 125e6;

/// Of which the agents' default, 1, is the other subject.
const CONNECTIONS: usize = 4;

/// Epochs in which the policy may find out, with a limit.
const LEARNING: usize = 70;

pub(crate) fn run(epochs: usize) -> anyhow::Result<Report> {
    understudy_primary::keep_freed_memory();
    let mut report =
        Report::new("connections", format!("cargo xtask bench connections -- --epochs {epochs}"));
    for mib in [16, 64] {
        let name = format!("{mib} MiB, 1 Gbit/s each");
        let (ratio, used) = rows(&mut report, &name, mib, Some(LIMIT), LEARNING, epochs)?;
        report.row(&name, "connections at the end", "", vec![used]);
        report.at_least(&format!("{name}: times as fast"), 2.5, 1.0 / ratio);
    }
    // With its trials: nothing is left out.
    for mib in [16, 64] {
        let name = format!("{mib} MiB, no limit");
        let (ratio, used) = rows(&mut report, &name, mib, None, 0, 4 * epochs)?;
        report.row(&name, "connections at the end", "", vec![used]);
        report.at_most(&format!("{name}: an epoch, of one connection's"), 1.05, ratio);
    }
    Ok(report)
}

/// The time of an epoch by up to [`CONNECTIONS`], of that by one (median of the ratios of both in a round), and how many are used.
fn rows(
    report: &mut Report,
    name: &str,
    mib: u64,
    limit: Option<f64>,
    learning: usize,
    epochs: usize,
) -> anyhow::Result<(f64, f64)> {
    let pages = mib << 8;
    let mut pairs = [Pair::open(pages, 1, limit)?, Pair::open(pages, CONNECTIONS, limit)?];
    let all = noise(0..pages, 0);
    for pair in &mut pairs {
        pair.epoch(EpochKind::Full, &all)?;
    }
    for salt in 0..learning {
        pairs[1].epoch(EpochKind::Delta, &noise(0..pages, salt as u64 + 1))?;
    }
    let mut times = [Vec::new(), Vec::new()];
    for round in 0..epochs {
        let content = noise(0..pages, 1000 + round as u64);
        // Who comes first finds the pages in no cache.
        for turn in 0..2 {
            let which = (round + turn) % 2;
            times[which].push(ms(pairs[which].epoch(EpochKind::Delta, &content)?));
        }
    }
    let ratios = times[1].iter().zip(&times[0]).map(|(several, one)| several / one).collect();
    let [one, several] = times;
    report.row(name, "one connection", "ms", one);
    report.row(name, "up to four", "ms", several);
    let ratio = report.row(name, "up to four / one", "ratio", ratios);
    Ok((ratio, pairs[1].connections() as f64))
}
