//! Where things are: the checkout, cargo's target folder, the lab's cache.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The checkout this xtask was built from.
pub(crate) fn root() -> &'static Path {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests)
}

/// Cargo's target folder.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// What the lab keeps between runs: kernels, initramfs images, the result of the KVM probe.
pub(crate) fn lab_cache() -> Result<PathBuf> {
    let dir = std::env::var_os("UNDERSTUDY_LAB_CACHE").map_or_else(|| target().join("lab"), PathBuf::from);
    std::fs::create_dir_all(&dir)
        .with_context(|| format!("cannot make the lab's cache {}", dir.display()))?;
    dir.canonicalize().with_context(|| format!("no such folder {}", dir.display()))
}

/// The cargo that runs us, or the one on PATH.
pub(crate) fn cargo() -> std::process::Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = std::process::Command::new(cargo);
    command.current_dir(root());
    // Cargo has told us what package we are. Build scripts that look at that would run anew, and all that depends on
    // them be built anew, whenever the same is built with and without us.
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&*name);
        }
    }
    command
}
