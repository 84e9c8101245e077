//! Test hook: what QEMU has in memory at a stop, to compare it with what the backup has committed.
//!
//! What is mapped in guest-physical space as it is QEMU is made to dump (`pmemsave`): nearly all of the guest's RAM, and
//! its video memory. Much cannot be reached so: the ACPI tables, option ROMs, a shadowed part of low memory. It is read
//! from QEMU's address space (`/proc/PID/mem`). Where a block lies there is told by `info ramblock` (QEMU 8 and newer),
//! or found by its size: every block is a mapping of its own with a guard page behind it, and of several of the same
//! size the one made first lies highest. Wherever parts of what was read are mapped, QEMU dumps those as well, and both
//! must agree byte for byte, or the dump fails.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::json;
use tracing::{error, info};
use understudy_libvirt::{Domain, Monitor};

use crate::agent::Barrier;

/// Read and compared at once.
const CHUNK_BYTES: u64 = 4 << 20;

/// Blocks are cut here.
const CUT: u64 = 1 << 20;

/// Bytes of the guard page behind every block.
const GUARD_BYTES: u64 = 4096;

/// A RAM block, as QEMU lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Block {
    name: String,
    offset: u64,
    used_bytes: u64,
    total_bytes: u64,
    host_address: Option<u64>,
}

/// A part of guest-physical memory that shows a block.
#[derive(Debug, PartialEq, Eq)]
struct Mapped {
    address: u64,
    bytes: u64,
    name: String,
    offset: u64,
}

/// Dumps the guest at `epochs` into `folder/primary-EPOCH/BLOCK@OFFSET.bin`.
pub fn barrier(domain: Domain, folder: PathBuf, epochs: Vec<u64>) -> Barrier {
    let epochs: BTreeSet<u64> = epochs.into_iter().collect();
    Box::new(move |epoch| {
        if !epochs.contains(&epoch.0) {
            return Ok(());
        }
        let target = folder.join(format!("primary-{epoch}"));
        dump(&domain, &target).map_err(|error| {
            error!(%epoch, error = format!("{error:#}"), "memory not dumped");
            format!("dump of epoch {epoch}: {error:#}")
        })?;
        info!(%epoch, folder = %target.display(), "memory dumped");
        Ok(())
    })
}

fn dump(domain: &Domain, target: &Path) -> Result<()> {
    // A name of its own until it is complete: whoever compares waits for the final one.
    let partial = target.with_extension("partial");
    fs::create_dir_all(&partial).with_context(|| format!("cannot make {}", partial.display()))?;
    let pid = qemu_pid(&domain.uuid().to_string())?;
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).context("cannot read QEMU's mappings")?;
    let mut blocks = parse_ramblocks(&hmp(domain, "info ramblock")?)?;
    locate(&mut blocks, &parse_maps(&maps))?;
    let mut memory = File::open(format!("/proc/{pid}/mem")).context("cannot open QEMU's memory")?;
    let view = parse_flat_view(&hmp(domain, "info mtree -f")?);
    let scratch = partial.join("pmemsave");
    for block in &blocks {
        let address = block.host_address.with_context(|| format!("{} was not found", block.name))?;
        for piece in pieces(block.used_bytes) {
            let file = partial.join(file_name(&block.name, piece.start));
            let mapped = mapped(&blocks, &view, block, &piece);
            if let [(physical, shown)] = mapped.as_slice()
                && *shown == piece
            {
                // All of it can be had from QEMU itself.
                save(domain, *physical, shown, &file)?;
                continue;
            }
            let bytes = piece.end - piece.start;
            memory.seek(SeekFrom::Start(address + piece.start))?;
            let copied = std::io::copy(&mut (&mut memory).take(bytes), &mut File::create(&file)?)?;
            ensure!(copied == bytes, "{}: {copied} of {bytes} bytes", block.name);
            for (physical, shown) in mapped {
                save(domain, physical, &shown, &scratch)?;
                let at = shown.start - piece.start;
                compare(&scratch, &file, at, shown.end - shown.start)
                    .with_context(|| format!("{} from {:#x}", block.name, shown.start))?;
                fs::remove_file(&scratch)?;
            }
        }
    }
    // A second protection counts its epochs from the beginning; the last one counts.
    let _ = fs::remove_dir_all(target);
    fs::rename(&partial, target).with_context(|| format!("cannot make {}", target.display()))
}

