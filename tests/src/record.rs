//! `cargo xtask record`: traces of what real Linux guests do to their memory, for `bench wire`.
//!
//! Each guest boots the lab's kernel with programs of this machine's Debian in its initramfs, and is emulated, so it needs no lab.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::assets::cpio::Archive;
use crate::assets::initramfs;
use crate::assets::kernel::{Flavour, Kernel};
use crate::{process, workspace};

/// A workload and the programs it needs beside busybox.
struct Workload {
    name: &'static str,
    programs: &'static [&'static str],
    /// Of the trace; those that make much new content are short, as traces are part of the repository.
    epochs: usize,
    epoch_ms: usize,
}

const WORKLOADS: [Workload; 5] = [
    Workload { name: "idle", programs: &[], epochs: 60, epoch_ms: 250 },
    Workload { name: "redis", programs: &["redis-server", "redis-benchmark"], epochs: 40, epoch_ms: 250 },
    Workload { name: "sqlite", programs: &["sqlite3"], epochs: 20, epoch_ms: 25 },
    Workload { name: "gcc", programs: &["cc1", "as"], epochs: 8, epoch_ms: 50 },
    Workload { name: "gzip", programs: &["gzip"], epochs: 8, epoch_ms: 20 },
];

/// For one recording, its build included.
const LIMIT: Duration = Duration::from_secs(1200);

/// Records all, or those whose names are given, into `into`.
pub(crate) fn run(names: &[String], into: &Path) -> Result<i32> {
    let cache = workspace::lab_cache()?;
    let kernel = Kernel::ensure(&cache, Flavour::Cloud)?;
    std::fs::create_dir_all(into)?;
    for workload in &WORKLOADS {
        if !names.is_empty() && !names.iter().any(|name| name == workload.name) {
            continue;
        }
        let initrd = initrd(&cache, workload)?;
        let mut cargo = crate::bench::measurement("record");
        cargo.arg("--kernel").arg(kernel.image()).arg("--initrd").arg(&initrd);
        cargo.args(["--workload", workload.name, "--epochs", &workload.epochs.to_string()]);
        cargo.args(["--epoch-ms", &workload.epoch_ms.to_string(), "--out"]);
        cargo.arg(std::path::absolute(into)?.join(format!("{}.trace.gz", workload.name)));
        if !process::status(&mut cargo, LIMIT)?.success() {
            bail!("{} was not recorded", workload.name);
        }
    }
    Ok(0)
}

/// busybox, the programs, what they are linked with, and something to work on.
fn initrd(cache: &Path, workload: &Workload) -> Result<PathBuf> {
    let mut archive = Archive::new(Vec::new());
    for folder in ["bin", "dev", "proc", "sys", "tmp", "data"] {
        archive.folder(folder)?;
    }
    archive.program("init", include_bytes!("assets/record-initramfs.sh"))?;
    let mut files = BTreeSet::new();
    let busybox = process::find_program("busybox").context("no busybox: install busybox-static")?;
    archive.program("bin/busybox", &std::fs::read(busybox)?)?;
    for name in workload.programs {
        let program = find(name)?;
        archive.program(&format!("bin/{name}"), &std::fs::read(&program)?)?;
        let linked = process::checked(Command::new("ldd").arg(&program), Duration::from_secs(10))?;
        files.extend(linked.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned));
    }
    let mut folders = BTreeSet::new();
    for file in &files {
        let path = Path::new(file.trim_start_matches('/'));
        for folder in path.ancestors().skip(1).collect::<Vec<_>>().into_iter().rev() {
            if folder != Path::new("") && folders.insert(folder.to_owned()) {
                archive.folder(&folder.to_string_lossy())?;
            }
        }
        archive.program(&path.to_string_lossy(), &std::fs::read(file)?)?;
    }
    if workload.name == "gcc" {
        archive.program("data/work.i", &preprocessed()?)?;
    }
    let image = cache.join(format!("record-{}.img", workload.name));
    initramfs::compress(&archive.finish()?, &image)?;
    Ok(image)
}

fn find(name: &str) -> Result<PathBuf> {
    if name == "cc1" {
        let path =
            process::checked(Command::new("gcc").arg("-print-prog-name=cc1"), Duration::from_secs(10))?;
        return Ok(PathBuf::from(path.trim()));
    }
    process::find_program(name).with_context(|| format!("no {name} here: install its Debian package"))
}

/// A source with the C library's headers and a few hundred functions.
fn preprocessed() -> Result<Vec<u8>> {
    let dir = tempfile_dir()?;
    let source = dir.join("work.c");
    let mut text =
        String::from("#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n#include <math.h>\n");
    for number in 0..300 {
        text += &format!(
            "int f{number}(int *a, int n) {{ int s = {number}; for (int i = 0; i < n; i++) {{ \
             if (a[i] % {} == 0) s += a[i] * {number}; else s ^= strlen(\"f{number}\") + printf(\"%d\", a[i]); }} return s; }}\n",
            number + 2
        );
    }
    std::fs::write(&source, text)?;
    let output = process::output(Command::new("gcc").arg("-E").arg(&source), Duration::from_secs(30))?;
    std::fs::remove_dir_all(&dir)?;
    if !output.status.success() {
        bail!("gcc -E: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(output.stdout)
}

fn tempfile_dir() -> Result<PathBuf> {
    let dir = std::env::temp_dir().join(format!("understudy-record-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    Ok(dir)
}
