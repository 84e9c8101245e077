//! `cargo xtask record`: traces of what real Linux guests do to their memory, for `bench wire`.
//!
//! Each guest boots the lab's kernel with programs of this machine's Debian in its initramfs, under KVM in a host of the lab, and is
//! protected; what capture gives is recorded (`--record-dir`, a hook of the lab's agents).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::assets::cpio::Archive;
use crate::assets::initramfs;
use crate::lab::Lab;
use crate::lab::cli::booted;
use crate::lab::domain::GuestSpec;
use crate::lab::plan::HostName::Alpha;
use crate::lab::roots::Roots;
use crate::lab::state::LabDir;
use crate::lab::understudy::Role;
use crate::ui::Steps;
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
    Workload { name: "idle", programs: &[], epochs: 40, epoch_ms: 500 },
    Workload { name: "redis", programs: &["redis-server", "redis-benchmark"], epochs: 24, epoch_ms: 500 },
    Workload { name: "sqlite", programs: &["sqlite3"], epochs: 8, epoch_ms: 500 },
    Workload { name: "gcc", programs: &["cc1", "as"], epochs: 6, epoch_ms: 500 },
    Workload { name: "gzip", programs: &["gzip"], epochs: 4, epoch_ms: 500 },
];

/// Of the lab, for all of them.
const LIFETIME: Duration = Duration::from_secs(1800);
/// Until a guest's workload runs: it unpacks its programs on an emulated host.
const READY_LIMIT: Duration = Duration::from_secs(300);
/// What the guest's first program says on its console then.
const READY: &str = "WORKLOAD READY";
/// A full copy, or one epoch.
const EPOCH_LIMIT: Duration = Duration::from_secs(180);
/// Making the trace of it, the build included.
const LIMIT: Duration = Duration::from_secs(1200);
const GUEST: &str = "g1";
const MEMORY_MIB: u32 = 256;

/// Records all, or those whose names are given, into `into`.
pub(crate) fn run(names: &[String], into: &Path) -> Result<i32> {
    process::ensure_root()?;
    let cache = workspace::lab_cache()?;
    std::fs::create_dir_all(into)?;
    let into = std::path::absolute(into)?;
    let lab = booted(LabDir::unique(), Roots::default(), LIFETIME, true, false, &Steps::start())?;
    for workload in &WORKLOADS {
        if !names.is_empty() && !names.iter().any(|name| name == workload.name) {
            continue;
        }
        let image = initrd(&cache, workload)?;
        std::fs::copy(&image, lab.dir().shared().join(format!("guest/record-{}.img", workload.name)))?;
        let folder = record(&lab, workload).with_context(|| workload.name.to_owned())?;
        let mut cargo = crate::bench::measurement("record");
        cargo.arg("--from").arg(&folder).args(["--epochs", &workload.epochs.to_string(), "--out"]);
        cargo.arg(into.join(format!("{}.trace.gz", workload.name)));
        if !process::status(&mut cargo, LIMIT)?.success() {
            bail!("no trace was made of {}", workload.name);
        }
    }
    lab.down()?;
    Ok(0)
}

/// Starts the guest, protects it until there are enough epochs, and ends it; gives where they are.
fn record(lab: &Lab, workload: &Workload) -> Result<PathBuf> {
    crate::scenarios::clear(lab)?;
    let folder = lab.dir().shared().join(format!("record-{}", workload.name));
    let arguments = format!("--record-dir={}\n--epoch-ms={}", folder.display(), workload.epoch_ms);
    lab.restart_agent(Alpha, Role::Primary, &arguments)?;
    let name = Some(workload.name.to_owned());
    lab.start_guest(Alpha, &GuestSpec { memory_mib: MEMORY_MIB, workload: name, ..GuestSpec::new(GUEST) })?;
    println!("{}: the guest boots", workload.name);
    let console = format!("grep -c '{READY}' /run/lab/{GUEST}.serial || true");
    wait(READY_LIMIT, "the workload does not run", || Ok(lab.shell(Alpha, &console)?.trim() != "0"))?;
    lab.protect(GUEST, Alpha)?;
    println!("{}: the guest is protected", workload.name);
    for number in 0..=workload.epochs {
        let file = folder.join(format!("{GUEST}/{number}.frames"));
        wait(EPOCH_LIMIT, &format!("epoch {number} does not come"), || Ok(file.is_file()))?;
    }
    lab.must_understudy(Alpha, &["unprotect", GUEST])?;
    Ok(folder.join(GUEST))
}

fn wait(limit: Duration, why: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + limit;
    while !done()? {
        if Instant::now() >= end {
            bail!("{why} within {limit:?}");
        }
        std::thread::sleep(Duration::from_millis(500));
    }
    Ok(())
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
