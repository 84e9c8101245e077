//! The initramfs images of hosts and guests.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::cpio::Archive;
use super::kernel::Kernel;
use crate::process;

/// What goes into one image.
#[derive(Debug)]
pub(crate) struct Recipe<'a> {
    /// The file it becomes, in the cache.
    pub(crate) name: &'a str,
    /// The content of `/init`.
    pub(crate) init: &'a str,
    /// Kernel modules, without what they need.
    pub(crate) modules: &'a [&'a str],
    /// A program beside busybox, put into `/bin` under its own name.
    pub(crate) program: Option<&'a Path>,
}

/// Writes the image anew; it is small, and so never stale.
pub(crate) fn build(cache: &Path, kernel: &Kernel, recipe: &Recipe<'_>) -> Result<PathBuf> {
    let mut archive = Archive::new(Vec::new());
    for folder in ["bin", "dev", "proc", "sys", "root", "ov", "mods"] {
        archive.folder(folder)?;
    }
    archive.program("init", recipe.init.as_bytes())?;
    archive.program("bin/busybox", &read(&static_busybox()?)?)?;
    if let Some(program) = recipe.program {
        let name = program.file_name().context("a program without a name")?.to_string_lossy();
        archive.program(&format!("bin/{name}"), &read(program)?)?;
    }
    let mut order = String::new();
    for file in kernel.module_files(recipe.modules)? {
        let name = file.file_name().context("a module without a name")?.to_string_lossy().into_owned();
        archive.program(&format!("mods/{name}"), &read(&file)?)?;
        order += &format!("{name}\n");
    }
    archive.program("mods/order", order.as_bytes())?;
    let image = cache.join(recipe.name);
    let work = cache.join(format!("{}.{}", recipe.name, std::process::id()));
    compress(&archive.finish()?, &work)?;
    fs::rename(&work, &image).with_context(|| format!("cannot write {}", image.display()))?;
    Ok(image)
}

pub(crate) fn compress(archive: &[u8], to: &Path) -> Result<()> {
    let out = fs::File::create(to).with_context(|| format!("cannot write {}", to.display()))?;
    let mut gzip = Command::new("gzip").args(["-1", "-n"]).stdin(Stdio::piped()).stdout(out).spawn()?;
    let mut input = gzip.stdin.take().context("gzip has no input")?;
    input.write_all(archive)?;
    drop(input);
    let status = gzip.wait()?;
    if !status.success() {
        bail!("gzip failed ({status})");
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Debian has a busybox that is linked dynamically as well, which cannot run in an initramfs.
fn static_busybox() -> Result<PathBuf> {
    let busybox = process::find_program("busybox").context("no busybox: install busybox-static")?;
    if wants_interpreter(&read(&busybox)?) {
        bail!("{} is linked dynamically: install busybox-static", busybox.display());
    }
    Ok(busybox)
}

/// Whether a 64-bit ELF program has an interpreter segment, that is, needs a dynamic linker.
fn wants_interpreter(elf: &[u8]) -> bool {
    const PT_INTERP: u32 = 3;
    let half = |at: usize| elf.get(at..at + 2).map_or(0, |bytes| u16::from_le_bytes([bytes[0], bytes[1]]));
    let word = |at: usize| elf.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let (table, entry, count) = (word(32) as usize, usize::from(half(54)), usize::from(half(56)));
    (0..count).any(|index| word(table.saturating_add(index * entry)) == PT_INTERP)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_program_is_told_from_a_static_one() {
        let dynamic = std::env::current_exe().unwrap();
        assert!(wants_interpreter(&std::fs::read(dynamic).unwrap()));
        assert!(!wants_interpreter(b"not a program"));
        if let Ok(busybox) = static_busybox() {
            assert!(!wants_interpreter(&std::fs::read(busybox).unwrap()));
        }
    }
}
