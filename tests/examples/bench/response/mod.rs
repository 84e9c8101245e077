//! What a request to a guest takes, and what that costs the guest, where a stop takes a millisecond: unprotected, with epochs of
//! a fixed length, and with epochs that output ends.
//!
//! Agents, capture, stream and backup are those that are shipped, over loopback; the guest is the flat one with a network card.
//! Only the qdisc is not the kernel's: see [`relay`].

mod hosts;
mod relay;

use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::guest::{Guest, skip_reason};
use crate::{Report, ms};
use hosts::{BackupHost, PrimaryHost};
use relay::{Answer, Lan};

/// A name, and epoch and floor of the agent in ms.
type Mode = (&'static str, Option<(u64, u64)>);

/// As an agent that is told nothing has it, in ms.
const FLOOR: u64 = 2;

const MODES: [Mode; 6] = [
    ("unprotected", None),
    ("fixed 25 ms", Some((25, 25))),
    ("fixed 100 ms", Some((100, 100))),
    ("by output, 25 ms", Some((25, FLOOR))),
    ("by output, 50 ms", Some((50, FLOOR))),
    ("by output, 100 ms", Some((100, FLOOR))),
];
const UNPROTECTED: usize = 0;
const FIXED: usize = 1;
const BY_OUTPUT: [usize; 3] = [3, 4, 5];

/// How requests follow each other: a name, and from when to when after an answer the next one is made, in ms.
const PATTERNS: [(&str, (u64, u64)); 2] = [("at once", (0, 0)), ("after 50 to 150 ms", (50, 150))];

/// Every mode has its turn so many times.
const TURNS: usize = 4;

/// A turn of a pattern lasts at least so long.
const SHORTEST: Duration = Duration::from_millis(500);

/// Epochs before the first request of a turn: the governor has then learnt.
const WARM_UP: u64 = 40;

/// A goal: latency added, of that which fixed epochs add.
const RATIO: f64 = 0.25;

/// What was measured of a mode and a pattern.
#[derive(Default)]
struct Cell {
    answers: Vec<Answer>,
    /// One for each turn.
    rounds_per_s: Vec<f64>,
    epochs_per_s: Vec<f64>,
    stops: Vec<Duration>,
}

impl Cell {
    fn latencies(&self) -> Vec<f64> {
        self.answers.iter().map(|answer| ms(answer.came - answer.asked)).collect()
    }

    /// A part of the way of each answer.
    fn parts(&self, part: impl Fn(&Answer, &relay::Passage) -> Duration) -> Vec<f64> {
        self.answers.iter().filter_map(|answer| Some(ms(part(answer, answer.passage.as_ref()?)))).collect()
    }
}

pub(crate) fn run(requests: usize, pages: usize, mib: usize) -> anyhow::Result<Report> {
    if let Some(reason) = skip_reason() {
        bail!("cannot measure responses: {reason}");
    }
    understudy_primary::keep_freed_memory();
    let dir = tempfile::tempdir()?;
    let mut lan = Lan::new(dir.path())?;
    let mib = mib.to_string();
    let card = Lan::arguments(dir.path());
    let extra: Vec<&str> = ["-m", &mib].into_iter().chain(card.iter().map(String::as_str)).collect();
    let mut guest = Guest::start_with_card("pc", pages, &extra)?;
    let backup = BackupHost::start()?;
    let primary = PrimaryHost::start(&mut guest)?;

    let mut cells: [[Cell; PATTERNS.len()]; MODES.len()] = Default::default();
    for _ in 0..TURNS {
        for ((name, pace), cells) in MODES.into_iter().zip(&mut cells) {
            let protection = match pace {
                Some((epoch, floor)) => {
                    let (epoch, floor) = (Duration::from_millis(epoch), Duration::from_millis(floor));
                    let protection = primary.protect(&backup, epoch, floor, lan.gate()?)?;
                    protection.epochs(WARM_UP).context(name)?;
                    Some(protection)
                }
                None => None,
            };
            for ((_, gap), cell) in PATTERNS.into_iter().zip(cells) {
                lan.ask(protection.is_some()).context(name)?;
                let (round, began) = (guest.round()?, Instant::now());
                let epochs = protection.as_ref().map(hosts::Protection::epochs_total);
                primary.stops();
                let wanted = cell.answers.len() + requests.div_ceil(TURNS);
                // An unprotected guest has answered them all before its work can be measured.
                while cell.answers.len() < wanted || began.elapsed() < SHORTEST {
                    std::thread::sleep(between(gap));
                    let answer = lan.ask(protection.is_some()).context(name)?;
                    if cell.answers.len() < wanted {
                        cell.answers.push(answer);
                    }
                }
                let passed = began.elapsed().as_secs_f64();
                cell.rounds_per_s.push(f64::from(guest.round()?.wrapping_sub(round)) / passed);
                let epochs = protection.as_ref().map(hosts::Protection::epochs_total).zip(epochs);
                cell.epochs_per_s.extend(epochs.map(|(now, before)| (now - before) as f64 / passed));
                cell.stops.extend(primary.stops());
            }
            if let Some(protection) = protection {
                protection.end().context(name)?;
            }
        }
    }
    let command = format!("cargo xtask bench response -- --requests {requests} --pages {pages} --mib {mib}");
    Ok(reported(Report::new("response", command), &cells))
}

/// A time of the range, in ms.
fn between((from, to): (u64, u64)) -> Duration {
    let since_1970 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let part = u64::from(since_1970.subsec_nanos() / 100) % 1000;
    Duration::from_millis(from) + Duration::from_micros((to - from) * part)
}

fn reported(mut report: Report, cells: &[[Cell; PATTERNS.len()]; MODES.len()]) -> Report {
    for (at, (pattern, _)) in PATTERNS.into_iter().enumerate() {
        let mut medians = [(0.0, 0.0); MODES.len()];
        for (((mode, _), cells), medians) in MODES.into_iter().zip(cells).zip(&mut medians) {
            let (cell, name) = (&cells[at], format!("{mode}, next {pattern}"));
            let latency = report.row(&name, "request to answer", "ms", cell.latencies());
            let rate = report.row(&name, "guest's work", "rounds/s", cell.rounds_per_s.clone());
            *medians = (latency, rate);
            if cell.stops.is_empty() {
                continue;
            }
            report.row(&name, "stop", "ms", cell.stops.iter().copied().map(ms).collect());
            report.row(&name, "epochs", "epochs/s", cell.epochs_per_s.clone());
            let seen = cell.parts(|answer, at| at.seen.saturating_duration_since(answer.asked));
            report.row(&name, "until it is noticed", "ms", seen);
            report.row(&name, "until the guest is stopped", "ms", cell.parts(|_, at| at.sealed - at.seen));
            report.row(&name, "until it is released", "ms", cell.parts(|_, at| at.released - at.sealed));
            report.row(&name, "until the client has it", "ms", cell.parts(|a, at| a.came - at.released));
        }
        let (alone, fixed) = (medians[UNPROTECTED], medians[FIXED]);
        for mode in BY_OUTPUT {
            let (name, output) = (MODES[mode].0, medians[mode]);
            let ratio = (output.0 - alone.0) / (fixed.0 - alone.0);
            report.at_most(
                &format!("p50 added by {name}, next {pattern}, part of fixed 25 ms"),
                RATIO,
                ratio,
            );
            report.at_least(&format!("rounds/s of {name}, next {pattern}"), fixed.1, output.1);
        }
    }
    report
}
