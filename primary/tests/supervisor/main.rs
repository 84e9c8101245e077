//! The supervisor against real deaths: a process that captures a KVM guest, with the capture that is shipped, is killed
//! at random moments, and the guest runs again within the bound that the supervisor states, every time.
//!
//! `UNDERSTUDY_SUPERVISOR_DEATHS` is the number of deaths, `UNDERSTUDY_SEED` repeats the choices of a run. Says why and
//! passes where there is no KVM or no QEMU, except in CI.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test ends by panicking")]

#[path = "../support/mod.rs"]
mod support;
mod victim;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use support::{Guest, skip_reason};
use understudy_libvirt::{Monitor, RunState, SocketMonitor, qmp};
use understudy_primary::capture::{ColoOptions, rescue};
use understudy_proto::ids::GuestId;
use understudy_watchdog::bound;
use understudy_watchdog::engine::{About, Cause, Report, Trouble};
use understudy_watchdog::monitor::Monitors;
use understudy_watchdog::supervisor::{Ender, Supervisor};
use victim::{Death, Random, Victim};

/// Only a bound for a test that hangs.
const LIMIT: Duration = Duration::from_secs(60);

/// Deaths unless `UNDERSTUDY_SUPERVISOR_DEATHS` says otherwise.
const DEATHS: u64 = 30;

/// The guest's monitor as the supervisor reaches it.
struct Socket(PathBuf);

impl Monitors for Socket {
    fn open(&self, _: GuestId) -> Result<Box<dyn Monitor>, Trouble> {
        match SocketMonitor::connect(&self.0) {
            Ok((monitor, _)) => Ok(Box::new(monitor)),
            Err(error) => Err(Trouble::Unreachable(error.to_string())),
        }
    }
}

/// A guest with a monitor for the agent, one for the supervisor and one for the test.
struct Host {
    guest: Guest,
    folder: tempfile::TempDir,
}

