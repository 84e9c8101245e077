//! A bare QEMU with a guest that dirties memory, for tests and measurements of capture.
#![allow(dead_code, reason = "each user needs a part of it")]

#[path = "../../../tests/flat-guest/mod.rs"]
mod flat_guest;

use std::cell::Cell;
use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use understudy_libvirt::{Monitor, QmpEvent, SocketMonitor};
use understudy_primary::capture::{PageSink, SinkClosed};
use understudy_proto::layout::MemoryLayout;
use understudy_proto::units::{BlockIndex, PAGE_BYTES, PageData, PageIndex};

/// Memory of the guest.
pub(crate) const RAM_BYTES: usize = 64 << 20;
/// The firmware runs first, and where the machine is busy and its KVM emulates that, it takes minutes.
const BOOT_LIMIT: Duration = Duration::from_secs(300);

/// QEMU to use, unless `UNDERSTUDY_TEST_QEMU` names another.
const QEMU: &str = "qemu-system-x86_64";

/// Why real guests cannot be run here, `None` if they can.
pub(crate) fn skip_reason() -> Option<String> {
    if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return Some(format!("/dev/kvm cannot be used: {error}"));
    }
    flat_guest::TOOLS.map(str::to_owned).into_iter().chain([qemu()]).find_map(|program| {
        let status = Command::new(&program)
            .arg("--version")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        status.err().map(|error| format!("{program} cannot be run: {error}"))
    })
}

fn qemu() -> String {
    std::env::var("UNDERSTUDY_TEST_QEMU").unwrap_or_else(|_| QEMU.to_owned())
}

/// A running QEMU; killed when dropped.
pub(crate) struct Guest {
    child: Child,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) monitor: Arc<SocketMonitor>,
    pub(crate) events: Receiver<QmpEvent>,
    /// A STOP whose RESUME has not arrived yet.
    stopped: Cell<Option<Duration>>,
}

impl Guest {
    /// Starts a guest that dirties `pages` pages in each of its rounds and waits until it does.
    pub(crate) fn start(machine: &str, pages: usize, extra: &[&str]) -> io::Result<Self> {
        let dir = tempfile::tempdir()?;
        let elf = flat_guest::build(dir.path(), pages)?;
        Self::boot(dir, &elf, machine, extra)
    }

    /// The same with a guest that sends back what its rtl8139 gets; the card is in `extra`.
    pub(crate) fn start_with_card(machine: &str, pages: usize, extra: &[&str]) -> io::Result<Self> {
        let dir = tempfile::tempdir()?;
        let elf = flat_guest::build_with_card(dir.path(), pages)?;
        Self::boot(dir, &elf, machine, extra)
    }

