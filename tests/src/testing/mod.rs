//! `cargo xtask test`: everything CI runs, in groups.

mod architecture;
mod cargo;
mod microvm;
pub(crate) mod sim;
mod supervisor;

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::ValueEnum;

use crate::lab::roots::{Root, Roots};
use crate::setup;

/// A part of the tests that can be run alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Group {
    /// Format, lints, unit tests, documentation
    Unit,
    /// Who may depend on whom, where unsafe code may be, how long a file may be
    Architecture,
    /// A thousand failovers of a KVM guest of our own, on this machine's /dev/kvm
    Microvm,
    /// Licences, sources and bans of the dependencies
    Deny,
    /// Scenarios with real guests on real hosts
    Lab,
}

impl Group {
    const ALL: [Self; 5] = [Self::Architecture, Self::Unit, Self::Microvm, Self::Deny, Self::Lab];

    fn run(self, report: &mut Report, scenario: &str, roots: Roots) -> Result<()> {
        match self {
            Self::Unit => cargo::unit(report),
            Self::Architecture => architecture::check(report),
            Self::Microvm => microvm::run(report, microvm::TEST_CYCLES),
            Self::Deny => cargo::deny(report),
            Self::Lab => crate::scenarios::run(report, scenario, roots),
        }
    }

    /// Runs it and notes how long that took; what keeps it from running is a failure of its own.
    fn timed(self, report: &mut Report, scenario: &str, roots: Roots) {
        println!("group {self}");
        let started = Instant::now();
        if let Err(error) = self.run(report, scenario, roots) {
            report.fail(&format!("group {self}"), &format!("{error:#}"));
        }
        report.times.push((self, started.elapsed()));
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Unit => "unit",
            Self::Architecture => "architecture",
            Self::Microvm => "microvm",
            Self::Deny => "deny",
            Self::Lab => "lab",
        })
    }
}

/// The same tests with so many rounds that CI cannot wait for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Campaign {
    /// Twenty thousand failovers of the micro-VM
    Microvm,
    /// A thousand deaths (UNDERSTUDY_SUPERVISOR_DEATHS) of an agent under checkpointing, each survived by the guest within the supervisor's bound
    Supervisor,
    /// Everything that can happen to two hosts and a witness, in the lab
    Owner,
    /// Twenty power cuts (UNDERSTUDY_CUTS) at random moments while `understudy verify` asks over everything
    Verify,
    /// The lab's scenarios on hosts of Debian 13, then failovers between those and hosts of this machine's own system
    Debian13,
    /// virsh's verbs on protected guests, and fifty starts and destroys in a row with libvirt's hook
    Verbs,
    /// The same, and everything about the XML element, on hosts whose libvirt is virtqemud
    Virtqemud,
    /// Guests whose card has several queues, is a macvtap, or is in Open vSwitch
    Cards,
}

/// Runs a campaign; the exit status tells whether all is well.
pub(crate) fn campaign(name: Campaign) -> Result<i32> {
    setup::ensure()?;
    let mut report = Report::default();
    match name {
        Campaign::Microvm => microvm::run(&mut report, microvm::CAMPAIGN_CYCLES)?,
        Campaign::Supervisor => supervisor::run(&mut report)?,
        Campaign::Verbs => {
            crate::scenarios::run(&mut report, "verbs: ", Roots::default())?;
            crate::scenarios::run(&mut report, "campaign: fifty starts", Roots::default())?;
        }
        Campaign::Virtqemud => {
            for scenarios in ["verbs: ", "metadata: ", "campaign: fifty starts"] {
                crate::scenarios::run(&mut report, scenarios, Roots::both(Root::Virtqemud))?;
            }
        }
        Campaign::Cards => {
            setup::ensure_open_vswitch()?;
            crate::scenarios::run(&mut report, "cards: ", Roots::default())?;
        }
        Campaign::Owner => crate::scenarios::run(&mut report, crate::scenarios::OWNER, Roots::default())?,
        Campaign::Verify => crate::scenarios::run(&mut report, crate::scenarios::CAMPAIGN, Roots::default())?,
        Campaign::Debian13 => {
            crate::scenarios::run(&mut report, "", Roots::both(Root::Debian13))?;
            crate::scenarios::run(&mut report, crate::scenarios::VERSIONS, Roots::mixed())?;
        }
    }
    Ok(report.close())
}

