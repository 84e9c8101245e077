use super::*;

const Q35_MIGRATABLE: &str = include_str!("../../tests/data/q35-migratable.xml");
const Q35_LIVE: &str = include_str!("../../tests/data/q35-live.xml");
const PC_MIGRATABLE: &str = include_str!("../../tests/data/pc-migratable.xml");
const PC_LIVE: &str = include_str!("../../tests/data/pc-live.xml");

const NAMESPACE: &str = "xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'";

/// The document without the blanks between its elements.
fn meaning(xml: &str) -> Element {
    fn strip(element: &mut Element) {
        element.children.retain(|child| !matches!(child, tree::Node::Text(text) if text.trim().is_empty()));
        element.elements_mut().for_each(strip);
    }
    let mut root = Element::parse(xml).unwrap();
    strip(&mut root);
    root
}

#[test]
fn facts_of_a_running_guest() {
    let facts = DomainFacts::parse(Q35_LIVE).unwrap();
    assert_eq!((facts.kind.as_str(), facts.name.as_str(), facts.os_type.as_str()), ("kvm", "g1", "hvm"));
    assert_eq!((facts.arch.as_str(), facts.machine.as_str()), ("x86_64", "pc-q35-7.2"));
    assert_eq!((facts.memory_bytes, facts.vcpus), (64 << 20, 1));
    assert_eq!(facts.emulator.as_deref(), Some("/usr/bin/qemu-system-x86_64"));
    assert!(facts.uuid.is_some());
    let disk = |target: &str, device: &str, source: &str, readonly| Disk {
        target: target.into(),
        device: device.into(),
        source_kind: "file".into(),
        source: Some(source.into()),
        readonly,
        ..Disk::default()
    };
    assert_eq!(
        facts.disks,
        [
            disk("vda", "disk", "/srv/guests/root.img", false),
            disk("sda", "cdrom", "/srv/guests/cd.iso", true)
        ]
    );
    assert_eq!(facts.disks.iter().map(Disk::is_writable).collect::<Vec<_>>(), [true, false]);
    let interface = Interface {
        kind: "bridge".into(),
        mac: Some("52:54:00:12:34:56".into()),
        source: Some("br0".into()),
        target: Some("vnet0".into()),
        model: Some("virtio".into()),
        driver: None,
    };
    assert_eq!(facts.interfaces, [interface]);
    let vnc = Graphics { kind: "vnc".into(), listen: Some("127.0.0.1".into()), port: Some(5900) };
    assert_eq!(facts.graphics, [vnc]);
    assert_eq!(facts.dirty_ring, None);
    assert_eq!(facts.suspend_to_mem, None);
    assert!(facts.host_devices.is_empty() && facts.qemu_arguments.is_empty() && !facts.vsock);
    assert_eq!(DomainFacts::parse(PC_LIVE).unwrap().machine, "pc-i440fx-7.2");
}

