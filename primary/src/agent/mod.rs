//! The agent: the guests it protects, each with an owner of its own, and what outlives them.

mod alarm;
mod capturer;
mod guest;
mod handover;
mod host;
mod ordered;
mod output;
mod restart;
mod stall;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tracing::{error, info, warn};
use understudy_libvirt::{Connection, LibvirtError};
use understudy_proto::ids::{Generation, GuestId};
use understudy_proto::ownership::Term;
use understudy_proto::pace::EpochGoals;
use understudy_proto::policy::GuestPolicy;
use understudy_proto::pool::Pool;
use understudy_proto::rpc::admin::GuestStatus;
use understudy_proto::rpc::{Failure, FailureKind};

pub use capturer::Barrier;
pub use guest::{Handle, Plan, Snapshot, Wish, start};
pub use handover::Handover;
pub use host::{GuestHost, LibvirtGuest};
use ordered::Ordered;
pub use output::{Gate, Output};

use crate::config::Config;
use crate::engine::{Outcome, OutcomeKind};
use crate::protect;
use crate::state_file::{ProtectedGuest, StateFile, StateFileError};

/// How long the agent waits for its guests to be let go when it ends. QEMU needs milliseconds.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(20);

/// How long `unprotect` waits for the end.
const UNPROTECT_LIMIT: Duration = Duration::from_secs(30);

/// How often it is looked whether an instance that has lost the guest is still there.
const GONE_INTERVAL: Duration = Duration::from_secs(2);

type SnapshotReceiver = tokio::sync::watch::Receiver<Snapshot>;

/// All guests of this host that are, or were, protected.
#[derive(Debug)]
pub struct Agent {
    /// As started.
    pub config: Config,
    /// Threads that help to encode the pages of any guest.
    pub(crate) pool: Pool,
    state_file: StateFile,
    connection: Mutex<Option<Connection>>,
    guests: Mutex<BTreeMap<GuestId, Entry>>,
    /// One `protect` at a time, so that two of the same guest cannot pass each other.
    protecting: tokio::sync::Mutex<()>,
    orders: Ordered,
}

#[derive(Debug)]
struct Entry {
    wanted: ProtectedGuest,
    state: State,
}

#[derive(Debug)]
enum State {
    /// To be protected as after a restart; not yet possible.
    Waiting { detail: String },
    /// Has an owner, or had one: its last snapshot is kept.
    Owned(Handle),
}

impl Entry {
    fn is_over(&self) -> bool {
        match &self.state {
            // What the agent's own end interrupts is to go on.
            State::Owned(handle) => {
                let snapshot = handle.snapshot.borrow();
                snapshot.outcome.as_ref().is_some_and(|outcome| outcome.kind != OutcomeKind::AgentStopped)
            }
            State::Waiting { .. } => false,
        }
    }

    /// An instance that has lost the guest is let go when it is ended: until then its generation is to be known.
    fn is_remembered(&self) -> bool {
        let superseded = match &self.state {
            State::Owned(handle) => handle.snapshot.borrow().is_superseded(),
            State::Waiting { .. } => false,
        };
        superseded || !self.is_over()
    }

    fn status(&self) -> GuestStatus {
        let status = match &self.state {
            State::Owned(handle) => handle.snapshot.borrow().status(),
            State::Waiting { detail } => {
                let mut status = guest::waiting_status(
                    self.wanted.guest,
                    &self.wanted.name,
                    &self.wanted.to,
                    detail.clone(),
                );
                status.generation = self.wanted.generation;
                status
            }
        };
        GuestStatus { settings: Some(self.wanted.settings()), ..status }
    }
}

impl Agent {
    /// An agent without guests.
    pub fn new(config: Config) -> Arc<Self> {
        let pool = Pool::new("encode", config.encode_threads()).unwrap_or_else(|error| {
            warn!(error, "every guest encodes alone");
            Pool::single()
        });
        Arc::new(Self {
            pool,
            state_file: StateFile::new(&config.state_dir),
            config,
            connection: Mutex::new(None),
            guests: Mutex::new(BTreeMap::new()),
            protecting: tokio::sync::Mutex::new(()),
            orders: Ordered::default(),
        })
    }