/// How much the groups beside the lab leave the CPUs to it: the hosts' clocks run on, whoever computes.
const BESIDE_THE_LAB: i32 = 10;

/// What came of the tests so far.
#[derive(Debug, Default)]
pub(crate) struct Report {
    passed: usize,
    skipped: usize,
    failures: Vec<String>,
    times: Vec<(Group, Duration)>,
}

impl Report {
    pub(crate) fn pass(&mut self, count: usize) {
        self.passed += count;
    }

    pub(crate) fn skip(&mut self, what: &str, why: &str) {
        println!("  skipped {what}: {why}");
        self.skipped += 1;
    }

    /// `why` is shown at once, `what` again at the end.
    pub(crate) fn fail(&mut self, what: &str, why: &str) {
        println!("  FAILED {what}\n{}", why.trim_end());
        self.failures.push(what.to_owned());
    }

    /// Runs one test and says how it went.
    pub(crate) fn test(&mut self, what: &str, test: impl FnOnce() -> Result<()>) {
        let started = Instant::now();
        match test() {
            Ok(()) => {
                println!("  ok {what} ({:.1} s)", started.elapsed().as_secs_f64());
                self.pass(1);
            }
            Err(error) => self.fail(what, &format!("{error:#}")),
        }
    }

    /// Takes over what came of tests elsewhere.
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.skipped += other.skipped;
        self.failures.extend(other.failures);
        self.times.extend(other.times);
    }

    /// Prints what failed and the closing line; gives the exit status.
    pub(crate) fn close(&self) -> i32 {
        for failure in &self.failures {
            println!("FAILED {failure}");
        }
        println!("{}", self.closing_line());
        i32::from(!self.failures.is_empty())
    }

    fn closing_line(&self) -> String {
        let skipped = if self.skipped > 0 { format!(", {} skipped", self.skipped) } else { String::new() };
        format!("{} passed, {} failed{skipped}", self.passed, self.failures.len())
    }
}

/// Whether this is CI, which accepts fewer excuses.
pub(crate) fn in_ci() -> bool {
    std::env::var_os("CI").is_some_and(|value| !value.is_empty() && value != "false" && value != "0")
}

/// Runs groups, all when none is named; the exit status tells whether all is well.
///
/// The lab waits for its guests most of the time, so the other long groups run beside it.
pub(crate) fn run(only: &[Group], scenario: &str, roots: Roots) -> Result<i32> {
    setup::ensure()?;
    let wanted = |group: &Group| only.is_empty() || only.contains(group);
    // Over in seconds, and what it finds is mended first.
    let (first, rest): (Vec<_>, Vec<_>) =
        Group::ALL.into_iter().filter(wanted).partition(|group| *group == Group::Architecture);
    let (lab, beside): (Vec<_>, Vec<_>) = rest.into_iter().partition(|group| *group == Group::Lab);
    let run = |groups: Vec<Group>| {
        let mut report = Report::default();
        groups.into_iter().for_each(|group| group.timed(&mut report, scenario, roots));
        report
    };
    let mut report = run(first);
    if lab.is_empty() || beside.is_empty() {
        report.add(run(beside));
        report.add(run(lab));
    } else {
        std::thread::scope(|scope| {
            let others = scope.spawn(|| {
                // Of this thread and what it starts. Without it they are only less considerate.
                let _ = rustix::process::nice(BESIDE_THE_LAB);
                run(beside)
            });
            report.add(run(lab));
            match others.join() {
                Ok(theirs) => report.add(theirs),
                Err(_) => report.fail("the groups beside the lab", "their thread panicked"),
            }
        });
    }
    println!();
    for (group, time) in &report.times {
        println!("{group:14} {:6.1} s", time.as_secs_f64());
    }
    Ok(report.close())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closing_line_counts_everything() {
        let mut report = Report::default();
        report.pass(41);
        report.test("one", || Ok(()));
        assert_eq!(report.closing_line(), "42 passed, 0 failed");
        report.skip("three", "no reason");
        report.test("two", || anyhow::bail!("on purpose"));
        assert_eq!(report.closing_line(), "42 passed, 1 failed, 1 skipped");
        let mut all = Report::default();
        all.fail("zero", "no reason");
        all.pass(1);
        all.add(report);
        assert_eq!(all.closing_line(), "43 passed, 2 failed, 1 skipped");
        assert_eq!(all.failures, ["zero", "two"]);
    }
}
