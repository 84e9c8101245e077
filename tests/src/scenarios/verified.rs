//! `understudy verify` outside, a power cut inside: with the gate as it is, and with gates that do wrong on purpose.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::random::Dice;
use super::{SHAPES, Scenario, start_shaped};
use crate::lab::Lab;
use crate::lab::commits::{self, CommitLog, host_now_us};
use crate::lab::frames::FramesFrom;
use crate::lab::plan::HostName;
use crate::lab::plan::HostName::{Alpha, Beta};
use crate::lab::stamps::{Recorded, Stamps};
use crate::lab::understudy::Role;
use crate::lab::verify::{Verdict, Verify};

pub(super) const SCENARIOS: &[Scenario] = &[
    ("output: verify finds nothing over a power cut", sound),
    ("output: verify finds each planted fault, and none where there is none", bites),
];

/// Only when it is asked for by name.
pub(super) const ON_REQUEST: &[Scenario] =
    &[(CAMPAIGN, campaign), ("traffic: what is on the LAN agrees with the log of commits", agreed)];

/// `cargo xtask campaign verify`.
pub(crate) const CAMPAIGN: &str = "campaign: verify finds nothing over power cuts at random moments";

/// How many, unless `UNDERSTUDY_CUTS` says otherwise.
const CUTS: u32 = 20;

const LIMIT: Duration = Duration::from_secs(90);

/// How long the guest is asked.
const BEFORE: Duration = Duration::from_secs(4);

/// A frame that was released in the last moment may take so long to the client through an emulated host.
const ON_THE_WAY: Duration = Duration::from_millis(500);

/// Frames of a guest that show that it is being asked and answers.
const ANSWERS: usize = 60;

/// The guest is cut off from the backup and, while it says what nobody commits, from power.
fn sound(lab: &Lab) -> Result<()> {
    drop(start_shaped(lab, Alpha, SHAPES[0])?);
    lab.protect("g1", Alpha)?;
    super::advances(lab, LIMIT)?;
    let verify = Verify::start(lab, "g1", 20)?;
    FramesFrom::start(lab, Alpha, "g1")?.wait(ANSWERS, LIMIT).context("the guest is not heard")?;
    let verdict = over_a_power_cut(lab, verify)?;
    verdict.ensure_clean()?;
    println!("    {} questions, {}", verdict.json["questions"], verdict.json["answers"]);
    Ok(())
}

/// Compares what left the host with the log of commits.
fn agreed(lab: &Lab) -> Result<()> {
    lab.restart_agent(Alpha, Role::Primary, commits::ARGUMENTS)?;
    drop(start_shaped(lab, Alpha, SHAPES[0])?);
    let log = CommitLog::from_now(lab, Alpha);
    lab.protect("g1", Alpha)?;
    super::advances(lab, LIMIT)?;
    let verify = Verify::start(lab, "g1", 20)?;
    let recorded = Recorded::start(lab, Alpha, "g1")?;
    std::thread::sleep(BEFORE);
    let compared = recorded.end(lab).and_then(|stamps| agree(&log, &stamps));
    verify.end()?.ensure_clean()?;
    lab.restart_agent(Alpha, Role::Primary, "")?;
    let (compared, largest) = compared?;
    ensure!(compared > 50, "only {compared} stamps could be compared");
    println!("    {compared} stamps on the LAN, the largest {largest}, each behind the commit of its epoch");
    Ok(())
}

/// No stamp is on the wire before the epoch is committed in which it was said; with how many were, and the largest.
fn agree(log: &CommitLog, Stamps { said, left }: &Stamps) -> Result<(usize, u64)> {
    let commits = log.read("g1")?;
    let mut compared = 0;
    for (stamp, left_us) in left {
        // Said before the recording began.
        let Some(said_us) = said.get(stamp) else { continue };
        match commits.committed_after(*said_us) {
            Some(committed_us) if committed_us <= *left_us => compared += 1,
            Some(committed_us) => {
                bail!("stamp {stamp} was on the LAN {} us before its commit", committed_us - left_us)
            }
            None => bail!("stamp {stamp} was on the LAN, and its epoch was never committed"),
        }
    }
    Ok((compared, left.keys().last().copied().unwrap_or(0)))
}

