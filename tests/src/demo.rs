//! `cargo xtask demo`: a real guest survives the death of its host.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::lab::domain::GuestSpec;
use crate::lab::guest::Guest;
use crate::lab::observer::Observer;
use crate::lab::plan::HostName;
use crate::lab::roots::Roots;
use crate::lab::state::LabDir;
use crate::lab::understudy::{FailoverReport, GuestStatus, Role};
use crate::lab::{self, Lab};
use crate::ui::Steps;

const GUEST: &str = "g1";
/// How long epochs are watched going by.
const WATCH: Duration = Duration::from_secs(8);
/// A guest that has not answered by then is dead.
const GIVE_UP: Duration = Duration::from_secs(60);
const LIFETIME: Duration = Duration::from_secs(15 * 60);

/// What a run found out; the names of its JSON form are documented in `docs`.
struct Findings {
    same_boot: bool,
    memory: String,
    epochs: u64,
    counter_before: u64,
    counter_after_first: u64,
    blackout: Duration,
    protected: GuestStatus,
}

impl Findings {
    fn survived(&self) -> bool {
        self.same_boot && self.memory.starts_with("ok ")
    }

    /// How far the guest's counter fell back behind what the client had seen.
    fn lost(&self) -> u64 {
        self.counter_before.saturating_sub(self.counter_after_first)
    }
}

/// Runs the demo; the exit status tells whether the guest survived.
pub(crate) fn run(json: Option<&Path>) -> Result<i32> {
    let steps = Steps::start();
    let lab = lab::cli::booted(LabDir::unique(), Roots::default(), LIFETIME, true, false, &steps)?;
    let result = show(&lab, &steps);
    if let Err(error) = &result {
        eprintln!("{}", lab.agent_logs());
        steps.say(format!("failed: {error:#}"));
    }
    let findings = result?;
    let host_kernel = lab.shell(HostName::Beta, "uname -r")?;
    lab.down()?;
    if let Some(file) = json {
        let status = &findings.protected;
        let text = json!({
            "survived": findings.survived(),
            "epochs": findings.epochs,
            "counter_before": findings.counter_before,
            "counter_after_first": findings.counter_after_first,
            "lost": findings.lost(),
            "blackout_ms": findings.blackout.as_millis(),
            "pause_ms": {"p50": status.real("pause_p50_ms"), "p99": status.real("pause_p99_ms")},
            "qemu": status.text("qemu"),
            "libvirt": status.text("libvirt"),
            "host_kernel": host_kernel.trim(),
        });
        std::fs::write(file, format!("{text:#}\n"))
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(i32::from(!findings.survived()))
}

fn show(lab: &Lab, steps: &Steps) -> Result<Findings> {
    steps.waiting("starting the guest");
    lab.start_guest(HostName::Alpha, &GuestSpec::new(GUEST))?;
    let mut guest = Guest::wait(lab.dir(), GUEST, GIVE_UP)?;
    steps.say(format!("guest {GUEST} runs on alpha and counts: {}", guest.count()?.total));
    // Memory that is rewritten all the time, every page with the round it was written in.
    guest.must("dirty 200 50")?;

    steps.waiting("copying the guest to beta");
    lab.protect(GUEST, HostName::Alpha)?;
    steps.say("protected: alpha -> beta");
    let observer = Observer::start(lab.dir(), GUEST);
    steps.waiting("waiting for the standby on beta");
    lab.wait_status((HostName::Beta, Role::Backup), GUEST, GIVE_UP, |status| {
        status.text("standby") == "ready"
    })?;
    let protected = watch_epochs(lab, steps, &observer)?;
    let epochs = protected.committed_epoch().context("no epoch was committed")?;

    let before = observer.last().context("the client has not seen the counter")?;
    let cut = Instant::now();
    lab.power_off(HostName::Alpha)?;
    let since = |moment: Instant| moment.saturating_duration_since(cut).as_millis();
    steps.say(format!("POWER CUT on alpha; the client last saw {}", before.count.total));
    // What arrived between the two is still the old guest's.
    let before = observer.last().filter(|sample| sample.count.boot == before.count.boot).unwrap_or(before);

    steps.waiting("promoting beta's copy");
    let asked = Instant::now();
    let report = lab.failover(GUEST, HostName::Beta)?;
    let promoted = Instant::now();
    steps.say("beta's copy is promoted");
    let first = observer.first_after(asked, GIVE_UP).context("the guest does not answer any more")?;
    std::thread::sleep(Duration::from_secs(3));
    let later = observer.last().context("the client lost what it saw")?;
    if later.count.total <= first.count.total {
        bail!("the counter stands still at {}", first.count.total);
    }
    let mut guest = Guest::wait(lab.dir(), GUEST, GIVE_UP)?;
    let findings = Findings {
        same_boot: later.count.boot == before.count.boot,
        memory: guest.ask("check")?,
        epochs: report.epoch().unwrap_or(epochs),
        counter_before: before.count.total,
        counter_after_first: first.count.total,
        blackout: first.at.saturating_duration_since(before.at),
        protected,
    };
    let continued = if findings.same_boot { "the same run of the guest" } else { "a NEW run of the guest" };
    println!();
    println!("  timeline, milliseconds after the power cut");
    println!("  {:>8}  last answer from alpha, counter {}", -signed(cut, before.at), before.count.total);
    println!("  {:>8}  power of alpha cut", 0);
    println!("  {:>8}  `understudy failover {GUEST}` on beta", since(asked));
    println!("  {:>8}  promoted from epoch {}: {}", since(promoted), findings.epochs, parts(&report));
    println!("  {:>8}  first answer from beta, counter {} ({continued})", since(first.at), first.count.total);
    println!("  {:>8}  counter {}", since(later.at), later.count.total);
    println!();
    println!(
        "  no answer for {} ms; {} counts had to be counted again",
        findings.blackout.as_millis(),
        findings.lost()
    );
    println!("  memory of the guest: {}", findings.memory);
    println!("  {}", if findings.survived() { "The guest survived." } else { "The guest did NOT survive." });
    Ok(findings)
}

fn parts(report: &FailoverReport) -> String {
    report.parts().iter().map(|(part, ms)| format!("{part} {ms:.1} ms")).collect::<Vec<_>>().join(", ")
}

/// Negative when `moment` came after `zero`.
fn signed(zero: Instant, moment: Instant) -> i128 {
    let before = zero.saturating_duration_since(moment).as_millis();
    let after = moment.saturating_duration_since(zero).as_millis();
    i128::try_from(before).unwrap_or(0) - i128::try_from(after).unwrap_or(0)
}

fn watch_epochs(lab: &Lab, steps: &Steps, observer: &Observer) -> Result<GuestStatus> {
    let end = Instant::now() + WATCH;
    loop {
        let status = lab
            .status(HostName::Alpha, Role::Primary, GUEST)?
            .context("alpha's agent does not know the guest")?;
        let counter = observer.last().map_or(0, |sample| sample.count.total);
        let pause = |which| status.real(which).map_or_else(|| "-".into(), |ms| format!("{ms:.2}"));
        steps.say(format!(
            "{}: epoch {}, stop p50 {} ms p99 {} ms, the client sees {counter}",
            status.state(),
            status.committed_epoch().map_or_else(|| "-".into(), |epoch| epoch.to_string()),
            pause("pause_p50_ms"),
            pause("pause_p99_ms"),
        ));
        if Instant::now() >= end {
            return Ok(status);
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}
