//! What virsh does to a guest that its XML protects: the outcome is the one in docs/OPERATIONS.md, no verb hangs, and the
//! guest never runs twice.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::metadata::{define, wait_shown};
use super::{Scenario, UP};
use crate::lab::Lab;
use crate::lab::domain::guest_mac;
use crate::lab::guest::Guest;
use crate::lab::plan::HostName::{self, Alpha, Beta};
use crate::lab::plan::START_LIBVIRT;
use crate::lab::remote::{Exec, Outcome};
use crate::lab::understudy::Role;

pub(super) const SCENARIOS: &[Scenario] = &[
    ("verbs: virsh and restarts of libvirtd, on a guest that its XML protects", verbs),
    ("verbs: virsh save is refused and loses nothing, here or on the backup", save),
];

/// What is too long for CI.
pub(super) const ON_REQUEST: &[Scenario] =
    &[("campaign: fifty starts and destroys with the hook in place", |lab| starts(lab, 50))];

const LIMIT: Duration = Duration::from_secs(120);

/// No verb may take longer, however it ends.
const VERB: Duration = Duration::from_secs(90);

pub(super) const SAVE: &str = "save g1 /dev/shm/g1.save";

/// How often a guest is started and destroyed in CI.
pub(super) const STARTS: u32 = 5;

fn virsh(lab: &Lab, verb: &str) -> Result<Outcome> {
    let begun = Instant::now();
    let outcome = lab.exec(Alpha, &Exec::shell(&format!("virsh -q {verb} 2>&1")).limit(VERB))?;
    let first = outcome.stdout.lines().next().unwrap_or_default();
    println!(
        "    virsh {}: {} after {:.1} s {first}",
        verb.split(' ').next().unwrap_or(verb),
        if outcome.code == 0 { "done" } else { "refused" },
        begun.elapsed().as_secs_f64()
    );
    Ok(outcome)
}

/// It runs on alpha and not on beta, and is protected.
fn protected(lab: &Lab, what: &str) -> Result<()> {
    wait_shown(lab, Alpha, &["value=\"protected\"", "backup=\"beta\""]).context(what.to_owned())?;
    super::advances(lab, LIMIT).context(what.to_owned())?;
    only_once(lab).context(what.to_owned())
}

fn only_once(lab: &Lab) -> Result<()> {
    ensure!(!running(lab, Beta)?, "the guest runs on beta as well");
    Ok(())
}

pub(super) fn running(lab: &Lab, host: HostName) -> Result<bool> {
    Ok(state(lab, host)? == "running")
}

/// As virsh says it; empty where there is no such domain.
fn state(lab: &Lab, host: HostName) -> Result<String> {
    let said = lab.exec(host, &Exec::shell("virsh -q domstate g1"))?;
    Ok(if said.code == 0 { said.stdout.trim().to_owned() } else { String::new() })
}

fn refused(lab: &Lab, verb: &str) -> Result<()> {
    let outcome = virsh(lab, verb)?;
    ensure!(outcome.code != 0, "virsh {verb} was done: {outcome:?}");
    protected(lab, verb)
}

