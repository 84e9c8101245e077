//! `understudy verify` outside, a power cut inside: with the gate as it is. The gates that do wrong on purpose
//! (`--plant-fault`) are not found reliably by this cut: what was released early has mostly been committed as well.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{SHAPES, Scenario, start_shaped};
use crate::lab::Lab;
use crate::lab::plan::HostName::{Alpha, Beta};
use crate::lab::plan::guest_address;
use crate::lab::understudy::Role;
use crate::{process, workspace};

pub(super) const SCENARIOS: &[Scenario] = &[("output: verify finds nothing over a power cut", sound)];

const LIMIT: Duration = Duration::from_secs(60);

/// How long the guest is asked before it is cut off.
const BEFORE: Duration = Duration::from_secs(6);

/// The observer goes on for so long: the failover is far over then.
const ALL: u64 = 35;

fn sound(lab: &Lab) -> Result<()> {
    let verdict = observed(lab, "")?;
    ensure!(verdict["violations_total"] == 0, "{verdict}");
    let silence = verdict["longest_silence_ms"].as_u64().context("no silence in it")?;
    ensure!(silence < 20_000, "the guest did not come back: {verdict}");
    println!("    {} questions, silence {silence} ms, {}", verdict["questions"], verdict["answers"]);
    Ok(())
}

/// What an observer finds who asks while the guest's host is first cut off from the backup and then from power. In
/// between the guest says what nobody has committed.
fn observed(lab: &Lab, arguments: &str) -> Result<Value> {
    if !arguments.is_empty() {
        lab.restart_agent(Alpha, Role::Primary, arguments)?;
    }
    drop(start_shaped(lab, Alpha, SHAPES[0])?);
    lab.protect("g1", Alpha)?;
    lab.wait_status((Alpha, Role::Primary), "g1", LIMIT, |status| {
        status.state() == "protected" && status.number("epochs_total").is_some_and(|total| total > 3)
    })?;
    let understudy = workspace::target().join("release/understudy");
    let mut command = Command::new("ip");
    command.args(["netns", "exec", &lab.dir().netns()]).arg(understudy);
    command.args(["verify", &guest_address("g1").to_string(), "--for", &ALL.to_string(), "--json"]);
    let observer = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let observer = observer.context("cannot run verify")?;
    std::thread::sleep(BEFORE);
    let failover = || -> Result<()> {
        let repl = "repl".parse()?;
        lab.cut(repl)?;
        std::thread::sleep(Duration::from_secs(1));
        lab.power_off(Alpha)?;
        lab.heal(repl)?;
        lab.failover("g1", Beta).map(drop)
    };
    let failed_over = failover();
    let output = observer.wait_with_output().context("verify did not end")?;
    failed_over?;
    let text = String::from_utf8_lossy(&output.stdout);
    let verdict: Value = serde_json::from_str(text.trim()).with_context(|| format!("not JSON: {text}"))?;
    let agrees = (verdict["violations_total"] == 0) == (process::exit_code(output.status) == 0);
    ensure!(agrees, "exit status {:?} of {verdict}", output.status);
    Ok(verdict)
}
