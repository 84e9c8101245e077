//! What in the guest and its QEMU stands in the way.

use super::{Guest, Qemu, Refusal};
use crate::domain::DomainState;
use crate::domain_xml::{DomainFacts, is_pinned_machine};

/// The oldest QEMU known to work.
const OLDEST: (u32, u32, u32) = (7, 2, 0);

pub(super) fn check(guest: &Guest, refusals: &mut Vec<Refusal>) {
    check_state(guest, refusals);
    check_definition(&guest.facts, refusals);
    check_devices(&guest.facts, refusals);
    if let Some(qemu) = &guest.qemu {
        check_qemu(qemu, refusals);
    }
    let on_kvm = guest.facts.kind == "kvm" && guest.qemu.as_ref().is_none_or(|qemu| qemu.kvm_enabled);
    if !on_kvm {
        refusals.push(Refusal::new(
            "not-kvm",
            format!("domain {} is emulated in software (type {:?}), not run by KVM", guest.facts.name, guest.facts.kind),
            "checkpoints of emulated guests hang QEMU; define it with <domain type='kvm'> on a host with /dev/kvm",
        ));
    }
}

fn check_state(guest: &Guest, refusals: &mut Vec<Refusal>) {
    let name = &guest.facts.name;
    let (state, remedy) = match guest.state {
        DomainState::Running => ("", String::new()),
        DomainState::Paused => ("is paused", format!("let it run with `virsh resume {name}`")),
        DomainState::PmSuspended => ("sleeps (S3)", format!("wake it up with `virsh dompmwakeup {name}`")),
        DomainState::ShuttingDown => {
            ("is shutting down", format!("start it again with `virsh start {name}`"))
        }
        DomainState::Crashed => ("has crashed", format!("start it again with `virsh start {name}`")),
        DomainState::ShutOff => ("is shut off", format!("start it with `virsh start {name}`")),
        DomainState::Other(_) => ("is in a state unknown here", format!("look at `virsh domstate {name}`")),
    };
    if !state.is_empty() {
        refusals.push(Refusal::new("not-running", format!("domain {name} {state}"), remedy));
    }
    if guest.busy {
        refusals.push(Refusal::new(
            "job-active",
            format!("libvirt is busy with a job on domain {name}"),
            format!(
                "wait for it, or end it with `virsh domjobabort {name}`; `virsh domjobinfo {name}` shows it"
            ),
        ));
    }
}

fn check_definition(facts: &DomainFacts, refusals: &mut Vec<Refusal>) {
    let name = &facts.name;
    if !is_pinned_machine(&facts.machine) {
        refusals.push(Refusal::new(
            "machine-type-not-pinned",
            format!(
                "the machine type of domain {name} is {:?}, which means other hardware in another QEMU",
                facts.machine
            ),
            format!("give it a versioned one such as pc-q35-7.2 with `virsh edit {name}`, and start it anew"),
        ));
    }
    if let Some(entries) = facts.dirty_ring {
        refusals.push(Refusal::new(
            "dirty-ring",
            format!(
                "domain {name} uses KVM's dirty ring ({entries} entries): QEMU aborts at the first checkpoint"
            ),
            format!("remove <dirty-ring> from <features><kvm> with `virsh edit {name}`, and start it anew"),
        ));
    }
    if let Some(kind) = &facts.launch_security {
        refusals.push(Refusal::new(
            "confidential-guest",
            format!("domain {name} is a confidential guest ({kind}): its memory cannot be read by the host"),
            "such guests cannot be protected",
        ));
    }
}

fn check_devices(facts: &DomainFacts, refusals: &mut Vec<Refusal>) {
    let name = &facts.name;
    let edit = |what: &str| format!("remove {what} with `virsh edit {name}`, and start it anew");
    let mut refuse = |code, reason: String, remedy: String| refusals.push(Refusal::new(code, reason, remedy));
    for device in &facts.host_devices {
        let reason = format!("a {} device of the host is passed through to domain {name}", device.kind);
        refuse("host-device", reason, edit("the <hostdev>"));
    }
    for interface in &facts.interfaces {
        let which = interface.mac.as_deref().unwrap_or("without a MAC");
        match interface.kind.as_str() {
            "hostdev" | "vdpa" => refuse(
                "host-device",
                format!(
                    "network card {which} of domain {name} is a device of the host (type {:?})",
                    interface.kind
                ),
                edit("that <interface>, or make it one of type 'bridge',"),
            ),
            "vhostuser" => refuse(
                "vhost-user",
                format!("network card {which} of domain {name} is served by another process (vhost-user)"),
                edit("that <interface>, or make it one of type 'bridge',"),
            ),
            _ => {}
        }
    }
    for kind in &facts.filesystems {
        let reason = format!("domain {name} has a directory of the host mounted ({kind})");
        refuse("shared-filesystem", reason, edit("the <filesystem>"));
    }
    for memory in &facts.shared_memory {
        let reason = format!("domain {name} shares memory {memory:?} with other processes");
        refuse("shared-memory", reason, edit("the <shmem>"));
    }
    for backend in &facts.tpms {
        let reason = format!("domain {name} has a TPM ({backend}), whose state is not in QEMU");
        refuse("tpm", reason, edit("the <tpm>"));
    }
    if facts.vsock {
        let reason = format!("domain {name} has a vsock device, whose connections end at this host");
        refuse("vsock", reason, edit("the <vsock>"));
    }
    for disk in facts.disks.iter().filter(|disk| disk.is_writable()) {
        let source = disk.source.as_deref().unwrap_or("no path");
        let reason = format!("domain {name} can write to its {} {} ({source})", disk.device, disk.target);
        let remedy = format!(
            "disks are not replicated yet: mark it <readonly/> with `virsh edit {name}` and start it anew, or use a guest \
             that lives in memory"
        );
        refuse("writable-disk", reason, remedy);
    }
}

