use std::collections::BTreeMap;

use proptest::prelude::*;
use understudy_proto::digest::PagesDigest;
use understudy_proto::layout::RamBlock;
use understudy_proto::units::{BlockIndex, PageIndex, ZERO_PAGE};

use super::*;

const PAGES: u64 = 400;
fn layout() -> MemoryLayout {
    let block = RamBlock { name: "pc.ram".into(), used_bytes: PAGES * PAGE_BYTES as u64 };
    MemoryLayout::new(vec![block], vec![], 2).unwrap()
}

/// A backup: whole epochs only, references over what is committed.
#[derive(Default)]
struct Backup {
    committed: BTreeMap<u64, Box<PageData>>,
}

impl Backup {
    fn commit(&mut self, kind: EpochKind, frames: &[Bytes], totals: FrameTotals) -> Result<(), String> {
        let (mut digest, mut staged, mut pages) = (PagesDigest::new(), BTreeMap::new(), 0);
        let (layout, zero) = (layout(), Box::new(ZERO_PAGE));
        for frame in frames {
            let read = FrameReader::new().read::<ProtocolError>(frame, &layout, |record| {
                let before = self.committed.get(&record.page.get()).unwrap_or(&zero);
                let before = (kind == EpochKind::Delta).then_some(&**before);
                assert!(!record.codec.is_by_reference() || !staged.contains_key(&record.page.get()));
                let mut scratch = [0; PAGE_BYTES];
                let content = codec::decode(&record, before, &mut scratch)?;
                digest.update(record.block, record.page, content);
                staged.insert(record.page.get(), Box::new(*content.unwrap_or(&ZERO_PAGE)));
                pages += 1;
                Ok(())
            });
            read.map_err(|fault| fault.to_string())?;
        }
        let frame_bytes = frames.iter().map(|frame| frame.len() as u64).sum();
        let got = FrameTotals { frames: frames.len() as u64, pages, frame_bytes, digest: digest.finish() };
        if got != totals {
            return Err(format!("{got:?}, announced are {totals:?}"));
        }
        if kind == EpochKind::Full {
            self.committed.clear();
        }
        self.committed.append(&mut staged);
        Ok(())
    }
}

type Pages = Vec<(u64, Box<PageData>)>;

struct Guest {
    recoder: Recoder,
    counters: SharedCounters,
    number: u64,
}

impl Guest {
    fn new(governor: Governor) -> Self {
        Self::with_cache(governor, 300)
    }

    fn with_cache(governor: Governor, cache_pages: usize) -> Self {
        let counters = SharedCounters::default();
        // Fewer pages than the guest has: some are pushed out.
        let mut recoder = Recoder::new(
            governor,
            cache_pages * (PAGE_BYTES + 100),
            Arc::default(),
            SharedCounters::clone(&counters),
        );
        recoder.layout(&layout());
        Self { recoder, counters, number: 0 }
    }

    fn epoch(&mut self, kind: EpochKind, codecs: CodecSet, pages: &Pages) -> (Vec<Bytes>, FrameTotals) {
        self.number += 1;
        self.recoder.begin(Generation(1), EpochId(self.number), kind, codecs, 1.0);
        let (mut raw, mut frames) = (FrameBuilder::new(), vec![]);
        for (page, content) in pages {
            if let Some(frame) = raw.push(BlockIndex(0), PageIndex::new(*page), Some(content)) {
                self.recoder.frame(frame, &mut frames).unwrap();
            }
        }
        let (last, totals) = raw.finish();
        if let Some(frame) = last {
            self.recoder.frame(frame, &mut frames).unwrap();
        }
        let (last, totals) = self.recoder.finish(totals);
        frames.extend(last);
        (frames, totals)
    }

    /// [`Guest::epoch`], so many frames at a time.
    fn grouped(
        &mut self,
        kind: EpochKind,
        codecs: CodecSet,
        pages: &Pages,
        group: usize,
    ) -> (Vec<Bytes>, FrameTotals) {
        self.number += 1;
        self.recoder.begin(Generation(1), EpochId(self.number), kind, codecs, 1.0);
        let (mut raw, mut frames) = (FrameBuilder::new(), vec![]);
        let push = |(page, content): &(u64, Box<PageData>)| {
            raw.push(BlockIndex(0), PageIndex::new(*page), Some(content))
        };
        let mut captured: Vec<_> = pages.iter().filter_map(push).collect();
        let (last, totals) = raw.finish();
        captured.extend(last);
        for group in captured.chunks(group) {
            self.recoder.frames(group, &mut frames).unwrap();
        }
        let (last, totals) = self.recoder.finish(totals);
        frames.extend(last);
        (frames, totals)
    }
}