/// Cuts guest g1 off, promotes it and has it asked for a while.
fn over_a_power_cut(lab: &Lab, verify: Verify) -> Result<Verdict> {
    let repl = "repl".parse()?;
    lab.cut(repl)?;
    std::thread::sleep(Duration::from_secs(1));
    lab.power_off(Alpha)?;
    lab.heal(repl)?;
    let frames = FramesFrom::start(lab, Beta, "g1")?;
    lab.failover("g1", Beta)?;
    frames.wait(ANSWERS, LIMIT).context("the guest that was promoted does not answer")?;
    verify.end()
}

/// The guest goes from host to host: protected, asked over everything under load, cut off from power, promoted. What was on
/// the LAN until then is compared with the log of commits.
fn campaign(lab: &Lab) -> Result<()> {
    let given = std::env::var("UNDERSTUDY_CUTS").ok().and_then(|cuts| cuts.parse().ok());
    let (cuts, mut dice, mut on) = (given.unwrap_or(CUTS), Dice::new(), Alpha);
    println!("    UNDERSTUDY_SEED={}", dice.seed());
    start_shaped(lab, on, SHAPES[0])?.must("dirty 300 20")?;
    for number in 1..=cuts {
        let backup = on.other();
        lab.restart_agent(on, Role::Primary, commits::ARGUMENTS)?;
        let log = CommitLog::from_now(lab, on);
        lab.protect("g1", on)?;
        lab.wait_status((on, Role::Primary), "g1", LIMIT, |status| {
            super::is_protected(status) && status.number("epochs_total").is_some_and(|total| total > 3)
        })?;
        let recorded = Recorded::start(lab, on, "g1")?;
        let verify = Verify::start(lab, "g1", 20)?;
        let asked = FramesFrom::start(lab, on, "g1")?;
        asked.wait(ANSWERS, LIMIT).context("the guest is not heard")?;
        let wait = Duration::from_millis(dice.below(4000));
        std::thread::sleep(wait);
        lab.power_off(on)?;
        let frames = FramesFrom::start(lab, backup, "g1")?;
        lab.failover("g1", backup)?;
        frames
            .wait(ANSWERS, LIMIT)
            .and_then(|()| frames.wait_tcp(LIMIT))
            .context("the guest that was promoted does not answer")?;
        let verdict = verify.end()?;
        let which = || format!("power cut {number}, of {on}");
        verdict.ensure_clean().with_context(which)?;
        let (compared, largest) =
            recorded.read().and_then(|stamps| agree(&log, &stamps)).with_context(which)?;
        ensure!(compared > 0, "{}: no stamp could be compared", which());
        let json = &verdict.json;
        println!(
            "    power cut {number} of {cuts}, of {on}, after {} ms: {} questions, silence {} ms, no violation; {compared} stamps on the LAN up to {largest}, each behind its commit",
            wait.as_millis(),
            json["questions"],
            json["longest_silence_ms"]
        );
        if number < cuts {
            super::up(lab, on)?;
        }
        on = backup;
    }
    Ok(())
}

/// What is wrong with the gate; nothing, the last time.
const FAULTS: [Option<&str>; 4] =
    [Some("release-before-commit"), Some("ipv4-only"), Some("seal-after-resume"), None];

/// Epochs are so long that one can be cut off from the backup before it ends.
const EPOCH_MS: u32 = 2500;

/// How often the cut may come at the wrong moment.
const ATTEMPTS: usize = 6;

/// Enough, and little for an emulated host.
const SLOWLY_MS: u32 = 60;

