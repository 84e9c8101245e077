//! Power cuts: the guest goes on, on the other host, from a committed epoch.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{SHAPES, Scenario, Shape, start_shaped};
use crate::lab::Lab;
use crate::lab::guest::Guest;
use crate::lab::observer::Observer;
use crate::lab::plan::HostName;
use crate::lab::understudy::Role;

pub(super) const SCENARIOS: &[Scenario] = &[
    ("failover: i440fx, one vCPU: three power cuts in turn, then a reboot", |lab| chain(lab, SHAPES[0], 3)),
    ("failover: i440fx, two vCPUs: three power cuts in turn, then a reboot", |lab| chain(lab, SHAPES[1], 3)),
    ("failover: q35, one vCPU: two power cuts in turn, then a reboot", |lab| chain(lab, SHAPES[2], 2)),
    ("failover: q35, two vCPUs: two power cuts in turn, then a reboot", |lab| chain(lab, SHAPES[3], 2)),
];

/// A guest that has not answered by then is dead.
const LIMIT: Duration = Duration::from_secs(60);

/// Protects, cuts the power, promotes, and again in the other direction.
fn chain(lab: &Lab, shape: Shape, cuts: usize) -> Result<()> {
    let mut on = HostName::Alpha;
    let mut guest = start_shaped(lab, on, shape)?;
    guest.must("dirty 300 20")?;
    let boot = guest.count()?.boot;
    for number in 1..=cuts {
        cut(lab, on, &boot).with_context(|| format!("power cut {number} of {cuts}, of {on}"))?;
        super::up(lab, on)?;
        on = on.other();
    }
    // What was promoted is an ordinary domain: it can start again from nothing.
    // It may be gone before its answer is.
    drop(Guest::wait(lab.dir(), "g1", LIMIT)?.ask("reboot"));
    let end = Instant::now() + LIMIT;
    loop {
        let again = Guest::wait(lab.dir(), "g1", LIMIT)?.count()?;
        if again.boot != boot {
            return Ok(());
        }
        ensure!(Instant::now() < end, "the guest did not reboot");
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn cut(lab: &Lab, on: HostName, boot: &str) -> Result<()> {
    lab.protect("g1", on)?;
    let protected = lab.status(on, Role::Primary, "g1")?.context("the primary does not know the guest")?;
    let start = protected.committed_epoch().unwrap_or(0);
    lab.wait_status((on, Role::Primary), "g1", LIMIT, |status| {
        status.committed_epoch().is_some_and(|epoch| epoch >= start + 10)
    })?;
    let observer = Observer::start(lab.dir(), "g1");
    observer.first_after(Instant::now(), LIMIT).context("the client saw nothing of the protected guest")?;
    let backup = on.other();
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
    let mut guest = Guest::wait(lab.dir(), "g1", LIMIT)?;
    guest.must("check")?;
    std::thread::sleep(Duration::from_millis(500));
    let later = guest.count()?;
    ensure!(later.total > first.count.total, "the counter stands still at {}", later.total);
    println!(
        "    {on} cut: epoch {last}, counter {} -> {}, no answer for {} ms, promotion {:.0?} ms",
        before.count.total,
        first.count.total,
        first.at.saturating_duration_since(before.at).as_millis(),
        report.parts().iter().find(|(part, _)| *part == "total").map(|(_, ms)| *ms).unwrap_or_default(),
    );
    Ok(())
}
