//! A client on the LAN that reads a guest's counter all the time and remembers what it saw when.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::guest::{Count, Guest};
use super::state::LabDir;

/// How often the counter is read.
const PERIOD: Duration = Duration::from_millis(20);
/// An answer later than this is given up, and a new connection made: TCP itself would wait ever longer.
/// Long beside the stops of a protected guest on an emulated host.
const PATIENCE: Duration = Duration::from_secs(1);

/// One answer.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    /// When it arrived.
    pub(crate) at: Instant,
    pub(crate) count: Count,
}

/// The client; dropping it ends it.
#[derive(Debug)]
pub(crate) struct Observer {
    samples: Arc<Mutex<Vec<Sample>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Observer {
    pub(crate) fn start(lab: &LabDir, guest: &str) -> Self {
        let samples = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = {
            let (samples, stop, lab, guest) =
                (Arc::clone(&samples), Arc::clone(&stop), lab.clone(), guest.to_owned());
            std::thread::spawn(move || observe(&lab, &guest, &samples, &stop))
        };
        Self { samples, stop, thread: Some(thread) }
    }

    /// The latest answer.
    pub(crate) fn last(&self) -> Option<Sample> {
        self.samples.lock().unwrap_or_else(PoisonError::into_inner).last().cloned()
    }

    /// The first answer after a moment, if there is one within `limit`.
    pub(crate) fn first_after(&self, moment: Instant, limit: Duration) -> Option<Sample> {
        let end = Instant::now() + limit;
        loop {
            let found = {
                let samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
                samples.iter().find(|sample| sample.at > moment).cloned()
            };
            if found.is_some() || Instant::now() >= end {
                return found;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It has nothing to say beyond its samples.
            drop(thread.join());
        }
    }
}

fn observe(lab: &LabDir, name: &str, samples: &Mutex<Vec<Sample>>, stop: &AtomicBool) {
    let mut guest = None;
    while !stop.load(Ordering::Relaxed) {
        let mut connection = match guest.take() {
            Some(connection) => connection,
            None => match Guest::connect(lab, name, PATIENCE) {
                Ok(connection) => connection,
                Err(_) => {
                    std::thread::sleep(PERIOD);
                    continue;
                }
            },
        };
        // A connection that failed is not used again: a late answer would be taken for the next one's.
        if let Ok(count) = connection.count() {
            samples.lock().unwrap_or_else(PoisonError::into_inner).push(Sample { at: Instant::now(), count });
            guest = Some(connection);
        }
        std::thread::sleep(PERIOD);
    }
}
