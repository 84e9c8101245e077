//! The output gate under traffic: many connections, more output than commits can follow, interfaces that come and go.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::{Scenario, advances, protected};
use crate::lab::Lab;
use crate::lab::frames::FramesFrom;
use crate::lab::guest::Guest;
use crate::lab::plan::HostName::{Alpha, Beta};
use crate::lab::plan::Net;
use crate::lab::remote::Exec;
use crate::lab::understudy::Role;
use crate::lab::verify::Verify;
use crate::process;

/// Only when they are asked for by name: they have not been played yet.
pub(super) const ON_REQUEST: &[Scenario] = &[
    ("traffic: 200 connections, bulk and idle, survive a power cut with what they carry", connections),
    ("traffic: a guest that sends more than commits can follow is slowed, and nothing is dropped", flood),
    ("traffic: agent killed for 5 s under load, no frame meanwhile, nothing lost after", agent_killed),
    ("traffic: an interface is gated or refused, plugged in before or while protected", interfaces),
];

const LIMIT: Duration = Duration::from_secs(90);

/// Connections on which nothing is said while the power fails, and those on which much is.
const IDLE: usize = 150;
const BULK: usize = 50;

/// Of each transfer: 32 KiB.
const BLOCKS: u32 = 8;

/// An answer takes an epoch, so connections are made and asked side by side.
const AT_ONCE: usize = 25;

/// How long the agent is away.
const AWAY: Duration = Duration::from_secs(5);

/// A frame that was released in the last moment may take so long to the client through an emulated host.
const ON_THE_WAY: Duration = Duration::from_millis(500);

/// Connections that carry much meanwhile.
const BUSY: usize = 10;

/// Frames of a guest that is asked over everything and answers.
const ANSWERS: usize = 100;

fn connections(lab: &Lab) -> Result<()> {
    let boot = protected(lab, &[], LIMIT)?.count()?.boot;
    let connect = || Guest::connect(lab.dir(), "g1", LIMIT);
    let mut idle = side_by_side(vec![(); IDLE], |()| {
        let mut guest = connect()?;
        guest.count().map(|_| guest)
    })?;
    let transfers = bulk_over(lab, BULK, || {
        std::thread::sleep(Duration::from_secs(3));
        lab.power_off(Alpha)?;
        lab.failover("g1", Beta).map(drop)
    })?;
    side_by_side(idle.iter_mut().collect(), |guest| {
        ensure!(guest.count()?.boot == boot, "the guest was started anew");
        Ok(())
    })?;
    println!(
        "    {IDLE} idle and {BULK} bulk connections live on, {transfers} transfers of 32 KiB, every byte right"
    );
    Ok(())
}

/// Transfers over so many connections, one after the other, until `event` is over and once more; with how many there were.
fn bulk_over(lab: &Lab, connections: usize, event: impl FnOnce() -> Result<()>) -> Result<u32> {
    let over = AtomicBool::new(false);
    let transfer = |number: usize| -> Result<u32> {
        let (mut guest, mut transfers) = (Guest::connect(lab.dir(), "g1", LIMIT)?, 0);
        // A connection that is reset, and content that is not what it should be, are errors here.
        loop {
            let after = over.load(Ordering::SeqCst);
            guest.bulk(BLOCKS, (number as u64) << 32 | u64::from(transfers))?;
            transfers += 1;
            if after {
                return Ok(transfers);
            }
        }
    };
    let transfer = &transfer;
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..connections).map(|number| scope.spawn(move || transfer(number))).collect();
        let happened = event();
        over.store(true, Ordering::SeqCst);
        let mut transfers = 0;
        for client in clients {
            transfers += client.join().unwrap_or_else(|_| bail!("a client panicked"))?;
        }
        happened.map(|()| transfers)
    })
}

