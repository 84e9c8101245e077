//! From a bare kernel to a host with libvirt.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::mount::MountFlags;

use super::{Progress, exec, service};
use crate::lab::plan::{GUEST_BRIDGE, HostName, Net, START_LIBVIRT};
use crate::lab::roots::Root;
use crate::lab::wire::Phase;
use crate::process;

/// Emulated hosts are slow, and two boot at once.
const LIMIT: Duration = Duration::from_secs(120);

/// What libvirt found out about QEMU. To find it out takes half a minute in an emulated host, so it is kept
/// in the shared folder and by the lab's owner; libvirt itself decides whether it still holds.
const CAPABILITIES: &str = "/var/cache/libvirt/qemu/capabilities";
/// Where hosts of a root keep the same in the shared folder: it depends on QEMU and libvirt.
pub(crate) fn probed(root: Root) -> String {
    format!(".capabilities-{root}")
}

/// On a tmpfs, so that a backup can keep the memory of its standbys up to date.
const GUEST_MEMORY: &str = "/dev/shm/libvirt-ram";

/// What the kernel command line says.
struct Identity {
    host: HostName,
    shared: PathBuf,
    modules: PathBuf,
    root: Root,
}

impl Identity {
    fn read() -> Result<Self> {
        let cmdline = fs::read_to_string("/proc/cmdline")?;
        let value = |key: &str| {
            let found = cmdline.split_whitespace().find_map(|word| word.strip_prefix(key));
            found.with_context(|| format!("the kernel command line has no {key}"))
        };
        Ok(Self {
            host: value("us.host=")?.parse()?,
            shared: value("us.shared=")?.into(),
            modules: value("us.modules=")?.into(),
            root: value("us.root=")?.parse()?,
        })
    }

    /// What this host keeps over a power cut.
    fn disk(&self) -> PathBuf {
        self.shared.join(".disk").join(self.host.name())
    }
}

pub(super) fn boot(progress: &Progress) -> Result<()> {
    let identity = Identity::read()?;
    progress.set("file systems", None);
    file_systems(&identity)?;
    progress.set("modules", None);
    modules(&identity)?;
    progress.set("network", None);
    network(identity.host)?;
    exec::listen(identity.host.address(Net::Mgmt), progress.clone())?;
    identify(identity.host)?;
    progress.set("libvirt", None);
    let remembered = identity.shared.join(probed(identity.root));
    copy_files(&remembered, Path::new(CAPABILITIES))?;
    libvirt(&identity)?;
    copy_files(Path::new(CAPABILITIES), &remembered)?;
    service::keep_running(&identity.shared, identity.host);
    progress.set(Phase::READY, None);
    Ok(())
}

fn file_systems(identity: &Identity) -> Result<()> {
    mount("devpts", "/dev/pts", "devpts", "ptmxmode=0666,mode=0620")?;
    for place in ["/dev/shm", "/run", "/tmp", "/var/tmp"] {
        mount("tmpfs", place, "tmpfs", "mode=1777")?;
    }
    // What this machine's own libvirt has is none of the host's business.
    for place in ["/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt"] {
        mount("tmpfs", place, "tmpfs", "mode=0755")?;
    }
    // libvirt looks for it once, when it starts.
    mount("hugetlbfs", "/dev/hugepages", "hugetlbfs", "mode=1777,pagesize=2M")?;
    mount("cgroup2", "/sys/fs/cgroup", "cgroup2", "")?;
    let shared = identity.shared.to_str().context("the shared folder's name is not UTF-8")?;
    mount("lab", shared, "9p", "trans=virtio,version=9p2000.L,msize=524288,cache=none,access=any")?;
    for (kept, place) in [("libvirt", "/etc/libvirt/qemu"), ("understudy", "/var/lib/understudy")] {
        let kept = identity.disk().join(kept);
        fs::create_dir_all(&kept)?;
        fs::create_dir_all(place)?;
        rustix::mount::mount_bind(&kept, place)
            .with_context(|| format!("cannot put {} on {place}", kept.display()))?;
    }
    for place in ["/run/lab", "/run/lock", "/run/libvirt", "/run/understudy"] {
        fs::create_dir_all(place)?;
    }
    Ok(())
}

fn mount(source: &str, target: &str, kind: &str, options: &str) -> Result<()> {
    fs::create_dir_all(target)?;
    let options = std::ffi::CString::new(options)?;
    rustix::mount::mount(source, target, kind, MountFlags::empty(), options.as_c_str())
        .with_context(|| format!("cannot mount {kind} on {target}"))
}

fn modules(identity: &Identity) -> Result<()> {
    fs::create_dir_all("/lib/modules")?;
    let release = identity.modules.file_name().context("the module tree has no name")?;
    let link = Path::new("/lib/modules").join(release);
    if !link.exists() {
        symlink(&identity.modules, &link)?;
    }
    // Guests get no virtualisation of their own: its state would be one more thing to move.
    let kvm = if fs::read_to_string("/proc/cpuinfo")?.contains(" svm") { "kvm_amd" } else { "kvm_intel" };
    let limit = LIMIT;
    process::checked(Command::new("modprobe").args([kvm, "nested=0"]), limit)?;
    process::checked(
        Command::new("modprobe").args(["-a", "virtio_net", "virtio_rng", "tun", "bridge", "vhost_net"]),
        limit,
    )?;
    // The output gate's. `numifb=0`: every gate makes its own.
    process::checked(Command::new("modprobe").args(["ifb", "numifbs=0"]), limit)?;
    let gate = ["sch_plug", "sch_ingress", "act_mirred", "cls_matchall", "sch_netem"];
    process::checked(Command::new("modprobe").arg("-a").args(gate), limit)?;
    if !Path::new("/dev/kvm").exists() {
        bail!("{kvm} is loaded and there is no /dev/kvm");
    }
    Ok(())
}

