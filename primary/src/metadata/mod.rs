//! Protection that is switched on in a domain's XML, and reported there.
//!
//! [`engine`] decides; this module looks at domains, does what the engine says by the same calls as the admin service,
//! and answers libvirt's hook ([`serve_hooks`]). libvirt's events come from a thread of their own.

pub mod engine;
mod hook;
mod look;
mod policy;
mod view;
mod watch;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tracing::{info, warn};
use understudy_hook::metadata::{
    COMMAND_NAMESPACE, Epoch, Output, Protect, STATE_NAMESPACE, STATE_PREFIX, State,
};
use understudy_libvirt::{Domain, LibvirtError};
use understudy_proto::ids::GuestId;
use understudy_proto::pace::EpochGoals;
use understudy_proto::rpc::admin::{FailoverRequest, ProtectRequest};
use understudy_proto::rpc::{AdminClient, AdminService, Failure, FailureKind, transport};

pub use hook::{listen, serve as serve_hooks};
pub use view::{Ended, Failed, Found, Protection, Report};

use crate::admin::Admin;
use crate::agent::Agent;
use crate::protect;
use engine::{Command, Engine, Event};

/// How often protections are looked at, and the longest delay of a report beside its own interval.
const TICK: Duration = Duration::from_secs(1);

/// Before another look at a domain that could not be looked at.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// Events that wait; whoever brings more waits.
const EVENTS: usize = 256;

/// Follows the domains of the host; does not return.
pub async fn run(agent: Arc<Agent>) {
    let (events, mut inbox) = mpsc::channel(EVENTS);
    if let Err(error) = watch::spawn(agent.config.libvirt_uri.clone(), events.clone()) {
        warn!(%error, "no thread for libvirt's events: what domains say in their XML is not followed");
        return;
    }
    let edge = Edge { agent, events };
    let mut engine = Engine::default();
    let mut tick = tokio::time::interval(TICK);
    loop {
        let event = tokio::select! {
            event = inbox.recv() => match event {
                Some(event) => event,
                None => return,
            },
            _ = tick.tick() => {
                for guest in engine.guests() {
                    let fares = Event::Fares(guest, look::protection(&edge.agent, guest));
                    edge.apply_all(engine.step(fares, Instant::now()));
                }
                // Libvirt's events of guests that are let run say as little of it as of every checkpoint.
                for guest in engine.standbys() {
                    if look::promoted(&edge.agent, guest) {
                        edge.apply_all(engine.step(Event::Promoted(guest), Instant::now()));
                    }
                }
                Event::Tick
            }
        };
        edge.apply_all(engine.step(event, Instant::now()));
    }
}

/// Does what the engine says, each thing in a task of its own; what comes of it is an event.
#[derive(Clone)]
struct Edge {
    agent: Arc<Agent>,
    events: mpsc::Sender<Event>,
}

impl Edge {
    fn apply_all(&self, commands: Vec<Command>) {
        for command in commands {
            let edge = self.clone();
            tokio::spawn(async move { edge.apply(command).await });
        }
    }

    async fn tell(&self, event: Event) {
        // A closed channel is an agent that ends.
        let _ = self.events.send(event).await;
    }

    async fn apply(self, command: Command) {
        match command {
            Command::LookAtAll => self.look_at_all().await,
            Command::Look { guest, first } => self.look(guest, first).await,
            Command::Protect(guest, wanted) => {
                info!(%guest, backup = wanted.backup, "protecting, as the domain's XML says");
                let event = match self.protect(guest, &wanted).await {
                    Ok(()) => Event::Fares(guest, look::protection(&self.agent, guest)),
                    Err(failure) => {
                        warn!(%guest, code = %failure.code, reason = failure.reason, "cannot be protected");
                        Event::Failed(guest, failed(failure))
                    }
                };
                self.tell(event).await;
            }
            Command::Unprotect(guest) => {
                info!(%guest, "ending the protection, as the domain's XML says");
                let result = self.agent.unprotect(guest, None).await;
                self.tell(Event::Unprotected(guest, result.map(drop).map_err(failed))).await;
            }
            Command::Pace(guest, epoch) => {
                info!(%guest, ?epoch, "another length of epochs, as the domain's XML says");
                let (length, goals) = pace(Some(epoch));
                if let Err(failure) = self.agent.set_pace(guest, length, goals).await {
                    // Its protection is over, which is told by itself.
                    warn!(%guest, reason = failure.reason, "the length of its epochs is not changed");
                }
            }
            Command::Policy(guest, said) => {
                info!(%guest, ?said, "other choices for failures, as the domain's XML says");
                if let Err(failure) = self.agent.set_policy(guest, policy::of(&said)).await {
                    warn!(%guest, reason = failure.reason, "what is done on failures is not changed");
                }
            }
            Command::Failover(guest) => {
                let result = self.failover(guest).await;
                info!(%guest, ?result, "failover, as the domain's XML says");
                self.tell(Event::FailedOver(guest, result.map_err(failed))).await;
            }
            Command::TakeOut(guest) => {
                let taken = self.with_domain(guest, |domain| {
                    domain.set_live_metadata(COMMAND_NAMESPACE, "understudy", None)?;
                    if domain.is_persistent()? { domain.forget_metadata(COMMAND_NAMESPACE) } else { Ok(()) }
                });
                let taken = taken.await.map_err(|failure| failure.reason);
                self.tell(Event::TakenOut(guest, taken)).await;
            }
            Command::Report(guest, state) => {
                let xml = state.as_ref().map(State::to_xml);
                let published = self.with_domain(guest, move |domain| {
                    domain.set_live_metadata(STATE_NAMESPACE, STATE_PREFIX, xml.as_deref())
                });
                if let Err(failure) = published.await {
                    warn!(%guest, reason = failure.reason, "the state cannot be published in the domain's XML");
                    self.tell(Event::ReportLost(guest)).await;
                }
            }
        }
    }

