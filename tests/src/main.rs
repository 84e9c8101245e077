//! `cargo xtask`: set-up, tests, the lab and the demo. The same program is the `lab` helper of scripts, the
//! process that supervises a lab, and the first program of the lab's hosts.

mod assets;
mod bench;
mod demo;
mod host;
mod lab;
mod process;
mod record;
mod scenarios;
mod setup;
mod testing;
mod ui;
mod workspace;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", version, about = "Understudy's set-up, tests, lab and demo")]
struct Xtask {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Installs the Debian packages that are missing, after saying which
    Setup {
        /// Makes what a lab with this root needs as well: kernels, the guest's program, the root's tree
        #[command(flatten)]
        root: lab::cli::RootArg,
    },
    /// Runs the tests, all of them or some groups
    Test {
        /// Only this group; may be given several times
        #[arg(long, value_name = "GROUP")]
        only: Vec<testing::Group>,
        /// In the group lab, only scenarios whose names contain this
        #[arg(long, default_value = "", value_name = "TEXT")]
        scenario: String,
        #[command(flatten)]
        root: lab::cli::RootArg,
    },
    /// Runs a test with many more rounds
    Campaign {
        /// Which one
        name: testing::Campaign,
    },
    /// Simulates two hosts and an arbiter of which everything fails, once for each seed
    Sim {
        /// How many seeds
        #[arg(long, value_name = "N", default_value_t = 100_000)]
        seeds: u64,
        /// The first one
        #[arg(long, value_name = "S", default_value_t = 1)]
        start: u64,
    },
    /// Measures something, in release mode; every goal is printed with what was reached
    Bench {
        /// What
        name: bench::Bench,
        /// Writes medians, p99 and all samples to this file
        #[arg(long, value_name = "FILE")]
        json: Option<std::path::PathBuf>,
        /// For the bench itself, for example `-- --rounds 50`
        #[arg(last = true)]
        more: Vec<String>,
    },
    /// Records what real Linux guests do to their memory, for `bench wire`
    Record {
        /// Only these workloads
        names: Vec<String>,
        /// Where the traces go
        #[arg(long, default_value = "tests/traces")]
        into: std::path::PathBuf,
    },
    /// Two real hosts on this machine
    Lab(lab::cli::LabArgs),
    /// Shows a guest surviving the death of its host
    Demo {
        /// Writes what was measured to this file
        #[arg(long)]
        json: Option<std::path::PathBuf>,
    },
    /// A child process that dies with its parent
    #[command(name = "__spawn", hide = true)]
    Spawn {
        #[arg(long)]
        parent: u32,
        #[arg(long)]
        netns: Option<String>,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    #[command(name = "__supervise", hide = true)]
    Supervise { order: String },
    #[command(name = "__host-init", hide = true)]
    HostInit,
    #[command(name = "__host-main", hide = true)]
    HostMain,
}

/// `lab ...`, as scripts call it.
#[derive(Parser)]
#[command(name = "lab", version, about = "The lab this script runs in")]
struct Helper {
    #[command(flatten)]
    lab: lab::cli::LabArgs,
}

fn main() -> ExitCode {
    let result = match as_helper() {
        Some(helper) => lab::cli::main(helper.lab),
        None => run(Xtask::parse().command),
    };
    match result {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        Err(error) => {
            eprintln!("Error: {error:#}");
            ExitCode::from(EXIT_FAILED)
        }
    }
}

/// Ours, not that of something we ran: what runs in `lab exec` or `lab run` ends with 1 often enough.
const EXIT_FAILED: u8 = 125;

/// Called as `lab`, and not by ourselves with one of the hidden commands.
fn as_helper() -> Option<Helper> {
    let mut arguments = std::env::args_os();
    let called = arguments.next()?;
    let hidden = arguments.next().is_some_and(|first| first.to_string_lossy().starts_with("__"));
    (Path::new(&called).file_name()? == "lab" && !hidden).then(Helper::parse)
}

fn run(command: Command) -> Result<i32> {
    match command {
        Command::Setup { root } => {
            setup::ensure()?;
            root.given().map_or(Ok(()), assets::prepare).map(|()| 0)
        }
        Command::Test { only, scenario, root } => testing::run(&only, &scenario, root.roots()),
        Command::Campaign { name } => testing::campaign(name),
        Command::Sim { seeds, start } => testing::sim::run(start, seeds),
        Command::Bench { name, json, more } => bench::run(name, json, &more),
        Command::Record { names, into } => record::run(&names, &into),
        Command::Lab(args) => lab::cli::main(args),
        Command::Demo { json } => {
            process::ensure_root()?;
            demo::run(json.as_deref())
        }
        Command::Spawn { parent, netns, command } => {
            process::become_child(parent, netns.as_deref(), &command).map(|()| 0)
        }
        Command::Supervise { order } => {
            let order = serde_json::from_str(&order).context("not an order for a supervisor")?;
            lab::supervisor::run(&order).map(|()| 0)
        }
        Command::HostInit => host::init().map(|()| 0),
        Command::HostMain => host::main().map(|()| 0),
    }
}
