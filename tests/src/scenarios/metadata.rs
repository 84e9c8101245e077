//! Switched on by a line in the domain's XML: with virsh and a text editor only.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::{Scenario, UP, verbs};
use crate::lab::Lab;
use crate::lab::domain::GuestSpec;
use crate::lab::guest::Guest;
use crate::lab::plan::HostName::{self, Alpha, Beta};
use crate::lab::remote::Exec;
use crate::lab::understudy::Role;

pub(super) const SCENARIOS: &[Scenario] = &[
    ("metadata: one element protects a guest from its start, and virsh fails it over", from_the_start),
    ("metadata: virsh switches on, is told of mistakes, and switches off", by_virsh),
    ("metadata: the hook never holds a start, and refuses what must not run unprotected", hook),
];

/// Played when they are asked for by name.
pub(super) const ON_REQUEST: &[Scenario] =
    &[("metadata: a guest whose QEMU is killed, failed over by hand at once, is protected back", killed)];

const DOMAIN: &str = "urn:understudy:domain:1";
const COMMAND: &str = "urn:understudy:command:1";
const STATE: &str = "urn:understudy:state:1";

/// Emulated hosts take their time over a full copy.
const LIMIT: Duration = Duration::from_secs(120);

/// What `dumpxml` shows of the state contains this within the time.
pub(super) fn wait_shown(lab: &Lab, host: HostName, words: &[&str]) -> Result<String> {
    let end = Instant::now() + LIMIT;
    loop {
        let xml = lab.shell(host, "virsh dumpxml g1")?;
        let state = xml.lines().find(|line| line.contains(STATE)).unwrap_or_default().trim().to_owned();
        if !state.is_empty() && words.iter().all(|word| state.contains(word)) {
            return Ok(state);
        }
        ensure!(Instant::now() < end, "dumpxml never showed {words:?}, but {state:?}");
        std::thread::sleep(Duration::from_millis(500));
    }
}

fn set(lab: &Lab, host: HostName, uri: &str, element: &str) -> Result<()> {
    let script = format!("virsh -q metadata g1 {uri} --live --key understudy --set \"{element}\"");
    lab.shell(host, &script).map(drop)
}

/// Defines g1 with the attributes of our element; none of our own commands has a part in it.
pub(super) fn define(lab: &Lab, attributes: &str) -> Result<()> {
    let element = format!("<metadata><u:protect xmlns:u='{DOMAIN}' {attributes}/></metadata>");
    let xml = GuestSpec::new("g1").xml(lab.dir());
    let xml = xml.replace("<name>g1</name>", &format!("<name>g1</name>\n  {element}"));
    let file = lab.dir().shared().join("g1.xml");
    std::fs::write(&file, xml).with_context(|| file.display().to_string())?;
    // The definition before has a UUID of its own.
    let script = format!("virsh -q undefine g1 >/dev/null 2>&1; virsh -q define {}", file.display());
    lab.shell(Alpha, &script).map(drop)
}

fn from_the_start(lab: &Lab) -> Result<()> {
    define(lab, "enabled='yes' backup='beta'")?;
    lab.shell(Alpha, "virsh -q start g1")?;
    let boot = Guest::wait(lab.dir(), "g1", UP)?.count()?.boot;
    let state = wait_shown(lab, Alpha, &["value=\"protected\"", "backup=\"beta\""])?;
    ensure!(state.contains("by=\"metadata\""), "{state}");
    lab.power_off(Alpha)?;
    // It is refused for as long as the dead host may still be alive.
    let end = Instant::now() + LIMIT;
    loop {
        set(lab, Beta, COMMAND, "<failover/>")?;
        std::thread::sleep(Duration::from_secs(2));
        let state = lab.shell(Beta, "virsh domstate g1")?;
        if state.trim() == "running" {
            break;
        }
        ensure!(Instant::now() < end, "not failed over; {state}; {}", lab.shell(Beta, "virsh dumpxml g1")?);
    }
    let now = Guest::wait(lab.dir(), "g1", UP)?.count()?;
    ensure!(now.boot == boot, "another boot: {} instead of {boot}", now.boot);
    super::up(lab, Alpha)?;
    // The element still says beta, where it is now: the hosts have changed places.
    wait_shown(lab, Beta, &["value=\"protected\"", "backup=\"alpha\""]).map(drop)
}

