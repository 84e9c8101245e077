//! The precopy: everything QEMU sends before it waits for its peer for the first time.

use super::checkpoint::CheckpointReader;
use super::command::Command;
use super::config;
use super::error::{Fault, Place, StreamError};
use super::ram::{BlockTable, RamRecord, RamRecords};
use super::vmdesc::{self, DeviceSection, EndSeen};
use super::wire::{self, Input, Machine, Stop};
use crate::frame::PageRecord;
use crate::layout::MemoryLayout;
use crate::{ProtocolError, limits};
use std::sync::Arc;

/// What the precopy brings, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PrecopyEvent<'a> {
    /// A command; tells dialects apart.
    Command(Command),
    /// The block table is complete; no page comes before it.
    Layout(Arc<MemoryLayout>),
    /// A page. The same page may come again; the last one counts.
    Page(PageRecord<'a>),
    /// A section of `ram` has ended.
    RamSection {
        /// Page records in it.
        pages: u64,
        /// The guest is stopped, this was the last one; device sections follow.
        last: bool,
    },
}

/// A complete precopy: epoch 0 of the guest.
#[derive(Debug)]
pub struct Precopy {
    /// Blocks and configuration.
    pub layout: Arc<MemoryLayout>,
    /// Device state in the same form as a checkpoint's device buffer.
    pub device: Vec<u8>,
    /// Where each device's section lies in it; empty if QEMU sent no description.
    pub sections: Vec<DeviceSection>,
    /// Reads the rest of the connection.
    pub checkpoints: CheckpointReader,
}

/// Reads the precopy from slices of any size; see [the module](super) for how to drive it.
#[derive(Debug, Default)]
pub struct PrecopyReader {
    offset: u64,
    state: State,
    config: Vec<u8>,
    ram_id: Option<u32>,
    ram: RamRecords,
    /// Device sections and what follows them: their lengths are known only at the very end.
    tail: Vec<u8>,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Header,
    Configuration,
    /// Between sections; directly behind CONFIGURATION, its subsections may still come.
    Section {
        configuring: bool,
    },
    /// Rest of a command's payload.
    Skip(u16),
    TableHead,
    Table(BlockTable),
    Pages {
        pages: u64,
        last: bool,
    },
    Footer {
        pages: u64,
        last: bool,
    },
    Tail,
}

impl PrecopyReader {
    /// For a new connection.
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads up to the next event and moves `input` past it. `None`: the rest of `input` is an incomplete
    /// record, to be given again in front of what comes next, or is used up.
    ///
    /// # Errors
    /// [`StreamError`]; the connection cannot be used any more.
    #[inline]
    pub fn read<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<PrecopyEvent<'a>>, StreamError> {
        self.advance(input)
    }

    /// Bytes consumed so far.
    pub fn offset_bytes(&self) -> u64 {
        self.offset
    }

    /// Whether all that was read so far ends like a precopy: with a description that is complete. Random bytes
    /// do not, but only a quiet socket tells that nothing follows.
    pub fn looks_complete(&self) -> bool {
        matches!(self.state, State::Tail) && vmdesc::find(&self.tail).is_some_and(|t| t.description.is_some())
    }

    /// Ends the precopy. To be called when everything was read that QEMU sends: when the socket is empty
    /// after QEMU said that it is in state `colo`, or, where that state comes later, when the socket is
    /// quiet and [`PrecopyReader::looks_complete`].
    ///
    /// # Errors
    /// If something is missing, or the description does not fit the device sections.
    pub fn finish(self, seen: EndSeen) -> Result<Precopy, StreamError> {
        let place = self.place();
        let fail = |fault| Err(StreamError::new(self.offset, place, fault));
        let (State::Tail, Some(ram_id), Some(layout)) = (&self.state, self.ram_id, self.ram.layout()) else {
            return fail(Fault::Incomplete("the last section of memory was not read"));
        };
        let tail_offset = self.offset - self.tail.len() as u64;
        let (device_bytes, sections) = vmdesc::split(&self.tail, seen)
            .map_err(|(at, place, fault)| StreamError::new(tail_offset + at as u64, place, fault))?;
        let layout = Arc::clone(layout);
        let mut device = self.tail;
        device.truncate(device_bytes);
        let checkpoints = CheckpointReader::new(self.offset, ram_id, self.ram);
        Ok(Precopy { layout, device, sections, checkpoints })
    }

    fn section(&mut self, input: &mut Input<'_>) -> Result<Option<Command>, Stop> {
        let section_type = input.u8()?;
        match section_type {
            wire::COMMAND => {
                let (command, payload_bytes) = Command::read(input)?;
                self.state = State::Skip(payload_bytes);
                return Ok(Some(command));
            }
            wire::SECTION_START | wire::SECTION_FULL => {
                let id = input.be32()?;
                let name = input.counted()?;
                let (instance, version) = (input.be32()?, input.be32()?);
                let expected = wire::RAM_SECTION.as_bytes();
                if section_type != wire::SECTION_START
                    || (name, instance, version) != (expected, 0, wire::RAM_VERSION)
                    || self.ram_id.is_some()
                {
                    let name = String::from_utf8_lossy(name).into();
                    return Err(Fault::ForeignSection { id, name, instance, version }.into());
                }
                self.ram_id = Some(id);
                self.state = State::TableHead;
            }
            wire::SECTION_PART | wire::SECTION_END => {
                let found = input.be32()?;
                if self.ram_id != Some(found) {
                    return Err(Fault::SectionId { found, ram: self.ram_id }.into());
                }
                self.state = State::Pages { pages: 0, last: section_type == wire::SECTION_END };
            }
            found => {
                return Err(Fault::SectionType { found, expected: "a command or a section of ram" }.into());
            }
        }
        Ok(None)
    }

    fn subsection(&mut self, input: &mut Input<'_>) -> Result<(), Stop> {
        let before = input.rest();
        config::subsection(input)?.check()?;
        let bytes = before.get(..before.len() - input.rest().len()).unwrap_or_default();
        let config_bytes = (self.config.len() + bytes.len()) as u64;
        ProtocolError::check_len("CONFIGURATION bytes", config_bytes, limits::MAX_CONFIG_BYTES as u64)?;
        self.config.extend_from_slice(bytes);
        Ok(())
    }

    fn table_entry(&mut self, input: &mut Input<'_>) -> Result<Option<Arc<MemoryLayout>>, Stop> {
        let State::Table(table) = &mut self.state else { return Ok(None) };
        if !table.is_complete() {
            table.read_entry(input)?;
            return Ok(None);
        }
        let layout = Arc::new(table.layout(&self.config, self.ram_id.unwrap_or_default())?);
        self.ram.set_layout(Arc::clone(&layout));
        self.state = State::Pages { pages: 0, last: false };
        Ok(Some(layout))
    }

    fn tail(&mut self, input: &mut Input<'_>) -> Result<(), Stop> {
        let bytes = input.some(u64::MAX)?;
        let tail_bytes = (self.tail.len() + bytes.len()) as u64;
        let max = limits::MAX_DEVICE_BYTES + limits::MAX_DESCRIPTION_BYTES as u64;
        ProtocolError::check_len("bytes behind memory", tail_bytes, max)?;
        self.tail.extend_from_slice(bytes);
        Ok(())
    }
}