impl Host {
    /// `None`, after saying why, where there cannot be one.
    fn start(pages: usize) -> Option<Self> {
        if let Some(reason) = skip_reason() {
            let in_ci = std::env::var("CI").is_ok_and(|value| !matches!(value.as_str(), "" | "0" | "false"));
            assert!(!in_ci, "not to be skipped in CI: {reason}");
            println!("SKIPPED {reason}");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let socket = |name| format!("unix:{},server=on,wait=off", folder.path().join(name).display());
        let extra = ["-qmp", &socket("agent"), "-qmp", &socket("supervisor")];
        Some(Self { guest: Guest::start("pc", pages, &extra).unwrap(), folder })
    }

    fn state_dir(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    fn victim(&self, death: Death) -> Victim {
        Victim::spawn(&self.folder.path().join("agent"), &self.state_dir(), death)
    }

    fn supervisor(&self, hung_after: Duration) -> Supervision {
        Supervision::start(&self.folder.path().join("supervisor"), self.state_dir(), hung_after)
    }

    /// Running, and not as a source of checkpoints.
    fn is_free(&self) -> bool {
        let monitor = self.guest.monitor.as_ref();
        qmp::query_colo_mode(monitor).unwrap() == "none"
            && qmp::query_status(monitor).unwrap() == RunState::Running
    }

    fn state(&self) -> RunState {
        qmp::query_status(self.guest.monitor.as_ref()).unwrap()
    }

    /// How long after `since` the guest was free.
    fn freed_after(&self, since: Instant, what: &str) -> Duration {
        while !self.is_free() {
            assert!(since.elapsed() < LIMIT, "{what}: the guest is left in {}", self.state());
            std::thread::sleep(Duration::from_millis(2));
        }
        let after = since.elapsed();
        assert!(self.guest.counts().unwrap(), "{what}: the guest does not count");
        after
    }
}

/// A supervisor on a thread, as `understudy-watchdog` runs it.
struct Supervision {
    ender: Ender,
    reports: Receiver<Report>,
    thread: Option<JoinHandle<()>>,
}

impl Supervision {
    fn start(socket: &Path, state_dir: PathBuf, hung_after: Duration) -> Self {
        let supervisor = Supervisor::new(state_dir, Arc::new(Socket(socket.to_owned())), hung_after);
        let (ender, (tell, reports)) = (supervisor.ender(), channel());
        let run = move || supervisor.run(|report| drop(tell.send(report.clone()))).unwrap();
        Self { ender, reports, thread: Some(std::thread::spawn(run)) }
    }

    /// What it has reported about the guest so far.
    fn abouts(&self) -> Vec<About> {
        let about = |report| match report {
            Report::Guest { what, .. } => Some(what),
            Report::Agent { .. } => None,
        };
        self.reports.try_iter().filter_map(about).collect()
    }

    /// Waits until it reports that it let the guest run; what it found it in.
    fn freed(&self, cause: Cause) -> RunState {
        loop {
            match self.reports.recv_timeout(LIMIT).expect("a report") {
                Report::Guest { what: About::Freed { cause: why, found, .. }, .. } if why == cause => {
                    return found;
                }
                _ => {}
            }
        }
    }
}

impl Drop for Supervision {
    fn drop(&mut self) {
        self.ender.end();
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            eprintln!("the supervisor has panicked");
        }
    }
}

fn number(variable: &str) -> Option<u64> {
    let value = std::env::var(variable).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{variable}={value} is not a number")))
}

#[test]
fn a_guest_runs_again_within_the_stated_bound_whenever_its_agent_is_killed() {
    let Some(host) = Host::start(300) else { return };
    let deaths = number("UNDERSTUDY_SUPERVISOR_DEATHS").unwrap_or(DEATHS);
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seed = number("UNDERSTUDY_SEED").unwrap_or(u64::from(since_1970.subsec_nanos()));
    println!(
        "seed {seed}; again: UNDERSTUDY_SEED={seed} UNDERSTUDY_SUPERVISOR_DEATHS={deaths} cargo test -p \
         understudy-primary --test supervisor -- --nocapture"
    );

    // Without a supervisor it stays stopped; one that is started later finds that.
    host.victim(Death::Barrier(3)).wait_for_kill();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(host.state(), RunState::Colo);
    let supervision = host.supervisor(bound::HUNG_AFTER);
    assert_eq!(supervision.freed(Cause::Died), RunState::Colo);
    host.freed_after(Instant::now(), "the first");

    let mut random = Random::new(seed);
    let (mut times, mut deaths_by_name, mut found_by_state) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
    let mut tally = |state: RunState| *found_by_state.entry(state.to_string()).or_insert(0_u32) += 1;
    for n in 0..deaths {
        let death = Death::random(&mut random);
        // Now and then another agent is there at once, and frees the guest as well.
        let raced = random.below(4) == 0;
        let what = format!("seed {seed}, death {n}: {death:?}{}", if raced { ", raced" } else { "" });
        let died_at = host.victim(death).wait_for_kill();
        if raced {
            rescue(host.guest.monitor.as_ref()).unwrap_or_else(|error| panic!("{what}: {error}"));
        }
        let after = host.freed_after(died_at, &what);
        assert!(after <= bound::DEAD, "{what}: {after:?}");
        if !raced && death.leaves_stopped() {
            // What comes late of the one before may come first.
            loop {
                let found = supervision.freed(Cause::Died);
                let was_stopped = found != RunState::Running;
                tally(found);
                if was_stopped {
                    break;
                }
            }
        } else {
            supervision.abouts().into_iter().filter_map(found).for_each(&mut tally);
        }
        *deaths_by_name.entry(death.name()).or_insert(0_u32) += 1;
        times.push(after);
    }
    times.sort_unstable();
    deaths_by_name.iter().for_each(|(death, count)| println!("{count:6} deaths {death}"));
    found_by_state.iter().for_each(|(state, count)| println!("{count:6} found {state} by the supervisor"));
    let ms = |time: Option<&Duration>| time.map_or(0.0, |time| time.as_secs_f64() * 1000.0);
    println!(
        "{deaths} deaths, the guest was free after {:.1} ms (median), {:.1} ms at most; the bound is {} ms",
        ms(times.get(times.len() / 2)),
        ms(times.last()),
        bound::DEAD.as_millis()
    );
}

fn found(about: About) -> Option<RunState> {
    match about {
        About::Freed { found, .. } => Some(found),
        _ => None,
    }
}

#[test]
fn an_agent_that_hangs_loses_the_guest_and_notices_when_it_goes_on() {
    const HUNG_AFTER: Duration = Duration::from_millis(500);
    let Some(host) = Host::start(300) else { return };
    let supervision = host.supervisor(HUNG_AFTER);
    // It stops itself, between SEND and LOADED.
    let victim = host.victim(Death::Hang(4));
    let pid = Pid::from_raw(i32::try_from(victim.id()).unwrap()).unwrap();
    let (_, status) = waitpid(Some(pid), WaitOptions::UNTRACED).unwrap().unwrap();
    let hung_at = Instant::now();
    assert!(status.stopped(), "{status:?}");
    assert_eq!(supervision.freed(Cause::Hung), RunState::Colo);
    let after = host.freed_after(hung_at, "hung");
    assert!(after <= bound::hung(HUNG_AFTER), "{after:?}");

    // What it captured of the epoch is not an epoch; it says so, begins anew, and is not disturbed.
    kill_process(pid, Signal::CONT).unwrap();
    let said = victim.wait_for_end();
    assert!(said.contains("epoch 4 failed: "), "{said}");
    assert!(!said.contains("captured 4\n") && said.contains("captured 3\n"), "{said}");
    assert!(said.contains("begun again\n") && said.ends_with("ended\n"), "{said}");
    assert_eq!(supervision.abouts().into_iter().filter_map(found).count(), 0);
    assert!(host.is_free());
}

#[test]
fn an_agent_that_stops_its_guest_nearly_always_is_not_taken_for_one_that_hangs() {
    const HUNG_AFTER: Duration = Duration::from_secs(3);
    let Some(host) = Host::start(100) else { return };
    let supervision = host.supervisor(HUNG_AFTER);
    let said = host.victim(Death::Slow(HUNG_AFTER + 2 * bound::LOOK)).wait_for_end();
    assert!(said.ends_with("ended\n") && !said.contains("failed"), "{said}");
    assert_eq!(supervision.abouts(), []);
}

#[test]
fn an_agent_that_works_has_let_go_before_it_is_taken_for_one_that_hangs() {
    let options = ColoOptions::default();
    assert!(bound::HUNG_AFTER >= options.checkpoint_limit + options.exit_limit);
    assert!(bound::HUNG_AFTER >= options.max_downtime_limit + options.silence_stopped + options.exit_limit);
}