fn verbs(lab: &Lab) -> Result<()> {
    define(lab, "enabled='yes' backup='beta'")?;
    lab.shell(Alpha, "virsh -q start g1")?;
    let boot = Guest::wait(lab.dir(), "g1", UP)?.count()?.boot;
    protected(lab, "start")?;
    let full_copies = || -> Result<Option<u64>> {
        Ok(lab.status(Alpha, Role::Primary, "g1")?.and_then(|status| status.number("full_copies_total")))
    };
    let copies = full_copies()?;

    // Neither of the two touches the guest.
    refused(lab, &format!("detach-interface g1 bridge --mac {} --live", guest_mac("g1")))?;
    refused(lab, "migrate --live g1 qemu+tcp://beta/system")?;
    for host in [Alpha, Beta] {
        lab.shell(
            host,
            &format!("kill $(pidof libvirtd virtqemud); while pidof libvirtd virtqemud >/dev/null; do sleep 0.1; done
             sh {START_LIBVIRT}
             for i in $(seq 100); do virsh -q list >/dev/null 2>&1 && exit 0; sleep 0.2; done; exit 1"),
        )?;
        protected(lab, &format!("a restart of libvirt on {host}"))?;
    }
    ensure!(full_copies()? == copies, "a full copy was made: {:?} before, {:?} now", copies, full_copies()?);

    done(lab, "reboot g1")?;
    super::rebooted(lab, &boot)?;
    protected(lab, "reboot")?;

    done(lab, "undefine g1")?;
    protected(lab, "undefine")?;
    done(lab, "destroy g1")?;
    let end = Instant::now() + LIMIT;
    while !lab.shell(Beta, "virsh list --all --name")?.trim().is_empty() {
        ensure!(Instant::now() < end, "beta keeps the standby of a guest that was destroyed");
        std::thread::sleep(Duration::from_millis(300));
    }
    Ok(())
}

/// What comes of it is one of the three that docs/OPERATIONS.md has.
fn save(lab: &Lab) -> Result<()> {
    define(lab, "enabled='yes' backup='beta'")?;
    lab.shell(Alpha, "virsh -q start g1")?;
    Guest::wait(lab.dir(), "g1", UP)?;
    protected(lab, "start")?;
    let before = Guest::wait(lab.dir(), "g1", UP)?.count()?;
    let outcome = answered(lab, SAVE)?;
    ensure!(outcome.code != 0, "virsh save was done: {outcome:?}");
    let on = if outlives(lab, LATE)? { Alpha } else { Beta };
    if on == Beta {
        println!("    QEMU has ended itself");
        println!("    {}", lab.must_understudy(Beta, &["failover", "g1"])?.trim());
    }
    let now = Guest::wait(lab.dir(), "g1", UP)?.count()?;
    ensure!(now.boot == before.boot && now.total >= before.total, "{before:?}, then {now:?}");
    if on == Alpha && spoiled(lab)? {
        println!("    the guest runs on, its QEMU cannot be checkpointed any more");
        wait_shown(lab, Alpha, &["value=\"failed\"", "code=\"migration-active\"", "virsh shutdown"])?;
        only_once(lab)?;
        lab.shell(Alpha, "virsh -q destroy g1 && virsh -q start g1")?;
    }
    // After a failover the element, which names beta, has it protected back.
    wait_shown(lab, on, &["value=\"protected\"", &format!("backup=\"{}\"", on.other())])?;
    ensure!(!running(lab, on.other())?, "the guest runs on {} as well", on.other());
    Ok(())
}

/// How long after a save that failed QEMU may still end itself.
pub(super) const LATE: Duration = Duration::from_secs(10);

/// Whether the domain is on alpha so much later. A look may fall into the stop of a checkpoint, where it is paused.
pub(super) fn outlives(lab: &Lab, time: Duration) -> Result<bool> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        if !["running", "paused"].contains(&state(lab, Alpha)?.as_str()) {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(500));
    }
    Ok(true)
}

/// QEMU 7.2 lets go of its capture for a migration that it then cannot begin, and stays between the two.
pub(super) fn spoiled(lab: &Lab) -> Result<bool> {
    let asked = "virsh qemu-monitor-command g1 '{\"execute\":\"query-migrate\"}'";
    Ok(lab.shell(Alpha, asked)?.contains("\"status\":\"setup\""))
}

fn done(lab: &Lab, verb: &str) -> Result<()> {
    let outcome = answered(lab, verb)?;
    ensure!(outcome.code == 0, "virsh {verb}: {outcome:?}");
    Ok(())
}

/// What falls into the stop of a checkpoint is told that the domain does not run, and asked for again.
pub(super) fn answered(lab: &Lab, verb: &str) -> Result<Outcome> {
    let end = Instant::now() + VERB;
    loop {
        let outcome = virsh(lab, verb)?;
        if outcome.code == 0 || !outcome.stdout.contains("domain is not running") {
            return Ok(outcome);
        }
        ensure!(Instant::now() < end, "virsh {verb}: {outcome:?}");
    }
}

/// A marked guest is started and destroyed over and over, with libvirt's hook in the way; the last one is protected.
fn starts(lab: &Lab, rounds: u32) -> Result<()> {
    super::metadata::with_hook(lab, |lab| started_and_destroyed(lab, rounds))
}

/// The same, the hook being in place.
pub(super) fn started_and_destroyed(lab: &Lab, rounds: u32) -> Result<()> {
    define(lab, "enabled='yes' backup='beta' required='yes'")?;
    let begun = Instant::now();
    let script = format!(
        "for i in $(seq {rounds}); do
             virsh -q start g1 || exit 1
             virsh -q destroy g1 || exit 1
         done; virsh -q start g1"
    );
    let outcome = lab.exec(Alpha, &Exec::shell(&script).limit(Duration::from_secs(1200)))?;
    ensure!(outcome.code == 0, "{outcome:?}");
    println!("    {rounds} starts and destroys: {:.1} s", begun.elapsed().as_secs_f64());
    wait_shown(lab, Alpha, &["value=\"protected\""])?;
    only_once(lab)
}