/// Nothing but the record of the promotion tells beta's agent that the guest is its own now.
fn killed(lab: &Lab) -> Result<()> {
    define(lab, "enabled='yes' backup='beta'")?;
    lab.shell(Alpha, "virsh -q start g1")?;
    let before = Guest::wait(lab.dir(), "g1", UP)?.count()?;
    wait_shown(lab, Alpha, &["value=\"protected\""])?;
    lab.shell(Alpha, "kill -9 $(pidof qemu-system-x86_64)")?;
    let end = Instant::now() + LIMIT;
    loop {
        let outcome = lab.understudy(Beta, &["failover", "g1"])?;
        if outcome.code == 0 {
            break;
        }
        ensure!(Instant::now() < end, "not failed over: {outcome:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
    let now = Guest::wait(lab.dir(), "g1", UP)?.count()?;
    ensure!(now.boot == before.boot && now.total >= before.total, "{before:?}, then {now:?}");
    wait_shown(lab, Beta, &["value=\"protected\"", "backup=\"alpha\""]).map(drop)
}

fn by_virsh(lab: &Lab) -> Result<()> {
    let mut guest = super::start(lab, Alpha, &GuestSpec::new("g1"))?;
    let boot = guest.count()?.boot;
    set(lab, Alpha, DOMAIN, "<protect enabled='yes' backup='beta' insecure='yes'/>")?;
    wait_shown(lab, Alpha, &["value=\"protected\""])?;
    // A slip of the pen costs no protection.
    set(lab, Alpha, DOMAIN, "<protect enabled='yes' backp='beta' insecure='yes'/>")?;
    wait_shown(lab, Alpha, &["value=\"protected\"", "did you mean", "backup"])?;
    set(lab, Alpha, COMMAND, "<failover/>")?;
    wait_shown(lab, Alpha, &["failover: refused", "beta"])?;
    let left = lab.exec(Alpha, &Exec::shell(&format!("virsh metadata g1 {COMMAND}")))?;
    ensure!(left.code != 0, "the command is still there: {left:?}");
    set(lab, Alpha, DOMAIN, "<protect enabled='no'/>")?;
    wait_shown(lab, Alpha, &["value=\"off\""])?;
    if let Some(status) = lab.status(Beta, Role::Backup, "g1")? {
        ensure!(status.state() == "unprotected", "the backup still has it: {}", status.state());
    }
    let now = Guest::wait(lab.dir(), "g1", UP)?.count()?;
    ensure!(now.boot == boot, "the guest was disturbed");
    Ok(())
}

fn hook(lab: &Lab) -> Result<()> {
    with_hook(lab, hooked)
}

/// With the hook in place, and away afterwards.
pub(super) fn with_hook(lab: &Lab, work: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    lab.shell(
        Alpha,
        "understudy hook install && kill -HUP $(pidof libvirtd virtqemud) && sleep 2 && virsh -q list",
    )?;
    let result = work(lab);
    lab.shell(Alpha, "understudy hook remove")?;
    result
}

fn hooked(lab: &Lab) -> Result<()> {
    let start = |what: &str| -> Result<()> {
        let begun = Instant::now();
        let outcome = lab.exec(Alpha, &Exec::shell("virsh -q start g1").limit(LIMIT))?;
        println!("    virsh start with the agent {what}: {:.1} s", begun.elapsed().as_secs_f64());
        ensure!(outcome.code == 0, "{what}: {outcome:?}");
        lab.shell(Alpha, "virsh -q destroy g1").map(drop)
    };
    define(lab, "enabled='no'")?;
    start("up")?;
    lab.hold_agent(Alpha, Role::Primary)?;
    let hung = start("hung").and_then(|()| {
        define(lab, "enabled='yes' backup='beta' insecure='yes' required='yes'")?;
        refused(lab, "required='yes'")
    });
    lab.release_agent(Alpha, Role::Primary)?;
    hung?;
    lab.wait_agent(Alpha, Role::Primary)?;
    define(lab, "enabled='yes' backup='127.0.0.1:1' insecure='yes' required='yes'")?;
    refused(lab, "127.0.0.1:1 cannot be used")?;
    verbs::started_and_destroyed(lab, verbs::STARTS)
}

fn refused(lab: &Lab, words: &str) -> Result<()> {
    let outcome = lab.exec(Alpha, &Exec::shell("virsh -q start g1").limit(LIMIT))?;
    if outcome.code == 0 || !outcome.stderr.contains(words) {
        bail!("expected a refusal with {words:?}: {outcome:?}");
    }
    Ok(())
}
