//! What the operator's command asks of this agent.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tracing::info;
use understudy_proto::rpc::admin::{
    AgentRole, FailoverRequest, Progress, ProtectRequest, SetReply, SetRequest, StatusReply, StatusRequest,
    UnprotectReply, UnprotectRequest,
};
use understudy_proto::rpc::{AdminService, Failure, FailureKind, FallibleStream, async_trait};

use crate::agent::{Agent, Snapshot};
use crate::{config, protect};

/// How often progress and watched status are looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);

/// The service on `primary.sock`.
#[derive(Debug, Clone)]
pub struct Admin {
    agent: Arc<Agent>,
}

type ProgressSender = mpsc::Sender<Result<Progress, Failure>>;

impl Admin {
    /// For this agent.
    pub fn new(agent: Arc<Agent>) -> Self {
        Self { agent }
    }

    async fn reply(&self, request: &StatusRequest) -> Result<StatusReply, Failure> {
        let guest = match &request.domain {
            Some(domain) => Some(self.agent.find(domain).await?),
            None => None,
        };
        Ok(StatusReply {
            guests: self.agent.statuses(guest),
            host: self.host().await,
            role: AgentRole::Primary,
        })
    }

    /// This host's name, or nothing while libvirt does not tell.
    async fn host(&self) -> String {
        if let Some(name) = &self.agent.config.host_name {
            return name.clone();
        }
        let agent = Arc::clone(&self.agent);
        let name = tokio::task::spawn_blocking(move || agent.libvirt()?.hostname()).await;
        name.ok().and_then(Result::ok).unwrap_or_default()
    }
}

#[async_trait]
impl AdminService for Admin {
    async fn protect(&self, request: ProtectRequest) -> Result<FallibleStream<Progress>, Failure> {
        let (progress, stream) = mpsc::channel(16);
        let agent = Arc::clone(&self.agent);
        tokio::spawn(async move {
            if let Err(failure) = protect_with_progress(&agent, &request, &progress).await {
                info!(domain = request.domain, code = %failure.code, reason = failure.reason, "not protected");
                let _ = progress.send(Err(failure)).await;
            }
        });
        Ok(Box::pin(ReceiverStream::new(stream)))
    }

    async fn unprotect(&self, request: UnprotectRequest) -> Result<UnprotectReply, Failure> {
        let guest = self.agent.find(&request.domain).await?;
        let agent = Arc::clone(&self.agent);
        // An order that was taken goes on when whoever gave it has gone.
        let ended = tokio::spawn(async move { agent.unprotect(guest, request.term).await }).await;
        let failed = |error: tokio::task::JoinError| {
            Failure::new(FailureKind::Internal, "unprotect", error.to_string())
        };
        Ok(UnprotectReply { text: ended.map_err(failed)?? })
    }

    async fn set(&self, request: SetRequest) -> Result<SetReply, Failure> {
        let wrong = |code, reason: String| Failure::new(FailureKind::InvalidArgument, code, reason);
        let paced = request.epoch.is_some() || request.goals.is_some();
        if !paced && request.policy.is_none() {
            return Err(wrong("nothing-to-set", "nothing is to be set".to_owned())
                .with_remedy("give a length of epochs, goals, or what is to be done on failures"));
        }
        let epoch =
            request.epoch.map(|epoch| config::epoch(u32::try_from(epoch.as_millis()).unwrap_or(u32::MAX)));
        let epoch = epoch.transpose().map_err(|mistake| wrong("epoch-length", mistake))?;
        let guest = self.agent.find(&request.domain).await?;
        // A guest that is just being protected is waited for, as by `protect`.
        let _one_at_a_time = self.agent.exclusive().await;
        let mut done = Vec::new();
        if let Some(policy) = request.policy {
            self.agent.set_policy(guest, policy).await?;
            done.push("the watchdogs do as was chosen for it".to_owned());
        }
        if paced {
            self.agent.set_pace(guest, epoch, request.goals).await?;
            done.push(match (request.goals, epoch) {
                (None, Some(epoch)) => format!("it has epochs of {} ms", epoch.as_millis()),
                _ => "it has epochs whose length is found".to_owned(),
            });
        }
        Ok(SetReply { text: format!("{} from now on: {}", request.domain, done.join(", ")) })
    }

