use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const GENERATION: Generation = Generation(1);
const BLOCK: BlockIndex = BlockIndex(0);

fn cache(pages: usize) -> PageCache {
    PageCache::new(pages * (PAGE_BYTES + OVERHEAD_BYTES))
}

/// Writes a page; whether it was known.
fn write(cache: &mut PageCache, page: u64, fill: u8) -> Option<u8> {
    match cache.write(BLOCK, PageIndex::new(page)) {
        Known::Before(content) => Some(std::mem::replace(content, [fill; PAGE_BYTES])[7]),
        Known::Place(place) => {
            place.fill(fill);
            None
        }
        Known::Nothing => None,
    }
}

fn epoch(cache: &mut PageCache, number: u64, pages: impl IntoIterator<Item = u64>) -> u64 {
    let hits = cache.counters().hits;
    cache.begin(GENERATION, EpochId(number), EpochKind::Delta);
    pages.into_iter().for_each(|page| _ = write(cache, page, 1));
    cache.seal();
    cache.counters().hits - hits
}

#[test]
fn only_the_delta_behind_the_sealed_one_finds_anything() {
    type Break = (&'static str, fn(&mut PageCache));
    let breaks: [Break; 5] = [
        ("a full copy", |c| c.begin(GENERATION, EpochId(2), EpochKind::Full)),
        ("a gap", |c| c.begin(GENERATION, EpochId(3), EpochKind::Delta)),
        ("the same number", |c| c.begin(GENERATION, EpochId(1), EpochKind::Delta)),
        ("another owner", |c| c.begin(Generation(2), EpochId(2), EpochKind::Delta)),
        ("an epoch given up", |c| {
            c.begin(GENERATION, EpochId(2), EpochKind::Delta);
            c.begin(GENERATION, EpochId(3), EpochKind::Delta);
        }),
    ];
    for (what, breaks) in breaks {
        let mut cache = cache(SLAB_PAGES);
        assert_eq!(epoch(&mut cache, 1, 0..10), 0);
        breaks(&mut cache);
        assert_eq!(write(&mut cache, 3, 1), None, "{what}");
    }
    let mut cache = cache(SLAB_PAGES);
    epoch(&mut cache, 1, 0..10);
    assert_eq!(epoch(&mut cache, 2, 0..10), 10);
}

#[test]
fn what_is_rewritten_stays_whatever_else_is_written_once() {
    let mut cache = cache(SLAB_PAGES);
    let hot = 0..200;
    epoch(&mut cache, 1, hot.clone());
    for number in 2..200u64 {
        let scan = (0..1000).map(|i| 1_000_000 * number + i);
        let hits = epoch(&mut cache, number, hot.clone().chain(scan));
        assert_eq!(hits, 200, "epoch {number}");
    }
}

#[test]
fn a_new_working_set_is_admitted_at_its_second_write() {
    let mut cache = cache(SLAB_PAGES);
    epoch(&mut cache, 1, 0..256);
    epoch(&mut cache, 2, 1000..1200);
    epoch(&mut cache, 3, 1000..1200);
    let hits = epoch(&mut cache, 4, 1000..1200);
    // Fingerprints may push each other out.
    assert!(hits > 150, "{hits}");
    assert!(cache.bytes() <= SLAB_PAGES * (PAGE_BYTES + OVERHEAD_BYTES));
}

#[test]
fn no_budget_is_no_cache() {
    let mut cache = PageCache::new(0);
    assert_eq!(epoch(&mut cache, 1, 0..10) + epoch(&mut cache, 2, 0..10), 0);
    assert_eq!(cache.bytes(), 0);
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64, u8),
    Zero(u64),
    Next,
    GiveUp,
    Full,
    Release,
}

proptest! {
    /// What is given as known is always what a backup that applies whole epochs in order has.
    #[test]
    fn known_is_what_the_backup_has(steps in prop::collection::vec(prop_oneof![
        40 => (0u64..600, any::<u8>()).prop_map(|(page, fill)| Step::Write(page, fill)),
        4 => (0u64..600).prop_map(Step::Zero),
        3 => Just(Step::Next),
        1 => Just(Step::GiveUp),
        1 => Just(Step::Full),
        1 => Just(Step::Release),
    ], 1..3000)) {
        let mut cache = cache(SLAB_PAGES);
        let (mut backup, mut staged, mut number) = (BTreeMap::new(), BTreeMap::new(), 1);
        cache.begin(GENERATION, EpochId(number), EpochKind::Delta);
        for step in steps {
            match step {
                Step::Write(page, fill) => {
                    if let Some(known) = write(&mut cache, page, fill) {
                        prop_assert!(!staged.contains_key(&page), "known twice in an epoch");
                        prop_assert_eq!(backup.get(&page), Some(&known));
                    }
                    staged.insert(page, fill);
                }
                Step::Zero(page) => {
                    cache.zero(BLOCK, PageIndex::new(page));
                    staged.insert(page, 0);
                }
                Step::Next => {
                    cache.seal();
                    backup.append(&mut staged);
                    number += 1;
                    cache.begin(GENERATION, EpochId(number), EpochKind::Delta);
                }
                Step::GiveUp | Step::Full => {
                    // A full copy follows, in which every page is as it is now; its pages are not looked up.
                    backup.append(&mut staged);
                    number += 1;
                    cache.begin(GENERATION, EpochId(number), EpochKind::Full);
                    cache.seal();
                    number += 1;
                    cache.begin(GENERATION, EpochId(number), EpochKind::Delta);
                }
                Step::Release => {
                    cache.seal();
                    cache.release();
                    backup.append(&mut staged);
                    number += 1;
                    cache.begin(GENERATION, EpochId(number), EpochKind::Delta);
                }
            }
        }
    }
}
