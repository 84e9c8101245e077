//! The image a backup has committed is, byte for byte, the memory QEMU had at that stop.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::{SHAPES, Scenario, Shape, random, start_shaped};
use crate::lab::Lab;
use crate::lab::plan::HostName;
use crate::lab::understudy::Role;

pub(super) const SCENARIOS: &[Scenario] =
    &[("exactness: twenty epochs picked at random equal what QEMU dumps, block by block", exactness)];

/// Of each of the four shapes of guest.
const EPOCHS: usize = 5;
/// Within the first so many.
const RANGE: u64 = 60;
const LIMIT: Duration = Duration::from_secs(180);

fn exactness(lab: &Lab) -> Result<()> {
    let mut dice = random::Dice::new();
    println!("    seed {} (UNDERSTUDY_SEED replays it)", dice.seed());
    let mut compared = 0;
    for shape in SHAPES {
        let mut epochs = BTreeSet::new();
        while epochs.len() < EPOCHS {
            epochs.insert(2 + dice.below(RANGE));
        }
        compared += compare(lab, shape, &epochs).with_context(|| format!("{shape:?}, epochs {epochs:?}"))?;
    }
    ensure!(compared >= EPOCHS * SHAPES.len(), "only {compared} blocks were compared");
    println!("    {compared} blocks compared");
    Ok(())
}

/// Gives the number of blocks that were compared.
fn compare(lab: &Lab, shape: Shape, epochs: &BTreeSet<u64>) -> Result<usize> {
    super::clear(lab)?;
    let folder = lab.dir().shared().join("dumps");
    fs::create_dir_all(&folder)?;
    let list: Vec<String> = epochs.iter().map(u64::to_string).collect();
    let arguments = format!("--dump-epochs\n{}\n--dump-dir\n{}", list.join(","), folder.display());
    lab.restart_agent(HostName::Alpha, Role::Primary, &arguments)?;
    lab.restart_agent(HostName::Beta, Role::Backup, &arguments)?;
    let mut guest = start_shaped(lab, HostName::Alpha, shape)?;
    guest.must("dirty 300 20")?;
    lab.protect("g1", HostName::Alpha)?;
    let mut compared = 0;
    for epoch in epochs {
        let sides = ["primary", "backup"].map(|side| folder.join(format!("{side}-{epoch}")));
        let end = Instant::now() + LIMIT;
        while !sides.iter().all(|side| complete(side)) {
            ensure!(Instant::now() < end, "epoch {epoch} was not dumped by both sides within {LIMIT:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
        compared += same(&sides[0], &sides[1]).with_context(|| format!("epoch {epoch}"))?;
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

fn same(primary: &Path, backup: &Path) -> Result<usize> {
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
    Ok(ours.len())
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
        assert_eq!(same(&sides[0], &sides[1]).unwrap(), 1);
        let mut other = vec![1; 3 * 4096];
        other[2 * 4096 + 5] = 2;
        fs::write(sides[1].join("pc.ram.bin"), other).unwrap();
        let error = same(&sides[0], &sides[1]).unwrap_err().to_string();
        assert!(error.contains("1 of 3 pages differ, the first is 2"), "{error}");
        fs::write(sides[1].join("vga.vram.bin"), []).unwrap();
        assert!(same(&sides[0], &sides[1]).is_err());
    }
}