    async fn status(&self, request: StatusRequest) -> Result<StatusReply, Failure> {
        self.reply(&request).await
    }

    async fn watch(&self, mut request: StatusRequest) -> Result<FallibleStream<StatusReply>, Failure> {
        let first = self.reply(&request).await?;
        // An id is gone with its domain; what was meant by it is not.
        request.domain = request.domain.and(first.guests.first()).map(|guest| guest.uuid.to_string());
        let (replies, stream) = mpsc::channel(4);
        let admin = self.clone();
        tokio::spawn(async move {
            let mut last = first.clone();
            let mut next = Some(Ok(first));
            loop {
                if let Some(reply) = next.take()
                    && replies.send(reply).await.is_err()
                {
                    return;
                }
                tokio::time::sleep(LOOK_INTERVAL).await;
                match admin.reply(&request).await {
                    Ok(reply) if reply == last && !replies.is_closed() => {}
                    Ok(reply) => {
                        last.clone_from(&reply);
                        next = Some(Ok(reply));
                    }
                    Err(failure) => {
                        let _ = replies.send(Err(failure)).await;
                        return;
                    }
                }
            }
        });
        Ok(Box::pin(ReceiverStream::new(stream)))
    }

    async fn failover(&self, request: FailoverRequest) -> Result<FallibleStream<Progress>, Failure> {
        let guest = self.agent.find(&request.domain).await.ok();
        let peer = guest.and_then(|guest| self.agent.protected_to(guest));
        let host = peer.unwrap_or_else(|| "the backup".to_owned());
        Err(Failure::new(
            FailureKind::FailedPrecondition,
            "wrong-agent",
            format!("domain {} is protected from here; a failover is started on its backup", request.domain),
        )
        .with_remedy(format!("run `understudy failover {}` on {host}", request.domain)))
    }
}

/// Protects a guest and follows it up to the first commit. If nobody follows any more it goes on all the same.
async fn protect_with_progress(
    agent: &Arc<Agent>,
    request: &ProtectRequest,
    progress: &ProgressSender,
) -> Result<(), Failure> {
    let step = Progress::step("preflight", format!("examining {} and {}", request.domain, request.to));
    let _ = progress.send(Ok(step)).await;
    let snapshot = {
        let _one_at_a_time = agent.exclusive().await;
        let (wanted, plan) = protect::examine(agent, request).await?;
        agent.take_order(wanted.guest, request.term)?;
        agent.protect(wanted, plan).await?
    };
    follow(snapshot, progress).await
}

async fn follow(mut snapshot: watch::Receiver<Snapshot>, progress: &ProgressSender) -> Result<(), Failure> {
    let mut shown = None;
    loop {
        let (status, percent, outcome) = {
            let now = snapshot.borrow_and_update();
            (now.status(), now.percent, now.outcome.clone())
        };
        if let Some(outcome) = outcome {
            return Err(Failure::new(FailureKind::FailedPrecondition, "not-protected", outcome.text)
                .with_remedy(outcome.remedy));
        }
        if let Some(epoch) = status.committed_epoch {
            let text =
                format!("{} is protected by {}: epoch {epoch} is committed", status.domain, status.peer);
            let last = Progress { percent: Some(100), done: true, ..Progress::step("protected", text) };
            let _ = progress.send(Ok(last)).await;
            return Ok(());
        }
        let phase = if percent.is_some() { "seeding" } else { "connecting" };
        let step = Progress { percent, ..Progress::step(phase, status.detail) };
        if shown.as_ref() != Some(&step) {
            if progress.send(Ok(step.clone())).await.is_err() {
                return Ok(());
            }
            shown = Some(step);
        }
        // The percentage moves without the snapshot being marked as changed for long.
        let _ = tokio::time::timeout(LOOK_INTERVAL, snapshot.changed()).await;
    }
}
