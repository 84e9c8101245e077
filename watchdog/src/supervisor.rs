//! The owner of the engine: takes what happens, one thing after the other, and carries out what the engine says.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use tracing::{error, info, warn};
use understudy_libvirt::RunState;
use understudy_proto::ids::GuestId;

use crate::bound::LOOK;
use crate::engine::{About, Command, Engine, Event, Report, Trouble};
use crate::life::{self, Life};
use crate::monitor::Monitors;
use crate::record;
use crate::worker::{Answer, Job, Worker};

/// What waits to be taken. Guests answer one question each.
const INBOX: usize = 64;

/// A supervisor at work; see [`Supervisor::run`].
pub struct Supervisor {
    state_dir: PathBuf,
    monitors: Arc<dyn Monitors>,
    engine: Engine,
    inbox: Receiver<Input>,
    outbox: SyncSender<Input>,
    workers: BTreeMap<GuestId, Worker>,
    /// Numbers workers.
    made: u64,
    read_again: Instant,
    record_failed: bool,
}

enum Input {
    Life(Life),
    Answer(Answer),
    End,
}

/// Ends a [`Supervisor`] from another thread.
#[derive(Debug, Clone)]
pub struct Ender(SyncSender<Input>);

impl Ender {
    /// It ends when it has taken what came before.
    pub fn end(&self) {
        // One that has ended takes nothing.
        let _ = self.0.send(Input::End);
    }
}

impl std::fmt::Debug for Input {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Life(_) => "Life",
            Self::Answer(_) => "Answer",
            Self::End => "End",
        })
    }
}

impl std::fmt::Debug for Supervisor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Supervisor")
            .field("state_dir", &self.state_dir)
            .field("engine", &self.engine)
            .finish_non_exhaustive()
    }
}

impl Supervisor {
    /// Of the agent with that state directory. A living agent may hold a guest stopped for `hung_after`.
    pub fn new(state_dir: PathBuf, monitors: Arc<dyn Monitors>, hung_after: Duration) -> Self {
        let (outbox, inbox) = sync_channel(INBOX);
        Self {
            state_dir,
            monitors,
            engine: Engine::new(hung_after),
            inbox,
            outbox,
            workers: BTreeMap::new(),
            made: 0,
            read_again: Instant::now(),
            record_failed: false,
        }
    }

    /// What ends it.
    pub fn ender(&self) -> Ender {
        Ender(self.outbox.clone())
    }

    /// Supervises until it is ended. Every report is logged, then given to `also`. Blocks.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn run(mut self, mut also: impl FnMut(&Report)) -> std::io::Result<()> {
        let (outbox, folder) = (self.outbox.clone(), self.state_dir.clone());
        std::thread::Builder::new().name("life".to_owned()).spawn(move || {
            life::watch(&folder, |life| outbox.send(Input::Life(life)).is_ok());
        })?;
        loop {
            let deadline = self.engine.deadline().map_or(self.read_again, |due| due.min(self.read_again));
            match self.inbox.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Input::Life(life)) => {
                    // What a dead agent has left, or a new one found, is in the file before this is heard.
                    self.read_record(&mut also);
                    self.step(Event::Life(life), &mut also);
                }
                Ok(Input::Answer(Answer { guest, worker, event })) => {
                    if self.workers.get(&guest).is_some_and(|current| current.number == worker) {
                        self.step(event, &mut also);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    if Instant::now() >= self.read_again {
                        self.read_record(&mut also);
                    }
                    self.step(Event::Tick, &mut also);
                }
                Ok(Input::End) | Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
        }
    }

    /// A list that cannot be read leaves the last one in force.
    fn read_record(&mut self, also: &mut impl FnMut(&Report)) {
        self.read_again = Instant::now() + LOOK;
        match record::read(&self.state_dir) {
            Ok(list) => {
                self.record_failed = false;
                self.step(Event::Record(list), also);
            }
            Err(error) => {
                if !self.record_failed {
                    error!(%error, "the guests of the agent are not known; the last list counts");
                }
                self.record_failed = true;
            }
        }
    }

    fn step(&mut self, event: Event, also: &mut impl FnMut(&Report)) {
        for command in self.engine.step(event, Instant::now()) {
            match command {
                Command::Look(guest, depth) => self.give(guest, Job::Look(depth)),
                Command::Order(guest, order) => {
                    warn!(%guest, %order, "QEMU is told");
                    self.give(guest, Job::Order(order));
                }
                Command::Replace(guest) | Command::Forget(guest) => drop(self.workers.remove(&guest)),
                Command::Report(report) => {
                    log(&report);
                    also(&report);
                }
            }
        }
    }

    fn give(&mut self, guest: GuestId, job: Job) {
        let given = match self.worker(guest) {
            Ok(worker) => worker.give(job).then_some(()).ok_or_else(|| "its thread takes no job".to_owned()),
            Err(error) => Err(format!("cannot start a thread: {error}")),
        };
        let Err(reason) = given else { return };
        // By the way every answer takes, so that the engine is not entered twice. The number of the worker that is, or
        // of none: then this is dropped and the engine asks anew when it has waited long enough.
        let worker = self.workers.get(&guest).map_or(0, |worker| worker.number);
        let event = Event::Seen(guest, Err(Trouble::Unreachable(reason)));
        let _ = self.outbox.try_send(Input::Answer(Answer { guest, worker, event }));
    }

    fn worker(&mut self, guest: GuestId) -> std::io::Result<&Worker> {
        match self.workers.entry(guest) {
            std::collections::btree_map::Entry::Occupied(entry) => Ok(entry.into_mut()),
            std::collections::btree_map::Entry::Vacant(entry) => {
                self.made += 1;
                let outbox = self.outbox.clone();
                let answers = move |answer| outbox.send(Input::Answer(answer)).is_ok();
                Ok(entry.insert(Worker::spawn(guest, self.made, Arc::clone(&self.monitors), answers)?))
            }
        }
    }
}

fn log(report: &Report) {
    match report {
        Report::Agent { life: Life::Alive, guests } => info!(guests, "the primary agent lives"),
        Report::Agent { life: Life::Dead, guests } => {
            warn!(guests, "the primary agent is dead; its guests are looked at");
        }
        Report::Agent { life: Life::Unknown, guests } => {
            warn!(guests, "there is no sign of life of a primary agent: nothing is done");
        }
        Report::Guest { guest, name, what } => match what {
            About::Freed { cause, found, now, after } => {
                let after_ms = after.as_secs_f64() * 1000.0;
                if *found == RunState::Running {
                    info!(domain = name, %guest, ?cause, %now, after_ms, "checkpoints ended, the guest was running");
                } else {
                    warn!(domain = name, %guest, ?cause, %found, %now, after_ms, "the guest was left stopped and is let run");
                }
            }
            About::LeftAlone { state } => {
                info!(domain = name, %guest, %state, "stopped, but not by a checkpoint: left alone");
            }
            About::HandedOver => info!(domain = name, %guest, "left to the new agent"),
            About::CannotTell => {
                warn!(domain = name, %guest, "this QEMU does not count: an agent that hangs is not noticed");
            }
            About::Silent { waited } => {
                warn!(domain = name, %guest, waited_ms = waited.as_millis(), "its monitor does not answer");
            }
            About::Trouble { reason } => {
                warn!(domain = name, %guest, reason, "cannot be looked at or told; tried again");
            }
        },
    }
}
