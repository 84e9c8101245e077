//! The memory of a guest as of one committed epoch, with the device state of the same epoch (invariant 2).

pub(crate) mod windows;

use crate::shared::{SharedFile, SharedMemory};
use crate::sys::ZeroedMemory;
use bytes::Bytes;
use std::fmt;
use std::sync::Arc;
use understudy_proto::ProtocolError;
use understudy_proto::codec;
use understudy_proto::frame::{Codec, Record};
use understudy_proto::layout::{MemoryLayout, RamBlock};
use understudy_proto::rpc::epoch::{EpochRef, Seed};
use understudy_proto::units::{BlockIndex, PAGE_BYTES, PageData, PageIndex};

/// Memory of one RAM block.
pub trait BlockMemory: Send + Sync {
    /// All of it.
    fn bytes(&self) -> &[u8];
    /// All of it, to be written.
    fn bytes_mut(&mut self) -> &mut [u8];
    /// Moves a part of it into a file, at the same offset; the content stays as it is.
    ///
    /// # Errors
    /// If that cannot be done; nothing has moved then.
    fn share(&mut self, from_bytes: usize, len_bytes: usize, file: &std::fs::File) -> std::io::Result<()>;
}

impl BlockMemory for ZeroedMemory {
    fn bytes(&self) -> &[u8] {
        self.bytes()
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        self.bytes_mut()
    }

    fn share(&mut self, from_bytes: usize, len_bytes: usize, file: &std::fs::File) -> std::io::Result<()> {
        self.share(from_bytes, len_bytes, file)
    }
}

/// Bytes moved into a shared file at a time: short enough to keep epochs from waiting, and what a move needs beside
/// the memory itself.
const MOVE_BYTES: u64 = 4 << 20;

/// A move of an image into the memory of a standby, one step at a time. Between two steps the image is whole and can
/// be written, read and taken like any other.
#[derive(Debug)]
pub struct Move {
    into: Arc<SharedMemory>,
    /// Where the image, or a part of it, was before; given back as the move goes on.
    before: Option<Arc<SharedMemory>>,
    file: usize,
    offset_bytes: u64,
}

impl Move {
    /// One that has not begun.
    pub fn new(into: Arc<SharedMemory>) -> Self {
        Self { into, before: None, file: 0, offset_bytes: 0 }
    }
}

/// Where the memory of images comes from.
pub trait MemoryProvider: Send + Sync {
    /// Zeroed memory of the block's size. Pages nobody writes should cost nothing.
    ///
    /// # Errors
    /// If the host has not enough.
    fn allocate(&self, block: &RamBlock) -> std::io::Result<Box<dyn BlockMemory>>;

    /// Bytes that can be had without harm to the host; asked before the first block of an image.
    ///
    /// # Errors
    /// If that is not known.
    fn available_bytes(&self) -> std::io::Result<u64>;
}

/// Anonymous memory of this process.
#[derive(Debug, Clone, Copy, Default)]
pub struct AnonymousMemory;

impl MemoryProvider for AnonymousMemory {
    fn allocate(&self, block: &RamBlock) -> std::io::Result<Box<dyn BlockMemory>> {
        let len_bytes = usize::try_from(block.used_bytes)
            .map_err(|_| std::io::Error::from(std::io::ErrorKind::OutOfMemory))?;
        Ok(Box::new(ZeroedMemory::new(len_bytes)?))
    }

    fn available_bytes(&self) -> std::io::Result<u64> {
        crate::host::free_memory_bytes()
    }
}

struct Block {
    memory: Box<dyn BlockMemory>,
    /// A bit per page that was ever written; the others are zero without having been touched.
    written: Vec<u64>,
}

/// See [`Image::apply`]; `index` is of the page among these.
fn put(
    record: &Record<'_>,
    index: Option<usize>,
    pages: &mut [PageData],
    written: &mut [u64],
) -> Result<(), ProtocolError> {
    let index = index.ok_or_else(|| outside(record))?;
    let (Some(memory), Some(word)) = (pages.get_mut(index), written.get_mut(index / 64)) else {
        return Err(outside(record));
    };
    let bit = 1 << (index % 64);
    match record.codec {
        Codec::Unchanged => return Ok(()),
        Codec::Zero if *word & bit == 0 => return Ok(()),
        Codec::Zero => {}
        _ => *word |= bit,
    }
    codec::apply(record, memory)
}

fn outside(record: &Record<'_>) -> ProtocolError {
    ProtocolError::invalid("page index", format!("{} of block {}", record.page, record.block))
}

/// The image of a guest.
pub struct Image {
    seed: Arc<Seed>,
    blocks: Vec<Block>,
    device: Bytes,
    at: Option<EpochRef>,
    /// The standby's memory that all of its blocks are in.
    shared: Option<Arc<SharedMemory>>,
}

