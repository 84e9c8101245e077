//! Pages from the primary's encoder into the backup's image: whatever is written, lost, sent again or begun anew, the
//! image is what the guest had at the end of the epoch that was committed last (invariants 2 and 6).
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;
use tokio::sync::mpsc;
use understudy_backup::assembly::Attempt;
use understudy_backup::dump::Dump;
use understudy_backup::image::{AnonymousMemory, Image};
use understudy_backup::worker::{self, Job, Report};
use understudy_primary::encode::Recoder;
use understudy_primary::encode::governor::{Governor, Plan};
use understudy_proto::codec::CodecSet;
use understudy_proto::epoch::EpochKind::{self, Delta, Full};
use understudy_proto::epoch::EpochManifest;
use understudy_proto::frame::{FrameBuilder, FrameTotals};
use understudy_proto::ids::{EpochId, Generation};
use understudy_proto::layout::{MemoryLayout, RamBlock};
use understudy_proto::pool::Pool;
use understudy_proto::rpc::epoch::{Begin, Seed};
use understudy_proto::units::{BlockIndex, PAGE_BYTES, PageData, PageIndex, ZERO_PAGE};

/// More than the cache has room for: pages are pushed out of it.
const PAGES: u64 = 700;
const CACHE_BYTES: usize = 256 * (PAGE_BYTES + 100);

fn seed() -> Arc<Seed> {
    let block = |name: &str, pages: u64| RamBlock { name: name.into(), used_bytes: pages * 4096 };
    let layout = MemoryLayout::new(vec![block("pc.ram", PAGES), block("pc.bios", PAGES)], vec![], 2).unwrap();
    Arc::new(Seed { layout, domain_xml: "<domain/>".into() })
}

type Memory = BTreeMap<(u16, u64), Box<PageData>>;

/// A page that is written: where, and what of it changes.
#[derive(Debug, Clone)]
struct Write {
    block: u16,
    page: u64,
    change: Change,
}

#[derive(Debug, Clone)]
enum Change {
    /// The guest wrote what was there.
    Nothing,
    Zeros,
    Edit(usize, u8),
    Text(u8),
    Noise(u64),
}

impl Write {
    fn apply(&self, memory: &mut Memory) -> (u16, u64, Box<PageData>) {
        let at = (self.block, self.page);
        let content = memory.entry(at).or_insert_with(|| Box::new(ZERO_PAGE));
        match self.change {
            Change::Nothing => {}
            Change::Zeros => content.fill(0),
            Change::Edit(from, byte) => content.iter_mut().skip(from).step_by(131).for_each(|b| *b = byte),
            Change::Text(byte) => {
                content.iter_mut().zip(0u8..=250).for_each(|(b, i)| *b = byte.wrapping_add(i % 7));
            }
            Change::Noise(mut state) => content.iter_mut().for_each(|b| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                *b = state.to_be_bytes()[0];
            }),
        }
        (self.block, self.page, content.clone())
    }
}

fn write() -> impl Strategy<Value = Write> {
    // Some pages again and again, and all of them now and then.
    let page = prop_oneof![3 => 0..60u64, 1 => 0..PAGES];
    let change = prop_oneof![
        1 => Just(Change::Nothing),
        1 => Just(Change::Zeros),
        6 => (0..PAGE_BYTES, any::<u8>()).prop_map(|(at, byte)| Change::Edit(at, byte)),
        1 => any::<u8>().prop_map(Change::Text),
        1 => any::<u64>().prop_map(Change::Noise),
    ];
    (0..2u16, page, change).prop_map(|(block, page, change)| Write { block, page, change })
}

