//! One thread per vCPU, each counting about a thousand times a second.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How long a counting thread sleeps between two counts.
const PERIOD: Duration = Duration::from_millis(1);

/// The counters of all vCPUs.
pub(crate) struct Counter {
    ticks: Vec<Arc<AtomicU64>>,
}

impl Counter {
    /// Starts one counting thread for every vCPU.
    pub(crate) fn start() -> Self {
        let vcpus = std::thread::available_parallelism().map_or(1, usize::from);
        let ticks: Vec<_> = (0..vcpus).map(|_| Arc::new(AtomicU64::new(0))).collect();
        for tick in &ticks {
            let tick = Arc::clone(tick);
            std::thread::spawn(move || {
                loop {
                    std::thread::sleep(PERIOD);
                    tick.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        Self { ticks }
    }

    pub(crate) fn vcpus(&self) -> usize {
        self.ticks.len()
    }

    /// The value of every thread.
    pub(crate) fn ticks(&self) -> Vec<u64> {
        self.ticks.iter().map(|tick| tick.load(Ordering::Relaxed)).collect()
    }

    /// The sum over all threads.
    pub(crate) fn total(&self) -> u64 {
        self.ticks().iter().sum()
    }
}

/// Drawn by the kernel at boot: the same as long as this guest has not been started again.
pub(crate) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map_or_else(|_| "unknown".into(), |id| id.trim().into())
}

/// Milliseconds since this guest booted, on its own clock.
pub(crate) fn uptime_ms() -> u64 {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds = text.split_whitespace().next().unwrap_or("0");
    let (whole, fraction) = seconds.split_once('.').unwrap_or((seconds, "0"));
    whole.parse::<u64>().unwrap_or(0) * 1000 + fraction.parse::<u64>().unwrap_or(0) * 10
}
