//! `virtqemud`, libvirt's daemon for QEMU alone, which Debian does not ship: built from Debian's own source of the
//! libvirt that the machine has, and kept in the lab's cache. It runs with that libvirt's libraries and driver.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::sweep;
use crate::process;
use crate::setup::apt;

/// What the build needs beside what the lab needs.
const PACKAGES: [&str; 16] = [
    "dpkg-dev",
    "gcc",
    "libglib2.0-dev",
    "libgnutls28-dev",
    "libnl-3-dev",
    "libnl-route-3-dev",
    "libpciaccess-dev",
    "libtirpc-dev",
    "libudev-dev",
    "libxml2-dev",
    "libxml2-utils",
    "libyajl-dev",
    "meson",
    "ninja-build",
    "python3-docutils",
    "xsltproc",
];

/// Only what the daemon is made of, in Debian's folders.
const OPTIONS: [&str; 13] = [
    "--prefix=/usr",
    "--sysconfdir=/etc",
    "--localstatedir=/var",
    "-Dsystem=false",
    "-Ddocs=disabled",
    "-Dtests=disabled",
    "-Ddriver_qemu=enabled",
    "-Ddriver_remote=enabled",
    "-Ddriver_libvirtd=enabled",
    "-Ddriver_lxc=disabled",
    "-Ddriver_vbox=disabled",
    "-Dpolkit=disabled",
    "-Dinit_script=none",
];

const PREFIX: &str = "virtqemud.";

/// A busy machine.
const LIMIT: Duration = Duration::from_secs(3600);
const PROBE_LIMIT: Duration = Duration::from_secs(60);

/// The daemon: the one in the cache, or a fresh one.
pub(crate) fn ensure(cache: &Path) -> Result<PathBuf> {
    let wanted = version("libvirtd")?;
    let daemon = cache.join(format!("virtqemud-{wanted}"));
    if daemon.exists() {
        return Ok(daemon);
    }
    apt::ensure(&PACKAGES, "virtqemud is built from libvirt's source, for which packages are missing:")?;
    eprintln!("Building virtqemud {wanted} for the lab's hosts; once, some minutes.");
    sweep(cache, PREFIX)?;
    let work = cache.join(format!("{PREFIX}{}", std::process::id()));
    fs::create_dir_all(&work)?;
    let source = fetch(&work)?;
    let build = work.join("build");
    run(Command::new("meson").arg("setup").args(OPTIONS).arg(&build).arg(&source))?;
    run(Command::new("ninja").arg("-C").arg(&build).arg("src/virtqemud"))?;
    let fresh = build.join("src/virtqemud");
    let found = version(&fresh.display().to_string())?;
    ensure!(
        found == wanted,
        "the source of libvirt is of version {found}, this machine's libvirtd is {wanted}"
    );
    // Into place at once, or not at all.
    fs::rename(&fresh, &daemon).context("cannot move virtqemud into place")?;
    fs::remove_dir_all(&work).context("cannot remove what was left of building virtqemud")?;
    Ok(daemon)
}

/// Unpacks the source that belongs to the machine's packages; apt's own lists stay as they are.
fn fetch(work: &Path) -> Result<PathBuf> {
    let list = work.join("sources.list");
    let lines = apt::archives()?.into_iter().filter(|archive| archive.origin == "Debian").map(|archive| {
        format!("deb-src [trusted=yes] {} {} {}\n", archive.uri, archive.release, archive.component)
    });
    // One archive has many components.
    let lines: std::collections::BTreeSet<String> = lines.collect();
    fs::write(&list, lines.into_iter().collect::<String>())?;
    let lists = work.join("lists");
    fs::create_dir_all(lists.join("partial"))?;
    let apt_get = || {
        let mut command = Command::new("apt-get");
        command.current_dir(work).args(["-q", "-o", "Dir::Etc::sourceparts=/dev/null"]);
        command.arg("-o").arg(format!("Dir::Etc::sourcelist={}", list.display()));
        command.arg("-o").arg(format!("Dir::State::lists={}", lists.display()));
        command
    };
    run(apt_get().arg("update"))?;
    run(apt_get().args(["source", "libvirt"]))?;
    let mut folders = fs::read_dir(work)?.flatten().map(|entry| entry.path());
    let source = folders.find(|path| path.join("meson.build").exists());
    source.context("apt-get source libvirt left no source behind")
}

fn run(command: &mut Command) -> Result<()> {
    process::checked(command, LIMIT).map(drop)
}

/// The version a daemon of libvirt says it has.
fn version(program: &str) -> Result<String> {
    let said = process::checked(Command::new(program).arg("--version"), PROBE_LIMIT)?;
    let version = said.split_whitespace().last().map(str::to_owned);
    version.with_context(|| format!("{program} --version says {said:?}"))
}
