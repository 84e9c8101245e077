//! The backup agent: its guests, and the two services.

use crate::control_store::{ControlStore, Unreadable};
use crate::engine::{Engine, Identity};
use crate::guest::{Connect, Guest, OUTBOUND, Tools};
use crate::host;
use crate::promoter::{LocalDomain, PromoteError};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::{IntervalStream, ReceiverStream};
use understudy_proto::control::Role;
use understudy_proto::ids::{GuestId, Incarnation};
use understudy_proto::negotiate::{self, Offer};
use understudy_proto::rpc::admin::{
    AgentRole, ConfirmRequest, FailoverRequest, Progress, ProtectRequest, StatusReply, StatusRequest,
    UnprotectReply, UnprotectRequest,
};
use understudy_proto::rpc::epoch::{
    BackupMessage, GuestRecord, Hello, PrimaryMessage, ProbeReply, ProbeRequest, Refused, RefusedCode,
};
use understudy_proto::rpc::{
    AdminService, EpochService, Failure, FailureKind, FallibleStream, Inbound, Outbound, async_trait,
};

/// How long a new stream may take to say Hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// How often `Watch` looks for changes.
const WATCH_INTERVAL: Duration = Duration::from_millis(250);

/// Messages of a failover that may wait for whoever asked: more than there are.
const PROGRESS: usize = 32;

/// The agent. Its services share it.
pub struct Agent {
    tools: Tools,
    identity: Identity,
    guests: Mutex<HashMap<GuestId, Guest>>,
    unreadable: Vec<Unreadable>,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").field("identity", &self.identity).finish_non_exhaustive()
    }
}

impl Agent {
    /// Starts the agent: a new life, with the guests its control files know.
    ///
    /// # Errors
    /// If the control files cannot be listed.
    pub async fn start(tools: Tools, staging_max_bytes: u64) -> std::io::Result<Arc<Self>> {
        let promoter = Arc::clone(&tools.promoter);
        let facts = blocking(move || promoter.host_facts()).await?;
        if !facts.trouble.is_empty() {
            tracing::warn!(reason = facts.trouble, "this host cannot run a guest yet");
        }
        let identity = Identity {
            host: host::hostname(),
            incarnation: Incarnation(uuid::Uuid::new_v4()),
            qemu_version: facts.qemu_version.clone(),
            libvirt_version: facts.libvirt_version.clone(),
            staging_max_bytes,
        };
        let versions = (
            facts.qemu_version.clone().unwrap_or_default(),
            facts.libvirt_version.clone().unwrap_or_default(),
        );
        let tools = Tools { versions, ..tools };
        let store: Arc<dyn ControlStore> = Arc::clone(&tools.store);
        let (mut guests, mut unreadable) = (HashMap::new(), Vec::new());
        for loaded in blocking(move || store.load()).await?? {
            let record = match loaded {
                Ok(record) => record,
                Err(e) => {
                    tracing::error!(path = %e.path.display(), reason = e.reason, "control file cannot be used");
                    unreadable.push(e);
                    continue;
                }
            };
            let guest = record.guest;
            let (role, promoter) = (record.role, Arc::clone(&tools.promoter));
            let local = blocking(move || left_over(&*promoter, guest, role)).await?;
            let local = local.unwrap_or_else(|e| {
                tracing::warn!(%guest, reason = e.reason, "cannot find out whether the guest is here");
                LocalDomain::Absent
            });
            let engine = Engine::restarted(identity.clone(), record, local);
            guests.insert(guest, Guest::start(engine, tools.clone()));
        }
        Ok(Arc::new(Self { tools, identity, guests: Mutex::new(guests), unreadable }))
    }

