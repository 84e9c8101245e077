//! The QEMU that emulates lab hosts where the machine's own KVM does not run Linux.
//!
//! Debian 12's QEMU 7.2 emulates a processor whose KVM now and then loses its way: the host's kernel runs out of stack, both
//! its processors spin, or a guest resets itself, several times an hour. That of the backports does so less often. It is
//! unpacked into the lab's cache, not installed: the hosts run the machine's own QEMU for their guests.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::process;
use crate::setup::apt;

const RELEASE: &str = "bookworm";
const PACKAGES: [&str; 3] = ["qemu-system-x86", "qemu-system-common", "qemu-system-data"];
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const FOLDER: &str = "emulator";
const LIMIT: Duration = Duration::from_secs(300);

/// A QEMU and where it finds its firmware.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Emulator {
    pub(crate) program: PathBuf,
    pub(crate) firmware: Vec<PathBuf>,
}

impl Emulator {
    /// The machine's own.
    pub(crate) fn own() -> Self {
        Self { program: "qemu-system-x86_64".into(), firmware: Vec::new() }
    }

    /// The steadier one on the release whose own is not; the machine's own if it cannot be had, which is said.
    pub(crate) fn steady(cache: &Path) -> Self {
        let os = fs::read_to_string("/etc/os-release").unwrap_or_default();
        if !os.lines().any(|line| line == format!("VERSION_CODENAME={RELEASE}")) {
            return Self::own();
        }
        Self::ensure(cache).unwrap_or_else(|error| {
            eprintln!(
                "No QEMU of {RELEASE}-backports for the emulated hosts, they run with {RELEASE}'s own and will fall over \
                 now and then: {error:#}"
            );
            Self::own()
        })
    }

    fn ensure(cache: &Path) -> Result<Self> {
        let tree = cache.join(FOLDER);
        if let Some(emulator) = Self::unpacked(&tree) {
            return Ok(emulator);
        }
        eprintln!("Downloading QEMU of {RELEASE}-backports (unpacked into the lab's cache, not installed).");
        // Built beside and moved into place: a run that is interrupted leaves nothing half done.
        let work = cache.join(format!("{FOLDER}.{}", std::process::id()));
        let fresh = work.join("tree");
        fs::create_dir_all(&fresh)?;
        let done = download(&work).and_then(|archives| {
            for archive in archives {
                process::checked(Command::new("dpkg-deb").arg("-x").arg(archive).arg(&fresh), LIMIT)?;
            }
            let emulator = Self::unpacked(&fresh).context("the packages hold no qemu-system-x86_64")?;
            // Libraries this machine does not have show now, not when a host is switched on.
            process::checked(Command::new(&emulator.program).arg("--version"), LIMIT)?;
            if let Err(error) = fs::rename(&fresh, &tree) {
                // Another run may have been quicker.
                Self::unpacked(&tree).with_context(|| format!("cannot move it into place: {error}"))?;
            }
            Self::unpacked(&tree).context("it is gone")
        });
        fs::remove_dir_all(&work).context("cannot remove the download")?;
        done
    }

    fn unpacked(tree: &Path) -> Option<Self> {
        let program = tree.join("usr/bin/qemu-system-x86_64");
        let firmware = vec![tree.join("usr/share/qemu"), "/usr/share/seabios".into()];
        (program.is_file() && firmware.iter().all(|folder| folder.is_dir()))
            .then_some(Self { program, firmware })
    }
}

/// The packages, with lists of apt's own that leave the machine's as they are.
fn download(work: &Path) -> Result<Vec<PathBuf>> {
    let archives = apt::archives()?;
    let main = archives.iter().find(|archive| archive.release == RELEASE && archive.component == "main");
    let site = &main.with_context(|| format!("apt has no source of {RELEASE} main"))?.uri;
    let sources = work.join("sources.list");
    fs::write(&sources, format!("deb [signed-by={KEYRING}] {site} {RELEASE}-backports main\n"))?;
    fs::create_dir_all(work.join("lists/partial"))?;
    fs::create_dir_all(work.join("cache/archives/partial"))?;
    let apt_get = || {
        let mut command = Command::new("apt-get");
        for option in [
            format!("Dir::Etc::sourcelist={}", sources.display()),
            "Dir::Etc::sourceparts=/dev/null".into(),
            format!("Dir::State::lists={}", work.join("lists").display()),
            format!("Dir::Cache={}", work.join("cache").display()),
        ] {
            command.args(["-o", &option]);
        }
        command.arg("--quiet").current_dir(work);
        command
    };
    process::checked(apt_get().arg("update"), LIMIT)?;
    let packages = PACKAGES.map(|package| format!("{package}/{RELEASE}-backports"));
    process::checked(apt_get().arg("download").args(packages), LIMIT)?;
    let archives: Vec<PathBuf> = fs::read_dir(work)?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|end| end == "deb"))
        .collect();
    if archives.len() != PACKAGES.len() {
        bail!("apt-get download left {} packages of {PACKAGES:?}", archives.len());
    }
    Ok(archives)
}