#[test]
fn facts_that_stand_in_the_way() {
    let xml = format!(
        "<domain type='qemu' {NAMESPACE}><name>x</name><memory unit='GiB'>2</memory><vcpu current='1'>4</vcpu>
         <os><type arch='x86_64' machine='q35'>hvm</type><nvram>/var/nvram</nvram></os>
         <memoryBacking><hugepages/><source type='memfd'/><access mode='shared'/><locked/></memoryBacking>
         <features><kvm><hidden state='on'/><dirty-ring state='on' size='4096'/></kvm></features>
         <pm><suspend-to-mem enabled='yes'/></pm><launchSecurity type='sev'/>
         <devices>
           <disk type='network' device='disk'><source protocol='rbd' name='pool/x'/><target dev='vda'/><shareable/></disk>
           <disk type='file' device='cdrom'><target dev='sda'/><readonly/></disk>
           <disk type='file' device='floppy'><source file='/f'/><target dev='fda'/></disk>
           <disk type='nvme' device='disk'><source><address domain='0'/></source><target dev='vdb'/><transient/></disk>
           <hostdev mode='subsystem' type='pci'><source/></hostdev>
           <interface type='vhostuser'><source type='unix' path='/s'/></interface>
           <filesystem type='mount'><driver type='virtiofs'/></filesystem><filesystem type='mount'/>
           <tpm model='tpm-crb'><backend type='emulator'/></tpm><vsock model='virtio'/><shmem name='s'/>
           <memory model='nvdimm'/><future-device/>
         </devices>
         <qemu:commandline><qemu:arg value='-foo'/><qemu:env name='A' value='b'/></qemu:commandline></domain>"
    );
    let facts = DomainFacts::parse(&xml).unwrap();
    assert_eq!((facts.kind.as_str(), facts.memory_bytes, facts.vcpus), ("qemu", 2 << 30, 4));
    assert_eq!((facts.dirty_ring, facts.suspend_to_mem), (Some(4096), Some(true)));
    assert_eq!((facts.nvram.as_deref(), facts.launch_security.as_deref()), (Some("/var/nvram"), Some("sev")));
    let disks: Vec<_> = facts.disks.iter().map(|disk| (disk.target.as_str(), disk.is_writable())).collect();
    assert_eq!(disks, [("vda", true), ("sda", false), ("fda", true), ("vdb", true)]);
    assert_eq!(facts.disks[0].source.as_deref(), Some("pool/x"));
    assert!(facts.disks[0].shareable && facts.disks[3].transient);
    assert_eq!(facts.host_devices, [HostDevice { mode: "subsystem".into(), kind: "pci".into() }]);
    assert_eq!(facts.filesystems, ["virtiofs", "mount"]);
    assert_eq!(
        (facts.tpms, facts.vsock, facts.shared_memory),
        (vec!["emulator".into()], true, vec!["s".into()])
    );
    assert_eq!((facts.memory_devices, facts.qemu_arguments), (vec!["nvdimm".into()], vec!["-foo".into()]));
    let backing = facts.memory_backing;
    assert_eq!((backing.source.as_deref(), backing.access.as_deref()), (Some("memfd"), Some("shared")));
    assert!(backing.huge_pages && backing.locked);
}

#[test]
fn a_domain_without_the_essentials_is_an_error() {
    for xml in [
        "<network/>",
        "<domain/>",
        "<domain><name>x</name><os><type>hvm</type></os></domain>",
        "<domain><name>x</name><os><type>hvm</type></os><memory>much</memory></domain>",
        "<domain><name>x</name><os><type>hvm</type></os><memory unit='EiB'>1</memory></domain>",
        "<domain><name>x</name><os><type>hvm</type></os><memory unit='T'>99999999999</memory></domain>",
    ] {
        assert!(DomainFacts::parse(xml).is_err(), "{xml}");
    }
}

#[test]
fn standby_waits_for_a_stream_and_is_otherwise_the_same() {
    for xml in [Q35_MIGRATABLE, PC_MIGRATABLE] {
        let standby = standby_xml(xml).unwrap();
        let facts = DomainFacts::parse(&standby).unwrap();
        assert_eq!(facts.qemu_arguments, ["-incoming", "defer"]);
        assert!(standby.contains(NAMESPACE), "{standby}");
        // Taking what was added away again gives what was there before, to the letter of the meaning.
        assert!(meaning(&clean_xml(&standby).unwrap()) == meaning(xml));
    }
}

#[test]
fn standby_leaves_the_other_host_behind_and_keeps_the_guest() {
    let standby = standby_xml(Q35_LIVE).unwrap();
    for gone in [" id='3'", "vnet0", "<alias", "seclabel"] {
        assert!(Q35_LIVE.contains(gone) && !standby.contains(gone), "{gone}");
    }
    let same = [
        "machine='pc-q35-7.2'",
        "<mac address='52:54:00:12:34:56'/>",
        "<address type='pci' domain='0x0000' bus='0x01' slot='0x00' function='0x0'/>",
        "<target dev='vda' bus='virtio'/>",
        "<source path='/srv/guests/g1.log' append='on'/>",
        "<on_reboot>restart</on_reboot>",
        "<feature policy='require' name='x2apic'/>",
    ];
    for kept in same {
        assert!(Q35_LIVE.contains(kept) && standby.contains(kept), "{kept}");
    }
    // What the user named or chose stays.
    let chosen = "<domain><os><type machine='pc-i440fx-7.2'/></os><devices><interface><target dev='tap-db'/>\
                  <alias name='ua-net'/></interface></devices><seclabel type='none'/></domain>";
    let standby = standby_xml(chosen).unwrap();
    for kept in ["tap-db", "ua-net", "<seclabel type='none'/>"] {
        assert!(standby.contains(kept), "{kept}");
    }
}