    fn boot(dir: tempfile::TempDir, elf: &Path, machine: &str, extra: &[&str]) -> io::Result<Self> {
        let socket = dir.path().join("qmp");
        let child = Command::new(qemu())
            .args(["-accel", "kvm", "-cpu", "qemu64", "-m", "64", "-display", "none", "-nodefaults"])
            .args(["-M", machine, "-no-shutdown"])
            .args(extra)
            .arg("-kernel")
            .arg(elf)
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(dir.path().join("stderr"))?)
            .spawn()?;
        let mut child = Killed(Some(child));
        let deadline = Instant::now() + BOOT_LIMIT;
        let (monitor, events) = loop {
            match SocketMonitor::connect(&socket) {
                Ok(connected) => break connected,
                Err(error) if Instant::now() > deadline || child.has_ended() => {
                    let stderr = std::fs::read_to_string(dir.path().join("stderr")).unwrap_or_default();
                    return Err(io::Error::other(format!("no monitor: {error}; {stderr}")));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        let child = child.0.take().ok_or_else(|| io::Error::other("no child"))?;
        let guest = Self { child, dir, monitor: Arc::new(monitor), events, stopped: Cell::default() };
        while guest.round()? < 100 {
            if Instant::now() > deadline {
                return Err(io::Error::other("the guest does not count"));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(guest)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn command(&self, command: &str, arguments: Value) -> io::Result<Value> {
        self.monitor.execute(command, arguments).map_err(io::Error::other)
    }

    /// The number of the guest's round.
    pub(crate) fn round(&self) -> io::Result<u32> {
        let bytes = self.dump(flat_guest::ROUND_ADDRESS, 4)?;
        Ok(u32::from_le_bytes(bytes.try_into().map_err(|_| io::Error::other("short dump"))?))
    }

    /// True if the guest goes on counting.
    pub(crate) fn counts(&self) -> io::Result<bool> {
        let before = self.round()?;
        let deadline = Instant::now() + BOOT_LIMIT;
        while Instant::now() < deadline {
            if self.round()? != before {
                return Ok(true);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(false)
    }

    /// Physical memory as QEMU dumps it.
    pub(crate) fn dump(&self, address: u64, bytes: u64) -> io::Result<Vec<u8>> {
        dump(self.monitor.as_ref(), self.dir.path(), address, bytes)
    }

    /// Time from STOP to RESUME of every stop whose events have arrived.
    pub(crate) fn stops(&self) -> Vec<Duration> {
        let mut stops = Vec::new();
        for event in self.events.try_iter() {
            match event.name.as_str() {
                "STOP" => self.stopped.set(Some(event.timestamp)),
                "RESUME" => {
                    let at = self.stopped.take();
                    stops.extend(at.map(|at| event.timestamp.saturating_sub(at)));
                }
                _ => {}
            }
        }
        stops
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Killed(Option<Child>);

impl Killed {
    fn has_ended(&mut self) -> bool {
        self.0.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(Some(_))))
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Physical memory as QEMU dumps it.
pub(crate) fn dump(monitor: &dyn Monitor, dir: &Path, address: u64, bytes: u64) -> io::Result<Vec<u8>> {
    let file = dir.join("dump");
    monitor
        .execute("pmemsave", json!({"val": address, "size": bytes, "filename": file}))
        .map_err(io::Error::other)?;
    std::fs::read(file)
}

/// Keeps what it is given: the guest's memory, rebuilt.
#[derive(Default)]
pub(crate) struct Image {
    pub(crate) layout: Option<Arc<MemoryLayout>>,
    blocks: HashMap<u16, Vec<u8>>,
    pub(crate) zero_pages: u64,
}

impl Image {
    pub(crate) fn block(&self, name: &str) -> &[u8] {
        let index = self.layout.as_ref().and_then(|layout| layout.block_by_name(name.as_bytes()));
        index.and_then(|index| self.blocks.get(&index.0)).map_or(&[], Vec::as_slice)
    }

    /// Where main memory differs from a dump of the guest's physical memory: pages, by address. The VGA window and
    /// the firmware's shadow at 640 KiB to 1 MiB hide the memory behind them from the dump.
    pub(crate) fn differences(&self, dump: &[u8]) -> Vec<usize> {
        let ram = self.block("pc.ram");
        assert_eq!((ram.len(), dump.len()), (RAM_BYTES, RAM_BYTES));
        (0..RAM_BYTES / PAGE_BYTES)
            .map(|page| page * PAGE_BYTES)
            .filter(|at| !(0xa_0000..0x10_0000).contains(at))
            .filter(|at| ram[*at..*at + PAGE_BYTES] != dump[*at..*at + PAGE_BYTES])
            .collect()
    }
}

impl PageSink for Image {
    fn layout(&mut self, layout: &Arc<MemoryLayout>) -> Result<(), SinkClosed> {
        self.blocks = (0u16..)
            .zip(layout.blocks())
            .map(|(index, block)| (index, vec![0xaa; usize::try_from(block.used_bytes).unwrap_or(0)]))
            .collect();
        self.layout = Some(Arc::clone(layout));
        Ok(())
    }

    fn page(
        &mut self,
        block: BlockIndex,
        page: PageIndex,
        content: Option<&PageData>,
    ) -> Result<(), SinkClosed> {
        let at = usize::try_from(page.offset_bytes()).map_err(|_| SinkClosed)?;
        let memory = self.blocks.get_mut(&block.0).ok_or(SinkClosed)?;
        match content {
            Some(content) => memory[at..at + PAGE_BYTES].copy_from_slice(content),
            None => {
                self.zero_pages += 1;
                memory[at..at + PAGE_BYTES].fill(0);
            }
        }
        Ok(())
    }
}
