//! What a primary agent leaves in its state directory for whoever must know without asking it: which guests it
//! protects, and whether it lives.
//!
//! Only encoding is here; who reads or writes does its own input and output. The primary agent reads the state file when
//! it starts; **the supervisor of the same host reads it when the agent is dead**.
//!
//! The state file, [`STATE_FILE`], names a guest from before the agent touches it until the agent has let it go. It is
//! replaced by renaming, so a reader never sees half a file:
//!
//! | bytes | field |
//! |---|---|
//! | 8 | magic `UNDSTPRI` |
//! | 4 | version, little-endian |
//! | n | body: JSON |
//! | 4 | CRC-32 of everything before, little-endian |
//!
//! The sign of life, [`LIFE_FILE`], is a lock: an agent holds `flock(LOCK_EX)` on it from its start to its end, and the
//! kernel lets go of it with the last of the agent's threads, however it dies. The lock alone counts. The content, the
//! agent's process id as decimal text, only tells whom to wait for. The file is never removed or replaced: a lock on a
//! file that has lost its name would be seen by nobody. No file means that nothing is known.

use serde::{Deserialize, Serialize};

use crate::ids::{Generation, GuestId};
use crate::pace::EpochGoals;
use crate::policy::{GuestPolicy, GuestSettings};

/// Name of the state file, in the state directory.
pub const STATE_FILE: &str = "primary.state";

/// Name of the agent's sign of life, in the state directory.
pub const LIFE_FILE: &str = "primary.life";

/// Bytes of the largest state file: a thousand guests with long names.
pub const MAX_BYTES: usize = 1 << 20;

/// Bytes of the longest process id in a sign of life, with a line feed.
pub const MAX_LIFE_BYTES: usize = 16;

const MAGIC: &[u8; 8] = b"UNDSTPRI";
const VERSION: u32 = 1;
const HEAD_BYTES: usize = 12;
const CRC_BYTES: usize = 4;

/// A guest that is to be protected again when the agent comes back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProtectedGuest {
    /// The guest.
    pub guest: GuestId,
    /// Its libvirt name.
    pub name: String,
    /// The backup, as the operator named it.
    pub to: String,
    /// It is replicated without TLS. A file of before there was TLS does not say so.
    #[serde(default = "yes")]
    pub insecure: bool,
    /// Length of an epoch, in milliseconds.
    pub epoch_ms: u32,
    /// Its owner.
    pub generation: Generation,
    /// Its output is let through as it comes.
    #[serde(default)]
    pub ungated: bool,
    /// Its epochs have the length that fits these goals.
    #[serde(default)]
    pub goals: Option<EpochGoals>,
    /// What its operator has chosen for it.
    #[serde(default)]
    pub policy: GuestPolicy,
}

impl ProtectedGuest {
    /// How it is protected.
    pub fn settings(&self) -> GuestSettings {
        let Self { epoch_ms, goals, ungated, policy, .. } = self.clone();
        GuestSettings { epoch_ms, goals, ungated, policy }
    }
}

fn yes() -> bool {
    true
}

/// A state file that cannot be used, in words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unusable(pub String);

/// The bytes of a state file.
///
/// # Errors
/// If a name cannot be written as JSON.
pub fn encode(guests: &[ProtectedGuest]) -> Result<Vec<u8>, Unusable> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&serde_json::to_vec(guests).map_err(|error| Unusable(error.to_string()))?);
    bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
    Ok(bytes)
}

/// The guests in a state file.
///
/// # Errors
/// [`Unusable`]; nothing is guessed.
pub fn decode(bytes: &[u8]) -> Result<Vec<ProtectedGuest>, Unusable> {
    let len = bytes.len();
    if !(HEAD_BYTES + CRC_BYTES..=MAX_BYTES).contains(&len) {
        return Err(Unusable(format!(
            "it has {len} bytes, expected {} to {MAX_BYTES}",
            HEAD_BYTES + CRC_BYTES
        )));
    }
    let (Some((magic, rest)), Some((checked, stored))) =
        (bytes.split_first_chunk::<8>(), bytes.split_last_chunk::<CRC_BYTES>())
    else {
        return Err(Unusable("it is too short".to_owned()));
    };
    if magic != MAGIC {
        return Err(Unusable(format!("it begins with {magic:02x?}, expected {MAGIC:02x?}")));
    }
    let version = rest.first_chunk::<4>().map_or(0, |version| u32::from_le_bytes(*version));
    if version != VERSION {
        return Err(Unusable(format!("it has version {version}, this build knows {VERSION}")));
    }
    let (computed, stored) = (crc32fast::hash(checked), u32::from_le_bytes(*stored));
    if computed != stored {
        return Err(Unusable(format!("its checksum is {computed:08x}, it says {stored:08x}")));
    }
    serde_json::from_slice(&checked[HEAD_BYTES..]).map_err(|error| Unusable(error.to_string()))
}

/// The process id in a sign of life, if there is one; never 0, which would mean the asker itself.
pub fn process_id(content: &[u8]) -> Option<i32> {
    let text = std::str::from_utf8(content.get(..MAX_LIFE_BYTES.min(content.len()))?).ok()?;
    text.trim_end().parse().ok().filter(|id| *id > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guests() -> Vec<ProtectedGuest> {
        vec![ProtectedGuest {
            guest: GuestId(uuid::Uuid::from_u128(7)),
            name: "web".into(),
            to: "beta".into(),
            insecure: true,
            epoch_ms: 100,
            generation: Generation(2),
            ungated: false,
            goals: Some(EpochGoals { slowdown_permille: Some(50), ..EpochGoals::default() }),
            policy: GuestPolicy { spares: vec!["gamma".into()], ..GuestPolicy::default() },
        }]
    }

    #[test]
    fn every_flipped_bit_and_truncation_is_noticed() {
        let good = encode(&guests()).unwrap();
        assert_eq!(decode(&good), Ok(guests()));
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bad).is_err(), "bit {bit}");
        }
        for len in 0..good.len() {
            assert!(decode(&good[..len]).is_err(), "{len} bytes");
        }
        assert!(decode(&vec![0; MAX_BYTES + 1]).is_err());
    }

    #[test]
    fn a_process_id_is_read_only_if_it_is_one() {
        assert_eq!(process_id(b"4711\n"), Some(4711));
        for nonsense in ["", "\n", "0", "-3", "x", "99999999999", "1 2"] {
            assert_eq!(process_id(nonsense.as_bytes()), None, "{nonsense:?}");
        }
        assert_eq!(process_id(&[b'1'; 40]), None);
    }
}
