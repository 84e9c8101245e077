//! What is done about the domains that are marked in their XML: decides, and touches nothing.
//!
//! ```text
//!            marked, running              protected
//!   Idle ------------------> Protecting -----------> Following ---+ wish changed: Ending, then Protecting
//!    ^                        |      ^                 |    |     | mark removed or 'no': Ending, then Idle
//!    |                 failed v      | time            |    +-----+ operator ended it: Off
//!    +---- guest ended ---- Waiting -+ <--- it failed -+            (until the mark changes or the guest starts anew)
//! ```
//!
//! The mark is level-triggered: what counts is what it says now, not how often it was set. A command is not: it is taken
//! out of the XML before it is done, and one that was there before the agent looked is taken out and not done.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use understudy_hook::metadata::{Command as Order, Epoch, Policy, Protect, State};
use understudy_proto::ids::GuestId;

use super::view::{Ended, Failed, Found, Protection, Report};

mod follow;
mod say;

use follow::{decide, failure};
use say::report;

/// Before the second attempt; each further one waits twice as long.
pub const RETRY_FIRST: Duration = Duration::from_secs(2);

/// The longest wait between two attempts.
pub const RETRY_MAX: Duration = Duration::from_secs(60);

/// Reports of one guest are at least this far apart; the last one is always published.
pub const REPORT_INTERVAL: Duration = Duration::from_secs(2);

/// What is reported of a standby.
const STANDBY: &str = "standby";

/// Something that has happened.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(clippy::large_enum_variant, reason = "a few a second, and they live for a moment")]
pub enum Event {
    /// All domains must be looked at: the agent or its connection to libvirt is new, or events were lost.
    Began,
    /// The mark or the command of a domain was changed, or the domain was started.
    Changed {
        /// The domain.
        guest: GuestId,
        /// It was started.
        started: bool,
    },
    /// A failover has brought one of [`Engine::standbys`] here, whoever asked for it.
    Promoted(GuestId),
    /// It has ended.
    Stopped(GuestId),
    /// The domains that run: the answer to [`Command::LookAtAll`].
    Listed(Vec<GuestId>),
    /// What a look at a domain has found: the answer to [`Command::Look`], as [`Event::Gone`] is.
    Found {
        /// The domain.
        guest: GuestId,
        /// What was found.
        found: Found,
        /// As it was in the command.
        first: bool,
    },
    /// A look at a domain has found that there is no such domain.
    Gone(GuestId),
    /// The command is out of the XML, or cannot be taken out, in words.
    TakenOut(GuestId, Result<(), String>),
    /// How its protection fares, whoever began it.
    Fares(GuestId, Protection),
    /// [`Command::Protect`] has failed.
    Failed(GuestId, Failed),
    /// [`Command::Unprotect`] is done, or has failed.
    Unprotected(GuestId, Result<(), Failed>),
    /// [`Command::Failover`] is done, in words, or has failed.
    FailedOver(GuestId, Result<String, Failed>),
    /// A report could not be published.
    ReportLost(GuestId),
    /// Time passes.
    Tick,
}

/// Something to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// List all running domains.
    LookAtAll,
    /// Look at this one.
    Look {
        /// The domain.
        guest: GuestId,
        /// Nothing is known to have changed: the agent looks for the first time.
        first: bool,
    },
    /// Protect it, as an operator would.
    Protect(GuestId, Protect),
    /// End its protection, as an operator would.
    Unprotect(GuestId),
    /// Give its epochs this length, as an operator would.
    Pace(GuestId, Epoch),
    /// Choose this for its failures, as an operator would.
    Policy(GuestId, Policy),
    /// Take the command out of the XML. What is to be done is done after that, so never twice.
    TakeOut(GuestId),
    /// Do a failover, as an operator would.
    Failover(GuestId),
    /// Publish this; `None` removes what was published.
    Report(GuestId, Option<State>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    Idle,
    Protecting,
    /// Failed; again at that time, if time can help.
    Waiting {
        failed: Failed,
        again: Option<Instant>,
    },
    /// It is protected, by us or by an operator.
    Following,
    /// It is being ended by us.
    Ending,
    /// It was ended by an operator, whose word counts until the mark changes.
    Off,
}

#[derive(Debug)]
struct Domain {
    running: bool,
    mark: Result<Option<Protect>, String>,
    phase: Phase,
    /// What it was protected for.
    applied: Option<Protect>,
    attempts: u32,
    report: Report,
    command: String,
    /// To be done once it is out of the XML.
    ordered: Option<Order>,
    /// What stands in the XML, as far as is known, and since when.
    published: Option<Option<State>>,
    published_at: Option<Instant>,
}

