//! Which guests the agent protects: its state file; see [`understudy_proto::protected`].

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use understudy_proto::protected::{MAX_BYTES, ProtectedGuest, STATE_FILE, Unusable, decode};

/// Why the guests are not known.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The system refused.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: std::path::PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Damaged, or written by another version.
    #[error("state file {} cannot be used: {source}", path.display())]
    Unusable {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong with it.
        source: Unusable,
    },
}

/// The guests in the state file; none if there is no file.
///
/// # Errors
/// [`RecordError`].
pub fn read(state_dir: &Path) -> Result<Vec<ProtectedGuest>, RecordError> {
    let path = state_dir.join(STATE_FILE);
    let mut bytes = Vec::new();
    match File::open(&path).and_then(|file| file.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes)) {
        Ok(_) => decode(&bytes).map_err(|source| RecordError::Unusable { path, source }),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(RecordError::Io { path, source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_damaged_is_not_taken_for_an_empty_one() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read(folder.path()).unwrap(), []);
        std::fs::write(folder.path().join(STATE_FILE), "UNDSTPRI").unwrap();
        let error = read(folder.path()).unwrap_err().to_string();
        assert!(error.contains("primary.state cannot be used: it has 8 bytes"), "{error}");
    }
}
