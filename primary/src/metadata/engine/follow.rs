//! What follows from what a domain's mark says and how its protection fares.

use std::time::Instant;

use understudy_hook::metadata::Protect;
use understudy_proto::ids::GuestId;

use super::{Command, Domain, Failed, Phase, RETRY_FIRST, RETRY_MAX};

/// The wait before another attempt.
pub(super) fn failure(failed: Failed, attempts: &mut u32, now: Instant) -> Phase {
    let wait = RETRY_FIRST.saturating_mul(1 << (*attempts).min(5)).min(RETRY_MAX);
    *attempts = attempts.saturating_add(1);
    let again = failed.time_helps.then_some(now + wait);
    Phase::Waiting { failed, again }
}

pub(super) fn decide(guest: GuestId, domain: &mut Domain, now: Instant, out: &mut Vec<Command>) {
    match &domain.phase {
        Phase::Waiting { again: Some(again), .. } if *again <= now => {
            domain.phase = if domain.applied.is_some() { Phase::Following } else { Phase::Idle };
        }
        _ => {}
    }
    match domain.phase {
        Phase::Idle => {
            if let Some(wanted) = domain.wanted().cloned() {
                match wanted_in_vain(&wanted) {
                    Some(failed) => domain.phase = Phase::Waiting { failed, again: None },
                    None => {
                        domain.applied = Some(wanted.clone());
                        domain.phase = Phase::Protecting;
                        out.push(Command::Protect(guest, wanted));
                    }
                }
            }
        }
        Phase::Following => {
            // A mistake in the mark leaves things as they are: it is no wish to lose the protection.
            let same = match (&domain.mark, &domain.applied) {
                (Err(_), _) | (_, None) => true,
                // Its end is under way and has an outcome of its own.
                _ if !domain.running => true,
                (Ok(_), Some(applied)) => {
                    domain.wanted().is_some_and(|wanted| wanted.same_protection(applied))
                }
            };
            if same {
                return;
            }
            // Only the length of the epochs, or what is done on failures: that needs no new full copy.
            let changed = domain.applied.as_ref().zip(domain.wanted()).and_then(|(applied, wanted)| {
                let (was, mut now) = (applied.clone(), applied.clone());
                now.epoch = wanted.epoch.or(was.epoch);
                now.policy = wanted.policy.clone().or(was.policy.clone());
                wanted.same_protection(&now).then_some((was, now))
            });
            match changed {
                Some((was, now)) => {
                    if let Some(epoch) = now.epoch.filter(|_| now.epoch != was.epoch) {
                        out.push(Command::Pace(guest, epoch));
                    }
                    if let Some(policy) = now.policy.clone().filter(|_| now.policy != was.policy) {
                        out.push(Command::Policy(guest, policy));
                    }
                    domain.applied = Some(now);
                }
                None => {
                    domain.phase = Phase::Ending;
                    out.push(Command::Unprotect(guest));
                }
            }
        }
        Phase::Protecting | Phase::Waiting { .. } | Phase::Ending | Phase::Off => {}
    }
}

/// What this version cannot do for a mark that is otherwise right.
fn wanted_in_vain(wanted: &Protect) -> Option<Failed> {
    let never = |code: &str, reason: String, remedy: &str| {
        Some(Failed { code: code.to_owned(), reason, remedy: remedy.to_owned(), time_helps: false })
    };
    if let Some(disk) = wanted.disks.iter().find(|disk| disk.replicated) {
        let reason = format!("disk {} is to be replicated, which this version cannot do", disk.target);
        return never("disk-policy", reason, "take the <disk> out; disks must be read-only");
    }
    if let Some(nic) = wanted.nics.iter().find(|nic| nic.output != wanted.output) {
        let reason =
            format!("the card {} is to differ from the others, which this version cannot do", nic.mac);
        return never("nic-policy", reason, "take the <nic> out and say output='gated' or 'ungated' for all");
    }
    None
}

trait SameProtection {
    /// Whether a protection for the other serves this one as well.
    fn same_protection(&self, other: &Self) -> bool;
}

impl SameProtection for Protect {
    fn same_protection(&self, other: &Self) -> bool {
        // An epoch that is left to the agent is right whatever it is.
        let epoch = self.epoch.is_none() || self.epoch == other.epoch;
        let policy = self.policy.is_none() || self.policy == other.policy;
        let same =
            (&self.backup, self.insecure, self.output) == (&other.backup, other.insecure, other.output);
        same && epoch && policy
    }
}
