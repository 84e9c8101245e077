//! The guest: a server whose memory is a few counters, one to a page.

use bytes::Bytes;
use understudy_backup::image::Image;
use understudy_proto::layout::{MemoryLayout, RamBlock};
use understudy_proto::rpc::epoch::Seed;
use understudy_proto::units::{BlockIndex, PAGE_BYTES, PageData, PageIndex};

/// Pages of the guest.
pub(crate) const PAGES: usize = 4;

/// All of its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Memory(pub(crate) [u64; PAGES]);

impl Memory {
    pub(crate) fn new() -> Self {
        Self([0, 1, 0, 0])
    }

    /// Requests that were served.
    pub(crate) fn served(&self) -> u64 {
        self.0[0]
    }

    /// What has happened to the guest, in a number: two guests that have served as many requests differ in it.
    pub(crate) fn history(&self) -> u64 {
        self.0[1]
    }

    /// Serves the next request; what is written is all but the last page.
    pub(crate) fn serve(&mut self, chance: u64) -> u8 {
        self.0[0] += 1;
        self.0[1] = mix(self.0[1] ^ chance);
        self.0[2] = self.0[0] ^ self.0[1];
        0b0111
    }

    /// Time passes.
    pub(crate) fn tick(&mut self) -> u8 {
        self.0[3] += 1;
        0b1000
    }

    /// One page as it is in memory.
    pub(crate) fn page(&self, index: usize) -> PageData {
        let mut page = [0; PAGE_BYTES];
        page[..8].copy_from_slice(&self.0[index].to_le_bytes());
        page
    }

    /// What an image holds.
    pub(crate) fn of(image: &Image) -> Self {
        let word = |index: usize| {
            let page = image.page(BlockIndex(0), PageIndex::new(index as u64));
            page.map_or(0, |page| u64::from_le_bytes(page[..8].try_into().expect("eight bytes")))
        };
        Self(std::array::from_fn(word))
    }
}

fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb) | 1
}

/// How the guest is described to a backup.
pub(crate) fn seed() -> Seed {
    let block = RamBlock { name: "pc.ram".to_owned(), used_bytes: (PAGES * PAGE_BYTES) as u64 };
    let layout = MemoryLayout::new(vec![block], vec![1], 2).expect("a layout");
    Seed { layout, domain_xml: "<domain/>".to_owned() }
}

/// The device state of a capture: its number.
pub(crate) fn device(capture: u64) -> Bytes {
    capture.to_le_bytes().to_vec().into()
}

/// Which capture an image is of.
pub(crate) fn capture_of(image: &Image) -> u64 {
    image.device()[..].try_into().map_or(0, u64::from_le_bytes)
}

/// What a QEMU is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A standby that waits for its stream.
    Waiting,
    /// A standby that has it, and the capture it is of.
    Loaded(u64),
    /// A guest that runs, or is stopped.
    Active,
}

/// A QEMU.
#[derive(Debug, Clone)]
pub(crate) struct Qemu {
    pub(crate) kind: Kind,
    pub(crate) instance: u16,
    pub(crate) generation: u64,
    pub(crate) memory: Memory,
    /// Pages written since the last capture took them.
    pub(crate) dirty: u8,
    /// A checkpoint has stopped it.
    pub(crate) stopped: bool,
    /// Somebody has paused it.
    pub(crate) paused: bool,
    pub(crate) hung: bool,
    pub(crate) colo: bool,
    /// Frames it has sent.
    pub(crate) frames: u64,
    /// Since when a checkpoint has it stopped.
    pub(crate) stopped_since: u64,
}

impl Qemu {
    pub(crate) fn standby() -> Self {
        Self {
            kind: Kind::Waiting,
            instance: 0,
            generation: 0,
            memory: Memory::new(),
            dirty: 0,
            stopped: false,
            paused: false,
            hung: false,
            colo: false,
            frames: 0,
            stopped_since: 0,
        }
    }

    pub(crate) fn runs(&self) -> bool {
        self.kind == Kind::Active && !self.stopped && !self.paused && !self.hung
    }
}

/// What the guest was when it was stopped for an epoch, found out without the code that captures it.
#[derive(Debug, Clone)]
pub(crate) struct Truth {
    pub(crate) generation: u64,
    pub(crate) epoch: u64,
    pub(crate) instance: u16,
    pub(crate) memory: Memory,
    /// Frames the instance had sent.
    pub(crate) frames: u64,
    pub(crate) committed: bool,
}
