//! Everything a lab is made of that is not the machine's own: kernels, initramfs images, the guest program.

pub(crate) mod cpio;
pub(crate) mod debian13;
pub(crate) mod emulator;
pub(crate) mod guest;
pub(crate) mod initramfs;
pub(crate) mod kernel;
pub(crate) mod probe;
pub(crate) mod virtqemud;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::lab::plan::HostName;
use crate::lab::roots::{Root, Roots};
use crate::workspace;
use emulator::Emulator;
use initramfs::Recipe;
use kernel::{Flavour, Kernel};
use probe::Accelerator;

/// The assets of a lab, all there.
#[derive(Debug)]
pub(crate) struct Assets {
    pub(crate) host_kernel: Kernel,
    pub(crate) host_initramfs: PathBuf,
    pub(crate) guest_kernel: Kernel,
    pub(crate) guest_initramfs: PathBuf,
    pub(crate) accelerator: Accelerator,
    /// What the hosts run on.
    pub(crate) emulator: Emulator,
    /// The trees of hosts that are not rooted in this machine's own system.
    pub(crate) trees: BTreeMap<HostName, PathBuf>,
    /// For hosts whose libvirt is this daemon.
    pub(crate) virtqemud: Option<PathBuf>,
}

impl Assets {
    /// Downloads and builds what is missing.
    pub(crate) fn ensure(roots: Roots) -> Result<Self> {
        let cache = workspace::lab_cache()?;
        let trees = trees(&cache, roots)?;
        let virtqemud = roots.any(Root::Virtqemud).then(|| virtqemud::ensure(&cache)).transpose()?;
        let host_kernel = Kernel::ensure(&cache, Flavour::Full)?;
        let guest_kernel = Kernel::ensure(&cache, Flavour::Cloud)?;
        let program = guest::build()?;
        let host_initramfs = initramfs::build(
            &cache,
            &host_kernel,
            &Recipe {
                name: "host.img",
                init: include_str!("host-initramfs.sh"),
                modules: &["virtio_pci", "9p", "9pnet_virtio", "overlay"],
                program: None,
            },
        )?;
        let guest_initramfs = initramfs::build(
            &cache,
            &guest_kernel,
            &Recipe {
                name: "guest.img",
                init: include_str!("guest-initramfs.sh"),
                // The last two bring the power button, without which `virsh shutdown` does nothing.
                modules: &["virtio_pci", "virtio_net", "evdev", "button"],
                program: Some(&program),
            },
        )?;
        let accelerator = probe::accelerator(&cache, &host_kernel)?;
        let emulator = match accelerator {
            Accelerator::Tcg => Emulator::steady(&cache),
            Accelerator::Kvm => Emulator::own(),
        };
        Ok(Self {
            host_kernel,
            host_initramfs,
            guest_kernel,
            guest_initramfs,
            accelerator,
            emulator,
            trees,
            virtqemud,
        })
    }
}

/// Makes what a lab with these roots needs, so that the first one does not have to wait for it.
pub(crate) fn prepare(roots: Roots) -> Result<()> {
    Assets::ensure(roots).map(drop)
}

fn trees(cache: &Path, roots: Roots) -> Result<BTreeMap<HostName, PathBuf>> {
    let mut trees = BTreeMap::new();
    for host in HostName::ALL {
        match roots.of(host) {
            Root::Machine | Root::Virtqemud => {}
            Root::Debian13 => drop(trees.insert(host, debian13::ensure(cache)?)),
        }
    }
    Ok(trees)
}

/// Removes what interrupted runs have left: folders named after their maker's process.
fn sweep(cache: &Path, prefix: &str) -> Result<()> {
    for entry in fs::read_dir(cache)?.flatten() {
        let name = entry.file_name();
        let maker = name.to_str().and_then(|name| name.strip_prefix(prefix)).map(str::to_owned);
        if maker.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}
