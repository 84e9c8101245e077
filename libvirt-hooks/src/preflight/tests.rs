use super::*;
use crate::domain_xml::{Disk, HostDevice, Interface};

fn inputs() -> Inputs {
    let facts = DomainFacts {
        kind: "kvm".into(),
        name: "db".into(),
        os_type: "hvm".into(),
        machine: "pc-q35-7.2".into(),
        memory_bytes: 1 << 30,
        suspend_to_mem: Some(false),
        disks: vec![
            Disk {
                target: "vda".into(),
                device: "disk".into(),
                source_kind: "file".into(),
                readonly: true,
                ..Disk::default()
            },
            Disk {
                target: "sda".into(),
                device: "cdrom".into(),
                source_kind: "file".into(),
                ..Disk::default()
            },
        ],
        interfaces: vec![Interface { kind: "bridge".into(), ..Interface::default() }],
        ..DomainFacts::default()
    };
    let qemu = Qemu {
        version: version(7, 2, 22),
        kvm_enabled: true,
        migrate: MigrateInfo::default(),
        ignore_shared: false,
        knows_colo: true,
        colo_mode: "none".into(),
    };
    let backup = Backup {
        host: "beta".into(),
        incompatible: None,
        qemu: "7.2.22".into(),
        machine_types: ["pc-q35-7.2".to_owned()].into(),
        free_memory_bytes: Some(4 << 30),
        generation: None,
        occupied: None,
    };
    Inputs {
        guest: Guest { facts, state: DomainState::Running, busy: false, qemu: Some(qemu) },
        host: "alpha".into(),
        protected_to: None,
        generation: 0,
        backup_address: "beta:7420".into(),
        backup: Ok(backup),
    }
}

fn version(major: u32, minor: u32, micro: u32) -> QemuVersion {
    QemuVersion { major, minor, micro, package: String::new() }
}

/// The codes of the refusals after one change to inputs that nothing is wrong with.
fn codes(change: impl FnOnce(&mut Inputs)) -> Vec<&'static str> {
    let mut inputs = inputs();
    change(&mut inputs);
    let refusals = check(&inputs);
    for refusal in &refusals {
        assert!(CODES.contains(&refusal.code), "{} is not listed", refusal.code);
        assert!(!refusal.reason.is_empty() && !refusal.remedy.is_empty(), "{refusal:?}");
    }
    refusals.into_iter().map(|refusal| refusal.code).collect()
}

fn qemu(inputs: &mut Inputs) -> &mut Qemu {
    inputs.guest.qemu.as_mut().unwrap()
}

fn backup(inputs: &mut Inputs) -> &mut Backup {
    inputs.backup.as_mut().unwrap()
}

#[test]
fn a_suitable_guest_is_not_refused() {
    assert_eq!(check(&inputs()), []);
    assert_eq!(advise(&inputs().guest), Vec::<String>::new());
}

#[test]
fn states() {
    for state in [DomainState::Paused, DomainState::PmSuspended, DomainState::Crashed, DomainState::Other(99)]
    {
        assert_eq!(codes(|inputs| inputs.guest.state = state), ["not-running"]);
    }
    let shut_off = |inputs: &mut Inputs| {
        inputs.guest.state = DomainState::ShutOff;
        inputs.guest.qemu = None;
    };
    assert_eq!(codes(shut_off), ["not-running"]);
    assert_eq!(codes(|inputs| inputs.guest.busy = true), ["job-active"]);
    assert_eq!(codes(|inputs| inputs.protected_to = Some("gamma".into())), ["already-protected"]);
    let protected = |inputs: &mut Inputs| {
        inputs.protected_to = Some("gamma".into());
        inputs.backup = Err("no answer".into());
    };
    assert_eq!(codes(protected), ["already-protected"], "what follows from it is not listed");
}

#[test]
fn emulated_guests() {
    assert_eq!(codes(|inputs| inputs.guest.facts.kind = "qemu".into()), ["not-kvm"]);
    assert_eq!(codes(|inputs| qemu(inputs).kvm_enabled = false), ["not-kvm"]);
}

#[test]
fn versions_of_qemu() {
    let codes_of = |major, minor, micro| codes(|inputs| qemu(inputs).version = version(major, minor, micro));
    for (major, minor, micro) in [(6, 2, 0), (7, 1, 9)] {
        assert_eq!(codes_of(major, minor, micro), ["qemu-too-old"]);
    }
    for (major, minor, micro) in [(10, 0, 0), (10, 0, 6), (10, 1, 0), (10, 1, 5)] {
        assert_eq!(codes_of(major, minor, micro), ["qemu-broken"]);
    }
    for (major, minor, micro) in
        [(7, 2, 0), (7, 2, 22), (9, 2, 0), (10, 0, 7), (10, 0, 13), (10, 2, 0), (11, 1, 3)]
    {
        assert_eq!(codes_of(major, minor, micro), Vec::<&str>::new());
    }
    assert_eq!(codes(|inputs| qemu(inputs).knows_colo = false), ["qemu-without-colo"]);
}

#[test]
fn state_of_qemu() {
    assert_eq!(codes(|inputs| qemu(inputs).ignore_shared = true), ["ignore-shared"]);
    assert_eq!(codes(|inputs| qemu(inputs).colo_mode = "primary".into()), ["checkpointing-active"]);
    let status = |status: &str| codes(|inputs| qemu(inputs).migrate.status = Some(status.into()));
    for running in ["active", "setup", "cancelling", "device", "pre-switchover", "a-new-one"] {
        assert_eq!(status(running), ["migration-active"]);
    }
    for over in ["none", "completed", "failed", "cancelled"] {
        assert_eq!(status(over), Vec::<&str>::new());
    }
    let blocked = |inputs: &mut Inputs| {
        qemu(inputs).migrate.blocked_reasons = vec!["no ivshmem".into(), "State blocked by invtsc".into()];
    };
    assert_eq!(codes(blocked), ["migration-blocked", "migration-blocked"]);
}

