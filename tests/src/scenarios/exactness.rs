//! The image a backup has committed is, byte for byte, the memory QEMU had at that stop.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::{SHAPES, Scenario, Shape, UP, random};
use crate::lab::Lab;
use crate::lab::domain::GuestSpec;
use crate::lab::guest::Guest;
use crate::lab::plan::HostName;
use crate::lab::remote::Exec;
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
    (("pc", 2), false, "cirrus"),
    (("q35", 2), true, "none"),
    (("q35", 1), false, "vga"),
];
/// Enough for the guest's kernel; all of it is dumped and compared, every time.
const MEMORY_MIB: u32 = 80;
/// Pages of 2 MiB for one such guest, and a few over.
const HUGE_PAGES: u32 = MEMORY_MIB / 2 + 6;
/// Within the first so many.
const RANGE: u64 = 60;
const LIMIT: Duration = Duration::from_secs(180);

/// In every host, on a tmpfs of its own: to move all of a guest's memory out of an emulated host takes longer than to
/// dump it.
const DUMPS: &str = "/dev/shm/us-dumps";
/// Run in the hosts over whole blocks: no code of ours says that two dumps are the same.
const DIGEST: &str = "md5sum";

fn exactness(lab: &Lab) -> Result<()> {
    let mut dice = random::Dice::new();
    println!("    seed {} (UNDERSTUDY_SEED replays it)", dice.seed());
    let shaped = |(machine, vcpus): Shape| GuestSpec { machine: machine.into(), vcpus, ..small() };
    let specs: Vec<_> = SHAPES.into_iter().map(shaped).collect();
    let compared: Vec<_> = compare_all(lab, &specs, &mut dice, EPOCHS)?.concat();
    ensure!(compared.len() >= 2 * EPOCHS * SHAPES.len(), "only {} files were compared", compared.len());
    println!("    {} blocks and parts of blocks compared", compared.len());
    Ok(())
}

fn variants(lab: &Lab) -> Result<()> {
    let mut dice = random::Dice::new();
    println!("    seed {} (UNDERSTUDY_SEED replays it)", dice.seed());
    reserve_huge_pages(lab, HUGE_PAGES)?;
    let specs = VARIANTS.map(|((machine, vcpus), huge_pages, video)| {
        let (machine, video) = (machine.to_owned(), video.to_owned());
        GuestSpec { machine, vcpus, huge_pages, video, ..small() }
    });
    let result = compare_all(lab, &specs, &mut dice, VARIANT_EPOCHS);
    // What is reserved is missing for everything else.
    super::clear(lab)?;
    reserve_huge_pages(lab, 0)?;
    for (spec, blocks) in specs.iter().zip(result?) {
        let seen = blocks.iter().any(|name| name.contains("vga.vram"));
        ensure!(seen == (spec.video != "none"), "with video {}, the blocks are {blocks:?}", spec.video);
    }
    Ok(())
}

