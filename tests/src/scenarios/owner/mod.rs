//! Nobody is asked: the watchdogs of the hosts and a witness decide who runs a guest.

mod chosen;
mod fencing;
mod keeping;
mod logs;
mod partitions;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{Scenario, up, verbs};
use crate::lab::Lab;
use crate::lab::plan::{HostName, Link, Net};
use crate::lab::understudy::Role;
use HostName::{Alpha, Beta};
use keeping::Keeping;
use logs::accepted;

/// A scenario at whose end the logs of both watchdogs must be ones that the claim protocol allows.
macro_rules! kept {
    ($name:literal, $play:expr) => {
        ($name, |lab| accepted(lab, $play))
    };
}

pub(super) const SCENARIOS: &[Scenario] =
    &[kept!("owner: a power cut is noticed and the guest promoted without anybody", unattended)];

/// Not for every run: `cargo xtask campaign owner`.
pub(super) const ON_REQUEST: &[Scenario] = &[
    kept!(
        "owner-more: a power cut, protected again, home again, and to the other host, without anybody",
        round
    ),
    kept!(
        "owner-more: witness lost, link cut, QEMU hangs, QEMU dies, agent dies, one after the other",
        in_turn
    ),
    kept!("owner-more: three times from host to host and back", |lab| rounds(lab, 3)),
    kept!("owner-more: the witness and then the primary are lost", partitions::witness_then_primary),
    kept!("owner-more: the primary's power and its fencing are lost", fencing::power_lost),
    kept!(
        "owner-more: the witness, the primary's power and its fencing are lost",
        fencing::witness_and_power_lost
    ),
    kept!("owner-more: the primary is cut off from everything", partitions::cut_off),
    kept!("owner-more: the agent stands still and goes on", partitions::agent_stands_still),
    kept!("owner-more: the backup is lost and back, output is held", |lab| {
        partitions::backup_lost(lab, "hold")
    }),
    kept!("owner-more: the backup is lost and back, the guest goes on alone", |lab| {
        partitions::backup_lost(lab, "solo")
    }),
    kept!("owner-more: both hosts are lost and back", partitions::both_lost),
    kept!("owner-more: choices for one guest", chosen::choices),
    kept!("owner-more: somebody saves the guest with virsh", saved),
];

const WITNESS_ON: Net = Net::Mgmt;

fn unattended(lab: &Lab) -> Result<()> {
    let mut keeping = Keeping::start(lab, WITNESS_ON, "hold")?;
    power_cut(&mut keeping, Alpha)?;
    keeping.clean()
}

fn round(lab: &Lab) -> Result<()> {
    let mut keeping = Keeping::start(lab, WITNESS_ON, "hold")?;
    power_cut(&mut keeping, Alpha)?;
    let report = keeping.report(Beta)?;
    let bound = keeping.bound(Beta)?;
    println!("    {report}");
    ensure!(report["kind"] == "takeover" && report["epoch"].is_u64(), "{report}");
    ensure!(total(&report)? <= bound, "{report}, but at most {bound:?} was said");
    up(lab, Alpha)?;
    keeping.watch(Alpha)?;
    keeping.paired(Beta)?;
    moved(&mut keeping, "failback", Beta)?;
    moved(&mut keeping, "switchover", Alpha)?;
    keeping.spoke(&[Alpha, Beta, Alpha, Beta])
}

fn rounds(lab: &Lab, count: usize) -> Result<()> {
    let mut keeping = Keeping::start(lab, WITNESS_ON, "hold")?;
    let mut order = vec![Alpha];
    for _ in 0..count {
        power_cut(&mut keeping, Alpha)?;
        up(lab, Alpha)?;
        keeping.watch(Alpha)?;
        keeping.paired(Beta)?;
        moved(&mut keeping, "failback", Beta)?;
        order.extend([Beta, Alpha]);
    }
    keeping.spoke(&order)
}

/// Of a report, from the last sign of life to the guest running.
fn total(report: &serde_json::Value) -> Result<Duration> {
    report["total_ms"].as_u64().map(Duration::from_millis).with_context(|| format!("no total: {report}"))
}

/// Gives for how long nobody answered.
fn power_cut(keeping: &mut Keeping, of: HostName) -> Result<Duration> {
    keeping.lab.power_off(of)?;
    keeping.taken_over(of, Instant::now(), "power cut")
}

/// As planned work, after which the host it leaves is its backup.
fn moved(keeping: &mut Keeping, command: &str, from: HostName) -> Result<()> {
    let began = Instant::now();
    let said = keeping.lab.must_understudy(from, &[command, "g1"])?;
    println!("    {command}: {} ({} ms)", said.trim(), began.elapsed().as_millis());
    keeping.taken_over(from, began, command)?;
    keeping.paired(from.other())
}

