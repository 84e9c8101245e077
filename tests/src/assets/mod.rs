//! Everything a lab is made of that is not the machine's own: kernels, initramfs images, the guest program.

pub(crate) mod cpio;
pub(crate) mod emulator;
pub(crate) mod guest;
pub(crate) mod initramfs;
pub(crate) mod kernel;
pub(crate) mod probe;

use std::path::PathBuf;

use anyhow::Result;

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
}

impl Assets {
    /// Downloads and builds what is missing.
    pub(crate) fn ensure() -> Result<Self> {
        let cache = workspace::lab_cache()?;
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
        Ok(Self { host_kernel, host_initramfs, guest_kernel, guest_initramfs, accelerator, emulator })
    }
}
