//! The owner of one guest's protection: waits for the next event, asks the engine, does what it says.

mod shown;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tracing::{Instrument, debug, error, info, info_span, warn};
use understudy_libvirt::DomainEvent;
use understudy_proto::epoch::EpochKind;
use understudy_proto::ids::EpochId;
use understudy_proto::pace::EpochGoals;
use understudy_proto::rpc::admin::{GuestState, GuestStatus};
use understudy_proto::rpc::epoch::{GoodbyeReason, Hello};
use understudy_proto::rpc::transport::Security;

use super::alarm::Alarm;
use super::capturer::{self, Barrier, Call, Capturer};
use super::host::GuestHost;
use super::output::{Gate, Output};
use super::stall::Pulse;
use crate::capture::CheckpointSource;
use crate::egress::SharedKeeper;
use crate::encode::{Encoder, Encoding};
use crate::engine::{Command, Engine, Event, Outcome, OutcomeKind, Settings};
use crate::replicate::{self, EpochSink, FullProgress, Replicator, feed};
use crate::stats::Stats;

pub(super) use shown::waiting_status;
use shown::{STATUS_INTERVAL, initial_status};

/// Events of the guest that wait; the pump behind them waits in turn.
const DOMAIN_EVENTS: usize = 256;

/// Before the next attempt to subscribe to a guest's events.
const SUBSCRIBE_AGAIN: Duration = Duration::from_secs(1);

/// Taken as the memory of a guest whose layout is not known yet; only a bound of a queue.
const MEMORY_BYTES_UNKNOWN: u64 = 1 << 40;

/// Everything protection of one guest starts from.
pub struct Plan {
    /// How the guest is introduced to the backup.
    pub hello: Hello,
    /// The backup as the operator named it.
    pub to: String,
    /// How the epochs travel there.
    pub security: Security,
    /// Pace and identity.
    pub settings: Settings,
    /// libvirt on this host, for status.
    pub libvirt_version: String,
    /// The guest's host.
    pub host: Arc<dyn GuestHost>,
    /// The guest's capture.
    pub source: Box<dyn CheckpointSource>,
    /// What is done at every stop.
    pub barrier: Barrier,
    /// What becomes of the guest's output.
    pub output: Output,
    /// How its pages are encoded.
    pub encoding: Encoding,
    /// Connections that its epochs go by at most.
    pub connections: usize,
}

impl std::fmt::Debug for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plan").field("hello", &self.hello).field("to", &self.to).finish_non_exhaustive()
    }
}

/// What an operator wants of a protection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// End it.
    Unprotect,
    /// Stand still behind a commit, for the other host to take the guest over.
    HandOver,
    /// Do not.
    TakeBack,
    /// The agent ends.
    Shutdown,
    /// Epochs of this length from now on, or of one that fits these goals.
    Pace(Duration, Option<EpochGoals>),
}

/// What is known of a guest at a moment.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Without ages, which depend on when it is read: see [`Snapshot::status`].
    status: GuestStatus,
    committed_at: Option<Instant>,
    /// Of a full copy under way.
    pub percent: Option<u8>,
    /// The committed epoch the guest stands at for the other host.
    pub handed_over: Option<EpochId>,
    /// Once the protection is over.
    pub outcome: Option<Outcome>,
}

impl Snapshot {
    /// It is over, and the guest has a newer owner.
    pub fn is_superseded(&self) -> bool {
        self.outcome.as_ref().is_some_and(|outcome| outcome.kind == OutcomeKind::Superseded)
    }

    /// As the operator sees it now.
    pub fn status(&self) -> GuestStatus {
        let age_ms = self.committed_at.map(|at| u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX));
        GuestStatus { committed_age_ms: age_ms, ..self.status.clone() }
    }
}

/// A protection that runs.
#[derive(Debug)]
pub struct Handle {
    /// Wishes; closed when it is over.
    pub wishes: mpsc::Sender<Wish>,
    /// What is known.
    pub snapshot: watch::Receiver<Snapshot>,
    /// What holds the guest's output.
    pub gate: Option<SharedKeeper>,
}

