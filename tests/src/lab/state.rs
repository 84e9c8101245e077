//! The folder of a lab: who runs it, its logs, and what it shares with its hosts.

use std::fs::{self, File};
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::FlockOperation;

use super::network;
use super::plan::HostName;

/// Short, because sockets live below it and their paths are bounded.
const BASE: &str = "/tmp/understudy-labs";
const NAME_MAX: usize = 24;

/// A lab's name and, derived from it, its places.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LabDir {
    name: String,
}

impl LabDir {
    /// # Errors
    /// When the name could not be part of a path and of a namespace's name.
    pub(crate) fn new(name: &str) -> Result<Self> {
        let fine = |c: char| c.is_ascii_alphanumeric() || c == '-';
        if name.is_empty() || name.len() > NAME_MAX || !name.chars().all(fine) {
            bail!("`{name}` is no name for a lab: letters, digits and dashes, at most {NAME_MAX}");
        }
        Ok(Self { name: name.to_owned() })
    }

    /// The lab that `lab up` in this checkout makes, when it is not told another name.
    pub(crate) fn of_checkout() -> Self {
        let mut hasher = std::hash::DefaultHasher::new();
        crate::workspace::root().hash(&mut hasher);
        Self { name: format!("lab-{:08x}", hasher.finish() >> 32) }
    }

    /// For a lab that lives as long as this process.
    pub(crate) fn unique() -> Self {
        Self { name: format!("run-{}", std::process::id()) }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn path(&self) -> PathBuf {
        Path::new(BASE).join(&self.name)
    }

    pub(crate) fn netns(&self) -> String {
        format!("us-{}", self.name)
    }

    /// `LAB_DIR`: readable and writable everywhere under the same path.
    pub(crate) fn shared(&self) -> PathBuf {
        self.path().join("shared")
    }

    /// What a host keeps over a power cut.
    pub(crate) fn disk(&self, host: HostName) -> PathBuf {
        self.shared().join(".disk").join(host.name())
    }

    pub(crate) fn logs(&self) -> PathBuf {
        self.path().join("log")
    }

    pub(crate) fn console(&self, host: HostName) -> PathBuf {
        self.logs().join(format!("{host}.console"))
    }

    pub(crate) fn supervisor_log(&self) -> PathBuf {
        self.logs().join("supervisor")
    }

    pub(crate) fn control(&self) -> PathBuf {
        self.path().join("control")
    }

    /// This program, kept as it was when the lab was started; as `lab` it is the helper on PATH.
    pub(crate) fn helper(&self) -> PathBuf {
        self.path().join("bin/lab")
    }

    fn lock_file(&self) -> PathBuf {
        self.path().join("lock")
    }

    /// Makes the folder, and the lock that says that somebody runs this lab.
    pub(crate) fn create(&self) -> Result<File> {
        fs::create_dir_all(self.path()).with_context(|| format!("cannot make {}", self.path().display()))?;
        let lock = File::create(self.lock_file())?;
        if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            bail!("the lab `{}` is already running: `cargo xtask lab down` ends it", self.name);
        }
        for dir in [self.shared(), self.logs(), self.path().join("bin")] {
            fs::create_dir_all(dir)?;
        }
        Ok(lock)
    }

    /// Whether its supervisor lives. The lock goes with the process, however that ends.
    pub(crate) fn is_running(&self) -> bool {
        File::open(self.lock_file())
            .is_ok_and(|lock| rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared).is_err())
    }

    /// Removes what is left of a lab that nobody runs.
    pub(crate) fn clean(&self) -> Result<()> {
        network::remove(&self.netns())?;
        // Away in one step: half a lab could be taken for one whose supervisor was killed.
        let going = Path::new(BASE).join(format!(".{}.{}", self.name, std::process::id()));
        match fs::rename(self.path(), &going) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error).with_context(|| format!("cannot remove {}", self.path().display())),
            Ok(()) => {
                fs::remove_dir_all(&going).with_context(|| format!("cannot remove {}", going.display()))
            }
        }
    }

    fn existing() -> Vec<Self> {
        let entries = fs::read_dir(BASE).into_iter().flatten().flatten();
        entries.filter_map(|entry| Self::new(entry.file_name().to_str()?).ok()).collect()
    }

    /// Removes what is left of labs whose supervisor was killed. A lab that is just being made is younger
    /// than a minute and keeps its folder.
    pub(crate) fn clean_stale() -> Result<()> {
        for lab in Self::existing().into_iter().filter(|lab| !lab.is_running()) {
            let age = fs::metadata(lab.path())
                .and_then(|data| data.modified())
                .ok()
                .and_then(|time| time.elapsed().ok());
            if age.is_some_and(|age| age.as_secs() > 60) {
                eprintln!("Removing what is left of the lab `{}`.", lab.name);
                lab.clean()?;
            }
        }
        Ok(())
    }
}

/// The end of a log, for people.
pub(crate) fn tail(path: &Path, lines: usize) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<&str> =
        text.lines().map(|line| line.trim_end_matches('\r')).filter(|line| !line.is_empty()).collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_leaves_the_folder_is_refused() {
        for name in ["", "../x", "a/b", "a b", &"x".repeat(40)] {
            assert!(LabDir::new(name).is_err(), "{name}");
        }
        assert_eq!(LabDir::new("run-17").unwrap().netns(), "us-run-17");
    }

    #[test]
    fn a_tail_has_the_last_lines() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "a\r\n\nb\nc\n").unwrap();
        assert_eq!(tail(file.path(), 2), "b\nc");
        assert_eq!(tail(Path::new("/nowhere"), 2), "");
    }
}
