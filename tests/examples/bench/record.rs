//! Records what a Linux guest does to its memory. QEMU emulates it with its memory in a file; at the end of each epoch it is stopped,
//! the file compared with what it was, and what differs is the epoch. Pages that were written with what they held are not seen, so
//! a real epoch has some more, and those cost next to nothing.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::Value;
use understudy_libvirt::{Monitor, SocketMonitor};
use understudy_proto::units::{PAGE_BYTES, PageData};

use crate::recorded::Recorded;
use crate::trace::Pages;

/// What the guest's first program says on its console when the workload runs.
const READY: &str = "WORKLOAD READY";
const BOOT_LIMIT: Duration = Duration::from_secs(600);
/// Between [`READY`] and the first epoch.
const SETTLE: Duration = Duration::from_secs(5);

/// What to record.
#[derive(clap::Args)]
pub(crate) struct Order {
    /// Kernel of the guest
    #[arg(long)]
    kernel: PathBuf,
    /// Its initramfs
    #[arg(long)]
    initrd: PathBuf,
    /// Given to its init as `us.workload`
    #[arg(long)]
    workload: String,
    /// Epochs to record
    #[arg(long, default_value_t = 40)]
    epochs: usize,
    /// How long each is; an emulated guest does in it what a real one does in a tenth or less
    #[arg(long, default_value_t = 250)]
    epoch_ms: u64,
    /// Memory of the guest
    #[arg(long, default_value_t = 256)]
    mib: usize,
    /// The trace
    #[arg(long)]
    out: PathBuf,
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn run(order: &Order) -> anyhow::Result<()> {
    // In memory: it is read once for every epoch.
    let dir = tempfile::tempdir_in("/dev/shm")?;
    let (ram, socket, console) = (dir.path().join("ram"), dir.path().join("qmp"), dir.path().join("console"));
    let backend =
        format!("memory-backend-file,id=ram,size={}M,mem-path={},share=on", order.mib, ram.display());
    let child = Command::new("qemu-system-x86_64")
        .args(["-accel", "tcg", "-cpu", "max", "-m", &order.mib.to_string(), "-object", &backend])
        .args(["-M", "pc,memory-backend=ram", "-nodefaults", "-display", "none", "-no-reboot"])
        .arg("-kernel")
        .arg(&order.kernel)
        .arg("-initrd")
        .arg(&order.initrd)
        .args(["-append", &format!("console=ttyS0 quiet us.workload={}", order.workload)])
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", socket.display()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .context("qemu-system-x86_64")?;
    let mut qemu = Killed(child);
    let deadline = Instant::now() + BOOT_LIMIT;
    loop {
        let said = std::fs::read(&console).unwrap_or_default();
        let said = String::from_utf8_lossy(&said).into_owned();
        if said.contains(READY) {
            break;
        }
        if Instant::now() > deadline || qemu.0.try_wait()?.is_some() {
            bail!("the guest is not ready; its console: {said}");
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    std::thread::sleep(SETTLE);
    let (monitor, _events) = SocketMonitor::connect(&socket)?;
    let recorded = epochs(&monitor, &ram, order)?;
    drop(qemu);
    recorded.write(&order.out)?;
    let changed: usize = recorded.epochs.iter().map(Vec::len).sum();
    println!(
        "{}: {} epochs, {changed} pages changed, {} of them different ones, {} KiB",
        order.workload,
        recorded.epochs.len(),
        recorded.base.len(),
        std::fs::metadata(&order.out)?.len() >> 10,
    );
    let again = Recorded::read(&order.out)?;
    ensure!(again.base == recorded.base && again.epochs == recorded.epochs, "the trace does not read back");
    Ok(())
}

fn epochs(monitor: &SocketMonitor, ram: &Path, order: &Order) -> anyhow::Result<Recorded> {
    monitor.execute("stop", Value::Null)?;
    let mut memory = read(ram)?;
    let first = memory.clone();
    let mut epochs: Vec<Pages> = Vec::new();
    for _ in 0..order.epochs {
        monitor.execute("cont", Value::Null)?;
        std::thread::sleep(Duration::from_millis(order.epoch_ms));
        monitor.execute("stop", Value::Null)?;
        let now = read(ram)?;
        let both = pages(&memory).iter().zip(pages(&now));
        let changed = (0u64..).zip(both).filter(|(_, (before, now))| before != now);
        epochs.push(changed.map(|(number, (_, now))| (number, Box::new(*now))).collect());
        memory = now;
    }
    let mut touched: Vec<u64> = epochs.iter().flatten().map(|(number, _)| *number).collect();
    touched.sort_unstable();
    touched.dedup();
    let all = pages(&first);
    let base = touched.into_iter().filter_map(|number| {
        let content = usize::try_from(number).ok().and_then(|at| all.get(at))?;
        Some((number, Box::new(*content)))
    });
    Ok(Recorded::new(all.len() as u64, base.collect(), epochs))
}

fn read(ram: &Path) -> anyhow::Result<Vec<u8>> {
    let mut content = Vec::new();
    std::fs::File::open(ram)?.read_to_end(&mut content)?;
    Ok(content)
}

fn pages(memory: &[u8]) -> &[PageData] {
    memory.as_chunks::<PAGE_BYTES>().0
}