impl Domain {
    fn new() -> Self {
        Self {
            running: false,
            mark: Ok(None),
            phase: Phase::Idle,
            applied: None,
            attempts: 0,
            report: Report::default(),
            command: String::new(),
            ordered: None,
            published: None,
            published_at: None,
        }
    }

    /// What is wanted of it just now.
    fn wanted(&self) -> Option<&Protect> {
        let mark = self.mark.as_ref().ok().and_then(Option::as_ref);
        mark.filter(|wanted| wanted.enabled && self.running)
    }

    /// Whether its XML says anything of us.
    fn marked(&self) -> bool {
        !matches!(self.mark, Ok(None))
    }
}

/// All domains of the host that were ever marked.
#[derive(Debug, Default)]
pub struct Engine {
    domains: BTreeMap<GuestId, Domain>,
    /// Looks under way, and whether another one is needed after it: two at a time could answer in the wrong order.
    looks: BTreeMap<GuestId, bool>,
    /// Standbys of guests that run elsewhere. Their marks count once they are promoted.
    standbys: BTreeSet<GuestId>,
}

impl Engine {
    /// Decides.
    pub fn step(&mut self, event: Event, now: Instant) -> Vec<Command> {
        let mut out = Vec::new();
        match event {
            Event::Began => out.push(Command::LookAtAll),
            Event::Changed { guest, started } => {
                if started && let Some(domain) = self.domains.get_mut(&guest) {
                    // Another run of the guest: what was true of the last one is over.
                    *domain = Domain { mark: domain.mark.clone(), ..Domain::new() };
                }
                self.look(guest, false, &mut out);
            }
            Event::Listed(guests) => guests.into_iter().for_each(|guest| self.look(guest, true, &mut out)),
            Event::Promoted(guest) => {
                if self.standbys.remove(&guest) {
                    self.look(guest, false, &mut out);
                }
            }
            Event::Stopped(guest) => {
                self.standbys.remove(&guest);
                // The live XML is gone with the guest, and the report with it.
                self.domains.remove(&guest);
                if let Some(again) = self.looks.get_mut(&guest) {
                    // What it will find may be older than this.
                    *again = true;
                }
            }
            Event::Gone(guest) => {
                self.standbys.remove(&guest);
                self.domains.remove(&guest);
                self.looked(guest, &mut out);
            }
            Event::Found { guest, found, first } => {
                self.found(guest, found, first, now, &mut out);
                self.looked(guest, &mut out);
            }
            Event::TakenOut(guest, result) => self.taken_out(guest, result, &mut out),
            Event::Fares(guest, protection) => self.fares(guest, protection, now, &mut out),
            Event::Failed(guest, failed) => {
                if let Some(domain) = self.domains.get_mut(&guest)
                    && domain.phase == Phase::Protecting
                {
                    domain.applied = None;
                    domain.phase = failure(failed, &mut domain.attempts, now);
                }
            }
            Event::Unprotected(guest, result) => self.unprotected(guest, result, now),
            Event::FailedOver(guest, result) => {
                // It runs here now, and may be marked for protection.
                if result.is_ok() {
                    self.look(guest, false, &mut out);
                }
                if let Some(domain) = self.domains.get_mut(&guest) {
                    domain.command = match result {
                        Ok(text) => format!("failover: done: {text}"),
                        Err(failed) => format!("failover: refused: {}", failed.in_one_line()),
                    };
                }
            }
            Event::ReportLost(guest) => {
                if let Some(domain) = self.domains.get_mut(&guest) {
                    domain.published = None;
                }
            }
            Event::Tick => {}
        }
        for (guest, domain) in &mut self.domains {
            decide(*guest, domain, now, &mut out);
            report(*guest, domain, now, &mut out);
        }
        self.domains.retain(|_, domain| {
            domain.marked() || domain.phase != Phase::Idle || domain.published != Some(None)
        });
        out
    }

    /// The guests whose protection is of interest.
    pub fn guests(&self) -> Vec<GuestId> {
        self.domains.keys().copied().collect()
    }

    /// The standbys whose promotion is of interest, see [`Event::Promoted`].
    pub fn standbys(&self) -> Vec<GuestId> {
        self.standbys.iter().copied().collect()
    }

    fn look(&mut self, guest: GuestId, first: bool, out: &mut Vec<Command>) {
        match self.looks.get_mut(&guest) {
            Some(again) => *again |= !first,
            None => {
                self.looks.insert(guest, false);
                out.push(Command::Look { guest, first });
            }
        }
    }

    fn looked(&mut self, guest: GuestId, out: &mut Vec<Command>) {
        if self.looks.remove(&guest) == Some(true) {
            self.look(guest, false, out);
        }
    }

