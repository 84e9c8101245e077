//! The thread that decodes, digests and applies: everything that takes CPU time, off the runtime, in order.
//!
//! Jobs are done strictly one after the other, so whoever asks for the image gets it with every epoch applied that
//! was ordered before.

use crate::assembly::{Assembly, Attempt, Fault, Proof, Verified};
use crate::decode::Crew;
use crate::dump::Dump;
use crate::image::{Image, MemoryProvider, Move};
use crate::shared::SharedMemory;
use bytes::Bytes;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TryRecvError;
use understudy_proto::epoch::{EpochKind, EpochManifest};
use understudy_proto::pool::Pool;
use understudy_proto::rpc::epoch::{Begin, EpochRef, RejectCode, Seed};

/// Jobs that may wait: enough to keep the thread busy, few enough to bound memory (a frame is 320 KiB at most).
const JOBS: usize = 64;

/// Reports that may wait. There is one per verification, application, move and request for the image, and of each at
/// most one at a time is under way, so the worker never waits for its owner.
const REPORTS: usize = 16;

/// Something to do.
#[derive(Debug)]
pub enum Job {
    /// Begins an epoch; a full one has a seed. Drops what was not applied.
    Open(Attempt, Begin, Option<Arc<Seed>>),
    /// A frame of it.
    Frame(Bytes),
    /// The next piece of its device buffer.
    Device(Bytes),
    /// Verify it: gives [`Report::Verified`] or [`Report::Rejected`].
    Verify(EpochManifest),
    /// Apply the verified epoch of this attempt: gives [`Report::Applied`] or [`Report::ApplyFailed`].
    Apply(Attempt),
    /// Drop the epoch that is open or verified.
    DiscardEpoch,
    /// Drop everything.
    DropImage,
    /// Move the image into the memory of a standby, beside the other jobs: gives [`Report::Adopted`] with this
    /// number. Ends a move that is under way.
    Adopt(u64, Arc<SharedMemory>),
    /// Give the image: [`Report::Image`]. A move that is under way is finished before.
    TakeImage,
}

/// What came of it.
#[derive(Debug)]
pub enum Report {
    /// The epoch is held and matches its manifest.
    Verified(Proof),
    /// The epoch is not acceptable and was dropped. Comes at most once per epoch, as early as it is known.
    Rejected(Attempt, EpochRef, Fault),
    /// The epoch is in the image.
    Applied(EpochRef),
    /// The epoch could not be applied; the image is dropped.
    ApplyFailed(String),
    /// The image is in the standby's memory, or why it is not.
    Adopted(u64, Result<(), String>),
    /// The image, `None` if there is none.
    Image(Option<Arc<Image>>),
}

/// Starts the thread. It ends when the sender is dropped.
///
/// # Errors
/// If the thread cannot be started.
pub fn start(
    name: &str,
    provider: Arc<dyn MemoryProvider>,
    dump: Dump,
    pool: Pool,
) -> std::io::Result<(mpsc::Sender<Job>, mpsc::Receiver<Report>)> {
    let (job_tx, mut jobs) = mpsc::channel(JOBS);
    let (reports, report_rx) = mpsc::channel(REPORTS);
    // Linux shows 15 bytes of it.
    std::thread::Builder::new().name(format!("image {name}")).spawn(move || {
        let mut worker = Worker::new(provider, dump, Crew::new(pool));
        let (mut frames, mut behind) = (Vec::new(), None);
        loop {
            // A move takes its steps between jobs, so epochs wait for one step of it at most.
            let job = match behind.take() {
                Some(job) => Ok(job),
                None if worker.moving.is_some() => jobs.try_recv(),
                None => Err(TryRecvError::Empty),
            };
            let job = match job {
                Ok(job) => Some(job),
                Err(TryRecvError::Disconnected) => return,
                Err(TryRecvError::Empty) if worker.moving.is_some() => None,
                Err(TryRecvError::Empty) => match jobs.blocking_recv() {
                    Some(job) => Some(job),
                    None => return,
                },
            };
            let moved = worker.move_on(if matches!(job, Some(Job::TakeImage)) { usize::MAX } else { 1 });
            let done = match job {
                Some(Job::Frame(frame)) => {
                    frames.push(frame);
                    while behind.is_none() && frames.len() < worker.crew.group_frames() {
                        match jobs.try_recv() {
                            Ok(Job::Frame(frame)) => frames.push(frame),
                            Ok(job) => behind = Some(job),
                            Err(_) => break,
                        }
                    }
                    let done = worker.frames(&frames);
                    frames.clear();
                    done
                }
                job => job.and_then(|job| worker.perform(job)),
            };
            for report in moved.into_iter().chain(done) {
                if reports.blocking_send(report).is_err() {
                    return;
                }
            }
        }
    })?;
    Ok((job_tx, report_rx))
}

