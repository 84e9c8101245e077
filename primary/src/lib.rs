//! The agent beside the protected guest: capture, pace, replicate.

pub mod admin;
pub mod agent;
pub mod autopilot;
pub mod capture;
pub mod config;
#[cfg(feature = "test-hooks")]
pub mod dump;
pub mod egress;
pub mod encode;
pub mod engine;
#[cfg(feature = "test-hooks")]
pub mod hooks;
pub mod life;
pub mod metadata;
pub mod protect;
#[cfg(feature = "test-hooks")]
pub mod record;
pub mod replicate;
pub mod state_file;
pub mod stats;
mod sys;

/// Has this process keep some of what it frees; for the beginning of a program.
pub fn keep_freed_memory() {
    sys::keep_freed_memory();
}
