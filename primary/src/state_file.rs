//! What the agent must remember across restarts: the guests it protects.
//!
//! | bytes | field |
//! |---|---|
//! | 8 | magic `UNDSTPRI` |
//! | 4 | version, little-endian |
//! | n | body: JSON |
//! | 4 | CRC-32 of everything before, little-endian |

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use understudy_proto::ids::GuestId;

const MAGIC: &[u8; 8] = b"UNDSTPRI";
const VERSION: u32 = 1;
const HEAD_BYTES: usize = 12;
const CRC_BYTES: usize = 4;

/// Bytes of the largest state file: a thousand guests with long names.
const MAX_BYTES: u64 = 1 << 20;

/// Name of the file in the state directory.
const NAME: &str = "primary.state";

/// A guest that is to be protected again when the agent comes back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProtectedGuest {
    /// The guest.
    pub guest: GuestId,
    /// Its libvirt name.
    pub name: String,
    /// The backup, as the operator named it.
    pub to: String,
    /// Length of an epoch, in milliseconds.
    pub epoch_ms: u32,
    /// Its owner.
    pub generation: understudy_proto::ids::Generation,
}

/// A state file that cannot be used. It is never overwritten silently.
#[derive(Debug, thiserror::Error)]
pub enum StateFileError {
    /// The system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Damaged, or no state file at all.
    #[error("state file {} cannot be used: {reason}; move it away to start with no protected guests", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

/// The file.
#[derive(Debug, Clone)]
pub struct StateFile {
    path: PathBuf,
}

impl StateFile {
    /// In `state_dir`.
    pub fn new(state_dir: &Path) -> Self {
        Self { path: state_dir.join(NAME) }
    }

    fn io(&self, action: &'static str) -> impl Fn(std::io::Error) -> StateFileError + '_ {
        move |source| StateFileError::Io { action, path: self.path.clone(), source }
    }

    /// Reads it; empty if there is none.
    ///
    /// # Errors
    /// [`StateFileError`]; nothing is guessed.
    pub fn read(&self) -> Result<Vec<ProtectedGuest>, StateFileError> {
        let mut bytes = Vec::new();
        match File::open(&self.path) {
            Ok(file) => file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(self.io("read"))?,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(self.io("open")(error)),
        };
        decode(&bytes).map_err(|reason| StateFileError::Unusable { path: self.path.clone(), reason })
    }

    /// Replaces it; a crash leaves the old one or the new one.
    ///
    /// # Errors
    /// [`StateFileError::Io`].
    pub fn write(&self, guests: &[ProtectedGuest]) -> Result<(), StateFileError> {
        let bytes =
            encode(guests).map_err(|reason| StateFileError::Unusable { path: self.path.clone(), reason })?;
        let folder = self.path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder).map_err(self.io("make the folder of"))?;
        let partial = self.path.with_extension("state.partial");
        let written = File::create(&partial).and_then(|mut file| {
            file.write_all(&bytes)?;
            file.sync_all()
        });
        written.map_err(self.io("write"))?;
        fs::rename(&partial, &self.path).map_err(self.io("replace"))?;
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(self.io("sync the folder of"))
    }
}

fn encode(guests: &[ProtectedGuest]) -> Result<Vec<u8>, String> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&serde_json::to_vec(guests).map_err(|error| error.to_string())?);
    bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
    Ok(bytes)
}

fn decode(bytes: &[u8]) -> Result<Vec<ProtectedGuest>, String> {
    let len = bytes.len();
    if len as u64 > MAX_BYTES || len < HEAD_BYTES + CRC_BYTES {
        return Err(format!("it has {len} bytes, expected {} to {MAX_BYTES}", HEAD_BYTES + CRC_BYTES));
    }
    let (Some((magic, rest)), Some((checked, stored))) =
        (bytes.split_first_chunk::<8>(), bytes.split_last_chunk::<CRC_BYTES>())
    else {
        return Err("it is too short".to_owned());
    };
    if magic != MAGIC {
        return Err(format!("it begins with {magic:02x?}, expected {MAGIC:02x?}"));
    }
    let version = rest.first_chunk::<4>().map_or(0, |version| u32::from_le_bytes(*version));
    if version != VERSION {
        return Err(format!("it has version {version}, this build knows {VERSION}"));
    }
    let (computed, stored) = (crc32fast::hash(checked), u32::from_le_bytes(*stored));
    if computed != stored {
        return Err(format!("its checksum is {computed:08x}, it says {stored:08x}"));
    }
    serde_json::from_slice(&checked[HEAD_BYTES..]).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use understudy_proto::ids::Generation;

    fn guests() -> Vec<ProtectedGuest> {
        vec![ProtectedGuest {
            guest: GuestId(uuid::Uuid::from_u128(7)),
            name: "web".into(),
            to: "beta".into(),
            epoch_ms: 100,
            generation: Generation(2),
        }]
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let file = StateFile::new(&folder.path().join("new"));
        assert_eq!(file.read().unwrap(), []);
        file.write(&guests()).unwrap();
        assert_eq!(file.read().unwrap(), guests());
        file.write(&[]).unwrap();
        assert_eq!(file.read().unwrap(), []);
    }

    #[test]
    fn every_flipped_bit_and_truncation_is_noticed() {
        let good = encode(&guests()).unwrap();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bad).is_err(), "bit {bit}");
        }
        for len in 0..good.len() {
            assert!(decode(&good[..len]).is_err(), "{len} bytes");
        }
    }
}
