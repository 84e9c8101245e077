//! The flat 32-bit guest: no operating system, nothing but dirty pages. Included by path wherever a real guest is captured
//! or promoted, so that all measure the same one.
#![allow(dead_code, reason = "each user needs a part of it")]

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const SOURCE: &str = include_str!("flat-guest.S");

/// What makes it.
pub(crate) const TOOLS: [&str; 2] = ["as", "ld"];

/// Where it keeps the number of its round.
pub(crate) const ROUND_ADDRESS: u64 = 0x20_0000;

/// Makes one that dirties so many pages a round; gives the path for `-kernel`.
pub(crate) fn build(dir: &Path, pages: usize) -> io::Result<PathBuf> {
    let [source, object, elf] = ["flat-guest.S", "flat-guest.o", "flat-guest.elf"].map(|name| dir.join(name));
    std::fs::write(&source, SOURCE)?;
    let [assembler, linker] = TOOLS;
    let pages = format!("PAGES={pages}");
    run(Command::new(assembler).args(["--32", "--defsym", &pages, "-o"]).args([&object, &source]))?;
    run(Command::new(linker)
        .args([
            "-m",
            "elf_i386",
            "-e",
            "start",
            "--section-start=.multiboot=0x100000",
            "-Ttext=0x100020",
            "-o",
        ])
        .args([&elf, &object]))?;
    Ok(elf)
}

fn run(command: &mut Command) -> io::Result<()> {
    let output = command.stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr))))
}
