//! `understudy verify` outside, a power cut inside: with the gate as it is, and with gates that do wrong on purpose.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::random::Dice;
use super::{SHAPES, Scenario, UP, start_shaped};
use crate::lab::Lab;
use crate::lab::commits::{self, CommitLog, host_now_us};
use crate::lab::domain::GuestSpec;
use crate::lab::frames::FramesFrom;
use crate::lab::guest::Guest;
use crate::lab::plan::HostName::{Alpha, Beta};
use crate::lab::stamps::Recorded;
use crate::lab::understudy::Role;
use crate::lab::verify::{Verdict, Verify};

pub(super) const SCENARIOS: &[Scenario] = &[
    ("output: verify finds nothing over a power cut, and the LAN agrees with the commit log", sound),
    ("output: verify finds each planted fault, and none where there is none", bites),
];

/// Only when it is asked for by name.
pub(super) const ON_REQUEST: &[Scenario] = &[(CAMPAIGN, campaign)];

/// `cargo xtask campaign verify`.
pub(crate) const CAMPAIGN: &str = "campaign: verify finds nothing over power cuts at random moments";

/// How many, unless `UNDERSTUDY_CUTS` says otherwise.
const CUTS: u32 = 20;

const LIMIT: Duration = Duration::from_secs(90);

/// How long the guest is asked before it is cut off.
const BEFORE: Duration = Duration::from_secs(4);

/// A frame that was released in the last moment may take so long to the client through an emulated host.
const ON_THE_WAY: Duration = Duration::from_millis(500);

/// Frames of a guest that show that it is being asked and answers.
const ANSWERS: usize = 30;

/// Compares what left the host with the log of commits; then the guest is cut off from the backup and, while it says what
/// nobody commits, from power.
fn sound(lab: &Lab) -> Result<()> {
    lab.restart_agent(Alpha, Role::Primary, commits::ARGUMENTS)?;
    drop(start_shaped(lab, Alpha, SHAPES[0])?);
    let log = CommitLog::from_now(lab, Alpha);
    lab.protect("g1", Alpha)?;
    super::advances(lab, LIMIT)?;
    let verify = Verify::start(lab, "g1", 20)?;
    let recorded = Recorded::start(lab, Alpha, "g1")?;
    std::thread::sleep(BEFORE);
    let (said, left) = recorded.end(lab)?;
    let agreed = agree(&log, &said, &left);
    let verdict = over_a_power_cut(lab, verify)?;
    verdict.ensure_clean()?;
    let (compared, largest) = agreed?;
    println!("    {compared} stamps on the LAN, the largest {largest}, each behind the commit of its epoch");
    println!("    {} questions, {}", verdict.json["questions"], verdict.json["answers"]);
    Ok(())
}

/// No stamp is on the wire before the epoch is committed in which it was said.
fn agree(
    log: &CommitLog,
    said: &std::collections::BTreeMap<u64, u64>,
    left: &std::collections::BTreeMap<u64, u64>,
) -> Result<(usize, u64)> {
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
    ensure!(compared > 50, "only {compared} of {} stamps could be compared", left.len());
    Ok((compared, left.keys().last().copied().unwrap_or(0)))
}

