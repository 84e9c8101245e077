//! A working set that is rewritten in rounds and can say whether it is all of one moment.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const WORDS: usize = 512;

/// More than this and a guest of the lab would run out of memory (4 GiB).
const MAX_PAGES: usize = 1 << 20;

/// Page aligned, so that N of these are N pages for the dirty log too.
#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u64; WORDS]);

/// How much of a page a round rewrites.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Every word.
    Whole,
    /// The stamp only.
    Stamp,
}

struct Plan {
    kind: Kind,
    every: Duration,
    pages: Vec<Page>,
    /// The round every page belongs to while nobody holds the lock.
    round: u64,
    /// How long the last round took.
    took: Duration,
    /// Stamps that were not those of the round before.
    errors: u64,
}

/// What a check found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) pages: usize,
    pub(crate) every_ms: u128,
    pub(crate) round: u64,
    pub(crate) round_us: u128,
    pub(crate) errors: u64,
    /// Which page and word differed first.
    pub(crate) first: Option<(usize, usize)>,
}

/// The working set and the thread that rewrites it.
pub(crate) struct Load {
    plan: Mutex<Plan>,
    changed: Condvar,
}

impl Load {
    /// Starts the thread, with nothing to do yet.
    pub(crate) fn start() -> Arc<Self> {
        let load = Arc::new(Self::idle());
        let worker = Arc::clone(&load);
        std::thread::spawn(move || worker.work());
        load
    }

    fn idle() -> Self {
        let plan = Plan {
            kind: Kind::Whole,
            every: Duration::ZERO,
            pages: Vec::new(),
            round: 0,
            took: Duration::ZERO,
            errors: 0,
        };
        Self { plan: Mutex::new(plan), changed: Condvar::new() }
    }

    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the working set; says how many pages it has.
    pub(crate) fn set(&self, kind: Kind, pages: usize, every: Duration) -> usize {
        let count = pages.min(MAX_PAGES);
        let mut fresh = vec![Page([0; WORDS]); count];
        for (index, page) in fresh.iter_mut().enumerate() {
            write(page, index, 0, Kind::Whole);
        }
        let mut plan = self.plan();
        *plan = Plan { kind, every, pages: fresh, round: 0, took: Duration::ZERO, errors: 0 };
        self.changed.notify_all();
        count
    }

    /// What is known without looking at the pages.
    pub(crate) fn report(&self) -> Report {
        summary(&self.plan())
    }

    /// Compares every word of the working set with what the round says it must be.
    pub(crate) fn check(&self) -> Report {
        let plan = self.plan();
        let mut report = summary(&plan);
        for (index, page) in plan.pages.iter().enumerate() {
            if let Some(word) = first_difference(page, index, plan.round, plan.kind) {
                report.errors += 1;
                report.first.get_or_insert((index, word));
            }
        }
        report
    }

    fn work(&self) {
        loop {
            let started = Instant::now();
            let pause = {
                let mut plan = self.plan();
                while plan.pages.is_empty() {
                    plan = self.changed.wait(plan).unwrap_or_else(PoisonError::into_inner);
                }
                plan.next_round();
                plan.took = started.elapsed();
                plan.every.saturating_sub(plan.took)
            };
            // Never nothing: a request must find the lock free now and then.
            std::thread::sleep(pause.max(Duration::from_micros(200)));
        }
    }
}

impl Plan {
    fn next_round(&mut self) {
        let (previous, next) = (self.round, self.round + 1);
        for (index, page) in self.pages.iter_mut().enumerate() {
            let last = if self.kind == Kind::Whole { WORDS - 1 } else { 0 };
            if page.0[0] != stamp(index, previous) || page.0[last] != word(index, previous, last) {
                self.errors += 1;
            }
            write(page, index, next, self.kind);
        }
        self.round = next;
    }
}

fn summary(plan: &Plan) -> Report {
    Report {
        pages: plan.pages.len(),
        every_ms: plan.every.as_millis(),
        round: plan.round,
        round_us: plan.took.as_micros(),
        errors: plan.errors,
        first: None,
    }
}

fn stamp(page: usize, round: u64) -> u64 {
    word(page, round, 0)
}

/// No two pages, rounds or words look alike, and none is zero for long.
fn word(page: usize, round: u64, index: usize) -> u64 {
    let seed = (page as u64) << 40 ^ round << 10 ^ index as u64;
    let mixed = (seed ^ seed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed ^ mixed >> 27
}

fn write(page: &mut Page, index: usize, round: u64, kind: Kind) {
    let words = if kind == Kind::Whole { WORDS } else { 1 };
    for (at, slot) in page.0.iter_mut().take(words).enumerate() {
        *slot = word(index, round, at);
    }
}

fn first_difference(page: &Page, index: usize, round: u64, kind: Kind) -> Option<usize> {
    page.0.iter().enumerate().position(|(at, found)| {
        // What a stamp-only load never rewrites keeps the content of round 0.
        let of = if kind == Kind::Whole || at == 0 { round } else { 0 };
        *found != word(index, of, at)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loaded(kind: Kind) -> Load {
        let load = Load::idle();
        load.set(kind, 7, Duration::ZERO);
        load
    }

    #[test]
    fn a_working_set_of_one_round_is_consistent() {
        for kind in [Kind::Whole, Kind::Stamp] {
            let load = loaded(kind);
            for _ in 0..3 {
                load.plan().next_round();
            }
            let report = load.check();
            assert_eq!((report.round, report.errors, report.first), (3, 0, None));
        }
    }

    #[test]
    fn a_page_of_an_older_round_is_found() {
        let load = loaded(Kind::Whole);
        load.plan().next_round();
        let old = load.plan().pages[4].clone();
        load.plan().next_round();
        load.plan().pages[4] = old;
        let report = load.check();
        assert_eq!((report.errors, report.first), (1, Some((4, 0))));
        load.plan().next_round();
        assert_eq!(load.report().errors, 1, "the next round sees it as well");
    }

    #[test]
    fn one_wrong_word_is_found() {
        let load = loaded(Kind::Stamp);
        load.plan().next_round();
        load.plan().pages[2].0[300] ^= 1;
        assert_eq!(load.check().first, Some((2, 300)));
    }
}
