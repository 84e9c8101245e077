//! An agent that is going to die: this test program once more, as a process of its own.

use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Signal, getpid, kill_process};
use serde::{Deserialize, Serialize};
use understudy_libvirt::SocketMonitor;
use understudy_primary::capture::{CheckpointSource, ColoOptions, ColoSource, PageSink, SinkClosed, rescue};
use understudy_primary::life::SignOfLife;
use understudy_primary::state_file::{ProtectedGuest, StateFile};
use understudy_proto::ids::{Generation, GuestId};
use understudy_proto::layout::MemoryLayout;
use understudy_proto::units::{BlockIndex, PageData, PageIndex};

use super::LIMIT;

const ORDER: &str = "UNDERSTUDY_TEST_VICTIM";
/// How long the guest runs between two checkpoints.
const EPOCH: Duration = Duration::from_millis(3);

/// When it dies. Epochs count from 1.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) enum Death {
    /// So many microseconds after it was started, whatever it does then.
    Any(u64),
    /// At that page of the full copy.
    FullCopy(u64),
    /// When the full copy is complete and the guest is stopped.
    Copied,
    /// So many microseconds after the guest was let run.
    Started(u64),
    /// In that epoch, so many microseconds after it has begun to stop the guest.
    Stopping(u64, u64),
    /// In that epoch, between SEND and LOADED.
    Barrier(u64),
    /// In that epoch, at that page; the guest may run or not.
    Page(u64, u64),
    /// Not at all: it hangs where `Barrier` dies.
    Hang(u64),
    /// Not at all: for so long it keeps the guest stopped nearly always.
    Slow(Duration),
}

impl Death {
    pub(crate) fn random(random: &mut Random) -> Self {
        let epoch = 1 + random.below(5);
        match random.below(20) {
            0..5 => Self::Any(random.below(600_000)),
            5 => Self::FullCopy(random.below(16_000)),
            6 => Self::Copied,
            7 => Self::Started(random.below(10_000)),
            8..14 => Self::Stopping(epoch, random.below(3_000)),
            14..18 => Self::Barrier(epoch),
            _ => Self::Page(epoch, random.below(300)),
        }
    }

    /// For sure.
    pub(crate) fn leaves_stopped(self) -> bool {
        matches!(self, Self::Copied | Self::Barrier(_))
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Any(_) => "at any time",
            Self::FullCopy(_) => "in the full copy",
            Self::Copied => "at the end of the full copy",
            Self::Started(_) => "after the first start",
            Self::Stopping(..) => "after REPLY",
            Self::Barrier(_) => "between SEND and LOADED",
            Self::Page(..) => "reading an epoch",
            Self::Hang(_) | Self::Slow(_) => "not at all",
        }
    }
}

/// splitmix64
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

/// The process. Killed when dropped.
pub(crate) struct Victim {
    child: Child,
    death: Death,
}

impl Victim {
    pub(crate) fn spawn(socket: &Path, state_dir: &Path, death: Death) -> Self {
        let order = serde_json::to_string(&(socket, state_dir, death)).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["victim::lives_and_dies", "--exact", "--nocapture", "--test-threads=1"])
            .env(ORDER, order)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        Self { child, death }
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it is dead, or kills it if that is what is to happen. Gives the time of the kill, or of the moment
    /// its end was seen.
    pub(crate) fn wait_for_kill(mut self) -> Instant {
        let mut died_at = None;
        if let Death::Any(microseconds) = self.death {
            std::thread::sleep(Duration::from_micros(microseconds));
            died_at = Some(Instant::now());
            self.child.kill().unwrap();
        }
        let status = self.end();
        let died_at = died_at.unwrap_or_else(Instant::now);
        let said = self.said();
        assert_eq!(status.signal(), Some(9), "{:?} ended with {status}: {said}", self.death);
        died_at
    }

    /// Waits until it has ended by itself, and gives what it said.
    pub(crate) fn wait_for_end(mut self) -> String {
        let status = self.end();
        let said = self.said();
        assert!(status.success(), "{:?} ended with {status}: {said}", self.death);
        // Without the test harness's own lines.
        said.lines().filter_map(|line| line.strip_prefix("VICTIM ")).map(|line| format!("{line}\n")).collect()
    }

