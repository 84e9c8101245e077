//! What a keeper sees of its own host, and does there.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio_stream::StreamExt;
use tracing::{debug, info, warn};
use understudy_libvirt::Connection;
use understudy_proto::ids::{EpochId, Generation, GuestId};
use understudy_proto::ownership::Term;
use understudy_proto::policy::GuestSettings;
use understudy_proto::rpc::admin::{
    ConfirmRequest, FailoverReport, FailoverRequest, GuestState, GuestStatus, LOADED, ProtectRequest,
    StatusRequest, UnprotectRequest,
};
use understudy_proto::rpc::owner::HandoverClient;
use understudy_proto::rpc::{AdminClient, Failure, FailureKind, async_trait, transport};

use crate::engine::{Depth, Trouble};
use crate::look;
use crate::monitor::Monitors;
use crate::owner::{Command, Event, Image, Local, Sending};
use crate::record;

/// A guest of this host, as one look finds it.
#[derive(Debug, Clone, PartialEq)]
pub struct Seen {
    /// The guest.
    pub guest: GuestId,
    /// Its name; empty if no agent here says it.
    pub name: String,
    /// Its instance here, apart from a standby.
    pub place: Place,
    /// What is here of it.
    pub local: Local,
    /// What the primary agent sends of it, if it does.
    pub sending: Option<Sending>,
    /// The primary agent has it in its state file: until it has let it go.
    pub listed: bool,
    /// A protection is under way or on.
    pub protecting: bool,
    /// The primary agent has too much to do to say whether that is so.
    pub busy: bool,
    /// It is on, and its backup is lost.
    pub degraded: bool,
    /// Last committed epoch the agents here know.
    pub epoch: EpochId,
    /// When its QEMU here last gave a sign of life.
    pub qemu: Option<Instant>,
    /// The agent says that the guest has a newer owner.
    pub superseded: bool,
    /// The last protection here is over because the guest is.
    pub over: Option<Over>,
    /// The failover that brought it here.
    pub promotion: Option<FailoverReport>,
    /// Bytes of its output that wait here.
    pub held_bytes: Option<u64>,
    /// How it is protected from here, if it is.
    pub settings: Option<GuestSettings>,
}

/// Whether an instance of the guest is on a host, as libvirt says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// It is, and its QEMU answers.
    Answers,
    /// It is, and its QEMU does not answer.
    Hangs,
    /// It is not.
    Off,
    /// What is here is a standby, or libvirt does not say.
    Unknown,
}

/// The end of a guest here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Over {
    /// The generation that has ended.
    pub generation: Generation,
    /// Nobody has ended it: its QEMU died.
    pub crashed: bool,
}

/// A host as the keeper uses it.
#[async_trait]
pub trait Host: Send + Sync {
    /// Every guest the agents of this host know, and those in `known`.
    async fn look(&self, known: &[GuestId]) -> Vec<Seen>;
    /// Carries out what the protocol says (not what concerns the arbiter); gives what came of it, if that is an event.
    async fn carry_out(&self, guest: GuestId, command: Command) -> Option<Event>;
    /// Protects a guest that runs here by the backup `to`, as it was protected before; ends when it is protected, or cannot
    /// be. The orders say the term of the record they are given under: what is of the past is refused.
    async fn protect(
        &self,
        guest: GuestId,
        to: &str,
        as_before: Option<GuestSettings>,
        term: Term,
    ) -> Result<(), Failure>;
    /// Starts the guest from its image here: the other host is off for sure.
    async fn promote_fenced(&self, guest: GuestId) -> Result<(), Failure>;
    /// Has the guest stand still behind a committed epoch; gives the epoch.
    async fn hand_over(&self, guest: GuestId, term: Term) -> Result<EpochId, Failure>;
    /// Lets it run on after that.
    async fn take_back(&self, guest: GuestId, term: Term) -> Result<(), Failure>;
}

/// How long an agent may take over a question.
const ANSWER: Duration = Duration::from_secs(2);

/// How long a full copy may take before the keeper looks after other things; it goes on behind.
const COPY: Duration = Duration::from_secs(3600);

/// A host with its agents and its libvirt.
pub struct AgentHost {
    /// Where the agents have their sockets.
    pub run_dir: PathBuf,
    /// Where the primary agent has its state file.
    pub state_dir: PathBuf,
    /// The way to the guests' QEMUs.
    pub monitors: Arc<dyn Monitors>,
    /// Which libvirt.
    pub uri: String,
    /// How long a load may take.
    pub load_limit: Duration,
    /// Protections that the keeper begins are not encrypted.
    pub insecure: bool,
    /// The questions to QEMUs that are not answered yet: one that hangs is not asked twice.
    pub asked: Asked,
}

