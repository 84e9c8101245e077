//! What runs inside a lab host: this same program, as its PID 1 and as its exec server.

pub(crate) mod boot;
mod exec;
mod service;

use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use rustix::process::WaitOptions;

use crate::lab::wire::Phase;

/// PID 1: starts the rest and collects what the rest leaves behind. libvirt waits for its probing QEMUs to
/// be gone, which they are only when somebody has asked how they ended.
pub(crate) fn init() -> Result<()> {
    let us = std::env::current_exe().context("cannot find this program")?;
    Command::new(us).arg("__host-main").spawn().context("cannot start the host's main process")?;
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            // Nobody is left; the kernel would panic if we ended.
            Err(_) => std::thread::park(),
        }
    }
}

/// How far this host is, for whoever asks.
#[derive(Clone, Debug)]
pub(crate) struct Progress(Arc<Mutex<Phase>>);

impl Progress {
    fn new() -> Self {
        Self(Arc::new(Mutex::new(Phase { name: "start".into(), failure: None, uptime_ms: 0 })))
    }

    fn set(&self, name: &str, failure: Option<String>) {
        let uptime_ms = uptime_ms();
        let seconds = uptime_ms / 1000;
        match &failure {
            Some(text) => println!("LAB [{seconds:>4} s] {name} FAILED: {text}"),
            None => println!("LAB [{seconds:>4} s] {name}"),
        }
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) =
            Phase { name: name.to_owned(), failure, uptime_ms };
    }

    fn get(&self) -> Phase {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Everything else, as a child of PID 1.
pub(crate) fn main() -> Result<()> {
    let progress = Progress::new();
    if let Err(error) = boot::boot(&progress) {
        let name = progress.get().name;
        progress.set(&name, Some(format!("{error:#}")));
    }
    loop {
        std::thread::park();
    }
}

fn uptime_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1000 + u64::try_from(now.tv_nsec / 1_000_000).unwrap_or(0)
}