/// What happens to an epoch.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fate {
    /// It arrives.
    Arrives,
    /// The stream breaks after so many of its frames; a new one has it again, whole.
    SentAgain(usize),
    /// It is committed, the answer is lost: a new stream hears that it is there.
    AnswerLost,
    /// The stream breaks after so many frames and the epoch is given up: a full copy follows.
    GivenUp(usize),
    /// Captured and never sent at all: a full copy follows.
    NeverSent,
    /// The capture breaks off in the middle of it: a full copy follows.
    CaptureFails,
    /// The backup's agent is restarted and has nothing any more: a full copy follows.
    BackupRestarts,
    /// A full copy is asked for without need.
    Resync,
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        12 => Just(Fate::Arrives),
        2 => (0usize..6).prop_map(Fate::SentAgain),
        1 => Just(Fate::AnswerLost),
        1 => (0usize..6).prop_map(Fate::GivenUp),
        1 => Just(Fate::NeverSent),
        1 => Just(Fate::CaptureFails),
        1 => Just(Fate::BackupRestarts),
        1 => Just(Fate::Resync),
    ]
}

/// Both ends, without a link.
struct Pair {
    recoder: Recoder,
    jobs: mpsc::Sender<Job>,
    reports: mpsc::Receiver<Report>,
    seed: Arc<Seed>,
    attempt: u64,
    epoch: EpochId,
}

/// An epoch as it is kept until it is acknowledged.
struct Sent {
    begin: Begin,
    frames: Vec<Bytes>,
    totals: FrameTotals,
}

impl Pair {
    fn new(plan: Plan, threads: usize) -> Self {
        let pool = Pool::new("test", threads).unwrap();
        let (jobs, reports) =
            worker::start("test", Arc::new(AnonymousMemory), Dump::default(), pool).unwrap();
        let recoder = Recoder::new(Governor::fixed(plan), CACHE_BYTES, Arc::default(), Arc::default());
        Self { recoder, jobs, reports, seed: seed(), attempt: 0, epoch: EpochId(0) }
    }

    /// Captures and encodes an epoch, or only so many of its pages.
    fn encode(
        &mut self,
        kind: EpochKind,
        codecs: CodecSet,
        pages: &[(u16, u64, Box<PageData>)],
    ) -> (Sent, FrameTotals) {
        self.epoch = self.epoch.next();
        let begin = Begin { generation: Generation(3), epoch: self.epoch, kind };
        self.recoder.begin(begin.generation, begin.epoch, kind, codecs, 1.0);
        if kind == Full {
            self.recoder.layout(&self.seed.layout);
        }
        let (mut raw, mut frames) = (FrameBuilder::new(), Vec::new());
        for (block, page, content) in pages {
            if let Some(frame) = raw.push(BlockIndex(*block), PageIndex::new(*page), Some(content)) {
                self.recoder.frame(frame, &mut frames).unwrap();
            }
        }
        let (last, totals) = raw.finish();
        if let Some(frame) = last {
            self.recoder.frame(frame, &mut frames).unwrap();
        }
        (Sent { begin, frames, totals }, totals)
    }

    fn finish(&mut self, (mut sent, raw): (Sent, FrameTotals)) -> Sent {
        let (last, totals) = self.recoder.finish(raw);
        sent.frames.extend(last);
        Sent { totals, ..sent }
    }

    fn job(&self, job: Job) {
        self.jobs.blocking_send(job).unwrap();
    }

    /// Sends an epoch, all of it or so many frames.
    fn send(&mut self, sent: &Sent, frames: usize) {
        self.attempt += 1;
        let seed = (sent.begin.kind == Full).then(|| Arc::clone(&self.seed));
        self.job(Job::Open(Attempt(self.attempt), sent.begin, seed));
        for frame in sent.frames.iter().take(frames) {
            self.job(Job::Frame(frame.clone()));
        }
    }