/// Guests whose QEMU has not answered yet.
#[derive(Debug, Clone, Default)]
pub struct Asked(Arc<Mutex<BTreeMap<GuestId, ()>>>);

impl Asked {
    /// False if a question is under way.
    fn begin(&self, guest: GuestId) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(guest, ()).is_none()
    }

    fn end(&self, guest: GuestId) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&guest);
    }
}

impl std::fmt::Debug for AgentHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AgentHost").field("run_dir", &self.run_dir).finish_non_exhaustive()
    }
}

impl AgentHost {
    async fn agent(&self, socket: &str) -> Result<AdminClient, Failure> {
        let path = self.run_dir.join(socket);
        let connected = transport::connect_unix(&path);
        let silent =
            |_| Failure::new(FailureKind::Unavailable, "silent", format!("{socket} does not answer"));
        Ok(AdminClient::new(tokio::time::timeout(ANSWER, connected).await.map_err(silent)??))
    }

    async fn handover(&self) -> Result<HandoverClient, Failure> {
        let channel = transport::connect_unix(&self.run_dir.join(transport::PRIMARY_SOCKET)).await?;
        Ok(HandoverClient::new(channel))
    }

    /// None if the agent is there and does not answer in time: that is no news of its guests. One that is not there has
    /// none.
    async fn statuses(&self, socket: &str) -> Option<Vec<GuestStatus>> {
        let asked = async { self.agent(socket).await?.status(StatusRequest::default()).await };
        let answer = tokio::time::timeout(ANSWER, asked).await.ok()?;
        Some(answer.map(|reply| reply.guests).unwrap_or_default())
    }

    async fn place(&self, guest: GuestId) -> Place {
        if !self.asked.begin(guest) {
            return Place::Hangs;
        }
        let (monitors, asked) = (Arc::clone(&self.monitors), self.asked.clone());
        let (opened_in, mut opened) = tokio::sync::oneshot::channel();
        let asking = tokio::task::spawn_blocking(move || {
            let place = match monitors.open(guest) {
                Ok(monitor) => {
                    // Nobody waits for it any more if that is not taken.
                    let _ = opened_in.send(());
                    match look::look(monitor.as_ref(), Depth::Glance) {
                        Ok(_) => Place::Answers,
                        Err(_) => Place::Hangs,
                    }
                }
                Err(Trouble::Off) => Place::Off,
                Err(Trouble::Unreachable(_) | Trouble::Refused(_)) => Place::Unknown,
            };
            asked.end(guest);
            place
        });
        // A QEMU that hangs keeps its thread until libvirt gives it up.
        match tokio::time::timeout(ANSWER, asking).await {
            Ok(Ok(place)) => place,
            Ok(Err(_)) => Place::Unknown,
            Err(_) if opened.try_recv().is_ok() => Place::Hangs,
            Err(_) => Place::Unknown,
        }
    }

    async fn one(
        &self,
        guest: GuestId,
        listed: Option<Generation>,
        primary: Option<&GuestStatus>,
        backup: Option<&GuestStatus>,
    ) -> Seen {
        let state = backup.map(|status| status.state);
        let standby =
            matches!(state, Some(GuestState::Standby | GuestState::Seeding | GuestState::Promoting));
        let place = if standby { Place::Unknown } else { self.place(guest).await };
        let (runs, present) = (place == Place::Answers, matches!(place, Place::Answers | Place::Hangs));
        let promoted = backup.filter(|_| state == Some(GuestState::Promoted)).map(|status| status.generation);
        let image = backup.filter(|_| matches!(state, Some(GuestState::Standby | GuestState::Promoting)));
        let image = image.and_then(|status| {
            Some(Image { incarnation: status.incarnation?, generation: status.generation })
        });
        let protecting = primary.is_some_and(|status| {
            matches!(status.state, GuestState::Seeding | GuestState::Protected | GuestState::Degraded)
        });
        let sending = primary.filter(|_| protecting).and_then(|status| {
            let (generation, held) = (status.generation, status.held_term);
            Some(Sending { generation, committed: status.committed_epoch?, held })
        });
        // What has ended here, or was taken from here, had a generation too.
        let said = primary.map(|status| status.generation);
        let over = primary.filter(|_| !protecting).and_then(|status| match status.state {
            GuestState::Ended => Some(Over { generation: status.generation, crashed: false }),
            GuestState::Crashed => Some(Over { generation: status.generation, crashed: true }),
            _ => None,
        });
        let name = [primary, backup].into_iter().flatten().map(|status| status.domain.clone()).next();
        let epoch = [primary, backup].into_iter().flatten().filter_map(|status| status.committed_epoch).max();
        Seen {
            guest,
            name: name.unwrap_or_default(),
            place,
            local: Local { runs, image, generation: listed.max(promoted).max(said).filter(|_| present) },
            sending,
            listed: listed.is_some(),
            protecting,
            busy: false,
            epoch: epoch.unwrap_or(EpochId(0)),
            qemu: runs.then(Instant::now),
            degraded: primary.is_some_and(|status| status.state == GuestState::Degraded),
            superseded: primary.is_some_and(|status| status.state == GuestState::Superseded),
            over,
            promotion: backup.filter(|_| promoted.is_some()).and_then(|status| status.failover.clone()),
            held_bytes: primary.and_then(|status| status.output_waiting_bytes),
            settings: primary.filter(|_| protecting).and_then(|status| status.settings.clone()),
        }
    }

