//! Failovers in the lab, by what the reports of the watchdogs say of them.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::lab::cli::booted;
use crate::lab::roots::Roots;
use crate::lab::state::LabDir;
use crate::process;
use crate::scenarios::{self, CAUSES};
use crate::ui::Steps;

/// What is known to be enough for a median and a p99 that says anything.
const ROUNDS: usize = 20;

/// A round with its re-protection, on emulated hosts.
const ROUND: Duration = Duration::from_secs(180);

/// The parts of a takeover, as its report names them, and the whole of it.
const PARTS: [&str; 5] = ["detect", "claim", "load", "announce", "total"];

/// Ends the guest's instance, now here and now there, and reads how it was taken over. `more` may be `--rounds N`.
pub(super) fn run(file: Option<&Path>, more: &[String]) -> Result<i32> {
    let rounds = match more {
        [] => ROUNDS,
        [option, count] if option == "--rounds" => count.parse().context("--rounds takes a number")?,
        _ => bail!("bench failover takes --rounds N"),
    };
    ensure!((1..=1000).contains(&rounds), "--rounds is {rounds}: give 1 to 1000");
    process::ensure_root()?;
    let lifetime = ROUND * u32::try_from(rounds).unwrap_or(u32::MAX) + Duration::from_secs(600);
    let lab = booted(LabDir::unique(), Roots::default(), lifetime, true, false, &Steps::start())?;
    let emulated = lab.is_emulated()?;
    let reports = scenarios::takeovers(&lab, rounds);
    lab.down()?;
    let reports = reports?;
    let rows = rows(&reports);
    if let Some(file) = file {
        let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let whole = json!({
            "bench": "failover",
            "command": format!("cargo xtask bench failover -- --rounds {rounds}"),
            "host": {
                "cpus": std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
                "kernel": text("/proc/sys/kernel/osrelease"),
                "load_after": text("/proc/loadavg"),
                "lab_hosts_emulated": emulated,
            },
            "rows": rows,
            "goals": [],
            "reports": reports.iter().map(|(cause, report)| json!({"cause": cause, "report": report})).collect::<Vec<_>>(),
        });
        std::fs::write(file, format!("{whole:#}\n"))
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(0)
}

/// Confirmation is a part of the claim: two swaps at the arbiter.
fn part_of(report: &Value, part: &str) -> f64 {
    let ms = |name: &str| report[format!("{name}_ms")].as_f64().unwrap_or_default();
    if part == "claim" { ms("claim") + ms("confirm") } else { ms(part) }
}

/// Of all reports, and of those of each cause, as that decides how long detection takes.
fn rows(reports: &[(&str, Value)]) -> Vec<Value> {
    let all = reports.iter().map(|(_, report)| report).collect::<Vec<_>>();
    let mut rows: Vec<Value> = PARTS.iter().map(|part| row(part, part, &all)).collect();
    for cause in CAUSES {
        let of: Vec<&Value> =
            reports.iter().filter(|(why, _)| *why == cause).map(|(_, report)| report).collect();
        rows.extend(["detect", "total"].map(|part| row(part, &format!("{part}, {cause}"), &of)));
    }
    rows
}

fn row(part: &str, name: &str, reports: &[&Value]) -> Value {
    let mut samples: Vec<f64> = reports.iter().map(|report| part_of(report, part)).collect();
    samples.sort_by(f64::total_cmp);
    let rank = |share: usize| samples.get((samples.len() * share).div_ceil(100).max(1) - 1).copied();
    let (median, p99) = (rank(50), rank(99));
    println!(
        "{name:<18} median {:>8.0} ms, p99 {:>8.0} ms, n {}",
        median.unwrap_or_default(),
        p99.unwrap_or_default(),
        samples.len()
    );
    json!({
        "name": name, "subject": "understudy", "unit": "ms", "n": samples.len(), "median": median, "p99": p99,
        "samples": samples,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_ranked_and_the_confirmation_is_a_part_of_the_claim() {
        let report =
            |n: usize| json!({"claim_ms": n, "confirm_ms": 10, "load_ms": 5 - n, "detect_ms": 100 * n});
        let reports: Vec<(&str, Value)> = (1..=4).map(|n| (CAUSES[n % 2], report(n))).collect();
        let rows = rows(&reports);
        let of = |name: &str| {
            let row = rows.iter().find(|row| row["name"] == name).unwrap_or(&Value::Null);
            (row["n"].as_u64(), row["median"].as_f64(), row["p99"].as_f64())
        };
        assert_eq!(of("claim"), (Some(4), Some(12.0), Some(14.0)));
        assert_eq!(of("load"), (Some(4), Some(2.0), Some(4.0)));
        assert_eq!(of("detect, QEMU dies"), (Some(2), Some(200.0), Some(400.0)));
    }
}
