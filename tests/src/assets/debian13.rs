//! A tree of Debian 13 that lab hosts can be rooted in, made once and kept in the lab's cache.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::sweep;
use crate::process;
use crate::setup::apt::{self, Archive};

const SUITE: &str = "trixie";
/// What a host needs beside the smallest system that apt can manage.
const PACKAGES: [&str; 12] = [
    "ipxe-qemu",
    "iproute2",
    "kmod",
    "libvirt-clients",
    "libvirt-daemon",
    "libvirt-daemon-driver-qemu",
    "libvirt-daemon-log",
    "libvirt-daemon-system",
    "procps",
    "qemu-system-x86",
    "seabios",
    "tcpdump",
];
/// In the tree: what it was made of, and the versions that were found in it.
const SEAL: &str = "understudy-root";
/// A busy machine and a slow mirror.
const LIMIT: Duration = Duration::from_secs(3600);
const PROBE_LIMIT: Duration = Duration::from_secs(60);

/// The tree: the one in the cache, or a fresh one. A tree that is not complete is never there under its name.
pub(crate) fn ensure(cache: &Path) -> Result<PathBuf> {
    let tree = cache.join("root-debian13");
    if is_sealed(&tree) {
        return Ok(tree);
    }
    apt::ensure(
        &["mmdebstrap"],
        "A root of Debian 13 is made with mmdebstrap, which is missing and will be installed.",
    )?;
    let archives = apt::archives()?;
    eprintln!(
        "Making a root of Debian 13 for the lab's hosts; once, a few minutes, 350 MB in the lab's cache."
    );
    sweep(cache, PREFIX)?;
    let work = cache.join(format!("{PREFIX}{}", std::process::id()));
    let fresh = work.join("tree");
    fs::create_dir_all(&work)?;
    // Its own progress is what a person sees.
    let status = process::status(&mut mmdebstrap(&fresh, &sources(&archives)?, &apt::options()?), LIMIT)?;
    ensure!(
        status.success(),
        "mmdebstrap could not make a root of Debian 13 ({status}); what it said is above"
    );
    let found = probe(&fresh)?;
    fs::write(fresh.join(SEAL), format!("{}\n{found}", recipe()))?;
    if tree.exists() {
        fs::rename(&tree, work.join("old")).context("cannot take the old root away")?;
    }
    if let Err(error) = fs::rename(&fresh, &tree) {
        // Another run may have been quicker.
        ensure!(is_sealed(&tree), "cannot move the root into place: {error}");
    }
    fs::remove_dir_all(&work).context("cannot remove what was left of making the root")?;
    eprintln!("The root of Debian 13 is made: {}", found.lines().collect::<Vec<_>>().join("; "));
    Ok(tree)
}

const PREFIX: &str = "root-debian13.";

fn recipe() -> String {
    format!("{SUITE} {}", PACKAGES.join(" "))
}

/// Whether the tree was finished, and from the same recipe.
fn is_sealed(tree: &Path) -> bool {
    fs::read_to_string(tree.join(SEAL)).is_ok_and(|seal| seal.lines().next() == Some(&recipe()))
}

fn mmdebstrap(to: &Path, sources: &[String], options: &[String]) -> Command {
    let mut command = Command::new("mmdebstrap");
    command.args(["--variant=minbase", "--architectures=amd64", "--format=directory"]);
    command.arg(format!("--include={}", PACKAGES.join(",")));
    // Nobody minds losing it in a power cut: it is thrown away then.
    command.args(["--aptopt=APT::Install-Recommends \"false\"", "--dpkgopt=force-unsafe-io"]);
    command.args(options.iter().map(|option| format!("--aptopt={option}")));
    command.arg(SUITE).arg(to).args(sources);
    command
}

