//! What a bench writes: rows with their raw samples, goals and whether they are met, and how busy the machine was.
#![allow(dead_code, reason = "each user needs a part of it")]

use std::path::PathBuf;

use serde_json::{Value, json};

/// The results of one bench in one run.
pub(crate) struct Report {
    bench: &'static str,
    command: String,
    load_before: String,
    rows: Vec<Value>,
    goals: Vec<Value>,
}

impl Report {
    /// Begins one; `command` is what a reader runs to have it again.
    pub(crate) fn new(bench: &'static str, command: impl Into<String>) -> Self {
        Self { bench, command: command.into(), load_before: load(), rows: Vec::new(), goals: Vec::new() }
    }

    /// Adds a row and prints it; gives its median, NaN if there is no sample.
    pub(crate) fn row(&mut self, name: &str, subject: &str, unit: &str, samples: Vec<f64>) -> f64 {
        let mut sorted = samples.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        let at = |percent: usize| {
            let rank = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
            sorted.get(rank).copied().unwrap_or(f64::NAN)
        };
        let (median, p99) = (at(50), at(99));
        println!(
            "{name:<28} {subject:<22} n {:>5}  median {median:>12.4}  p99 {p99:>12.4} {unit}",
            samples.len()
        );
        self.rows.push(json!({
            "name": name, "subject": subject, "unit": unit, "n": samples.len(), "median": median, "p99": p99,
            "samples": samples,
        }));
        median
    }

    /// A goal of at most `limit`.
    pub(crate) fn at_most(&mut self, name: &str, limit: f64, value: f64) {
        self.goal(name, limit, value, value <= limit, "at most");
    }

    /// A goal of at least `limit`.
    pub(crate) fn at_least(&mut self, name: &str, limit: f64, value: f64) {
        self.goal(name, limit, value, value >= limit, "at least");
    }

    fn goal(&mut self, name: &str, limit: f64, value: f64, met: bool, bound: &str) {
        let word = if met { "met" } else { "NOT MET" };
        println!("goal: {name}: {bound} {limit:.4}, is {value:.4}: {word}");
        self.goals.push(json!({"name": name, "bound": bound, "limit": limit, "value": value, "met": met}));
    }

    /// Writes it to `file`, if there is one.
    pub(crate) fn write(self, file: Option<&PathBuf>) -> std::io::Result<()> {
        let Some(file) = file else { return Ok(()) };
        let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let cpuinfo = text("/proc/cpuinfo");
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
        let report = json!({
            "bench": self.bench,
            "command": self.command,
            "host": {
                "cpus": std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
                "cpu": model.trim_start_matches([' ', '\t', ':']),
                "kernel": text("/proc/sys/kernel/osrelease"),
                "load_before": self.load_before,
                "load_after": load(),
            },
            "rows": self.rows,
            "goals": self.goals,
        });
        std::fs::write(file, serde_json::to_string_pretty(&report)?)
    }
}

/// Load averages: 1, 5 and 15 minutes, running and all tasks. Figures of a busy machine are not to be trusted.
fn load() -> String {
    std::fs::read_to_string("/proc/loadavg").unwrap_or_default().trim().to_owned()
}
