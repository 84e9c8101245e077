//! The domains lab guests are.

use super::plan::{GUEST_BRIDGE, OVS_BRIDGE, guest_address};
use super::state::LabDir;

/// A guest to be defined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GuestSpec {
    pub(crate) name: String,
    /// `pc` (i440fx) or `q35`.
    pub(crate) machine: String,
    pub(crate) vcpus: u32,
    pub(crate) memory_mib: u32,
    /// libvirt's domain type: `kvm`, or `qemu` for TCG.
    pub(crate) kind: String,
    /// Memory in huge pages, which the host must have reserved.
    pub(crate) huge_pages: bool,
    /// libvirt's video model: `none`, `vga`, `cirrus`, ...
    pub(crate) video: String,
    /// Its network card on the LAN.
    pub(crate) card: Card,
    /// What it runs instead of the program that counts: see `record`.
    pub(crate) workload: Option<String>,
    /// Put in among the devices as it is.
    pub(crate) extra_devices: String,
}

/// How the network card of a guest is on the LAN.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Card {
    /// A tap in the host's bridge, served by QEMU, which loses nothing that comes in while the guest is stopped. An emulated host's
    /// guest is stopped so much of the time that TCP through [`Card::Vhost`] may be without an answer for a minute.
    #[default]
    Tap,
    /// The same, served by the kernel: what libvirt makes of an interface that says nothing.
    Vhost,
    /// The same with so many queues.
    Queues(u32),
    /// A macvtap on the host's bridge.
    Macvtap,
    /// A tap in a bridge of Open vSwitch, which the scenario has made.
    OpenVswitch,
}

impl Card {
    /// What libvirt is told, without the address.
    fn xml(self) -> (&'static str, String) {
        let bridge = format!("<source bridge='{GUEST_BRIDGE}'/>");
        match self {
            Self::Tap => ("bridge", format!("{bridge}<driver name='qemu'/>")),
            Self::Vhost => ("bridge", bridge),
            Self::Queues(count) => ("bridge", format!("{bridge}<driver queues='{count}'/>")),
            Self::Macvtap => ("direct", format!("<source dev='{GUEST_BRIDGE}' mode='bridge'/>")),
            Self::OpenVswitch => {
                ("bridge", format!("<source bridge='{OVS_BRIDGE}'/><virtualport type='openvswitch'/>"))
            }
        }
    }
}

/// Of its one network card on the LAN.
pub(crate) fn guest_mac(name: &str) -> String {
    format!("52:54:00:77:01:{:02x}", guest_address(name).octets()[3])
}

impl GuestSpec {
    pub(crate) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            machine: "pc".into(),
            vcpus: 1,
            memory_mib: 128,
            kind: "kvm".into(),
            huge_pages: false,
            video: "none".into(),
            card: Card::default(),
            workload: None,
            extra_devices: String::new(),
        }
    }

    /// The domain's XML. No USB, and no graphics unless asked for: what this guest has not cannot slow it down, nor can
    /// what its kernel does not look for.
    pub(crate) fn xml(&self, lab: &LabDir) -> String {
        let Self { name, machine, vcpus, memory_mib, kind, huge_pages, video, card, workload, extra_devices } =
            self;
        let (attached, source) = card.xml();
        let backing = if *huge_pages { "<memoryBacking><hugepages/></memoryBacking>" } else { "" };
        let files = lab.shared().join("guest");
        let files = files.display();
        let (initrd, more) = match workload {
            Some(workload) => (format!("record-{workload}.img"), format!(" us.workload={workload}")),
            None => ("initramfs.img".to_owned(), String::new()),
        };
        let address = guest_address(name);
        let mac = guest_mac(name);
        let cpu = if kind == "kvm" { "<cpu mode='host-passthrough'/>" } else { "" };
        format!(
            "<domain type='{kind}'>
  <name>{name}</name>
  <memory unit='MiB'>{memory_mib}</memory>
  {backing}
  <vcpu>{vcpus}</vcpu>
  <os>
    <type arch='x86_64' machine='{machine}'>hvm</type>
    <kernel>{files}/vmlinuz</kernel>
    <initrd>{files}/{initrd}</initrd>
    <cmdline>console=ttyS0 quiet mitigations=off i8042.noaux i8042.nokbd 8250.nr_uarts=1 us.name={name} us.address={address}/24{more}</cmdline>
  </os>
  <features><acpi/><apic/></features>
  {cpu}
  <on_reboot>restart</on_reboot>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/>
    <video><model type='{video}'/></video>
    <serial type='file'><source path='/run/lab/{name}.serial' append='on'/></serial>
    <memballoon model='none'/>
    <interface type='{attached}'>
      <mac address='{mac}'/>
      {source}
      <model type='virtio'/>
      <rom enabled='no'/>
    </interface>
{extra_devices}  </devices>
</domain>
"
        )
    }
}
