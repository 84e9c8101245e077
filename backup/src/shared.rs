//! The memory of a waiting standby, in files that this process maps as well: what is written there is the standby's,
//! without another copy.

use rustix::fs::{FallocateFlags, fallocate, fstat, fstatfs};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use understudy_proto::layout::MemoryLayout;
use understudy_proto::units::BlockIndex;

/// File system type of tmpfs, as `fstatfs` gives it.
const TMPFS_MAGIC: u64 = 0x0102_1994;
/// And of hugetlbfs.
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// One RAM block in a file.
#[derive(Debug)]
pub struct SharedFile {
    /// Name of the RAM block.
    pub name: String,
    /// Where it begins within the guest's memory region, bytes.
    pub address: u64,
    path: PathBuf,
    file: File,
    bytes: u64,
}

/// All RAM blocks that a standby has in files. Two of them are the same only if they are the same value.
#[derive(Debug)]
pub struct SharedMemory {
    files: Vec<SharedFile>,
}

impl SharedFile {
    /// Opens the file of a block.
    ///
    /// # Errors
    /// In words: if it cannot be opened, is smaller than the block, or is not in memory.
    pub fn open(name: String, address: u64, path: &Path, bytes: u64) -> Result<Self, String> {
        let shown = path.display();
        let file = File::options()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|e| format!("the memory file {shown} cannot be opened: {e}"))?;
        let (stat, fs) = fstat(&file)
            .and_then(|stat| fstatfs(&file).map(|fs| (stat, fs)))
            .map_err(|e| format!("the memory file {shown}: {e}"))?;
        match u64::try_from(fs.f_type) {
            Ok(TMPFS_MAGIC) => (),
            Ok(HUGETLBFS_MAGIC) => {
                return Err(format!("the memory file {shown} is on hugetlbfs, which is not supported"));
            }
            _ => {
                return Err(format!(
                    "the memory file {shown} is not on tmpfs; set memory_backing_dir in libvirt's qemu.conf to a \
                     directory on one"
                ));
            }
        }
        if u64::try_from(stat.st_size).unwrap_or_default() < bytes {
            return Err(format!("the memory file {shown} has {} bytes, the block has {bytes}", stat.st_size));
        }
        Ok(Self { name, address, path: path.to_owned(), file, bytes })
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Makes sure that a part of the file has its pages.
    ///
    /// # Errors
    /// If there is no room for them.
    pub fn reserve(&self, from_bytes: u64, len_bytes: u64) -> io::Result<()> {
        Ok(fallocate(&self.file, FallocateFlags::empty(), from_bytes, len_bytes)?)
    }

    /// Gives the pages of a part of the file back.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn release(&self, from_bytes: u64, len_bytes: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(fallocate(&self.file, flags, from_bytes, len_bytes)?)
    }

    /// Whether the file still has a name: libvirt removes it when the domain ends.
    fn is_there(&self) -> bool {
        fstat(&self.file).is_ok_and(|stat| stat.st_nlink > 0)
    }
}

impl SharedMemory {
    /// Of these files.
    pub fn new(files: Vec<SharedFile>) -> Self {
        Self { files }
    }

    /// The file of each block that has one.
    ///
    /// # Errors
    /// In words: if a file belongs to no block of the layout, or is smaller than its block there.
    pub fn fit(&self, layout: &MemoryLayout) -> Result<Vec<(BlockIndex, &SharedFile)>, String> {
        self.files
            .iter()
            .map(|file| {
                let found = layout.block_by_name(file.name.as_bytes());
                let used = found.and_then(|index| layout.block(index)).map(|block| block.used_bytes);
                match (found, used) {
                    (Some(index), Some(used)) if used <= file.bytes => Ok((index, file)),
                    (_, Some(used)) => Err(format!(
                        "RAM block {} has {used} bytes, its file {} has {}",
                        file.name,
                        file.path.display(),
                        file.bytes
                    )),
                    _ => Err(format!("the guest has no RAM block {}, the standby has", file.name)),
                }
            })
            .collect()
    }

    /// What the files take of the host's memory, bytes.
    pub fn resident_bytes(&self) -> u64 {
        let blocks =
            |f: &SharedFile| fstat(&f.file).map_or(0, |stat| u64::try_from(stat.st_blocks).unwrap_or(0));
        self.files.iter().map(blocks).sum::<u64>() * 512
    }

    /// Whether the domain whose memory this is still has it.
    pub fn is_there(&self) -> bool {
        self.files.iter().all(SharedFile::is_there)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use understudy_proto::layout::RamBlock;

    #[test]
    fn files_that_cannot_be_shared_say_why() {
        let tmpfs = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = tmpfs.path().join("pc.ram");
        let open = |path: &Path, bytes| SharedFile::open("pc.ram".into(), 0, path, bytes);
        assert!(open(&path, 4096).unwrap_err().contains("cannot be opened"));
        std::fs::write(&path, [0; 8192]).unwrap();
        assert!(open(&path, 12288).unwrap_err().contains("has 8192 bytes"));
        let memory = SharedMemory::new(vec![open(&path, 8192).unwrap()]);
        let layout = |name: &str, pages: u64| {
            let block = RamBlock { name: name.into(), used_bytes: pages * 4096 };
            MemoryLayout::new(vec![block], vec![], 2).unwrap()
        };
        assert_eq!(memory.fit(&layout("pc.ram", 2)).unwrap().len(), 1);
        assert!(memory.fit(&layout("pc.ram", 3)).unwrap_err().contains("12288"));
        assert!(memory.fit(&layout("mach-virt.ram", 2)).unwrap_err().contains("no RAM block pc.ram"));
        assert!(memory.is_there());
        std::fs::remove_file(&path).unwrap();
        assert!(!memory.is_there());
        // /proc is no place for memory, on any machine.
        assert!(open(Path::new("/proc/self/oom_score_adj"), 0).unwrap_err().contains("not on tmpfs"));
    }
}
