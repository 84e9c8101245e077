//! Keeps control files on disk: whole or not at all, and on the disk when the call returns.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use understudy_proto::control::{self, ControlFile};
use understudy_proto::ids::GuestId;

/// Where control files are kept.
pub trait ControlStore: Send + Sync {
    /// Every control file there is, readable or not.
    ///
    /// # Errors
    /// If the place itself cannot be read.
    fn load(&self) -> io::Result<Vec<Result<ControlFile, Unreadable>>>;

    /// Replaces a guest's control file durably.
    ///
    /// # Errors
    /// If it may not be on the disk.
    fn save(&self, file: &ControlFile) -> io::Result<()>;
}

/// A control file that cannot be used. It is left as it is: it may hold a generation.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct Unreadable {
    /// The file.
    pub path: PathBuf,
    /// The guest it is of, if its name says so.
    pub guest: Option<GuestId>,
    /// What is wrong with it.
    pub reason: String,
}

/// Control files in a folder.
#[derive(Debug, Clone)]
pub struct ControlFolder {
    folder: PathBuf,
}

impl ControlFolder {
    /// In the folder [`control::FOLDER`] of `state_dir`, which is made if need be. Left-overs of writes that were cut
    /// short are removed.
    ///
    /// # Errors
    /// If the folder cannot be made or read.
    pub fn open(state_dir: &Path) -> io::Result<Self> {
        let folder = state_dir.join(control::FOLDER);
        fs::create_dir_all(&folder)?;
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.to_string_lossy().ends_with(control::PARTIAL_SUFFIX) {
                fs::remove_file(&path)?;
                tracing::info!(path = %path.display(), "removed a control file that was never completed");
            }
        }
        Ok(Self { folder })
    }
}

impl ControlStore for ControlFolder {
    fn load(&self) -> io::Result<Vec<Result<ControlFile, Unreadable>>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let path = entry?.path();
            let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            let Some(uuid) = name.strip_suffix(".control") else { continue };
            let guest = uuid.parse().ok().map(GuestId);
            let decoded = read_bounded(&path).map_err(|e| e.to_string()).and_then(|bytes| {
                let file = ControlFile::decode(&bytes).map_err(|e| e.to_string())?;
                match guest {
                    Some(g) if g == file.guest => Ok(file),
                    _ => Err(format!("is of guest {}, its name says otherwise", file.guest)),
                }
            });
            files.push(decoded.map_err(|reason| Unreadable { path, guest, reason }));
        }
        Ok(files)
    }

    fn save(&self, file: &ControlFile) -> io::Result<()> {
        let bytes = file.encode().map_err(io::Error::other)?;
        let target = self.folder.join(control::file_name(file.guest));
        let mut partial = target.clone().into_os_string();
        partial.push(control::PARTIAL_SUFFIX);
        let partial = PathBuf::from(partial);
        let mut handle = File::create(&partial)?;
        handle.write_all(&bytes)?;
        handle.sync_all()?;
        fs::rename(&partial, &target)?;
        File::open(&self.folder)?.sync_all()
    }
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let size_bytes = fs::metadata(path)?.len();
    if size_bytes > control::MAX_BYTES as u64 {
        return Err(io::Error::other(format!("has {size_bytes} bytes, the limit is {}", control::MAX_BYTES)));
    }
    fs::read(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use understudy_proto::control::Role;
    use understudy_proto::ids::{EpochId, Generation, Incarnation};

    fn file(guest: u128, generation: u64) -> ControlFile {
        ControlFile {
            guest: GuestId(uuid::Uuid::from_u128(guest)),
            name: "web".into(),
            role: Role::Standby,
            generation: Generation(generation),
            last_committed: Some(EpochId(5)),
            primary_host: "alpha".into(),
            incarnation: Incarnation(uuid::Uuid::from_u128(1)),
        }
    }

    #[test]
    fn what_is_saved_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let store = ControlFolder::open(dir.path()).unwrap();
        store.save(&file(1, 1)).unwrap();
        store.save(&file(2, 7)).unwrap();
        store.save(&file(1, 2)).unwrap();
        let mut loaded: Vec<_> = store.load().unwrap().into_iter().map(Result::unwrap).collect();
        loaded.sort_by_key(|f| f.guest);
        assert_eq!(loaded, [file(1, 2), file(2, 7)]);
    }

    #[test]
    fn a_write_cut_short_leaves_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        ControlFolder::open(dir.path()).unwrap().save(&file(1, 4)).unwrap();
        let path = dir.path().join(control::FOLDER).join(control::file_name(file(1, 1).guest));
        let partial = path.with_extension("control.partial");
        fs::write(&partial, &file(1, 9).encode().unwrap()[..30]).unwrap();
        let store = ControlFolder::open(dir.path()).unwrap();
        assert!(!partial.exists());
        assert_eq!(store.load().unwrap().remove(0).unwrap(), file(1, 4));
    }

    #[test]
    fn damage_is_reported_with_path_and_guest_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let store = ControlFolder::open(dir.path()).unwrap();
        store.save(&file(1, 4)).unwrap();
        let path = dir.path().join(control::FOLDER).join(control::file_name(file(1, 1).guest));
        let good = fs::read(&path).unwrap();
        let mut flipped = good.clone();
        flipped[20] ^= 1;
        let mut newer = good.clone();
        newer[8] = 9;
        for (bytes, reason) in [
            (b"garbage!garbage!garbage!".to_vec(), "begins with"),
            (newer, "version 9"),
            (flipped, "damaged"),
            (good[..good.len() - 2].to_vec(), "expected"),
            (vec![], "0 bytes"),
            (file(2, 4).encode().unwrap(), "its name says otherwise"),
        ] {
            fs::write(&path, &bytes).unwrap();
            let unreadable = store.load().unwrap().remove(0).unwrap_err();
            assert!(unreadable.reason.contains(reason), "{unreadable}");
            assert_eq!((unreadable.guest, &unreadable.path), (Some(file(1, 1).guest), &path));
            assert_eq!(fs::read(&path).unwrap(), bytes);
        }
    }
}