/// A block in parts, of which each gets a file: it is below the first MiB that not all of RAM is mapped as it is. The
/// backup cuts its dumps in the same way.
fn pieces(bytes: u64) -> impl Iterator<Item = Range<u64>> {
    [0..bytes.min(CUT), CUT..bytes].into_iter().filter(|piece| piece.start < piece.end)
}

/// The parts of the piece of a block that are mapped: their guest-physical address, and where they lie in the block.
fn mapped(blocks: &[Block], view: &[Mapped], block: &Block, piece: &Range<u64>) -> Vec<(u64, Range<u64>)> {
    let part = |part: &Mapped| {
        (owner(blocks, part)? == block).then_some(())?;
        let shown = part.offset.max(piece.start)..(part.offset.saturating_add(part.bytes)).min(piece.end);
        (shown.start < shown.end).then(|| (part.address + (shown.start - part.offset), shown))
    };
    view.iter().filter_map(part).collect()
}

/// Has QEMU save memory, which is never a device's: reading that may change it.
fn save(domain: &Domain, physical: u64, range: &Range<u64>, file: &Path) -> Result<()> {
    let bytes = range.end - range.start;
    let _ = fs::remove_file(file);
    domain.execute("pmemsave", json!({"val": physical, "size": bytes, "filename": file}))?;
    let saved = fs::metadata(file)?.len();
    ensure!(saved == bytes, "QEMU saved {saved} of {bytes} bytes at {physical:#x}");
    Ok(())
}

/// What QEMU has saved must equal what was read, from there on.
fn compare(saved: &Path, read: &Path, at: u64, bytes: u64) -> Result<()> {
    let (mut saved, mut read) = (File::open(saved)?, File::open(read)?);
    read.seek(SeekFrom::Start(at))?;
    let (mut left, mut a, mut b) = (bytes, Vec::new(), Vec::new());
    while left > 0 {
        let chunk = left.min(CHUNK_BYTES);
        a.clear();
        b.clear();
        (&mut saved).take(chunk).read_to_end(&mut a)?;
        (&mut read).take(chunk).read_to_end(&mut b)?;
        ensure!(
            a == b && a.len() as u64 == chunk,
            "at {:#x}: QEMU's own dump differs from its memory",
            bytes - left
        );
        left -= chunk;
    }
    Ok(())
}

fn file_name(block: &str, offset: u64) -> String {
    format!("{}@{offset:x}.bin", block.replace('/', "_"))
}

fn hmp(domain: &Domain, command: &str) -> Result<String> {
    let reply = domain.execute("human-monitor-command", json!({ "command-line": command }))?;
    reply.as_str().map(str::to_owned).ok_or_else(|| anyhow!("{command} gave no text"))
}

/// libvirt gives every QEMU the domain's UUID on its command line.
fn qemu_pid(uuid: &str) -> Result<u32> {
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(command) = fs::read(format!("/proc/{pid}/cmdline")) else { continue };
        let arguments: Vec<&[u8]> = command.split(|byte| *byte == 0).collect();
        if arguments.windows(2).any(|pair| pair[0] == b"-uuid" && pair[1] == uuid.as_bytes()) {
            return Ok(pid);
        }
    }
    bail!("no process has -uuid {uuid}")
}

fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).ok()
}

fn parse_ramblocks(text: &str) -> Result<Vec<Block>> {
    let mut lines = text.lines();
    let has_address = lines.next().is_some_and(|head| head.split_whitespace().any(|word| word == "HVA"));
    let block = |line: &str| {
        // The name may hold anything; what follows it is "4 KiB" and hexadecimal columns.
        let (before, columns) = line.split_once(" 0x")?;
        let name = before.trim().rsplitn(3, ' ').nth(2)?.trim();
        let columns: Vec<u64> = columns.split_whitespace().filter_map(hex).collect();
        let &[offset, used_bytes, total_bytes, ..] = columns.as_slice() else { return None };
        let host_address = if has_address { columns.get(3).copied() } else { None };
        Some(Block { name: name.to_owned(), offset, used_bytes, total_bytes, host_address })
    };
    lines
        .filter(|line| !line.trim().is_empty())
        .map(|line| block(line).ok_or_else(|| anyhow!("not understood: {line:?}")))
        .collect()
}

