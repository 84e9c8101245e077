//! What happens to protection when agents die and when operators use virsh.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{SHAPES, Scenario, Step, advances, in_turn, is_protected, start_shaped};
use crate::lab::Lab;
use crate::lab::guest::Guest;
use crate::lab::plan::HostName::{Alpha, Beta};
use crate::lab::understudy::Role;

pub(super) const SCENARIOS: &[Scenario] = &[
    (
        "lifecycle: unprotected, its agent killed, suspended, rebooted: a guest runs on and is protected",
        |lab| in_turn(lab, &[], LIMIT, RUNS_ON),
    ),
    ("lifecycle: shutdown and destroy end protection, undefine does not", |lab| {
        in_turn(lab, &[], LIMIT, ENDS)
    }),
    (
        "lifecycle: the primary agent is killed in the middle of a stop and not started again, the guest runs on",
        primary_killed_at_a_stop,
    ),
    (
        "lifecycle: the backup agent is killed, the link is cut: the primary says so, and goes on afterwards",
        |lab| in_turn(lab, UNGATED, LIMIT, BACKUP_LOST),
    ),
];

const RUNS_ON: &[Step] = &[
    ("unprotect ends protection, the guest runs on", unprotect),
    ("the primary agent is killed, the guest runs on", primary_killed),
    ("virsh suspend and resume", suspend),
    ("a reboot is followed", reboot),
];
const ENDS: &[Step] = &[
    ("virsh shutdown ends protection", |lab, guest| ends_by(lab, guest, "virsh shutdown g1")),
    ("virsh destroy ends protection", |lab, guest| ends_by(lab, guest, "virsh destroy g1")),
    ("virsh undefine leaves the running guest protected", undefine),
];
const BACKUP_LOST: &[Step] = &[
    ("the backup agent is killed, the primary says so and goes on when it is back", backup_killed),
    ("a cut replication link is noticed and healed", link_cut),
];

const LIMIT: Duration = Duration::from_secs(120);
/// To hear of the guest while its backup is lost.
const UNGATED: &[&str] = &["--ungated"];

/// The guest is the same one, counts, and its memory is in order.
fn runs_on(guest: &mut Guest) -> Result<()> {
    let before = guest.count()?;
    std::thread::sleep(Duration::from_millis(500));
    let after = guest.count()?;
    ensure!(
        after.boot == before.boot && after.total > before.total,
        "{before:?}, half a second later {after:?}"
    );
    guest.must("check").map(drop)
}

fn unprotect(lab: &Lab, guest: &mut Guest) -> Result<()> {
    lab.must_understudy(Alpha, &["unprotect", "g1"])?;
    runs_on(guest)?;
    ensure!(
        lab.status(Alpha, Role::Primary, "g1")?.is_none_or(|status| !is_protected(&status)),
        "still protected"
    );
    no_standby(lab)?;
    // And it can be protected again.
    lab.protect("g1", Alpha)?;
    advances(lab, LIMIT)?;
    runs_on(guest)
}

/// The paused copy goes away with the protection; one that was just being created goes when it is there.
fn no_standby(lab: &Lab) -> Result<()> {
    let end = Instant::now() + LIMIT;
    loop {
        let domains = lab.shell(Beta, "virsh list --all --name")?;
        let status = lab.status(Beta, Role::Backup, "g1")?;
        if domains.trim().is_empty() && status.is_none() {
            return Ok(());
        }
        ensure!(Instant::now() < end, "beta still has {domains:?} and says {status:?}");
        std::thread::sleep(Duration::from_millis(500));
    }
}

fn primary_killed(lab: &Lab, guest: &mut Guest) -> Result<()> {
    lab.kill_agent(Alpha, Role::Primary)?;
    runs_on(guest).context("right after the agent was killed")?;
    // The next one finds what is left and takes the guest up again.
    advances(lab, LIMIT).context("protection does not come back")?;
    runs_on(guest)
}

/// The agent dies where QEMU waits for its word; only the supervisor is left to say it.
fn primary_killed_at_a_stop(lab: &Lab) -> Result<()> {
    // Late enough for `protect` to be over.
    const LAST_EPOCH: u64 = 60;
    let log = lab.dir().shared().join(format!("log/{Alpha}-understudy-watchdog.log"));
    let read = || fs::read_to_string(&log).with_context(|| format!("cannot read {}", log.display()));
    let before = read()?.len();
    lab.restart_agent(Alpha, Role::Primary, &format!("--die-at-epoch\n{LAST_EPOCH}"))?;
    // From now on whoever dies stays dead.
    lab.shell(Alpha, "touch /run/lab/understudy-primary.hold")?;
    let mut guest = start_shaped(lab, Alpha, SHAPES[0])?;
    guest.must("dirty 100 20")?;
    lab.must_understudy(Alpha, &["protect", "g1", "--to", "beta", "--insecure", "--ungated"])?;
    lab.shell(
        Alpha,
        "for i in $(seq 250); do kill -0 $(cat /run/lab/understudy-primary.pid) 2>/dev/null || exit 0; sleep 0.2; done
        echo 'the agent does not die' >&2; exit 1",
    )?;
    runs_on(&mut guest).context("right after the agent died within a stop")?;
    let end = Instant::now() + LIMIT;
    while !read()?
        .get(before..)
        .is_some_and(|said| said.contains("the guest was left stopped and is let run"))
    {
        ensure!(Instant::now() < end, "the supervisor does not say that it let the guest run");
        std::thread::sleep(Duration::from_millis(100));
    }
    lab.shell(Alpha, "rm /run/lab/understudy-primary.args")?;
    lab.release_agent(Alpha, Role::Primary)?;
    advances(lab, LIMIT).context("protection does not come back")?;
    runs_on(&mut guest)
}

