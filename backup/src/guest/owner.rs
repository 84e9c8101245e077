//! The task that owns a guest: selects what happens next without effects, lets the engine decide, carries it out.

use super::{Asking, Connect, Guest, Request, Tools};
use crate::control_store::ControlStore;
use crate::engine::{Command, ConnectionId, Engine, Event, Way};
use crate::image::Image;
use crate::promoter::{Activation, LocalDomain, PromoteError, Promoter, Standby, StandbySpec};
use crate::shared::SharedMemory;
use crate::stats::Stats;
use crate::worker::{Hands, Job, Report};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_stream::StreamExt;
use understudy_proto::control::{ControlFile, Role};
use understudy_proto::rpc::admin::{AgentRole, GuestStatus, Progress};
use understudy_proto::rpc::epoch::{BackupMessage, PrimaryMessage, Refused, RefusedCode};
use understudy_proto::rpc::{Failure, FailureKind, Inbound};

/// Requests that may wait.
const REQUESTS: usize = 16;

/// Control files that may wait to be written.
const CONTROL_WRITES: usize = 16;

/// How often time passes for the engine, and the status is renewed.
const TICK: Duration = Duration::from_millis(250);

/// Starts the task that owns a guest.
pub(super) fn start(engine: Engine, tools: Tools) -> Guest {
    let hands = Hands::new(&engine.record().name, Arc::clone(&tools.memory), tools.dump.clone());
    let (requests, request_rx) = mpsc::channel(REQUESTS);
    let (call_tx, calls) = mpsc::channel(1);
    let (control, control_rx) = mpsc::channel(CONTROL_WRITES);
    let unwritten = Arc::new(AtomicBool::new(false));
    let writer = tokio::spawn(write_controls(Arc::clone(&tools.store), control_rx, Arc::clone(&unwritten)));
    let stats = Stats::default();
    let (status_tx, status) = watch::channel(status(&engine, &stats, &tools.versions, Instant::now()));
    let (record_tx, record) = watch::channel(engine.record().clone());
    let owner = Owner {
        engine,
        tools,
        stats,
        hands,
        requests: request_rx,
        call_tx,
        calls,
        control,
        writer,
        unwritten,
        connections: HashMap::new(),
        next_connection: 0,
        taken: None,
        shared: None,
        asking: None,
        status: status_tx,
        record: record_tx,
    };
    tokio::spawn(owner.run());
    Guest { requests, status, record }
}

/// A control file to be written, and who waits for it.
type ControlWrite = (ControlFile, Option<oneshot::Sender<Result<(), String>>>);

/// A file that nobody waits for and that is not written leaves `unwritten` set.
async fn write_controls(
    store: Arc<dyn ControlStore>,
    mut files: mpsc::Receiver<ControlWrite>,
    unwritten: Arc<AtomicBool>,
) {
    while let Some((file, reply)) = files.recv().await {
        let (guest, store) = (file.guest, Arc::clone(&store));
        let written = match tokio::task::spawn_blocking(move || store.save(&file)).await {
            Ok(saved) => saved.map_err(|e| e.to_string()),
            Err(e) => Err(e.to_string()),
        };
        match (reply, written) {
            (Some(reply), written) => drop(reply.send(written)),
            (None, Err(error)) => {
                tracing::error!(%guest, %error, "control file not written; it is tried again");
                unwritten.store(true, Ordering::Relaxed);
            }
            (None, Ok(())) => (),
        }
    }
}

