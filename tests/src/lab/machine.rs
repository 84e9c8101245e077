//! One lab host as a QEMU process.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::plan::{HostName, Net};
use super::roots::Roots;
use super::state::LabDir;
use crate::assets::emulator::Emulator;
use crate::assets::probe::Accelerator;
use crate::process;

/// What the supervisor needs to know to start a host; a part of [`super::supervisor::Order`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Hardware {
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
    pub(crate) modules: PathBuf,
    pub(crate) accelerator: Accelerator,
    pub(crate) emulator: Emulator,
    pub(crate) memory_mib: u32,
    pub(crate) roots: Roots,
    /// The trees of hosts that are not rooted in this machine's own system.
    pub(crate) trees: BTreeMap<HostName, PathBuf>,
}

/// A host that has power.
#[derive(Debug)]
pub(crate) struct Machine {
    child: Child,
}

impl Machine {
    /// Presses the button. Must be called on the supervisor's main thread: the process dies with it.
    pub(crate) fn power_on(lab: &LabDir, host: HostName, hardware: &Hardware) -> Result<Self> {
        let log =
            OpenOptions::new().create(true).append(true).open(lab.logs().join(format!("{host}.qemu")))?;
        let emulator = &hardware.emulator;
        let mut qemu = process::tied(&lab.helper(), Some(&lab.netns()), &emulator.program);
        for folder in &emulator.firmware {
            qemu.arg("-L").arg(folder);
        }
        let (cpu, processors) = match hardware.accelerator {
            // Emulated processors that run side by side are what the emulated KVM loses its way with. What is off costs much to
            // emulate: `rep movsb` copies byte by byte, five-level page tables make every walk longer, and so on.
            Accelerator::Tcg => {
                (["-accel", "tcg", "-cpu", "max,svm=on,la57=off,erms=off,fsrm=off,pku=off,smap=off"], "1")
            }
            Accelerator::Kvm => (["-accel", "kvm", "-cpu", "host"], "2"),
        };
        qemu.args(["-name", host.name(), "-M", "q35"]).args(cpu);
        qemu.args(["-smp", processors, "-m", &format!("{}M", hardware.memory_mib), "-uuid", &host.uuid()]);
        qemu.args(["-display", "none", "-nodefaults", "-no-reboot"]);
        qemu.args(["-chardev", &format!("file,id=console,path={},append=on", lab.console(host).display())]);
        qemu.args(["-serial", "chardev:console"]);
        qemu.arg("-kernel").arg(&hardware.kernel).arg("-initrd").arg(&hardware.initramfs);
        qemu.args(["-append", &command_line(lab, host, hardware)]);
        // `remap`: the tree may span several file systems of this machine.
        let root = hardware.trees.get(&host).map_or(Path::new("/"), PathBuf::as_path);
        qemu.args(["-virtfs", &read_only(root, "root")]);
        for (tag, path) in hardware.lent(lab, host) {
            qemu.args(["-virtfs", &read_only(&path, tag)]);
        }
        let shared = lab.shared();
        qemu.args(["-virtfs", &format!("local,path={},mount_tag=lab,security_model=none", shared.display())]);
        qemu.args([
            "-object",
            "rng-random,id=rng,filename=/dev/urandom",
            "-device",
            "virtio-rng-pci,rng=rng",
        ]);
        for net in Net::ALL {
            let (id, tap, mac) = (net.name(), host.tap(net), host.mac(net));
            qemu.args(["-netdev", &format!("tap,id={id},ifname={tap},script=no,downscript=no")]);
            qemu.args(["-device", &format!("virtio-net-pci,netdev={id},mac={mac},romfile=")]);
        }
        qemu.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = qemu.spawn().with_context(|| format!("cannot start host {host}"))?;
        Ok(Self { child })
    }

    /// A power cut: nothing inside has a chance to say goodbye.
    pub(crate) fn power_off(mut self) -> Result<()> {
        self.child.kill().context("cannot kill a host")?;
        process::wait(&mut self.child, Duration::from_secs(10)).map(drop)
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Hardware {
    /// What a host whose root is not this machine's finds at the same path as here.
    fn lent(&self, lab: &LabDir, host: HostName) -> Vec<(&'static str, PathBuf)> {
        if !self.trees.contains_key(&host) {
            return Vec::new();
        }
        let helper = lab.helper().parent().map(Path::to_owned).unwrap_or_default();
        vec![("helper", helper), ("modules", self.modules.clone())]
    }
}

fn read_only(path: &Path, tag: &str) -> String {
    format!("local,path={},mount_tag={tag},security_model=none,multidevs=remap,readonly=on", path.display())
}

fn command_line(lab: &LabDir, host: HostName, hardware: &Hardware) -> String {
    let lent: Vec<String> =
        hardware.lent(lab, host).iter().map(|(tag, path)| format!("{tag}:{}", path.display())).collect();
    format!(
        "console=ttyS0 quiet panic=-1 mitigations=off us.host={host} us.root={} us.lent={} us.first={} us.shared={} us.modules={}",
        hardware.roots.of(host),
        lent.join(","),
        lab.helper().display(),
        lab.shared().display(),
        hardware.modules.display(),
    )
}
