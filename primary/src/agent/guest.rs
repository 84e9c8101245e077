//! The owner of one guest's protection: waits for the next event, asks the engine, does what it says.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tracing::{Instrument, debug, error, info, info_span, warn};
use understudy_libvirt::DomainEvent;
use understudy_proto::epoch::EpochKind;
use understudy_proto::ids::{EpochId, GuestId};
use understudy_proto::rpc::admin::{AgentRole, GuestState, GuestStatus};
use understudy_proto::rpc::epoch::{GoodbyeReason, Hello};
use understudy_proto::rpc::transport::Security;

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

/// Events of the guest that wait; the pump behind them waits in turn.
const DOMAIN_EVENTS: usize = 256;

/// Before the next attempt to subscribe to a guest's events.
const SUBSCRIBE_AGAIN: Duration = Duration::from_secs(1);

/// How often numbers in the status are brought up to date while the state stays the same.
const STATUS_INTERVAL: Duration = Duration::from_millis(200);

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

    let name = plan.hello.guest_name.clone();
    let gate = plan.output.make().await?;
    let keeper = gate.as_ref().map(|gate| gate.keeper.clone());
    let (capturer, captures) =
        Capturer::spawn(&name, plan.source, Arc::clone(&plan.host), plan.barrier, keeper.clone())
            .map_err(|error| format!("cannot start a thread: {error}"))?;
    let (replicator, status) =
        (plan.hello.clone(), initial_status(&plan.hello, &plan.to, &plan.libvirt_version));
    let (reports_in, reports) = mpsc::channel(64);
    let (replicator, orders) = Replicator::new(plan.to.clone(), plan.security, replicator, reports_in);
    let sent_bytes = replicator.sent_bytes();
    let encoder = Encoder::start(&name, plan.encoding, replicator.link_meter())?;
    let span = info_span!("guest", domain = name, generation = %plan.settings.generation);
    let stream = tokio::spawn(replicator.run().instrument(span.clone()));

    let snapshot = Snapshot { status, committed_at: None, percent: None, handed_over: None, outcome: None };
    let (snapshots, snapshot) = watch::channel(snapshot);
    let (wishes_in, wishes) = mpsc::channel(4);
    let (answers_in, answers) = mpsc::channel(16);
    let guest = Guest {
        epoch: plan.settings.epoch,
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
        encoder,
        progress: Arc::default(),
        memory_bytes: MEMORY_BYTES_UNKNOWN,
        committed_at: None,
        published_at: Instant::now(),
        pulse: Pulse::new(Instant::now()),
        outcome: None,
        gate,
        shown: (GuestState::Seeding, String::new()),
    };
    tokio::spawn(guest.run().instrument(span));
    Ok(Handle { wishes: wishes_in, snapshot, gate: keeper })
}

fn initial_status(hello: &Hello, to: &str, libvirt_version: &str) -> GuestStatus {
    let mut status =
        GuestStatus::new(hello.guest_name.clone(), hello.guest, AgentRole::Primary, GuestState::Seeding);
    status.peer = to.to_owned();
    status.detail = format!("connecting to {to}");
    status.generation = hello.generation;
    status.qemu.clone_from(&hello.qemu_version);
    status.libvirt = libvirt_version.to_owned();
    status
}

/// A status for a guest whose protection waits for something outside of it.
pub(super) fn waiting_status(guest: GuestId, name: &str, to: &str, detail: String) -> GuestStatus {
    let mut status = GuestStatus::new(name, guest, AgentRole::Primary, GuestState::Degraded);
    status.peer = to.to_owned();
    status.detail = detail;
    status
}

pub(super) struct Guest {
    epoch: Duration,
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
    encoder: Encoder,
    progress: Arc<FullProgress>,
    memory_bytes: u64,
    committed_at: Option<Instant>,
    published_at: Instant,
    pulse: Pulse,
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
                Turn::Frame => {
                    if let Some(pressing) = self.gate.as_mut().and_then(Gate::frame) {
                        self.apply_all(Event::OutputWaiting { pressing }).await;
                    }
                }
                Turn::Due => self.apply_all(Event::Tick).await,
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
            () = Gate::wait(self.gate.as_ref()) => Turn::Frame,
            () = tokio::time::sleep_until(due.into()) => Turn::Due,
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

    /// Brings what others see up to date: at once when the state changed, now and then when only numbers did.
    fn publish(&mut self, last: bool) {
        let view = self.engine.view();
        let first = self.snapshots.borrow().status.committed_epoch.is_none() != view.committed.is_none();
        let old_state = self.shown.0;
        let changed = (old_state, self.shown.1.as_str()) != (view.state, view.detail.as_str()) || first;
        if !(changed || last || self.published_at.elapsed() >= STATUS_INTERVAL) {
            return;
        }
        if old_state != view.state {
            info!(from = old_state.label(), to = view.state.label(), detail = view.detail, "state");
        }
        self.published_at = Instant::now();
        self.shown = (view.state, view.detail.clone());
        let output = Gate::seen(self.gate.as_mut(), view.state, last);
        let ms = |pause: Duration| pause.as_secs_f64() * 1000.0;
        let pauses = self.stats.pause.pauses.quantiles();
        let pages = self.stats.dirty_pages.quantiles();
        let copying = matches!(view.in_flight, Some((_, EpochKind::Full)));
        self.snapshots.send_modify(|snapshot| {
            let status = &mut snapshot.status;
            status.state = view.state;
            status.detail = [view.detail, output.remark]
                .into_iter()
                .filter(|part| !part.is_empty())
                .collect::<Vec<_>>()
                .join("; ");
            status.output = output.text;
            status.output_waiting_bytes = output.held.map(|held| held.bytes);
            status.output_dropped_total = output.held.map(|held| held.dropped);
            status.committed_epoch = view.committed;
            status.epochs_total = self.stats.epochs_total;
            status.full_copies_total = self.stats.full_copies_total;
            status.pause_p50_ms = pauses.map(|(p50, _)| ms(p50));
            status.pause_p99_ms = pauses.map(|(_, p99)| ms(p99));
            status.dirty_pages_p50 = pages.map(|(p50, _)| p50);
            status.dirty_pages_p99 = pages.map(|(_, p99)| p99);
            status.epoch_ms = u32::try_from(self.epoch.as_millis()).ok();
            status.bytes_total = self.sent_bytes.load(Ordering::Relaxed);
            status.encoding = Some(self.encoder.report());
            snapshot.committed_at = self.committed_at;
            snapshot.handed_over = view.handed_over;
            snapshot.percent = copying.then(|| self.progress.percent());
            if last {
                snapshot.outcome = self.outcome.clone();
            }
        });
    }
}