    /// Sends an epoch and has it committed and applied; gives what the backup says against it.
    fn commit(&mut self, sent: &Sent) -> Result<(), String> {
        self.send(sent, usize::MAX);
        let device = Bytes::from_static(b"device");
        self.job(Job::Device(device.clone()));
        let Begin { generation, epoch, kind } = sent.begin;
        self.job(Job::Verify(EpochManifest::new(generation, epoch, kind, &sent.totals, &device)));
        match self.reports.blocking_recv() {
            Some(Report::Verified(proof)) if proof.attempt() == Attempt(self.attempt) => {}
            other => return Err(format!("{kind:?} epoch {epoch}: {other:?}")),
        }
        self.job(Job::Apply(Attempt(self.attempt)));
        match self.reports.blocking_recv() {
            Some(Report::Applied(at)) if at.epoch == epoch => Ok(()),
            other => Err(format!("{kind:?} epoch {epoch}: {other:?}")),
        }
    }

    fn image(&mut self) -> Arc<Image> {
        self.job(Job::TakeImage);
        match self.reports.blocking_recv() {
            Some(Report::Image(Some(image))) => image,
            other => panic!("no image: {other:?}"),
        }
    }

    fn full(&mut self, codecs: CodecSet, memory: &Memory) -> Result<(), String> {
        let pages: Vec<_> =
            memory.iter().map(|((block, page), content)| (*block, *page, content.clone())).collect();
        let captured = self.encode(Full, codecs, &pages);
        let sent = self.finish(captured);
        self.commit(&sent)
    }

    /// One epoch and what becomes of it, up to the next one that is committed.
    fn live(
        &mut self,
        fate: Fate,
        codecs: CodecSet,
        pages: &[(u16, u64, Box<PageData>)],
        memory: &Memory,
    ) -> Result<(), String> {
        if fate == Fate::CaptureFails {
            self.encode(Delta, codecs, &pages[..pages.len() / 2]);
            return self.full(codecs, memory);
        }
        let captured = self.encode(Delta, codecs, pages);
        let sent = self.finish(captured);
        match fate {
            Fate::Arrives | Fate::AnswerLost | Fate::CaptureFails => self.commit(&sent),
            Fate::SentAgain(frames) => {
                self.send(&sent, frames);
                self.commit(&sent)
            }
            Fate::GivenUp(frames) => {
                self.send(&sent, frames);
                self.full(codecs, memory)
            }
            Fate::NeverSent => self.full(codecs, memory),
            Fate::BackupRestarts => {
                self.job(Job::DropImage);
                self.full(codecs, memory)
            }
            Fate::Resync => {
                self.commit(&sent)?;
                self.full(codecs, memory)
            }
        }
    }
}

fn codecs() -> impl Strategy<Value = CodecSet> {
    prop_oneof![
        6 => Just(CodecSet::ALL),
        2 => Just(CodecSet { long_batches: false, ..CodecSet::ALL }),
        1 => Just(CodecSet { xbzrle: true, ..CodecSet::NONE }),
        1 => Just(CodecSet { lz4: true, ..CodecSet::NONE }),
        1 => Just(CodecSet::NONE),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn the_image_is_the_guest_of_the_last_committed_epoch(
        epochs in prop::collection::vec((prop::collection::vec(write(), 0..300), fate(), codecs()), 1..25),
        plan in prop::sample::select(Plan::ALL.to_vec()),
        threads in prop::sample::select(vec![1usize, 3]),
    ) {
        let (mut pair, mut memory) = (Pair::new(plan, threads), Memory::new());
        prop_assert_eq!(pair.full(CodecSet::NONE, &memory), Ok(()));
        for (number, (writes, fate, codecs)) in epochs.iter().enumerate() {
            let pages: Vec<_> = writes.iter().map(|write| write.apply(&mut memory)).collect();
            prop_assert_eq!(pair.live(*fate, *codecs, &pages, &memory), Ok(()), "step {}", number);
            let image = pair.image();
            prop_assert_eq!(image.at().unwrap().epoch, pair.epoch);
            for block in 0..2 {
                for page in 0..PAGES {
                    let expected = memory.get(&(block, page)).map_or(&ZERO_PAGE, |content| content);
                    let is = image.page(BlockIndex(block), PageIndex::new(page)).unwrap();
                    prop_assert!(is == expected, "step {number}: page {page} of block {block}");
                }
            }
        }
    }
}
