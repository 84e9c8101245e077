//! The output gate on a kernel that has what it needs: this machine's may lack `plug` and `ifb`.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::Scenario;
use crate::lab::Lab;
use crate::lab::plan::HostName::Beta;
use crate::lab::remote::Exec;
use crate::{process, workspace};

pub(super) const SCENARIOS: &[Scenario] = &[("output: the gate holds and releases in a real kernel", kernel)];

const BUILD_LIMIT: Duration = Duration::from_secs(1800);

/// Runs the gate's own test of `primary` in a host, where it must not be left out.
fn kernel(lab: &Lab) -> Result<()> {
    let mut build = workspace::cargo();
    build.args(["test", "--locked", "-p", "understudy-primary", "--test", "netlink_gate", "--no-run"]);
    let messages = process::checked(build.arg("--message-format=json"), BUILD_LIMIT)?;
    let built = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == "netlink_gate")
        .find_map(|message| message["executable"].as_str().map(str::to_owned))
        .context("cargo names no program of the gate's test")?;
    let here = lab.dir().shared().join("netlink_gate");
    fs::copy(&built, &here).with_context(|| format!("cannot copy {built}"))?;
    let program = here.display().to_string();
    let said = lab.checked(Beta, &Exec::new([&program, "--nocapture"]).limit(Duration::from_secs(120)))?;
    ensure!(said.contains("1 passed") && !said.contains("skipped:"), "{said}");
    Ok(())
}