/// Frames of any kind are counted on the wire, and nothing that was asked for is lost.
fn agent_killed(lab: &Lab) -> Result<()> {
    drop(protected(lab, &[], LIMIT)?);
    let verify = Verify::start(lab, "g1", 20)?;
    let frames = FramesFrom::start(lab, Alpha, "g1")?;
    let transfers = bulk_over(lab, BUSY, || {
        frames.wait(ANSWERS, LIMIT).context("the guest is not heard")?;
        lab.hold_agent(Alpha, Role::Primary)?;
        std::thread::sleep(ON_THE_WAY);
        let before = frames.count()?;
        std::thread::sleep(AWAY);
        let meanwhile = frames.count()? - before;
        lab.release_agent(Alpha, Role::Primary)?;
        ensure!(meanwhile == 0, "{meanwhile} frames left while nobody could release them");
        advances(lab, LIMIT)
    })?;
    let heard = frames.count()?;
    frames.wait(heard + ANSWERS, LIMIT).context("the guest is not heard after")?;
    let verdict = verify.end()?;
    verdict.ensure_clean()?;
    println!(
        "    no frame for {} s; {BUSY} connections live on, {transfers} transfers of 32 KiB, every byte right; {} questions",
        AWAY.as_secs(),
        verdict.json["questions"]
    );
    Ok(())
}

/// Does the work for all, some at a time.
fn side_by_side<T: Send, R: Send>(all: Vec<T>, work: impl Fn(T) -> Result<R> + Sync) -> Result<Vec<R>> {
    let queue = std::sync::Mutex::new(all);
    let next = || queue.lock().map_or(None, |mut queue| queue.pop());
    std::thread::scope(|scope| {
        let worker = || {
            let mut done = Vec::new();
            while let Some(one) = next() {
                done.push(work(one)?);
            }
            Ok(done)
        };
        let workers: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(worker)).collect();
        let mut done = Vec::new();
        for worker in workers {
            done.extend(worker.join().unwrap_or_else(|_| bail!("a client panicked"))?);
        }
        Ok(done)
    })
}

/// Of one request of a flood.
const DATAGRAMS: u32 = 100;

/// How long it goes on at least.
const FLOOD: Duration = Duration::from_secs(15);

/// What passes of the link to the backup then: so much of what passed before, and at least this.
const SHARE: u64 = 8;
const RATE_MIN: u64 = 1_000_000;

/// What came of a flood.
struct Flooded {
    transfers_per_s: f64,
    datagrams: u32,
    epochs: u64,
    /// Of the link to the backup.
    bits_per_s: u64,
}

/// How fast a guest sends, and how much of the link to the backup that takes, depends on the machine; so the link is made
/// slower than that.
fn flood(lab: &Lab) -> Result<()> {
    drop(protected(lab, &[], LIMIT)?);
    let free = flooded(lab)?;
    let rate = (free.bits_per_s / SHARE).max(RATE_MIN);
    let shaped = Shaped::start(lab, rate)?;
    let slow = flooded(lab)?;
    drop(shaped);
    for (link, Flooded { transfers_per_s, datagrams, epochs, bits_per_s }) in
        [("free", &free), ("slow", &slow)]
    {
        println!(
            "    {link} link: {transfers_per_s:.2} transfers of 32 KiB a second, {datagrams} datagrams, {epochs} epochs, {} kbit/s to the backup, nothing dropped",
            bits_per_s / 1000
        );
    }
    ensure!(
        slow.transfers_per_s < free.transfers_per_s * 0.8,
        "a slow link to the backup has not slowed the guest"
    );
    ensure!(slow.epochs > 0, "no epoch was committed meanwhile");
    advances(lab, LIMIT)
}

