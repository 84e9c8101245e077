//! What is to be done with a guest on failures, in the element's words.

use super::error::not_one_of;
use super::protect::{PROTECT, backup};
use super::tree::Node;
use super::{MetadataError, error};

/// The attributes.
pub(super) const ATTRIBUTES: [&str; 3] = ["on-lost-backup", "on-qemu-crash", "spares"];

const LOST_BACKUP: &[&str] = &["hold", "solo"];
const QEMU_CRASH: &[&str] = &["failover", "leave"];

/// More hosts are no help.
const MAX_SPARES: usize = 8;

/// Choices for one guest; what is `None` or empty is left to the watchdogs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Policy {
    /// `hold`: output waits for a backup. `solo`: the guest goes on unprotected.
    pub on_lost_backup: Option<String>,
    /// `failover`: the backup takes over. `leave`: nothing is done.
    pub on_qemu_crash: Option<String>,
    /// Who may protect the guest again after a failover, in this order.
    pub spares: Vec<String>,
}

impl Policy {
    /// What the element says, if it says anything about it.
    pub(super) fn read(node: &Node) -> Result<Option<Self>, MetadataError> {
        let [lost, crash, spares] = ATTRIBUTES;
        let word = |attribute: &'static str, words: &'static [&'static str]| match node.attribute(attribute) {
            Some(value) if words.contains(&value) => Ok(Some(value.to_owned())),
            Some(other) => Err(not_one_of(PROTECT, attribute, other, words)),
            None => Ok(None),
        };
        let policy = Self {
            on_lost_backup: word(lost, LOST_BACKUP)?,
            on_qemu_crash: word(crash, QEMU_CRASH)?,
            spares: node.attribute(spares).map_or(Ok(Vec::new()), hosts)?,
        };
        Ok((policy != Self::default()).then_some(policy))
    }
}

fn hosts(value: &str) -> Result<Vec<String>, MetadataError> {
    let bad = |expected: String| error::bad(PROTECT, "spares", value, expected);
    let hosts: Vec<String> = value
        .split_whitespace()
        .map(|host| backup(host).map_err(|_| bad(format!("{host:?} is no HOST or HOST:PORT"))))
        .collect::<Result<_, _>>()?;
    if hosts.is_empty() || hosts.len() > MAX_SPARES {
        return Err(bad(format!("give 1 to {MAX_SPARES} hosts, with a space in between")));
    }
    Ok(hosts)
}

/// Every word, for the test that compares the grammar with the schema.
#[cfg(test)]
pub(super) fn words() -> impl Iterator<Item = &'static str> {
    ATTRIBUTES.into_iter().chain(LOST_BACKUP.iter().copied()).chain(QEMU_CRASH.iter().copied())
}
