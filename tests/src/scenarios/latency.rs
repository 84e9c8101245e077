//! `cargo xtask bench latency`: what a request to a guest takes, and what its protection costs it.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

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

/// Requests of each mode, one after the other.
const REQUESTS: usize = 150;

/// What the guest rewrites as often as it can, while it is asked.
const LOAD: &str = "dirty 200 0";

/// A name, and epoch and floor of the agent, milliseconds.
const MODES: [(&str, Option<(u32, u32)>); 4] = [
    ("unprotected", None),
    ("fixed epochs of 25 ms", Some((25, 25))),
    ("fixed epochs of 100 ms", Some((100, 100))),
    // As an agent is that is told nothing.
    ("ended by output", Some((100, 0))),
];

struct Row {
    name: &'static str,
    samples_ms: Vec<f64>,
    rounds_per_s: f64,
}

impl Row {
    fn percentile(&self, percent: usize) -> f64 {
        let mut sorted = self.samples_ms.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() * percent / 100).or(sorted.last()).copied().unwrap_or(0.0)
    }

    fn json(&self) -> Value {
        json!({"mode": self.name, "p50_ms": self.percentile(50), "p99_ms": self.percentile(99),
            "rounds_per_s": self.rounds_per_s, "samples_ms": self.samples_ms})
    }
}

/// Boots a lab, or takes the one that `LAB_NAME` names, measures, and prints it.
pub(crate) fn run(json: Option<&Path>) -> Result<i32> {
    process::ensure_root()?;
    let running = std::env::var("LAB_NAME").ok().map(|name| LabDir::new(&name)).transpose()?;
    let rows = match running.filter(LabDir::is_running) {
        Some(dir) => measure(&Lab::attach(dir))?,
        None => {
            let steps = Steps::start();
            let lab = lab::cli::booted(LabDir::unique(), Roots::default(), LIFETIME, true, false, &steps)?;
            let rows = measure(&lab)?;
            lab.down()?;
            rows
        }
    };
    for row in &rows {
        println!(
            "{:24} p50 {:7.1} ms, p99 {:7.1} ms, {:6.1} rounds/s",
            row.name,
            row.percentile(50),
            row.percentile(99),
            row.rounds_per_s
        );
    }
    let [unprotected, fixed, _, output] = &rows[..] else { anyhow::bail!("{} rows", rows.len()) };
    let added = |row: &Row| row.percentile(50) - unprotected.percentile(50);
    let ratio = added(output) / added(fixed);
    let met = ratio <= 0.25 && output.rounds_per_s >= fixed.rounds_per_s;
    println!(
        "latency added by epochs that output ends: {ratio:.2} of that of fixed 25 ms (goal 0.25 at no more loss of rounds): {}",
        if met { "met" } else { "NOT met" }
    );
    if let Some(file) = json {
        let rows: Vec<Value> = rows.iter().map(Row::json).collect();
        let text = json!({"rows": rows, "ratio": ratio, "met": met});
        std::fs::write(file, format!("{text:#}\n"))
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(0)
}

fn measure(lab: &Lab) -> Result<Vec<Row>> {
    clear(lab)?;
    drop(start_shaped(lab, Alpha, SHAPES[0])?);
    Guest::wait(lab.dir(), "g1", LIMIT)?.must(LOAD)?;
    let rows = MODES.into_iter().map(|(name, pace)| {
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
        let row = one(lab, name).context(name);
        if pace.is_some() {
            lab.must_understudy(Alpha, &["unprotect", "g1"])?;
        }
        row
    });
    let rows = rows.collect();
    lab.restart_agent(Alpha, Role::Primary, "")?;
    rows
}

fn one(lab: &Lab, name: &'static str) -> Result<Row> {
    let mut guest = Guest::wait(lab.dir(), "g1", LIMIT)?;
    let mut samples_ms = Vec::new();
    let (start, began) = (round(&mut guest)?, Instant::now());
    for _ in 0..REQUESTS {
        let asked = Instant::now();
        guest.must("count")?;
        samples_ms.push(asked.elapsed().as_secs_f64() * 1000.0);
    }
    let rounds = round(&mut guest)?.saturating_sub(start);
    let rounds = u32::try_from(rounds).unwrap_or(u32::MAX);
    Ok(Row { name, samples_ms, rounds_per_s: f64::from(rounds) / began.elapsed().as_secs_f64() })
}

fn round(guest: &mut Guest) -> Result<u64> {
    let load = guest.must("load")?;
    field(&load, "round")
        .and_then(|round| round.parse().ok())
        .with_context(|| format!("no round in `{load}`"))
}
