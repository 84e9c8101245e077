//! Records of the `ram` sections.

use super::config::text;
use super::error::Fault;
use super::wire::{self, Input, Stop};
use crate::frame::PageRecord;
use crate::layout::{MemoryLayout, RamBlock};
use crate::units::{BlockIndex, PAGE_BYTES, PageData, PageIndex};
use crate::{ProtocolError, limits};
use std::sync::Arc;

/// One record.
#[derive(Debug)]
pub(super) enum RamRecord<'a> {
    Page(PageRecord<'a>),
    /// End of the section's payload.
    End,
}

/// What lasts from record to record, over all sections and checkpoints of a connection: QEMU leaves the
/// block's name out as long as it stays the same, also across them.
#[derive(Debug, Clone, Default)]
pub(super) struct RamRecords {
    layout: Option<Arc<MemoryLayout>>,
    current: Option<Current>,
}

/// The current block, resolved once per name.
#[derive(Debug, Clone, Copy)]
struct Current {
    block: BlockIndex,
    pages: u64,
}

impl RamRecords {
    pub(super) fn set_layout(&mut self, layout: Arc<MemoryLayout>) {
        self.layout = Some(layout);
    }

    pub(super) fn layout(&self) -> Option<&Arc<MemoryLayout>> {
        self.layout.as_ref()
    }

    #[inline]
    pub(super) fn read<'a>(&mut self, input: &mut Input<'a>) -> Result<RamRecord<'a>, Stop> {
        let word = input.be64()?;
        let current = match word & wire::FLAGS_MASK {
            f if f == wire::FLAG_PAGE | wire::FLAG_CONTINUE || f == wire::FLAG_ZERO | wire::FLAG_CONTINUE => {
                self.current.ok_or(Fault::NoCurrentBlock { word })?
            }
            wire::FLAG_PAGE | wire::FLAG_ZERO => self.named(input.counted()?)?,
            wire::FLAG_EOS if word == wire::FLAG_EOS => return Ok(RamRecord::End),
            _ => return Err(refuse(word).into()),
        };
        let page = PageIndex::from_offset(word & !wire::FLAGS_MASK)?;
        if page.get() >= current.pages {
            return Err(self.outside(current.block, page).into());
        }
        let content = if word & wire::FLAG_PAGE != 0 {
            Some(input.array::<PAGE_BYTES>()? as &PageData)
        } else {
            match input.u8()? {
                0 => None,
                fill => return Err(Fault::ZeroFill { fill }.into()),
            }
        };
        self.current = Some(current);
        Ok(RamRecord::Page(PageRecord { block: current.block, page, content }))
    }

    fn named(&self, name: &[u8]) -> Result<Current, Fault> {
        self.layout
            .as_ref()
            .and_then(|layout| {
                let block = layout.block_by_name(name)?;
                Some(Current { block, pages: layout.block(block)?.pages() })
            })
            .ok_or_else(|| Fault::UnknownBlock { name: String::from_utf8_lossy(name).into() })
    }

    #[cold]
    fn outside(&self, block: BlockIndex, page: PageIndex) -> Fault {
        let block = self.layout.as_ref().and_then(|l| l.block(block));
        Fault::PageOutside {
            offset: page.offset_bytes(),
            name: block.map(|b| b.name.clone()).unwrap_or_default(),
            used_bytes: block.map_or(0, |b| b.used_bytes),
        }
    }
}

/// Explains a word that is no record we read.
#[cold]
fn refuse(word: u64) -> Fault {
    const REFUSED: [(u64, &str, &str); 4] = [
        (0x040, "XBZRLE", "xbzrle"),
        (0x080, "HOOK", "rdma-pin-all"),
        (0x100, "COMPRESS_PAGE", "compress"),
        (0x200, "MULTIFD_FLUSH", "multifd"),
    ];
    if word & wire::FLAGS_MASK == wire::FLAG_MEM_SIZE {
        return Fault::BlockTable("a block table outside the start of the RAM section");
    }
    REFUSED.iter().find(|(flag, ..)| word & flag != 0).map_or(
        Fault::RamFlags { word },
        |(flag, name, capability)| Fault::Capability {
            capability: (*capability).into(),
            seen: format!("RAM record flag {flag:#05x}, {name}"),
        },
    )
}

/// The block table while it is read.
#[derive(Debug)]
pub(super) struct BlockTable {
    left_bytes: u64,
    blocks: Vec<RamBlock>,
}

impl BlockTable {
    /// Reads the head, the announced sum of all sizes.
    pub(super) fn read(input: &mut Input<'_>) -> Result<Self, Stop> {
        let word = input.be64()?;
        if word & wire::FLAGS_MASK != wire::FLAG_MEM_SIZE {
            return Err(Fault::BlockTable("the RAM section does not start with its block table").into());
        }
        let left_bytes = word & !wire::FLAGS_MASK;
        ProtocolError::check_len("guest RAM bytes", left_bytes, limits::MAX_GUEST_RAM_BYTES)?;
        Ok(Self { left_bytes, blocks: vec![] })
    }

    pub(super) fn is_complete(&self) -> bool {
        self.left_bytes == 0
    }

    /// Reads one entry.
    pub(super) fn read_entry(&mut self, input: &mut Input<'_>) -> Result<(), Stop> {
        let name = text("RAM block name", input.counted()?)?;
        let used_bytes = input.be64()?;
        let count = self.blocks.len() as u64 + 1;
        ProtocolError::check_len("number of RAM blocks", count, limits::MAX_RAM_BLOCKS as u64)?;
        let Some(left_bytes) = self.left_bytes.checked_sub(used_bytes) else {
            return Err(Fault::BlockSum { name: name.into(), used_bytes, left_bytes: self.left_bytes }.into());
        };
        self.blocks.push(RamBlock { name: name.into(), used_bytes });
        self.left_bytes = left_bytes;
        Ok(())
    }

    pub(super) fn layout(&self, config: &[u8], section_id: u32) -> Result<MemoryLayout, ProtocolError> {
        MemoryLayout::new(self.blocks.clone(), config.to_vec(), section_id)
    }
}
