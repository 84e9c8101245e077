//! Carries out the claim protocol for the guests of a host: heartbeats, the arbiter, the agents.
//!
//! One task owns every engine. What takes time (the arbiter, the agents) is done by tasks of their own, one of each per
//! guest and in order, whose answers come back as events.

mod answers;
mod fencing;
mod guest;
mod handing;
mod hands;
mod host;
mod paths;
mod renew;
mod reports;
mod service;

pub use host::{AgentHost, Asked, Host, Over, Place, Seen};
pub use paths::Paths;
pub use reports::Reports;
pub use service::{Asking, Questions, listen};

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::mpsc;
use tracing::{info, warn};
use understudy_proto::heartbeat::Heartbeat;
use understudy_proto::ids::{EpochId, GuestId};
use understudy_proto::rpc::Failure;

use crate::arbiter::{Arbiter, FenceOutcome};
use crate::bound::Limits;
use crate::owner::{Event, Policies, Timing};
use answers::Claimed;
use guest::Kept;

/// Between two looks at the agents.
const LOOK: Duration = Duration::from_millis(200);

/// Answers that may wait.
const INBOX: usize = 256;

/// What a keeper is told at its start.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Name of this host in records and heartbeats; the other one has another.
    pub host: String,
    /// Choices of the operator.
    pub policies: Policies,
    /// How long things may take.
    pub timing: Timing,
    /// What the bound on a failover is made of beside that.
    pub limits: Limits,
    /// Backups for a guest that runs alone, in the order in which they are asked.
    pub spares: Vec<String>,
    /// Switches the other host off when the arbiter is lost.
    pub fence: Option<Arc<crate::arbiter::FenceCommand>>,
    /// Where takeovers are reported.
    pub reports: Reports,
}

#[derive(Debug)]
pub(super) enum Answer {
    Event(GuestId, Event),
    Looked(Vec<Seen>),
    /// A command that opens the gate is done.
    Opened(GuestId),
    /// The arbiter was asked and has answered, or not.
    Arbiter(GuestId, bool),
    /// An attempt to protect the guest again is over.
    Protected(GuestId, String, Result<(), Failure>),
    /// The guest stands still for the other host, or does not.
    HandedOver(GuestId, Result<EpochId, Failure>),
    /// The fencing command has ended.
    Fenced(GuestId, FenceOutcome),
}

/// Keeps the guests of a host until the process ends.
///
/// # Errors
/// If the network cannot be used.
pub async fn run(
    settings: Settings,
    arbiter: Arc<dyn Arbiter>,
    host: Arc<dyn Host>,
    paths: Paths,
    mut questions: Questions,
) -> std::io::Result<()> {
    let (outbox, mut inbox) = mpsc::channel(INBOX);
    let mut keeper = Keeper {
        life: life(),
        settings,
        arbiter,
        host,
        outbox,
        guests: BTreeMap::new(),
        looking: false,
        claimed: Vec::new(),
    };
    info!(host = keeper.settings.host, arbiter = keeper.arbiter.name(), "guests are kept");
    let mut beat = tokio::time::interval(keeper.settings.timing.heartbeat);
    beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let due = keeper.guests.values().map(|kept| kept.engine.deadline()).min();
        let due = due.unwrap_or_else(|| Instant::now() + LOOK);
        tokio::select! {
            heard = paths.receive() => keeper.heard(heard?),
            Some(answer) = inbox.recv() => keeper.answer(answer),
            _ = beat.tick() => {
                for heartbeat in keeper.heartbeats() {
                    paths.send(&heartbeat).await;
                }
            }
            Some(asking) = questions.recv() => keeper.asked(asking),
            _ = look.tick() => keeper.look(),
            () = tokio::time::sleep_until(due.into()) => keeper.tick(),
        }
    }
}

/// Grows with every start of the process, as long as the clock of the host does.
fn life() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

struct Keeper {
    life: u64,
    settings: Settings,
    arbiter: Arc<dyn Arbiter>,
    host: Arc<dyn Host>,
    outbox: mpsc::Sender<Answer>,
    guests: BTreeMap<GuestId, Kept>,
    looking: bool,
    /// Operators who wait.
    claimed: Vec<Claimed>,
}

impl Keeper {
    fn look(&mut self) {
        if std::mem::replace(&mut self.looking, true) {
            return;
        }
        let known: Vec<GuestId> = self.guests.keys().copied().collect();
        self.guests.values_mut().for_each(Kept::look_begins);
        let (host, outbox) = (Arc::clone(&self.host), self.outbox.clone());
        tokio::spawn(async move {
            // The keeper has ended if nobody takes it.
            let _ = outbox.send(Answer::Looked(host.look(&known).await)).await;
        });
    }

    fn answer(&mut self, answer: Answer) {
        let now = Instant::now();
        match answer {
            Answer::Event(guest, event) => {
                if let Some(kept) = self.guests.get_mut(&guest) {
                    kept.event(event, now);
                }
            }
            Answer::Opened(guest) => {
                if let Some(kept) = self.guests.get_mut(&guest) {
                    kept.opened();
                }
            }
            Answer::Arbiter(guest, answered) => {
                if let Some(kept) = self.guests.get_mut(&guest) {
                    kept.arbiter(answered, now);
                }
            }
            Answer::Protected(guest, to, result) => {
                if let Some(kept) = self.guests.get_mut(&guest) {
                    kept.protected(&to, result, now);
                }
            }
            Answer::HandedOver(guest, result) => {
                if let Some(kept) = self.guests.get_mut(&guest) {
                    kept.handing.stands(result, now);
                }
            }
            Answer::Fenced(guest, outcome) => {
                if let Some(kept) = self.guests.get_mut(&guest) {
                    kept.fencing.ended(outcome);
                }
            }
            Answer::Looked(all) => {
                self.looking = false;
                for seen in all {
                    let kept = self.guests.entry(seen.guest).or_insert_with(|| {
                        let (arbiter, host) = (Arc::clone(&self.arbiter), Arc::clone(&self.host));
                        Kept::new(seen.guest, &self.settings, arbiter, host, self.outbox.clone(), now)
                    });
                    kept.seen(seen, now);
                }
                self.tell_claimed(now);
            }
        }
    }

    fn heard(&mut self, heartbeat: Heartbeat) {
        if heartbeat.host == self.settings.host {
            warn!(
                host = heartbeat.host,
                "a heartbeat with the name of this host: give the hosts different names"
            );
            return;
        }
        if let Some(kept) = self.guests.get_mut(&heartbeat.guest) {
            kept.heard(heartbeat, Instant::now());
        }
    }

    fn tick(&mut self) {
        let now = Instant::now();
        self.guests.values_mut().filter(|kept| kept.engine.deadline() <= now).for_each(|kept| kept.tick(now));
    }

    fn heartbeats(&mut self) -> Vec<Heartbeat> {
        let now = Instant::now();
        let (host, life) = (&self.settings.host, self.life);
        self.guests.values_mut().map(|kept| kept.heartbeat(host, life, now)).collect()
    }
}

#[cfg(test)]
mod tests;