fn page(page: u64, fill: u8, edit: usize) -> (u64, Box<PageData>) {
    let mut content = Box::new([fill; PAGE_BYTES]);
    content.iter_mut().skip(edit).step_by(97).take(9).for_each(|byte| *byte ^= 0x5a);
    (page, content)
}

#[derive(Debug, Clone)]
enum Step {
    Delta(Vec<(u64, u8, usize)>),
    /// Captured and sent, but dropped by whoever; a full copy follows.
    Lost(Vec<(u64, u8, usize)>),
    /// The other side, or the agreement, is another one.
    Codecs(CodecSet),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let pages = || prop::collection::vec((0..PAGES, 0u8..3, 0usize..200), 0..150);
    prop::collection::vec(
        prop_oneof![
            12 => pages().prop_map(Step::Delta),
            1 => pages().prop_map(Step::Lost),
            1 => any::<(bool, bool, bool)>()
                .prop_map(|(xbzrle, lz4, long)| Step::Codecs(CodecSet { xbzrle, lz4, long_batches: long })),
        ],
        1..30,
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Under every plan, or while it is tried with some of the pages, and whatever is lost between: the backup has what
    /// the guest has.
    #[test]
    fn the_backup_has_what_the_guest_has(
        steps in steps(), plan in prop::sample::select(Plan::ALL.to_vec()), trial: bool,
    ) {
        let governor = if trial { Governor::trying(plan) } else { Governor::fixed(plan) };
        let (mut guest, mut backup) = (Guest::new(governor), Backup::default());
        let (mut memory, mut codecs) = (BTreeMap::new(), CodecSet::ALL);
        let full = |guest: &mut Guest, backup: &mut Backup, memory: &BTreeMap<u64, Box<PageData>>, codecs| {
            let pages = memory.iter().map(|(page, content)| (*page, content.clone())).collect();
            let (frames, totals) = guest.epoch(EpochKind::Full, codecs, &pages);
            backup.commit(EpochKind::Full, &frames, totals)
        };
        prop_assert_eq!(full(&mut guest, &mut backup, &memory, codecs), Ok(()));
        for step in steps {
            match step {
                Step::Delta(pages) => {
                    let pages: Pages = pages.into_iter().map(|(at, fill, edit)| page(at, fill, edit)).collect();
                    let (frames, totals) = guest.epoch(EpochKind::Delta, codecs, &pages);
                    prop_assert_eq!(backup.commit(EpochKind::Delta, &frames, totals), Ok(()));
                    memory.extend(pages);
                }
                Step::Lost(pages) => {
                    let pages: Pages = pages.into_iter().map(|(at, fill, edit)| page(at, fill, edit)).collect();
                    guest.epoch(EpochKind::Delta, codecs, &pages);
                    memory.extend(pages);
                    prop_assert_eq!(full(&mut guest, &mut backup, &memory, codecs), Ok(()));
                }
                Step::Codecs(other) => codecs = other,
            }
            prop_assert!(backup.committed == memory);
        }
    }
}

#[test]
fn what_is_rewritten_shrinks_and_is_counted() {
    let mut guest = Guest::new(Governor::fixed(Plan::Delta));
    let mut bytes = vec![];
    for edit in 0..20 {
        let pages = (0..200).map(|at| page(at, 7, edit)).collect();
        bytes.push(guest.epoch(EpochKind::Delta, CodecSet::ALL, &pages).1.frame_bytes);
    }
    assert!(bytes[1] * 10 < bytes[0], "{bytes:?}");
    let counters = guest.counters.lock().unwrap().clone();
    assert_eq!((counters.cache.hits, counters.cache.misses), (19 * 200, 200));
    assert_eq!(counters.pages[Codec::Xbzrle as usize], 19 * 200);
    let report = counters.report(Compress::Always);
    assert_eq!((report.pages.as_str(), report.plan.as_str()), ("raw 5 %, xbzrle 95 %", "xbzrle"));
    assert!(report.ratio > Some(10.0) && report.cache_hit_rate == Some(0.95), "{report:?}");
}

#[test]
fn an_epoch_that_is_given_up_half_way_leaves_nothing_known() {
    let pages: Pages = (0..200).map(|at| page(at, 7, 1)).collect();
    let hits_after = |is_given_up: bool| {
        // The first frame is tried, the others go as they are.
        let mut guest = Guest::new(Governor::trying(Plan::Delta));
        (0..2).for_each(|_| drop(guest.epoch(EpochKind::Delta, CodecSet::ALL, &pages)));
        if is_given_up {
            guest.number += 1;
            guest.recoder.begin(Generation(1), EpochId(guest.number), EpochKind::Delta, CodecSet::ALL, 1.0);
            let (mut raw, mut frames) = (FrameBuilder::new(), vec![]);
            for (page, content) in &pages {
                let frame = raw.push(BlockIndex(0), PageIndex::new(*page), Some(content));
                frame.into_iter().for_each(|frame| guest.recoder.frame(frame, &mut frames).unwrap());
            }
            assert!(!guest.recoder.behind.is_empty());
        }
        let before = guest.recoder.cache.counters().hits;
        guest.epoch(EpochKind::Delta, CodecSet::ALL, &pages);
        guest.recoder.cache.counters().hits - before
    };
    assert!(hits_after(false) > 0);
    assert_eq!(hits_after(true), 0);
}

#[test]
fn raw_epochs_pass_untouched() {
    let mut guest = Guest::new(Governor::new());
    let pages = (0..200).map(|at| page(at, 7, 3)).collect();
    let (frames, totals) = guest.epoch(EpochKind::Delta, CodecSet::ALL, &pages);
    assert_eq!(totals.frame_bytes, 200 * (RECORD_HEADER_BYTES + PAGE_BYTES) as u64);
    assert_eq!(frames.len() as u64, totals.frames);
    assert_eq!(guest.counters.lock().unwrap().cache_bytes, 0);
}

/// Pages of every kind: rewritten, unchanged, zeros, with a pattern, without one; a page may come again, in its frame or later.
fn group_pages() -> impl Strategy<Value = Pages> {
    let number = prop_oneof![4 => 0..PAGES, 1 => 0..20u64];
    let write = (number, 0u8..3, 0usize..200, 0u8..10).prop_map(|(number, fill, edit, kind)| {
        let (number, mut content) = page(number, fill, edit);
        let mut state = number * 1000 + u64::from(fill) + 1;
        if kind == 0 {
            content.fill(0);
        } else if kind < 4 {
            content.chunks_exact_mut(8).for_each(|word| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                word.copy_from_slice(&state.to_le_bytes());
            });
        }
        (number, content)
    });
    prop::collection::vec(write, 0..600)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever the plan, also while it is tried, the cache, and how frames come in groups: several threads send byte for
    /// byte what one sends, and count the same.
    #[test]
    fn several_threads_send_what_one_sends(
        epochs in prop::collection::vec((group_pages(), 1usize..12), 1..6),
        plan in prop::sample::select(Plan::ALL.to_vec()),
        trial: bool,
        cache_pages in prop::sample::select(vec![0usize, 260, 300, 600]),
    ) {
        let governor = if trial { Governor::trying(plan) } else { Governor::fixed(plan) };
        let mut one = Guest::with_cache(governor.clone(), cache_pages);
        let mut four = Guest::with_cache(governor, cache_pages);
        four.recoder.crew = Crew::new(Pool::new("test", 4).unwrap()).eager();
        for (number, (pages, group)) in epochs.iter().enumerate() {
            let kind = if number == 0 { EpochKind::Full } else { EpochKind::Delta };
            let (expected, totals) = one.epoch(kind, CodecSet::ALL, pages);
            let (frames, got) = four.grouped(kind, CodecSet::ALL, pages, *group);
            prop_assert_eq!(got, totals);
            prop_assert!(frames == expected, "epoch {number} is another one");
            let counters = |guest: &Guest| guest.counters.lock().unwrap().clone();
            prop_assert_eq!(counters(&four), counters(&one));
            let seen = [&one, &four].map(|guest| guest.recoder.seen.unwrap());
            let sizes = seen.map(|seen| [seen.known, seen.fresh, seen.rest].map(|work| (work.pages, work.bytes)));
            prop_assert_eq!(sizes[0], sizes[1]);
            prop_assert!(seen[0].threads == 1.0 && seen[1].threads.is_finite());
        }
    }
}

#[test]
fn what_waits_is_encoded_by_several_threads() {
    let mut guest = Guest::new(Governor::fixed(Plan::Lz4));
    guest.recoder = guest.recoder.with_pool(Pool::new("test", 2).unwrap());
    let pages = (0..PAGES).map(|at| page(at, 7, 3)).collect();
    guest.grouped(EpochKind::Delta, CodecSet::ALL, &pages, 8);
    let seen = guest.recoder.seen.unwrap();
    assert!(seen.fresh.pages == PAGES && seen.fresh.time > Duration::ZERO && seen.threads != 1.0, "{seen:?}");
    // An encoder that keeps up is left alone.
    guest.grouped(EpochKind::Delta, CodecSet::ALL, &pages, 1);
    assert_eq!(guest.recoder.seen.unwrap().threads, 1.0);
}
