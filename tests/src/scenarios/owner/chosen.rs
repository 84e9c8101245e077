//! What an operator chose for one guest, which counts on both hosts instead of what their watchdogs were told for all.

use std::time::Instant;

use anyhow::{Result, ensure};

use super::WITNESS_ON;
use super::keeping::Keeping;
use crate::lab::Lab;
use crate::lab::plan::HostName::{Alpha, Beta};
use crate::lab::understudy::Role;
use crate::scenarios::up;

/// The watchdogs were told to hold output when a backup is lost, and to fail over when QEMU dies.
pub(super) fn choices(lab: &Lab) -> Result<()> {
    let mut keeping = Keeping::start(lab, WITNESS_ON, "hold")?;
    let choices = ["--on-lost-backup", "solo", "--on-qemu-crash", "leave"];
    lab.must_understudy(Alpha, &[&["set", "g1"], &choices[..]].concat())?;
    lab.power_off(Beta)?;
    keeping.wait_said(Alpha, "role=\"solo\"")?;
    keeping.answers_since(Instant::now())?;
    println!("    the backup is lost: the guest goes on alone");
    up(lab, Beta)?;
    keeping.watch(Beta)?;
    // With the same choices as before.
    keeping.paired(Alpha)?;
    println!("    the backup is back: the guest is protected again");
    lab.shell(Alpha, "kill -KILL $(cat /run/libvirt/qemu/g1.pid)")?;
    keeping.wait_said(Alpha, "role=\"ended\"")?;
    let said = keeping.said_since(Beta);
    ensure!(!said.contains("the guest was taken over"), "{said}");
    println!("    QEMU dies: the guest is left");
    let status = lab.status(Beta, Role::Backup, "g1")?;
    ensure!(status.as_ref().is_some_and(|status| status.state() == "standby"), "{status:?}");
    let said = lab.must_understudy(Beta, &["failover", "g1", "--i-have-fenced"])?;
    println!("    {}", said.trim());
    keeping.answers_since(Instant::now())?;
    keeping.spoke(&[Alpha, Beta])
}
