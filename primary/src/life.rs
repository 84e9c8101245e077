//! The agent's sign of life: a lock that the kernel lets go of when the agent dies, however it dies. The supervisor
//! (`understudy-watchdog`) looks at it; see [`understudy_proto::protected`].

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use understudy_proto::protected::LIFE_FILE;

/// How long a lock that others hold is waited for: a supervisor that looks holds it for microseconds, a predecessor
/// that ends for as long as its guests take.
const TAKE_LIMIT: Duration = Duration::from_secs(2);
const TAKE_AGAIN: Duration = Duration::from_millis(5);

/// Why there is no sign of life.
#[derive(Debug, thiserror::Error)]
pub enum LifeError {
    /// Somebody else has it.
    #[error(
        "another process holds {}: an understudy-primary with the same --state-dir runs already; end that one first",
        path.display()
    )]
    Held {
        /// The file.
        path: PathBuf,
    },
    /// The system refused.
    #[error("cannot {action} {}: {source}; without it no supervisor sees this agent die", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
}

/// Shows that this process lives, until it is dropped. Keep it for as long as a guest may be touched.
#[derive(Debug)]
pub struct SignOfLife {
    _locked: File,
}

impl SignOfLife {
    /// Takes it, waiting up to two seconds for a predecessor that is ending. Blocks.
    ///
    /// # Errors
    /// [`LifeError::Held`] if there is another agent, [`LifeError::Io`] if the folder does not let it.
    pub fn take(state_dir: &Path) -> Result<Self, LifeError> {
        let path = state_dir.join(LIFE_FILE);
        let io = |action| {
            let path = path.clone();
            move |source| LifeError::Io { action, path, source }
        };
        fs::create_dir_all(state_dir).map_err(io("make the folder of"))?;
        // Not emptied before it is ours: it may be somebody's.
        let opened = File::options().create(true).truncate(false).read(true).write(true).open(&path);
        let mut file = opened.map_err(io("open"))?;
        let deadline = Instant::now() + TAKE_LIMIT;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(Errno::WOULDBLOCK) if Instant::now() < deadline => std::thread::sleep(TAKE_AGAIN),
                Err(Errno::WOULDBLOCK) => return Err(LifeError::Held { path }),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(io("lock")(errno.into())),
            }
        }
        file.set_len(0).map_err(io("empty"))?;
        writeln!(file, "{}", std::process::id()).map_err(io("write"))?;
        Ok(Self { _locked: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use understudy_proto::protected::process_id;

    #[test]
    fn there_is_one_at_a_time_and_it_says_whose_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let state_dir = folder.path().join("new");
        let first = SignOfLife::take(&state_dir).unwrap();
        let content = fs::read(state_dir.join(LIFE_FILE)).unwrap();
        assert_eq!(process_id(&content), i32::try_from(std::process::id()).ok());
        assert!(matches!(SignOfLife::take(&state_dir), Err(LifeError::Held { .. })));
        drop(first);
        SignOfLife::take(&state_dir).unwrap();
    }
}
