//! The thread that asks and tells one guest's QEMU, so that one that does not answer keeps no other waiting.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use understudy_libvirt::Monitor;
use understudy_proto::ids::GuestId;

use crate::engine::{Depth, Event, Order, Trouble};
use crate::look;
use crate::monitor::Monitors;

/// What a worker is to do.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Job {
    Look(Depth),
    Order(Order),
}

/// What came of it, and which worker says so: one that was replaced is not listened to.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) guest: GuestId,
    pub(crate) worker: u64,
    pub(crate) event: Event,
}

/// A worker's handle. Its thread ends when this is dropped and the last answer was given.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) number: u64,
    jobs: SyncSender<Job>,
}

impl Worker {
    pub(crate) fn spawn(
        guest: GuestId,
        number: u64,
        monitors: Arc<dyn Monitors>,
        answers: impl Fn(Answer) -> bool + Send + 'static,
    ) -> std::io::Result<Self> {
        // One question or order at a time.
        let (jobs, inbox) = sync_channel(1);
        let work = move || {
            work(guest, &inbox, monitors.as_ref(), |event| answers(Answer { guest, worker: number, event }))
        };
        std::thread::Builder::new().name("guest".to_owned()).spawn(work)?;
        Ok(Self { number, jobs })
    }

    /// False if it has no room for a job, or has ended.
    pub(crate) fn give(&self, job: Job) -> bool {
        self.jobs.try_send(job).is_ok()
    }
}

fn work(guest: GuestId, jobs: &Receiver<Job>, monitors: &dyn Monitors, answer: impl Fn(Event) -> bool) {
    let mut open: Option<Box<dyn Monitor>> = None;
    while let Ok(job) = jobs.recv() {
        let event = match job {
            Job::Look(depth) => {
                Event::Seen(guest, with(&mut open, guest, monitors, |m| look::look(m, depth)))
            }
            Job::Order(order) => {
                Event::Done(guest, with(&mut open, guest, monitors, |m| look::order(m, order)))
            }
        };
        if !answer(event) {
            return;
        }
    }
}

/// Opens the way if there is none, and forgets one that has failed: libvirt may have been restarted.
fn with<T>(
    open: &mut Option<Box<dyn Monitor>>,
    guest: GuestId,
    monitors: &dyn Monitors,
    ask: impl FnOnce(&dyn Monitor) -> Result<T, Trouble>,
) -> Result<T, Trouble> {
    let monitor = match open.take() {
        Some(monitor) => monitor,
        None => monitors.open(guest)?,
    };
    let result = ask(monitor.as_ref());
    if !matches!(result, Err(Trouble::Unreachable(_))) {
        *open = Some(monitor);
    }
    result
}
