//! The thread that encodes the epochs of one guest, in order.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tracing::error;
use understudy_proto::codec::CodecSet;
use understudy_proto::epoch::EpochKind;
use understudy_proto::ids::{EpochId, Generation};
use understudy_proto::pool::Pool;

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
        pool: Pool,
    ) -> std::io::Result<Self> {
        let (jobs, inbox) = sync_channel(JOBS);
        // 15 bytes is all a thread's name may have.
        let name: String = format!("enc-{name}").chars().take(15).collect();
        let recoder = Recoder::new(governor, cache_bytes, link, counters).with_pool(pool);
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
    let (mut cpus, mut is_broken) = (SpareCpus::default(), false);
    while let Ok(mut job) = jobs.recv() {
        if is_broken {
            // What a panic has left behind is not trusted any more; epochs go as they are.
            while let Some(part) = job.from.blocking_recv() {
                if job.to.blocking_send(part).is_err() {
                    break;
                }
            }
            continue;
        }
        let spare = cpus.look();
        let encoded = catch_unwind(AssertUnwindSafe(|| encode(&mut recoder, &mut job, spare)));
        let encoded = encoded.unwrap_or_else(|_| {
            is_broken = true;
            Err("the encoder has failed; see the log".to_owned())
        });
        if let Err(fault) = encoded {
            error!(epoch = %job.epoch, fault, "an epoch cannot be encoded");
            // Nobody takes it any more: it was given up before.
            let _ = job.to.blocking_send(Part::Fault(fault));
        }
    }
}

/// An error is a fault of ours. An epoch that nobody takes any more is none.
fn encode(recoder: &mut Recoder, job: &mut Job, spare_cpus: f64) -> Result<(), String> {
    recoder.begin(job.generation, job.epoch, job.kind, job.codecs, spare_cpus);
    let (mut ready, mut frames, mut behind) = (Vec::new(), Vec::new(), None);
    while let Some(part) = behind.take().or_else(|| job.from.blocking_recv()) {
        let last = match part {
            Part::Seed(seed) => {
                recoder.layout(&seed.layout);
                Some(Part::Seed(seed))
            }
            Part::Frame(frame) => {
                frames.push(frame);
                while behind.is_none() && frames.len() < recoder.group_frames() {
                    match job.from.try_recv() {
                        Ok(Part::Frame(frame)) => frames.push(frame),
                        Ok(part) => behind = Some(part),
                        Err(_) => break,
                    }
                }
                let encoded = recoder.frames(&frames, &mut ready);
                frames.clear();
                encoded.map_err(|fault| format!("a captured frame: {fault}"))?;
                None
            }
            Part::End { device, totals } => {
                let (last, totals) = recoder.finish(totals);
                ready.extend(last);
                Some(Part::End { device, totals })
            }
            Part::Fault(fault) => return Err(fault),
        };
        for part in ready.drain(..).map(Part::Frame).chain(last) {
            if job.to.blocking_send(part).is_err() {
                return Ok(());
            }
        }
    }
    recoder.settle();
    Ok(())
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
    use bytes::Bytes;
    use understudy_proto::frame::FrameBuilder;
    use understudy_proto::layout::{MemoryLayout, RamBlock};
    use understudy_proto::rpc::epoch::Seed;
    use understudy_proto::units::{BlockIndex, PAGE_BYTES, PageIndex};

    use super::*;
    use crate::encode::governor::Plan;

    fn start() -> EncodeThread {
        let governor = Governor::fixed(Plan::DeltaBatch);
        let counters = SharedCounters::default();
        EncodeThread::spawn("test", governor, 1 << 20, Arc::default(), counters, Pool::single()).unwrap()
    }

    /// Sends an epoch of one page through the thread; gives what comes out.
    fn epoch(thread: &EncodeThread, number: u64, kind: EpochKind, page: u64) -> Vec<Part> {
        let ((parts, from), (to, mut out)) = (mpsc::channel(8), mpsc::channel(8));
        let codecs = CodecSet::ALL;
        let (generation, epoch) = (Generation(1), EpochId(number));
        thread.encode(Job { generation, epoch, kind, codecs, from, to }).unwrap();
        if kind == EpochKind::Full {
            let block = RamBlock { name: "pc.ram".into(), used_bytes: 64 << 12 };
            let layout = MemoryLayout::new(vec![block], vec![], 2).unwrap();
            parts.try_send(Part::Seed(Box::new(Seed { layout, domain_xml: String::new() }))).unwrap();
        }
        let mut builder = FrameBuilder::new();
        let frame = builder.push(BlockIndex(0), PageIndex::new(page), Some(&[7; PAGE_BYTES]));
        assert!(frame.is_none());
        let (frame, totals) = builder.finish();
        parts.try_send(Part::Frame(frame.unwrap())).unwrap();
        // After a fault nobody takes it.
        let _ = parts.try_send(Part::End { device: Bytes::new(), totals });
        drop(parts);
        std::iter::from_fn(|| out.blocking_recv()).collect()
    }

    #[test]
    fn a_captured_page_outside_ends_the_epoch_with_a_fault_and_the_next_one_goes_on() {
        let thread = start();
        let sent = |parts: &[Part]| matches!(parts, [.., Part::Frame(_), Part::End { .. }]);
        assert!(sent(&epoch(&thread, 1, EpochKind::Full, 3)));
        assert!(sent(&epoch(&thread, 2, EpochKind::Delta, 3)));
        let parts = epoch(&thread, 3, EpochKind::Delta, 64);
        assert!(matches!(&parts[..], [Part::Fault(text)] if text.contains("page index")), "{parts:?}");
        assert!(sent(&epoch(&thread, 4, EpochKind::Full, 3)));
    }

    #[test]
    fn idle_time_of_all_cpus() {
        let stat = "cpu  81604 12 22403 2119338 4210 0 911 0 0 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n";
        assert_eq!(idle_ticks(stat), Some(2_119_338));
        assert_eq!(idle_ticks("intr 1"), None);
        assert!(SpareCpus::default().look() >= 0.0);
    }
}
