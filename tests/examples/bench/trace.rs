//! Epochs as guests make them, from a seed.

use understudy_proto::units::{PAGE_BYTES, PageData};

/// A page that is written, by its number.
pub(crate) type Pages = Vec<(u64, Box<PageData>)>;

/// Where epochs come from.
pub(crate) trait Epochs {
    fn guest_pages(&self) -> u64;

    /// All of memory that matters, for a full copy.
    fn all(&self) -> Pages;

    /// The pages of the next epoch.
    fn epoch(&mut self) -> Pages;
}

/// What a guest does to its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trace {
    /// A few counters and timers in pages that hardly change.
    Idle,
    /// One update of 16 bytes in each of many pages.
    Updates,
    /// Rows in a hot set of tree pages, a journal that is appended to, some pages new.
    Database,
    /// Pages that become zeros and are used again.
    Zeros,
    /// Every page new and without any pattern.
    Random,
}

impl Trace {
    pub(crate) const ALL: [Self; 5] = [Self::Idle, Self::Updates, Self::Database, Self::Zeros, Self::Random];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Updates => "16-byte updates",
            Self::Database => "database",
            Self::Zeros => "zero pages",
            Self::Random => "random",
        }
    }
}

/// Pages of the guest; about as many are in use.
pub(crate) const GUEST_PAGES: u64 = 8192;

/// Makes the epochs of a trace, one after the other.
pub(crate) struct Maker {
    trace: Trace,
    memory: Vec<Box<PageData>>,
    random: Random,
    epoch: u64,
}

/// A generator of small state: the same figures everywhere.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, below: usize) -> usize {
        usize::try_from(self.next() >> 33).unwrap_or(0) % below.max(1)
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
    }
}

impl Maker {
    pub(crate) fn new(trace: Trace, seed: u64) -> Self {
        let mut random = Random(seed | 1);
        let memory = (0..GUEST_PAGES)
            .map(|_| {
                let mut page = Box::new([0; PAGE_BYTES]);
                // As in a heap: words, half of their bytes 0; a part of the page is not used.
                let used = PAGE_BYTES / 4 + random.below(PAGE_BYTES / 2);
                random.fill(&mut page[..used]);
                page[..used].chunks_mut(8).for_each(|word| {
                    if let Some(high) = word.get_mut(4..) {
                        high.fill(0);
                    }
                });
                page
            })
            .collect();
        Self { trace, memory, random, epoch: 0 }
    }
}

impl Epochs for Maker {
    fn guest_pages(&self) -> u64 {
        GUEST_PAGES
    }

    fn epoch(&mut self) -> Pages {
        self.epoch += 1;
        let numbers: Vec<usize> = match self.trace {
            Trace::Idle => (0..60).map(|i| i * 7).collect(),
            Trace::Updates | Trace::Zeros | Trace::Random => {
                (0..1000).map(|_| self.random.below(2000)).collect()
            }
            Trace::Database => {
                let hot = (0..700).map(|_| self.random.below(1500)).collect::<Vec<_>>();
                let journal = usize::try_from(self.epoch).unwrap_or(0) * 24 % 2048;
                let cold = (0..25).map(|_| 4096 + self.random.below(4000)).collect::<Vec<_>>();
                hot.into_iter().chain((0..25).map(|i| 2000 + journal + i)).chain(cold).collect()
            }
        };
        let mut numbers = numbers;
        numbers.sort_unstable();
        numbers.dedup();
        let mut pages = Vec::with_capacity(numbers.len());
        for number in numbers {
            let (trace, epoch) = (self.trace, self.epoch);
            let (Some(page), random) = (self.memory.get_mut(number), &mut self.random) else { continue };
            change(trace, epoch, number, page, random);
            pages.push((number as u64, page.clone()));
        }
        pages
    }

    fn all(&self) -> Pages {
        (0u64..).zip(&self.memory).map(|(number, page)| (number, page.clone())).collect()
    }
}

fn change(trace: Trace, epoch: u64, number: usize, page: &mut PageData, random: &mut Random) {
    let mut write = |len: usize, random: &mut Random| {
        let at = random.below(PAGE_BYTES - len);
        random.fill(&mut page[at..at + len]);
    };
    match trace {
        Trace::Idle => write(8, random),
        Trace::Updates => write(16, random),
        Trace::Database if (2000..4096).contains(&number) => {
            // A journal: records behind each other, text and numbers.
            for (i, byte) in page.iter_mut().enumerate() {
                *byte = if i % 64 < 40 { b"insert into t values "[i % 21] } else { 0 };
            }
            page.chunks_mut(64).for_each(|record| random.fill(&mut record[40..56]));
        }
        Trace::Database => {
            // A row and its place in the page's head, now and then a split.
            let rows = 1 + random.below(4);
            (0..rows).for_each(|_| write(100, random));
            page[..8].copy_from_slice(&epoch.to_le_bytes());
            if random.below(50) == 0 {
                page.copy_within(8..PAGE_BYTES / 2, PAGE_BYTES / 2);
            }
        }
        Trace::Zeros if epoch.is_multiple_of(2) => page.fill(0),
        Trace::Zeros => write(64, random),
        Trace::Random => random.fill(page),
    }
}
