//! What an operator has chosen for one guest, and a host must know that protects it later.

use serde::{Deserialize, Serialize};

use crate::ProtocolError;
use crate::pace::EpochGoals;

/// What is done when the backup is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LostBackup {
    /// The guest runs on and its output waits for a backup: nothing is ever unprotected.
    #[default]
    Hold,
    /// The guest is taken from the backup at the arbiter and its output let go: it runs unprotected.
    Solo,
}

/// What is done when the guest's QEMU fails while its host lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QemuCrash {
    /// As if the host had failed: the backup takes over.
    #[default]
    Failover,
    /// It is an end of the guest: nothing takes over.
    Leave,
}

impl LostBackup {
    /// Every value with its word.
    pub const WORDS: [(Self, &'static str); 2] = [(Self::Hold, "hold"), (Self::Solo, "solo")];
}

impl QemuCrash {
    /// Every value with its word.
    pub const WORDS: [(Self, &'static str); 2] = [(Self::Failover, "failover"), (Self::Leave, "leave")];
}

/// The word of a value; empty for none.
#[cfg(any(feature = "rpc", test))]
pub(crate) fn word<T: Copy + PartialEq>(words: &[(T, &'static str)], value: Option<T>) -> &'static str {
    words.iter().find(|(one, _)| Some(*one) == value).map_or("", |(_, word)| word)
}

/// The value of a word; none of an empty one.
#[cfg(any(feature = "rpc", test))]
pub(crate) fn valued<T: Copy>(
    field: &'static str,
    words: &[(T, &'static str)],
    word: &str,
) -> Result<Option<T>, ProtocolError> {
    if word.is_empty() {
        return Ok(None);
    }
    let found = words.iter().find(|(_, one)| *one == word).map(|(value, _)| *value);
    found.map(Some).ok_or_else(|| {
        let known: Vec<&str> = words.iter().map(|(_, word)| *word).collect();
        ProtocolError::invalid(field, format!("{word:?}, expected {}", known.join(" or ")))
    })
}

/// What differs from the defaults of the watchdogs.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct GuestPolicy {
    /// When the backup is lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_lost_backup: Option<LostBackup>,
    /// When QEMU fails.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_qemu_crash: Option<QemuCrash>,
    /// Who may protect it again, in this order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub spares: Vec<String>,
}

/// Spares of a guest.
pub const MAX_SPARES: usize = 8;

/// Bytes of all their names: they travel in heartbeats.
pub const MAX_SPARES_BYTES: usize = 512;

/// Bytes of the longest [`GuestSettings::encode`].
pub const MAX_SETTINGS_BYTES: usize = 900;

impl GuestPolicy {
    /// This one, if it can be meant.
    ///
    /// # Errors
    /// What is wrong with the spares.
    pub fn checked(self) -> Result<Self, ProtocolError> {
        ProtocolError::check_len("number of spares", self.spares.len() as u64, MAX_SPARES as u64)?;
        let bytes: usize = self.spares.iter().map(String::len).sum();
        ProtocolError::check_len("bytes of the spares' names", bytes as u64, MAX_SPARES_BYTES as u64)?;
        let fine = |byte: u8| byte.is_ascii_alphanumeric() || b".-_:[]%".contains(&byte);
        match self.spares.iter().find(|name| name.is_empty() || !name.bytes().all(fine)) {
            Some(name) => {
                Err(ProtocolError::invalid("spare", format!("{name:?}, expected HOST or HOST:PORT")))
            }
            None => Ok(self),
        }
    }
}

/// How a guest is protected, apart from by whom: what protects it again begins with it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct GuestSettings {
    /// Length of an epoch; with goals the first one.
    pub epoch_ms: u32,
    /// Epochs have the length that fits these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub goals: Option<EpochGoals>,
    /// Output is let through as it comes.
    #[serde(default)]
    pub ungated: bool,
    /// Choices of the operator.
    #[serde(default)]
    pub policy: GuestPolicy,
}

impl GuestSettings {
    /// As bytes, for a heartbeat or a file.
    ///
    /// # Errors
    /// If they are too many.
    pub fn encode(&self) -> Result<Vec<u8>, ProtocolError> {
        let wrong = |error: serde_json::Error| ProtocolError::invalid("guest settings", error.to_string());
        let bytes = serde_json::to_vec(self).map_err(wrong)?;
        ProtocolError::check_len("guest settings bytes", bytes.len() as u64, MAX_SETTINGS_BYTES as u64)?;
        Ok(bytes)
    }

    /// What was encoded.
    ///
    /// # Errors
    /// If it is none, or cannot be meant.
    pub fn decode(bytes: &[u8]) -> Result<Self, ProtocolError> {
        ProtocolError::check_len("guest settings bytes", bytes.len() as u64, MAX_SETTINGS_BYTES as u64)?;
        let settings: Self = serde_json::from_slice(bytes)
            .map_err(|error| ProtocolError::invalid("guest settings", error.to_string()))?;
        let goals = settings.goals.map(EpochGoals::checked).transpose()?;
        Ok(Self { goals, policy: settings.policy.clone().checked()?, ..settings })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_back_and_what_nobody_means_is_refused() {
        let long = vec!["x".repeat(MAX_SPARES_BYTES / MAX_SPARES); MAX_SPARES];
        let policy = GuestPolicy {
            on_lost_backup: Some(LostBackup::Solo),
            on_qemu_crash: Some(QemuCrash::Leave),
            spares: long,
        };
        let goals = EpochGoals {
            latency_ms: Some(60_000),
            slowdown_permille: Some(900),
            bandwidth_bytes: Some(u64::MAX),
        };
        let most = GuestSettings { epoch_ms: 60_000, goals: Some(goals), ungated: true, policy };
        for settings in [most.clone(), GuestSettings::default()] {
            assert_eq!(GuestSettings::decode(&settings.encode().unwrap()).unwrap(), settings);
        }
        for spares in [vec![String::new()], vec!["a b".into()], vec!["c".into(); MAX_SPARES + 1]] {
            let policy = GuestPolicy { spares, ..most.policy.clone() };
            assert!(policy.clone().checked().is_err(), "{policy:?}");
            let bad = GuestSettings { policy, ..most.clone() };
            assert!(GuestSettings::decode(&bad.encode().unwrap()).is_err());
        }
        assert!(GuestSettings::decode(b"{}").is_err());
    }

    #[test]
    fn words_are_those_of_the_values() {
        for (value, text) in LostBackup::WORDS {
            assert_eq!(word(&LostBackup::WORDS, Some(value)), text);
            assert_eq!(valued("x", &LostBackup::WORDS, text).unwrap(), Some(value));
        }
        assert_eq!(valued("x", &QemuCrash::WORDS, "").unwrap(), None);
        let error = valued("on-qemu-crash", &QemuCrash::WORDS, "fail").unwrap_err().to_string();
        assert!(error.contains("failover or leave"), "{error}");
    }
}