impl fmt::Debug for Image {
    /// Leaves the guest's bytes out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image")
            .field("at", &self.at)
            .field("blocks", &self.blocks.len())
            .field("device_bytes", &self.device.len())
            .finish()
    }
}

impl Image {
    /// An image of zeros that belongs to no epoch yet.
    ///
    /// # Errors
    /// If the host has not enough memory, naming the block.
    pub fn new(seed: Arc<Seed>, provider: &dyn MemoryProvider) -> std::io::Result<Self> {
        let (total_bytes, available_bytes) = (seed.layout.total_bytes(), provider.available_bytes()?);
        if total_bytes > available_bytes {
            return Err(std::io::Error::new(
                std::io::ErrorKind::OutOfMemory,
                format!(
                    "the guest has {total_bytes} bytes of memory, this host has {available_bytes} available"
                ),
            ));
        }
        let blocks = seed
            .layout
            .blocks()
            .iter()
            .map(|b| {
                let memory = provider.allocate(b).map_err(|e| {
                    std::io::Error::new(
                        e.kind(),
                        format!("{} bytes for RAM block {} cannot be had: {e}", b.used_bytes, b.name),
                    )
                })?;
                // The block was allocated, so its pages fit into a usize.
                let words = memory.bytes().len() / PAGE_BYTES / 64 + 1;
                Ok(Block { memory, written: vec![0; words] })
            })
            .collect::<std::io::Result<_>>()?;
        Ok(Self { seed, blocks, device: Bytes::new(), at: None, shared: None })
    }

    /// Goes on with a move; `Ok(true)` once the image is in the standby's memory.
    ///
    /// # Errors
    /// In words. The image stays whole, but it is not in the standby's memory.
    pub fn move_step(&mut self, step: &mut Move) -> Result<bool, String> {
        if self.shared.as_ref().is_some_and(|shared| Arc::ptr_eq(shared, &step.into)) {
            return Ok(true);
        }
        if let Some(before) = self.shared.take() {
            step.before = Some(before);
        }
        let layout = &self.seed.layout;
        let fitting = step.into.fit(layout)?;
        let Some((index, file)) = fitting.get(step.file) else {
            self.shared = Some(Arc::clone(&step.into));
            step.before = None;
            return Ok(true);
        };
        let total = layout.block(*index).map(|block| block.used_bytes).unwrap_or_default();
        let len = MOVE_BYTES.min(total - step.offset_bytes.min(total));
        let memory = self.blocks.get_mut(usize::from(index.0)).map(|block| &mut block.memory);
        let memory = memory.ok_or_else(|| format!("the image has no block {index}"))?;
        let range = usize::try_from(step.offset_bytes).ok().zip(usize::try_from(len).ok());
        let (from, len_bytes) = range.ok_or("the block is larger than this process can map")?;
        file.reserve(step.offset_bytes, len)
            .and_then(|()| memory.share(from, len_bytes, file.file()))
            .map_err(|e| format!("{len} bytes at {from} of RAM block {} cannot be shared: {e}", file.name))?;
        let same = |old: &&(BlockIndex, &SharedFile)| old.0 == *index;
        let before = step.before.as_ref().and_then(|before| before.fit(layout).ok());
        if let Some((_, old)) = before.as_ref().and_then(|files| files.iter().find(same))
            && let Err(e) = old.release(step.offset_bytes, len)
        {
            tracing::debug!(error = %e, "memory of the standby before is not given back yet");
        }
        step.offset_bytes += len;
        if step.offset_bytes >= total {
            (step.file, step.offset_bytes) = (step.file + 1, 0);
        }
        Ok(false)
    }

    /// The standby's memory that this image is in: what the standby has needs no other way to it.
    pub fn shared(&self) -> Option<&Arc<SharedMemory>> {
        self.shared.as_ref()
    }

    /// Makes a page what a record says; a page of zeros that was never written before is not touched.
    ///
    /// # Errors
    /// If the layout has no such page, or the record does not decode: then the page is neither old nor new.
    pub fn apply(&mut self, record: &Record<'_>) -> Result<(), ProtocolError> {
        let Record { block, page, .. } = *record;
        self.seed.layout.check_page(block, page)?;
        let target = self.blocks.get_mut(usize::from(block.0)).ok_or_else(|| outside(record))?;
        let (pages, _) = target.memory.bytes_mut().as_chunks_mut::<PAGE_BYTES>();
        put(record, usize::try_from(page.get()).ok(), pages, &mut target.written)
    }

    /// A page as it is.
    pub fn page(&self, block: BlockIndex, page: PageIndex) -> Option<&PageData> {
        let bytes = self.blocks.get(usize::from(block.0))?.memory.bytes();
        bytes.as_chunks::<PAGE_BYTES>().0.get(usize::try_from(page.get()).ok()?)
    }

    /// Makes the image that of an epoch.
    pub fn set_epoch(&mut self, at: EpochRef, device: Bytes) {
        self.at = Some(at);
        self.device = device;
    }

