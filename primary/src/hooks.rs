//! Test hook: an agent that dies while the guest is stopped.

use rustix::process::{Signal, getpid, kill_process};
use tracing::warn;

use crate::agent::Barrier;

/// Kills this process, as `kill -9` does, between the two messages that stop the guest and let it run.
pub fn die_at(epoch: u64, mut barrier: Barrier) -> Barrier {
    Box::new(move |at| {
        if at.0 == epoch {
            warn!(%at, "dying within a stop, as told");
            return match kill_process(getpid(), Signal::KILL) {
                // The signal is on its way to this thread.
                Ok(()) => loop {
                    std::thread::park();
                },
                Err(error) => Err(format!("cannot die: {error}")),
            };
        }
        barrier(at)
    })
}