/// The machine's own archives of Debian, with the other release in place of the machine's.
fn sources(archives: &[Archive]) -> Result<Vec<String>> {
    let debian: Vec<&Archive> =
        archives.iter().filter(|archive| archive.origin == "Debian" && archive.component == "main").collect();
    // The codename is the shortest of `bookworm`, `bookworm-updates`, `bookworm-security`.
    let Some(codename) = debian.iter().map(|archive| archive.release.as_str()).min_by_key(|name| name.len())
    else {
        bail!(
            "apt has no archive of Debian, from which the root of Debian 13 would come: see /etc/apt/sources.list"
        );
    };
    let mut lines: Vec<String> = Vec::new();
    for archive in &debian {
        // No backports and the like: only what everybody has.
        let Some(rest @ ("" | "-updates" | "-security")) = archive.release.strip_prefix(codename) else {
            continue;
        };
        let line = format!("deb {} {SUITE}{rest} main", archive.uri);
        if !lines.contains(&line) {
            lines.push(line);
        }
    }
    Ok(lines)
}

/// Starts what the tree is for, and says which versions that are.
fn probe(tree: &Path) -> Result<String> {
    let run = |program: &str| {
        let mut command = Command::new("chroot");
        process::checked(command.arg(tree).args([program, "--version"]), PROBE_LIMIT)
            .with_context(|| format!("the root of Debian 13 is of no use: {program} does not run in it"))
    };
    let (qemu, libvirt) = (run("qemu-system-x86_64")?, run("libvirtd")?);
    run("virtlogd")?;
    let line = |text: &str| text.lines().next().unwrap_or_default().to_owned();
    let (qemu, libvirt) = (line(&qemu), line(&libvirt));
    ensure!(
        qemu.contains("version 10.0."),
        "the root of Debian 13 has `{qemu}` and not QEMU 10.0: its archive is not what it should be"
    );
    Ok(format!("{qemu}\n{libvirt}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(origin: &str, uri: &str, release: &str, component: &str) -> Archive {
        let own = str::to_owned;
        Archive { origin: own(origin), uri: own(uri), release: own(release), component: own(component) }
    }

    #[test]
    fn the_machines_own_mirrors_are_used_for_the_other_release() {
        let here = [
            archive("Debian", "http://mirror.example/debian/", "bookworm", "main"),
            archive("Debian", "http://mirror.example/debian/", "bookworm", "contrib"),
            archive("Debian", "http://mirror.example/debian/", "bookworm-updates", "main"),
            archive("Debian", "http://mirror.example/debian/", "bookworm-backports", "main"),
            archive("Debian", "http://other.example/security/", "bookworm-security", "main"),
            archive("Google", "https://packages.example/apt/", "cloud-sdk-bookworm", "main"),
        ];
        assert_eq!(
            sources(&here).unwrap(),
            [
                "deb http://mirror.example/debian/ trixie main",
                "deb http://mirror.example/debian/ trixie-updates main",
                "deb http://other.example/security/ trixie-security main",
            ]
        );
        assert!(sources(&here[5..]).unwrap_err().to_string().contains("sources.list"));
    }

    #[test]
    fn only_a_finished_tree_of_the_same_recipe_is_used() {
        let tree = tempfile::tempdir().unwrap();
        assert!(!is_sealed(tree.path()));
        fs::write(tree.path().join(SEAL), "trixie something-else\nQEMU\n").unwrap();
        assert!(!is_sealed(tree.path()));
        fs::write(tree.path().join(SEAL), format!("{}\nQEMU\n", recipe())).unwrap();
        assert!(is_sealed(tree.path()));
    }

    #[test]
    fn what_an_interrupted_run_left_goes_and_what_a_running_one_makes_stays() {
        let cache = tempfile::tempdir().unwrap();
        let ours = cache.path().join(format!("{PREFIX}{}", std::process::id()));
        // No process has this number: it is beyond the kernel's limit.
        let left = cache.path().join(format!("{PREFIX}4194305"));
        fs::create_dir(&ours).unwrap();
        fs::create_dir(&left).unwrap();
        fs::create_dir(cache.path().join("root-debian13")).unwrap();
        sweep(cache.path(), PREFIX).unwrap();
        assert!(ours.exists() && !left.exists() && cache.path().join("root-debian13").exists());
    }
}
