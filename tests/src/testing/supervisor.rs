//! Deaths of an agent under checkpointing: a test of the primary, run with more rounds than in the unit tests.

use std::time::Duration;

use anyhow::{Context, Result};

use super::{Report, cargo};
use crate::process;

/// Deaths in `cargo xtask campaign supervisor`, unless `UNDERSTUDY_SUPERVISOR_DEATHS` says otherwise.
const CAMPAIGN_DEATHS: u32 = 1_000;

const DEATHS: &str = "UNDERSTUDY_SUPERVISOR_DEATHS";

const LIMIT: Duration = Duration::from_secs(4 * 3600);

/// What the test says instead of running where there is no usable KVM.
const SKIPPED: &str = "SKIPPED ";

pub(super) fn run(report: &mut Report) -> Result<()> {
    let given = std::env::var(DEATHS)
        .ok()
        .map(|text| text.parse::<u32>().with_context(|| format!("{DEATHS}={text}")));
    let deaths = given.transpose()?.unwrap_or(CAMPAIGN_DEATHS);
    let mut command = cargo::cargo(&["test", "--locked", "-p", "understudy-primary", "--test", "supervisor"]);
    command.args(["--", "--nocapture"]).env(DEATHS, deaths.to_string());
    let output = process::output(&mut command, LIMIT)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let what = format!("{deaths} deaths of an agent under checkpointing");
    if let Some(reason) = text.lines().find_map(|line| line.strip_prefix(SKIPPED)) {
        report.skip(&what, reason);
    } else if output.status.success() {
        report.test(&what, || Ok(()));
        let said =
            |line: &&str| line.starts_with("seed ") || line.starts_with(' ') || line.contains(" deaths, ");
        text.lines().filter(said).for_each(|line| println!("  {line}"));
    } else {
        report.fail(&what, &format!("{text}\n{}", String::from_utf8_lossy(&output.stderr)));
    }
    Ok(())
}