fn small() -> GuestSpec {
    GuestSpec { memory_mib: MEMORY_MIB, ..GuestSpec::new("g1") }
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

/// A guest on a host, and the epochs of it that are compared.
struct Case {
    host: HostName,
    spec: GuestSpec,
    epochs: BTreeSet<u64>,
}

impl Case {
    /// The side that dumps there, and its host.
    fn sides(&self) -> [(HostName, Role); 2] {
        [(self.host, Role::Primary), (self.host.other(), Role::Backup)]
    }
}

/// Compares epochs picked at random of each guest; gives the names of the blocks, once for every epoch.
fn compare_all(
    lab: &Lab,
    specs: &[GuestSpec],
    dice: &mut random::Dice,
    count: usize,
) -> Result<Vec<Vec<String>>> {
    let mut compared = Vec::new();
    // Two at once, crosswise: each host works for its own guest and for the other's.
    for pair in specs.chunks(2) {
        let cases: Vec<Case> = pair
            .iter()
            .zip(HostName::ALL.into_iter().zip(["g1", "g2"]))
            .map(|(spec, (host, name))| {
                let mut epochs = BTreeSet::new();
                while epochs.len() < count {
                    epochs.insert(2 + dice.below(RANGE));
                }
                Case { host, spec: GuestSpec { name: name.into(), ..spec.clone() }, epochs }
            })
            .collect();
        super::clear(lab)?;
        compared.extend(at_once(&cases, |case| {
            compare(lab, case).with_context(|| format!("{:?}, epochs {:?}", case.spec, case.epochs))
        })?);
    }
    at_once(&HostName::ALL, |host| {
        [Role::Primary, Role::Backup].into_iter().try_for_each(|role| lab.restart_agent(*host, role, ""))?;
        lab.shell(*host, &format!("rm -r {DUMPS}"))
    })?;
    Ok(compared)
}

/// Does the same for all, side by side.
fn at_once<T: Sync, R: Send>(all: &[T], work: impl Fn(&T) -> Result<R> + Sync) -> Result<Vec<R>> {
    std::thread::scope(|scope| {
        let work = &work;
        let running: Vec<_> = all.iter().map(|one| scope.spawn(move || work(one))).collect();
        let results: Vec<_> = running.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        results.into_iter().map(|result| result.unwrap_or_else(|_| bail!("a thread panicked"))).collect()
    })
}

fn compare(lab: &Lab, case: &Case) -> Result<Vec<String>> {
    let Case { host, spec, epochs } = case;
    let begun = Instant::now();
    let list: Vec<String> = epochs.iter().map(u64::to_string).collect();
    let arguments = format!("--dump-epochs\n{}\n--dump-dir\n{DUMPS}", list.join(","));
    for (host, role) in case.sides() {
        lab.shell(host, &format!("mkdir -p {DUMPS}; rm -rf {DUMPS}/{}-*", role.name()))?;
        lab.restart_agent(host, role, &arguments)?;
    }
    lab.start_guest(*host, spec)?;
    let mut guest = Guest::wait(lab.dir(), &spec.name, UP)?;
    if spec.huge_pages {
        let free = lab.shell(*host, "grep HugePages_Free /proc/meminfo")?;
        let free = free.split_whitespace().next_back().and_then(|word| word.parse::<u32>().ok());
        ensure!(free.is_some_and(|free| free < HUGE_PAGES), "no huge page is in use: {free:?} are free");
    }
    guest.must("dirty 300 20")?;
    let up = begun.elapsed();
    lab.protect(&spec.name, *host)?;
    let mut compared = Vec::new();
    for epoch in epochs {
        compared.extend(same(lab, case, *epoch).with_context(|| format!("epoch {epoch}"))?);
    }
    let all = begun.elapsed();
    println!(
        "    {} vCPUs {} on {host}: up in {:.0} s, epochs {} compared in {:.0} s",
        spec.machine,
        spec.vcpus,
        up.as_secs_f64(),
        list.join(" "),
        (all - up).as_secs_f64()
    );
    // The other one needs no more of the machine than it has to share.
    lab.shell(*host, &format!("virsh -q destroy {}", spec.name))?;
    Ok(compared)
}

/// Waits for the dumps of both sides and compares them; gives the names of the blocks.
fn same(lab: &Lab, case: &Case, epoch: u64) -> Result<Vec<String>> {
    // A dump is there under its final name when it is complete.
    let digests = at_once(&case.sides(), |(host, role)| {
        let dump = format!("{}-{epoch}", role.name());
        let script =
            format!("cd {DUMPS}; until test -d {dump}; do sleep 0.2; done; cd {dump} && {DIGEST} -- *");
        lab.checked(*host, &Exec::shell(&script).limit(LIMIT))
            .context(role.name())
            .and_then(|said| parse(&said))
    })?;
    let [ours, theirs] = digests.as_slice() else { bail!("{} sides", digests.len()) };
    if let Some(name) = differing(ours, theirs)?.first() {
        let blocks = at_once(&case.sides(), |(host, role)| {
            fetch(lab, *host, &format!("{}-{epoch}/{name}", role.name()))
        })?;
        bail!("{}", difference(name, &blocks[0], &blocks[1]));
    }
    // All of the guest's memory, on each side, every time.
    for (host, role) in case.sides() {
        lab.shell(host, &format!("rm -r {DUMPS}/{}-{epoch}", role.name()))?;
    }
    Ok(ours.keys().cloned().collect())
}

/// Block and digest.
type Digests = BTreeMap<String, String>;

/// What the program says that makes digests.
fn parse(said: &str) -> Result<Digests> {
    let line = |line: &str| {
        let (digest, name) = line.split_once("  ").with_context(|| format!("not a digest: {line:?}"))?;
        Ok((name.to_owned(), digest.to_owned()))
    };
    said.lines().map(line).collect()
}

/// The blocks that differ; an error when they are not the same blocks.
fn differing<'a>(ours: &'a Digests, theirs: &Digests) -> Result<Vec<&'a str>> {
    ensure!(
        ours.keys().eq(theirs.keys()),
        "QEMU has the blocks {:?}, the backup {:?}",
        ours.keys().collect::<Vec<_>>(),
        theirs.keys().collect::<Vec<_>>()
    );
    ensure!(ours.contains_key("pc.ram@0.bin"), "no pc.ram among {:?}", ours.keys().collect::<Vec<_>>());
    Ok(ours
        .iter()
        .filter(|(name, digest)| theirs[*name] != **digest)
        .map(|(name, _)| name.as_str())
        .collect())
}