    async fn look_at_all(&self) {
        let agent = Arc::clone(&self.agent);
        let domains = tokio::task::spawn_blocking(move || {
            let domains = agent.libvirt()?.domains()?;
            let active = domains.into_iter().filter(|domain| domain.is_active().unwrap_or(false));
            Ok::<_, LibvirtError>(active.map(|domain| GuestId(domain.uuid())).collect::<Vec<_>>())
        });
        match domains.await {
            Ok(Ok(guests)) => self.tell(Event::Listed(guests)).await,
            Ok(Err(error)) => {
                warn!(%error, "cannot look for marked domains");
                tokio::time::sleep(LOOK_AGAIN).await;
                self.tell(Event::Began).await;
            }
            Err(error) => warn!(%error, "looking at the domains has failed"),
        }
    }

    /// Goes on until it has an answer.
    async fn look(&self, guest: GuestId, first: bool) {
        while !self.events.is_closed() {
            let agent = Arc::clone(&self.agent);
            match self.with_domain(guest, move |domain| look::at(&agent, domain)).await {
                Ok(found) => return self.tell(Event::Found { guest, found, first }).await,
                Err(failure) if failure.kind == FailureKind::NotFound => {
                    return self.tell(Event::Gone(guest)).await;
                }
                Err(failure) => warn!(%guest, reason = failure.reason, "cannot look at the domain"),
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    async fn with_domain<T: Send + 'static>(
        &self,
        guest: GuestId,
        work: impl FnOnce(&Domain) -> Result<T, LibvirtError> + Send + 'static,
    ) -> Result<T, Failure> {
        let agent = Arc::clone(&self.agent);
        let done = tokio::task::spawn_blocking(move || {
            agent.libvirt()?.find_domain(&guest.to_string()).and_then(|domain| work(&domain))
        });
        match done.await {
            Ok(result) => result.map_err(protect::libvirt_failure),
            Err(error) => Err(Failure::new(FailureKind::Internal, "agent", error.to_string())),
        }
    }

    async fn protect(&self, guest: GuestId, wanted: &Protect) -> Result<(), Failure> {
        let (epoch, goals) = pace(wanted.epoch);
        let request = ProtectRequest {
            domain: guest.to_string(),
            to: wanted.backup.clone(),
            epoch,
            goals,
            insecure: wanted.insecure,
            ungated: wanted.output == Output::Ungated,
            term: None,
            policy: wanted.policy.as_ref().map(policy::of).unwrap_or_default(),
        };
        let _one_at_a_time = self.agent.exclusive().await;
        let (wanted, plan) = protect::examine(&self.agent, &request).await?;
        self.agent.protect(wanted, plan).await.map(drop)
    }

    /// By the agent that can: on the host of a standby that is the backup agent.
    async fn failover(&self, guest: GuestId) -> Result<String, Failure> {
        let request =
            FailoverRequest { domain: guest.to_string(), i_have_fenced: false, hold: false, term: None };
        if self.agent.protected_to(guest).is_some() {
            // The admin service says where it is to be asked for.
            let refused = Admin::new(Arc::clone(&self.agent)).failover(request).await;
            return refused.map(|_| "asked for".to_owned());
        }
        let socket = self.agent.config.run_dir.join(transport::BACKUP_SOCKET);
        let mut backup = AdminClient::new(transport::connect_unix(&socket).await?);
        let mut steps = backup.failover(request).await?;
        while let Some(step) = tokio_stream::StreamExt::next(&mut steps).await {
            let step = step?;
            if step.done {
                return Ok(step.text);
            }
        }
        Err(Failure::new(FailureKind::Internal, "no-end", "the backup agent's answer has no end"))
    }
}

/// What an element says of the length of epochs, in the words of a request.
fn pace(epoch: Option<Epoch>) -> (Option<Duration>, Option<EpochGoals>) {
    match epoch {
        Some(Epoch::Fixed(length)) => (Some(length), None),
        Some(Epoch::Auto) => (None, Some(EpochGoals::default())),
        None => (None, None),
    }
}

fn failed(failure: Failure) -> Failed {
    Failed {
        time_helps: failure.kind != FailureKind::InvalidArgument,
        code: failure.code.into_owned(),
        reason: failure.reason,
        remedy: failure.remedy,
    }
}
