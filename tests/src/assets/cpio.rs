//! A writer of the `newc` archives the kernel unpacks as initramfs.

use std::io::{self, Write};

/// Sizes have eight hexadecimal digits in a header.
const MAX_FILE_BYTES: usize = u32::MAX as usize;

/// Writes one archive.
pub(crate) struct Archive<W> {
    out: W,
    entries: u32,
}

impl<W: Write> Archive<W> {
    pub(crate) fn new(out: W) -> Self {
        Self { out, entries: 0 }
    }

    pub(crate) fn folder(&mut self, path: &str) -> io::Result<()> {
        self.entry(path, 0o040_755, &[])
    }

    pub(crate) fn program(&mut self, path: &str, content: &[u8]) -> io::Result<()> {
        self.entry(path, 0o100_755, content)
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        if content.len() > MAX_FILE_BYTES {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{path} is too long for an archive"),
            ));
        }
        self.entries += 1;
        let (inode, links) = (self.entries, 1);
        let (bytes, name) = (content.len(), path.len() + 1);
        // magic, inode, mode, uid, gid, links, mtime, size, device x2, rdevice x2, name, check
        write!(
            self.out,
            "070701{inode:08x}{mode:08x}{0:08x}{0:08x}{links:08x}{0:08x}{bytes:08x}{0:08x}{0:08x}{0:08x}{0:08x}{name:08x}{0:08x}",
            0
        )?;
        self.out.write_all(path.as_bytes())?;
        self.pad(&[0], 110 + name)?;
        self.out.write_all(content)?;
        self.pad(&[], bytes)
    }

    /// Writes `first` (part of what `length` counts) and zeros up to a multiple of four.
    fn pad(&mut self, first: &[u8], length: usize) -> io::Result<()> {
        self.out.write_all(first)?;
        self.out.write_all(&[0; 3][..length.wrapping_neg() % 4])
    }

    /// Ends the archive.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn cpio_reads_what_we_write() {
        let dir = tempfile::tempdir().unwrap();
        let mut archive = Archive::new(Vec::new());
        archive.folder("bin").unwrap();
        for (index, content) in [&b""[..], b"a", b"ab", b"abc", b"abcd"].iter().enumerate() {
            archive.program(&format!("bin/{}", "x".repeat(index + 1)), content).unwrap();
        }
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let mut cpio = Command::new("busybox")
            .args(["cpio", "-i", "-d"])
            .current_dir(dir.path())
            .stdin(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        cpio.stdin.take().unwrap().write_all(&bytes).unwrap();
        assert!(cpio.wait().unwrap().success());
        assert_eq!(std::fs::read(dir.path().join("bin/x")).unwrap(), b"");
        assert_eq!(std::fs::read(dir.path().join("bin/xxxx")).unwrap(), b"abc");
        assert_eq!(std::fs::read(dir.path().join("bin/xxxxx")).unwrap(), b"abcd");
    }
}