/// Starts the protection.
///
/// # Errors
/// If the guest's events cannot be had or the system gives no thread.
pub async fn start(plan: Plan) -> Result<Handle, String> {
    let (domain_events, domain_inbox) = mpsc::channel(DOMAIN_EVENTS);
    let (host, events) = (Arc::clone(&plan.host), domain_events.clone());
    tokio::task::spawn_blocking(move || host.subscribe(events)).await.map_err(|e| e.to_string())??;

    let alarm = Alarm::new().map_err(|error| format!("cannot make a timer: {error}"))?;
    let name = plan.hello.guest_name.clone();
    let gate = plan.output.make().await?;
    let keeper = gate.as_ref().map(|gate| gate.keeper.clone());
    let (capturer, captures) =
        Capturer::spawn(&name, plan.source, Arc::clone(&plan.host), plan.barrier, keeper.clone())
            .map_err(|error| format!("cannot start a thread: {error}"))?;
    let (replicator, status) =
        (plan.hello.clone(), initial_status(&plan.hello, &plan.to, &plan.libvirt_version));
    let (reports_in, reports) = mpsc::channel(64);
    let (replicator, orders) =
        Replicator::new(plan.to.clone(), plan.security, replicator, plan.connections, reports_in);
    let (sent_bytes, connections) = (replicator.sent_bytes(), replicator.connections());
    let encoder = Encoder::start(&name, plan.encoding, replicator.link_meter())?;
    let span = info_span!("guest", domain = name, generation = %plan.settings.generation);
    let stream = tokio::spawn(replicator.run().instrument(span.clone()));

    let snapshot = Snapshot { status, committed_at: None, percent: None, handed_over: None, outcome: None };
    let (snapshots, snapshot) = watch::channel(snapshot);
    let (wishes_in, wishes) = mpsc::channel(4);
    let (answers_in, answers) = mpsc::channel(16);
    let guest = Guest {
        generation: plan.settings.generation,
        engine: Engine::new(plan.settings, Instant::now()),
        host: plan.host,
        capturer,
        captures,
        orders,
        reports,
        stream: Some(stream),
        domain_events,
        domain_inbox,
        answers_in,
        answers,
        wishes,
        snapshots,
        stats: Stats::default(),
        sent_bytes,
        connections,
        sent_before: 0,
        encoder,
        progress: Arc::default(),
        memory_bytes: MEMORY_BYTES_UNKNOWN,
        committed_at: None,
        published_at: Instant::now(),
        pulse: Pulse::new(Instant::now()),
        alarm,
        outcome: None,
        gate,
        shown: (GuestState::Seeding, String::new()),
    };
    tokio::spawn(guest.run().instrument(span));
    Ok(Handle { wishes: wishes_in, snapshot, gate: keeper })
}

pub(super) struct Guest {
    generation: understudy_proto::ids::Generation,
    engine: Engine,
    pub(super) host: Arc<dyn GuestHost>,
    pub(super) capturer: Capturer,
    captures: mpsc::Receiver<capturer::Report>,
    orders: mpsc::Sender<replicate::Order>,
    reports: mpsc::Receiver<replicate::Report>,
    stream: Option<JoinHandle<()>>,
    domain_events: mpsc::Sender<DomainEvent>,
    domain_inbox: mpsc::Receiver<DomainEvent>,
    pub(super) answers_in: mpsc::Sender<Event>,
    answers: mpsc::Receiver<Event>,
    wishes: mpsc::Receiver<Wish>,
    snapshots: watch::Sender<Snapshot>,
    stats: Stats,
    sent_bytes: Arc<AtomicU64>,
    /// To the backup.
    connections: Arc<AtomicUsize>,
    /// As they were at the last commit.
    sent_before: u64,
    encoder: Encoder,
    progress: Arc<FullProgress>,
    memory_bytes: u64,
    committed_at: Option<Instant>,
    published_at: Instant,
    pulse: Pulse,
    alarm: Alarm,
    outcome: Option<Outcome>,
    /// `None`: output goes as it comes.
    pub(super) gate: Option<Gate>,
    /// State and reason that others have seen last.
    shown: (GuestState, String),
}

/// What the owner waits for.
enum Turn {
    Capture(Option<capturer::Report>),
    Stream(Option<replicate::Report>),
    Domain(DomainEvent),
    Answer(Event),
    Wish(Wish),
    /// A frame of the guest may wait.
    Frame,
    /// The gate may have been taken away.
    Doubt,
    Due,
}