/// Address and bytes of the mappings that may be RAM blocks: writable, with a guard page behind.
fn parse_maps(maps: &str) -> Vec<(u64, u64)> {
    let line = |line: &str| {
        let mut words = line.split_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        Some((hex(start)?, hex(end)?, words.next()?.to_owned()))
    };
    let mappings: Vec<_> = maps.lines().filter_map(line).collect();
    let pairs = mappings.windows(2);
    pairs
        .filter(|pair| {
            let ((_, end, access), (guard, guard_end, none)) = (&pair[0], &pair[1]);
            access.starts_with("rw")
                && none.starts_with("---")
                && guard == end
                && guard_end - guard == GUARD_BYTES
        })
        .map(|pair| (pair[0].0, pair[0].1 - pair[0].0))
        .collect()
}

fn locate(blocks: &mut [Block], mappings: &[(u64, u64)]) -> Result<()> {
    if blocks.iter().all(|block| block.host_address.is_some()) {
        return Ok(());
    }
    let mut by_size: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    for (address, bytes) in mappings {
        // QEMU aligns blocks to huge pages; its heaps and stacks only happen to have such sizes.
        if address.is_multiple_of(2 << 20) {
            by_size.entry(*bytes).or_default().push(*address);
        }
    }
    // The lowest first, so that the block made first takes the last.
    by_size.values_mut().for_each(|addresses| addresses.sort_unstable());
    blocks.sort_by_key(|block| block.offset);
    for block in blocks.iter_mut() {
        let found = by_size.get_mut(&block.total_bytes).and_then(Vec::pop);
        block.host_address =
            Some(found.with_context(|| {
                format!("no mapping of {:#x} bytes for {}", block.total_bytes, block.name)
            })?);
    }
    if let Some((bytes, _)) = by_size
        .iter()
        .find(|(bytes, left)| !left.is_empty() && blocks.iter().any(|block| block.total_bytes == **bytes))
    {
        bail!("more mappings of {bytes:#x} bytes than RAM blocks: cannot tell which is which");
    }
    Ok(())
}

/// The RAM of the CPUs' view of memory.
fn parse_flat_view(text: &str) -> Vec<Mapped> {
    let part = |line: &str| {
        let (range, rest) = line.trim().split_once(" (prio ")?;
        let (start, end) = range.split_once('-')?;
        let (kind, rest) = rest.split_once(", ")?.1.split_once("): ")?;
        let mut words = rest.trim_end_matches(" KVM").split(" @");
        let name = words.next()?.trim().to_owned();
        let offset = words.next().and_then(|word| hex(word.trim())).unwrap_or(0);
        let (start, end) = (hex(start)?, hex(end)?);
        let bytes = end.checked_sub(start)?.checked_add(1)?;
        // `ramd` and the like are devices.
        matches!(kind, "ram" | "rom").then_some(Mapped { address: start, bytes, name, offset })
    };
    let mut views = text.split("FlatView #");
    let view = views.find(|view| view.contains("AS \"memory\""));
    view.into_iter().flat_map(str::lines).filter_map(part).collect()
}

/// The block a part shows, if its name says so without doubt.
fn owner<'a>(blocks: &'a [Block], part: &Mapped) -> Option<&'a Block> {
    let mut found = blocks
        .iter()
        .filter(|block| block.name.rsplit('/').next() == Some(part.name.as_str()) || block.name == part.name);
    let first = found.next()?;
    found.next().is_none().then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAMBLOCKS_7_2: &str = "\
              Block Name    PSize              Offset               Used              Total
                  pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000
    /rom@etc/acpi/tables    4 KiB  0x0000000005140000 0x0000000000020000 0x0000000000200000
                 pc.bios    4 KiB  0x0000000004000000 0x0000000000040000 0x0000000000040000
  0000:00:03.0/e1000.rom    4 KiB  0x00000000050c0000 0x0000000000040000 0x0000000000040000
