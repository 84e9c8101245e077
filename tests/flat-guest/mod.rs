//! The flat 32-bit guest: no operating system, nothing but dirty pages. Included by path wherever a real guest is captured
//! or promoted, so that all measure the same one.
#![allow(dead_code, reason = "each user needs a part of it")]

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const SOURCE: &str = include_str!("flat-guest.S");

const CARD: &str = include_str!("card.S");

/// What makes it.
pub(crate) const TOOLS: [&str; 2] = ["as", "ld"];

/// Where it keeps the number of its round.
pub(crate) const ROUND_ADDRESS: u64 = 0x20_0000;

/// Makes one that dirties so many pages a round; gives the path for `-kernel`.
pub(crate) fn build(dir: &Path, pages: usize) -> io::Result<PathBuf> {
    made(dir, pages, SOURCE, &[])
}

/// Makes one that also answers what its rtl8139 gets.
pub(crate) fn build_with_card(dir: &Path, pages: usize) -> io::Result<PathBuf> {
    made(dir, pages, &[SOURCE, CARD].concat(), &["--defsym", "CARD=1"])
}

fn made(dir: &Path, pages: usize, text: &str, more: &[&str]) -> io::Result<PathBuf> {
    let [source, object, elf] = ["flat-guest.S", "flat-guest.o", "flat-guest.elf"].map(|name| dir.join(name));
    std::fs::write(&source, text)?;
    let [assembler, linker] = TOOLS;
    let pages = format!("PAGES={pages}");
    let assembling = ["--32", "--defsym", &pages];
    run(Command::new(assembler).args(assembling).args(more).arg("-o").args([&object, &source]))?;
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
