//! `cargo xtask bench NAME`: measurements with their raw data. Every file holds one.

#[path = "../../../primary/tests/support/mod.rs"]
mod guest;

mod autopilot;
mod captured;
mod codec;
mod connections;
mod governor;
mod memory;
mod pause;
mod plot;
mod record;
mod recorded;
mod report;
mod response;
mod slowdown;
mod stock;
mod threads;
mod trace;
mod wire;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use report::Report;

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    bench: Bench,
    /// Where the figures go
    #[arg(long, global = true, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Bench {
    /// How long a checkpoint keeps a guest stopped: Understudy's capture and a pair of stock QEMUs
    Pause {
        /// Stops of each cell
        #[arg(long, default_value_t = 200)]
        rounds: usize,
        /// Pages the guest dirties
        #[arg(long, value_delimiter = ',', default_value = "0,1000,4000")]
        pages: Vec<usize>,
        /// Memory of the guest
        #[arg(long, default_value_t = 256)]
        mib: usize,
        /// Leave the stock pairs out
        #[arg(long)]
        without_stock: bool,
    },
    /// What protection costs a guest that works all the time, Understudy's and a stock pair's
    Slowdown {
        /// Samples of a second, before, during and after
        #[arg(long, default_value_t = 10)]
        seconds: usize,
        /// Pages the guest dirties
        #[arg(long, default_value_t = 1000)]
        pages: usize,
        /// Memory of the guest
        #[arg(long, default_value_t = 256)]
        mib: usize,
    },
    /// How near the autopilot comes to the best fixed length of epochs
    Autopilot {
        /// Time for each length of the sweep; the autopilot has four times as long
        #[arg(long, default_value_t = 3)]
        seconds: u64,
        /// Pages the guest dirties, one workload each
        #[arg(long, value_delimiter = ',', default_value = "100,500,1000,4000")]
        pages: Vec<usize>,
        /// Memory of the guest
        #[arg(long, default_value_t = 256)]
        mib: usize,
    },
    /// What encoding a page costs: XBZRLE against a byte-wise encoder and memcpy; LZ4; what a second thread brings
    Codec {
        /// Rounds over all pages
        #[arg(long, default_value_t = 15)]
        rounds: usize,
        /// Only the second thread
        #[arg(long)]
        threads_only: bool,
        /// Recorded traces
        #[arg(long, default_value = "tests/traces")]
        traces: PathBuf,
    },
    /// Bytes of recorded and generated epochs on the wire, by plan
    Wire {
        /// Epochs of each generated trace
        #[arg(long, default_value_t = 60)]
        epochs: u64,
        /// Recorded traces
        #[arg(long, default_value = "tests/traces")]
        traces: PathBuf,
    },
    /// Records a trace of a guest; `cargo xtask record` calls it
    Record(record::Order),
    /// What the governor makes of a link, beside the same epochs raw
    Governor {
        /// Epochs of each trace and link
        #[arg(long, default_value_t = 150)]
        epochs: usize,
    },
    /// Epochs by one connection and by several, with and without a limit of each
    Connections {
        /// Of each size and link
        #[arg(long, default_value_t = 21)]
        epochs: usize,
    },
    /// Memory of encoder and image beyond what they must have
    Memory {
        /// Memory of the guest
        #[arg(long, default_value_t = 512)]
        mib: u64,
    },
    /// What a request to a guest takes where a stop takes a millisecond
    Response {
        /// Of each mode and pattern
        #[arg(long, default_value_t = 200)]
        requests: usize,
        /// Pages the guest dirties
        #[arg(long, default_value_t = 1000)]
        pages: usize,
        /// Memory of the guest
        #[arg(long, default_value_t = 256)]
        mib: usize,
    },
    /// Plots what benches have written: an SVG for each file
    Plot {
        /// Written by `--json`
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Where the plots go
        #[arg(long, default_value = "docs/plots")]
        into: PathBuf,
    },
}

fn main() -> anyhow::Result<()> {
    let Arguments { bench, json } = Arguments::parse();
    let report = match bench {
        Bench::Pause { rounds, pages, mib, without_stock } => {
            pause::run(rounds, &pages, mib, !without_stock)?
        }
        Bench::Slowdown { seconds, pages, mib } => slowdown::run(seconds, pages, mib)?,
        Bench::Autopilot { seconds, pages, mib } => autopilot::run(seconds, &pages, mib)?,
        Bench::Codec { rounds, threads_only, traces } => codec::run(rounds, threads_only, &traces)?,
        Bench::Wire { epochs, traces } => wire::run(epochs, &traces)?,
        Bench::Record(order) => return record::run(&order),
        Bench::Governor { epochs } => governor::run(epochs)?,
        Bench::Connections { epochs } => connections::run(epochs)?,
        Bench::Memory { mib } => memory::run(mib)?,
        Bench::Response { requests, pages, mib } => response::run(requests, pages, mib)?,
        Bench::Plot { files, into } => return files.iter().try_for_each(|file| plot::run(file, &into)),
    };
    report.write(json.as_ref())?;
    Ok(())
}

/// Milliseconds.
fn ms(time: std::time::Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
