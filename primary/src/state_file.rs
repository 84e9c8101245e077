//! What the agent must remember across restarts: the guests it protects. The bytes are [`understudy_proto::protected`]'s.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

pub use understudy_proto::protected::ProtectedGuest;
use understudy_proto::protected::{self, MAX_BYTES, STATE_FILE};

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
        Self { path: state_dir.join(STATE_FILE) }
    }

    fn io(&self, action: &'static str) -> impl Fn(std::io::Error) -> StateFileError + '_ {
        move |source| StateFileError::Io { action, path: self.path.clone(), source }
    }

    fn unusable(&self, unusable: &protected::Unusable) -> StateFileError {
        StateFileError::Unusable { path: self.path.clone(), reason: unusable.to_string() }
    }

    /// Reads it; empty if there is none.
    ///
    /// # Errors
    /// [`StateFileError`]; nothing is guessed.
    pub fn read(&self) -> Result<Vec<ProtectedGuest>, StateFileError> {
        let mut bytes = Vec::new();
        match File::open(&self.path) {
            Ok(file) => file.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(self.io("read"))?,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(self.io("open")(error)),
        };
        protected::decode(&bytes).map_err(|unusable| self.unusable(&unusable))
    }

    /// Replaces it; a crash leaves the old one or the new one.
    ///
    /// # Errors
    /// [`StateFileError::Io`].
    pub fn write(&self, guests: &[ProtectedGuest]) -> Result<(), StateFileError> {
        let bytes = protected::encode(guests).map_err(|unusable| self.unusable(&unusable))?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use understudy_proto::ids::{Generation, GuestId};

    fn guests() -> Vec<ProtectedGuest> {
        vec![ProtectedGuest {
            guest: GuestId(uuid::Uuid::from_u128(7)),
            name: "web".into(),
            to: "beta".into(),
            insecure: true,
            epoch_ms: 100,
            generation: Generation(2),
            ungated: false,
            goals: None,
            policy: understudy_proto::policy::GuestPolicy::default(),
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
}