/// The guest sends as much as connections take, and datagrams as fast as it can to a port where nobody listens.
fn flooded(lab: &Lab) -> Result<Flooded> {
    let primary = || lab.status(Alpha, Role::Primary, "g1")?.context("the primary does not know the guest");
    let (before, began, mut datagrams) = (primary()?, Instant::now(), 0);
    let transfers = bulk_over(lab, BUSY, || {
        let mut guest = Guest::connect(lab.dir(), "g1", LIMIT)?;
        while began.elapsed() < FLOOD {
            guest.must(&format!("flood {}:9 {DATAGRAMS}", Net::Lan.client()))?;
            datagrams += DATAGRAMS;
        }
        Ok(())
    })?;
    let (took, after) = (began.elapsed(), primary()?);
    ensure!(after.number("output_dropped_total") == Some(0), "{after:?}");
    ensure!(
        after.number("full_copies_total") == before.number("full_copies_total"),
        "a full copy was needed: {after:?}"
    );
    let grown = |key| after.number(key).unwrap_or(0).saturating_sub(before.number(key).unwrap_or(0));
    Ok(Flooded {
        transfers_per_s: f64::from(transfers) / took.as_secs_f64(),
        datagrams,
        epochs: grown("epochs_total"),
        bits_per_s: grown("bytes_total") * 8 / (took.as_secs() + 1),
    })
}

/// A link to the backup that lets little through; dropping it heals it.
struct Shaped<'a>(&'a Lab);

impl<'a> Shaped<'a> {
    fn start(lab: &'a Lab, bits_per_s: u64) -> Result<Self> {
        let shaped = Self(lab);
        let rate = format!("{bits_per_s}bit");
        shaped.tc(&["add"], &["tbf", "rate", &rate, "burst", "64kb", "latency", "1s"])?;
        Ok(shaped)
    }

    fn tc(&self, verb: &[&str], qdisc: &[&str]) -> Result<String> {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.0.dir().netns(), "tc", "qdisc"]).args(verb);
        command.args(["dev", &Beta.tap(Net::Repl), "root"]).args(qdisc);
        process::checked(&mut command, Duration::from_secs(20))
    }
}

impl Drop for Shaped<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.tc(&["del"], &[]) {
            println!("    the link stays slow: {error:#}");
        }
    }
}

const CARD: &str = "<interface type='bridge'><mac address='52:54:00:77:02:0a'/><source bridge='br0'/>\
    <model type='virtio'/><driver queues='2'/><rom enabled='no'/></interface>";

/// QEMU takes no device while it is checkpointed, so none can come past the gate; one that came before is gated with the
/// rest.
fn interfaces(lab: &Lab) -> Result<()> {
    drop(protected(lab, &[], LIMIT)?);
    let file = lab.dir().shared().join("card.xml");
    std::fs::write(&file, CARD)?;
    let file = file.display().to_string();
    let virsh = |verb: &str| lab.exec(Alpha, &Exec::new(["virsh", verb, "g1", &file, "--live"]).limit(LIMIT));
    let gates =
        || lab.shell(Alpha, "ls /sys/class/net | grep -c usg- || true").map(|count| count.trim().to_owned());
    ensure!(gates()? == "1", "{} gates for one interface", gates()?);
    let refused = virsh("attach-device")?;
    ensure!(
        refused.code != 0 && refused.stderr.contains("migrat"),
        "plugged in while protected: {refused:?}"
    );
    advances(lab, LIMIT)?;
    ensure!(gates()? == "1", "{} gates for one interface", gates()?);
    lab.must_understudy(Alpha, &["unprotect", "g1"])?;
    let taken = virsh("attach-device")?;
    ensure!(taken.code == 0, "{taken:?}");
    lab.protect("g1", Alpha)?;
    advances(lab, LIMIT)?;
    ensure!(gates()? == "2", "{} gates for two interfaces", gates()?);
    let refused = virsh("detach-device")?;
    ensure!(refused.code != 0 && refused.stderr.contains("migrat"), "unplugged while protected: {refused:?}");
    println!(
        "    refused while protected: {}",
        refused.stderr.trim().lines().next_back().unwrap_or_default()
    );
    advances(lab, LIMIT)
}
