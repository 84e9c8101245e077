//! The thread that encodes the epochs of one guest, in order.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tracing::error;
use understudy_proto::codec::CodecSet;
use understudy_proto::epoch::EpochKind;
use understudy_proto::ids::{EpochId, Generation};

use super::governor::Governor;
use super::{LinkMeter, Recoder, SharedCounters};
use crate::replicate::Part;

/// Epochs that wait. There is one at a time, and the one before it, given up, may still be read to its end.
const JOBS: usize = 4;

/// How often the host's CPUs are looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);

/// An epoch to encode.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) generation: Generation,
    pub(crate) epoch: EpochId,
    pub(crate) kind: EpochKind,
    /// What both sides have agreed on.
    pub(crate) codecs: CodecSet,
    /// As captured.
    pub(crate) from: mpsc::Receiver<Part>,
    /// As sent.
    pub(crate) to: mpsc::Sender<Part>,
}

/// The thread's handle. The thread ends when it is dropped.
#[derive(Debug, Clone)]
pub struct EncodeThread {
    jobs: SyncSender<Job>,
}

impl EncodeThread {
    /// Starts it.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn spawn(
        name: &str,
        governor: Governor,
        cache_bytes: usize,
        link: Arc<LinkMeter>,
        counters: SharedCounters,
    ) -> std::io::Result<Self> {
        let (jobs, inbox) = sync_channel(JOBS);
        // 15 bytes is all a thread's name may have.
        let name: String = format!("enc-{name}").chars().take(15).collect();
        let recoder = Recoder::new(governor, cache_bytes, link, counters);
        std::thread::Builder::new().name(name).spawn(move || run(recoder, &inbox))?;
        Ok(Self { jobs })
    }

    /// Gives it an epoch; the job comes back if the thread takes none.
    pub(crate) fn encode(&self, job: Job) -> Result<(), Job> {
        self.jobs.try_send(job).map_err(|refused| match refused {
            std::sync::mpsc::TrySendError::Full(job) | std::sync::mpsc::TrySendError::Disconnected(job) => {
                job
            }
        })
    }
}

fn run(mut recoder: Recoder, jobs: &Receiver<Job>) {
    let mut cpus = SpareCpus::default();
    while let Ok(job) = jobs.recv() {
        let Job { generation, epoch, kind, codecs, mut from, to } = job;
        recoder.begin(generation, epoch, kind, codecs, cpus.look());
        let mut ready = Vec::new();
        while let Some(part) = from.blocking_recv() {
            let last = match part {
                Part::Seed(seed) => {
                    recoder.layout(&seed.layout);
                    Some(Part::Seed(seed))
                }
                Part::Frame(frame) => {
                    if let Err(fault) = recoder.frame(frame, &mut ready) {
                        // The epoch ends here; the stream sees it broken off, and a full copy follows.
                        error!(%epoch, %fault, "a captured frame cannot be encoded");
                        break;
                    }
                    None
                }
                Part::End { device, totals } => {
                    let (last, totals) = recoder.finish(totals);
                    ready.extend(last);
                    Some(Part::End { device, totals })
                }
            };
            let parts = ready.drain(..).map(Part::Frame).chain(last);
            // Nobody takes the epoch any more: what is left of it is not worth encoding.
            if parts.into_iter().try_for_each(|part| to.blocking_send(part)).is_err() {
                break;
            }
        }
    }
}

/// CPUs of the host that have nothing to do, looked up now and then.
#[derive(Debug, Default)]
struct SpareCpus {
    looked: Option<(Instant, u64)>,
    spare: f64,
}

impl SpareCpus {
    fn look(&mut self) -> f64 {
        let now = Instant::now();
        if self.looked.is_some_and(|(at, _)| now - at < LOOK_INTERVAL) {
            return self.spare;
        }
        let Some(idle) = std::fs::read_to_string("/proc/stat").ok().and_then(|stat| idle_ticks(&stat)) else {
            return self.spare;
        };
        if let Some((at, before)) = self.looked {
            // The kernel counts in hundredths of a second, whatever its own clock.
            self.spare = idle.saturating_sub(before) as f64 / 100.0 / (now - at).as_secs_f64();
        }
        self.looked = Some((now, idle));
        self.spare
    }
}

/// Time all CPUs together were idle: the fourth number of the first line.
fn idle_ticks(stat: &str) -> Option<u64> {
    stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace().nth(3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_time_of_all_cpus() {
        let stat = "cpu  81604 12 22403 2119338 4210 0 911 0 0 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n";
        assert_eq!(idle_ticks(stat), Some(2_119_338));
        assert_eq!(idle_ticks("intr 1"), None);
        assert!(SpareCpus::default().look() >= 0.0);
    }
}
