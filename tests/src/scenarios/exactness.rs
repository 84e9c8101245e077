//! The image a backup has committed is, byte for byte, the memory QEMU had at that stop.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::{SHAPES, Scenario, Shape, UP, random};
use crate::lab::Lab;
use crate::lab::domain::GuestSpec;
use crate::lab::guest::Guest;
use crate::lab::plan::HostName;
use crate::lab::understudy::Role;

pub(super) const SCENARIOS: &[Scenario] =
    &[("exactness: twenty epochs picked at random equal what QEMU dumps, block by block", exactness)];

/// Played when they are asked for by name, and in the campaign: a guest on huge pages takes minutes to boot in an
/// emulated host.
pub(super) const ON_REQUEST: &[Scenario] =
    &[("exactness: the same with huge pages and with graphics", variants)];

/// Of each of the four shapes of guest.
const EPOCHS: usize = 5;
/// Of each of the variants.
const VARIANT_EPOCHS: usize = 2;
/// Shape, memory in huge pages, video model.
const VARIANTS: [(Shape, bool, &str); 4] = [
    (("pc", 1), true, "vga"),
    (("q35", 2), true, "none"),
    (("pc", 2), false, "cirrus"),
    (("q35", 1), false, "vga"),
];
/// Pages of 2 MiB for a guest of 128 MiB, and a few over.
const HUGE_PAGES: u32 = 70;
/// Within the first so many.
const RANGE: u64 = 60;
const LIMIT: Duration = Duration::from_secs(180);

fn exactness(lab: &Lab) -> Result<()> {
    let mut dice = random::Dice::new();
    println!("    seed {} (UNDERSTUDY_SEED replays it)", dice.seed());
    let mut compared = 0;
    for (machine, vcpus) in SHAPES {
        let spec = GuestSpec { machine: machine.into(), vcpus, ..GuestSpec::new("g1") };
        compared += compare_some(lab, &spec, &mut dice, EPOCHS)?.len();
    }
    ensure!(compared >= EPOCHS * SHAPES.len(), "only {compared} blocks were compared");
    println!("    {compared} blocks compared");
    Ok(())
}

fn variants(lab: &Lab) -> Result<()> {
    let mut dice = random::Dice::new();
    println!("    seed {} (UNDERSTUDY_SEED replays it)", dice.seed());
    reserve_huge_pages(lab, HUGE_PAGES)?;
    let result = VARIANTS.into_iter().try_for_each(|((machine, vcpus), huge_pages, video)| {
        let machine = machine.to_owned();
        let spec = GuestSpec { machine, vcpus, huge_pages, video: video.into(), ..GuestSpec::new("g1") };
        let blocks = compare_some(lab, &spec, &mut dice, VARIANT_EPOCHS)?;
        let seen = blocks.iter().any(|name| name.contains("vga.vram"));
        ensure!(seen == (video != "none"), "with video {video}, the blocks are {blocks:?}");
        Ok(())
    });
    // What is reserved is missing for everything else.
    super::clear(lab)?;
    reserve_huge_pages(lab, 0)?;
    result
}

/// Keeps so many pages for guests on every host; memory is not too scattered yet for that to fail.
fn reserve_huge_pages(lab: &Lab, pages: u32) -> Result<()> {
    for host in HostName::ALL {
        let script = format!("echo {pages} > /proc/sys/vm/nr_hugepages; cat /proc/sys/vm/nr_hugepages");
        let reserved = lab.shell(host, &script)?;
        ensure!(
            reserved.trim() == pages.to_string(),
            "{host} reserves {} of {pages} huge pages",
            reserved.trim()
        );
    }
    Ok(())
}

/// Compares epochs picked at random; gives the names of the blocks, once for every epoch.
fn compare_some(lab: &Lab, spec: &GuestSpec, dice: &mut random::Dice, count: usize) -> Result<Vec<String>> {
    let mut epochs = BTreeSet::new();
    while epochs.len() < count {
        epochs.insert(2 + dice.below(RANGE));
    }
    compare(lab, spec, &epochs).with_context(|| format!("{spec:?}, epochs {epochs:?}"))
}