    fn end(&mut self) -> std::process::ExitStatus {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "{:?} does not end", self.death);
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    fn said(&mut self) -> String {
        let mut said = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        said
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn die() {
    kill_process(getpid(), Signal::KILL).unwrap();
    // The signal is on its way to this thread.
    loop {
        std::thread::park();
    }
}

fn hang() {
    kill_process(getpid(), Signal::STOP).unwrap();
    // Another thread may take the signal first: this one must not let the guest run before it is stopped as well.
    std::thread::sleep(Duration::from_secs(1));
}

fn die_in(microseconds: u64) {
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_micros(microseconds));
        die();
    });
}

/// Counts pages down, and dies.
struct Fuse(Option<u64>);

impl PageSink for Fuse {
    fn layout(&mut self, _: &Arc<MemoryLayout>) -> Result<(), SinkClosed> {
        Ok(())
    }

    fn page(&mut self, _: BlockIndex, _: PageIndex, _: Option<&PageData>) -> Result<(), SinkClosed> {
        match &mut self.0 {
            Some(0) => die(),
            Some(pages) => *pages -= 1,
            None => {}
        }
        Ok(())
    }
}

/// Not a test: the process. Without an order it has nothing to do.
#[test]
fn lives_and_dies() {
    let Ok(order) = std::env::var(ORDER) else { return };
    let (socket, state_dir, death): (std::path::PathBuf, std::path::PathBuf, Death) =
        serde_json::from_str(&order).unwrap();
    let _life = SignOfLife::take(&state_dir).unwrap();
    StateFile::new(&state_dir).write(&[guest()]).unwrap();
    let (monitor, _) = SocketMonitor::connect(socket).unwrap();
    // What every agent does first.
    rescue(&monitor).unwrap();
    let mut source = ColoSource::new(Arc::new(monitor), ColoOptions::default()).unwrap();

    let mut full = Fuse(if let Death::FullCopy(pages) = death { Some(pages) } else { None });
    source.arm(&mut full).unwrap();
    if matches!(death, Death::Copied | Death::FullCopy(_)) {
        die();
    }
    source.start().unwrap();
    if let Death::Started(microseconds) = death {
        die_in(microseconds);
    }
    let began = Instant::now();
    let mut epoch = 1;
    loop {
        match checkpoint(&mut source, epoch, death) {
            Ok(()) => println!("VICTIM captured {epoch}"),
            Err(error) => {
                println!("VICTIM epoch {epoch} failed: {error}");
                source.arm(&mut Fuse(None)).unwrap();
                source.start().unwrap();
                println!("VICTIM begun again");
            }
        }
        match death {
            Death::Hang(hangs) if epoch == hangs + 3 => break,
            Death::Slow(limit) if began.elapsed() > limit => break,
            _ => epoch += 1,
        }
    }
    source.disarm().unwrap();
    println!("VICTIM ended");
}

fn checkpoint(
    source: &mut ColoSource,
    epoch: u64,
    death: Death,
) -> Result<(), understudy_primary::capture::CaptureError> {
    source.wait_ready()?;
    std::thread::sleep(EPOCH);
    let mut sink = Fuse(None);
    match death {
        Death::Stopping(at, microseconds) if at == epoch => die_in(microseconds),
        Death::Page(at, pages) if at == epoch => sink = Fuse(Some(pages)),
        _ => {}
    }
    let mut barrier = || {
        match death {
            Death::Barrier(at) if at == epoch => die(),
            Death::Hang(at) if at == epoch => hang(),
            Death::Slow(_) => std::thread::sleep(Duration::from_millis(60)),
            _ => {}
        }
        Ok(())
    };
    source.checkpoint(&mut barrier, &mut sink)?;
    // An epoch of fewer pages.
    if matches!(death, Death::Page(at, _) if at == epoch) {
        die();
    }
    Ok(())
}

fn guest() -> ProtectedGuest {
    let guest = GuestId(uuid::Uuid::from_u128(7));
    ProtectedGuest {
        guest,
        name: "flat".into(),
        to: "nowhere".into(),
        insecure: true,
        epoch_ms: 5,
        generation: Generation(1),
        ungated: false,
        goals: None,
        policy: understudy_proto::policy::GuestPolicy::default(),
    }
}
