//! The memory of a guest as QEMU lays it out: what both ends must agree on before the first page.

use crate::units::{BlockIndex, PAGE_BYTES, PageIndex};
use crate::{ProtocolError, limits};

/// One RAM block of QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamBlock {
    /// QEMU's name for it, e.g. `pc.ram` or `/rom@etc/acpi/tables`.
    pub name: String,
    /// Bytes in use; a multiple of the page size.
    pub used_bytes: u64,
}

impl RamBlock {
    /// Pages of the block.
    pub fn pages(&self) -> u64 {
        self.used_bytes / PAGE_BYTES as u64
    }
}

/// Everything a stream for a fresh QEMU needs beside pages and device state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryLayout {
    /// The RAM blocks in QEMU's order; [`BlockIndex`] counts in it.
    blocks: Vec<RamBlock>,
    /// Body of the CONFIGURATION section as the primary's QEMU sent it: machine name, then subsections.
    config: Vec<u8>,
    /// Section id of `ram` on the primary.
    ram_section_id: u32,
}

impl MemoryLayout {
    /// A checked layout.
    ///
    /// # Errors
    /// If a block is empty, not page-sized, named twice, or any of [`limits`] is exceeded.
    pub fn new(blocks: Vec<RamBlock>, config: Vec<u8>, ram_section_id: u32) -> Result<Self, ProtocolError> {
        ProtocolError::check_len("number of RAM blocks", blocks.len() as u64, limits::MAX_RAM_BLOCKS as u64)?;
        ProtocolError::check_len(
            "CONFIGURATION bytes",
            config.len() as u64,
            limits::MAX_CONFIG_BYTES as u64,
        )?;
        if blocks.is_empty() {
            return Err(ProtocolError::Missing { field: "RAM blocks" });
        }
        let mut names = std::collections::HashSet::new();
        let mut total_bytes = 0u64;
        for b in &blocks {
            ProtocolError::check_len(
                "RAM block name bytes",
                b.name.len() as u64,
                limits::MAX_BLOCK_NAME_BYTES as u64,
            )?;
            ProtocolError::check_len("RAM block bytes", b.used_bytes, limits::MAX_BLOCK_BYTES)?;
            if b.used_bytes == 0 || !b.used_bytes.is_multiple_of(PAGE_BYTES as u64) {
                return Err(ProtocolError::invalid(
                    "RAM block size",
                    format!("{} has {} bytes, not a positive multiple of {PAGE_BYTES}", b.name, b.used_bytes),
                ));
            }
            if !names.insert(b.name.as_str()) {
                return Err(ProtocolError::invalid("RAM block name", format!("{} appears twice", b.name)));
            }
            total_bytes += b.used_bytes;
        }
        ProtocolError::check_len("guest RAM bytes", total_bytes, limits::MAX_GUEST_RAM_BYTES)?;
        Ok(Self { blocks, config, ram_section_id })
    }

    /// The RAM blocks in QEMU's order.
    pub fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    /// Body of the CONFIGURATION section.
    pub fn config(&self) -> &[u8] {
        &self.config
    }

    /// Section id of `ram`.
    pub fn ram_section_id(&self) -> u32 {
        self.ram_section_id
    }

    /// Bytes of all blocks.
    pub fn total_bytes(&self) -> u64 {
        self.blocks.iter().map(|b| b.used_bytes).sum()
    }

    /// The block called `name`.
    pub fn block_by_name(&self, name: &[u8]) -> Option<BlockIndex> {
        let i = self.blocks.iter().position(|b| b.name.as_bytes() == name)?;
        u16::try_from(i).ok().map(BlockIndex)
    }

    /// The block with this index, if there is one.
    pub fn block(&self, index: BlockIndex) -> Option<&RamBlock> {
        self.blocks.get(usize::from(index.0))
    }

    /// Checks that the page lies inside the block.
    ///
    /// # Errors
    /// [`ProtocolError::Invalid`] naming block, page and size otherwise.
    pub fn check_page(&self, block: BlockIndex, page: PageIndex) -> Result<(), ProtocolError> {
        let b = self.block(block).ok_or_else(|| {
            ProtocolError::invalid("block index", format!("{block}, the layout has {}", self.blocks.len()))
        })?;
        if page.get() >= b.pages() {
            return Err(ProtocolError::invalid(
                "page index",
                format!("{page} in {}, which has {:#x} pages", b.name, b.pages()),
            ));
        }
        Ok(())
    }
}