    async fn load(&self, guest: GuestId, term: Term) -> Result<(), Failure> {
        let mut agent = self.agent(transport::BACKUP_SOCKET).await?;
        let (domain, term) = (guest.to_string(), Some(term));
        let request = FailoverRequest { domain, i_have_fenced: true, hold: true, term };
        let mut steps = agent.failover(request).await?;
        while let Some(step) = steps.next().await {
            if step?.phase == LOADED {
                return Ok(());
            }
        }
        Err(Failure::new(FailureKind::Internal, "no-end", "the load ended without a word"))
    }

    async fn confirm(&self, guest: GuestId, proceed: bool, term: Term) -> Result<(), Failure> {
        let mut agent = self.agent(transport::BACKUP_SOCKET).await?;
        agent.confirm(ConfirmRequest { domain: guest.to_string(), proceed, term: Some(term) }).await
    }

    async fn activate(&self, guest: GuestId, term: Term) -> Result<(), Failure> {
        match self.confirm(guest, true, term).await {
            Err(failure) if failure.code == "nothing-waits" => {}
            confirmed => return confirmed,
        }
        // The record says that it is to run here; what was loaded for that is gone, so it is loaded again.
        self.promote(guest, Some(term)).await
    }

    async fn promote(&self, guest: GuestId, term: Option<Term>) -> Result<(), Failure> {
        let mut agent = self.agent(transport::BACKUP_SOCKET).await?;
        let request = FailoverRequest { domain: guest.to_string(), i_have_fenced: true, hold: false, term };
        let mut steps = match agent.failover(request).await {
            Err(failure) if failure.code == "already-promoted" => return Ok(()),
            steps => steps?,
        };
        while let Some(step) = steps.next().await {
            if step?.done {
                return Ok(());
            }
        }
        Err(Failure::new(FailureKind::Internal, "no-end", "the promotion ended without a word"))
    }

    /// Ending the protection is how the primary agent opens its gate.
    async fn open_gate(&self, guest: GuestId, term: Term) -> Result<(), Failure> {
        let mut agent = self.agent(transport::PRIMARY_SOCKET).await?;
        let request = UnprotectRequest { domain: guest.to_string(), term: Some(term) };
        match agent.unprotect(request).await {
            Err(failure) if failure.kind != FailureKind::NotFound => Err(failure),
            _ => Ok(()),
        }
    }

    /// The primary agent holds output by itself whenever nothing is committed; it is to promise that nothing that was
    /// ordered before lets it go.
    async fn hold_gate(&self, guest: GuestId, term: Term) -> Result<(), Failure> {
        let asked = async { self.handover().await?.hold(guest, term).await };
        let silent =
            |_| Failure::new(FailureKind::Unavailable, "silent", "the primary agent does not answer");
        tokio::time::timeout(ANSWER, asked).await.map_err(silent)?
    }

    async fn destroy(&self, guest: GuestId) -> Result<(), Failure> {
        let uri = self.uri.clone();
        let done = tokio::task::spawn_blocking(move || {
            let connection = Connection::open(&uri).map_err(|error| error.to_string())?;
            let domain = connection.find_domain(&guest.to_string()).map_err(|error| error.to_string())?;
            domain.destroy().map_err(|error| error.to_string())
        });
        let done = done.await.map_err(|error| error.to_string()).and_then(|done| done);
        done.map_err(|reason| Failure::new(FailureKind::Internal, "destroy", reason))
    }
}

