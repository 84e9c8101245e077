//! What the backup has of the pages a guest writes again and again: what differences are taken from.
//!
//! **The rule.** A page here is given as known only if it is what the backup will have applied when it decodes the epoch
//! at hand: the content of an epoch before this one, in an unbroken row of deltas. [`PageCache::begin`] forgets
//! everything else, and a page is known at most once an epoch, at its first record.
//!
//! Pages beyond the budget are admitted at their second write (a table of fingerprints remembers the first), and make
//! place for each other by second chance: a page goes when the hand comes by and it was not written since the hand came
//! by before. So a scan through memory does not push out what is rewritten every epoch.

use std::collections::HashMap;

use understudy_proto::epoch::EpochKind;
use understudy_proto::ids::{EpochId, Generation};
use understudy_proto::units::{BlockIndex, PAGE_BYTES, PageData, PageIndex};

/// Pages allocated at a time.
const SLAB_PAGES: usize = 256;

/// What a page costs beside its content: its entries in the index, in the clock, and two fingerprints.
const OVERHEAD_BYTES: usize = 96;

/// A page on a page's border: vector loads then never cross one.
#[derive(Clone)]
#[repr(align(4096))]
struct Aligned(PageData);

#[derive(Debug, Clone, Copy)]
struct Slot {
    key: u64,
    /// Number of the epoch in which it was last written.
    epoch: u64,
    written_since_hand: bool,
}

/// Counters since the cache was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheCounters {
    /// First writes of an epoch that found the page as the backup has it.
    pub hits: u64,
    /// Those that did not.
    pub misses: u64,
    /// Pages that had to go for others.
    pub evicted: u64,
}

/// What is known of a page that is written.
pub enum Known<'a> {
    /// The backup has this, and the page has not been sent in this epoch. To be replaced by the new content.
    Before(&'a mut PageData),
    /// A place for the new content; what is in it says nothing.
    Place(&'a mut PageData),
    /// Neither.
    Nothing,
}

/// [`Known`] by the places of pages, so that several can be looked up before the first of them is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lookup {
    /// As [`Known::Before`].
    Before(usize),
    /// As [`Known::Place`].
    Place(usize),
    /// As [`Known::Nothing`].
    Nothing,
}

impl Lookup {
    /// Where the new content goes.
    pub fn place(self) -> Option<usize> {
        match self {
            Self::Before(at) | Self::Place(at) => Some(at),
            Self::Nothing => None,
        }
    }
}

impl std::fmt::Debug for Known<'_> {
    /// Leaves the guest's bytes out.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Before(_) => "Before",
            Self::Place(_) => "Place",
            Self::Nothing => "Nothing",
        })
    }
}

/// The cache of one guest.
pub struct PageCache {
    max_pages: usize,
    slabs: Vec<Box<[Aligned]>>,
    slots: Vec<Slot>,
    index: HashMap<u64, u32>,
    /// Fingerprints of pages seen once: the key, or `u64::MAX`.
    seen_once: Vec<u64>,
    hand: usize,
    /// What is held belongs to the end of this epoch; `None` if to no epoch's.
    sealed: Option<(Generation, EpochId)>,
    open: Option<(Generation, EpochId)>,
    counters: CacheCounters,
}

impl std::fmt::Debug for PageCache {
    /// Leaves the guest's bytes out.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageCache")
            .field("pages", &self.slots.len())
            .field("max_pages", &self.max_pages)
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}

impl PageCache {
    /// A cache of at most so many bytes, all it needs included.
    pub fn new(budget_bytes: usize) -> Self {
        Self {
            max_pages: budget_bytes / (PAGE_BYTES + OVERHEAD_BYTES) / SLAB_PAGES * SLAB_PAGES,
            slabs: Vec::new(),
            slots: Vec::new(),
            index: HashMap::new(),
            seen_once: Vec::new(),
            hand: 0,
            sealed: None,
            open: None,
            counters: CacheCounters::default(),
        }
    }

    /// An epoch begins. Keeps what is held only if the epoch is the delta right behind the one that was sealed.
    pub fn begin(&mut self, generation: Generation, epoch: EpochId, kind: EpochKind) {
        let before = epoch.0.checked_sub(1).map(|before| (generation, EpochId(before)));
        if kind == EpochKind::Full || before.is_none() || self.sealed != before {
            self.forget();
        }
        self.sealed = None;
        self.open = Some((generation, epoch));
    }

    /// The epoch is whole: every page of it was looked up and, where it had a place, put there.
    pub fn seal(&mut self) {
        self.sealed = self.open.take();
    }

    /// Forgets all content; keeps the memory.
    fn forget(&mut self) {
        self.slots.clear();
        self.index.clear();
        self.hand = 0;
        self.seen_once.fill(u64::MAX);
    }

    /// Forgets all content and gives the memory back.
    pub fn release(&mut self) {
        let (max_pages, counters) = (self.max_pages, self.counters);
        *self = Self { max_pages, counters, ..Self::new(0) };
    }

