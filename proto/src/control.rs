//! The control file: the little a backup agent must remember of a guest across restarts, above all its generation.
//!
//! Only encoding is here; who reads or writes one does its own input and output. The backup agent writes
//! [`file_name`] in the folder [`FOLDER`] of the state directory. **The primary agent of the same host reads it when
//! it protects a guest**: after a promotion here it is the only place that knows the generation to protect with. A
//! primary starts with the highest of
//! - 1,
//! - the generation in the local control file (whatever its role; if the role is `standby` or `promoting` the
//!   guest belongs to another host and must not be protected from here),
//! - the generation in the probe reply of the backup, if its role there is `released`.
//!
//! | bytes | field |
//! |---|---|
//! | 8 | magic `UNDSTCTL` |
//! | 4 | version, little-endian |
//! | 4 | bytes of the body, little-endian |
//! | n | body: JSON |
//! | 4 | CRC-32 of everything before, little-endian |
//!
//! Writers write `NAME.partial`, sync it, rename it and sync the folder, so a reader never sees half a file.
//! Magic, version and checksum lie outside the body: they are judged before anything is parsed.

use crate::ids::{EpochId, Generation, GuestId, Incarnation};
use serde::{Deserialize, Serialize};

/// Folder of the control files, in the state directory.
pub const FOLDER: &str = "guests";

/// Suffix of a file that is being written.
pub const PARTIAL_SUFFIX: &str = ".partial";

/// Version written by this build.
pub const VERSION: u32 = 1;

/// Bytes of the largest control file; a real one has below 1 KiB.
pub const MAX_BYTES: usize = 64 << 10;

const MAGIC: &[u8; 8] = b"UNDSTCTL";
const HEAD_BYTES: usize = 16;
const CRC_BYTES: usize = 4;

/// Name of a guest's control file.
pub fn file_name(guest: GuestId) -> String {
    format!("{guest}.control")
}

/// What a backup is for a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Holds, or held before a restart, an image of a guest that runs elsewhere.
    Standby,
    /// A promotion was begun: the guest may or may not run here.
    Promoting,
    /// The guest was promoted here.
    Promoted,
    /// The guest was promoted here and has since got a newer owner, named by the generation.
    Stale,
    /// Protection ended; only the generation is remembered.
    Released,
}

impl Role {
    /// A word for it.
    pub fn label(self) -> &'static str {
        match self {
            Self::Standby => "standby",
            Self::Promoting => "promoting",
            Self::Promoted => "promoted",
            Self::Stale => "stale",
            Self::Released => "released",
        }
    }
}

/// The content of a control file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlFile {
    /// The guest.
    pub guest: GuestId,
    /// Its libvirt name when last heard.
    pub name: String,
    /// What this host's backup is for it.
    pub role: Role,
    /// The newest generation known here; never goes back.
    pub generation: Generation,
    /// The last committed epoch. May lag behind what was acknowledged: it is written at role changes, at full
    /// commits, at most every second otherwise, and at shutdown. It says nothing about an image being there:
    /// an image does not outlive its agent.
    pub last_committed: Option<EpochId>,
    /// Host of the primary last heard from.
    pub primary_host: String,
    /// The life of the backup agent that wrote the file.
    pub incarnation: Incarnation,
}

/// A control file that cannot be used. It is never overwritten silently: it may hold a generation.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Shorter than a header, its body or its checksum.
    #[error("control file has {present_bytes} bytes, expected {expected_bytes}")]
    Length {
        /// Bytes there are.
        present_bytes: usize,
        /// Bytes its header announces, or a header has.
        expected_bytes: usize,
    },
    /// Longer than any control file.
    #[error("control file has {present_bytes} bytes, the limit is {MAX_BYTES}")]
    TooLarge {
        /// Bytes there are.
        present_bytes: usize,
    },
    /// Not a control file.
    #[error("control file begins with {found:02x?}, expected {MAGIC:02x?}")]
    Magic {
        /// Its first bytes.
        found: [u8; 8],
    },
    /// Written by a newer build.
    #[error("control file has version {found}, this build knows up to {VERSION}; upgrade Understudy")]
    Version {
        /// The version in the file.
        found: u32,
    },
    /// Damaged.
    #[error("control file is damaged: its checksum is {computed:08x}, it says {stored:08x}")]
    Checksum {
        /// Over the bytes there are.
        computed: u32,
        /// At its end.
        stored: u32,
    },
    /// The body does not parse although its checksum is right.
    #[error("control file body is not understood: {reason}")]
    Body {
        /// What the parser says.
        reason: String,
    },
}

