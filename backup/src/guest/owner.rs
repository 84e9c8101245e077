//! The task that owns a guest: selects what happens next without effects, lets the engine decide, carries it out.

mod controls;
mod events;
mod orders;
mod status;
mod streams;

use super::{Asking, Guest, Request, Tools};
use crate::engine::{Command, ConnectionId, Engine, Event};
use crate::image::Image;
use crate::shared::SharedMemory;
use crate::stats::Stats;
use crate::worker::{Hands, Report};
use controls::{ControlWrite, write_controls};
use orders::Called;
use status::status;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};
use streams::Connection;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::StreamExt;
use understudy_proto::control::ControlFile;
use understudy_proto::rpc::Failure;
use understudy_proto::rpc::admin::GuestStatus;
use understudy_proto::rpc::epoch::PrimaryMessage;

/// Requests that may wait.
const REQUESTS: usize = 16;

/// Control files that may wait to be written.
const CONTROL_WRITES: usize = 16;

/// How often time passes for the engine, and the status is renewed.
const TICK: Duration = Duration::from_millis(250);

/// Starts the task that owns a guest.
pub(super) fn start(engine: Engine, tools: Tools) -> Guest {
    let hands =
        Hands::new(&engine.record().name, Arc::clone(&tools.memory), tools.dump.clone(), tools.pool.clone());
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
}
