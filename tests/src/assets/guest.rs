//! Builds the program that lab guests run.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::{process, workspace};

/// The program's file; cargo decides whether there is anything to do.
pub(crate) fn build() -> Result<PathBuf> {
    let target = workspace::target().join("guest");
    let mut cargo = workspace::cargo();
    cargo
        .args([
            "build",
            "--quiet",
            "--release",
            "--locked",
            "--manifest-path",
            "tests/guest/Cargo.toml",
            "--target-dir",
        ])
        .arg(&target)
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    if !process::status(&mut cargo, Duration::from_secs(600))?.success() {
        bail!("the guest program does not build");
    }
    Ok(target.join("release/understudy-guest"))
}
