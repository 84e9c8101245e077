//! Makes a trace of what an agent with `--record-dir` has written of a guest.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use understudy_proto::codec;
use understudy_proto::frame::records;
use understudy_proto::layout::{MemoryLayout, RamBlock};
use understudy_proto::units::{PAGE_BYTES, PageData};

use crate::recorded::Recorded;
use crate::trace::Pages;

/// What to make it of.
#[derive(clap::Args)]
pub(crate) struct Order {
    /// `blocks` and `N.frames`
    #[arg(long)]
    from: PathBuf,
    /// Epochs to take, from the first after the full copy
    #[arg(long)]
    epochs: usize,
    /// The trace
    #[arg(long)]
    out: PathBuf,
}

pub(crate) fn run(order: &Order) -> anyhow::Result<()> {
    let layout = layout(&std::fs::read_to_string(order.from.join("blocks"))?)?;
    let full = epoch(&order.from, 0, &layout)?;
    let epochs = (1..=order.epochs).map(|number| epoch(&order.from, number, &layout));
    let (recorded, same) = merge(&layout, full, epochs.collect::<anyhow::Result<_>>()?);
    recorded.write(&order.out)?;
    let mut sizes: Vec<usize> = recorded.epochs.iter().map(Vec::len).collect();
    sizes.sort_unstable();
    println!(
        "{}: {} epochs, median {} pages; {} pages written, {same} of them with what they held, {} different ones, {} KiB",
        order.out.display(),
        recorded.epochs.len(),
        sizes.get(sizes.len() / 2).copied().unwrap_or_default(),
        sizes.iter().sum::<usize>(),
        recorded.base.len(),
        std::fs::metadata(&order.out)?.len() >> 10,
    );
    let again = Recorded::read(&order.out)?;
    ensure!(again.base == recorded.base && again.epochs == recorded.epochs, "the trace does not read back");
    Ok(())
}

/// A line is a block's bytes and its name.
fn layout(blocks: &str) -> anyhow::Result<MemoryLayout> {
    let block = |line: &str| {
        let (bytes, name) = line.split_once(' ').with_context(|| format!("no block: {line}"))?;
        Ok(RamBlock { used_bytes: bytes.parse()?, name: name.to_owned() })
    };
    let blocks = blocks.lines().map(block).collect::<anyhow::Result<_>>()?;
    Ok(MemoryLayout::new(blocks, vec![], 2)?)
}

/// The pages of an epoch, numbered through all blocks; the last content of each.
fn epoch(folder: &Path, number: usize, layout: &MemoryLayout) -> anyhow::Result<Pages> {
    let file = folder.join(format!("{number}.frames"));
    let frames = std::fs::read(&file).with_context(|| file.display().to_string())?;
    let mut pages: BTreeMap<u64, Box<PageData>> = BTreeMap::new();
    for record in records(&frames, layout) {
        let record = record?;
        let mut content = Box::new([0; PAGE_BYTES]);
        codec::apply(&record, &mut content)?;
        let before: u64 = layout.blocks().iter().take(record.block.0.into()).map(RamBlock::pages).sum();
        pages.insert(before + record.page.get(), content);
    }
    Ok(pages.into_iter().collect())
}

/// Of the full copy only the pages matter that an epoch touches; one that is not in it was zeros. Also gives how many pages
/// were written with what they held.
fn merge(layout: &MemoryLayout, full: Pages, epochs: Vec<Pages>) -> (Recorded, usize) {
    let touched: BTreeSet<u64> = epochs.iter().flatten().map(|(number, _)| *number).collect();
    let full: BTreeMap<u64, Box<PageData>> = full.into_iter().collect();
    let content = |number| full.get(&number).cloned().unwrap_or_else(|| Box::new([0; PAGE_BYTES]));
    let base: Pages = touched.into_iter().map(|number| (number, content(number))).collect();
    let mut memory: BTreeMap<u64, &PageData> = base.iter().map(|(number, page)| (*number, &**page)).collect();
    let written = epochs.iter().flatten();
    let same = written.filter(|(number, now)| memory.insert(*number, now) == Some(now)).count();
    let pages = layout.blocks().iter().map(RamBlock::pages).sum();
    (Recorded::new(pages, base, epochs), same)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_touched_pages_are_the_base_and_pages_rewritten_alike_stay() {
        let layout = layout("8192 pc.ram\n4096 a block\n").unwrap();
        let page = |number, byte| (number, Box::new([byte; PAGE_BYTES]));
        let full = vec![page(0, 1), page(1, 2)];
        let (recorded, same) = merge(&layout, full, vec![vec![page(1, 2), page(2, 0)], vec![page(1, 3)]]);
        assert_eq!((recorded.guest_pages, same), (3, 2));
        assert_eq!(recorded.base, [page(1, 2), page(2, 0)]);
        assert_eq!(recorded.epochs, [vec![page(1, 2), page(2, 0)], vec![page(1, 3)]]);
    }

    #[test]
    fn blocks_are_read_and_nonsense_is_refused() {
        assert_eq!(layout("4096 0000:00:02.0/a b\n").unwrap().blocks()[0].name, "0000:00:02.0/a b");
        assert!(layout("pc.ram").is_err());
    }
}