#[async_trait]
impl Host for AgentHost {
    async fn look(&self, known: &[GuestId]) -> Vec<Seen> {
        let listed = match record::read(&self.state_dir) {
            Ok(listed) => listed,
            // Not to be taken for a list without guests: that would be their end.
            Err(error) => {
                debug!(%error, "the guests of the primary agent are not known");
                return Vec::new();
            }
        };
        let primary = self.statuses(transport::PRIMARY_SOCKET).await;
        let busy = primary.is_none();
        let primary = primary.unwrap_or_default();
        let backup = self.statuses(transport::BACKUP_SOCKET).await.unwrap_or_default();
        let mut guests: Vec<GuestId> = known.to_vec();
        guests.extend(listed.iter().map(|listed| listed.guest));
        guests.extend(backup.iter().map(|status| status.uuid));
        guests.sort();
        guests.dedup();
        let find = |list: &'_ [GuestStatus], guest| list.iter().position(|status| status.uuid == guest);
        let mut seen = Vec::new();
        for guest in guests {
            let generation =
                listed.iter().find(|listed| listed.guest == guest).map(|listed| listed.generation);
            let (p, b) = (find(&primary, guest), find(&backup, guest));
            let (p, b) = (p.and_then(|at| primary.get(at)), b.and_then(|at| backup.get(at)));
            seen.push(Seen { busy, ..self.one(guest, generation, p, b).await });
        }
        seen
    }

    async fn carry_out(&self, guest: GuestId, command: Command) -> Option<Event> {
        let done = match &command {
            Command::Load(term) => {
                let loaded = tokio::time::timeout(self.load_limit, self.load(guest, *term)).await;
                return Some(match loaded {
                    Ok(Ok(())) => Event::Loaded,
                    Ok(Err(failure)) => {
                        warn!(%guest, reason = failure.reason, "the claimed guest cannot be loaded");
                        Event::LoadFailed
                    }
                    Err(_) => {
                        warn!(%guest, limit = ?self.load_limit, "the claimed guest was not loaded in time");
                        Event::LoadFailed
                    }
                });
            }
            Command::Activate(term) => self.activate(guest, *term).await,
            Command::Abandon(term) => self.confirm(guest, false, *term).await,
            Command::OpenGate(term) => self.open_gate(guest, *term).await,
            Command::HoldGate(term) => self.hold_gate(guest, *term).await,
            Command::DestroyGuest(_) => self.destroy(guest).await,
            // The primary agent stops a guest whose backup tells it that it was promoted.
            Command::PauseGuest(_) | Command::ResumeGuest(_) => Ok(()),
            Command::Read | Command::Swap(_) => Ok(()),
        };
        match done {
            Ok(()) => info!(%guest, ?command, "done"),
            Err(failure) => debug!(%guest, ?command, reason = failure.reason, "not done"),
        }
        None
    }

    async fn protect(
        &self,
        guest: GuestId,
        to: &str,
        as_before: Option<GuestSettings>,
        term: Term,
    ) -> Result<(), Failure> {
        let mut agent = self.agent(transport::PRIMARY_SOCKET).await?;
        let epoch = as_before.as_ref().map(|before| Duration::from_millis(before.epoch_ms.into()));
        let GuestSettings { goals, ungated, policy, .. } = as_before.unwrap_or_default();
        let (domain, to, insecure) = (guest.to_string(), to.to_owned(), self.insecure);
        let term = Some(term);
        let request = ProtectRequest { domain, to, epoch, insecure, ungated, goals, policy, term };
        let follow = async {
            let mut steps = agent.protect(request).await?;
            while let Some(step) = steps.next().await {
                if step?.done {
                    return Ok(());
                }
            }
            Err(Failure::new(FailureKind::Internal, "no-end", "the full copy ended without a word"))
        };
        tokio::time::timeout(COPY, follow).await.unwrap_or(Ok(()))
    }

    async fn promote_fenced(&self, guest: GuestId) -> Result<(), Failure> {
        self.promote(guest, None).await
    }

    async fn hand_over(&self, guest: GuestId, term: Term) -> Result<EpochId, Failure> {
        self.handover().await?.begin(guest, term).await
    }

    async fn take_back(&self, guest: GuestId, term: Term) -> Result<(), Failure> {
        self.handover().await?.take_back(guest, term).await
    }
}