fn in_turn(lab: &Lab) -> Result<()> {
    let mut keeping = Keeping::start(lab, WITNESS_ON, "hold")?;
    keeping.witness_down()?;
    keeping.wait_said(Alpha, "the arbiter gives no answer")?;
    keeping.answers_since(Instant::now())?;
    keeping.witness_up()?;
    link_cut(&mut keeping)?;
    let moment = Instant::now();
    lab.shell(Alpha, "kill -STOP $(cat /run/libvirt/qemu/g1.pid)")?;
    keeping.taken_over(Alpha, moment, "QEMU hangs")?;
    // What hung is ended, and its host is the backup.
    keeping.paired(Beta)?;
    let moment = Instant::now();
    lab.shell(Beta, "kill -KILL $(cat /run/libvirt/qemu/g1.pid)")?;
    keeping.taken_over(Beta, moment, "QEMU dies")?;
    keeping.paired(Alpha)?;
    lab.kill_agent(Alpha, Role::Primary)?;
    lab.wait_agent(Alpha, Role::Primary)?;
    keeping.protected(Alpha)?;
    keeping.answers_since(Instant::now())?;
    for host in HostName::ALL {
        let said = keeping.said_since(host);
        ensure!(
            !said.contains("the guest was taken over"),
            "after the death of an agent {host} said\n{said}"
        );
    }
    keeping.spoke(&[Alpha, Beta, Alpha])
}

/// The guest runs on here, protected again if its QEMU can be; a QEMU that ends itself is taken over from.
fn saved(lab: &Lab) -> Result<()> {
    let mut keeping = Keeping::start(lab, WITNESS_ON, "hold")?;
    let moment = Instant::now();
    let outcome = verbs::answered(lab, verbs::SAVE)?;
    ensure!(outcome.code != 0, "virsh save was done: {outcome:?}");
    if verbs::outlives(lab, verbs::LATE)? {
        if !verbs::spoiled(lab)? {
            keeping.protected(Alpha)?;
        }
        keeping.answers_since(Instant::now())?;
        return keeping.spoke(&[Alpha]);
    }
    keeping.taken_over(Alpha, moment, "virsh save")?;
    keeping.paired(Beta)?;
    keeping.spoke(&[Alpha, Beta])
}

/// Heartbeats go another way: nothing changes hands, and protection goes on where it was, without a full copy.
fn link_cut(keeping: &mut Keeping) -> Result<()> {
    const LIMIT: Duration = Duration::from_secs(60);
    let (lab, repl) = (keeping.lab, Link { net: Net::Repl, host: None });
    let copies = keeping.protected(Alpha)?;
    lab.cut(repl)?;
    lab.wait_status((Alpha, Role::Primary), "g1", LIMIT, |status| status.state() == "degraded")?;
    lab.heal(repl)?;
    let again = keeping.protected(Alpha)?;
    ensure!(again == copies, "{copies} full copies before a link was cut, {again} after");
    keeping.answers_since(Instant::now()).map(drop)
}

/// What ends an instance, as `bench failover` counts them apart.
pub(crate) const CAUSES: [&str; 2] = ["QEMU dies", "power cut"];

/// The guest is taken over again and again, twice for each cause, now here and now there; gives cause and report of each.
pub(crate) fn takeovers(lab: &Lab, count: usize) -> Result<Vec<(&'static str, serde_json::Value)>> {
    accepted(lab, |lab| taken_over_and_over(lab, count))
}

fn taken_over_and_over(lab: &Lab, count: usize) -> Result<Vec<(&'static str, serde_json::Value)>> {
    let mut keeping = Keeping::start(lab, WITNESS_ON, "hold")?;
    let mut on = Alpha;
    let mut one = |round: usize| {
        let cause = CAUSES[round / 2 % 2];
        let (moment, dead) = (Instant::now(), on);
        if cause == CAUSES[0] {
            lab.shell(dead, "kill -KILL $(cat /run/libvirt/qemu/g1.pid)")?;
        } else {
            lab.power_off(dead)?;
        }
        on = dead.other();
        keeping.taken_over(dead, moment, &format!("{} of {count}: {cause}", round + 1))?;
        let report = keeping.report(on)?;
        if cause == CAUSES[1] {
            up(lab, dead)?;
            keeping.watch(dead)?;
        }
        keeping.paired(on)?;
        Ok((cause, report))
    };
    (0..count).map(&mut one).collect()
}
