//! The simulator of the claim protocol: a test of the watchdog, run with more seeds than in the unit tests.

use std::time::Duration;

use anyhow::Result;

use super::{Report, cargo};
use crate::process;

const LIMIT: Duration = Duration::from_secs(24 * 3600);

/// The test that takes seeds from the environment.
const TEST: &str = "owner::sim::nothing_unsafe_happens_and_the_guest_is_served_again";

/// Runs `count` seeds from `start` on; the exit status tells whether all is well.
pub(crate) fn run(start: u64, count: u64) -> Result<i32> {
    let mut report = Report::default();
    let mut command =
        cargo::cargo(&["test", "--locked", "--release", "-p", "understudy-watchdog", "--lib", TEST]);
    command.args(["--", "--exact", "--nocapture"]);
    command.env("UNDERSTUDY_SIM_START", start.to_string()).env("UNDERSTUDY_SIM_SEEDS", count.to_string());
    let output = process::output(&mut command, LIMIT)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let what = format!("{count} seeds of the claim protocol from {start} on");
    // A filter that matches nothing is a success to cargo.
    match text.lines().find(|line| line.contains(" seeds: ")) {
        Some(line) if output.status.success() => {
            report.test(&what, || Ok(()));
            println!("  {line}");
        }
        _ => report.fail(&what, &format!("{text}\n{}", String::from_utf8_lossy(&output.stderr))),
    }
    Ok(report.close())
}