impl<'a> Machine<'a> for PrecopyReader {
    type Event = PrecopyEvent<'a>;

    #[inline]
    fn step(&mut self, input: &mut Input<'a>) -> Result<Option<PrecopyEvent<'a>>, Stop> {
        match &mut self.state {
            State::Pages { pages, last } => match self.ram.read(input)? {
                RamRecord::Page(page) => {
                    *pages += 1;
                    return Ok(Some(PrecopyEvent::Page(page)));
                }
                RamRecord::End => self.state = State::Footer { pages: *pages, last: *last },
            },
            State::Footer { pages, last } => {
                let event = PrecopyEvent::RamSection { pages: *pages, last: *last };
                footer(input, self.ram_id.unwrap_or_default())?;
                self.state = if *last { State::Tail } else { State::Section { configuring: false } };
                return Ok(Some(event));
            }
            State::Tail => self.tail(input)?,
            State::Header => {
                let (magic, version) = (input.be32()?, input.be32()?);
                if (magic, version) != (wire::MAGIC, wire::VERSION) {
                    return Err(Fault::NotAStream { magic, version }.into());
                }
                self.state = State::Configuration;
            }
            State::Configuration => {
                let found = input.u8()?;
                if found != wire::CONFIGURATION {
                    return Err(Fault::SectionType { found, expected: "CONFIGURATION (0x07)" }.into());
                }
                let body = input.rest();
                config::machine(input)?;
                self.config = body.get(..body.len() - input.rest().len()).unwrap_or_default().to_vec();
                self.state = State::Section { configuring: true };
            }
            State::Section { configuring: true } => match input.rest().first() {
                None => return Err(Stop::Short),
                Some(&wire::SUBSECTION) => self.subsection(input)?,
                Some(_) => self.state = State::Section { configuring: false },
            },
            State::Section { configuring: false } => {
                return Ok(self.section(input)?.map(PrecopyEvent::Command));
            }
            State::Skip(0) => self.state = State::Section { configuring: false },
            State::Skip(left) => *left -= skip(input, *left)?,
            State::TableHead => self.state = State::Table(BlockTable::read(input)?),
            State::Table(_) => return Ok(self.table_entry(input)?.map(PrecopyEvent::Layout)),
        }
        Ok(None)
    }

    fn place(&self) -> Place {
        match self.state {
            State::Header => Place::Header,
            State::Configuration | State::Section { configuring: true } => Place::Configuration,
            State::Section { .. } | State::Skip(_) => Place::Sections,
            State::TableHead | State::Table(_) => Place::BlockTable,
            State::Pages { .. } => Place::Pages,
            State::Footer { .. } => Place::Footer,
            State::Tail => Place::Devices,
        }
    }

    fn offset(&mut self) -> &mut u64 {
        &mut self.offset
    }
}

/// Reads the footer of the section with this id.
pub(super) fn footer(input: &mut Input<'_>, expected: u32) -> Result<(), Stop> {
    let (marker, found) = (input.u8()?, input.be32()?);
    if (marker, found) != (wire::FOOTER, expected) {
        return Err(Fault::Footer { marker, found, expected }.into());
    }
    Ok(())
}

/// Skips up to `left` bytes and gives their number.
pub(super) fn skip(input: &mut Input<'_>, left: u16) -> Result<u16, Stop> {
    let skipped = input.some(left.into())?.len();
    Ok(u16::try_from(skipped).unwrap_or(left))
}