impl Guest {
    async fn run(mut self) {
        self.apply_all(Event::Tick).await;
        loop {
            if self.outcome.is_some() {
                self.publish(true);
                return;
            }
            let turn = self.select().await;
            if let Some(still) = self.pulse.beat(Instant::now()) {
                debug!(ms = still.as_millis(), "this agent stood still");
                self.apply_all(Event::StoodStill(still)).await;
            }
            match turn {
                Turn::Capture(Some(report)) => self.capture_report(report).await,
                Turn::Stream(Some(report)) => self.stream_report(report).await,
                Turn::Domain(event) => {
                    if let DomainEvent::Qmp(event) = &event {
                        self.stats.pause.event(event);
                    }
                    if matches!(event, DomainEvent::Devices | DomainEvent::Lost { .. }) {
                        self.follow_interfaces();
                    }
                    self.apply_all(Event::Domain(event)).await;
                }
                Turn::Answer(event) => {
                    if matches!(event, Event::Subscribed) {
                        self.follow_interfaces();
                    }
                    self.apply_all(event).await;
                }
                Turn::Wish(Wish::HandOver) => self.apply_all(Event::HandOver).await,
                Turn::Wish(Wish::TakeBack) => self.apply_all(Event::TakeBack).await,
                Turn::Wish(Wish::Unprotect) => self.apply_all(Event::Unprotect).await,
                Turn::Wish(Wish::Shutdown) => self.apply_all(Event::Shutdown).await,
                Turn::Wish(Wish::Pace(epoch, goals)) => {
                    info!(ms = epoch.as_millis(), ?goals, "another length of epochs is wanted");
                    self.apply_all(Event::Pace { epoch, goals }).await;
                }
                Turn::Frame => {
                    if let Some(pressing) = self.gate.as_mut().and_then(Gate::frame) {
                        self.apply_all(Event::OutputWaiting { pressing }).await;
                    }
                }
                Turn::Doubt => self.guard_output(true),
                Turn::Due => {
                    self.guard_output(false);
                    self.apply_all(Event::Tick).await;
                }
                Turn::Capture(None) | Turn::Stream(None) => {
                    // Only a panic there ends one of them before this does.
                    let text = "a part of the agent has failed; see its log".to_owned();
                    error!("{text}");
                    let remedy = "restart understudy-primary".to_owned();
                    self.finish(None, Outcome { kind: OutcomeKind::Failed, text, remedy }).await;
                }
            }
            self.publish(false);
        }
    }

    /// # Cancel safety
    /// Every future in it is; nothing is done here.
    async fn select(&mut self) -> Turn {
        let status_due = self.published_at + STATUS_INTERVAL;
        let due = self.engine.deadline().map_or(status_due, |at| at.min(status_due));
        tokio::select! {
            // An acknowledgement must not overtake the report of the capture it is for.
            biased;
            report = self.captures.recv() => Turn::Capture(report),
            report = self.reports.recv() => Turn::Stream(report),
            Some(event) = self.domain_inbox.recv() => Turn::Domain(event),
            Some(event) = self.answers.recv() => Turn::Answer(event),
            Some(wish) = self.wishes.recv() => Turn::Wish(wish),
            () = Gate::doubt(self.gate.as_ref()) => Turn::Doubt,
            () = Gate::wait(self.gate.as_ref()) => Turn::Frame,
            () = self.alarm.wait(due) => Turn::Due,
        }
    }

    async fn capture_report(&mut self, report: capturer::Report) {
        if let Some(memory_bytes) = report.memory_bytes {
            self.memory_bytes = memory_bytes;
        }
        if let Some(pages) = report.pages {
            self.stats.dirty_pages.push(pages);
        }
        if let (Event::Armed { .. } | Event::Captured, Some(gate)) = (&report.event, &mut self.gate) {
            gate.epoch_begins();
        }
        if let Event::CaptureFailed(failure) = &report.event {
            warn!(reason = failure.reason, "capture ended");
        }
        self.apply_all(report.event).await;
    }

    async fn stream_report(&mut self, report: replicate::Report) {
        let event = match report {
            replicate::Report::Connected(session, ack) => {
                self.encoder.agreed(&ack.agreement);
                Event::Connected { session, ack }
            }
            replicate::Report::Disconnected(session, reason) => Event::Disconnected { session, reason },
            replicate::Report::Refused(session, refused) => Event::Refused { session, refused },
            replicate::Report::Acked(session, at) => {
                let bytes = self.sent_bytes.load(Ordering::Relaxed);
                let sent = bytes.saturating_sub(std::mem::replace(&mut self.sent_before, bytes));
                let stop = self.stats.pause.last();
                self.apply_all(Event::Measured { stop, bytes: sent }).await;
                if let Some(bytes) = self.gate.as_ref().and_then(Gate::bytes) {
                    self.apply_all(Event::OutputHeld { bytes }).await;
                }
                Event::Acked { session, at }
            }
            replicate::Report::Rejected(session, reject) => Event::Rejected { session, reject },
            replicate::Report::Standby(standby) => {
                let text = match standby.text.as_str() {
                    "" => standby.state.label().to_owned(),
                    text => format!("{}: {text}", standby.state.label()),
                };
                self.snapshots.send_modify(|snapshot| snapshot.status.standby = text);
                return;
            }
        };
        self.apply_all(event).await;
    }

    async fn apply_all(&mut self, event: Event) {
        for command in self.engine.step(event, Instant::now()) {
            self.apply(command).await;
        }
    }