/// A guest's worker: a thread from the first job until it is let go, and again from the next job on. A guest that is only
/// remembered has none.
pub struct Hands {
    name: String,
    provider: Arc<dyn MemoryProvider>,
    dump: Dump,
    pool: Pool,
    thread: Option<(mpsc::Sender<Job>, mpsc::Receiver<Report>)>,
}

impl std::fmt::Debug for Hands {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hands").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Hands {
    /// Of the guest with this name; no thread yet.
    pub fn new(name: &str, provider: Arc<dyn MemoryProvider>, dump: Dump, pool: Pool) -> Self {
        Self { name: name.to_owned(), provider, dump, pool, thread: None }
    }

    /// Gives the thread a job when it has room for it. One that has ended shows as the end of its reports.
    pub async fn give(&mut self, job: Job) {
        let (jobs, _) = match &mut self.thread {
            Some(thread) => thread,
            // There is nothing to drop.
            None if matches!(job, Job::DiscardEpoch | Job::DropImage) => return,
            none => {
                let started =
                    start(&self.name, Arc::clone(&self.provider), self.dump.clone(), self.pool.clone());
                none.insert(started.unwrap_or_else(|error| {
                    tracing::error!(guest = self.name, %error, "no thread for its image");
                    (mpsc::channel(1).0, mpsc::channel(1).1)
                }))
            }
        };
        let _ = jobs.send(job).await;
    }

    /// The next report, `None` if the thread has ended by itself. Never ready without a thread.
    ///
    /// # Cancel safety
    /// A receive, which loses nothing when dropped.
    pub async fn report(&mut self) -> Option<Report> {
        match &mut self.thread {
            Some((_, reports)) => reports.recv().await,
            None => std::future::pending().await,
        }
    }

    /// Lets the thread do what it was given, and end. What it would report is lost.
    pub fn rest(&mut self) {
        self.thread = None;
    }
}

struct Worker {
    provider: Arc<dyn MemoryProvider>,
    dump: Dump,
    crew: Crew,
    open: Option<Assembly>,
    verified: Option<(Verified, Attempt, EpochRef)>,
    image: Option<Arc<Image>>,
    moving: Option<(u64, Move)>,
}

impl Worker {
    fn new(provider: Arc<dyn MemoryProvider>, dump: Dump, crew: Crew) -> Self {
        Self { provider, dump, crew, open: None, verified: None, image: None, moving: None }
    }

    /// Takes so many steps of the move, if one is under way; gives its end.
    fn move_on(&mut self, steps: usize) -> Option<Report> {
        for _ in 0..steps {
            let (number, step) = self.moving.as_mut()?;
            let number = *number;
            let moved = match self.image.as_mut().map(Arc::get_mut) {
                Some(Some(image)) => image.move_step(step),
                Some(None) => Err("the image is in use".to_owned()),
                None => Err("there is no image".to_owned()),
            };
            let ended = match moved {
                Ok(false) => continue,
                Ok(true) => Ok(()),
                Err(reason) => Err(reason),
            };
            self.moving = None;
            return Some(Report::Adopted(number, ended));
        }
        None
    }

