//! The output gate: what leaves a protected guest, and when.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{Scenario, Step, advances, in_turn, protected};
use crate::lab::Lab;
use crate::lab::domain::GuestSpec;
use crate::lab::frames::FramesFrom;
use crate::lab::guest::{Guest, field};
use crate::lab::pinger::{Pinger, Said};
use crate::lab::plan::HostName::{Alpha, Beta};
use crate::lab::remote::Exec;
use crate::lab::understudy::Role;
use crate::{process, workspace};

pub(super) const SCENARIOS: &[Scenario] = &[
    ("output: the gate holds and releases in a real kernel", kernel),
    ("output: nothing leaves before the backup has the epoch", nothing_leaves_early),
    ("output: agent killed, backup lost, unprotected: no frame on the wire meanwhile, none lost", |lab| {
        in_turn(lab, &[], LIMIT, NONE_LOST)
    }),
    ("output: connections survive a power cut, and what they hear never goes back", connections),
    ("output: an agent that stood still while its guest was promoted lets nothing out", stood_still),
    ("output: an interface that cannot be gated is refused, and let through only when told so", ungated),
];

const NONE_LOST: &[Step] = &[
    ("agent killed, no frame on the wire meanwhile, none lost after", agent_killed),
    ("backup lost, output is held and comes when it is back", backup_lost),
    ("the gate is taken away by somebody else, and made anew", taken_away),
    ("unprotect loses no frame", unprotect),
];

const LIMIT: Duration = Duration::from_secs(60);

const BUILD_LIMIT: Duration = Duration::from_secs(1800);

/// How long the agent is away.
const AWAY: Duration = Duration::from_secs(5);

/// A frame that was released in the last moment may take so long to the client through an emulated host.
const ON_THE_WAY: Duration = Duration::from_millis(500);

/// The answers of the protected guest to a client that pings it, as its card says them and as the client hears them.
fn pinged(lab: &Lab) -> Result<(Said, Pinger)> {
    let said = Said::start(lab, Alpha, "g1")?;
    let pinger = Pinger::start(lab.dir(), "g1")?;
    pinger.wait(LIMIT)?;
    Ok((said, pinger))
}

/// A client sets a number in the guest's memory, higher each time, and waits for the answer. Whatever was answered
/// when the power fails must be in the guest that goes on.
fn nothing_leaves_early(lab: &Lab) -> Result<()> {
    const ENOUGH: u64 = 1008;
    drop(protected(lab, &[], LIMIT)?);
    let frames = lab.dir().shared().join("output.pcap");
    let link = "lan:alpha".parse()?;
    lab.ask(&crate::lab::control::Request::Pcap(link, frames.clone()))?;
    let (answered, cut) = (AtomicU64::new(0), AtomicBool::new(false));
    let failed: Result<()> = std::thread::scope(|scope| {
        let client = scope.spawn(|| -> Result<()> {
            let connect = || Guest::connect(lab.dir(), "g1", Duration::from_secs(10));
            let (mut guest, mut number) = (connect()?, 1000);
            while !cut.load(Ordering::SeqCst) {
                match guest.must(&format!("touch 1 {number}")) {
                    Ok(_) => answered.store(number, Ordering::SeqCst),
                    Err(_) if cut.load(Ordering::SeqCst) => break,
                    // The stream to the backup may have been lost for a while, and with it the answers.
                    Err(_) => guest = connect()?,
                }
                number += 1;
            }
            Ok(())
        });
        // An emulated host takes its time.
        let end = Instant::now() + LIMIT;
        while answered.load(Ordering::SeqCst) < ENOUGH && !client.is_finished() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(50));
        }
        cut.store(true, Ordering::SeqCst);
        lab.power_off(Alpha)?;
        client.join().unwrap_or_else(|_| anyhow::bail!("the client panicked"))
    });
    failed?;
    lab.ask(&crate::lab::control::Request::PcapStop(link))?;
    let answered = answered.into_inner();
    ensure!(answered >= ENOUGH, "only {} requests were answered", answered.saturating_sub(999));
    lab.failover("g1", Beta)?;
    let load = Guest::wait(lab.dir(), "g1", LIMIT)?.must("load")?;
    let kept: u64 = field(&load, "every_ms").and_then(|ms| ms.parse().ok()).context("no number in it")?;
    println!("    {} requests answered, the guest that goes on has heard {}", answered - 999, kept - 999);
    ensure!(kept >= answered, "request {answered} was answered, the guest that goes on knows {kept} only");
    ensure!(std::fs::metadata(&frames)?.len() > 1000, "nothing was recorded on the LAN");
    Ok(())
}