    async fn apply(&mut self, command: Command) {
        match command {
            Command::Connect { session, after } => {
                self.order(replicate::Order::Connect { session, after }).await;
            }
            Command::Arm(epoch) => {
                info!(%epoch, "full copy begins");
                let sink = self.feed(epoch, EpochKind::Full).await;
                self.capturer.call(Call::Arm { epoch, sink });
            }
            Command::Start => self.capturer.call(Call::Start),
            Command::WaitReady => self.capturer.call(Call::WaitReady),
            Command::Checkpoint(epoch) => self.checkpoint(epoch, false).await,
            Command::CheckpointHeld(epoch) => self.checkpoint(epoch, true).await,
            Command::Interrupt => self.capturer.interrupt(),
            Command::Disarm => self.capturer.call(Call::Disarm),
            Command::Rescue => self.capturer.call(Call::Rescue),
            Command::Resend => self.order(replicate::Order::Resend).await,
            Command::Forget => self.order(replicate::Order::Forget).await,
            Command::Release(committed) => {
                let epoch = committed.epoch();
                self.release(committed);
                self.committed_at = Some(Instant::now());
                self.stats.epochs_total += 1;
                if self.stats.last_full == Some(epoch) {
                    self.stats.full_copies_total += 1;
                    info!(%epoch, "full copy committed");
                }
                self.order(replicate::Order::Forget).await;
            }
            Command::AskQemu(question) => {
                let host = Arc::clone(&self.host);
                self.answer(move || match host.run_state() {
                    Ok(state) => Event::Answer(question, Some(state)),
                    Err(reason) => {
                        warn!(reason, "the guest's run state is not known");
                        Event::Answer(question, None)
                    }
                });
            }
            Command::Resubscribe => self.resubscribe(),
            Command::PauseGuest => {
                let host = Arc::clone(&self.host);
                self.answer(move || {
                    let result = host.pause();
                    match &result {
                        Ok(()) => warn!("the guest is paused: it has a newer owner"),
                        Err(reason) => error!(reason, "the guest has a newer owner and cannot be paused"),
                    }
                    Event::Paused(result)
                });
            }
            Command::Finish { goodbye, outcome } => self.finish(goodbye, outcome).await,
        }
    }

    async fn finish(&mut self, goodbye: Option<GoodbyeReason>, outcome: Outcome) {
        info!(kind = ?outcome.kind, text = outcome.text, "protection is over");
        self.order(replicate::Order::Close(goodbye)).await;
        if let Some(stream) = self.stream.take() {
            // Bounded by the replicator's own limit.
            let _ = stream.await;
        }
        if let Some(gate) = &self.gate {
            gate.end(&outcome, goodbye.is_some()).await;
        }
        self.outcome = Some(outcome);
    }

    async fn checkpoint(&mut self, epoch: EpochId, hold: bool) {
        self.stats.pause.checkpoint();
        let sink = self.feed(epoch, EpochKind::Delta).await;
        self.capturer.call(Call::Checkpoint { epoch, hold, sink });
    }

    async fn feed(&mut self, epoch: EpochId, kind: EpochKind) -> EpochSink {
        if kind == EpochKind::Full {
            self.progress = Arc::new(FullProgress::default());
            self.stats.last_full = Some(epoch);
        }
        let (progress, encoding) = (Arc::clone(&self.progress), self.encoder.for_epoch());
        let (sink, feed) = feed(self.generation, epoch, kind, self.memory_bytes, progress, encoding);
        self.order(replicate::Order::Feed(feed)).await;
        sink
    }

    async fn order(&self, order: replicate::Order) {
        // A replicator that is gone closes its reports as well.
        let _ = self.orders.send(order).await;
    }

    /// Does something that blocks elsewhere; its event comes back later.
    fn answer(&self, work: impl FnOnce() -> Event + Send + 'static) {
        let answers = self.answers_in.clone();
        let span = tracing::Span::current();
        tokio::task::spawn_blocking(move || {
            let event = span.in_scope(work);
            let _ = answers.blocking_send(event);
        });
    }

    fn resubscribe(&self) {
        let (host, events, answers) =
            (Arc::clone(&self.host), self.domain_events.clone(), self.answers_in.clone());
        let work = async move {
            warn!("no events arrive from libvirt; subscribing anew");
            while !answers.is_closed() {
                let (host, events) = (Arc::clone(&host), events.clone());
                match tokio::task::spawn_blocking(move || host.subscribe(events)).await {
                    Ok(Ok(())) => {
                        let _ = answers.send(Event::Subscribed).await;
                        return;
                    }
                    Ok(Err(reason)) => warn!(reason, "cannot subscribe to the guest's events"),
                    Err(error) => error!(%error, "subscribing failed"),
                }
                tokio::time::sleep(SUBSCRIBE_AGAIN).await;
            }
        };
        tokio::spawn(work.in_current_span());
    }
}
