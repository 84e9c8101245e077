//! What in the backup stands in the way.

use super::{Backup, Inputs, Refusal};

pub(super) fn check(inputs: &Inputs, refusals: &mut Vec<Refusal>) {
    match &inputs.backup {
        Ok(backup) => check_answer(inputs, backup, refusals),
        Err(reason) => refusals.push(Refusal::new(
            "backup-unreachable",
            format!("the backup {} does not answer: {reason}", inputs.backup_address),
            "check the name and the port, that understudy-backup runs there, and that no firewall is between",
        )),
    }
}

fn check_answer(inputs: &Inputs, backup: &Backup, refusals: &mut Vec<Refusal>) {
    let facts = &inputs.guest.facts;
    let name = &facts.name;
    let mut refuse = |code, reason: String, remedy: &str| refusals.push(Refusal::new(code, reason, remedy));
    if backup.host == inputs.host {
        refuse(
            "backup-same-host",
            format!("the backup {} is this host ({})", inputs.backup_address, backup.host),
            "name another host: a host cannot stand in for itself",
        );
    }
    if let Some(reason) = &backup.incompatible {
        refuse(
            "backup-incompatible",
            format!("the agents here and on {} cannot work together: {reason}", backup.host),
            "bring both hosts to the same release of understudy",
        );
    }
    if !backup.machine_types.is_empty() && !backup.machine_types.contains(&facts.machine) {
        refuse(
            "backup-machine-type",
            format!("QEMU {} on {} does not have machine type {}", backup.qemu, backup.host, facts.machine),
            "install a QEMU there that is at least as new as the one here, or use an older machine type",
        );
    }
    if let Some(free) = backup.free_memory_bytes
        && free < facts.memory_bytes
    {
        let mib = |bytes: u64| bytes >> 20;
        refuse(
            "backup-memory",
            format!(
                "{} has {} MiB of free memory, domain {name} has {} MiB",
                backup.host,
                mib(free),
                mib(facts.memory_bytes)
            ),
            "free memory there, or choose another backup",
        );
    }
    if let Some(reason) = &backup.occupied {
        refuse(
            "backup-occupied",
            format!("{} cannot take domain {name}: {reason}", backup.host),
            "look at `understudy status` there; what is left of an earlier protection can be removed with \
             `understudy unprotect`",
        );
    }
    if let Some(generation) = backup.generation
        && generation > inputs.generation
    {
        refuse(
            "backup-newer-image",
            format!(
                "{} holds an image of domain {name} of generation {generation}, newer than {} here",
                backup.host, inputs.generation
            ),
            "the guest may have run there since: make sure which instance is the right one, then run \
             `understudy unprotect` on the backup to drop the image",
        );
    }
}