pub(super) fn agent_killed(lab: &Lab, _: &mut Guest) -> Result<()> {
    let (said, pinger) = pinged(lab)?;
    lab.hold_agent(Alpha, Role::Primary)?;
    std::thread::sleep(ON_THE_WAY);
    let dead = Instant::now();
    std::thread::sleep(AWAY);
    let seen = pinger.replies_since(dead);
    ensure!(seen == 0, "{seen} frames left while nobody could release them");
    lab.release_agent(Alpha, Role::Primary)?;
    let answers = pinger.all_heard(&said, LIMIT)?;
    println!("    {answers} answers, all heard, none of them while the agent was away");
    advances(lab, LIMIT)
}

fn unprotect(lab: &Lab, _: &mut Guest) -> Result<()> {
    let (said, pinger) = pinged(lab)?;
    lab.must_understudy(Alpha, &["unprotect", "g1"])?;
    pinger.wait(LIMIT)?;
    let answers = pinger.all_heard(&said, LIMIT)?;
    println!("    {answers} answers, all heard");
    let left = lab.shell(Alpha, "ls /sys/class/net | grep usg- || true")?;
    ensure!(left.is_empty(), "the gate is still there: {left}");
    // And it can be protected again.
    lab.protect("g1", Alpha)?;
    advances(lab, LIMIT)
}

/// Some say nothing while the power fails, others ask all the time.
fn connections(lab: &Lab) -> Result<()> {
    const IDLE: usize = 20;
    const BUSY: usize = 5;
    let boot = protected(lab, &[], LIMIT)?.count()?.boot;
    let connect = || Guest::connect(lab.dir(), "g1", LIMIT);
    let mut idle = (0..IDLE).map(|_| connect()).collect::<Result<Vec<_>>>()?;
    for guest in &mut idle {
        guest.count()?;
    }
    let resumed = AtomicBool::new(false);
    let ask = || -> Result<u64> {
        let (mut guest, mut last, mut answers) = (connect()?, 0, 0);
        loop {
            // A connection that is reset, and an answer that does not come, are errors here.
            let after = resumed.load(Ordering::SeqCst);
            let count = guest.count()?;
            ensure!(count.total >= last, "{} was heard after {last}", count.total);
            ensure!(count.boot == boot, "the guest was started anew");
            (last, answers) = (count.total, answers + 1);
            if after {
                return Ok(answers);
            }
        }
    };
    std::thread::scope(|scope| {
        let busy: Vec<_> = (0..BUSY).map(|_| scope.spawn(ask)).collect();
        std::thread::sleep(Duration::from_secs(2));
        let failover = lab.power_off(Alpha).and_then(|()| lab.failover("g1", Beta).map(drop));
        resumed.store(true, Ordering::SeqCst);
        let mut answers = 0;
        for asking in busy {
            answers += asking.join().unwrap_or_else(|_| anyhow::bail!("a client panicked"))?;
        }
        failover?;
        println!("    {IDLE} idle and {BUSY} busy connections live on, {answers} answers");
        Ok::<_, anyhow::Error>(())
    })?;
    for guest in &mut idle {
        ensure!(guest.count()?.boot == boot, "the guest was started anew");
    }
    Ok(())
}

/// The old host never notices the promotion: its agent is stopped before, and wakes up after.
fn stood_still(lab: &Lab) -> Result<()> {
    drop(protected(lab, &[], LIMIT)?);
    let pinger = Pinger::start(lab.dir(), "g1")?;
    pinger.wait(LIMIT)?;
    lab.shell(Alpha, "kill -STOP $(cat /run/lab/understudy-primary.pid)")?;
    std::thread::sleep(ON_THE_WAY);
    let frames = FramesFrom::start(lab, Alpha, "g1")?;
    let stopped = Instant::now();
    lab.failover("g1", Beta)?;
    pinger.wait(LIMIT).context("the guest that was promoted does not answer")?;
    lab.shell(Alpha, "kill -CONT $(cat /run/lab/understudy-primary.pid)")?;
    lab.wait_status((Alpha, Role::Primary), "g1", LIMIT, |status| status.state() == "superseded")?;
    std::thread::sleep(ON_THE_WAY * 2);
    let seen = frames.end()?;
    ensure!(seen.is_empty(), "the old host let these out:\n{seen}");
    println!("    nothing from the old host for {:.1} s", stopped.elapsed().as_secs_f64());
    Ok(())
}

