//! A guest as the rest of the agent sees it: a handle on the task that owns it. Everything that happens to the guest
//! goes through that task, one thing at a time.

mod owner;

use crate::control_store::ControlStore;
use crate::dump::Dump;
use crate::engine::Engine;
use crate::image::MemoryProvider;
use crate::promoter::{LocalDomain, Promoter};
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot, watch};
use understudy_proto::control::ControlFile;
use understudy_proto::negotiate::Agreement;
use understudy_proto::ownership::Term;
use understudy_proto::pool::Pool;
use understudy_proto::rpc::admin::{FailoverRequest, GuestStatus, Progress};
use understudy_proto::rpc::epoch::{BackupMessage, Hello};
use understudy_proto::rpc::{Failure, FailureKind, Inbound};

/// Messages to the primary that may wait. One that reads none of these is as good as gone.
pub const OUTBOUND: usize = 64;

/// A stream to be taken.
pub struct Connect {
    /// What it opened with.
    pub hello: Hello,
    /// What both sides speak.
    pub agreement: Agreement,
    /// What this host has of the guest.
    pub local: LocalDomain,
    /// What follows.
    pub inbound: Inbound,
    /// The way back.
    pub outbound: mpsc::Sender<BackupMessage>,
}

impl std::fmt::Debug for Connect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connect")
            .field("hello", &self.hello)
            .field("local", &self.local)
            .finish_non_exhaustive()
    }
}

/// A failover to be done; where its progress goes.
pub type Asking = mpsc::Sender<Result<Progress, Failure>>;

enum Request {
    Connect(Box<Connect>),
    Failover { i_have_fenced: bool, hold: bool, term: Option<Term>, asking: Asking },
    Confirm(bool, Option<Term>, oneshot::Sender<Result<(), Failure>>),
    Release(oneshot::Sender<Result<&'static str, Failure>>),
    Shutdown(oneshot::Sender<()>),
}

/// Handle of a guest's owner.
#[derive(Debug, Clone)]
pub struct Guest {
    requests: mpsc::Sender<Request>,
    status: watch::Receiver<GuestStatus>,
    record: watch::Receiver<ControlFile>,
}

impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Connect(_) => "Connect",
            Self::Failover { .. } => "Failover",
            Self::Confirm(..) => "Confirm",
            Self::Release(_) => "Release",
            Self::Shutdown(_) => "Shutdown",
        })
    }
}

/// What owners share.
#[derive(Clone)]
pub struct Tools {
    /// Turns images into guests.
    pub promoter: Arc<dyn Promoter>,
    /// Keeps control files.
    pub store: Arc<dyn ControlStore>,
    /// Gives images their memory.
    pub memory: Arc<dyn MemoryProvider>,
    /// Test hook.
    pub dump: Dump,
    /// Threads that help to decode the pages of any guest.
    pub pool: Pool,
    /// QEMU and libvirt versions for the status.
    pub versions: (String, String),
}

impl std::fmt::Debug for Tools {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tools").field("versions", &self.versions).finish_non_exhaustive()
    }
}

impl Guest {
    /// Starts the owner of a guest.
    pub fn start(engine: Engine, tools: Tools) -> Self {
        owner::start(engine, tools)
    }

    /// What the guest is here, at most a tick old.
    pub fn status(&self) -> GuestStatus {
        self.status.borrow().clone()
    }

    /// What its control file says, or will say in a moment.
    pub fn record(&self) -> ControlFile {
        self.record.borrow().clone()
    }

    /// Hands a stream over; it is answered on its own way back.
    ///
    /// # Errors
    /// If the owner has ended.
    pub async fn connect(&self, connect: Connect) -> Result<(), Failure> {
        self.request(Request::Connect(Box::new(connect))).await
    }

    /// Asks for a failover; answers and errors go to `asking`.
    ///
    /// # Errors
    /// If the owner has ended.
    pub async fn failover(&self, request: &FailoverRequest, asking: Asking) -> Result<(), Failure> {
        let FailoverRequest { i_have_fenced, hold, term, .. } = *request;
        self.request(Request::Failover { i_have_fenced, hold, term, asking }).await
    }

    /// Ends the wait of a failover that is held.
    ///
    /// # Errors
    /// If none waits and the guest is to run; if the order is outdated; if the owner has ended.
    pub async fn confirm(&self, proceed: bool, term: Option<Term>) -> Result<(), Failure> {
        let (reply, answer) = oneshot::channel();
        self.request(Request::Confirm(proceed, term, reply)).await?;
        answer.await.map_err(|_| owner_ended())?
    }

    /// Gives up what is here of the guest; says what that means.
    ///
    /// # Errors
    /// Why it may not be given up, or that the owner has ended.
    pub async fn release(&self) -> Result<&'static str, Failure> {
        let (reply, answer) = oneshot::channel();
        self.request(Request::Release(reply)).await?;
        answer.await.map_err(|_| owner_ended())?
    }

    /// Ends the owner, its control file written.
    pub async fn shutdown(&self) {
        let (done, wait) = oneshot::channel();
        if self.request(Request::Shutdown(done)).await.is_ok() {
            // An error means that the owner ended otherwise, which is what was asked for.
            let _ = wait.await;
        }
    }

    async fn request(&self, request: Request) -> Result<(), Failure> {
        self.requests.send(request).await.map_err(|_| owner_ended())
    }
}

fn owner_ended() -> Failure {
    Failure::new(FailureKind::Internal, "owner-ended", "the task of this guest has ended")
        .with_remedy("restart the backup agent; its log says why")
}
