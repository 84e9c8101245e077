//! The facts of a domain that decide whether and how it can be protected.

use uuid::Uuid;

use super::XmlError;
use super::tree::Element;

/// What a domain's XML says, as far as it matters here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DomainFacts {
    /// `kvm`, `qemu` (software emulation), or the type of another hypervisor.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// Its UUID; absent only in a definition that libvirt has not seen yet.
    pub uuid: Option<Uuid>,
    /// `hvm` for a full guest.
    pub os_type: String,
    /// The architecture, for example `x86_64`.
    pub arch: String,
    /// The machine type; libvirt writes the pinned name (`pc-q35-7.2`) into the XML of a running domain.
    pub machine: String,
    /// Memory at boot, in bytes.
    pub memory_bytes: u64,
    /// Most vCPUs it may have.
    pub vcpus: u32,
    /// Path of the QEMU binary.
    pub emulator: Option<String>,
    /// `host-passthrough`, `host-model`, `custom`, `maximum`.
    pub cpu_mode: Option<String>,
    /// What its memory is made of.
    pub memory_backing: MemoryBacking,
    /// Entries of KVM's dirty ring, if it is on.
    pub dirty_ring: Option<u32>,
    /// Whether the guest may sleep (S3); `None` leaves it to QEMU, which allows it.
    pub suspend_to_mem: Option<bool>,
    /// The file of the firmware's variables.
    pub nvram: Option<String>,
    /// The kind of confidential guest (`sev`, `tdx`, ...), if it is one.
    pub launch_security: Option<String>,
    /// Every disk, cdrom and floppy drive.
    pub disks: Vec<Disk>,
    /// Every network card.
    pub interfaces: Vec<Interface>,
    /// Every device of the host that is passed through.
    pub host_devices: Vec<HostDevice>,
    /// Shared host directories: the driver (`virtiofs`, `path`) or else the type.
    pub filesystems: Vec<String>,
    /// TPMs: their backend (`emulator`, `passthrough`).
    pub tpms: Vec<String>,
    /// The guest has a vsock device.
    pub vsock: bool,
    /// Memory shared with other guests or processes: the names.
    pub shared_memory: Vec<String>,
    /// Hot-pluggable memory: the models (`dimm`, `nvdimm`, `virtio-mem`, ...).
    pub memory_devices: Vec<String>,
    /// Displays.
    pub graphics: Vec<Graphics>,
    /// Arguments that the definition hands to QEMU past libvirt.
    pub qemu_arguments: Vec<String>,
}

/// `<memoryBacking>`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemoryBacking {
    /// `file`, `memfd` or `anonymous`.
    pub source: Option<String>,
    /// `shared` or `private`.
    pub access: Option<String>,
    /// The memory is of huge pages.
    pub huge_pages: bool,
    /// The memory is locked.
    pub locked: bool,
}

/// A disk, cdrom or floppy drive.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Disk {
    /// The name libvirt knows it by, for example `vda`.
    pub target: String,
    /// `disk`, `cdrom`, `floppy` or `lun`.
    pub device: String,
    /// `file`, `block`, `network`, `volume`, `nvme`, ...
    pub source_kind: String,
    /// The path, or the name within a pool or network protocol; none for an empty drive.
    pub source: Option<String>,
    /// The guest cannot write to it.
    pub readonly: bool,
    /// Several guests write to it at once.
    pub shareable: bool,
    /// What the guest writes is thrown away when it ends.
    pub transient: bool,
}

impl Disk {
    /// Whether the guest can write to it.
    pub fn is_writable(&self) -> bool {
        !self.readonly && self.device != "cdrom" && !self.source_kind.is_empty()
    }
}

/// A network card.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Interface {
    /// `bridge`, `network`, `ethernet`, `direct`, `user`, `vhostuser`, `hostdev`, ...
    pub kind: String,
    /// Its address.
    pub mac: Option<String>,
    /// The bridge, network or device it is attached to.
    pub source: Option<String>,
    /// The name of the tap on this host; only in the XML of a running domain.
    pub target: Option<String>,
    /// `virtio`, `e1000`, ...
    pub model: Option<String>,
    /// `vhost` or `qemu` if it was chosen.
    pub driver: Option<String>,
}

/// A device of the host passed through to the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostDevice {
    /// `subsystem` or `capabilities`.
    pub mode: String,
    /// `pci`, `usb`, `scsi`, `mdev`, ...
    pub kind: String,
}

/// A display.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Graphics {
    /// `vnc`, `spice`, ...
    pub kind: String,
    /// The address it listens on.
    pub listen: Option<String>,
    /// The port; -1 before libvirt has chosen one.
    pub port: Option<i32>,
}