fn backup_killed(lab: &Lab, guest: &mut Guest) -> Result<()> {
    lab.hold_agent(Beta, Role::Backup)?;
    lab.wait_status((Alpha, Role::Primary), "g1", Duration::from_secs(10), |status| !is_protected(status))
        .context("the primary does not notice that its backup is gone")?;
    runs_on(guest)?;
    lab.release_agent(Beta, Role::Backup)?;
    advances(lab, LIMIT).context("protection does not come back")?;
    runs_on(guest)
}

fn link_cut(lab: &Lab, guest: &mut Guest) -> Result<()> {
    let repl = "repl".parse()?;
    lab.cut(repl)?;
    lab.wait_status((Alpha, Role::Primary), "g1", Duration::from_secs(30), |status| !is_protected(status))
        .context("the primary does not notice that the link is cut")?;
    runs_on(guest)?;
    lab.heal(repl)?;
    advances(lab, LIMIT).context("protection does not come back")?;
    runs_on(guest)
}

fn ends_by(lab: &Lab, guest: &mut Guest, command: &str) -> Result<()> {
    // libvirt takes the stop of a checkpoint for a pause, and shuts down only what runs: whoever asks in that moment
    // is told so, and asks again.
    let script = format!(
        "for i in $(seq 50); do
             said=$({command} 2>&1) && exit 0
             case $said in *'domain is not running'*) ;; *) break ;; esac
         done; echo \"$said\" >&2; exit 1"
    );
    lab.shell(Alpha, &script)?;
    let domain_is_off =
        "for i in $(seq 100); do virsh domstate g1 | grep -q 'shut off' && exit 0; sleep 0.2; done; exit 1";
    lab.shell(Alpha, domain_is_off).context("the domain does not end")?;
    lab.wait_status((Alpha, Role::Primary), "g1", LIMIT, |status| status.state() == "ended")?;
    // An end that was wanted must not look like a dead host.
    no_standby(lab)?;
    // The domain can be started and protected again.
    lab.shell(Alpha, "virsh start g1")?;
    *guest = Guest::wait(lab.dir(), "g1", LIMIT)?;
    lab.protect("g1", Alpha)?;
    advances(lab, LIMIT)?;
    runs_on(guest)
}

fn undefine(lab: &Lab, guest: &mut Guest) -> Result<()> {
    lab.shell(Alpha, "virsh undefine g1")?;
    runs_on(guest)?;
    advances(lab, LIMIT)
}

/// A suspend that falls into the stop of a checkpoint is lost: libvirt takes that stop for its own. Whoever
/// suspends a protected guest looks, and repeats it.
fn suspend(lab: &Lab, guest: &mut Guest) -> Result<()> {
    lab.shell(
        Alpha,
        "for i in $(seq 20); do
             virsh suspend g1 || exit 1
             for n in 1 2 3 4 5; do sleep 0.3; virsh domstate g1 | grep -q paused || continue 2; done
             exit 0
         done
         echo 'the guest does not stay suspended' >&2; exit 1",
    )?;
    let epochs = || -> Result<Option<u64>> {
        Ok(lab.status(Alpha, Role::Primary, "g1")?.and_then(|status| status.number("epochs_total")))
    };
    let before = epochs()?;
    std::thread::sleep(Duration::from_secs(3));
    ensure!(epochs()? == before, "epochs go by although the guest is suspended");
    let state = lab.shell(Alpha, "virsh domstate g1")?;
    ensure!(state.trim() == "paused", "a suspended guest is {}", state.trim());
    lab.shell(Alpha, "virsh resume g1")?;
    runs_on(guest)?;
    advances(lab, LIMIT)?;
    runs_on(guest)
}

fn reboot(lab: &Lab, guest: &mut Guest) -> Result<()> {
    let boot = guest.count()?.boot;
    super::reboot(lab, &boot)?;
    advances(lab, LIMIT)?;
    *guest = Guest::wait(lab.dir(), "g1", LIMIT)?;
    guest.must("dirty 100 20")?;
    runs_on(guest)
}
