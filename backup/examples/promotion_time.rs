//! How long a promotion takes from the first byte sent to QEMU until the guest runs, by the size of the guest: with its
//! memory kept up to date in the standby (warm), and with all of it in the stream (cold). And what memory the backup has.
//!
//! `cargo run --release -p understudy-backup --example promotion_time -- [ROUNDS] [MIB,MIB,...] [JSON FILE]`, as root.
//! The guest is the flat one of the capture's tests, under this machine's KVM, with libvirt's daemon of its own; every page
//! of it is filled. The standby is made and loaded anew each round.
#![allow(clippy::unwrap_used, reason = "it ends by panicking")]

#[path = "../tests/support/mod.rs"]
mod support;

use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::daemon::{Libvirtd, capture, missing};
use understudy_backup::image::{Image, Move};
use understudy_backup::libvirt::LibvirtPromoter;
use understudy_backup::promoter::{Promoter, Standby, StandbySpec};
use understudy_libvirt::Connection;
use understudy_proto::frame::{Codec, Record};
use understudy_proto::ids::GuestId;
use understudy_proto::units::{BlockIndex, PAGE_BYTES, PageIndex};

/// Of the cold way, which takes seconds.
const COLD_ROUNDS: usize = 3;
/// Where the flat guest writes nothing: 32 MiB.
const FILLED_FROM: u64 = 8192;

fn main() {
    if let Some(reason) = missing() {
        println!("skipped: {reason}");
        return;
    }
    let mut arguments = std::env::args().skip(1);
    let rounds = arguments.next().map_or(20, |n| n.parse().unwrap());
    let sizes = arguments.next().unwrap_or_else(|| "128,1024,4096".to_owned());
    let file = arguments.next();

    let mut daemon = Libvirtd::start_in(tempfile::tempdir_in("/dev/shm").unwrap());
    let connection = daemon.connect();
    let dir = daemon.dir.path().to_owned();
    let kernel = build(&dir);
    let promoter = LibvirtPromoter::new(daemon.uri(), &dir, true);
    println!(
        "  MiB | load + resume, ms: median     p99 |  cold median | agent MiB: anonymous, in the standby's file"
    );
    let rows: Vec<Value> = sizes
        .split(',')
        .map(|mib| measure(&connection, &promoter, &kernel, mib.parse().unwrap(), rounds))
        .collect();
    if let Some(file) = file {
        std::fs::write(file, serde_json::to_string_pretty(&json!({ "promotion": rows })).unwrap()).unwrap();
    }
}

fn measure(
    connection: &Connection,
    promoter: &LibvirtPromoter,
    kernel: &Path,
    mib: u64,
    rounds: usize,
) -> Value {
    let domain = connection.create_paused(&guest_xml(mib, kernel)).unwrap();
    let guest = GuestId(domain.uuid());
    domain.resume().unwrap();
    // The firmware has to load the guest.
    std::thread::sleep(Duration::from_secs(2));
    let mut image = capture(&domain);
    domain.destroy().unwrap();
    for page in FILLED_FROM..mib * 256 {
        let payload = filled(page);
        let (block, page) = (BlockIndex(0), PageIndex::new(page));
        image.apply(&Record { block, page, codec: Codec::Raw, payload: &payload[..] }).unwrap();
    }
    let spec = StandbySpec { guest, seed: Arc::clone(image.seed()), persistent: false };
    let mut image = Arc::new(image);
    let cold: Vec<Duration> =
        (0..COLD_ROUNDS).map(|_| promote(connection, promoter, &spec, &image)).collect();
    let mut memory = (0, 0);
    let mut warm = Vec::new();
    for _ in 0..rounds {
        let Standby::Warm(shared) = promoter.prepare(&spec).unwrap() else { panic!("the standby is cold") };
        let mut step = Move::new(shared);
        while !Arc::get_mut(&mut image).unwrap().move_step(&mut step).unwrap() {}
        memory = (anonymous_bytes(), image.shared().unwrap().resident_bytes());
        warm.push(load(connection, promoter, &spec, &image));
    }
    let (warm, cold) = (Times::of(warm), Times::of(cold));
    let mib_of = |bytes: u64| bytes >> 20;
    println!(
        "{mib:5} | {:25.1} {:9.1} | {:12.1} | {}, {}",
        warm.median,
        warm.p99,
        cold.median,
        mib_of(memory.0),
        mib_of(memory.1)
    );
    json!({"guest_mib": mib, "rounds": rounds, "warm_ms": warm.json(), "cold_ms": cold.json(),
        "agent_anonymous_bytes": memory.0, "standby_file_bytes": memory.1})
}

/// With a standby of its own that is not the image's memory.
fn promote(
    connection: &Connection,
    promoter: &LibvirtPromoter,
    spec: &StandbySpec,
    image: &Arc<Image>,
) -> Duration {
    drop(promoter.prepare(spec).unwrap());
    load(connection, promoter, spec, image)
}

/// The guest runs only for a moment, so that the image stays good for the next round.
fn load(
    connection: &Connection,
    promoter: &LibvirtPromoter,
    spec: &StandbySpec,
    image: &Arc<Image>,
) -> Duration {
    let began = Instant::now();
    promoter.load(spec, image).unwrap();
    let loaded = began.elapsed();
    let activation = promoter.activate(spec.guest, Some(spec)).unwrap();
    connection.find_domain("flat").unwrap().destroy().unwrap();
    loaded + activation.resume
}

struct Times {
    median: f64,
    p99: f64,
    all: Vec<f64>,
}

impl Times {
    fn of(mut times: Vec<Duration>) -> Self {
        times.sort();
        let ms = |time: &Duration| time.as_secs_f64() * 1000.0;
        let rank = (times.len() * 99).div_ceil(100).saturating_sub(1);
        Self {
            median: ms(&times[times.len() / 2]),
            p99: ms(&times[rank]),
            all: times.iter().map(ms).collect(),
        }
    }

    fn json(&self) -> Value {
        json!({"median": self.median, "p99": self.p99, "all": self.all})
    }
}

fn guest_xml(mib: u64, kernel: &Path) -> String {
    format!(
        "<domain type='kvm'><name>flat</name><memory unit='MiB'>{mib}</memory><vcpu>1</vcpu>
         <os><type arch='x86_64' machine='pc'>hvm</type><kernel>{}</kernel></os><features><acpi/></features>
         <cpu mode='custom' match='exact' check='none'><model fallback='forbid'>qemu64</model></cpu>
         <devices><emulator>/usr/bin/qemu-system-x86_64</emulator><memballoon model='none'/>
           <video><model type='vga'/></video></devices></domain>",
        kernel.display()
    )
}

/// The guest that dirties a thousand pages for ever.
fn build(dir: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../primary/testdata/flat-guest.S");
    let (object, elf) = (dir.join("flat.o"), dir.join("flat.elf"));
    let run = |command: &mut Command| assert!(command.status().unwrap().success(), "{command:?}");
    run(Command::new("as").args(["--32", "--defsym", "PAGES=1000", "-o"]).args([&object, &source]));
    run(Command::new("ld")
        .args([
            "-m",
            "elf_i386",
            "-e",
            "start",
            "--section-start=.multiboot=0x100000",
            "-Ttext=0x100020",
            "-o",
        ])
        .args([&elf, &object]));
    elf
}

/// No two pages alike.
fn filled(page: u64) -> Box<[u8; PAGE_BYTES]> {
    let mut content = Box::new([0x5a; PAGE_BYTES]);
    content[..8].copy_from_slice(&page.to_le_bytes());
    content
}

/// What this process has that is in no file.
fn anonymous_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}
