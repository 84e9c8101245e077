//! What `protect` refuses, before it touches anything, with a reason and a remedy.

use anyhow::{Context, Result, ensure};

use super::{Scenario, UP};
use crate::lab::Lab;
use crate::lab::domain::GuestSpec;
use crate::lab::guest::Guest;
use crate::lab::plan::HostName::{Alpha, Beta};
use crate::lab::understudy::Role;

pub(super) const SCENARIOS: &[Scenario] = &[
    ("refusal: a domain that does not exist", unknown),
    ("refusal: a TCG domain", tcg),
    ("refusal: a writable disk", disk),
    ("refusal: a device that cannot migrate", unmigratable),
    ("refusal: a backup that does not answer", unreachable),
    ("refusal: already protected", twice),
    ("refusal: failover of a guest the backup does not know", failover_unknown),
];

/// `protect` fails, says one of `reasons`, and the domain is as it was.
fn refused(lab: &Lab, to: &str, reasons: &[&str]) -> Result<()> {
    let before = lab.shell(Alpha, "virsh dumpxml g1 | sha256sum; virsh domstate g1")?;
    let outcome = lab.understudy(Alpha, &["protect", "g1", "--to", to, "--insecure"])?;
    ensure!(outcome.code != 0, "it was not refused: {outcome:?}");
    let said = outcome.stderr.to_lowercase();
    ensure!(reasons.iter().any(|reason| said.contains(reason)), "it does not say why: {}", outcome.stderr);
    ensure!(said.lines().count() >= 2 || said.len() > 60, "it does not say what to do: {}", outcome.stderr);
    let after = lab.shell(Alpha, "virsh dumpxml g1 | sha256sum; virsh domstate g1")?;
    ensure!(before == after, "the domain was touched: {before} {after}");
    Ok(())
}

fn started(lab: &Lab, spec: &GuestSpec) -> Result<Guest> {
    lab.start_guest(Alpha, spec)?;
    Guest::wait(lab.dir(), "g1", UP)
}

fn unknown(lab: &Lab) -> Result<()> {
    let outcome = lab.understudy(Alpha, &["protect", "nobody", "--to", "beta", "--insecure"])?;
    ensure!(outcome.code != 0 && outcome.stderr.contains("nobody"), "{outcome:?}");
    Ok(())
}

fn tcg(lab: &Lab) -> Result<()> {
    // It need not get far: emulated within an emulation.
    lab.start_guest(Alpha, &GuestSpec { kind: "qemu".into(), ..GuestSpec::new("g1") })?;
    refused(lab, "beta", &["tcg", "kvm"])
}

fn disk(lab: &Lab) -> Result<()> {
    lab.shell(Alpha, "truncate -s 16M /run/lab/disk.img")?;
    let extra_devices = "<disk type='file' device='disk'><driver name='qemu' type='raw'/>\
        <source file='/run/lab/disk.img'/><target dev='vda' bus='virtio'/></disk>\n";
    started(lab, &GuestSpec { extra_devices: extra_devices.into(), ..GuestSpec::new("g1") })?;
    refused(lab, "beta", &["disk", "vda"])
}

fn unmigratable(lab: &Lab) -> Result<()> {
    lab.shell(Alpha, "mkdir -p /run/lab/share")?;
    let extra_devices = "<filesystem type='mount' accessmode='passthrough'><source dir='/run/lab/share'/>\
        <target dir='share'/></filesystem>\n";
    started(lab, &GuestSpec { extra_devices: extra_devices.into(), ..GuestSpec::new("g1") })?;
    refused(lab, "beta", &["filesystem", "9p", "migrat"])
}

fn unreachable(lab: &Lab) -> Result<()> {
    let mut guest = started(lab, &GuestSpec::new("g1"))?;
    lab.hold_agent(Beta, Role::Backup)?;
    let result = refused(lab, "beta", &["beta"]);
    lab.release_agent(Beta, Role::Backup)?;
    result?;
    refused(lab, "nowhere.invalid", &["nowhere.invalid"])?;
    guest.count().map(drop)
}

fn twice(lab: &Lab) -> Result<()> {
    let mut guest = started(lab, &GuestSpec::new("g1"))?;
    lab.protect("g1", Alpha)?;
    let outcome = lab.understudy(Alpha, &["protect", "g1", "--to", "beta", "--insecure"])?;
    ensure!(outcome.code != 0 && outcome.stderr.contains("already"), "{outcome:?}");
    let status = lab.status(Alpha, Role::Primary, "g1")?.context("forgotten")?;
    ensure!(status.state() == "protected", "the refusal ended the protection: {status:?}");
    guest.count().map(drop)
}

fn failover_unknown(lab: &Lab) -> Result<()> {
    let outcome = lab.understudy(Beta, &["failover", "nobody", "--i-have-fenced"])?;
    ensure!(outcome.code != 0 && outcome.stderr.contains("nobody"), "{outcome:?}");
    Ok(())
}