/// Cuts guest g1 off, promotes it and has it asked for a while.
pub(super) fn over_a_power_cut(lab: &Lab, verify: Verify) -> Result<Verdict> {
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

/// The guest goes from host to host: protected, asked over everything under load, cut off from power, promoted.
fn campaign(lab: &Lab) -> Result<()> {
    let given = std::env::var("UNDERSTUDY_CUTS").ok().and_then(|cuts| cuts.parse().ok());
    let (cuts, mut dice, mut on) = (given.unwrap_or(CUTS), Dice::new(), Alpha);
    println!("    UNDERSTUDY_SEED={}", dice.seed());
    start_shaped(lab, on, SHAPES[0])?.must("dirty 300 20")?;
    for number in 1..=cuts {
        let backup = on.other();
        lab.protect("g1", on)?;
        lab.wait_status((on, Role::Primary), "g1", LIMIT, |status| {
            super::is_protected(status) && status.number("epochs_total").is_some_and(|total| total > 3)
        })?;
        let verify = Verify::start(lab, "g1", 20)?;
        let asked = FramesFrom::start(lab, on, "g1")?;
        asked.wait(ANSWERS, LIMIT).context("the guest is not heard")?;
        let wait = Duration::from_millis(dice.below(4000));
        std::thread::sleep(wait);
        lab.power_off(on)?;
        let frames = FramesFrom::start(lab, backup, "g1")?;
        lab.failover("g1", backup)?;
        frames.wait(ANSWERS, LIMIT).context("the guest that was promoted does not answer")?;
        let verdict = verify.end()?;
        verdict.ensure_clean().with_context(|| format!("power cut {number}, of {on}"))?;
        let json = &verdict.json;
        println!(
            "    power cut {number} of {cuts}, of {on}, after {} ms: {} questions, silence {} ms, no violation",
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

/// Of the three faults, by guest; g4 has none.
const FAULTS: [(&str, &str); 3] =
    [("g1", "release-before-commit"), ("g2", "ipv4-only"), ("g3", "seal-after-resume")];
const ALL: [&str; 4] = ["g1", "g2", "g3", "g4"];

/// Epochs are so long that one can be cut off from the backup before it ends.
const EPOCH_MS: u32 = 2500;

/// Four guests are asked on one emulated host.
const SLOWLY_MS: u32 = 150;

/// How often the cut may come at the wrong moment.
const ATTEMPTS: usize = 6;

/// Four guests under one agent. The backup is cut off while no epoch is on its way, so that nothing can be committed any
/// more; the guests answer on. Then the power is cut, and what each goes on from is known to lack what it has let out.
fn bites(lab: &Lab) -> Result<()> {
    let faults: Vec<String> = FAULTS.iter().map(|(guest, fault)| format!("{guest}={fault}")).collect();
    let arguments = format!(
        "--plant-fault={}\n--epoch-ms={EPOCH_MS}\n--output-floor-ms={EPOCH_MS}\n{}",
        faults.join(","),
        commits::ARGUMENTS
    );
    lab.restart_agent(Alpha, Role::Primary, &arguments)?;
    let log = CommitLog::from_now(lab, Alpha);
    each(|guest| {
        lab.start_guest(Alpha, &GuestSpec { memory_mib: 96, ..GuestSpec::new(guest) })?;
        Guest::wait(lab.dir(), guest, UP).map(drop)
    })?;
    // One full copy at a time is enough for an emulated host.
    ALL.iter().try_for_each(|guest| lab.protect(guest, Alpha))?;
    let committed = |guest: &str| log.read(guest).map(|commits| commits.committed.len());
    let more = |guest: &str, count: usize| -> Result<()> {
        let (start, end) = (committed(guest)?, Instant::now() + LIMIT);
        while committed(guest)? < start + count {
            ensure!(Instant::now() < end, "no epoch of {guest} is committed");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    };
    each(|guest| more(guest, 1))?;
    let observers =
        ALL.map(|guest| Verify::start(lab, guest, SLOWLY_MS)).into_iter().collect::<Result<Vec<_>>>()?;
    each(|guest| more(guest, 2))?;
    let frames =
        ALL.map(|guest| FramesFrom::start(lab, Alpha, guest)).into_iter().collect::<Result<Vec<_>>>()?;
    let mut attempt = 1;
    let quiet = loop {
        // Just after a commit most of an epoch is still to come.
        more("g1", 1)?;
        if let Some(quiet) = cut_between_epochs(lab, &log, &frames)? {
            break quiet;
        }
        ensure!(attempt < ATTEMPTS, "an epoch was on its way at every cut");
        lab.heal("repl".parse()?)?;
        each(|guest| more(guest, 1))?;
        attempt += 1;
    };
    ensure!(frames[3].count()? == quiet, "g4 has no fault, and its frames left while nothing was committed");
    lab.power_off(Alpha)?;
    lab.heal("repl".parse()?)?;
    for guest in ALL {
        let frames = FramesFrom::start(lab, Beta, guest)?;
        lab.failover(guest, Beta)?;
        frames.wait(ANSWERS, LIMIT).with_context(|| format!("{guest} does not answer"))?;
    }
    let verdicts = observers.into_iter().map(Verify::end).collect::<Result<Vec<_>>>()?;
    for ((guest, fault), verdict) in FAULTS.iter().zip(&verdicts) {
        let violations = verdict.ensure_violated(fault).with_context(|| (*guest).to_owned())?;
        let first = verdict.json["violations"][0]["text"].as_str().unwrap_or_default();
        println!(
            "    {fault}: {violations} violations, {} bytes of evidence; {first}",
            verdict.evidence_bytes
        );
    }
    verdicts[3].ensure_clean().context("g4, which has no fault")?;
    println!("    no fault: {} questions, no violation ({attempt} cuts)", verdicts[3].json["questions"]);
    Ok(())
}

/// Cuts the backup off, and waits until g1, whose fault needs the end of an epoch, has had one. Gives the number of frames
/// of g4 soon after the cut; `None` if the cut came while an epoch of g1 or g3 was on its way, which the backup may have.
fn cut_between_epochs(lab: &Lab, log: &CommitLog, frames: &[FramesFrom]) -> Result<Option<usize>> {
    lab.cut("repl".parse()?)?;
    let before: Vec<usize> = frames.iter().map(FramesFrom::count).collect::<Result<_>>()?;
    let cut_us = host_now_us(lab, Alpha)?;
    std::thread::sleep(ON_THE_WAY);
    let quiet = frames[3].count()?;
    for guest in ["g1", "g3"] {
        if !log.read(guest)?.nothing_in_flight(cut_us) {
            return Ok(None);
        }
    }
    let end = Instant::now() + Duration::from_secs(12);
    while !log.read("g1")?.sealed_since(cut_us) {
        if Instant::now() >= end {
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    for (faulty, name) in [(0, "g1"), (1, "g2")] {
        let wait = frames[faulty].wait(before[faulty] + 10, LIMIT);
        wait.with_context(|| format!("the fault of {name} does not show"))?;
    }
    // All of them.
    std::thread::sleep(ON_THE_WAY);
    Ok(Some(quiet))
}

/// For all guests at once.
fn each(work: impl Fn(&str) -> Result<()> + Sync) -> Result<()> {
    std::thread::scope(|scope| {
        let works = ALL.map(|guest| (guest, scope.spawn(|| work(guest))));
        works.into_iter().try_for_each(|(guest, work)| {
            work.join().unwrap_or_else(|_| bail!("a thread panicked")).with_context(|| guest.to_owned())
        })
    })
}