/// One guest that goes from host to host. The backup is cut off while no epoch is on its way, so that nothing can be
/// committed any more; the guest answers on. Then agent and guest are killed, and what is promoted is known to lack what
/// was let out.
fn bites(lab: &Lab) -> Result<()> {
    let mut on = Alpha;
    drop(start_shaped(lab, on, SHAPES[0])?);
    for fault in FAULTS {
        let what = fault.unwrap_or("no fault");
        let planted = fault.map(|fault| format!("--plant-fault=g1={fault}\n")).unwrap_or_default();
        let pace = format!("--epoch-ms={EPOCH_MS}\n--output-floor-ms={EPOCH_MS}\n{}", commits::ARGUMENTS);
        lab.restart_agent(on, Role::Primary, &format!("{planted}{pace}"))?;
        let (verdict, attempt) = bitten(lab, on, fault).with_context(|| what.to_owned())?;
        if fault.is_some() {
            let violations = verdict.ensure_violated(what)?;
            let first = verdict.json["violations"][0]["text"].as_str().unwrap_or_default();
            println!("    {what}: {violations} violations, the first: {first} (cut {attempt})");
        } else {
            verdict.ensure_clean()?;
            println!("    {what}: {} questions, no violation (cut {attempt})", verdict.json["questions"]);
        }
        on = on.other();
    }
    Ok(())
}

/// From a guest that runs on a host to the verdict on its failover to the other; with the number of cuts.
fn bitten(lab: &Lab, on: HostName, fault: Option<&str>) -> Result<(Verdict, usize)> {
    let log = CommitLog::from_now(lab, on);
    lab.protect("g1", on)?;
    let more = |count: usize| -> Result<()> {
        let (start, end) = (log.read("g1")?.committed.len(), Instant::now() + LIMIT);
        while log.read("g1")?.committed.len() < start + count {
            ensure!(Instant::now() < end, "no epoch is committed");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    };
    more(1)?;
    let verify = Verify::start(lab, "g1", SLOWLY_MS)?;
    let frames = FramesFrom::start(lab, on, "g1")?;
    frames.wait(ANSWERS, LIMIT).context("the guest is not heard")?;
    let repl: crate::lab::plan::Link = "repl".parse()?;
    let mut attempt = 1;
    loop {
        // Just after a commit most of an epoch is still to come.
        more(1)?;
        lab.cut(repl)?;
        if is_between_epochs(lab, on, &log, &frames, fault)? {
            break;
        }
        ensure!(attempt < ATTEMPTS, "an epoch was on its way at every cut");
        lab.heal(repl)?;
        more(1)?;
        attempt += 1;
    }
    // The host is lost as far as the guest and its agent are concerned.
    lab.hold_agent(on, Role::Primary)?;
    lab.shell(on, "virsh -q destroy g1; virsh -q undefine g1")?;
    let promoted = FramesFrom::start(lab, on.other(), "g1")?;
    lab.failover("g1", on.other())?;
    // Not before: the kernel of a host whose agent is dead goes on sending what the agent has written, and the backup
    // would rightly commit it.
    lab.heal(repl)?;
    promoted.wait(ANSWERS, LIMIT).context("the guest that was promoted does not answer")?;
    let verdict = verify.end()?;
    lab.shell(on, &format!("rm -f /run/lab/{}.args", Role::Primary.program()))?;
    lab.release_agent(on, Role::Primary)?;
    Ok((verdict, attempt))
}

/// Just after a cut: whether no epoch was on its way, which the backup may have, and the fault has shown; without one,
/// that nothing leaves.
fn is_between_epochs(
    lab: &Lab,
    on: HostName,
    log: &CommitLog,
    frames: &FramesFrom,
    fault: Option<&str>,
) -> Result<bool> {
    let before = frames.count()?;
    let cut_us = host_now_us(lab, on)?;
    std::thread::sleep(ON_THE_WAY);
    if !log.read("g1")?.nothing_in_flight(cut_us) {
        return Ok(false);
    }
    let quiet = frames.count()?;
    let end = Instant::now() + Duration::from_secs(10);
    while !log.read("g1")?.sealed_since(cut_us) {
        if Instant::now() >= end {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    match fault {
        Some("release-before-commit" | "ipv4-only") => {
            frames.wait(before + 10, LIMIT).context("the fault does not show")?;
        }
        // Its frames left with the commit before.
        Some(_) => {}
        None => {
            std::thread::sleep(ON_THE_WAY);
            ensure!(frames.count()? == quiet, "frames left while nothing was committed");
        }
    }
    // All of them.
    std::thread::sleep(ON_THE_WAY);
    Ok(true)
}