impl ControlFile {
    /// The bytes of the file.
    ///
    /// # Errors
    /// [`ControlError::TooLarge`] if a name in it is absurdly long.
    pub fn encode(&self) -> Result<Vec<u8>, ControlError> {
        let body = serde_json::to_vec(self).map_err(|e| ControlError::Body { reason: e.to_string() })?;
        let present_bytes = HEAD_BYTES + body.len() + CRC_BYTES;
        let body_bytes = u32::try_from(body.len())
            .ok()
            .filter(|_| present_bytes <= MAX_BYTES)
            .ok_or(ControlError::TooLarge { present_bytes })?;
        let mut bytes = Vec::with_capacity(present_bytes);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&body_bytes.to_le_bytes());
        bytes.extend_from_slice(&body);
        bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
        Ok(bytes)
    }

    /// Reads the bytes of a file of this or an earlier version.
    ///
    /// # Errors
    /// If anything about it is not as expected; nothing is guessed.
    pub fn decode(bytes: &[u8]) -> Result<Self, ControlError> {
        let present_bytes = bytes.len();
        if present_bytes > MAX_BYTES {
            return Err(ControlError::TooLarge { present_bytes });
        }
        let Some((magic, rest)) = bytes.split_first_chunk::<8>() else {
            return Err(ControlError::Length { present_bytes, expected_bytes: HEAD_BYTES + CRC_BYTES });
        };
        if magic != MAGIC {
            return Err(ControlError::Magic { found: *magic });
        }
        let (Some((version, rest)), Some((checked, stored))) =
            (rest.split_first_chunk::<4>(), bytes.split_last_chunk::<CRC_BYTES>())
        else {
            return Err(ControlError::Length { present_bytes, expected_bytes: HEAD_BYTES + CRC_BYTES });
        };
        let version = u32::from_le_bytes(*version);
        let Some((body_bytes, rest)) = rest.split_first_chunk::<4>() else {
            return Err(ControlError::Length { present_bytes, expected_bytes: HEAD_BYTES + CRC_BYTES });
        };
        // A newer version may lay out the rest differently, so it is named before anything else is checked.
        if version == 0 || version > VERSION {
            return Err(ControlError::Version { found: version });
        }
        let expected_bytes =
            (u32::from_le_bytes(*body_bytes) as usize).saturating_add(HEAD_BYTES + CRC_BYTES);
        if expected_bytes != present_bytes {
            return Err(ControlError::Length { present_bytes, expected_bytes });
        }
        let (computed, stored) = (crc32fast::hash(checked), u32::from_le_bytes(*stored));
        if computed != stored {
            return Err(ControlError::Checksum { computed, stored });
        }
        let body = &rest[..rest.len() - CRC_BYTES];
        // Bodies of earlier versions are converted here, one step per version.
        serde_json::from_slice(body).map_err(|e| ControlError::Body { reason: e.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> ControlFile {
        ControlFile {
            guest: GuestId(uuid::Uuid::from_u128(7)),
            name: "web".into(),
            role: Role::Standby,
            generation: Generation(3),
            last_committed: Some(EpochId(41)),
            primary_host: "alpha".into(),
            incarnation: Incarnation(uuid::Uuid::from_u128(9)),
        }
    }

    #[test]
    fn round_trip() {
        for last_committed in [None, Some(EpochId(0)), Some(EpochId(u64::MAX - 1))] {
            let file = ControlFile { last_committed, ..sample() };
            assert_eq!(ControlFile::decode(&file.encode().unwrap()).unwrap(), file);
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let good = sample().encode().unwrap();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(ControlFile::decode(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn every_truncation_is_noticed() {
        let good = sample().encode().unwrap();
        for len in 0..good.len() {
            assert!(ControlFile::decode(&good[..len]).is_err(), "{len} bytes");
        }
        assert!(ControlFile::decode(&[good.as_slice(), &[0]].concat()).is_err());
    }

    #[test]
    fn errors_say_what_is_wrong() {
        let good = sample().encode().unwrap();
        let text = |bytes: &[u8]| ControlFile::decode(bytes).unwrap_err().to_string();
        let mut newer = good.clone();
        newer[8] = 2;
        assert_eq!(text(&newer), "control file has version 2, this build knows up to 1; upgrade Understudy");
        assert_eq!(text(&good[..3]), "control file has 3 bytes, expected 20");
        assert!(text(b"something else entirely").starts_with("control file begins with [73, 6f"));
        assert!(text(&vec![0; MAX_BYTES + 1]).ends_with("the limit is 65536"));
        let mut damaged = good.clone();
        damaged[HEAD_BYTES + 1] ^= 0x20;
        assert!(text(&damaged).starts_with("control file is damaged"));
    }
}
