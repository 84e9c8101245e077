//! The lab itself: what every other scenario relies on.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::Scenario;
use crate::lab::Lab;
use crate::lab::domain::GuestSpec;
use crate::lab::guest::Guest;
use crate::lab::plan::{HostName, Link};
use crate::lab::remote::Exec;
use crate::ui::Steps;

pub(super) const SCENARIOS: &[Scenario] = &[
    ("lab: a command's output and exit status come back", command_comes_back),
    ("lab: a command past its limit is ended", command_is_ended),
    ("lab: hosts share a folder and have names", shared_folder),
    ("lab: a guest counts on i440fx and q35, on one and two vCPUs", guests_count),
    ("lab: a cut link carries nothing until it is healed", cut_and_heal),
    ("lab: a host keeps its definitions over a power cut, and nothing else", power_cut),
];

const UP: Duration = Duration::from_secs(60);

fn command_comes_back(lab: &Lab) -> Result<()> {
    let outcome = lab.exec(HostName::Alpha, &Exec::shell("echo out; echo err >&2; exit 7"))?;
    ensure!(
        (outcome.code, outcome.stdout.as_str(), outcome.stderr.as_str()) == (7, "out\n", "err\n"),
        "{outcome:?}"
    );
    let killed = lab.exec(HostName::Beta, &Exec::shell("kill -9 $$"))?;
    ensure!(killed.code == 137, "{killed:?}");
    ensure!(lab.exec(HostName::Beta, &Exec::new(["no-such-program"])).is_err(), "a missing program was run");
    Ok(())
}

fn command_is_ended(lab: &Lab) -> Result<()> {
    let started = Instant::now();
    let result =
        lab.exec(HostName::Alpha, &Exec::shell("sleep 6123 & sleep 6123").limit(Duration::from_secs(1)));
    ensure!(
        result.is_err() && started.elapsed() < Duration::from_secs(8),
        "{result:?} after {:?}",
        started.elapsed()
    );
    let left = lab.exec(HostName::Alpha, &Exec::new(["pgrep", "-f", "sleep 6123"]))?;
    ensure!(left.code == 1, "left running: {}", left.stdout);
    Ok(())
}

fn shared_folder(lab: &Lab) -> Result<()> {
    let file = lab.dir().shared().join("hello");
    lab.shell(HostName::Alpha, &format!("hostname > {}", file.display()))?;
    let seen = lab.shell(HostName::Beta, &format!("cat {}; hostname; getent hosts alpha", file.display()))?;
    ensure!(seen.split_whitespace().collect::<Vec<_>>() == ["alpha", "beta", "10.78.0.1", "alpha"], "{seen}");
    Ok(())
}

fn guests_count(lab: &Lab) -> Result<()> {
    for (machine, vcpus) in [("pc", 1), ("q35", 2)] {
        let name = format!("g{vcpus}");
        lab.start_guest(
            HostName::Alpha,
            &GuestSpec { machine: machine.into(), vcpus, ..GuestSpec::new(&name) },
        )?;
        let mut guest = Guest::wait(lab.dir(), &name, UP)?;
        guest.must("dirty 100 10")?;
        let first = guest.count()?;
        std::thread::sleep(Duration::from_millis(500));
        let then = guest.count()?;
        ensure!(then.boot == first.boot && then.total > first.total, "{first:?} then {then:?}");
        guest.must("check")?;
        let id = guest.must("id")?;
        ensure!(id.contains(&format!("name={name} ")) && id.contains(&format!("vcpus={vcpus} ")), "{id}");
    }
    Ok(())
}

fn cut_and_heal(lab: &Lab) -> Result<()> {
    let ping = Exec::new(["bash", "-c", "timeout 2 bash -c '</dev/tcp/10.78.0.2/7001' 2>&1"]);
    let repl: Link = "repl:beta".parse()?;
    let heard = |lab: &Lab| -> Result<bool> {
        // Nobody listens there on this network: refused is an answer, silence is not.
        Ok(lab.exec(HostName::Alpha, &ping)?.stdout.contains("refused"))
    };
    ensure!(heard(lab)?, "beta does not answer on repl");
    lab.cut(repl)?;
    ensure!(!heard(lab)?, "beta answers through a cut cable");
    lab.heal(repl)?;
    ensure!(heard(lab)?, "beta does not answer after the cable was plugged in again");
    Ok(())
}

fn power_cut(lab: &Lab) -> Result<()> {
    super::start(lab, HostName::Beta, &GuestSpec::new("g1"))?;
    lab.shell(HostName::Beta, "touch /root/memory /var/lib/understudy/disk")?;
    lab.power_off(HostName::Beta)?;
    ensure!(Guest::connect(lab.dir(), "g1", Duration::from_secs(1)).is_err(), "the guest outlived its host");
    lab.ensure_up(HostName::Beta, &Steps::quiet())?;
    let seen =
        lab.shell(HostName::Beta, "ls /root/memory 2>&1; ls /var/lib/understudy/disk; virsh domstate g1")?;
    ensure!(seen.contains("cannot access") && seen.contains("understudy/disk"), "{seen}");
    ensure!(seen.contains("shut off"), "{seen}");
    Ok(())
}
