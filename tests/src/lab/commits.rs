//! What the primary agent says of the ends and commits of epochs, on its host's clock.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::Lab;
use super::guest::field;
use super::plan::HostName;
use super::understudy::Role;

/// What has the agent say it; one argument a line.
pub(crate) const ARGUMENTS: &str = "--log=info,understudy_primary::egress=debug";

/// The log from a moment on.
#[derive(Debug)]
pub(crate) struct CommitLog {
    path: PathBuf,
    from: u64,
}

/// Epochs of one guest, with the time of each, microseconds.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Commits {
    pub(crate) sealed: BTreeMap<u64, u64>,
    pub(crate) committed: BTreeMap<u64, u64>,
}

impl CommitLog {
    /// Of the primary agent of a host, from now on.
    pub(crate) fn from_now(lab: &Lab, host: HostName) -> Self {
        let path = lab.dir().shared().join(format!("log/{host}-{}.log", Role::Primary.program()));
        let from = std::fs::metadata(&path).map_or(0, |data| data.len());
        Self { path, from }
    }

    /// What it says of a guest up to now.
    pub(crate) fn read(&self, guest: &str) -> Result<Commits> {
        let mut file = File::open(&self.path).with_context(|| format!("no log {}", self.path.display()))?;
        file.seek(SeekFrom::Start(self.from))?;
        let mut text = Vec::new();
        file.read_to_end(&mut text)?;
        Ok(Commits::parse(&String::from_utf8_lossy(&text), guest))
    }
}

impl Commits {
    fn parse(text: &str, guest: &str) -> Self {
        let mut commits = Self::default();
        let name = format!("{guest:?}");
        for line in text.lines().filter(|line| field(line, "guest") == Some(&name)) {
            let number = |key| field(line, key).and_then(|value| value.parse::<u64>().ok());
            let (Some(epoch), Some(at)) = (number("epoch"), number("unix_us")) else { continue };
            if line.contains(" sealed ") {
                commits.sealed.insert(epoch, at);
            } else if line.contains(" committed ") {
                commits.committed.insert(epoch, at);
            }
        }
        commits
    }

    /// Every epoch that had ended by then is committed.
    pub(crate) fn nothing_in_flight(&self, at_us: u64) -> bool {
        self.sealed.iter().all(|(epoch, sealed)| *sealed >= at_us || self.committed.contains_key(epoch))
    }

    /// An epoch has ended since then.
    pub(crate) fn sealed_since(&self, at_us: u64) -> bool {
        self.sealed.values().any(|sealed| *sealed > at_us)
    }

    /// When what the guest sent at this moment was committed: with the epoch that ended next, or, if that was given up, with a
    /// later one.
    pub(crate) fn committed_after(&self, sent_us: u64) -> Option<u64> {
        let (epoch, _) = self.sealed.iter().find(|(_, sealed)| **sealed >= sent_us)?;
        self.committed.range(epoch..).next().map(|(_, committed)| *committed)
    }
}

/// Now, on a host's clock, microseconds since 1970.
pub(crate) fn host_now_us(lab: &Lab, host: HostName) -> Result<u64> {
    let text = lab.shell(host, "date +%s%6N")?;
    text.trim().parse().with_context(|| format!("no time: {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_sent_belongs_to_the_epoch_that_ends_next() {
        let line = |what: &str, guest: &str, epoch: u64, at: u64| {
            format!(
                "2026-01-01T00:00:00Z DEBUG understudy_primary::egress::keeper: {what} guest=\"{guest}\" epoch={epoch} unix_us={at}\n"
            )
        };
        let text = [
            line("sealed", "g1", 1, 100),
            line("committed", "g1", 1, 150),
            line("sealed", "g2", 1, 160),
            line("sealed", "g1", 2, 200),
        ]
        .concat();
        let commits = Commits::parse(&text, "g1");
        assert_eq!((commits.sealed.len(), commits.committed.len()), (2, 1));
        assert_eq!(
            [90, 100, 101, 201].map(|at| commits.committed_after(at)),
            [Some(150), Some(150), None, None]
        );
        let given_up = text + &line("sealed", "g1", 3, 250) + &line("committed", "g1", 3, 300);
        assert_eq!(Commits::parse(&given_up, "g1").committed_after(101), Some(300));
        assert!(commits.nothing_in_flight(199) && !commits.nothing_in_flight(201));
        assert!(commits.sealed_since(199) && !commits.sealed_since(200));
    }
}
