//! How long a promotion takes from the first byte sent to QEMU until the guest runs, by the size of the guest: with its
//! memory kept up to date in the standby (warm), and with all of it in the stream (cold). And what memory the backup has.
//!
//! `cargo xtask bench load -- [--rounds N] [--mib MIB,MIB,..]`, as root.
//! The guest is the flat one of the capture's tests, under this machine's KVM, with libvirt's daemon of its own; every page
//! of it is filled. The standby is made and loaded anew each round.
#![allow(clippy::unwrap_used, reason = "it ends by panicking")]

#[path = "../../tests/flat-guest/mod.rs"]
mod flat_guest;
#[path = "../../tests/examples/bench/report.rs"]
mod report;
#[path = "../tests/support/mod.rs"]
mod support;

use clap::Parser;
use report::Report;
use std::path::{Path, PathBuf};
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

#[derive(Parser)]
struct Arguments {
    /// Promotions of each size
    #[arg(long, default_value_t = 20)]
    rounds: usize,
    /// Memory of the guests
    #[arg(long, value_delimiter = ',', default_value = "128,1024,4096")]
    mib: Vec<u64>,
    /// Where the figures go
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn main() {
    if let Some(reason) = missing() {
        println!("skipped: {reason}");
        return;
    }
    let arguments = Arguments::parse();
    let mut daemon = Libvirtd::start_in(tempfile::tempdir_in("/dev/shm").unwrap());
    let connection = daemon.connect();
    let dir = daemon.dir.path().to_owned();
    let kernel = flat_guest::build(&dir, 1000).unwrap();
    let promoter = LibvirtPromoter::new(daemon.uri(), &dir, true);
    let sizes = arguments.mib.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let mut report =
        Report::new("load", format!("cargo xtask bench load -- --rounds {} --mib {sizes}", arguments.rounds));
    let mut medians = Vec::new();
    for mib in &arguments.mib {
        medians.push(measure(&connection, &promoter, &kernel, *mib, arguments.rounds, &mut report));
    }
    let (least, most) =
        medians.iter().fold((f64::MAX, 0.0f64), |(least, most), ms| (least.min(*ms), most.max(*ms)));
    report.at_most("promotion, warm, slowest median, ms", 50.0, most);
    report.at_most("promotion, warm, slowest to fastest size", 1.2, most / least);
    report.write(arguments.json.as_ref()).unwrap();
}

/// The median of warm promotions, in ms.
fn measure(
    connection: &Connection,
    promoter: &LibvirtPromoter,
    kernel: &Path,
    mib: u64,
    rounds: usize,
    report: &mut Report,
) -> f64 {
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
    let mib_of = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let name = format!("{mib} MiB");
    let ms = |times: Vec<Duration>| times.iter().map(|time| time.as_secs_f64() * 1e3).collect();
    report.row(&name, "cold", "ms", ms(cold));
    report.row(&name, "anonymous", "MiB", vec![mib_of(memory.0)]);
    report.row(&name, "in the standby's file", "MiB", vec![mib_of(memory.1)]);
    report.at_most(
        &format!("backup's memory, {name}: guest + 64 MiB"),
        mib as f64 + 64.0,
        mib_of(memory.0 + memory.1),
    );
    report.row(&name, "understudy", "ms", ms(warm))
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