#[test]
fn definitions() {
    assert_eq!(codes(|inputs| inputs.guest.facts.dirty_ring = Some(4096)), ["dirty-ring"]);
    assert_eq!(
        codes(|inputs| inputs.guest.facts.launch_security = Some("sev".into())),
        ["confidential-guest"]
    );
    let unpinned = |inputs: &mut Inputs| {
        inputs.guest.facts.machine = "q35".into();
        backup(inputs).machine_types.insert("q35".into());
    };
    assert_eq!(codes(unpinned), ["machine-type-not-pinned"]);
}

#[test]
fn devices() {
    let facts = |change: fn(&mut DomainFacts)| codes(|inputs| change(&mut inputs.guest.facts));
    let interface = |kind: &'static str| codes(|inputs| inputs.guest.facts.interfaces[0].kind = kind.into());
    assert_eq!(facts(|facts| facts.host_devices.push(HostDevice::default())), ["host-device"]);
    assert_eq!(interface("hostdev"), ["host-device"]);
    assert_eq!(interface("vdpa"), ["host-device"]);
    assert_eq!(interface("vhostuser"), ["vhost-user"]);
    assert_eq!(interface("network"), Vec::<&str>::new());
    assert_eq!(facts(|facts| facts.filesystems.push("virtiofs".into())), ["shared-filesystem"]);
    assert_eq!(facts(|facts| facts.shared_memory.push("x".into())), ["shared-memory"]);
    assert_eq!(facts(|facts| facts.tpms.push("emulator".into())), ["tpm"]);
    assert_eq!(facts(|facts| facts.vsock = true), ["vsock"]);
}

#[test]
fn disks() {
    let disk = |device: &'static str, readonly, source_kind: &'static str| {
        codes(|inputs| {
            let disk = &mut inputs.guest.facts.disks[0];
            (disk.device, disk.readonly, disk.source_kind) = (device.into(), readonly, source_kind.into());
        })
    };
    for device in ["disk", "lun", "floppy"] {
        assert_eq!(disk(device, false, "file"), ["writable-disk"]);
        assert_eq!(disk(device, true, "file"), Vec::<&str>::new());
    }
    assert_eq!(disk("disk", false, "network"), ["writable-disk"]);
    assert_eq!(disk("cdrom", false, "file"), Vec::<&str>::new());
    assert_eq!(disk("floppy", false, ""), Vec::<&str>::new());
}

#[test]
fn backups() {
    assert_eq!(codes(|inputs| inputs.backup = Err("connection refused".into())), ["backup-unreachable"]);
    let answer = |change: fn(&mut Backup)| codes(|inputs| change(backup(inputs)));
    assert_eq!(answer(|backup| backup.host = "alpha".into()), ["backup-same-host"]);
    assert_eq!(
        answer(|backup| backup.incompatible = Some("version 3 here, 1 there".into())),
        ["backup-incompatible"]
    );
    assert_eq!(
        answer(|backup| backup.machine_types = ["pc-q35-6.2".to_owned()].into()),
        ["backup-machine-type"]
    );
    assert_eq!(answer(|backup| backup.machine_types.clear()), Vec::<&str>::new());
    assert_eq!(answer(|backup| backup.free_memory_bytes = Some((1 << 30) - 1)), ["backup-memory"]);
    assert_eq!(answer(|backup| backup.free_memory_bytes = None), Vec::<&str>::new());
    assert_eq!(answer(|backup| backup.occupied = Some("it runs there".into())), ["backup-occupied"]);
    assert_eq!(answer(|backup| backup.generation = Some(1)), ["backup-newer-image"]);
    assert_eq!(answer(|backup| backup.generation = Some(0)), Vec::<&str>::new());
}

#[test]
fn everything_is_found_at_once() {
    let all = codes(|inputs| {
        inputs.guest.facts.kind = "qemu".into();
        inputs.guest.facts.vsock = true;
        qemu(inputs).version = version(10, 0, 2);
        inputs.backup = Err("no route to host".into());
    });
    assert_eq!(all, ["vsock", "qemu-broken", "not-kvm", "backup-unreachable"]);
}

#[test]
fn reasons_name_the_value_and_codes_are_sorted() {
    let mut inputs = inputs();
    inputs.guest.facts.disks[0].readonly = false;
    inputs.guest.facts.disks[0].source = Some("/srv/db.img".into());
    let refusal = &check(&inputs)[0];
    assert_eq!(refusal.reason, "domain db can write to its disk vda (/srv/db.img)");
    assert!(refusal.remedy.contains("virsh edit db"));
    assert!(CODES.is_sorted());
}

#[test]
fn advice() {
    let advice = |change: fn(&mut Guest)| {
        let mut guest = inputs().guest;
        change(&mut guest);
        advise(&guest).len()
    };
    assert_eq!(advice(|guest| guest.facts.suspend_to_mem = None), 1);
    assert_eq!(advice(|guest| guest.facts.cpu_mode = Some("host-passthrough".into())), 1);
    assert_eq!(advice(|guest| guest.qemu.as_mut().unwrap().version = version(9, 2, 0)), 1);
    assert_eq!(advice(|guest| guest.qemu.as_mut().unwrap().version = version(10, 1, 0)), 0);
    assert_eq!(advice(|guest| guest.facts.interfaces[0].kind = "user".into()), 1);
}