    /// A connection to libvirt, opened anew if the last one has broken. Blocks.
    ///
    /// # Errors
    /// If libvirt does not answer.
    pub fn libvirt(&self) -> Result<Connection, LibvirtError> {
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(connection) = connection.as_ref().filter(|connection| connection.is_alive()) {
            return Ok(connection.clone());
        }
        Ok(connection.insert(Connection::open(&self.config.libvirt_uri)?).clone())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<GuestId, Entry>> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Excludes other `protect`s for as long as the guard lives.
    pub async fn exclusive(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.protecting.lock().await
    }

    /// The backup that protects the guest, if one does.
    pub fn protected_to(&self, guest: GuestId) -> Option<String> {
        self.lock().get(&guest).filter(|entry| !entry.is_over()).map(|entry| entry.wanted.to.clone())
    }

    /// Starts a protection; from before it touches the guest until its end it is remembered over restarts.
    ///
    /// # Errors
    /// If it cannot be remembered or started; then nothing was touched.
    pub async fn protect(
        self: &Arc<Self>,
        wanted: ProtectedGuest,
        plan: Plan,
    ) -> Result<tokio::sync::watch::Receiver<Snapshot>, Failure> {
        let (guest, generation) = (wanted.guest, wanted.generation);
        self.remember(Some(&wanted), guest).await?;
        let handle = match start(plan).await {
            Ok(handle) => handle,
            Err(reason) => {
                // A guest that waits since a restart goes on waiting.
                let waiting = self.lock().get(&guest).filter(|e| !e.is_over()).map(|e| e.wanted.clone());
                self.remember(waiting.as_ref(), guest).await?;
                return Err(Failure::new(FailureKind::Internal, "not-started", reason));
            }
        };
        let snapshot = handle.snapshot.clone();
        self.lock().insert(guest, Entry { wanted, state: State::Owned(handle) });
        let (agent, mut end) = (Arc::clone(self), snapshot.clone());
        tokio::spawn(async move {
            let Ok(outcome) = end.wait_for(|s| s.outcome.is_some()).await.map(|s| s.outcome.clone()) else {
                error!(%guest, "the owner of the guest has failed");
                return;
            };
            let Some(outcome) = outcome.filter(|outcome| outcome.kind != OutcomeKind::AgentStopped) else {
                return;
            };
            if outcome.kind == OutcomeKind::Superseded && !agent.gone(guest, generation).await {
                return;
            }
            if let Err(failure) = agent.remember(None, guest).await {
                error!(%guest, reason = failure.reason, "cannot forget the guest");
            }
        });
        Ok(snapshot)
    }

    /// Waits until the instance that has lost the guest is gone; gives false if the guest is protected anew.
    async fn gone(self: &Arc<Self>, guest: GuestId, generation: Generation) -> bool {
        loop {
            tokio::time::sleep(GONE_INTERVAL).await;
            match self.lock().get(&guest).map(|entry| &entry.state) {
                Some(State::Owned(handle)) if handle.snapshot.borrow().is_superseded() => {}
                Some(_) => return false,
                None => return true,
            }
            let agent = Arc::clone(self);
            let gone = tokio::task::spawn_blocking(move || protect::is_gone(&agent, guest, generation));
            // Not known is not gone.
            if matches!(gone.await, Ok(Ok(true))) {
                return true;
            }
        }
    }

    /// Writes the state file with `wanted` in the place of what is known of `guest`.
    async fn remember(&self, wanted: Option<&ProtectedGuest>, guest: GuestId) -> Result<(), Failure> {
        let mut list: Vec<ProtectedGuest> = self
            .lock()
            .values()
            .filter(|entry| entry.wanted.guest != guest && entry.is_remembered())
            .map(|entry| entry.wanted.clone())
            .collect();
        list.extend(wanted.cloned());
        let file = self.state_file.clone();
        let written = tokio::task::spawn_blocking(move || file.write(&list)).await;
        let reason = match written {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        Err(Failure::new(FailureKind::Internal, "state-file", reason)
            .with_remedy("see that --state-dir is a folder the agent may write to, with room in it"))
    }

    /// The guest of that name, UUID or, by asking libvirt, id.
    ///
    /// # Errors
    /// `not-protected` if this agent knows nothing of it.
    pub async fn find(self: &Arc<Self>, key: &str) -> Result<GuestId, Failure> {
        let known = |key: &str| {
            let (guests, uuid) = (self.lock(), key.parse::<uuid::Uuid>().ok().map(GuestId));
            let called = guests.values().filter(|e| e.wanted.name == key || Some(e.wanted.guest) == uuid);
            // A domain that was defined anew has the name of one whose protection is over.
            called.min_by_key(|e| e.is_over()).map(|e| e.wanted.guest)
        };
        if let Some(guest) = known(key) {
            return Ok(guest);
        }
        if key.parse::<u32>().is_ok() || key.parse::<uuid::Uuid>().is_ok() {
            let (agent, id) = (Arc::clone(self), key.to_owned());
            let domain = tokio::task::spawn_blocking(move || agent.libvirt()?.find_domain(&id)).await;
            if let Ok(Ok(domain)) = domain
                && let Some(guest) = known(&domain.uuid().to_string())
            {
                return Ok(guest);
            }
        }
        Err(Failure::new(
            FailureKind::NotFound,
            "not-protected",
            format!("domain {key:?} is not protected by this host"),
        )
        .with_remedy("`understudy status` shows the guests that are, `understudy protect` protects one"))
    }

    /// What is known of every guest, or of one.
    pub fn statuses(&self, guest: Option<GuestId>) -> Vec<GuestStatus> {
        let guests = self.lock();
        let wanted = guests.values().filter(|e| guest.is_none_or(|g| g == e.wanted.guest));
        wanted
            .map(|entry| {
                // First, so that an order which was carried out before the promise shows in what is said beside it.
                let held_term = Some(self.orders.held(entry.wanted.guest));
                GuestStatus { held_term, ..entry.status() }
            })
            .collect()
    }

    /// What a guest is protected for, how that fares, and its outcome once it is over.
    pub fn view(&self, guest: GuestId) -> Option<(ProtectedGuest, GuestStatus, Option<Outcome>)> {
        let guests = self.lock();
        let entry = guests.get(&guest)?;
        let outcome = match &entry.state {
            State::Owned(handle) => handle.snapshot.borrow().outcome.clone(),
            State::Waiting { .. } => None,
        };
        Some((entry.wanted.clone(), entry.status(), outcome))
    }

    /// Changes the length of a protected guest's epochs, or what they are to reach, also for after a restart.
    ///
    /// # Errors
    /// `not-protected` if its protection is over; if it cannot be remembered: then nothing is changed.
    pub async fn set_pace(
        &self,
        guest: GuestId,
        epoch: Option<Duration>,
        goals: Option<EpochGoals>,
    ) -> Result<(), Failure> {
        let (wanted, wishes) = match self.lock().get(&guest) {
            Some(entry) if !entry.is_over() => {
                let ms = |epoch: Duration| u32::try_from(epoch.as_millis()).unwrap_or(u32::MAX);
                let epoch_ms = epoch.map_or(entry.wanted.epoch_ms, ms);
                let wishes = match &entry.state {
                    State::Owned(handle) => Some(handle.wishes.clone()),
                    State::Waiting { .. } => None,
                };
                (ProtectedGuest { epoch_ms, goals, ..entry.wanted.clone() }, wishes)
            }
            _ => return Err(over()),
        };
        self.remember(Some(&wanted), guest).await?;
        if let Some(entry) = self.lock().get_mut(&guest) {
            (entry.wanted.epoch_ms, entry.wanted.goals) = (wanted.epoch_ms, goals);
        }
        let epoch = Duration::from_millis(wanted.epoch_ms.into());
        match wishes {
            Some(wishes) => wishes.send(Wish::Pace(epoch, goals)).await.map_err(|_| over()),
            None => Ok(()),
        }
    }

    /// Changes what an operator has chosen for a protected guest, also for after a restart. The watchdogs follow its status.
    ///
    /// # Errors
    /// As [`Self::set_pace`].
    pub async fn set_policy(&self, guest: GuestId, policy: GuestPolicy) -> Result<(), Failure> {
        let wanted = match self.lock().get(&guest) {
            Some(entry) if !entry.is_over() => ProtectedGuest { policy, ..entry.wanted.clone() },
            _ => return Err(over()),
        };
        self.remember(Some(&wanted), guest).await?;
        if let Some(entry) = self.lock().get_mut(&guest) {
            entry.wanted.policy = wanted.policy;
        }
        Ok(())
    }

    /// Takes an order about the guest that was given under this term; `None`: by an operator.
    ///
    /// # Errors
    /// `order-outdated`.
    pub fn take_order(&self, guest: GuestId, term: Option<Term>) -> Result<(), Failure> {
        Ok(self.orders.of(guest, |orders| orders.take(term))?)
    }

    /// Promises to refuse orders of this term or an older one that would let the guest's output go.
    ///
    /// # Errors
    /// `order-outdated`.
    pub fn hold(&self, guest: GuestId, term: Term) -> Result<(), Failure> {
        Ok(self.orders.of(guest, |orders| orders.hold(term))?)
    }

    /// Ends a protection and waits for its end; forgets one that is over. Of a watchdog's order the term is known.
    ///
    /// # Errors
    /// `order-outdated`; if it does not end in time.
    pub async fn unprotect(&self, guest: GuestId, term: Option<Term>) -> Result<String, Failure> {
        let _opening = self.orders.open(guest, term)?;
        let owner = match self.lock().get(&guest) {
            Some(entry) if !entry.is_over() => match &entry.state {
                State::Owned(handle) => Some((handle.wishes.clone(), handle.snapshot.clone())),
                State::Waiting { .. } => None,
            },
            _ => None,
        };
        let Some((wishes, mut snapshot)) = owner else {
            let known = self.lock().remove(&guest);
            if let Some(Entry { state: State::Owned(handle), .. }) = known {
                output::let_out(handle.gate).await;
            }
            self.remember(None, guest).await?;
            return Ok("it was not protected any more; what was known of it is forgotten".to_owned());
        };
        // A closed channel is a protection that has just ended.
        let _ = wishes.send(Wish::Unprotect).await;
        let end = tokio::time::timeout(UNPROTECT_LIMIT, snapshot.wait_for(|s| s.outcome.is_some())).await;
        match end {
            Ok(Ok(last)) => {
                let outcome = last.outcome.clone();
                drop(last);
                self.lock().remove(&guest);
                Ok(outcome.map(|Outcome { text, .. }| text).unwrap_or_default())
            }
            Ok(Err(_)) => {
                Err(Failure::new(FailureKind::Internal, "owner-failed", "the owner of the guest has failed")
                    .with_remedy("restart understudy-primary"))
            }
            Err(_) => {
                let reason = format!("the protection did not end within {} s", UNPROTECT_LIMIT.as_secs());
                Err(Failure::new(FailureKind::Internal, "not-ended", reason).with_remedy(
                    "look at the agent's log; restarting understudy-primary lets the guest go as well",
                ))
            }
        }
    }

    /// Lets all guests go; they run on, and a successor protects them again.
    pub async fn shutdown(&self) {
        let owners: Vec<_> = self
            .lock()
            .values()
            .filter_map(|entry| match &entry.state {
                State::Owned(handle) => Some((handle.wishes.clone(), handle.snapshot.clone())),
                State::Waiting { .. } => None,
            })
            .collect();
        for (wishes, _) in &owners {
            let _ = wishes.send(Wish::Shutdown).await;
        }
        let ends = async {
            for (_, mut snapshot) in owners {
                if snapshot.wait_for(|snapshot| snapshot.outcome.is_some()).await.is_err() {
                    error!("the owner of a guest has failed");
                }
            }
        };
        match tokio::time::timeout(SHUTDOWN_LIMIT, ends).await {
            Ok(()) => info!("all guests are let go"),
            Err(_) => warn!("not all guests could be let go in time; the next start does it"),
        }
    }

    /// What the state file says.
    ///
    /// # Errors
    /// If it cannot be used.
    pub fn remembered(&self) -> Result<Vec<ProtectedGuest>, StateFileError> {
        self.state_file.read()
    }
}
fn over() -> Failure {
    let reason = "the guest is not protected by this host any more";
    Failure::new(FailureKind::FailedPrecondition, "not-protected", reason)
}
