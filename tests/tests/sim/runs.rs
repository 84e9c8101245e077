//! Many worlds.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::bugs::{Bug, PLANTED};
use crate::world::{Seen, World};

/// Seeds that have failed once.
const KEPT: &str = include_str!("seeds.txt");

/// In a run of the tests.
const SEEDS: u64 = 2000;

/// Lines of a trace that are shown.
const SHOWN: usize = 150;

fn run(seed: u64, bug: Bug) -> Result<Seen, String> {
    World::new(seed, bug, false).live()
}

/// Runs a seed once more, and tells what happens in its world.
fn trace(seed: u64, bug: Bug) -> String {
    let mut world = World::new(seed, bug, true);
    let result = world.live();
    let trace = world.trace();
    let (skipped, shown) = trace.split_at(trace.len().saturating_sub(SHOWN));
    let faults = skipped.iter().filter(|line| line.contains("FAULT") || line.contains("witness:"));
    let faults: Vec<&str> = faults.map(String::as_str).collect();
    format!("{}\n  ... the last {SHOWN} steps:\n{}\n{result:?}", faults.join("\n"), shown.join("\n"))
}

fn number(name: &str, default: u64) -> u64 {
    let value = std::env::var(name).ok();
    value.map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name}={value} is no number")))
}

/// Runs seeds on every core; gives what was seen, and what fails.
fn run_all(start: u64, count: u64, progress: bool) -> (Seen, Vec<(u64, String)>) {
    let began = Instant::now();
    let (next, done) = (AtomicU64::new(start), AtomicU64::new(0));
    let all = Mutex::new((Seen::default(), Vec::new()));
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(16);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= start + count {
                        return;
                    }
                    let result = run(seed, Bug::None);
                    let mut all = all.lock().unwrap();
                    match result {
                        Ok(seen) => all.0.add(&seen),
                        Err(error) => {
                            println!("seed {seed} fails: {error}");
                            all.1.push((seed, error));
                        }
                    }
                    let done = done.fetch_add(1, Ordering::Relaxed) + 1;
                    if progress && done.is_multiple_of(1000) {
                        let failed = all.1.len();
                        let seconds = began.elapsed().as_secs();
                        println!("progress: {done} of {count} seeds, {failed} fail, {seconds} s");
                    }
                }
            });
        }
    });
    let (seen, mut failed) = all.into_inner().unwrap();
    failed.sort();
    (seen, failed)
}

#[test]
fn nothing_unsafe_happens_and_the_guest_is_served_and_protected_again() {
    let (start, count) = (number("UNDERSTUDY_SIM_START", 1), number("UNDERSTUDY_SIM_SEEDS", SEEDS));
    let (seen, failed) = run_all(start, count, count > SEEDS);
    println!("{count} seeds: {seen:?}");
    if let Some((seed, _)) = failed.first() {
        let all: Vec<u64> = failed.iter().map(|(seed, _)| *seed).collect();
        panic!("{} of {count} seeds fail: {all:?}\n{}", failed.len(), trace(*seed, Bug::None));
    }
    // Worlds in which nothing happens prove nothing.
    if count >= SEEDS {
        assert!(seen.takeovers > count / 20 && seen.solos > count / 20 && seen.reclaims > 0, "{seen:?}");
        assert!(seen.pairs > count && seen.destroyed > 0, "{seen:?}");
        assert!(seen.epochs > 20 * count && seen.answers > 20 * count, "{seen:?}");
        assert!(seen.lost < count / 3, "{seen:?}");
    }
}

#[test]
fn seeds_that_have_failed_once_fail_no_more() {
    for line in KEPT.lines().filter(|line| !line.starts_with('#')) {
        let seed = line.split_whitespace().next().expect("a seed").parse().expect("a number");
        if run(seed, Bug::None).is_err() {
            panic!("seed {line} fails again\n{}", trace(seed, Bug::None));
        }
    }
}

#[test]
fn the_same_seed_is_the_same_world() {
    for seed in [1, 77, 1234] {
        assert_eq!(run(seed, Bug::None), run(seed, Bug::None));
        assert_eq!(trace(seed, Bug::None), trace(seed, Bug::None));
    }
}

#[test]
fn planted_bugs_are_found_within_a_thousand_seeds() {
    std::thread::scope(|scope| {
        for bug in PLANTED {
            scope.spawn(move || {
                let violated = |seed| {
                    let error = run(seed, bug).err().filter(|error| error.contains(": invariant "));
                    error.filter(|_| run(seed, Bug::None).is_ok())
                };
                let found = (1..=1000).find_map(|seed| violated(seed).map(|error| (seed, error)));
                println!("{bug:?}: {found:?}");
                assert!(found.is_some(), "{bug:?} was not found");
            });
        }
    });
}

/// For looking at one world: `UNDERSTUDY_SIM_TRACE=seed`, and `UNDERSTUDY_SIM_BUG=n` for the nth that is planted.
#[test]
fn a_seed_that_is_asked_for_is_told() {
    let seed = number("UNDERSTUDY_SIM_TRACE", 0);
    if seed > 0 {
        let nth = usize::try_from(number("UNDERSTUDY_SIM_BUG", 0)).unwrap();
        let bug = nth.checked_sub(1).map_or(Bug::None, |at| PLANTED[at]);
        let mut world = World::new(seed, bug, true);
        let result = world.live();
        println!("{}\n{result:?}", world.trace().join("\n"));
    }
}