fn status(engine: &Engine, stats: &Stats, versions: &(String, String), now: Instant) -> GuestStatus {
    let record = engine.record();
    let standby = engine.standby();
    let mut status = GuestStatus::new(record.name.clone(), record.guest, AgentRole::Backup, engine.state());
    status.peer.clone_from(&record.primary_host);
    status.generation = record.generation;
    status.committed_epoch = record.last_committed;
    status.committed_age_ms = engine
        .committed()
        .map(|(_, at)| u64::try_from(now.saturating_duration_since(at).as_millis()).unwrap_or(u64::MAX));
    status.epochs_total = stats.epochs;
    status.full_copies_total = stats.full_copies;
    status.bytes_total = stats.bytes;
    (status.dirty_pages_p50, status.dirty_pages_p99) =
        (stats.pages_percentile(50), stats.pages_percentile(99));
    status.standby = match standby.text.as_str() {
        "" => standby.state.label().to_owned(),
        text => format!("{}: {text}", standby.state.label()),
    };
    (status.qemu, status.libvirt) = versions.clone();
    status.detail = engine.detail();
    status.failover = engine.report().cloned();
    status.incarnation = Some(record.incarnation);
    status
}

fn protocol_refusal(failure: &Failure) -> Refused {
    Refused {
        code: RefusedCode::Protocol,
        text: failure.reason.clone(),
        remedy: failure.remedy.clone(),
        generation: None,
    }
}

/// A call of the promoter that ended.
enum Called {
    Prepared(Result<Standby, PromoteError>),
    Checked(Result<LocalDomain, PromoteError>),
    Loaded(Result<(), PromoteError>),
    Activated(Result<Activation, PromoteError>),
    Discarded(Result<(), PromoteError>),
}

impl From<Called> for Event {
    fn from(called: Called) -> Self {
        match called {
            Called::Prepared(r) => Self::Prepared(r.map(|standby| match standby {
                Standby::Warm(_) => Way::Warm,
                Standby::Cold(reason) => Way::Cold(reason),
            })),
            Called::Checked(r) => Self::Checked(r),
            Called::Loaded(r) => Self::Loaded(r),
            Called::Activated(r) => Self::Activated(r),
            Called::Discarded(r) => Self::Discarded(r),
        }
    }
}

struct Connection {
    inbound: Inbound,
    outbound: mpsc::Sender<BackupMessage>,
}

struct Owner {
    engine: Engine,
    tools: Tools,
    stats: Stats,
    hands: Hands,
    requests: mpsc::Receiver<Request>,
    call_tx: mpsc::Sender<Called>,
    calls: mpsc::Receiver<Called>,
    control: mpsc::Sender<ControlWrite>,
    writer: JoinHandle<()>,
    /// A control file was not written.
    unwritten: Arc<AtomicBool>,
    connections: HashMap<ConnectionId, Connection>,
    next_connection: u64,
    /// The image while it is promoted.
    taken: Option<Arc<Image>>,
    /// The memory of the standby that is there.
    shared: Option<Arc<SharedMemory>>,
    asking: Option<Asking>,
    status: watch::Sender<GuestStatus>,
    record: watch::Sender<ControlFile>,
}

enum Action {
    Report(Report),
    Called(Called),
    Request(Request),
    Message(ConnectionId, Option<Result<PrimaryMessage, Failure>>),
    Tick,
    Stop(&'static str),
}

impl Owner {
    async fn run(mut self) {
        let guest = self.engine.record().guest;
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let action = self.select(&mut tick).await;
            let is_message = matches!(action, Action::Message(_, Some(Ok(_))));
            match action {
                Action::Request(Request::Shutdown(done)) => {
                    self.happen(Event::Shutdown).await;
                    drop(self.control);
                    if let Err(e) = self.writer.await {
                        tracing::error!(%guest, error = %e, "the control file may not be written");
                    }
                    // Whoever asked may have gone.
                    let _ = done.send(());
                    return;
                }
                Action::Stop(reason) => {
                    tracing::error!(%guest, reason, "the guest is given up");
                    return;
                }
                action => self.apply(action).await,
            }
            if !is_message {
                self.publish();
            }
        }
    }

