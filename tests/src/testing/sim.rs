//! The simulator: a test of this crate, run with more seeds than `cargo xtask test` has time for.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use anyhow::{Context, Result};

use super::{Report, cargo};

/// The test that takes seeds from the environment.
const TEST: &str = "runs::nothing_unsafe_happens_and_the_guest_is_served_and_protected_again";

/// Runs `count` seeds from `start` on, telling how far it is; the exit status tells whether all is well.
pub(crate) fn run(start: u64, count: u64) -> Result<i32> {
    let mut report = Report::default();
    let mut command =
        cargo::cargo(&["test", "--locked", "--release", "-p", "understudy-tests", "--test", "sim", TEST]);
    command.args(["--", "--exact", "--nocapture"]);
    command.env("UNDERSTUDY_SIM_START", start.to_string()).env("UNDERSTUDY_SIM_SEEDS", count.to_string());
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("cannot run cargo")?;
    let said = child.stdout.take().context("cargo says nothing")?;
    let mut ran = false;
    for line in BufReader::new(said).lines() {
        let line = line.context("cannot read what the simulator says")?;
        ran |= line.contains(" seeds: ");
        println!("  {line}");
    }
    let status = child.wait().context("cannot wait for cargo")?;
    let what = format!("{count} simulated worlds from seed {start} on");
    // A filter that matches nothing is a success to cargo.
    if status.success() && ran {
        report.pass(1);
    } else {
        report
            .fail(&what, "see above; add a seed that failed to tests/tests/sim/seeds.txt when it is mended");
    }
    Ok(report.close())
}
