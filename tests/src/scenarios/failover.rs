//! Power cuts: the guest goes on, on the other host, from a committed epoch.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{SHAPES, Scenario, Shape, start, start_shaped};
use crate::lab::Lab;
use crate::lab::domain::{Card, GuestSpec};
use crate::lab::guest::Guest;
use crate::lab::observer::Observer;
use crate::lab::plan::HostName;
use crate::lab::understudy::Role;

pub(super) const SCENARIOS: &[Scenario] = &[
    ("failover: i440fx, one vCPU: two power cuts in turn", |lab| chain(lab, SHAPES[0], 2, 2)),
    ("failover: i440fx, two vCPUs: a power cut", |lab| chain(lab, SHAPES[1], 1, 1)),
    ("failover: q35, one vCPU, a card that vhost-net serves: a power cut", vhost),
    ("failover: q35, two vCPUs: two power cuts in turn", |lab| chain(lab, SHAPES[3], 2, 2)),
    ("failover: a standby whose memory is loaded at the promotion", cold),
];

/// Played when they are asked for by name, and in the campaign: the five rounds take some minutes.
pub(super) const ON_REQUEST: &[Scenario] =
    &[("failover: five times round: promoted, started anew, saved, restored, and protected again", |lab| {
        chain(lab, SHAPES[0], 5, 1)
    })];

/// A guest that has not answered by then is dead.
const LIMIT: Duration = Duration::from_secs(120);

/// What a backup says of a standby whose memory is up to date.
pub(super) const WARM: &str = "ready: warm";
const COLD: &str = "ready: cold";

/// Protects, cuts the power, promotes, and again in the other direction. What was promoted is an ordinary domain: the
/// first and then one in `every` starts again from nothing, and is saved and restored; the others go on as they are.
fn chain(lab: &Lab, shape: Shape, cuts: usize, every: usize) -> Result<()> {
    let boot = start_shaped(lab, HostName::Alpha, shape)?.count()?.boot;
    chain_of(lab, boot, cuts, every)
}

/// The same of a guest that runs on alpha.
fn chain_of(lab: &Lab, mut boot: String, cuts: usize, every: usize) -> Result<()> {
    let mut on = HostName::Alpha;
    for number in 0..cuts {
        let which = || format!("power cut {} of {cuts}, of {on}", number + 1);
        if number > 0 {
            super::up(lab, on.other()).with_context(which)?;
        }
        Guest::wait(lab.dir(), "g1", LIMIT)?.must("dirty 300 20").with_context(which)?;
        cut(lab, on, &boot, WARM).with_context(which)?;
        // It boots while the guest is put to the test on the other one.
        lab.ensure_on(on)?;
        if number % every == 0 {
            boot = super::reboot(lab, &boot).context("a reboot").with_context(which)?;
            save_and_restore(lab, on.other(), &boot).context("a save").with_context(which)?;
        }
        on = on.other();
    }
    Ok(())
}

fn vhost(lab: &Lab) -> Result<()> {
    let (machine, vcpus) = SHAPES[2];
    let spec = GuestSpec { machine: machine.into(), vcpus, card: Card::Vhost, ..GuestSpec::new("g1") };
    let boot = start(lab, HostName::Alpha, &spec)?.count()?.boot;
    chain_of(lab, boot, 1, 1)
}

/// A guest without memory kept up to date on the backup.
fn cold(lab: &Lab) -> Result<()> {
    let (on, backup) = (HostName::Alpha, HostName::Beta);
    let boot = start_shaped(lab, on, SHAPES[0])?.count()?.boot;
    lab.restart_agent(backup, Role::Backup, "--cold-standby")?;
    let result = cut(lab, on, &boot, COLD);
    lab.restart_agent(backup, Role::Backup, "")?;
    result
}

fn save_and_restore(lab: &Lab, on: HostName, boot: &str) -> Result<()> {
    let before = Guest::wait(lab.dir(), "g1", LIMIT)?.count()?;
    lab.shell(
        on,
        "virsh -q save g1 /dev/shm/g1.save && virsh -q restore /dev/shm/g1.save && rm /dev/shm/g1.save",
    )?;
    let after = Guest::wait(lab.dir(), "g1", LIMIT)?.count()?;
    ensure!(after.boot == boot && after.total >= before.total, "saved {before:?}, restored {after:?}");
    Ok(())
}

/// Protects the guest and cuts the power of its host.
pub(super) fn cut(lab: &Lab, on: HostName, boot: &str, standby: &str) -> Result<()> {
    protect(lab, on, standby)?;
    cut_protected(lab, on, boot)
}

/// Protects the guest, and waits for ten epochs and a standby that is as `standby` says.
pub(super) fn protect(lab: &Lab, on: HostName, standby: &str) -> Result<()> {
    lab.protect("g1", on)?;
    let protected = lab.status(on, Role::Primary, "g1")?.context("the primary does not know the guest")?;
    let start = protected.committed_epoch().unwrap_or(0);
    lab.wait_status((on, Role::Primary), "g1", LIMIT, |status| {
        status.committed_epoch().is_some_and(|epoch| epoch >= start + 10)
    })?;
    let backup = on.other();
    lab.wait_status((backup, Role::Backup), "g1", LIMIT, |status| {
        status.text("standby").starts_with(standby)
    })?;
    Ok(())
}

/// Cuts the power of the host of a protected guest, and promotes: it goes on, from the last committed epoch.
pub(super) fn cut_protected(lab: &Lab, on: HostName, boot: &str) -> Result<()> {
    let backup = on.other();
    let observer = Observer::start(lab.dir(), "g1");
    observer.first_after(Instant::now(), LIMIT).context("the client saw nothing of the protected guest")?;
    lab.power_off(on)?;
    let before = observer.last().context("the client saw nothing before the cut")?;
    let last = lab
        .status(backup, Role::Backup, "g1")?
        .and_then(|status| status.committed_epoch())
        .context("the backup has no committed epoch")?;
    let asked = Instant::now();
    let report = lab.failover("g1", backup)?;
    ensure!(
        report.epoch() == Some(last),
        "promoted epoch {:?}, the last committed was {last}",
        report.epoch()
    );
    let first = observer.first_after(asked, LIMIT).context("no answer after the failover")?;
    ensure!(first.count.boot == boot, "the guest was started anew: {:?}", first.count);
    ensure!(
        first.count.total >= before.count.total,
        "a client had heard {} and then heard {} (invariant 1)",
        before.count.total,
        first.count.total
    );
    let mut guest = Guest::wait(lab.dir(), "g1", LIMIT)?;
    guest.must("check")?;
    std::thread::sleep(Duration::from_millis(500));
    let later = guest.count()?;
    ensure!(later.total > first.count.total, "the counter stands still at {}", later.total);
    let part = |name| report.parts().iter().find(|(part, _)| *part == name).map_or(0.0, |(_, ms)| *ms);
    println!(
        "    {on} cut: epoch {last}, counter {} -> {}, no answer for {} ms, promotion {:.0} ms, of it load {:.0} ms",
        before.count.total,
        first.count.total,
        first.at.saturating_duration_since(before.at).as_millis(),
        part("total"),
        part("load"),
    );
    Ok(())
}