    /// Waits for the next thing to do.
    ///
    /// # Cancel safety
    /// Every branch is a receive or a `next`, which lose nothing when dropped.
    async fn select(&mut self, tick: &mut tokio::time::Interval) -> Action {
        let wanted = self.engine.connection();
        let inbound = wanted.and_then(|id| self.connections.get_mut(&id).map(|c| (id, &mut c.inbound)));
        let message = async {
            match inbound {
                Some((id, inbound)) => (id, inbound.next().await),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            report = self.hands.report() => match report {
                Some(report) => Action::Report(report),
                None => Action::Stop("its worker thread has ended"),
            },
            Some(called) = self.calls.recv() => Action::Called(called),
            request = self.requests.recv() => match request {
                Some(request) => Action::Request(request),
                None => Action::Stop("the agent has dropped it"),
            },
            _ = tick.tick() => Action::Tick,
            (id, message) = message => Action::Message(id, message),
        }
    }

    async fn apply(&mut self, action: Action) {
        match action {
            Action::Report(Report::Verified(proof)) => {
                self.stats.committed(proof.kind(), proof.pages(), proof.bytes());
                self.happen(Event::Verified(proof)).await;
            }
            Action::Report(Report::Rejected(attempt, at, fault)) => {
                tracing::warn!(guest = %self.engine.record().guest, epoch = at.epoch.0, reason = fault.text, "epoch rejected");
                self.happen(Event::Rejected(attempt, at, fault)).await;
            }
            Action::Report(Report::Applied(_)) => (),
            Action::Report(Report::ApplyFailed(reason)) => {
                tracing::error!(guest = %self.engine.record().guest, reason, "image lost");
                self.happen(Event::ApplyFailed(reason)).await;
            }
            Action::Report(Report::Adopted(number, result)) => {
                match &result {
                    Ok(()) => tracing::info!(guest = %self.engine.record().guest, "memory is in the standby"),
                    Err(reason) => {
                        tracing::warn!(guest = %self.engine.record().guest, reason, "memory stays out of the standby");
                    }
                }
                self.happen(Event::Adopted(number, result)).await;
            }
            Action::Report(Report::Image(image)) => {
                let at = image.as_ref().and_then(|i| i.at());
                self.taken = image.filter(|_| self.engine.wants_image());
                self.happen(Event::ImageReady(at)).await;
            }
            Action::Called(called) => {
                match &called {
                    Called::Prepared(Ok(Standby::Warm(shared))) => self.shared = Some(Arc::clone(shared)),
                    Called::Prepared(Ok(Standby::Cold(reason))) if !reason.is_empty() => {
                        tracing::info!(guest = %self.engine.record().guest, reason, "the standby is cold");
                    }
                    // What runs, or is no more, is not ours to write to.
                    Called::Activated(Ok(_)) | Called::Discarded(_) => self.shared = None,
                    _ => (),
                }
                self.happen(called.into()).await;
            }
            Action::Request(Request::Connect(connect)) => self.connect(*connect).await,
            Action::Request(Request::Failover { i_have_fenced, hold, term, asking }) => {
                if let Err(outdated) = self.engine.take_order(term) {
                    // Whoever asked may have gone.
                    let _ = asking.try_send(Err(outdated.into()));
                } else if self.asking.is_some() {
                    let failure = Failure::new(
                        FailureKind::FailedPrecondition,
                        "promoting",
                        format!("guest {} is being promoted already", self.engine.record().name),
                    );
                    // Whoever asked may have gone.
                    let _ = asking.try_send(Err(failure.retryable()));
                } else {
                    self.asking = Some(asking);
                    let event = if hold { Event::Claimed } else { Event::Failover { i_have_fenced } };
                    self.happen(event).await;
                }
            }
            Action::Request(Request::Confirm(proceed, term, reply)) => {
                let answer = match self.engine.take_order(term) {
                    Err(outdated) => Err(outdated.into()),
                    Ok(()) => {
                        let waits = self.engine.awaits_confirmation();
                        self.happen(Event::Confirm { proceed }).await;
                        if waits || !proceed { Ok(()) } else { Err(self.nothing_waits()) }
                    }
                };
                // Whoever asked may have gone.
                let _ = reply.send(answer);
            }
            Action::Request(Request::Release(reply)) => {
                let may = self.engine.may_release();
                if may.is_ok() {
                    self.happen(Event::Release).await;
                }
                // Whoever asked may have gone.
                let _ = reply.send(may);
            }
            Action::Message(id, Some(Ok(message))) => self.happen(Event::Message(id, message)).await,
            Action::Message(id, ended) => {
                let reason = match ended {
                    Some(Err(failure)) => {
                        if failure.kind == FailureKind::InvalidArgument {
                            // The message did not pass its checks; a connection that broke hears nothing.
                            self.send(id, BackupMessage::Refused(protocol_refusal(&failure)));
                        }
                        failure.reason
                    }
                    _ => "the primary closed it".to_owned(),
                };
                self.connections.remove(&id);
                tracing::info!(guest = %self.engine.record().guest, reason, "stream ended");
                self.happen(Event::Disconnected(id, reason)).await;
            }
            Action::Tick => {
                if self.unwritten.swap(false, Ordering::Relaxed) {
                    self.happen(Event::ControlNotWritten).await;
                }
                self.happen(Event::Tick).await;
            }
            Action::Request(Request::Shutdown(_)) | Action::Stop(_) => (),
        }
    }

    fn nothing_waits(&self) -> Failure {
        let text = format!("no failover of guest {} waits for a confirmation", self.engine.record().name);
        Failure::new(FailureKind::FailedPrecondition, "nothing-waits", text)
    }

    async fn connect(&mut self, connect: Connect) {
        let Connect { hello, agreement, local, inbound, outbound } = connect;
        let id = ConnectionId(self.next_connection);
        self.next_connection += 1;
        self.connections.insert(id, Connection { inbound, outbound });
        let hello = Box::new(hello);
        self.happen(Event::Hello { connection: id, hello, agreement, local }).await;
    }

    /// Lets the engine take an event and carries out what it says, and what follows from that.
    async fn happen(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            for command in self.engine.step(event, Instant::now()) {
                let required = matches!(command, Command::WriteControl { required: true, .. });
                let follow_up = self.carry_out(command).await;
                let failed = matches!(follow_up, Some(Event::ControlFailed(_)));
                events.extend(follow_up);
                if required && failed {
                    break;
                }
            }
        }
    }

