//! The programs under test: built here, run in the hosts.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::{pki, state::LabDir};
use crate::{process, workspace};

/// Package and program. The hosts keep the daemons running.
const PROGRAMS: [(&str, &str); 6] = [
    ("understudy", "understudy"),
    ("understudy-hook", "understudy-hook"),
    ("understudy-primary", "understudy-primary"),
    ("understudy-backup", "understudy-backup"),
    ("understudy-watchdog", "understudy-watchdog"),
    ("understudy-generic", "understudy-generic"),
];
/// What the lab's agents can do and an operator's cannot.
const FEATURE: &str = "test-hooks";

const BUILD_LIMIT: Duration = Duration::from_secs(1800);

/// Builds the agents and the operator's command.
pub(crate) fn build() -> Result<()> {
    let mut cargo = workspace::cargo();
    cargo.args(["build", "--quiet", "--release"]);
    let metadata = process::checked(
        workspace::cargo().args(["metadata", "--format-version", "1", "--no-deps"]),
        Duration::from_secs(120),
    )?;
    let metadata: serde_json::Value = serde_json::from_str(&metadata)?;
    for (package, _) in PROGRAMS {
        cargo.args(["-p", package]);
        if has_feature(&metadata, package) {
            cargo.args(["--features", &format!("{package}/{FEATURE}")]);
        }
    }
    if !process::status(&mut cargo, BUILD_LIMIT)?.success() {
        bail!("the agents do not build");
    }
    Ok(())
}

fn has_feature(metadata: &serde_json::Value, package: &str) -> bool {
    let packages = metadata["packages"].as_array().into_iter().flatten();
    packages.filter(|found| found["name"] == package).any(|found| found["features"].get(FEATURE).is_some())
}

/// Puts them where the hosts look for them; a running host restarts its agents when they change.
pub(crate) fn deploy(lab: &LabDir) -> Result<()> {
    let folder = lab.shared().join("bin");
    fs::create_dir_all(&folder)?;
    pki::ensure(&lab.shared())?;
    for (_, program) in PROGRAMS {
        let from = workspace::target().join("release").join(program);
        let fresh = folder.join(format!(".{program}"));
        fs::copy(&from, &fresh).with_context(|| format!("cannot copy {}", from.display()))?;
        fs::rename(&fresh, folder.join(program))?;
    }
    Ok(())
}