    /// A page is written with something else than zeros.
    pub fn write(&mut self, block: BlockIndex, page: PageIndex) -> Known<'_> {
        match self.look_up(block, page) {
            Lookup::Before(at) => self.content_mut(at).map_or(Known::Nothing, Known::Before),
            Lookup::Place(at) => self.content_mut(at).map_or(Known::Nothing, Known::Place),
            Lookup::Nothing => Known::Nothing,
        }
    }

    /// [`PageCache::write`] of a page whose content is looked at, and replaced, later: in the order in which the pages were
    /// looked up. Until then its content is as before the epoch, if it is known.
    pub fn look_up(&mut self, block: BlockIndex, page: PageIndex) -> Lookup {
        let (key, epoch) = (key(block, page), self.epoch());
        if let Some(at) = self.index.get(&key).map(|at| *at as usize) {
            let Some(slot) = self.slots.get_mut(at) else { return Lookup::Nothing };
            let again = std::mem::replace(&mut slot.epoch, epoch) == epoch;
            slot.written_since_hand = true;
            if again {
                return Lookup::Place(at);
            }
            self.counters.hits += 1;
            return Lookup::Before(at);
        }
        self.counters.misses += 1;
        let slot = Slot { key, epoch, written_since_hand: false };
        let at = if self.slots.len() < self.max_pages {
            self.slots.push(slot);
            self.slots.len() - 1
        } else if self.max_pages > 0 && self.second_time(key) {
            let at = self.make_place();
            self.slots[at] = slot;
            at
        } else {
            return Lookup::Nothing;
        };
        // A cache has fewer pages than 2^32: they would be 16 TiB.
        self.index.insert(key, u32::try_from(at).unwrap_or(u32::MAX));
        Lookup::Place(at)
    }

    /// A page becomes zeros.
    pub fn zero(&mut self, block: BlockIndex, page: PageIndex) {
        if let Some(page) = self.held(block, page) {
            page.fill(0);
        }
    }

    /// A page is written and sent without its difference: its place, if it has one, for the new content.
    pub fn held(&mut self, block: BlockIndex, page: PageIndex) -> Option<&mut PageData> {
        let at = self.look_up_held(block, page).place()?;
        self.content_mut(at)
    }

    /// [`PageCache::held`] of a page that is replaced later.
    pub fn look_up_held(&mut self, block: BlockIndex, page: PageIndex) -> Lookup {
        let epoch = self.epoch();
        let at = self.index.get(&key(block, page)).map(|at| *at as usize);
        match at.and_then(|at| self.slots.get_mut(at).map(|slot| (at, slot))) {
            Some((at, slot)) => {
                slot.epoch = epoch;
                Lookup::Place(at)
            }
            None => Lookup::Nothing,
        }
    }

    /// What is at a place that was looked up.
    pub fn content(&self, at: usize) -> Option<&PageData> {
        self.slabs.get(at / SLAB_PAGES)?.get(at % SLAB_PAGES).map(|page| &page.0)
    }

    /// Counters since the cache was made.
    pub fn counters(&self) -> CacheCounters {
        self.counters
    }

    /// Bytes it takes now.
    pub fn bytes(&self) -> usize {
        self.slabs.len() * SLAB_PAGES * (PAGE_BYTES + OVERHEAD_BYTES)
    }

    /// Epochs are numbered from 0, slots from 1: a slot of before any epoch is of none.
    fn epoch(&self) -> u64 {
        self.open.map_or(u64::MAX, |(_, epoch)| epoch.0)
    }

    /// What is at a place that was looked up, to be replaced.
    pub fn content_mut(&mut self, at: usize) -> Option<&mut PageData> {
        while self.slabs.len() <= at / SLAB_PAGES {
            self.slabs.push(vec![Aligned([0; PAGE_BYTES]); SLAB_PAGES].into());
        }
        self.slabs.get_mut(at / SLAB_PAGES)?.get_mut(at % SLAB_PAGES).map(|page| &mut page.0)
    }

    /// Whether the page was seen before, as far as the table remembers; remembers it.
    fn second_time(&mut self, key: u64) -> bool {
        if self.seen_once.is_empty() {
            self.seen_once = vec![u64::MAX; (2 * self.max_pages).next_power_of_two()];
        }
        // The upper bits of the product mix all of the key.
        let mixed = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
        let at = usize::try_from(mixed).unwrap_or(0) & (self.seen_once.len() - 1);
        std::mem::replace(&mut self.seen_once[at], key) == key
    }

    /// The slot that is given up; ends, because the hand takes back every second chance on its way.
    fn make_place(&mut self) -> usize {
        loop {
            let at = self.hand;
            self.hand = (self.hand + 1) % self.slots.len();
            let slot = &mut self.slots[at];
            if !std::mem::take(&mut slot.written_since_hand) {
                self.index.remove(&slot.key);
                self.counters.evicted += 1;
                return at;
            }
        }
    }
}

/// Both in one number: a block has at most 2^32 pages.
fn key(block: BlockIndex, page: PageIndex) -> u64 {
    u64::from(block.0) << 48 | page.get()
}

#[cfg(test)]
mod tests;
