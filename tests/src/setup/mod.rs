//! `cargo xtask setup`: what the machine needs beside a Rust toolchain.

pub(crate) mod apt;

use anyhow::Result;

/// The packages, and what each is for.
const PACKAGES: &[(&str, &str)] = &[
    ("gcc", "links what cargo builds"),
    ("libc6-dev", "links what cargo builds, the guest program statically"),
    ("pkg-config", "finds libvirt for the build"),
    ("libvirt-dev", "libvirt's library to build against"),
    ("protobuf-compiler", "protoc, for the build of etcd's client"),
    ("libprotobuf-dev", "protobuf's own schema, for the same"),
    ("etcd-server", "etcd, which tests of that arbiter start"),
    ("qemu-system-x86", "runs the lab's hosts and, in them, the guests"),
    ("seabios", "firmware of hosts and guests"),
    ("ipxe-qemu", "option ROM of virtio-net"),
    ("libvirt-daemon", "libvirtd and virtlogd of the lab's hosts"),
    ("libvirt-daemon-system", "libvirt's configuration"),
    ("libvirt-daemon-driver-qemu", "libvirt's driver for QEMU"),
    ("libvirt-clients", "virsh"),
    ("busybox-static", "initramfs of hosts and guests"),
    ("kmod", "depmod for the unpacked kernels, modprobe in the hosts"),
    ("iproute2", "network namespace, bridges, taps"),
    ("tcpdump", "lab pcap"),
];

/// Installs what is missing, after saying what that is. Does nothing, and needs no network, otherwise.
pub(crate) fn ensure() -> Result<()> {
    install(PACKAGES)
}

/// Open vSwitch beside that, for who tests guests in it.
pub(crate) fn ensure_open_vswitch() -> Result<()> {
    install(&[("openvswitch-switch", "switches guests in lab hosts")])
}

fn install(packages: &[(&str, &str)]) -> Result<()> {
    let missing = apt::missing(packages.iter().map(|(name, _)| *name))?;
    if missing.is_empty() {
        return Ok(());
    }
    eprintln!("These Debian packages are missing and will be installed:");
    for (name, purpose) in packages.iter().filter(|(name, _)| missing.iter().any(|gone| gone == name)) {
        eprintln!("  {name:28} {purpose}");
    }
    apt::install(&missing)
}
