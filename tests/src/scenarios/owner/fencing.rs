//! The primary loses its power, and with it the board that could have switched it off: nobody gets a licence from fencing.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::keeping::{Keeping, LIMIT};
use super::{WITNESS_ON, power_cut, total};
use crate::lab::Lab;
use crate::lab::plan::HostName::{Alpha, Beta};
use crate::lab::understudy::Role;

/// A fencing command that leaves a trace of having been asked.
struct Fence {
    program: PathBuf,
    asked: PathBuf,
}

impl Fence {
    /// `answer` is what it does then.
    fn new(lab: &Lab, answer: &str) -> Result<Self> {
        let shared = lab.dir().shared();
        let (program, asked) = (shared.join("fence"), shared.join("fence-asked"));
        if asked.exists() {
            fs::remove_file(&asked).context("cannot forget who was fenced before")?;
        }
        fs::write(&program, format!("#!/bin/sh\necho asked >> {}\n{answer}\n", asked.display()))?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
        Ok(Self { program, asked })
    }

    fn start<'a>(&self, lab: &'a Lab) -> Result<Keeping<'a>> {
        Keeping::start_with(lab, WITNESS_ON, "hold", Some(self.program.clone()))
    }

    fn wait_asked(&self) -> Result<()> {
        let end = Instant::now() + LIMIT;
        while !self.asked.exists() {
            ensure!(Instant::now() < end, "nobody was to be fenced");
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }
}

/// Fencing was no success, and this is what came of it.
fn ensure_unfenced(report: &Value, outcome: &str) -> Result<()> {
    let fencing = &report["fencing"];
    ensure!(fencing["success"] == false && fencing["outcome"] == outcome, "not {outcome:?}: {report}");
    Ok(())
}

/// The witness decides, in the time that was said before; nobody waits for the board.
pub(super) fn power_lost(lab: &Lab) -> Result<()> {
    let fence = Fence::new(lab, "exec sleep 600")?;
    let mut keeping = fence.start(lab)?;
    let bound = keeping.bound(Beta)?;
    let silent = power_cut(&mut keeping, Alpha)?;
    let report = keeping.report(Beta)?;
    println!("    {report}");
    ensure!(report["kind"] == "takeover", "{report}");
    ensure!(
        total(&report)? <= bound && silent <= bound,
        "{silent:?}, {report}, but at most {bound:?} was said"
    );
    // While the witness answers nobody is fenced.
    ensure_unfenced(&report, "not asked")?;
    ensure!(!fence.asked.exists(), "somebody was to be fenced, but {report}");
    keeping.spoke(&[Alpha, Beta])
}

/// Without a witness the board is asked, and hangs: the guest stays off until the witness is back, and is not kept waiting by
/// what hangs.
pub(super) fn witness_and_power_lost(lab: &Lab) -> Result<()> {
    let fence = Fence::new(lab, "exec sleep 600")?;
    let mut keeping = fence.start(lab)?;
    let bound = keeping.bound(Beta)?;
    keeping.witness_down()?;
    keeping.wait_said(Beta, "the arbiter gives no answer")?;
    lab.power_off(Alpha)?;
    let moment = Instant::now();
    fence.wait_asked()?;
    ensure!(lab.status(Beta, Role::Backup, "g1")?.is_some_and(|status| status.state() == "standby"));
    let back = Instant::now();
    keeping.witness_up()?;
    keeping.wait_said(Beta, "the guest was taken over")?;
    let waited = back.elapsed();
    ensure!(waited <= bound, "{waited:?} since the witness was back, but at most {bound:?} was said");
    keeping.taken_over(Alpha, moment, "witness, primary and its fencing")?;
    ensure_unfenced(&keeping.report(Beta)?, "not ended")?;
    keeping.spoke(&[Alpha, Beta])
}