    fn taken_out(&mut self, guest: GuestId, result: Result<(), String>, out: &mut Vec<Command>) {
        let Some(domain) = self.domains.get_mut(&guest) else { return };
        match (domain.ordered.take(), result) {
            (None, _) => {}
            (Some(Order::Failover), Ok(())) => out.push(Command::Failover(guest)),
            (Some(Order::Failover), Err(reason)) => {
                domain.command = format!("failover: not done: it cannot be taken out of the XML: {reason}");
            }
        }
    }

    fn found(&mut self, guest: GuestId, found: Found, first: bool, now: Instant, out: &mut Vec<Command>) {
        if found.standby {
            self.standbys.insert(guest);
        } else {
            self.standbys.remove(&guest);
        }
        if found.absent() && !self.domains.contains_key(&guest) {
            return;
        }
        let domain = self.domains.entry(guest).or_insert_with(Domain::new);
        domain.running = found.running;
        if found.standby {
            domain.report = Report { value: STANDBY.to_owned(), ..Report::default() };
        } else if domain.report.value == STANDBY {
            domain.report = Report::default();
        }
        if domain.published.is_none() {
            domain.published = Some(found.reported.clone());
        }
        if domain.mark != found.mark {
            domain.mark = found.mark;
            domain.attempts = 0;
            if matches!(domain.phase, Phase::Waiting { .. } | Phase::Off) {
                domain.phase = Phase::Idle;
            }
        }
        let was_ours = found.reported.as_ref().is_some_and(|state| state.by_metadata);
        if first && was_ours && domain.phase == Phase::Idle && domain.applied.is_none() {
            // An agent before this one has protected it for its mark, which may have changed since.
            if found.protection.is_active() {
                domain.applied = found.protection.as_protect();
                domain.phase = Phase::Following;
            }
        } else if found.protection.is_active() && domain.phase == Phase::Idle && domain.wanted().is_some() {
            // An operator was first. Where the mark says the same it becomes ours; else it is changed to what it says.
            domain.applied = found.protection.as_protect();
            domain.phase = Phase::Following;
        }
        if let Some(order) = found.command
            && domain.ordered.is_none()
        {
            out.push(Command::TakeOut(guest));
            domain.command = match order {
                Err(mistake) => format!("not understood: {mistake}"),
                Ok(Order::Failover) if first => {
                    "failover: not done: it was asked for before the agent looked; ask again".to_owned()
                }
                Ok(order) => {
                    domain.ordered = Some(order);
                    "failover: under way".to_owned()
                }
            };
        }
        // An end that a look has seen may be older than what has begun since; it is told by itself.
        if found.protection.is_active() {
            self.fares(guest, found.protection, now, out);
        }
    }

    fn fares(&mut self, guest: GuestId, protection: Protection, now: Instant, out: &mut Vec<Command>) {
        let Some(domain) = self.domains.get_mut(&guest) else { return };
        match protection {
            Protection::None => {
                // Forgotten by an operator's `unprotect`.
                if domain.phase == Phase::Following {
                    (domain.phase, domain.applied) = (Phase::Off, None);
                }
            }
            Protection::Active { report, .. } => {
                // An operator's protection is taken for what the mark wants, until the mark changes.
                let adopted = matches!(domain.phase, Phase::Waiting { .. } | Phase::Off)
                    && domain.applied.is_none()
                    && domain.wanted().is_some();
                if adopted {
                    domain.applied = domain.wanted().cloned();
                }
                if adopted || domain.phase == Phase::Protecting {
                    domain.phase = Phase::Following;
                }
                if report.settled {
                    domain.attempts = 0;
                }
                domain.report = report;
            }
            Protection::Over(ended) => {
                if domain.phase != Phase::Following {
                    return;
                }
                domain.applied = None;
                domain.phase = match ended {
                    Ended::ByOperator => Phase::Off,
                    Ended::WithGuest | Ended::WithAgent => Phase::Idle,
                    Ended::Failed(failed) => failure(failed, &mut domain.attempts, now),
                };
                if domain.phase == Phase::Idle {
                    // It is about to be gone, unless it was started anew before its end was noticed here.
                    domain.running = false;
                    self.look(guest, false, out);
                }
            }
        }
    }

    fn unprotected(&mut self, guest: GuestId, result: Result<(), Failed>, now: Instant) {
        let Some(domain) = self.domains.get_mut(&guest) else { return };
        if domain.phase != Phase::Ending {
            return;
        }
        domain.phase = match result {
            Ok(()) => {
                domain.applied = None;
                Phase::Idle
            }
            // Still protected: it is tried again.
            Err(failed) => failure(failed, &mut domain.attempts, now),
        };
    }
}

#[cfg(test)]
#[path = "engine_tests.rs"]
mod tests;
