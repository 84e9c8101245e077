//! `cargo xtask bench`: builds a measurement in release mode and runs it.

mod agents;
mod failover;

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};
use clap::ValueEnum;

use crate::workspace;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Bench {
    /// How long a checkpoint keeps a guest stopped, beside stock COLO
    Pause,
    /// What protection costs a guest that works all the time, beside stock COLO
    Slowdown,
    /// How near the autopilot comes to the best fixed length of epochs
    Autopilot,
    /// Bytes of generated epochs on the wire
    Wire,
    /// What the governor makes of a link, beside the same epochs raw
    Governor,
    /// Epochs by one connection and by several, with and without a limit of each
    Connections,
    /// What encoding a page costs, and what a second thread brings
    Codec,
    /// Memory of encoder and image
    Memory,
    /// From an epoch's first byte to its commit, beside plain TCP
    Transfer,
    /// Plots what the others have written: `-- FILE...`, into docs/plots
    Plot,
    /// How long a request to a guest takes, in the lab: unprotected, with fixed epochs, with epochs that output ends
    Latency,
    /// The same where a stop takes a millisecond: the flat guest on this machine's KVM
    Response,
    /// How long a promotion takes to load a guest, and the backup's memory
    Load,
    /// How long failovers in the lab take, part by part
    Failover,
    /// Memory of both agents, whole, in the lab
    Agents,
}

/// A measurement of this package, in release mode; its arguments follow.
pub(crate) fn measurement(name: &str) -> Command {
    let mut cargo = example("understudy-tests", "bench");
    cargo.arg(name);
    cargo
}

fn example(package: &str, name: &str) -> Command {
    let mut cargo = workspace::cargo();
    cargo.args(["run", "--locked", "--release", "-p", package, "--example", name, "--"]);
    cargo
}

/// Runs one; `more` goes to it as it is.
pub(crate) fn run(bench: Bench, json: Option<PathBuf>, more: &[String]) -> Result<i32> {
    let name = match bench {
        // In the lab, by this program itself.
        Bench::Failover => return failover::run(json.as_deref(), more),
        Bench::Agents => return agents::run(json.as_deref()),
        Bench::Latency => return crate::scenarios::latency::run(json.as_deref()),
        Bench::Load | Bench::Transfer => None,
        Bench::Pause => Some("pause"),
        Bench::Slowdown => Some("slowdown"),
        Bench::Autopilot => Some("autopilot"),
        Bench::Response => Some("response"),
        Bench::Wire => Some("wire"),
        Bench::Governor => Some("governor"),
        Bench::Plot => Some("plot"),
        Bench::Codec => Some("codec"),
        Bench::Connections => Some("connections"),
        Bench::Memory => Some("memory"),
    };
    let mut cargo = match (name, bench) {
        (Some(name), _) => measurement(name),
        (None, Bench::Transfer) => {
            let mut cargo = workspace::cargo();
            cargo.args(["bench", "--locked", "-p", "understudy-backup", "--bench", "loopback", "--"]);
            cargo
        }
        (None, _) => example("understudy-backup", "promotion_time"),
    };
    if let Some(file) = json {
        // Cargo runs at the root, whoever calls from elsewhere.
        cargo.arg("--json").arg(std::path::absolute(file)?);
    }
    let status = cargo.args(more).status()?;
    match status.code() {
        Some(code) => Ok(code),
        None => bail!("the bench was ended by a signal"),
    }
}