fn check_qemu(qemu: &Qemu, refusals: &mut Vec<Refusal>) {
    let version = &qemu.version;
    let newer = "install QEMU 7.2, 10.0.7 or later in that series, or 11.1, and start the guest anew on it";
    if version.numbers() < OLDEST {
        let reason = format!("the guest runs on QEMU {version}, nothing before 7.2 is known to work");
        refusals.push(Refusal::new("qemu-too-old", reason, newer));
    } else if let Some(what) = broken(version.numbers()) {
        let reason = format!("the guest runs on QEMU {version}, which cannot checkpoint: {what}");
        refusals.push(Refusal::new("qemu-broken", reason, newer));
    }
    if !qemu.knows_colo {
        refusals.push(Refusal::new(
            "qemu-without-colo",
            format!("QEMU {version} was built without checkpointing (capability x-colo)"),
            "use a QEMU built with replication, as distributions do",
        ));
    }
    if qemu.ignore_shared {
        refusals.push(Refusal::new(
            "ignore-shared",
            "QEMU's capability x-ignore-shared is on: shared memory would be left out of every checkpoint",
            "switch it off: migrate-set-capabilities with `virsh qemu-monitor-command`",
        ));
    }
    if qemu.colo_mode != "none" {
        refusals.push(Refusal::new(
            "checkpointing-active",
            format!("QEMU is already checkpointing (mode {})", qemu.colo_mode),
            "another agent is at work, or one has died: `understudy status` shows it; the agent rescues such guests \
             when it starts",
        ));
    }
    let status = qemu.migrate.status.as_deref().unwrap_or("none");
    if !matches!(status, "none" | "completed" | "failed" | "cancelled" | "colo") {
        refusals.push(Refusal::new(
            "migration-active",
            format!("a migration is under way (state {status})"),
            "wait for its end; if it has none, somebody has saved or migrated the guest while it was protected, and QEMU \
             7.2 stays so until it ends: `virsh shutdown`, then `virsh start`",
        ));
    }
    for reason in &qemu.migrate.blocked_reasons {
        refusals.push(Refusal::new(
            "migration-blocked",
            format!("QEMU cannot save the state of this guest: {reason}"),
            "remove the device, or the CPU feature, that it names, and start the guest anew",
        ));
    }
}

/// What is broken in that version of QEMU, if anything is.
fn broken(version: (u32, u32, u32)) -> Option<&'static str> {
    match version {
        (10, 0, 0..=6) => Some("it stops the guest instead (mended in 10.0.7)"),
        (10, 1, _) => Some("the transition to checkpointing is broken in 10.1"),
        _ => None,
    }
}

pub(super) fn advise(guest: &Guest) -> Vec<String> {
    let facts = &guest.facts;
    let name = &facts.name;
    let mut advice = Vec::new();
    if facts.suspend_to_mem != Some(false) {
        advice.push(format!(
            "domain {name} may put itself to sleep (S3), which ends its protection: <pm><suspend-to-mem enabled='no'/></pm> \
             forbids it"
        ));
    }
    if matches!(facts.cpu_mode.as_deref(), Some("host-passthrough" | "maximum")) {
        advice.push(format!(
            "domain {name} sees the CPU of its host as it is: the backup must have the same model; a named model is safer"
        ));
    }
    if let Some(qemu) = &guest.qemu {
        let known = matches!(qemu.version.numbers(), (7, 2, _) | (10, 0, 7..) | (11, 1.., _));
        if !known && broken(qemu.version.numbers()).is_none() && qemu.version.numbers() >= OLDEST {
            advice.push(format!("QEMU {} has not been tried; 7.2, 10.0.7 and 11.1 have", qemu.version));
        }
    }
    for interface in facts.interfaces.iter().filter(|interface| interface.kind == "user") {
        let which = interface.mac.as_deref().unwrap_or("without a MAC");
        advice.push(format!(
            "network card {which} of domain {name} is a user-mode one: its connections do not survive a failover"
        ));
    }
    advice
}