/// Brings a dumped block here.
fn fetch(lab: &Lab, host: HostName, file: &str) -> Result<Vec<u8>> {
    let here = lab.dir().shared().join(format!("{host}.dump"));
    lab.checked(host, &Exec::shell(&format!("cp {DUMPS}/{file} {}", here.display())).limit(LIMIT))?;
    let bytes = fs::read(&here)?;
    fs::remove_file(&here)?;
    Ok(bytes)
}

/// Where two dumps of a block differ. A large block has more than one file, with the offset in their names.
fn difference(name: &str, left: &[u8], right: &[u8]) -> String {
    let start = name.strip_suffix(".bin").and_then(|name| name.rsplit_once('@'));
    let start = start.and_then(|(_, start)| usize::from_str_radix(start, 16).ok()).unwrap_or(0);
    if left.len() != right.len() {
        return format!("{name}: QEMU has {} bytes, the backup {}", left.len(), right.len());
    }
    let pages = left.chunks(4096).zip(right.chunks(4096)).filter(|(one, other)| one != other).count();
    match left.iter().zip(right).position(|(one, other)| one != other) {
        Some(first) => format!(
            "{name}: {pages} of {} pages differ, the first at byte {:#x} of the block: QEMU has {:#04x}, the backup {:#04x}",
            left.len() / 4096,
            start + first,
            left[first],
            right[first]
        ),
        None => format!("{name}: the digests differ and the bytes do not"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_differing_byte_is_found() {
        let ours = parse("aa  pc.bios@0.bin\nbb  pc.ram@0.bin\n").unwrap();
        assert!(differing(&ours, &ours).unwrap().is_empty());
        let theirs = parse("aa  pc.bios@0.bin\nbc  pc.ram@0.bin\n").unwrap();
        assert_eq!(differing(&ours, &theirs).unwrap(), ["pc.ram@0.bin"]);
        let (left, mut right) = (vec![1; 3 * 4096], vec![1; 3 * 4096]);
        right[2 * 4096 + 5] = 2;
        let said = difference("pc.ram@100000.bin", &left, &right);
        let wanted = "pc.ram@100000.bin: 1 of 3 pages differ, the first at byte 0x102005";
        assert!(said.contains(wanted), "{said}");
        assert!(difference("x", &left, &right[1..]).contains("12288 bytes, the backup 12287"));
    }

    #[test]
    fn a_block_that_one_side_lacks_is_found() {
        let ours = parse("aa  pc.bios@0.bin\nbb  pc.ram@0.bin\n").unwrap();
        let theirs = parse("bb  pc.ram@0.bin\n").unwrap();
        assert!(differing(&ours, &theirs).unwrap_err().to_string().contains("pc.bios@0.bin"));
        let none = parse("aa  pc.bios@0.bin\n").unwrap();
        assert!(differing(&none, &none).unwrap_err().to_string().contains("no pc.ram"));
        assert!(parse("no digest").is_err());
    }
}