fn backup_lost(lab: &Lab, _: &mut Guest) -> Result<()> {
    let (said, pinger) = pinged(lab)?;
    let repl = "repl".parse()?;
    lab.cut(repl)?;
    std::thread::sleep(ON_THE_WAY);
    let lost = Instant::now();
    std::thread::sleep(AWAY);
    let seen = pinger.replies_since(lost);
    ensure!(seen == 0, "{seen} frames left although no epoch was committed");
    let status = lab.status(Alpha, Role::Primary, "g1")?.context("the primary does not know the guest")?;
    ensure!(status.text("output").starts_with("held for"), "{status:?}");
    ensure!(status.number("output_waiting_bytes").is_some_and(|bytes| bytes > 0), "{status:?}");
    lab.heal(repl)?;
    let answers = pinger.all_heard(&said, LIMIT)?;
    let status = lab.status(Alpha, Role::Primary, "g1")?.context("the primary does not know the guest")?;
    ensure!(status.number("output_dropped_total") == Some(0), "{status:?}");
    println!("    {answers} answers, all heard, none of them while the backup was lost");
    advances(lab, LIMIT)
}

/// What leaves until that is noticed cannot be called back. That is milliseconds: see the agent's test of the kernel.
fn taken_away(lab: &Lab, _: &mut Guest) -> Result<()> {
    let pinger = Pinger::start(lab.dir(), "g1")?;
    pinger.wait(LIMIT)?;
    let repl = "repl".parse()?;
    lab.cut(repl)?;
    std::thread::sleep(ON_THE_WAY);
    let taken = Instant::now();
    let device = "$(virsh -q domiflist g1 | awk '{print $1}')";
    lab.shell(Alpha, &format!("tc qdisc del dev {device} clsact"))?;
    std::thread::sleep(ON_THE_WAY);
    let mended = Instant::now();
    std::thread::sleep(AWAY);
    let seen = pinger.replies_since(mended);
    ensure!(seen == 0, "{seen} frames left although no epoch was committed");
    println!("    {} frames left before the gate stood again", pinger.replies_since(taken));
    lab.heal(repl)?;
    lab.shell(Alpha, &format!("tc filter show dev {device} ingress | grep -q usg-"))?;
    advances(lab, LIMIT)?;
    // What was held went with the gate; what is asked from now on is answered.
    pinger.wait(LIMIT)
}

fn ungated(lab: &Lab) -> Result<()> {
    let user = "<interface type='user'><model type='virtio'/><rom enabled='no'/></interface>\n";
    lab.start_guest(Alpha, &GuestSpec { extra_devices: user.to_owned(), ..GuestSpec::new("g1") })?;
    let mut guest = Guest::wait(lab.dir(), "g1", LIMIT)?;
    let protect = ["protect", "g1", "--to", "beta", "--insecure"];
    let refused = lab.understudy(Alpha, &protect)?;
    ensure!(refused.code != 0, "it was protected: {refused:?}");
    ensure!(refused.stderr.contains("(type 'user')") && refused.stderr.contains("--ungated"), "{refused:?}");
    let left = lab.shell(Alpha, "ls /sys/class/net | grep usg- || true")?;
    ensure!(left.is_empty(), "a refusal has left a gate: {left}");
    lab.must_understudy(Alpha, &[&protect[..], &["--ungated"]].concat())?;
    advances(lab, LIMIT)?;
    let status = lab.status(Alpha, Role::Primary, "g1")?.context("the primary does not know the guest")?;
    ensure!(status.text("output").contains("NOT held back"), "{status:?}");
    ensure!(status.text("detail").contains("NOT held back"), "{status:?}");
    guest.must("check").map(drop)
}

/// Runs the gate's own test of `primary` in a host, where it must not be left out.
fn kernel(lab: &Lab) -> Result<()> {
    let mut build = workspace::cargo();
    build.args(["test", "--locked", "-p", "understudy-primary", "--test", "netlink_gate", "--no-run"]);
    let messages = process::checked(build.arg("--message-format=json"), BUILD_LIMIT)?;
    let built = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == "netlink_gate")
        .find_map(|message| message["executable"].as_str().map(str::to_owned))
        .context("cargo names no program of the gate's test")?;
    let here = lab.dir().shared().join("netlink_gate");
    fs::copy(&built, &here).with_context(|| format!("cannot copy {built}"))?;
    let program = here.display().to_string();
    let said = lab.checked(Beta, &Exec::new([&program, "--nocapture"]).limit(Duration::from_secs(120)))?;
    ensure!(said.contains("1 passed") && !said.contains("skipped:"), "{said}");
    Ok(())
}