impl DomainFacts {
    /// Reads them from a domain's XML, live or definition.
    ///
    /// # Errors
    /// If the XML is malformed, too large, or lacks what every domain has (name, machine type, memory).
    pub fn parse(xml: &str) -> Result<Self, XmlError> {
        let root = Element::parse(xml)?;
        if root.name != "domain" {
            return Err(XmlError::Missing { what: "<domain>" });
        }
        let text = |path: &[&str]| root.find(path).map(Element::text);
        let os_type = root.find(&["os", "type"]).ok_or(XmlError::Missing { what: "<os><type>" })?;
        let mut facts = Self {
            kind: owned(&root, "type").unwrap_or_default(),
            name: text(&["name"]).ok_or(XmlError::Missing { what: "<name>" })?,
            uuid: text(&["uuid"]).and_then(|uuid| uuid.parse().ok()),
            os_type: os_type.text(),
            arch: owned(os_type, "arch").unwrap_or_default(),
            machine: owned(os_type, "machine").unwrap_or_default(),
            memory_bytes: memory(root.find(&["memory"]).ok_or(XmlError::Missing { what: "<memory>" })?)?,
            vcpus: text(&["vcpu"]).and_then(|count| count.parse().ok()).unwrap_or(1),
            emulator: text(&["devices", "emulator"]),
            cpu_mode: root.find(&["cpu"]).and_then(|cpu| owned(cpu, "mode")),
            memory_backing: MemoryBacking {
                source: root.find(&["memoryBacking", "source"]).and_then(|source| owned(source, "type")),
                access: root.find(&["memoryBacking", "access"]).and_then(|access| owned(access, "mode")),
                huge_pages: root.find(&["memoryBacking", "hugepages"]).is_some(),
                locked: root.find(&["memoryBacking", "locked"]).is_some(),
            },
            dirty_ring: root
                .find(&["features", "kvm", "dirty-ring"])
                .filter(|ring| ring.attribute("state") == Some("on"))
                .map(|ring| ring.attribute("size").and_then(|size| size.parse().ok()).unwrap_or(0)),
            suspend_to_mem: root
                .find(&["pm", "suspend-to-mem"])
                .and_then(|state| state.attribute("enabled"))
                .map(|enabled| enabled == "yes"),
            nvram: text(&["os", "nvram"]).filter(|path| !path.is_empty()),
            launch_security: root.find(&["launchSecurity"]).and_then(|security| owned(security, "type")),
            ..Self::default()
        };
        if let Some(devices) = root.find(&["devices"]) {
            facts.add_devices(devices);
        }
        let commandlines = root.elements().filter(|element| element.name.ends_with(":commandline"));
        let arguments =
            commandlines.flat_map(Element::elements).filter(|element| element.name.ends_with(":arg"));
        facts.qemu_arguments = arguments.filter_map(|argument| owned(argument, "value")).collect();
        Ok(facts)
    }

    fn add_devices(&mut self, devices: &Element) {
        let find = |element: &Element, path: &[&str], name: &str| {
            element.find(path).and_then(|element| owned(element, name))
        };
        for device in devices.elements() {
            let kind = owned(device, "type").unwrap_or_default();
            match device.name.as_str() {
                "disk" => self.disks.push(disk(device, kind)),
                "interface" => self.interfaces.push(Interface {
                    mac: find(device, &["mac"], "address"),
                    source: ["bridge", "network", "dev", "path"]
                        .iter()
                        .find_map(|name| find(device, &["source"], name)),
                    target: find(device, &["target"], "dev"),
                    model: find(device, &["model"], "type"),
                    driver: find(device, &["driver"], "name"),
                    kind,
                }),
                "hostdev" => self
                    .host_devices
                    .push(HostDevice { mode: owned(device, "mode").unwrap_or_default(), kind }),
                "filesystem" => self.filesystems.push(find(device, &["driver"], "type").unwrap_or(kind)),
                "tpm" => self.tpms.push(find(device, &["backend"], "type").unwrap_or_default()),
                "vsock" => self.vsock = true,
                "shmem" => self.shared_memory.push(owned(device, "name").unwrap_or_default()),
                "memory" => self.memory_devices.push(owned(device, "model").unwrap_or_default()),
                "graphics" => self.graphics.push(Graphics {
                    listen: find(device, &["listen"], "address").or_else(|| owned(device, "listen")),
                    port: device.attribute("port").and_then(|port| port.parse().ok()),
                    kind,
                }),
                _ => {}
            }
        }
    }
}

fn disk(element: &Element, source_kind: String) -> Disk {
    let source = element.find(&["source"]);
    let names = ["file", "dev", "name", "volume", "dir", "path"];
    let empty =
        source.is_none_or(|source| source.attributes.is_empty() && source.elements().next().is_none());
    Disk {
        target: element.find(&["target"]).and_then(|target| owned(target, "dev")).unwrap_or_default(),
        device: owned(element, "device").unwrap_or_else(|| "disk".to_owned()),
        source: source.and_then(|source| names.iter().find_map(|name| owned(source, name))),
        source_kind: if empty { String::new() } else { source_kind },
        readonly: element.find(&["readonly"]).is_some(),
        shareable: element.find(&["shareable"]).is_some(),
        transient: element.find(&["transient"]).is_some(),
    }
}

fn owned(element: &Element, attribute: &str) -> Option<String> {
    element.attribute(attribute).map(str::to_owned)
}

/// `<memory unit='KiB'>` in bytes; the units are libvirt's.
fn memory(element: &Element) -> Result<u64, XmlError> {
    let text = element.text();
    let unsuitable = |reason: &str| XmlError::Unsuitable {
        what: "<memory>",
        value: format!("{text} {}", element.attribute("unit").unwrap_or("KiB")),
        reason: reason.to_owned(),
    };
    let unit: u64 = match element.attribute("unit").unwrap_or("KiB") {
        "b" | "bytes" => 1,
        "KB" => 1000,
        "k" | "KiB" => 1 << 10,
        "MB" => 1_000_000,
        "M" | "MiB" => 1 << 20,
        "GB" => 1_000_000_000,
        "G" | "GiB" => 1 << 30,
        "TB" => 1_000_000_000_000,
        "T" | "TiB" => 1 << 40,
        _ => return Err(unsuitable("the unit is not one of libvirt's")),
    };
    let count: u64 = text.parse().map_err(|_| unsuitable("it is not a number"))?;
    count.checked_mul(unit).ok_or_else(|| unsuitable("it is more than 16 EiB"))
}
