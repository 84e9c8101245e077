//! Debian's package manager, by its stable commands.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::process;

const LIMIT: Duration = Duration::from_secs(1200);

/// Those of `packages` that are not installed.
pub(crate) fn missing<'a>(packages: impl Iterator<Item = &'a str>) -> Result<Vec<String>> {
    let packages: Vec<&str> = packages.collect();
    let mut query = Command::new("dpkg-query");
    query.args(["-W", "-f", "${Package} ${db:Status-Status}\n"]).args(&packages);
    // It fails when one is unknown, and lists the others all the same.
    let listed =
        process::output(&mut query, Duration::from_secs(60)).context("this needs Debian's dpkg and apt")?;
    Ok(not_installed(&String::from_utf8_lossy(&listed.stdout), &packages))
}

fn not_installed(listed: &str, packages: &[&str]) -> Vec<String> {
    let installed =
        |package: &str| listed.lines().any(|line| line.split_once(' ') == Some((package, "installed")));
    packages.iter().filter(|package| !installed(package)).map(|package| (*package).to_owned()).collect()
}

/// A command that runs as root.
fn privileged(program: &str) -> Command {
    if rustix::process::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.arg(program);
    command
}

/// Brings the package lists up to date.
pub(crate) fn update() -> Result<()> {
    eprintln!("Updating the package lists.");
    process::checked(privileged("apt-get").args(["update", "--quiet"]), LIMIT).map(drop)
}

/// Where this machine gets the main archive of a release from.
pub(crate) fn site(release: &str) -> Result<String> {
    let mut command = Command::new("apt-get");
    command.args(["indextargets", "--format", "$(SITE) $(RELEASE) $(COMPONENT)", "Created-By: Packages"]);
    let targets = process::checked(&mut command, LIMIT)?;
    let wanted = |line: &&str| line.split_whitespace().skip(1).eq([release, "main"]);
    let found = targets.lines().find(wanted).and_then(|line| line.split_whitespace().next());
    found.map(str::to_owned).with_context(|| format!("apt has no source of {release} main"))
}

/// What apt would do for `packages`: all it installs, and all it removes.
fn simulate(packages: &[String]) -> Result<Plan> {
    let mut command = Command::new("apt-get");
    command.args(["install", "--simulate", "--quiet", "--no-install-recommends"]).args(packages);
    process::checked(&mut command, LIMIT).map(|text| Plan::parse(&text))
}

#[derive(Debug, PartialEq, Eq)]
struct Plan {
    installs: Vec<String>,
    removes: Vec<String>,
}

impl Plan {
    fn parse(text: &str) -> Self {
        let named = |verb: &str| {
            let lines = text.lines().filter_map(|line| line.strip_prefix(verb));
            lines.filter_map(|rest| rest.split_whitespace().next()).map(str::to_owned).collect()
        };
        Self { installs: named("Inst "), removes: named("Remv ") }
    }
}

/// Installs `packages` after saying what else comes and what goes.
pub(crate) fn install(packages: &[String]) -> Result<()> {
    let plan = match simulate(packages) {
        Ok(plan) => plan,
        // No list, or a list of versions that are gone.
        Err(_) => {
            update()?;
            simulate(packages).context("apt cannot install what is missing")?
        }
    };
    eprintln!("With what they depend on, {} packages.", plan.installs.len());
    if !plan.removes.is_empty() {
        eprintln!("apt will REMOVE, because they conflict: {}", plan.removes.join(" "));
    }
    if !rustix::process::geteuid().is_root() && process::find_program("sudo").is_none() {
        bail!(
            "not root, and no sudo here: install them yourself with `apt-get install --no-install-recommends {}`",
            packages.join(" ")
        );
    }
    match run_install(packages) {
        Ok(()) => Ok(()),
        // The lists name versions that the archive no longer has.
        Err(_) => update().and_then(|()| run_install(packages)),
    }
}

fn run_install(packages: &[String]) -> Result<()> {
    let mut command = privileged("env");
    command.args([
        "DEBIAN_FRONTEND=noninteractive",
        "apt-get",
        "install",
        "--yes",
        "--quiet",
        "--no-install-recommends",
    ]);
    // In a container there is nothing that could start a service, and on a desktop nobody asked for one.
    process::checked(command.args(packages), LIMIT).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_removed_is_known_before() {
        let text = "NOTE: simulation\nRemv qemu-utils [1:8.2]\nInst qemu-system-x86 (1:7.2 Debian:12)\nInst seabios (1.16)\nConf seabios (1.16)\n";
        let plan = Plan::parse(text);
        assert_eq!(plan.installs, ["qemu-system-x86", "seabios"]);
        assert_eq!(plan.removes, ["qemu-utils"]);
    }

    #[test]
    fn a_removed_package_with_configuration_left_is_missing() {
        let listed = "gcc installed\ntcpdump config-files\n";
        assert_eq!(not_installed(listed, &["gcc", "tcpdump", "kmod"]), ["tcpdump", "kmod"]);
    }
}
