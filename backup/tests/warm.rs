//! A standby whose memory the backup keeps up to date, with a real libvirtd and QEMU (emulated, so that it runs
//! anywhere as root): made, filled through the mapping, loaded, let run, rebooted, saved, restored.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

mod support;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::daemon::{Libvirtd, PATIENCE, capture, missing};
use support::{Epoch, Page, at};
use understudy_backup::assembly::Attempt;
use understudy_backup::dump::Dump;
use understudy_backup::image::{AnonymousMemory, Image};
use understudy_backup::libvirt::LibvirtPromoter;
use understudy_backup::promoter::{LocalDomain, Promoter, Standby, StandbySpec};
use understudy_backup::shared::SharedMemory;
use understudy_backup::worker::{self, Job, Report};
use understudy_libvirt::{Domain, RunState, XmlFlags, qmp};
use understudy_proto::epoch::EpochKind::{Delta, Full};
use understudy_proto::ids::GuestId;
use understudy_proto::pool::Pool;
use understudy_proto::rpc::epoch::{Begin, Seed};
use understudy_proto::units::PAGE_BYTES;

/// Where no firmware without a boot device writes: 32 MiB.
const PATTERN_PAGE: u64 = 8192;
const PATTERN_PAGES: u64 = 1024;

/// A guest whose firmware says on a debug port what it does.
fn guest_xml(machine: &str, mib: u64, log: &Path) -> String {
    format!(
        "<domain type='qemu' xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'><name>web</name>
         <memory unit='MiB'>{mib}</memory><vcpu>1</vcpu>
         <os><type arch='x86_64' machine='{machine}'>hvm</type></os><features><acpi/></features>
         <devices><emulator>/usr/bin/qemu-system-x86_64</emulator><memballoon model='none'/>
           <video><model type='vga'/></video></devices>
         <q:commandline><q:arg value='-chardev'/><q:arg value='file,id=fw,append=on,path={}'/>
           <q:arg value='-device'/><q:arg value='isa-debugcon,iobase=0x402,chardev=fw'/></q:commandline></domain>",
        log.display()
    )
}

/// No two pages alike, nothing a compressor would find.
fn pattern(index: u64) -> Box<[u8; PAGE_BYTES]> {
    let mut state = index.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut page = Box::new([0; PAGE_BYTES]);
    for chunk in page.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        chunk.copy_from_slice(&state.to_le_bytes());
    }
    page
}