    async fn carry_out(&mut self, command: Command) -> Option<Event> {
        let job = match command {
            Command::Send(id, message) => return self.send(id, message),
            Command::Ack(id, proof) => return self.send(id, BackupMessage::Ack(proof.at())),
            Command::Close(id) => {
                self.connections.remove(&id);
                return None;
            }
            Command::WriteControl { file, required } => return self.write_control(file, required).await,
            Command::Open(attempt, begin, seed) => Job::Open(attempt, begin, seed),
            Command::Frame(frame) => Job::Frame(frame),
            Command::Device(piece) => Job::Device(piece),
            Command::Verify(manifest) => Job::Verify(manifest),
            Command::Apply(attempt) => Job::Apply(attempt),
            Command::DiscardEpoch => Job::DiscardEpoch,
            Command::DropImage => {
                self.taken = None;
                self.hands.give(Job::DropImage).await;
                // It may be remembered for years.
                if self.engine.record().role == Role::Released {
                    self.hands.rest();
                }
                return None;
            }
            Command::TakeImage => Job::TakeImage,
            Command::Prepare(seed) => {
                let spec = self.spec(seed);
                self.call(move |p, _| Called::Prepared(p.prepare(&spec)));
                return None;
            }
            Command::Adopt(number) => match self.shared.clone() {
                Some(shared) => Job::Adopt(number, shared),
                None => return Some(Event::Adopted(number, Err("its memory is not open here".into()))),
            },
            Command::CheckStandby => {
                self.call(|p, guest| Called::Checked(p.local(guest)));
                return None;
            }
            Command::Discard => {
                self.call(|p, guest| Called::Discarded(p.discard(guest)));
                return None;
            }
            Command::Load => {
                let Some(image) = self.taken.clone() else {
                    return Some(Event::Loaded(Err(PromoteError::new("the image is gone"))));
                };
                let spec = self.spec(Arc::clone(image.seed()));
                self.call(move |p, _| Called::Loaded(p.load(&spec, &image)));
                return None;
            }
            Command::Activate => {
                let spec = self.taken.take().map(|image| self.spec(Arc::clone(image.seed())));
                self.call(move |p, guest| Called::Activated(p.activate(guest, spec.as_ref())));
                return None;
            }
            Command::Progress(progress) => {
                // Whoever asked may have gone; the promotion goes on.
                if let Some(asking) = &self.asking {
                    let _ = asking.try_send(Ok(progress));
                }
                return None;
            }
            Command::FailoverDone(outcome) => {
                self.taken = None;
                self.failover_done(*outcome);
                return None;
            }
        };
        self.hands.give(job).await;
        None
    }

