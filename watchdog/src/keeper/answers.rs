//! What the keeper answers an operator.

use std::time::Instant;

use understudy_proto::ids::GuestId;
use understudy_proto::ownership::Owner;
use understudy_proto::rpc::owner::{Question, Told};
use understudy_proto::rpc::{Failure, FailureKind};

use super::guest::Kept;
use super::handing::Reply;
use super::service::Asking;
use super::{Keeper, Settings};
use crate::owner::Role;

/// An operator's claim that is not granted by then will not be.
const CLAIM: std::time::Duration = std::time::Duration::from_secs(90);

/// An operator who waits for the guest to run here.
#[derive(Debug)]
pub(super) struct Claimed {
    guest: GuestId,
    reply: Reply,
    until: Instant,
}

fn refused(code: &'static str, text: String, remedy: &str) -> Failure {
    Failure::new(FailureKind::FailedPrecondition, code, text).with_remedy(remedy)
}

impl Keeper {
    pub(super) fn asked(&mut self, Asking { question, domain, reply }: Asking) {
        let now = Instant::now();
        let settings = self.settings.clone();
        let Some(kept) = self.guests.values_mut().find(|kept| kept.is(&domain)) else {
            let text = format!("no guest {domain:?} is known to the watchdog of {}", settings.host);
            let remedy =
                "`understudy status` lists the guests of this host; a guest is kept from its protection on";
            // Whoever asked may have gone.
            let _ =
                reply.send(Err(Failure::new(FailureKind::NotFound, "no-guest", text).with_remedy(remedy)));
            return;
        };
        let refusal = match question {
            Question::Report => return report(&settings, kept.guest, reply),
            Question::Explain => {
                let explained = crate::bound::failover(&settings.timing, &settings.limits);
                let _ = reply.send(Ok(Told { text: explained.text(), json: explained.json() }));
                return;
            }
            Question::Switchover => kept.may_hand_over(false),
            Question::Failback => kept.may_hand_over(true),
            Question::Failover => match kept.engine.protocol().role() {
                Role::Standby | Role::Claiming => {
                    kept.claim(now);
                    self.claimed.push(Claimed { guest: kept.guest, reply, until: now + CLAIM });
                    return;
                }
                role => Err(refused(
                    "not-standby",
                    format!("this host is no backup that may claim {domain}: it is {}", role.label()),
                    "run this on the backup of the guest; if the arbiter is lost and the other host is off for sure, say \
                     so with --i-have-fenced",
                )),
            },
        };
        match refusal {
            Ok(to) => kept.handing.begin(to, kept.engine.protocol().term(), reply, now, &kept.hands),
            Err(failure) => {
                let _ = reply.send(Err(failure));
            }
        }
    }

    /// Tells those who wait for a guest to run here.
    pub(super) fn tell_claimed(&mut self, now: Instant) {
        for Claimed { guest, reply, until } in std::mem::take(&mut self.claimed) {
            let Some(kept) = self.guests.get(&guest) else { continue };
            let protocol = kept.engine.protocol();
            let answer = match protocol.role() {
                Role::Solo | Role::Seeding { .. } | Role::Protected if protocol.local().runs => {
                    let term = protocol.term();
                    let text =
                        format!("{} runs here, term {term}; `understudy report` has the times", kept.name);
                    Ok(Told { text, json: serde_json::json!({"term": term}).to_string() })
                }
                role if now >= until => Err(refused(
                    "not-granted",
                    format!("the claim was not granted: this host is {}", role.label()),
                    "see the log of understudy-watchdog: the arbiter must answer, and the guest must not have moved",
                )),
                _ => {
                    self.claimed.push(Claimed { guest, reply, until });
                    continue;
                }
            };
            // Whoever asked may have gone.
            let _ = reply.send(answer);
        }
    }
}

fn report(settings: &Settings, guest: GuestId, reply: Reply) {
    let reports = settings.reports.clone();
    tokio::task::spawn_blocking(move || {
        let found = match reports.newest(guest) {
            Ok(Some((text, json))) => Ok(Told { text, json }),
            Ok(None) => Err(Failure::new(
                FailureKind::NotFound,
                "no-report",
                "the guest was never taken over by this host or from it",
            )),
            Err(error) => Err(Failure::new(FailureKind::Internal, "report", error.to_string())),
        };
        let _ = reply.send(found);
    });
}

impl Kept {
    fn is(&self, domain: &str) -> bool {
        self.name == domain || self.guest.to_string() == domain
    }

    /// The host that would take it over.
    fn may_hand_over(&self, home_only: bool) -> Result<String, Failure> {
        let protocol = self.engine.protocol();
        let backup = match protocol.record().map(|record| &record.owner) {
            Some(Owner::Pair { backup, .. }) if *protocol.role() == Role::Protected => backup.clone(),
            _ => {
                return Err(refused(
                    "not-protected",
                    format!(
                        "{} is not protected from here: this host is {}",
                        self.name,
                        protocol.role().label()
                    ),
                    "run this on the host the guest runs on, when `understudy status` says protected",
                ));
            }
        };
        if !self.is_protected() {
            let text = format!("the backup of {} does not hold its last epoch", self.name);
            return Err(refused("not-protected", text, "wait until `understudy status` says protected"));
        }
        if self.handing.is_under_way() {
            let text = format!("{} changes hosts already", self.name);
            return Err(refused("busy", text, "wait for the end of that").retryable());
        }
        match &self.home {
            Some(home) if home_only && *home != backup => Err(refused(
                "not-away",
                format!("the home of {} is {home}, its backup is {backup}", self.name),
                "a guest goes home when its home is its backup; `understudy switchover` goes to any backup",
            )),
            None if home_only => Err(refused(
                "no-home",
                format!("on which host {} was protected first is not known", self.name),
                "use `understudy switchover`",
            )),
            _ => Ok(backup),
        }
    }
}