    /// Ends all guests, their control files written.
    pub async fn shutdown(&self) {
        let guests: Vec<_> = self.lock().values().cloned().collect();
        for guest in guests {
            guest.shutdown().await;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<GuestId, Guest>> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn guest(&self, hello: &Hello) -> Guest {
        let mut guests = self.lock();
        if let Some(guest) = guests.get(&hello.guest) {
            return guest.clone();
        }
        let engine = Engine::new(self.identity.clone(), hello.guest, hello.guest_name.clone());
        let guest = Guest::start(engine, self.tools.clone());
        guests.insert(hello.guest, guest.clone());
        guest
    }

    /// By name, UUID or, by asking libvirt, id.
    async fn find(&self, key: &str) -> Result<Guest, Failure> {
        let known = self.find_known(key);
        let (Err(failure), Ok(id)) = (&known, key.parse::<u32>()) else { return known };
        let promoter = Arc::clone(&self.tools.promoter);
        match blocking(move || promoter.by_id(id)).await {
            Ok(Some(guest)) if failure.kind == FailureKind::NotFound => self.find_known(&guest.to_string()),
            _ => known,
        }
    }

    fn find_known(&self, key: &str) -> Result<Guest, Failure> {
        let uuid = key.parse::<uuid::Uuid>().ok().map(GuestId);
        let mut found: Vec<_> = self
            .lock()
            .iter()
            .filter(|(id, guest)| Some(**id) == uuid || guest.status().domain == key)
            .map(|(_, guest)| guest.clone())
            .collect();
        // Of a guest whose protection ended only the generation is left; a name means one that is more than that.
        if found.iter().any(|guest| guest.record().role != Role::Released) {
            found.retain(|guest| guest.record().role != Role::Released);
        }
        match found.as_slice() {
            [guest] => Ok(guest.clone()),
            several if several.iter().any(|guest| guest.record().role != Role::Released) => {
                Err(Failure::new(
                    FailureKind::InvalidArgument,
                    "ambiguous",
                    format!("{} guests are called {key:?}", found.len()),
                )
                .with_remedy("give the UUID"))
            }
            _ => Err(Failure::new(
                FailureKind::NotFound,
                "no-guest",
                format!("no guest {key:?} is known to the backup agent of {}", self.identity.host),
            )
            .with_remedy("`understudy status` lists the guests of this host")),
        }
    }

    async fn statuses(&self, request: &StatusRequest) -> Result<StatusReply, Failure> {
        let mut guests = match &request.domain {
            Some(key) => vec![self.find(key).await?.status()],
            None => {
                // What is no longer protected is shown only to those who ask for it by name.
                let guests = self.lock();
                guests.values().filter(|g| g.record().role != Role::Released).map(Guest::status).collect()
            }
        };
        guests.sort_by(|a, b| (&a.domain, a.uuid).cmp(&(&b.domain, b.uuid)));
        Ok(StatusReply { guests, host: self.identity.host.clone(), role: AgentRole::Backup })
    }

    /// What must be known before the owner of the guest sees the stream.
    async fn admit(
        &self,
        hello: Hello,
        inbound: Inbound,
        outbound: mpsc::Sender<BackupMessage>,
    ) -> Result<(), Refused> {
        let refused = |code, text: String, remedy: &str| Refused {
            code,
            text,
            remedy: remedy.into(),
            generation: None,
        };
        let agreement = negotiate::select(&Offer::ours(), &hello.offer)
            .map_err(|e| refused(RefusedCode::Incompatible, e.to_string(), e.remedy()))?;
        if let Some(e) = self.unreadable.iter().find(|u| u.guest == Some(hello.guest)) {
            return Err(refused(
                RefusedCode::Internal,
                format!("the control file of guest {} cannot be used: {e}", hello.guest_name),
                "restore the file or, if no promotion of the guest can have been recorded in it, remove it; then \
                 restart the backup agent",
            ));
        }
        let (promoter, id, machine) = (Arc::clone(&self.tools.promoter), hello.guest, hello.machine.clone());
        let asked = blocking(move || (promoter.local(id), promoter.supports_machine(&machine))).await;
        let (local, supported) = match asked {
            Ok((Ok(local), supported)) => (local, supported),
            Ok((Err(e), _)) => return Err(refused(RefusedCode::Internal, e.reason, &e.remedy)),
            Err(e) => return Err(refused(RefusedCode::Internal, e.to_string(), "")),
        };
        if supported == Some(false) {
            return Err(refused(
                RefusedCode::Incompatible,
                format!("{} has no machine type {}", self.identity.host, hello.machine),
                "install a QEMU there that has it, the same version or newer",
            ));
        }
        let internal = |text: String| refused(RefusedCode::Internal, text, "restart the backup agent");
        let guest = self.guest(&hello);
        let connect = Connect { hello, agreement, local, inbound, outbound };
        guest.connect(connect).await.map_err(|e| internal(e.reason))
    }
}

/// What is here of a guest when the agent starts. A standby that waits for an image that died with the agent before
/// is removed.
fn left_over(
    promoter: &dyn crate::promoter::Promoter,
    guest: GuestId,
    role: Role,
) -> Result<LocalDomain, PromoteError> {
    let local = promoter.local(guest)?;
    let useless = match local {
        LocalDomain::Waiting => true,
        // Loaded, but its generation was never recorded: it was not to run.
        LocalDomain::Loaded => role == Role::Standby,
        LocalDomain::Absent | LocalDomain::Active => false,
    };
    if useless {
        promoter.discard(guest)?;
        return Ok(LocalDomain::Absent);
    }
    Ok(local)
}

async fn blocking<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> std::io::Result<T> {
    tokio::task::spawn_blocking(f).await.map_err(std::io::Error::other)
}

#[async_trait]
impl EpochService for Agent {
    async fn replicate(&self, peer: Option<SocketAddr>, mut inbound: Inbound) -> Result<Outbound, Failure> {
        let first = tokio::time::timeout(HELLO_TIMEOUT, inbound.next()).await;
        let hello = match first {
            Ok(Some(Ok(PrimaryMessage::Hello(hello)))) => hello,
            Ok(Some(Err(failure))) => return Err(failure),
            Ok(Some(Ok(other))) => {
                return Err(Failure::new(
                    FailureKind::InvalidArgument,
                    "protocol",
                    format!("a stream begins with Hello, this one with {other:?}"),
                ));
            }
            Ok(None) | Err(_) => {
                return Err(Failure::new(
                    FailureKind::InvalidArgument,
                    "protocol",
                    format!("no Hello within {HELLO_TIMEOUT:?}"),
                ));
            }
        };
        let guest = hello.guest;
        tracing::info!(
            %guest, name = hello.guest_name, host = hello.primary_host, ?peer,
            generation = hello.generation.0, session = hello.session, "stream opened"
        );
        let (outbound, messages) = mpsc::channel(OUTBOUND);
        if let Err(refused) = self.admit(hello, inbound, outbound.clone()).await {
            tracing::warn!(%guest, reason = refused.text, "stream refused");
            // The channel is new and empty.
            let _ = outbound.try_send(BackupMessage::Refused(refused));
        }
        Ok(Box::pin(ReceiverStream::new(messages)))
    }

    async fn probe(&self, request: ProbeRequest) -> Result<ProbeReply, Failure> {
        let guest = request.guest.and_then(|id| self.lock().get(&id).cloned()).map(|g| g.record());
        let machine_supported = match request.machine {
            Some(machine) => {
                let promoter = Arc::clone(&self.tools.promoter);
                blocking(move || promoter.supports_machine(&machine)).await.unwrap_or_default()
            }
            None => None,
        };
        // Asked anew: what was wrong when the agent started may have been put right.
        let promoter = Arc::clone(&self.tools.promoter);
        let facts = blocking(move || promoter.host_facts()).await.unwrap_or_default();
        let mut trouble = facts.trouble;
        let free_memory_bytes = host::free_memory_bytes().unwrap_or_else(|e| {
            trouble = format!("free memory is not known: {e}");
            0
        });
        if let Some(e) = self.unreadable.iter().find(|u| u.guest.is_some() && u.guest == request.guest) {
            trouble = format!("the control file of the guest cannot be used: {e}");
        }
        Ok(ProbeReply {
            offer: Offer::ours(),
            host: self.identity.host.clone(),
            incarnation: self.identity.incarnation,
            qemu_version: facts.qemu_version,
            libvirt_version: facts.libvirt_version,
            machine_supported,
            free_memory_bytes,
            guest: guest.map(|r| GuestRecord {
                role: r.role,
                generation: r.generation,
                last_committed: r.last_committed,
                primary_host: r.primary_host,
            }),
            trouble,
        })
    }
}

/// Serves the operator.
#[derive(Debug)]
pub struct Operator(pub Arc<Agent>);

#[async_trait]
impl AdminService for Operator {
    async fn protect(&self, _request: ProtectRequest) -> Result<FallibleStream<Progress>, Failure> {
        Err(Failure::wrong_agent("protect", "primary"))
    }

    async fn unprotect(&self, request: UnprotectRequest) -> Result<UnprotectReply, Failure> {
        let what = self.0.find(&request.domain).await?.release().await?;
        Ok(UnprotectReply { text: format!("protection of {} was ended here: {what}", request.domain) })
    }

    async fn status(&self, request: StatusRequest) -> Result<StatusReply, Failure> {
        self.0.statuses(&request).await
    }

    async fn watch(&self, request: StatusRequest) -> Result<FallibleStream<StatusReply>, Failure> {
        // Whether the request makes sense is answered at once.
        let first = self.0.statuses(&request).await?;
        // An id is gone with its domain; what was meant by it is not.
        let domain = request.domain.and(first.guests.first()).map(|guest| guest.uuid.to_string());
        let (agent, mut last) = (Arc::clone(&self.0), None);
        let ticks = IntervalStream::new(tokio::time::interval(WATCH_INTERVAL));
        let replies = ticks.then(move |_| {
            let (agent, domain) = (Arc::clone(&agent), domain.clone());
            async move { agent.statuses(&StatusRequest { domain }).await }
        });
        Ok(Box::pin(replies.filter_map(move |reply| {
            if last.as_ref() == Some(&reply) {
                return None;
            }
            last = Some(reply.clone());
            Some(reply)
        })))
    }

    async fn confirm(&self, request: ConfirmRequest) -> Result<(), Failure> {
        self.0.find(&request.domain).await?.confirm(request.proceed, request.term).await
    }

    async fn failover(&self, request: FailoverRequest) -> Result<FallibleStream<Progress>, Failure> {
        let guest = self.0.find(&request.domain).await?;
        let (asking, mut progress) = mpsc::channel(PROGRESS);
        guest.failover(&request, asking).await?;
        // A refusal is the answer to the call itself, not the first item of a stream.
        match progress.recv().await {
            Some(Err(failure)) => Err(failure),
            Some(first) => Ok(Box::pin(tokio_stream::once(first).chain(ReceiverStream::new(progress)))),
            None => Err(Failure::new(
                FailureKind::Internal,
                "owner-ended",
                "the task of this guest ended before it answered",
            )),
        }
    }
}
