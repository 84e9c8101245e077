//! The lab group: what happens to real guests on real hosts. One lab serves all scenarios.

mod admin;
mod basics;
mod cards;
mod connections;
mod exactness;
mod failover;
pub(crate) mod latency;
mod lifecycle;
mod metadata;
mod output;
mod owner;
mod random;
mod refusals;
mod traffic;
mod verbs;
mod verified;
mod versions;

use std::cell::Cell;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::lab::domain::GuestSpec;
use crate::lab::guest::Guest;
use crate::lab::plan::{HostName, Link, Net};
use crate::lab::remote::Exec;
use crate::lab::roots::Roots;
use crate::lab::state::LabDir;
use crate::lab::understudy::{GuestStatus, Role};
use crate::lab::{self, Lab};
use crate::process;
use crate::testing::{self, Report};
use crate::ui::Steps;

pub(crate) use owner::{CAUSES, takeovers};
pub(crate) use verified::CAMPAIGN;
pub(crate) use versions::VERSIONS;

/// All scenarios together take less, also beside other work.
const LIFETIME: Duration = Duration::from_secs(5400);

/// How often a scenario begins at most.
const ATTEMPTS: u32 = 3;

/// How many repetitions a whole run may have.
const REPEATS: u32 = 10;

/// A name, and what must not fail.
type Scenario = (&'static str, fn(&Lab) -> Result<()>);

/// What the scenarios of who runs a guest are called; those of a campaign run only if their name is asked for.
pub(crate) const OWNER: &str = "owner";

/// In the order in which they run.
const SCENARIOS: &[&[Scenario]] = &[
    basics::SCENARIOS,
    refusals::SCENARIOS,
    lifecycle::SCENARIOS,
    exactness::SCENARIOS,
    failover::SCENARIOS,
    connections::SCENARIOS,
    output::SCENARIOS,
    owner::SCENARIOS,
    verified::SCENARIOS,
    metadata::SCENARIOS,
    verbs::SCENARIOS,
    admin::SCENARIOS,
];

/// Played after those when they are asked for by name, and on hosts of another system.
const VARIANTS: &[&[Scenario]] = &[exactness::ON_REQUEST, failover::ON_REQUEST];

/// Played when they are asked for by name, as campaigns do.
const LONG: &[&[Scenario]] = &[
    verified::ON_REQUEST,
    owner::ON_REQUEST,
    traffic::ON_REQUEST,
    cards::ON_REQUEST,
    verbs::ON_REQUEST,
    connections::ON_REQUEST,
    metadata::ON_REQUEST,
];

/// How long a guest may take until it answers.
const UP: Duration = Duration::from_secs(120);

/// Machine and number of vCPUs.
type Shape = (&'static str, u32);

/// Every shape that has to work.
const SHAPES: [Shape; 4] = [("pc", 1), ("pc", 2), ("q35", 1), ("q35", 2)];

/// Guest g1 in a shape, answering.
fn start_shaped(lab: &Lab, host: HostName, (machine, vcpus): Shape) -> Result<Guest> {
    start(lab, host, &GuestSpec { machine: machine.into(), vcpus, ..GuestSpec::new("g1") })
}

/// Guest g1 as it is specified, answering.
fn start(lab: &Lab, host: HostName, spec: &GuestSpec) -> Result<Guest> {
    lab.start_guest(host, spec)?;
    Guest::wait(lab.dir(), "g1", UP)
}

/// Guest g1 on alpha, protected with these options, with epochs going by.
fn protected(lab: &Lab, options: &[&str], limit: Duration) -> Result<Guest> {
    let mut guest = start_shaped(lab, HostName::Alpha, SHAPES[0])?;
    guest.must("dirty 100 20")?;
    lab.protect_with("g1", HostName::Alpha, options)?;
    advances(lab, limit)?;
    Ok(guest)
}

/// Guest g1 on alpha, protected, rewriting so many pages all the time.
pub(crate) fn busy(lab: &Lab, pages: u32) -> Result<()> {
    let mut guest = protected(lab, &[], UP)?;
    guest.must(&format!("dirty {pages} 20")).map(drop)
}

/// What is done to a protected guest that runs on alpha, and leaves it protected and running there.
type Step = (&'static str, fn(&Lab, &mut Guest) -> Result<()>);

/// One guest goes through all of them: to start and protect another for each would take longer than they do.
fn in_turn(lab: &Lab, options: &[&str], limit: Duration, steps: &[Step]) -> Result<()> {
    let mut guest = protected(lab, options, limit)?;
    for (what, step) in steps {
        let began = Instant::now();
        step(lab, &mut guest).context(*what)?;
        println!("    {what} ({:.1} s)", began.elapsed().as_secs_f64());
    }
    Ok(())
}

fn is_protected(status: &GuestStatus) -> bool {
    status.state() == "protected"
}

/// Epochs of guest g1 go by.
fn advances(lab: &Lab, limit: Duration) -> Result<()> {
    let primary = (HostName::Alpha, Role::Primary);
    let now = lab.wait_status(primary, "g1", limit, is_protected)?.number("epochs_total").unwrap_or(0);
    lab.wait_status(primary, "g1", limit, |status| {
        is_protected(status) && status.number("epochs_total").is_some_and(|total| total > now + 3)
    })
    .map(drop)
}

/// An answer of a guest that is about to go may never come.
const SOON: Duration = Duration::from_secs(3);

/// Has guest g1 start itself anew; gives its new boot identity.
fn reboot(lab: &Lab, boot: &str) -> Result<String> {
    let mut guest = Guest::wait(lab.dir(), "g1", UP)?;
    guest.limit(SOON)?;
    // It may be gone before its answer is.
    drop(guest.ask("reboot"));
    rebooted(lab, boot)
}

/// Waits until guest g1 has another boot identity than this one, and gives it.
fn rebooted(lab: &Lab, boot: &str) -> Result<String> {
    let end = Instant::now() + UP;
    loop {
        let mut guest = Guest::wait(lab.dir(), "g1", UP)?;
        guest.limit(SOON)?;
        if let Some(again) = guest.count().ok().filter(|again| again.boot != boot) {
            return Ok(again.boot);
        }
        ensure!(Instant::now() < end, "the guest did not reboot");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Boots a lab and runs them all. In CI none is ever skipped.
pub(crate) fn run(report: &mut Report, pattern: &str, roots: Roots) -> Result<()> {
    let root = rustix::process::geteuid().is_root();
    if !root && !testing::in_ci() && process::find_program("sudo").is_none() {
        report.skip("lab", "it needs root for network namespaces and taps, and there is no sudo");
        return Ok(());
    }
    if !root {
        return as_root(report, pattern, roots);
    }
    let started = Instant::now();
    let lab = lab::cli::booted(LabDir::unique(), roots, LIFETIME, true, false, &Steps::start())?;
    println!("  lab is up after {:.1} s", started.elapsed().as_secs_f64());
    play(&lab, report, pattern);
    lab.down()
}

/// Runs the scenarios whose names contain `pattern`, in a lab that is up.
pub(crate) fn play(lab: &Lab, report: &mut Report, pattern: &str) {
    let roots = lab.roots().unwrap_or_default();
    let versions = versions::SCENARIOS.iter().filter(|_| roots == Roots::mixed());
    let variants =
        VARIANTS.iter().copied().flatten().filter(|_| !pattern.is_empty() || roots != Roots::default());
    let long = LONG.iter().copied().flatten().filter(|_| !pattern.is_empty());
    let all = SCENARIOS.iter().copied().flatten().chain(variants).chain(versions).chain(long);
    let repeats = Cell::new(0);
    for (name, scenario) in all.filter(|(name, _)| name.contains(pattern)) {
        report.test(name, || repeated(lab, &repeats, *scenario));
    }
    if repeats.get() > 0 {
        println!("    {} of at most {REPEATS} repetitions were needed", repeats.get());
    }
}

/// On emulated hosts a scenario that fails begins again, loudly, [`ATTEMPTS`] times at most and no more than
/// [`REPEATS`] times in a run, on hosts that are switched on anew: the emulated KVM now and then has the host's kernel panic, its processors spin or a guest
/// reset itself, which is not the doing of what runs in it. A failure that comes again is a failure, and on hosts with
/// a KVM of the machine's own every one is.
fn repeated(lab: &Lab, repeats: &Cell<u32>, scenario: fn(&Lab) -> Result<()>) -> Result<()> {
    let mut attempt = 1;
    loop {
        let Err(error) = play_once(lab, scenario) else { return Ok(()) };
        if !lab.is_emulated()? {
            return Err(error);
        }
        let fallen = lab.fallen_hosts()?;
        // One that runs `true` may still have a libvirt that never answers again.
        HostName::ALL.into_iter().try_for_each(|host| lab.ensure_off(host))?;
        if attempt == ATTEMPTS || repeats.get() == REPEATS {
            return Err(error);
        }
        println!("    attempt {attempt} failed, and the hosts are emulated: it begins again. {error:#}");
        for (host, how) in fallen {
            println!("    the emulated host {host} {how}");
        }
        repeats.set(repeats.get() + 1);
        attempt += 1;
    }
}

fn play_once(lab: &Lab, scenario: fn(&Lab) -> Result<()>) -> Result<()> {
    clear(lab)?;
    scenario(lab).map_err(|error| {
        anyhow!("{error:#}\nthe gates were\n{}\nthe agents said\n{}", lab.gates(), lab.agent_logs())
    })
}

/// The lab needs root; what cargo builds should stay the user's.
fn as_root(report: &mut Report, pattern: &str, roots: Roots) -> Result<()> {
    lab::agents::build()?;
    let us = std::env::current_exe()?;
    let mut command = Command::new("sudo");
    command.arg(process::PRESERVED).arg(us).args(["test", "--only", "lab", "--scenario", pattern]);
    command.args(["--root", &roots.to_string()]);
    let output = process::output(&mut command, LIFETIME)?;
    let said = String::from_utf8_lossy(&output.stdout);
    println!("{}{}", said.trim_end(), String::from_utf8_lossy(&output.stderr).trim_end());
    match said.lines().last().and_then(closing_line) {
        Some((passed, 0)) if output.status.success() => report.pass(passed),
        Some((passed, failed)) => {
            report.pass(passed);
            report.fail("lab", &format!("{failed} failed, see above"));
        }
        None => report.fail("lab", &format!("it ended without a result ({})", output.status)),
    }
    Ok(())
}

/// `N passed, N failed`
fn closing_line(line: &str) -> Option<(usize, usize)> {
    let mut words = line.split_whitespace();
    let (passed, _, failed) = (words.next()?, words.next()?, words.next()?);
    Some((passed.parse().ok()?, failed.parse().ok()?))
}

/// Switches a host on unless it is, and waits until its agents answer.
fn up(lab: &Lab, host: HostName) -> Result<()> {
    lab.ensure_up(host, &Steps::quiet())?;
    [Role::Primary, Role::Backup].into_iter().try_for_each(|role| lab.wait_agent(host, role))
}

/// Both hosts up, every cable plugged in, no guest anywhere.
pub(crate) fn clear(lab: &Lab) -> Result<()> {
    for net in [Net::Lan, Net::Repl] {
        lab.heal(Link { net, host: None })?;
    }
    // They boot side by side.
    HostName::ALL.into_iter().try_for_each(|host| lab.ensure_on(host))?;
    for host in HostName::ALL {
        up(lab, host)?;
    }
    // Nearly always there is nothing to do, and virsh takes its time in an emulated host.
    let wipe = Exec::shell(
        "rm -f /run/lab/*.serial /run/lab/*.hold /run/lab/*.args
        for i in $(seq 15); do
          all=$(virsh list --all --name | xargs)
          test -z \"$all\" && exit 0
          for g in $all; do
            timeout 20 understudy unprotect $g
            virsh -q destroy $g; virsh -q undefine $g
          done >/dev/null 2>&1
          test $i -lt 3 || sleep 1 # a standby may just be being made
        done; echo \"still there: $all\"; exit 1",
    )
    .limit(Duration::from_secs(90));
    std::thread::scope(|scope| {
        let wipe = &wipe;
        let wipes = HostName::ALL.map(|host| {
            scope.spawn(move || lab.checked(host, wipe).and_then(|_| forget(lab, host)).context(host.name()))
        });
        wipes
            .into_iter()
            .try_for_each(|wiped| wiped.join().unwrap_or_else(|_| bail!("wiping a host panicked")))
    })
}

/// Makes the agents of a host drop what is left of guests whose other host is gone.
fn forget(lab: &Lab, host: HostName) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let known = lab.known_guests(host)?;
        if known.is_empty() {
            return Ok(());
        }
        ensure!(Instant::now() < end, "the agents still know {known:?}");
        for guest in known {
            // It may just be going by itself.
            lab.understudy(host, &["unprotect", &guest])?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closing_line_is_understood() {
        assert_eq!(closing_line("24 passed, 1 failed, 3 skipped"), Some((24, 1)));
        assert_eq!(closing_line("Error: no lab"), None);
    }
}