    /// The epoch it is of; `None` until the first is complete.
    pub fn at(&self) -> Option<EpochRef> {
        self.at
    }

    /// What it was seeded with: layout and domain XML.
    pub fn seed(&self) -> &Arc<Seed> {
        &self.seed
    }

    /// RAM blocks and their order.
    pub fn layout(&self) -> &MemoryLayout {
        &self.seed.layout
    }

    /// Device state of the epoch.
    pub fn device(&self) -> &Bytes {
        &self.device
    }

    /// The memory of all blocks, in the layout's order.
    pub fn blocks(&self) -> impl Iterator<Item = (BlockIndex, &RamBlock, &[u8])> {
        (0..)
            .map(BlockIndex)
            .zip(self.seed.layout.blocks())
            .zip(&self.blocks)
            .map(|((index, block), held)| (index, block, held.memory.bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seed() -> Arc<Seed> {
        let block = |name: &str, pages: u64| RamBlock { name: name.into(), used_bytes: pages * 4096 };
        let layout = MemoryLayout::new(vec![block("pc.ram", 70), block("pc.bios", 2)], vec![], 2).unwrap();
        Arc::new(Seed { layout, domain_xml: "<domain/>".into() })
    }

    fn record(block: u16, page: u64, content: Option<&PageData>) -> Record<'_> {
        let (codec, payload) = match content {
            Some(content) => (Codec::Raw, &content[..]),
            None => (Codec::Zero, &[][..]),
        };
        Record { block: BlockIndex(block), page: PageIndex::new(page), codec, payload }
    }

    #[test]
    fn records_by_reference_change_the_page_that_is_there() {
        let mut image = Image::new(seed(), &AnonymousMemory).unwrap();
        let (block, page) = (BlockIndex(0), PageIndex::new(3));
        let reference = |codec, payload| Record { block, page, codec, payload };
        image.apply(&reference(Codec::Unchanged, &[])).unwrap();
        // Over a page that was never written: it is zeros, and counts as written from then on.
        image.apply(&reference(Codec::Xbzrle, &[1, 2, 7, 8])).unwrap();
        image.apply(&reference(Codec::Xbzrle, &[2, 1, 9])).unwrap();
        image.apply(&reference(Codec::Unchanged, &[])).unwrap();
        assert_eq!(image.page(block, page).unwrap()[..5], [0, 7, 9, 0, 0]);
        image.apply(&record(0, 3, None)).unwrap();
        assert_eq!(image.page(block, page), Some(&[0; PAGE_BYTES]));
    }

    /// Counts the pages that are in memory.
    fn resident_pages(image: &Image) -> u64 {
        let start = image.blocks[0].memory.bytes().as_ptr() as usize;
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut lines = maps.lines().skip_while(|l| {
            let Some((from, to)) = l.split(' ').next().and_then(|r| r.split_once('-')) else { return true };
            match (usize::from_str_radix(from, 16), usize::from_str_radix(to, 16)) {
                (Ok(from), Ok(to)) => !(from..to).contains(&start),
                _ => true,
            }
        });
        let rss = lines.find_map(|l| l.strip_prefix("Rss:")).unwrap();
        rss.trim().split(' ').next().unwrap().parse::<u64>().unwrap() / 4
    }

    #[test]
    fn zero_pages_of_a_fresh_image_touch_no_memory() {
        let block = RamBlock { name: "pc.ram".into(), used_bytes: 64 << 20 };
        let layout = MemoryLayout::new(vec![block], vec![], 2).unwrap();
        let seed = Arc::new(Seed { layout, domain_xml: "<domain/>".into() });
        let mut image = Image::new(seed, &AnonymousMemory).unwrap();
        for i in 0..(64 << 20) / 4096 {
            image.apply(&record(0, i, None)).unwrap();
        }
        // The kernel may have merged our mapping with a small neighbour.
        assert!(resident_pages(&image) < 4096, "{} pages", resident_pages(&image));
    }

    #[test]
    fn the_last_write_of_a_page_wins() {
        let mut image = Image::new(seed(), &AnonymousMemory).unwrap();
        for content in [Some([1; PAGE_BYTES]), None, Some([2; PAGE_BYTES]), None] {
            image.apply(&record(0, 69, content.as_ref())).unwrap();
            let (_, _, memory) = image.blocks().next().unwrap();
            assert!(memory[69 * 4096..] == content.unwrap_or([0; PAGE_BYTES]));
            assert!(memory[..69 * 4096].iter().all(|b| *b == 0));
        }
    }

    #[test]
    fn pages_outside_are_refused() {
        let mut image = Image::new(seed(), &AnonymousMemory).unwrap();
        for (block, page) in [(2, 0), (1, 2), (1, u64::MAX)] {
            assert!(image.apply(&record(block, page, None)).is_err());
            assert!(image.page(BlockIndex(block), PageIndex::new(page)).is_none());
        }
    }
}