";

    #[test]
    fn blocks_are_found_by_size_and_order() {
        let mut blocks = parse_ramblocks(RAMBLOCKS_7_2).unwrap();
        assert_eq!((blocks[1].name.as_str(), blocks[1].used_bytes), ("/rom@etc/acpi/tables", 0x20000));
        let maps = "\
7fed13a00000-7fed17a00000 rw-p 00000000 00:00 0
7fed17a00000-7fed17a01000 ---p 00000000 00:00 0
7fed18021000-7fed18221000 rw-p 00000000 00:00 0
7fed18221000-7fed18222000 ---p 00000000 00:00 0
7fed64200000-7fed64400000 rw-p 00000000 00:00 0
7fed64400000-7fed64401000 ---p 00000000 00:00 0
7fed64600000-7fed64640000 rw-p 00000000 00:00 0
7fed64640000-7fed64641000 ---p 00000000 00:00 0
7fed66000000-7fed66040000 rw-p 00000000 00:00 0
7fed66040000-7fed66041000 ---p 00000000 00:00 0
7fed66899000-7fed66afd000 rw-p 00000000 00:00 0
7fed66b00000-7fed66b40000 rw-p 00000000 00:00 0
";
        locate(&mut blocks, &parse_maps(maps)).unwrap();
        let found: Vec<_> = blocks.iter().map(|b| (b.name.as_str(), b.host_address.unwrap())).collect();
        let wanted = [
            ("pc.ram", 0x7fed_13a0_0000),
            ("pc.bios", 0x7fed_6600_0000),
            ("0000:00:03.0/e1000.rom", 0x7fed_6460_0000),
            ("/rom@etc/acpi/tables", 0x7fed_6420_0000),
        ];
        assert_eq!(found, wanted);
        let mut again = parse_ramblocks(RAMBLOCKS_7_2).unwrap();
        assert!(locate(&mut again, &parse_maps("")).unwrap_err().to_string().contains("pc.ram"));
    }

    #[test]
    fn what_is_mapped_as_it_is_comes_from_qemu() {
        let block = |name: &str, used_bytes| Block {
            name: name.into(),
            offset: 0,
            used_bytes,
            total_bytes: used_bytes,
            host_address: Some(0),
        };
        let blocks = [block("pc.ram", 0x500_0000), block("pc.bios", 0x4_0000)];
        let part = |address, bytes, name: &str, offset| Mapped { address, bytes, name: name.into(), offset };
        let view = [
            part(0, 0xa_0000, "pc.ram", 0),
            part(0xe_0000, 0x2_0000, "pc.bios", 0x2_0000),
            part(0x10_0000, 0x4f0_0000, "pc.ram", 0x10_0000),
            part(0xfffc_0000, 0x4_0000, "pc.bios", 0),
        ];
        let of = |block: &Block| -> Vec<_> {
            pieces(block.used_bytes)
                .map(|piece| (piece.clone(), mapped(&blocks, &view, block, &piece)))
                .collect()
        };
        let (low, high, bios) = (0..CUT, CUT..0x500_0000, 0..0x4_0000);
        assert_eq!(of(&blocks[0]), [(low, vec![(0, 0..0xa_0000)]), (high.clone(), vec![(0x10_0000, high)])]);
        let both = vec![(0xe_0000, 0x2_0000..0x4_0000), (0xfffc_0000, bios.clone())];
        assert_eq!(of(&blocks[1]), [(bios, both)]);
    }

    #[test]
    fn newer_versions_tell_the_address() {
        let text = "\
              Block Name    PSize              Offset               Used              Total                HVA  RO
                  pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007f3a00000000  rw
";
        let blocks = parse_ramblocks(text).unwrap();
        assert_eq!(blocks[0].host_address, Some(0x7f3a_0000_0000));
    }

    #[test]
    fn the_flat_view_of_the_cpus() {
        let text = "\
FlatView #0
 AS \"I/O\", root: io
  0000000000000000-0000000000000007 (prio 0, ram): not.this

FlatView #1
 AS \"memory\", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): pc.ram KVM
  00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem
  00000000000e0000-00000000000fffff (prio 0, rom): pc.bios @0000000000020000 KVM
";
        let mapped =
            |address, bytes, name: &str, offset| Mapped { address, bytes, name: name.into(), offset };
        let wanted = [mapped(0, 0xa0000, "pc.ram", 0), mapped(0xe0000, 0x20000, "pc.bios", 0x20000)];
        assert_eq!(parse_flat_view(text), wanted);
    }
}
