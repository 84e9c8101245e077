//! What a lab host is rooted in: this machine's own system, or a tree of another Debian.

use std::fmt;
use std::str::FromStr;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::plan::HostName;

/// A system that a host can be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Root {
    /// This machine's own, nothing of it copied.
    #[default]
    Machine,
    /// Debian 13: QEMU 10.0 and libvirt 11.3.
    Debian13,
    /// This machine's own, its libvirt run by virtqemud instead of libvirtd.
    Virtqemud,
}

/// The root of every host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Roots {
    alpha: Root,
    beta: Root,
}

impl Root {
    const ALL: [Self; 3] = [Self::Machine, Self::Debian13, Self::Virtqemud];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Machine => "machine",
            Self::Debian13 => "debian13",
            Self::Virtqemud => "virtqemud",
        }
    }
}

impl Roots {
    /// Every host the same.
    pub(crate) fn both(root: Root) -> Self {
        Self { alpha: root, beta: root }
    }

    /// This machine's system on alpha, Debian 13 on beta.
    pub(crate) fn mixed() -> Self {
        Self { alpha: Root::Machine, beta: Root::Debian13 }
    }

    /// Whether a host is this.
    pub(crate) fn any(self, root: Root) -> bool {
        HostName::ALL.into_iter().any(|host| self.of(host) == root)
    }

    pub(crate) fn of(self, host: HostName) -> Root {
        match host {
            HostName::Alpha => self.alpha,
            HostName::Beta => self.beta,
        }
    }
}

impl fmt::Display for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Roots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "alpha={},beta={}", self.alpha, self.beta)
    }
}

impl FromStr for Root {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match Self::ALL.into_iter().find(|root| root.name() == text) {
            Some(root) => Ok(root),
            None => bail!(
                "no root `{text}` for a host: there are machine (this machine's own), debian13 and virtqemud \
                 (this machine's own with that daemon)"
            ),
        }
    }
}

impl FromStr for Roots {
    type Err = anyhow::Error;

    /// `debian13` for all hosts, or `alpha=machine,beta=debian13`; a host that is not named has this machine's.
    fn from_str(text: &str) -> Result<Self> {
        if !text.contains('=') {
            return text.parse().map(Self::both);
        }
        let mut roots = Self::default();
        for part in text.split(',') {
            let Some((host, root)) = part.split_once('=') else {
                bail!("`{part}` is not HOST=ROOT, as in alpha=machine,beta=debian13")
            };
            let root = root.parse()?;
            match host.parse()? {
                HostName::Alpha => roots.alpha = root,
                HostName::Beta => roots.beta = root,
            }
        }
        Ok(roots)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_root_for_all_or_one_for_each() {
        assert_eq!("debian13".parse::<Roots>().unwrap(), Roots::both(Root::Debian13));
        assert_eq!("alpha=machine,beta=debian13".parse::<Roots>().unwrap(), Roots::mixed());
        assert_eq!("beta=debian13".parse::<Roots>().unwrap(), Roots::mixed());
        assert_eq!(Roots::mixed().to_string().parse::<Roots>().unwrap(), Roots::mixed());
        for wrong in ["", "debian12", "gamma=machine", "alpha=x", "alpha=machine,beta"] {
            assert!(wrong.parse::<Roots>().is_err(), "{wrong}");
        }
    }
}