#[test]
fn standby_merges_with_a_command_line_that_is_there() {
    let with = |arguments: &str| {
        format!(
            "<domain xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'><os><type machine='pc-q35-7.2'/></os>\
             <q:commandline>{arguments}</q:commandline></domain>"
        )
    };
    let xml = with("<q:arg value='-device'/><q:arg value='edu'/><q:env name='A' value='b'/>");
    let standby = standby_xml(&xml).unwrap();
    let arguments = meaning(&standby);
    let arguments = arguments.find(&["q:commandline"]).unwrap().all("q:arg");
    let arguments: Vec<_> = arguments.filter_map(|arg| arg.attribute("value").map(str::to_owned)).collect();
    assert_eq!(arguments, ["-device", "edu", "-incoming", "defer"]);
    assert_eq!(standby.matches("xmlns:").count(), 1);
    assert!(meaning(&clean_xml(&standby).unwrap()) == meaning(&xml));
    assert!(matches!(standby_xml(&standby), Err(XmlError::Unsuitable { value, .. }) if value == "-incoming"));
}

#[test]
fn shared_memory_of_a_standby_leaves_no_trace() {
    let with = |inside: &str| {
        format!(
            "<domain><name>x</name><uuid>u</uuid><os><type machine='pc-q35-7.2'/></os>{inside}\
             <devices><memballoon model='none'/></devices></domain>"
        )
    };
    let sorted = |xml: &str| {
        let mut root = meaning(xml);
        root.children.sort_by_key(|child| match child {
            tree::Node::Element(element) => element.name.clone(),
            _ => String::new(),
        });
        root
    };
    let backings = [
        "",
        "<memoryBacking><nosharepages/><source type='memfd'/><access mode='private'/></memoryBacking>",
        "<memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>",
        "<metadata><o:x xmlns:o='urn:other'/></metadata>",
    ];
    for backing in backings {
        let xml = with(backing);
        let standby = shared_standby_xml(&xml).unwrap();
        let facts = meaning(&standby);
        let source = facts.find(&["memoryBacking", "source"]).and_then(|e| e.attribute("type"));
        let access = facts.find(&["memoryBacking", "access"]).and_then(|e| e.attribute("mode"));
        assert_eq!((source, access), (Some("file"), Some("shared")), "{standby}");
        assert_eq!(standby.matches("<source ").count(), 1, "{standby}");
        assert!(sorted(&clean_xml(&standby).unwrap()) == sorted(&xml), "{standby}");
        assert!(sorted(&portable_xml(&standby, &standby).unwrap()) == sorted(&xml), "{standby}");
    }
    for (inside, word) in [
        ("<memoryBacking><hugepages/></memoryBacking>", "hugepages"),
        ("<memoryBacking><locked/></memoryBacking>", "locked"),
        ("<memoryBacking><allocation mode='immediate'/></memoryBacking>", "immediate"),
        ("<cpu><numa><cell id='0' memAccess='private'/></numa></cpu>", "private"),
        ("<devices><memory model='dimm'/></devices>", "dimm"),
        ("<devices><shmem name='s'/></devices>", "shmem"),
    ] {
        let error = shared_standby_xml(&with(inside)).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn clean_xml_of_a_clean_definition_is_the_same() {
    assert!(meaning(&clean_xml(Q35_LIVE).unwrap()) == meaning(Q35_LIVE));
}

#[test]
fn only_pinned_machine_types_make_a_standby() {
    for alias in ["pc", "q35", "microvm", "virt", "ubuntu", "ubuntu-q35", "isapc", ""] {
        let xml = format!("<domain><os><type machine='{alias}'>hvm</type></os></domain>");
        let error = standby_xml(&xml).unwrap_err();
        assert!(matches!(&error, XmlError::Unsuitable { value, .. } if value == alias), "{error}");
    }
    for pinned in ["pc-i440fx-7.2", "pc-q35-10.0", "pc-q35-rhel9.4.0", "pc-i440fx-jammy", "pc-1.3"] {
        assert!(is_pinned_machine(pinned), "{pinned}");
    }
    assert_eq!(
        standby_xml("<domain><os><type>hvm</type></os></domain>"),
        Err(XmlError::Missing { what: "<os><type machine=..>" })
    );
}

#[test]
fn portable_xml_has_the_cpu_the_guest_sees() {
    let portable = portable_xml(Q35_MIGRATABLE, Q35_LIVE).unwrap();
    assert!(!Q35_MIGRATABLE.contains("x2apic"));
    assert!(portable.contains("check='full'") && portable.contains("x2apic"));
    // Nothing else comes from the live XML.
    let without_cpu = |xml: &str| {
        let mut root = meaning(xml);
        root.remove(|element| element.name == "cpu");
        root
    };
    assert!(without_cpu(&portable) == without_cpu(Q35_MIGRATABLE));
    // One that has taken over can be protected in its turn.
    let taken_over = standby_xml(&portable).unwrap();
    let again = portable_xml(&taken_over, &taken_over).unwrap();
    assert!(meaning(&again) == meaning(&portable));
    assert!(standby_xml(&again).is_ok());
    let bare = "<domain><name>x</name></domain>";
    let live = "<domain><name>x</name><cpu mode='custom'/></domain>";
    assert!(portable_xml(bare, live).unwrap().contains("<cpu mode='custom'/>"));
    assert!(!portable_xml(bare, bare).unwrap().contains("<cpu"));
    assert!(portable_xml(Q35_MIGRATABLE, PC_LIVE).unwrap_err().to_string().contains("same domain"));
}

#[test]
fn machine_types_of_an_architecture() {
    let xml = "<capabilities><host/>
        <guest><os_type>hvm</os_type><arch name='i686'><machine>isapc</machine></arch></guest>
        <guest><os_type>hvm</os_type><arch name='x86_64'><machine maxCpus='255'>pc-i440fx-7.2</machine>
          <machine canonical='pc-i440fx-7.2'>pc</machine><domain type='qemu'/>
          <domain type='kvm'><machine>pc-q35-7.2</machine></domain></arch></guest>
        <guest><os_type>xen</os_type><arch name='x86_64'><machine>xenpv</machine></arch></guest></capabilities>";
    let types = machine_types(xml, "x86_64").unwrap();
    assert_eq!(types.into_iter().collect::<Vec<_>>(), ["pc", "pc-i440fx-7.2", "pc-q35-7.2"]);
    assert!(machine_types("<domain/>", "x86_64").is_err());
}

#[test]
fn what_was_reported_of_a_guest_does_not_go_to_another_host() {
    let with = |inside: &str| {
        format!(
            "<domain><name>a</name><uuid>1</uuid>{inside}<os><type machine='pc-q35-7.2'>hvm</type></os></domain>"
        )
    };
    let wish = "<u:protect xmlns:u='urn:understudy:domain:1' enabled='yes' backup='b'/>";
    let state = "<s:state xmlns:s='urn:understudy:state:1' value='protected'/>";
    let command = "<failover xmlns='urn:understudy:command:1'/>";
    let xml = with(&format!("<metadata>{wish}{state}{command}</metadata>"));
    assert_eq!(portable_xml(&xml, &xml).unwrap().trim(), with(&format!("<metadata>{wish}</metadata>")));
    let xml = with(&format!("<metadata>{state}</metadata>"));
    assert_eq!(portable_xml(&xml, &xml).unwrap().trim(), with(""));
}
