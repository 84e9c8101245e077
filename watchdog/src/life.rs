//! Whether the primary agent lives: a lock that the kernel lets go of when it dies; see [`understudy_proto::protected`].

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use understudy_proto::protected::{LIFE_FILE, MAX_LIFE_BYTES, process_id};

use crate::bound::NOTICE;

/// A process that has ended lets go of its lock within microseconds.
const SETTLE: Duration = Duration::from_millis(2);

/// What the sign of life says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// There is no sign of life, not even an old one: nothing is known.
    Unknown,
    /// An agent lives.
    Alive,
    /// There was an agent and now there is none.
    Dead,
}

/// Looks once.
///
/// # Errors
/// If the file cannot be opened or locked; then nothing is known.
pub fn probe(state_dir: &Path) -> std::io::Result<Life> {
    let file = match File::open(state_dir.join(LIFE_FILE)) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Life::Unknown),
        Err(error) => return Err(error),
    };
    held(&file).map(|held| if held { Life::Alive } else { Life::Dead })
}

/// Whether an agent holds the lock. If none does it is held here for a moment, which an agent that starts waits out.
fn held(file: &File) -> std::io::Result<bool> {
    loop {
        match flock(file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => return flock(file, FlockOperation::Unlock).map(|()| false).map_err(Into::into),
            Err(Errno::WOULDBLOCK) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Tells every change, first what it is now, until `tell` gives false. Blocks.
pub fn watch(state_dir: &Path, mut tell: impl FnMut(Life) -> bool) {
    let mut last = None;
    let mut failed = false;
    loop {
        let life = match probe(state_dir) {
            Ok(life) => {
                failed = false;
                life
            }
            Err(error) => {
                if !failed {
                    tracing::error!(%error, folder = %state_dir.display(), "the agent's sign of life cannot be looked at");
                }
                failed = true;
                Life::Unknown
            }
        };
        if last != Some(life) && !tell(life) {
            return;
        }
        last = Some(life);
        match (life, process(state_dir)) {
            (Life::Alive, Some(process)) => wait_for_end(&process),
            _ => std::thread::sleep(NOTICE),
        }
    }
}

/// The process that says it holds the lock. It may be another by now: the lock alone counts.
fn process(state_dir: &Path) -> Option<OwnedFd> {
    let mut content = Vec::new();
    let file = File::open(state_dir.join(LIFE_FILE)).ok()?;
    file.take(MAX_LIFE_BYTES as u64).read_to_end(&mut content).ok()?;
    pidfd_open(Pid::from_raw(process_id(&content)?)?, PidfdFlags::empty()).ok()
}

/// At most until the next look is due.
fn wait_for_end(process: &OwnedFd) {
    let timeout = Timespec::try_from(NOTICE).ok();
    match poll(&mut [PollFd::new(process, PollFlags::IN)], timeout.as_ref()) {
        Ok(0) | Err(Errno::INTR) => {}
        // Ended; or the lock is another's, and looking again at once would find that again.
        _ => std::thread::sleep(SETTLE),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};
    use std::sync::mpsc::channel;

    use super::*;

    fn lock(folder: &Path) -> File {
        let file = File::options().create(true).append(true).open(folder.join(LIFE_FILE)).unwrap();
        flock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
        file
    }

    #[test]
    fn the_lock_alone_counts() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(probe(folder.path()).unwrap(), Life::Unknown);
        let held = lock(folder.path());
        assert_eq!(probe(folder.path()).unwrap(), Life::Alive);
        drop(held);
        assert_eq!(probe(folder.path()).unwrap(), Life::Dead);
        // Looking leaves no lock behind.
        drop(lock(folder.path()));
        assert!(probe(Path::new("/dev/null")).is_err());
    }

    #[test]
    fn changes_are_told_whoever_the_file_names() {
        const LIMIT: Duration = Duration::from_secs(60);
        let folder = tempfile::tempdir().unwrap();
        // A process that lives and one that has ended: neither is the one that holds the lock.
        let mut ended = Command::new("true").stdin(Stdio::null()).spawn().unwrap();
        ended.wait().unwrap();
        for id in [ended.id(), std::process::id()] {
            let mut held = lock(folder.path());
            held.set_len(0).unwrap();
            writeln!(held, "{id}").unwrap();
            let (tell, told) = channel();
            let path = folder.path().to_owned();
            let watching = std::thread::spawn(move || watch(&path, |life| tell.send(life).is_ok()));
            assert_eq!(told.recv_timeout(LIMIT), Ok(Life::Alive));
            drop(held);
            assert_eq!(told.recv_timeout(LIMIT), Ok(Life::Dead));
            let held = lock_when_free(folder.path());
            assert_eq!(told.recv_timeout(LIMIT), Ok(Life::Alive));
            assert_eq!(told.try_recv().err(), Some(std::sync::mpsc::TryRecvError::Empty));
            drop(told);
            drop(held);
            watching.join().unwrap();
        }
    }

    /// The watcher may just be looking.
    fn lock_when_free(folder: &Path) -> File {
        let file = File::options().append(true).open(folder.join(LIFE_FILE)).unwrap();
        flock(&file, FlockOperation::LockExclusive).unwrap();
        file
    }
}