fn network(host: HostName) -> Result<()> {
    ip("link set lo up")?;
    for net in Net::ALL {
        let device = interface(&host.mac(net))?;
        ip(&format!("link set {device} name {}", net.name()))?;
        ip(&format!("link set {} up", net.name()))?;
    }
    // Guests and the host share the cable to the LAN.
    ip(&format!("link add {GUEST_BRIDGE} type bridge forward_delay 0 mcast_snooping 0"))?;
    ip(&format!("link set {GUEST_BRIDGE} address {}", host.mac(Net::Lan)))?;
    ip(&format!("link set {} master {GUEST_BRIDGE}", Net::Lan.name()))?;
    ip(&format!("link set {GUEST_BRIDGE} up"))?;
    for (net, device) in [(Net::Lan, GUEST_BRIDGE), (Net::Repl, "repl"), (Net::Mgmt, "mgmt")] {
        ip(&format!("address add {}/24 dev {device}", host.address(net)))?;
    }
    Ok(())
}

fn ip(line: &str) -> Result<()> {
    process::checked(Command::new("ip").args(line.split_whitespace()), LIMIT).map(drop)
}

fn interface(mac: &str) -> Result<String> {
    for entry in fs::read_dir("/sys/class/net")?.flatten() {
        if fs::read_to_string(entry.path().join("address")).is_ok_and(|address| address.trim() == mac) {
            return Ok(entry.file_name().to_string_lossy().into_owned());
        }
    }
    bail!("no network interface {mac}")
}

fn identify(host: HostName) -> Result<()> {
    rustix::system::sethostname(host.name().as_bytes())?;
    fs::write("/etc/hostname", format!("{host}\n"))?;
    // A host's plain name is its address on the network that replication uses.
    let mut hosts = String::from("127.0.0.1 localhost\n");
    for other in HostName::ALL {
        hosts += &format!("{} {other}\n{} {other}-lan\n", other.address(Net::Repl), other.address(Net::Lan));
    }
    fs::write("/etc/hosts", hosts)?;
    fs::write("/etc/machine-id", format!("{}\n", host.uuid().replace('-', "")))?;
    Ok(())
}

/// The daemon of hosts that have it, in the shared folder.
pub(crate) const VIRTQEMUD: &str = "virtqemud";

fn libvirt(identity: &Identity) -> Result<()> {
    // No confinement inside a throw-away host, and QEMU must read the shared folder.
    let conf = format!(
        "security_driver = \"none\"\nuser = \"root\"\ngroup = \"root\"\nmax_core = 0\nmemory_backing_dir = \"{GUEST_MEMORY}\"\n"
    );
    fs::create_dir_all(GUEST_MEMORY)?;
    fs::write("/etc/libvirt/qemu.conf", conf)?;
    // Reached by `virsh migrate` from the other host.
    let by_tcp = "listen_tls = 0\nlisten_tcp = 1\nauth_tcp = \"none\"\n";
    fs::write("/etc/libvirt/libvirtd.conf", by_tcp)?;
    // A client that is told nothing may look for libvirtd only.
    fs::write("/etc/libvirt/libvirt.conf", "uri_default = \"qemu:///system\"\n")?;
    process::checked(Command::new("virtlogd").arg("--daemon"), LIMIT)?;
    let daemon = match identity.root {
        Root::Machine | Root::Debian13 => "libvirtd --daemon --listen".to_owned(),
        Root::Virtqemud => format!("{} --daemon", identity.shared.join(VIRTQEMUD).display()),
    };
    fs::write(START_LIBVIRT, format!("exec {daemon}\n"))?;
    process::checked(Command::new("sh").arg(START_LIBVIRT), LIMIT)?;
    let end = Instant::now() + LIMIT;
    loop {
        let answer = process::checked(Command::new("virsh").args(["-c", "qemu:///system", "version"]), LIMIT);
        match answer {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() >= end => return Err(error).context("libvirt does not answer"),
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
        }
    }
}

/// Copies the files of a folder, which need not exist, into another.
pub(crate) fn copy_files(from: &Path, to: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(from) else { return Ok(()) };
    fs::create_dir_all(to)?;
    for entry in entries.flatten().filter(|entry| entry.path().is_file()) {
        // Both hosts and several labs may write here: nobody sees half a file.
        let target = to.join(entry.file_name());
        let us = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let fresh = to.join(format!(".{}.{us}.{}", entry.file_name().display(), std::process::id()));
        fs::copy(entry.path(), &fresh).with_context(|| format!("cannot copy {}", entry.path().display()))?;
        fs::rename(&fresh, &target).with_context(|| format!("cannot write {}", target.display()))?;
    }
    Ok(())
}