    /// Takes frames that came one behind the other.
    fn frames(&mut self, frames: &[Bytes]) -> Option<Report> {
        let assembly = self.open.as_mut()?;
        let (attempt, at) = (assembly.attempt(), assembly.at());
        let fault = assembly.frames(frames, self.image.as_deref(), &mut self.crew).err()?;
        self.open = None;
        Some(Report::Rejected(attempt, at, fault))
    }

    fn perform(&mut self, job: Job) -> Option<Report> {
        match job {
            Job::Open(attempt, begin, seed) => {
                self.open = None;
                self.verified = None;
                let at = EpochRef { generation: begin.generation, epoch: begin.epoch };
                let opened = match (begin.kind, seed, &self.image) {
                    (EpochKind::Full, Some(seed), _) => Assembly::full(attempt, begin, seed, &*self.provider),
                    (EpochKind::Delta, _, Some(image)) => {
                        Ok(Assembly::delta(attempt, begin, Arc::clone(image.seed())))
                    }
                    _ => Err(Fault { code: RejectCode::NoBase, text: "there is no image".into() }),
                };
                match opened {
                    Ok(assembly) => self.open = Some(assembly),
                    Err(fault) => return Some(Report::Rejected(attempt, at, fault)),
                }
                None
            }
            Job::Frame(frame) => self.frames(&[frame]),
            Job::Device(piece) => {
                self.open.as_mut()?.device(&piece);
                None
            }
            Job::Verify(manifest) => {
                let assembly = self.open.take()?;
                let (attempt, at) = (assembly.attempt(), assembly.at());
                Some(match assembly.verify(&manifest) {
                    Ok((verified, proof)) => {
                        self.verified = Some((verified, attempt, at));
                        Report::Verified(proof)
                    }
                    Err(fault) => Report::Rejected(attempt, at, fault),
                })
            }
            Job::Apply(attempt) => {
                let applied = match self.verified.take() {
                    Some((verified, held, at)) if held == attempt => {
                        if verified.is_full() {
                            // The move was of the image that is replaced; its owner orders another.
                            self.moving = None;
                        }
                        verified.apply_by(&mut self.image, &mut self.crew).map(|()| at)
                    }
                    _ => Err("the verified epoch is gone".to_owned()),
                };
                let at = match applied {
                    Ok(at) => at,
                    Err(reason) => {
                        self.image = None;
                        return Some(Report::ApplyFailed(reason));
                    }
                };
                if let Some(image) = &self.image {
                    self.dump.committed(image);
                }
                Some(Report::Applied(at))
            }
            Job::DiscardEpoch => {
                self.open = None;
                self.verified = None;
                None
            }
            Job::DropImage => {
                (self.open, self.verified, self.image, self.moving) = (None, None, None, None);
                None
            }
            Job::Adopt(number, shared) => {
                self.moving = Some((number, Move::new(shared)));
                None
            }
            Job::TakeImage => Some(Report::Image(self.image.clone())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::AnonymousMemory;
    use std::time::{Duration, Instant};

    /// Linux shows 15 bytes of a thread's name.
    const THREAD: &str = "image resting";

    fn threads() -> usize {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
        let names = tasks.map(|task| std::fs::read_to_string(task.path().join("comm")).unwrap_or_default());
        names.filter(|name| name.trim() == THREAD).count()
    }

    #[tokio::test]
    async fn a_guest_that_is_only_remembered_has_no_thread() {
        let mut hands = Hands::new("resting", Arc::new(AnonymousMemory), Dump::default(), Pool::single());
        hands.give(Job::DropImage).await;
        hands.give(Job::DiscardEpoch).await;
        assert_eq!(threads(), 0);
        for _ in 0..2 {
            hands.give(Job::TakeImage).await;
            assert!(matches!(hands.report().await, Some(Report::Image(None))));
            assert_eq!(threads(), 1);
            hands.give(Job::DropImage).await;
            hands.rest();
            let end = Instant::now() + Duration::from_secs(60);
            while threads() > 0 {
                assert!(Instant::now() < end, "the thread is still there");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    }
}