    fn send(&mut self, id: ConnectionId, message: BackupMessage) -> Option<Event> {
        let sent = self.connections.get(&id)?.outbound.try_send(message);
        if sent.is_ok() {
            return None;
        }
        self.connections.remove(&id);
        Some(Event::Disconnected(id, "the primary does not read its answers".into()))
    }

    async fn write_control(&mut self, file: ControlFile, required: bool) -> Option<Event> {
        let (reply, wait) = if required {
            let (reply, wait) = oneshot::channel();
            (Some(reply), Some(wait))
        } else {
            (None, None)
        };
        // A writer that has ended shows at the first required write.
        let _ = self.control.send((file, reply)).await;
        Some(match wait?.await {
            Ok(Ok(())) => Event::ControlWritten,
            Ok(Err(reason)) => Event::ControlFailed(reason),
            Err(_) => Event::ControlFailed("the writer has ended".into()),
        })
    }

    fn spec(&self, seed: Arc<understudy_proto::rpc::epoch::Seed>) -> StandbySpec {
        StandbySpec { guest: self.engine.record().guest, seed, persistent: self.engine.persistent() }
    }

    /// Calls the promoter on a thread that may wait. The engine has one call under way at a time.
    fn call(
        &self,
        call: impl FnOnce(&dyn Promoter, understudy_proto::ids::GuestId) -> Called + Send + 'static,
    ) {
        let (promoter, guest, done) =
            (Arc::clone(&self.tools.promoter), self.engine.record().guest, self.call_tx.clone());
        tokio::task::spawn_blocking(move || {
            let called = call(&*promoter, guest);
            // Nobody waits when the owner has ended.
            let _ = done.blocking_send(called);
        });
    }

    fn failover_done(&mut self, outcome: Result<understudy_proto::rpc::admin::FailoverReport, Failure>) {
        let guest = self.engine.record().guest;
        let message = match outcome {
            Ok(report) => {
                tracing::info!(%guest, epoch = report.epoch.0, generation = report.generation.0, total = ?report.total, "promoted");
                for warning in &report.warnings {
                    tracing::warn!(%guest, warning, "after the promotion");
                }
                Ok(Progress {
                    phase: "done".into(),
                    percent: Some(100),
                    text: format!("the guest runs here, going on from epoch {}", report.epoch),
                    done: true,
                    failover: Some(report),
                })
            }
            Err(failure) => {
                tracing::warn!(%guest, reason = failure.reason, "no promotion");
                Err(failure)
            }
        };
        if let Some(asking) = self.asking.take() {
            // Whoever asked may have gone.
            let _ = asking.try_send(message);
        }
    }

    fn publish(&self) {
        let status = status(&self.engine, &self.stats, &self.tools.versions, Instant::now());
        self.status.send_if_modified(|old| {
            let changed = *old != status;
            *old = status;
            changed
        });
        self.record.send_if_modified(|old| {
            let changed = old != self.engine.record();
            old.clone_from(self.engine.record());
            changed
        });
    }
}
