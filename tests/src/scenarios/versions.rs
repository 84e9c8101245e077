//! Two versions of QEMU and libvirt in one pair: this machine's own on alpha, Debian 13's on beta.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{Scenario, start};
use crate::lab::Lab;
use crate::lab::domain::GuestSpec;
use crate::lab::guest::Guest;
use crate::lab::observer::Observer;
use crate::lab::plan::HostName::{self, Alpha, Beta};
use crate::lab::understudy::Role;

/// What the names of all of them contain.
pub(crate) const VERSIONS: &str = "versions: ";

/// Only for a lab whose hosts are `machine` and `debian13`, in this order.
pub(super) const SCENARIOS: &[Scenario] = &[
    ("versions: a guest goes from the older QEMU to the newer and back, i440fx", |lab| {
        there_and_back(lab, "pc")
    }),
    ("versions: a guest goes from the older QEMU to the newer and back, q35", |lab| {
        there_and_back(lab, "q35")
    }),
    ("versions: a machine type the older QEMU lacks is refused", too_new),
];

/// A guest that has not answered by then is dead.
const LIMIT: Duration = Duration::from_secs(120);

/// The machine type is the older QEMU's newest, which the newer one has as well.
fn there_and_back(lab: &Lab, machine: &str) -> Result<()> {
    ensure!(version(lab, Alpha)? < version(lab, Beta)?, "beta does not have the newer QEMU");
    let spec = GuestSpec { machine: machine.to_owned(), ..GuestSpec::new("g1") };
    let mut guest = start(lab, Alpha, &spec)?;
    guest.must("dirty 300 20")?;
    let boot = guest.count()?.boot;
    let pinned = machine_of(lab, Alpha)?;
    for on in [Alpha, Beta] {
        take_over(lab, on, &boot).with_context(|| format!("{pinned} from {on} to {}", on.other()))?;
        ensure!(machine_of(lab, on.other())? == pinned, "the guest has another machine type now");
        super::up(lab, on)?;
    }
    Ok(())
}

/// Protects the guest, cuts the power of its host, and promotes the other one.
fn take_over(lab: &Lab, on: HostName, boot: &str) -> Result<()> {
    let backup = on.other();
    lab.protect("g1", on)?;
    lab.wait_status((on, Role::Primary), "g1", LIMIT, |status| {
        status.committed_epoch().is_some_and(|epoch| epoch >= 10)
    })?;
    let observer = Observer::start(lab.dir(), "g1");
    observer.first_after(Instant::now(), LIMIT).context("the client saw nothing of the protected guest")?;
    lab.power_off(on)?;
    let before = observer.last().context("the client saw nothing before the cut")?.count.total;
    let asked = Instant::now();
    lab.failover("g1", backup)?;
    let first = observer.first_after(asked, LIMIT).context("no answer after the failover")?.count;
    ensure!(first.boot == boot, "the guest was started anew: {first:?}");
    ensure!(first.total >= before, "the client saw {before}, and now {}", first.total);
    let mut guest = Guest::wait(lab.dir(), "g1", LIMIT)?;
    guest.must("check")?;
    std::thread::sleep(Duration::from_millis(500));
    let later = guest.count()?.total;
    ensure!(later > first.total, "the counter stands still at {later}");
    let to = text(version(lab, backup)?);
    println!("    {on} -> {backup} with QEMU {to}: counter {before} -> {}", first.total);
    Ok(())
}

/// Refused before anything is touched, with the machine type, the version that lacks it, and what to do.
fn too_new(lab: &Lab) -> Result<()> {
    let mut guest = start(lab, Beta, &GuestSpec::new("g1"))?;
    let (machine, older) = (machine_of(lab, Beta)?, text(version(lab, Alpha)?));
    let before = lab.shell(Beta, "virsh dumpxml g1 | sha256sum; virsh domstate g1")?;
    let outcome = lab.understudy(Beta, &["protect", "g1", "--to", "alpha", "--insecure"])?;
    ensure!(outcome.code != 0, "it was not refused: {outcome:?}");
    for word in [machine.as_str(), older.as_str(), "alpha", "machine type"] {
        ensure!(outcome.stderr.contains(word), "it does not say `{word}`: {}", outcome.stderr);
    }
    ensure!(outcome.stderr.contains("at least as new"), "it does not say what to do: {}", outcome.stderr);
    let after = lab.shell(Beta, "virsh dumpxml g1 | sha256sum; virsh domstate g1")?;
    ensure!(before == after, "the domain was touched: {before} {after}");
    ensure!(lab.status(Alpha, Role::Backup, "g1")?.is_none(), "the backup has taken it all the same");
    guest.count().map(drop)
}

fn machine_of(lab: &Lab, host: HostName) -> Result<String> {
    let xml = lab.shell(host, "virsh dumpxml g1")?;
    let machine = xml.split("machine='").nth(1).and_then(|rest| rest.split('\'').next());
    machine.map(str::to_owned).context("the domain has no machine type")
}

/// Of the QEMU in a host.
fn version(lab: &Lab, host: HostName) -> Result<(u32, u32, u32)> {
    let said = lab.shell(host, "qemu-system-x86_64 --version")?;
    parse_version(&said).with_context(|| format!("no version of QEMU in {said:?}"))
}

fn text((major, minor, micro): (u32, u32, u32)) -> String {
    format!("{major}.{minor}.{micro}")
}

fn parse_version(said: &str) -> Option<(u32, u32, u32)> {
    let numbers = said.split("version ").nth(1)?.split_whitespace().next()?;
    let mut numbers = numbers.split('.').map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        let old = parse_version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\n").unwrap();
        let new = parse_version("QEMU emulator version 10.0.13 (Debian 1:10.0.13+ds)\n").unwrap();
        assert!(old < new);
        assert_eq!(text(old), "7.2.22");
        assert_eq!(parse_version("nothing"), None);
    }

    #[test]
    fn all_are_found_by_the_name_they_share() {
        assert!(SCENARIOS.iter().all(|(name, _)| name.starts_with(VERSIONS)));
    }
}
