//! Failovers of the micro-VM: a test of this package, run with more rounds than in the unit tests.

use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use super::{Report, cargo};
use crate::process;

/// Deaths in `cargo xtask test`.
pub(super) const TEST_CYCLES: u32 = 1_000;

/// Deaths in `cargo xtask campaign microvm`.
pub(super) const CAMPAIGN_CYCLES: u32 = 20_000;

const LIMIT: Duration = Duration::from_secs(4 * 3600);

/// What the test says instead of running where there is no usable KVM.
const SKIPPED: &str = "SKIPPED ";

pub(super) fn run(report: &mut Report, cycles: u32) -> Result<()> {
    let mut primary =
        cargo::cargo(&["test", "--locked", "-p", "understudy-primary", "--lib", "capture::micro"]);
    cargo::tests(report, "micro-VM", &mut primary)?;
    let mut command = cargo::cargo(&["test", "--locked", "-p", "understudy-tests", "--test", "microvm"]);
    if cycles >= CAMPAIGN_CYCLES {
        // What is built once for it is run twenty times as often.
        command.arg("--release");
    }
    command.args(["--", "--nocapture"]).env("UNDERSTUDY_MICROVM_CYCLES", cycles.to_string());
    failovers(report, &mut command, cycles)
}

fn failovers(report: &mut Report, command: &mut Command, cycles: u32) -> Result<()> {
    let output = process::output(command, LIMIT)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let what = format!("{cycles} failovers of a micro-VM");
    if let Some(reason) = text.lines().find_map(|line| line.strip_prefix(SKIPPED)) {
        report.skip(&what, reason);
    } else if output.status.success() {
        report.test(&what, || Ok(()));
        let said =
            |line: &&str| line.starts_with("seed ") || line.starts_with(' ') || line.contains(" deaths ");
        text.lines().filter(said).for_each(|line| println!("  {line}"));
    } else {
        report.fail(&what, &format!("{text}\n{}", String::from_utf8_lossy(&output.stderr)));
    }
    Ok(())
}
