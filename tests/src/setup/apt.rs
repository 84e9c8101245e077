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

/// A part of an archive that apt knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Archive {
    /// Who makes it, for example `Debian`.
    pub(crate) origin: String,
    pub(crate) uri: String,
    /// For example `bookworm-updates`.
    pub(crate) release: String,
    /// For example `main`.
    pub(crate) component: String,
}

/// Where the machine's packages come from, in whatever form its administrator wrote that down.
pub(crate) fn archives() -> Result<Vec<Archive>> {
    const FORMAT: &str = "$(ORIGIN)\t$(REPO_URI)\t$(RELEASE)\t$(COMPONENT)";
    let list = || {
        let mut command = Command::new("apt-get");
        command.args(["indextargets", "--format", FORMAT, "Created-By: Packages"]);
        process::checked(&mut command, Duration::from_secs(60)).map(|text| parse_archives(&text))
    };
    let known = list()?;
    // Who makes an archive is told by its list, which a fresh machine does not have yet.
    if known.iter().any(|archive| archive.origin == "Debian") {
        return Ok(known);
    }
    update()?;
    list()
}

fn parse_archives(text: &str) -> Vec<Archive> {
    let parse = |line: &str| {
        let mut fields = line.split('\t').map(str::to_owned);
        Some(Archive {
            origin: fields.next()?,
            uri: fields.next()?,
            release: fields.next()?,
            component: fields.next()?,
        })
    };
    text.lines().filter_map(parse).collect()
}

/// How the machine's apt fetches packages (proxies, checks of dates, ...), as lines of its configuration.
pub(crate) fn options() -> Result<Vec<String>> {
    let text = process::checked(Command::new("apt-config").arg("dump"), Duration::from_secs(60))?;
    Ok(fetch_options(&text))
}

fn fetch_options(dump: &str) -> Vec<String> {
    const OURS: [&str; 5] =
        ["Acquire::Check-", "Acquire::Force", "Acquire::Retries", "Acquire::http", "Acquire::ftp"];
    let fetch = |line: &&str| OURS.iter().any(|start| line.starts_with(start)) && !line.ends_with(" \"\";");
    dump.lines().filter(fetch).map(str::to_owned).collect()
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

/// Installs those of `packages` that are missing, after saying why.
pub(crate) fn ensure(packages: &[&str], why: &str) -> Result<()> {
    let missing = missing(packages.iter().copied())?;
    if missing.is_empty() {
        return Ok(());
    }
    eprintln!("{why}");
    install(&missing)
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
    fn archives_are_read_and_an_incomplete_line_is_not() {
        let text = "Debian\thttp://m/debian/\tbookworm\tmain\n\thttp://n/\tx\tmain\nbroken\n";
        let archives = parse_archives(text);
        assert_eq!(archives.len(), 2);
        assert_eq!(archives[0].release, "bookworm");
        assert_eq!(archives[1].origin, "");
    }

    #[test]
    fn only_what_concerns_fetching_is_handed_on() {
        let dump = "APT::Architecture \"amd64\";\nAcquire::Check-Date \"false\";\nAcquire::http \"\";\n\
            Acquire::http::Proxy \"http://p:1/\";\nAcquire::Languages:: \"none\";\n";
        assert_eq!(
            fetch_options(dump),
            ["Acquire::Check-Date \"false\";", "Acquire::http::Proxy \"http://p:1/\";"]
        );
    }

    #[test]
    fn a_removed_package_with_configuration_left_is_missing() {
        let listed = "gcc installed\ntcpdump config-files\n";
        assert_eq!(not_installed(listed, &["gcc", "tcpdump", "kmod"]), ["tcpdump", "kmod"]);
    }
}