fn compare(lab: &Lab, spec: &GuestSpec, epochs: &BTreeSet<u64>) -> Result<Vec<String>> {
    super::clear(lab)?;
    let folder = lab.dir().shared().join("dumps");
    fs::create_dir_all(&folder)?;
    let list: Vec<String> = epochs.iter().map(u64::to_string).collect();
    let arguments = format!("--dump-epochs\n{}\n--dump-dir\n{}", list.join(","), folder.display());
    lab.restart_agent(HostName::Alpha, Role::Primary, &arguments)?;
    lab.restart_agent(HostName::Beta, Role::Backup, &arguments)?;
    lab.start_guest(HostName::Alpha, spec)?;
    let mut guest = Guest::wait(lab.dir(), &spec.name, UP)?;
    if spec.huge_pages {
        let free = lab.shell(HostName::Alpha, "grep HugePages_Free /proc/meminfo")?;
        let free = free.split_whitespace().next_back().and_then(|word| word.parse::<u32>().ok());
        ensure!(free.is_some_and(|free| free < HUGE_PAGES), "no huge page is in use: {free:?} are free");
    }
    guest.must("dirty 300 20")?;
    lab.protect("g1", HostName::Alpha)?;
    let mut compared = Vec::new();
    for epoch in epochs {
        let sides = ["primary", "backup"].map(|side| folder.join(format!("{side}-{epoch}")));
        let end = Instant::now() + LIMIT;
        while !sides.iter().all(|side| complete(side)) {
            ensure!(Instant::now() < end, "epoch {epoch} was not dumped by both sides within {LIMIT:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
        compared.extend(same(&sides[0], &sides[1]).with_context(|| format!("epoch {epoch}"))?);
        // 128 MiB on each side, every time.
        sides.iter().try_for_each(fs::remove_dir_all)?;
    }
    for (host, role) in [(HostName::Alpha, Role::Primary), (HostName::Beta, Role::Backup)] {
        lab.restart_agent(host, role, "")?;
    }
    Ok(compared)
}

/// There under its final name, which it gets when it is complete.
fn complete(folder: &Path) -> bool {
    fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some())
}

/// Gives the names of the blocks.
fn same(primary: &Path, backup: &Path) -> Result<Vec<String>> {
    let names = |folder: &Path| -> Result<BTreeSet<_>> {
        Ok(fs::read_dir(folder)?.flatten().map(|entry| entry.file_name()).collect())
    };
    let (ours, theirs) = (names(primary)?, names(backup)?);
    ensure!(ours == theirs, "QEMU has the blocks {ours:?}, the backup {theirs:?}");
    ensure!(ours.iter().any(|name| name == "pc.ram.bin"), "no pc.ram among {ours:?}");
    for name in &ours {
        let (left, right) = (fs::read(primary.join(name))?, fs::read(backup.join(name))?);
        ensure!(
            left.len() == right.len(),
            "{name:?}: QEMU has {} bytes, the backup {}",
            left.len(),
            right.len()
        );
        let pages = left.chunks(4096).zip(right.chunks(4096));
        let differing: Vec<usize> =
            pages.enumerate().filter(|(_, (one, other))| one != other).map(|(page, _)| page).collect();
        if let Some(first) = differing.first() {
            bail!(
                "{name:?}: {} of {} pages differ, the first is {first}",
                differing.len(),
                left.len() / 4096
            );
        }
    }
    Ok(ours.into_iter().map(|name| name.to_string_lossy().into_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_differing_byte_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let sides = ["a", "b"].map(|name| dir.path().join(name));
        for side in &sides {
            fs::create_dir(side).unwrap();
            fs::write(side.join("pc.ram.bin"), vec![1; 3 * 4096]).unwrap();
        }
        assert_eq!(same(&sides[0], &sides[1]).unwrap(), ["pc.ram.bin"]);
        let mut other = vec![1; 3 * 4096];
        other[2 * 4096 + 5] = 2;
        fs::write(sides[1].join("pc.ram.bin"), other).unwrap();
        let error = same(&sides[0], &sides[1]).unwrap_err().to_string();
        assert!(error.contains("1 of 3 pages differ, the first is 2"), "{error}");
        fs::write(sides[1].join("vga.vram.bin"), []).unwrap();
        assert!(same(&sides[0], &sides[1]).is_err());
    }
}
