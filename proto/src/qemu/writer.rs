//! Composes the stream that brings a guest up in a fresh `-incoming` QEMU from an image and a device buffer.

use super::config::{Configuration, Subsection};
use super::error::Fault;
use super::vmdesc;
use super::wire;
use crate::layout::MemoryLayout;
use crate::units::{BlockIndex, PAGE_BYTES, PageData, PageIndex, ZERO_PAGE};
use crate::{ProtocolError, limits};
use std::io::{self, Write};
use std::sync::Arc;

/// QEMU's name of the capability that leaves memory in shared files out of the stream.
pub const IGNORE_SHARED: &str = "x-ignore-shared";

/// Why a stream could not be composed.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The sink failed: QEMU has gone, or refused what it read.
    #[error("writing the stream for the incoming QEMU failed: {0}")]
    Io(#[from] io::Error),
    /// What should be written is not valid.
    #[error("cannot compose a stream for the incoming QEMU: {0}")]
    Invalid(#[source] Fault),
}

impl<F: Into<Fault>> From<F> for WriteError {
    fn from(fault: F) -> Self {
        Self::Invalid(fault.into())
    }
}

/// Writes the stream as it goes: pages are passed on from the caller's memory, nothing is collected. Give it
/// a buffered sink; it writes records.
///
/// A QEMU that is not told a page keeps what its own start put there, so every page of every block must be
/// written, in any order.
///
/// Begun with [`Self::new`], all memory goes through the stream. Begun with [`Self::with_shared`], the blocks that
/// the incoming QEMU has in shared files stay out of it: their content is in the files already.
#[derive(Debug)]
pub struct IncomingWriter<W> {
    sink: W,
    layout: Arc<MemoryLayout>,
    /// `None`: `x-ignore-shared` is off.
    shared: Option<Vec<SharedBlock>>,
    current: Option<BlockIndex>,
    totals: Written,
}

/// A RAM block whose content the incoming QEMU has in a shared file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedBlock {
    /// Which.
    pub block: BlockIndex,
    /// Where it begins within the guest's memory region, bytes; QEMU compares it with its own.
    pub address: u64,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Written {
    /// Page records.
    pub pages: u64,
    /// Bytes of the whole stream.
    pub stream_bytes: u64,
}

impl<W: Write> IncomingWriter<W> {
    /// Begins the stream: header, configuration, block table.
    ///
    /// # Errors
    /// If the layout's configuration is not valid, or the sink fails.
    pub fn new(sink: W, layout: Arc<MemoryLayout>) -> Result<Self, WriteError> {
        Self::begin(sink, layout, None)
    }

    /// Begins a stream for a QEMU with the capability `x-ignore-shared` on that has these blocks in shared files.
    /// Every page of every other block must be written (without BIOS and ROMs a guest dies at its first reboot),
    /// none of these.
    ///
    /// # Errors
    /// As for [`Self::new`]; if a shared block is not in the layout.
    pub fn with_shared(
        sink: W,
        layout: Arc<MemoryLayout>,
        shared: Vec<SharedBlock>,
    ) -> Result<Self, WriteError> {
        if let Some(unknown) = shared.iter().find(|s| layout.block(s.block).is_none()) {
            let reason = format!("{}, the layout has {}", unknown.block, layout.blocks().len());
            return Err(ProtocolError::invalid("shared block", reason).into());
        }
        Self::begin(sink, layout, Some(shared))
    }

    fn begin(
        sink: W,
        layout: Arc<MemoryLayout>,
        shared: Option<Vec<SharedBlock>>,
    ) -> Result<Self, WriteError> {
        let mut writer = Self { sink, layout, shared, current: None, totals: Written::default() };
        writer.head()?;
        writer.block_table()?;
        let id = writer.layout.ram_section_id().to_be_bytes();
        writer.put(&[wire::SECTION_END])?;
        writer.put(&id)?;
        Ok(writer)
    }

    /// Writes a page; `None` is a page of zeros.
    ///
    /// # Errors
    /// If the layout has no such page, or the sink fails.
    pub fn page(
        &mut self,
        block: BlockIndex,
        page: PageIndex,
        content: Option<&PageData>,
    ) -> Result<(), WriteError> {
        self.layout.check_page(block, page)?;
        if self.shared_address(block).is_some() {
            // QEMU would refuse the whole stream.
            let reason = format!("{page} of block {block}, whose memory is shared with the incoming QEMU");
            return Err(ProtocolError::invalid("page", reason).into());
        }
        let flag = if content.is_some() { wire::FLAG_PAGE } else { wire::FLAG_ZERO };
        if self.current == Some(block) {
            self.put(&(page.offset_bytes() | flag | wire::FLAG_CONTINUE).to_be_bytes())?;
        } else {
            let layout = Arc::clone(&self.layout);
            let name = layout.block(block).map(|b| b.name.as_str()).unwrap_or_default();
            self.put(&(page.offset_bytes() | flag).to_be_bytes())?;
            self.counted(name)?;
            self.current = Some(block);
        }
        self.totals.pages += 1;
        match content {
            Some(content) => self.put(content),
            None => self.put(&[0]),
        }
    }

    /// Writes a whole block from memory, finding its pages of zeros.
    ///
    /// # Errors
    /// If `memory` has not the size of the block, or the sink fails.
    pub fn block(&mut self, block: BlockIndex, memory: &[u8]) -> Result<(), WriteError> {
        let used_bytes = self.layout.block(block).map(|b| b.used_bytes);
        if used_bytes != Some(memory.len() as u64) {
            let reason = format!(
                "{} for block {block}, which has {} in the layout",
                memory.len(),
                used_bytes.unwrap_or_default()
            );
            return Err(ProtocolError::invalid("image bytes", reason).into());
        }
        let (pages, _) = memory.as_chunks::<PAGE_BYTES>();
        for (index, content) in (0..).zip(pages) {
            self.page(block, PageIndex::new(index), Some(content).filter(|c| **c != ZERO_PAGE))?;
        }
        Ok(())
    }

    /// Ends memory, adds the device buffer as it was captured and ends the stream. Flushes, and gives the
    /// sink back: its write side must be closed, or QEMU waits.
    ///
    /// # Errors
    /// If the device buffer is not one, or the sink fails.
    pub fn finish(mut self, device: &[u8]) -> Result<(W, Written), WriteError> {
        ProtocolError::check_len("device buffer bytes", device.len() as u64, limits::MAX_DEVICE_BYTES)?;
        vmdesc::check_first(device.first().copied())?;
        vmdesc::check_last(device.last().copied())?;
        self.end_of_section()?;
        self.put(device)?;
        self.put(&[wire::DESCRIPTION, 0, 0, 0, 0])?;
        self.sink.flush()?;
        Ok((self.sink, self.totals))
    }

    fn head(&mut self) -> Result<(), WriteError> {
        let configuration = Configuration::parse(self.layout.config())?;
        self.put(&wire::MAGIC.to_be_bytes())?;
        self.put(&wire::VERSION.to_be_bytes())?;
        self.put(&[wire::CONFIGURATION])?;
        self.put(&configuration.body)?;
        if self.shared.is_some() {
            self.put(&Subsection::of_capability(IGNORE_SHARED)?)?;
        }
        Ok(())
    }

    fn shared_address(&self, block: BlockIndex) -> Option<u64> {
        self.shared.iter().flatten().find(|s| s.block == block).map(|s| s.address)
    }

    fn block_table(&mut self) -> Result<(), WriteError> {
        let layout = Arc::clone(&self.layout);
        if layout.ram_section_id() == 0 {
            // QEMU's loader takes 0 for a section it has not seen yet.
            return Err(ProtocolError::invalid("RAM section id", "0, QEMU numbers from 1").into());
        }
        self.put(&[wire::SECTION_START])?;
        self.put(&layout.ram_section_id().to_be_bytes())?;
        self.counted(wire::RAM_SECTION)?;
        self.put(&0u32.to_be_bytes())?;
        self.put(&wire::RAM_VERSION.to_be_bytes())?;
        self.put(&(layout.total_bytes() | wire::FLAG_MEM_SIZE).to_be_bytes())?;
        for (index, block) in (0..).map(BlockIndex).zip(layout.blocks()) {
            self.counted(&block.name)?;
            self.put(&block.used_bytes.to_be_bytes())?;
            if self.shared.is_some() {
                // Of blocks that are not shared QEMU reads the address and does not look at it.
                let address = self.shared_address(index).unwrap_or_default();
                self.put(&address.to_be_bytes())?;
            }
        }
        self.end_of_section()
    }

    fn end_of_section(&mut self) -> Result<(), WriteError> {
        let id = self.layout.ram_section_id().to_be_bytes();
        self.put(&wire::FLAG_EOS.to_be_bytes())?;
        self.put(&[wire::FOOTER])?;
        self.put(&id)
    }

    fn counted(&mut self, text: &str) -> Result<(), WriteError> {
        let len = u8::try_from(text.len())
            .map_err(|_| ProtocolError::invalid("name", format!("{text:?} is longer than 255 bytes")))?;
        self.put(&[len])?;
        self.put(text.as_bytes())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        self.sink.write_all(bytes)?;
        self.totals.stream_bytes += bytes.len() as u64;
        Ok(())
    }
}
