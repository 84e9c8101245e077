//! `cargo xtask bench latency`: what a request to a guest takes, and what its protection costs it.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::random::Dice;
use super::{SHAPES, advances, clear, start_shaped};
use crate::lab::guest::{Guest, field};
use crate::lab::plan::HostName::Alpha;
use crate::lab::roots::Roots;
use crate::lab::state::LabDir;
use crate::lab::understudy::Role;
use crate::lab::{self, Lab};
use crate::process;
use crate::ui::Steps;

const LIFETIME: Duration = Duration::from_secs(1800);
const LIMIT: Duration = Duration::from_secs(60);

/// Of each mode and pattern, one after the other.
const REQUESTS: usize = 120;

/// What the guest rewrites as often as it can, while it is asked.
const LOAD: &str = "dirty 200 0";

/// A name, and epoch and floor of the agent, milliseconds.
type Mode = (&'static str, Option<(u32, u32)>);

/// The last two: an emulated host takes tens of times as long for a checkpoint as another one, so epochs of half a second
/// are there what those of 25 ms are elsewhere.
const MODES: [Mode; 6] = [
    ("unprotected", None),
    ("fixed epochs of 25 ms", Some((25, 25))),
    ("fixed epochs of 100 ms", Some((100, 100))),
    // As an agent is that is told nothing.
    ("ended by output, 100 ms", Some((100, 0))),
    ("fixed epochs of 500 ms", Some((500, 500))),
    ("ended by output, 500 ms", Some((500, 0))),
];

/// Which mode is compared with which one of fixed epochs.
const COMPARED: [(usize, usize); 2] = [(3, 1), (5, 4)];

/// A goal: the latency that is added, of that which fixed epochs add.
const RATIO: f64 = 0.25;

/// How requests follow each other: a name, and from when to when after an answer the next one is made, milliseconds.
const PATTERNS: [(&str, (u64, u64)); 2] = [("at once", (0, 1)), ("after 50 to 150 ms", (50, 151))];

struct Row {
    mode: &'static str,
    pattern: &'static str,
    samples_ms: Vec<f64>,
    rounds_per_s: f64,
    /// As the agent measures it.
    stop_ms: Option<f64>,
}

impl Row {
    fn percentile(&self, percent: usize) -> f64 {
        let mut sorted = self.samples_ms.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
        sorted.get(rank).copied().unwrap_or(f64::NAN)
    }

    fn json(&self) -> Value {
        json!({"name": format!("{}, the next request {}", self.mode, self.pattern), "subject": "understudy",
            "unit": "ms", "n": self.samples_ms.len(), "median": self.percentile(50), "p99": self.percentile(99),
            "rounds_per_s": self.rounds_per_s, "stop_ms": self.stop_ms, "samples": self.samples_ms})
    }
}

/// Boots a lab, or takes the one that `LAB_NAME` names, measures, and prints it.
pub(crate) fn run(file: Option<&Path>) -> Result<i32> {
    process::ensure_root()?;
    let running = std::env::var("LAB_NAME").ok().map(|name| LabDir::new(&name)).transpose()?;
    let (rows, emulated) = match running.filter(LabDir::is_running) {
        Some(dir) => {
            let lab = Lab::attach(dir);
            (measure(&lab)?, lab.is_emulated()?)
        }
        None => {
            let steps = Steps::start();
            let lab = lab::cli::booted(LabDir::unique(), Roots::default(), LIFETIME, true, false, &steps)?;
            let (rows, emulated) = (measure(&lab)?, lab.is_emulated()?);
            lab.down()?;
            (rows, emulated)
        }
    };
    for row in &rows {
        println!(
            "{:24} next {:18} p50 {:7.1} ms, p99 {:7.1} ms, {:6.1} rounds/s, stop {}",
            row.mode,
            row.pattern,
            row.percentile(50),
            row.percentile(99),
            row.rounds_per_s,
            row.stop_ms.map_or("-".to_owned(), |ms| format!("{ms:.1} ms"))
        );
    }
    let goals: Vec<Value> = rows.chunks(MODES.len()).flat_map(goals).collect();
    if let Some(file) = file {
        let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let whole = json!({
            "bench": "latency",
            "command": "cargo xtask bench latency",
            "host": {
                "cpus": std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
                "kernel": text("/proc/sys/kernel/osrelease"),
                "load_after": text("/proc/loadavg"),
                "lab_hosts_emulated": emulated,
            },
            "rows": rows.iter().map(Row::json).collect::<Vec<_>>(),
            "goals": goals,
        });
        std::fs::write(file, format!("{whole:#}\n"))
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(0)
}

/// Of the modes of one pattern.
fn goals(rows: &[Row]) -> Vec<Value> {
    let added = |row: &Row| row.percentile(50) - rows[0].percentile(50);
    let goal = |name: String, bound: &str, limit: f64, value: f64, met: bool| {
        println!("goal: {name}: {bound} {limit:.2}, is {value:.2}: {}", if met { "met" } else { "NOT MET" });
        json!({"name": name, "bound": bound, "limit": limit, "value": value, "met": met})
    };
    let both = COMPARED.into_iter().flat_map(|(output, fixed)| {
        let (output, fixed) = (&rows[output], &rows[fixed]);
        let what = format!("{}, next {}, beside {}", output.mode, output.pattern, fixed.mode);
        let (ratio, limit, rate) = (added(output) / added(fixed), fixed.rounds_per_s, output.rounds_per_s);
        [
            goal(format!("added p50 of {what}"), "at most", RATIO, ratio, ratio <= RATIO),
            goal(format!("rounds/s of {what}"), "at least", limit, rate, rate >= limit),
        ]
    });
    both.collect()
}

/// All modes of the first pattern, then all of the next.
fn measure(lab: &Lab) -> Result<Vec<Row>> {
    clear(lab)?;
    drop(start_shaped(lab, Alpha, SHAPES[0])?);
    Guest::wait(lab.dir(), "g1", LIMIT)?.must(LOAD)?;
    let mut dice = Dice::new();
    let mut rows: [Vec<Row>; PATTERNS.len()] = Default::default();
    for (mode, pace) in MODES {
        if let Some((epoch, floor)) = pace {
            let arguments = if floor == 0 {
                format!("--epoch-ms={epoch}")
            } else {
                format!("--epoch-ms={epoch}\n--output-floor-ms={floor}")
            };
            lab.restart_agent(Alpha, Role::Primary, &arguments)?;
            lab.protect("g1", Alpha)?;
            advances(lab, LIMIT)?;
        }
        for (rows, pattern) in rows.iter_mut().zip(PATTERNS) {
            rows.push(one(lab, mode, pattern, &mut dice).context(mode)?);
        }
        if pace.is_some() {
            lab.must_understudy(Alpha, &["unprotect", "g1"])?;
        }
    }
    lab.restart_agent(Alpha, Role::Primary, "")?;
    Ok(rows.into_iter().flatten().collect())
}

fn one(
    lab: &Lab,
    mode: &'static str,
    (pattern, (from, to)): (&'static str, (u64, u64)),
    dice: &mut Dice,
) -> Result<Row> {
    let mut guest = Guest::wait(lab.dir(), "g1", LIMIT)?;
    let mut samples_ms = Vec::new();
    let (start, began) = (round(&mut guest)?, Instant::now());
    for _ in 0..REQUESTS {
        std::thread::sleep(Duration::from_millis(from + dice.below(to - from)));
        let asked = Instant::now();
        guest.must("count")?;
        samples_ms.push(asked.elapsed().as_secs_f64() * 1000.0);
    }
    let rounds = round(&mut guest)?.saturating_sub(start);
    let rounds_per_s = f64::from(u32::try_from(rounds).unwrap_or(u32::MAX)) / began.elapsed().as_secs_f64();
    let status = lab.status(Alpha, Role::Primary, "g1")?.filter(|status| status.state() == "protected");
    let stop_ms = status.and_then(|status| status.real("pause_p50_ms"));
    Ok(Row { mode, pattern, samples_ms, rounds_per_s, stop_ms })
}

fn round(guest: &mut Guest) -> Result<u64> {
    let load = guest.must("load")?;
    field(&load, "round")
        .and_then(|round| round.parse().ok())
        .with_context(|| format!("no round in `{load}`"))
}
