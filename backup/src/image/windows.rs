//! Writing into an image by several threads: each has a part of the memory that no other has.

use super::{Image, put};
use understudy_proto::ProtocolError;
use understudy_proto::frame::Record;
use understudy_proto::pool::Pool;
use understudy_proto::units::{PAGE_BYTES, PageData};

/// Pages that are never parted: their bits of what was written are one word.
const WORD_PAGES: u64 = 64;

/// Pieces for each thread, so that one that has more to do does not keep the others waiting.
const PIECES: usize = 4;

/// A record on its way into the image.
#[derive(Debug)]
struct Item<'a> {
    /// Its place among the others.
    at: usize,
    record: Record<'a>,
    error: Option<ProtocolError>,
}

/// Records in the order of their pages, those of a page in the order in which they came.
fn by_page<'a>(records: &[Record<'a>]) -> Vec<Item<'a>> {
    let item = |(at, record): (usize, &Record<'a>)| Item { at, record: *record, error: None };
    let mut items: Vec<_> = records.iter().enumerate().map(item).collect();
    items.sort_by_key(|item| (item.record.block.0, item.record.page.get()));
    items
}

/// A part of a block, and the records for it.
struct Window<'a, 'r> {
    first_page: u64,
    pages: &'a mut [PageData],
    written: &'a mut [u64],
    items: &'a mut [Item<'r>],
}

impl Window<'_, '_> {
    fn fill(&mut self) {
        for item in &mut *self.items {
            let index = item.record.page.get().checked_sub(self.first_page);
            let index = index.and_then(|index| usize::try_from(index).ok());
            item.error = put(&item.record, index, self.pages, self.written).err();
        }
    }
}

impl Image {
    /// [`Image::apply`] for several records, by the threads of the pool.
    ///
    /// # Errors
    /// The error of the record that came first of those that have one. The others are applied.
    pub(crate) fn apply_all(&mut self, pool: &Pool, records: &[Record<'_>]) -> Result<(), ProtocolError> {
        let mut items = by_page(records);
        let count = items.len().div_ceil(pool.threads() * PIECES).max(1);
        let windows = self.windows(&mut items, count)?;
        let mut threads = vec![(); pool.threads()];
        pool.share(&mut threads, windows.into_iter(), |(), mut window| window.fill());
        let first = items.into_iter().filter_map(|item| item.error.map(|error| (item.at, error)));
        first.min_by_key(|(at, _)| *at).map_or(Ok(()), |(_, error)| Err(error))
    }

    /// Parts of the memory with at least `count` items each, but for the last of a block.
    fn windows<'a, 'r>(
        &'a mut self,
        mut items: &'a mut [Item<'r>],
        count: usize,
    ) -> Result<Vec<Window<'a, 'r>>, ProtocolError> {
        let mut windows = Vec::with_capacity(items.len() / count + self.blocks.len());
        for (number, block) in (0u16..).zip(&mut self.blocks) {
            let (mut pages, _) = block.memory.bytes_mut().as_chunks_mut::<PAGE_BYTES>();
            let mut written = &mut block.written[..];
            let mut first_page = 0;
            loop {
                let region = |item: &Item<'_>| item.record.page.get() / WORD_PAGES;
                let here = items.iter().take_while(|item| item.record.block.0 == number);
                let Some((_, last)) = (1..=count).zip(here).last() else { break };
                let end_region = region(last) + 1;
                let is_inside = |item: &&Item<'_>| item.record.block.0 == number && region(item) < end_region;
                let inside = items.iter().take_while(is_inside).count();
                // What is beyond the end of the block is found when it is written.
                let end_page = end_region.saturating_mul(WORD_PAGES);
                let parted = |all: usize, each: u64| {
                    let wanted = usize::try_from((end_page - first_page) / each);
                    wanted.unwrap_or(usize::MAX).min(all)
                };
                let (to_page, to_word) = (parted(pages.len(), 1), parted(written.len(), WORD_PAGES));
                let (mine, rest) = std::mem::take(&mut pages).split_at_mut(to_page);
                let (bits, rest_bits) = std::mem::take(&mut written).split_at_mut(to_word);
                let (for_it, rest_items) = std::mem::take(&mut items).split_at_mut(inside);
                windows.push(Window { first_page, pages: mine, written: bits, items: for_it });
                (pages, written, items, first_page) = (rest, rest_bits, rest_items, end_page);
            }
        }
        match items.first() {
            None => Ok(windows),
            Some(Item { record, .. }) => {
                let reason = format!("{}, the image has fewer", record.block);
                Err(ProtocolError::invalid("block index", reason))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::AnonymousMemory;
    use proptest::prelude::*;
    use std::sync::Arc;
    use understudy_proto::frame::Codec;
    use understudy_proto::layout::{MemoryLayout, RamBlock};
    use understudy_proto::rpc::epoch::Seed;
    use understudy_proto::units::{BlockIndex, PageIndex};

    const PAGES: [u64; 3] = [1500, 1, 130];

    fn image() -> Image {
        let block = |(number, pages)| RamBlock { name: format!("ram{number}"), used_bytes: pages * 4096 };
        let layout = MemoryLayout::new((0..).zip(PAGES).map(block).collect(), vec![], 2).unwrap();
        Image::new(Arc::new(Seed { layout, domain_xml: "<domain/>".into() }), &AnonymousMemory).unwrap()
    }

    /// Block, page and content of records; few of them, so that some lists have one that is not there.
    fn page_list(blocks: u16, most: usize) -> impl Strategy<Value = Vec<(u16, u64, u8)>> {
        prop::collection::vec((0..blocks, 0u64..1600, 0u8..4), 0..most)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// In one thread and in several, with pages that come twice, and some that are not there.
        #[test]
        fn several_threads_write_what_one_writes(
            pages in prop_oneof![page_list(4, 800), page_list(3, 12)],
            threads in 1usize..5, outside: bool,
        ) {
            let contents = [[0; PAGE_BYTES], [1; PAGE_BYTES], [2; PAGE_BYTES], [3; PAGE_BYTES]];
            let record = |(block, page, fill): &(u16, u64, u8)| {
                let most = PAGES.get(usize::from(*block)).copied().unwrap_or(1);
                let page = PageIndex::new(if outside { *page } else { page % most });
                let block = BlockIndex(if outside { *block } else { *block % 3 });
                let (codec, payload) = match fill {
                    0 => (Codec::Zero, &[][..]),
                    _ => (Codec::Raw, &contents[usize::from(*fill)][..]),
                };
                Record { block, page, codec, payload }
            };
            let records: Vec<_> = pages.iter().map(record).collect();
            let (mut one, mut several) = (image(), image());
            // All are applied, those after an error too.
            let errors: Vec<_> = records.iter().filter_map(|record| one.apply(record).err()).collect();
            let pool = Pool::new("test", threads).unwrap();
            let got = several.apply_all(&pool, &records).err();
            prop_assert_eq!(got.is_some(), !errors.is_empty());
            // A block that is not there is seen before anything is written.
            if got.is_none() || records.iter().all(|record| record.block.0 < 3) {
                let same = |(one, several): (&crate::image::Block, &crate::image::Block)| {
                    one.memory.bytes() == several.memory.bytes() && one.written == several.written
                };
                let all = one.blocks.iter().zip(&several.blocks).all(same);
                prop_assert!(all);
            }
        }
    }
}