fn boots(log: &Path) -> usize {
    std::fs::read_to_string(log).unwrap_or_default().matches("SeaBIOS (version").count()
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A number of kB from /proc/self/status.
fn status_kib(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().unwrap()
}

/// The worker, asked one thing at a time.
struct Worker {
    jobs: tokio::sync::mpsc::Sender<Job>,
    reports: tokio::sync::mpsc::Receiver<Report>,
    attempts: u64,
}

impl Worker {
    fn start() -> Self {
        let (jobs, reports) =
            worker::start("web", Arc::new(AnonymousMemory), Dump::default(), Pool::single()).unwrap();
        Self { jobs, reports, attempts: 0 }
    }

    fn ask(&mut self, job: Job) {
        self.jobs.blocking_send(job).unwrap();
    }

    fn commit(&mut self, epoch: &Epoch, seed: Option<&Arc<Seed>>) {
        self.attempts += 1;
        let attempt = Attempt(self.attempts);
        let begin = Begin { generation: epoch.at.generation, epoch: epoch.at.epoch, kind: epoch.kind };
        self.ask(Job::Open(attempt, begin, seed.cloned()));
        epoch.frames.iter().for_each(|frame| self.ask(Job::Frame(frame.clone())));
        self.ask(Job::Device(epoch.device.clone()));
        self.ask(Job::Verify(epoch.manifest.clone()));
        self.ask(Job::Apply(attempt));
        assert!(matches!(self.report(), Report::Verified(_)));
        assert!(matches!(self.report(), Report::Applied(at) if at == epoch.at));
    }

    /// The next report that is not the end of a move.
    fn report(&mut self) -> Report {
        loop {
            match self.reports.blocking_recv().unwrap() {
                Report::Adopted(_, moved) => moved.unwrap(),
                report => return report,
            }
        }
    }

    fn adopt(&mut self, shared: &Arc<SharedMemory>) {
        self.ask(Job::Adopt(1, Arc::clone(shared)));
        match self.reports.blocking_recv().unwrap() {
            Report::Adopted(1, moved) => moved.unwrap(),
            other => panic!("{other:?}"),
        }
    }

    fn take(&mut self) -> Arc<Image> {
        self.ask(Job::TakeImage);
        match self.report() {
            Report::Image(image) => image.unwrap(),
            other => panic!("{other:?}"),
        }
    }
}

fn shared(standby: Standby) -> Arc<SharedMemory> {
    match standby {
        Standby::Warm(shared) => shared,
        Standby::Cold(reason) => panic!("cold: {reason}"),
    }
}

/// Every page of an image that is not zero, as a full epoch.
fn full(image: &Image) -> Epoch {
    let mut pages: Vec<Page> = Vec::new();
    for (index, _, memory) in image.blocks() {
        let (all, _) = memory.as_chunks::<PAGE_BYTES>();
        let used = all.iter().zip(0..).filter(|(content, _)| content.iter().any(|b| *b != 0));
        pages.extend(used.map(|(content, page)| (index.0, page, Some(Box::new(*content)))));
    }
    Epoch::new(at(1, 1), Full, image.layout(), &pages, image.device())
}

fn delta(image: &Image, epoch: u64, salt: u64) -> Epoch {
    let pages: Vec<Page> =
        (0..PATTERN_PAGES).map(|i| (0, PATTERN_PAGE + i, Some(pattern(salt + i)))).collect();
    Epoch::new(at(1, epoch), Delta, image.layout(), &pages, image.device())
}

/// The guest's own view of the pattern's place.
fn memory(domain: &Domain, dir: &Path) -> Vec<u8> {
    use understudy_libvirt::Monitor;
    let file = dir.join("pmemsave");
    let bytes = PATTERN_PAGES * PAGE_BYTES as u64;
    let arguments =
        serde_json::json!({"val": PATTERN_PAGE * PAGE_BYTES as u64, "size": bytes, "filename": file});
    domain.execute("pmemsave", arguments).unwrap();
    std::fs::read(&file).unwrap()
}

fn virsh(uri: &str, arguments: &[&str]) {
    let done = Command::new("virsh").args(["-c", uri]).args(arguments).output().unwrap();
    assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
}

#[test]
fn a_warm_standby_takes_over_reboots_and_is_saved() {
    takes_over("pc");
}

#[test]
fn and_so_does_one_of_q35() {
    takes_over("q35");
}

fn takes_over(machine: &str) {
    if let Some(reason) = missing() {
        println!("skipped: {reason}");
        return;
    }
    let mut daemon = Libvirtd::start_in(tempfile::tempdir_in("/dev/shm").unwrap());
    let connection = daemon.connect();
    let dir = daemon.dir.path().to_owned();
    let log = dir.join("firmware.log");
    let promoter = LibvirtPromoter::new(daemon.uri(), &dir, true);
    let domain = connection.create_paused(&guest_xml(machine, 128, &log)).unwrap();
    let guest = GuestId(domain.uuid());
    domain.resume().unwrap();
    wait_until("the firmware starts", || boots(&log) == 1);
    let image = capture(&domain);
    domain.destroy().unwrap();
    let spec = StandbySpec { guest, seed: Arc::clone(image.seed()), persistent: true };
    let wanted: Vec<u8> = (0..PATTERN_PAGES).flat_map(|i| pattern(2 + i).to_vec()).collect();

    let mut worker = Worker::start();
    worker.commit(&full(&image), Some(image.seed()));
    worker.adopt(&shared(promoter.prepare(&spec).unwrap()));
    worker.commit(&delta(&image, 2, 1), None);
    // The standby dies and its file with it: the pages are still here, and move on into another one.
    let first = promoter.local(guest).unwrap();
    assert_eq!(first, LocalDomain::Waiting);
    connection.find_domain("web").unwrap().destroy().unwrap();
    worker.commit(&delta(&image, 3, 2), None);
    let memory_files = shared(promoter.prepare(&spec).unwrap());
    worker.adopt(&memory_files);
    // One copy: the files hold the guest's memory, and this process, although it keeps one more image of what was
    // captured, little else.
    let (anonymous, in_files) = (status_kib("RssAnon"), memory_files.resident_bytes());
    println!("{in_files} bytes in files, {anonymous} kB anonymous, VmRSS {} kB", status_kib("VmRSS"));
    assert!(in_files == 128 << 20 && anonymous <= 64 << 10, "{in_files} {anonymous}");

    let image = worker.take();
    assert!(image.shared().is_some());
    let began = Instant::now();
    promoter.load(&spec, &image).unwrap();
    println!("loaded in {:?}", began.elapsed());
    let standby = connection.find_domain("web").unwrap();
    assert_eq!(qmp::query_capabilities(&standby).unwrap().get("x-ignore-shared"), Some(&false));
    assert!(memory(&standby, &dir) == wanted, "the guest has not the memory of the epoch");
    drop(image);
    let activation = promoter.activate(guest, Some(&spec)).unwrap();
    assert!(activation.warnings.is_empty(), "{activation:?}");
    worker.ask(Job::DropImage);
    let definition = standby.xml(XmlFlags { inactive: true, ..XmlFlags::default() }).unwrap();
    assert!(!definition.contains("memoryBacking") && !definition.contains("incoming"), "{definition}");
    assert!(!standby.portable_xml().unwrap().contains("memoryBacking"));

    // Reboots: the firmware is in blocks that are not in the file.
    let before = boots(&log);
    use understudy_libvirt::Monitor;
    standby.execute("system_reset", serde_json::Value::Null).unwrap();
    wait_until("the firmware starts again", || boots(&log) > before);
    assert_eq!(qmp::query_status(&standby), Ok(RunState::Running));

    // Saved with its memory, restored with it.
    let saved = dir.join("web.save");
    let path = saved.to_str().unwrap();
    virsh(&daemon.uri(), &["save", "web", path]);
    let bytes = std::fs::read(&saved).unwrap();
    let needle = &wanted[5 * PAGE_BYTES..6 * PAGE_BYTES];
    assert!(bytes.windows(PAGE_BYTES).any(|window| window == needle), "no memory in {} bytes", bytes.len());
    virsh(&daemon.uri(), &["restore", path]);
    let restored = connection.find_domain("web").unwrap();
    assert_eq!(qmp::query_status(&restored), Ok(RunState::Running));
    assert!(memory(&restored, &dir) == wanted, "the restored guest has other memory");
    // And it can be protected in its turn.
    assert!(capture(&restored).layout().total_bytes() > 128 << 20);
    restored.destroy().unwrap();
}

#[test]
fn what_cannot_be_warm_is_cold_and_says_why() {
    if let Some(reason) = missing() {
        println!("skipped: {reason}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let on_tmpfs = rustix::fs::statfs(dir.path()).unwrap().f_type == 0x0102_1994;
    let mut daemon = Libvirtd::start_in(dir);
    let connection = daemon.connect();
    let promoter = LibvirtPromoter::new(daemon.uri(), daemon.dir.path(), true);
    let domain = connection.create_paused(&guest_xml("pc", 64, &daemon.dir.path().join("log"))).unwrap();
    let guest = GuestId(domain.uuid());
    let image = Arc::new(capture(&domain));
    domain.destroy().unwrap();
    let cold = |xml: String| {
        let seed = Seed { layout: image.layout().clone(), domain_xml: xml };
        let spec = StandbySpec { guest, seed: Arc::new(seed), persistent: false };
        match promoter.prepare(&spec).unwrap() {
            Standby::Cold(reason) => (reason, spec),
            Standby::Warm(_) => panic!("warm"),
        }
    };
    let xml = image.seed().domain_xml.clone();
    let locked = xml.replace("<vcpu", "<memoryBacking><allocation mode='immediate'/></memoryBacking><vcpu");
    assert!(cold(locked).0.contains("immediate"));
    if on_tmpfs {
        println!("skipped: the temporary directory is on tmpfs");
        return;
    }
    let (reason, spec) = cold(xml);
    assert!(reason.contains("not on tmpfs") && reason.contains("memory_backing_dir"), "{reason}");
    promoter.load(&spec, &image).unwrap();
    promoter.activate(guest, Some(&spec)).unwrap();
    connection.find_domain("web").unwrap().destroy().unwrap();
}
