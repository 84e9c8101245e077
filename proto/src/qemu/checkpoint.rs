//! The COLO loop: what QEMU sends after its peer said READY.

use super::colo::ColoMessage;
use super::command::Command;
use super::error::{Fault, Place, StreamError};
use super::precopy::{footer, skip};
use super::ram::{RamRecord, RamRecords};
use super::vmdesc;
use super::wire::{self, Input, Machine, Stop};
use crate::frame::PageRecord;
use crate::{ProtocolError, limits};

/// What a checkpoint brings, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CheckpointEvent<'a> {
    /// QEMU wants a checkpoint. The guest runs until [`super::PeerMessage::Reply`].
    Requested,
    /// The guest is stopped.
    Stopped,
    /// A page dirtied since the checkpoint before; each at most once.
    Page(PageRecord<'a>),
    /// All pages were read.
    MemoryEnd {
        /// Their number.
        pages: u64,
    },
    /// Bytes of the device buffer that follows; within [`limits::MAX_DEVICE_BYTES`].
    DeviceSize(u64),
    /// A piece of it, of any size.
    Device(&'a [u8]),
    /// The checkpoint is complete. QEMU waits for [`super::PeerMessage::Loaded`].
    Complete,
}

/// Reads checkpoints from slices of any size; see [the module](super) for how to drive it. Made by
/// [`super::PrecopyReader::finish`], because what a record means depends on those before it.
#[derive(Debug, Clone)]
pub struct CheckpointReader {
    offset: u64,
    state: State,
    ram_id: u32,
    ram: RamRecords,
}

#[derive(Debug, Clone)]
enum State {
    Request,
    Send,
    /// Between sections.
    Section {
        memory: Option<u64>,
    },
    /// Rest of a command's payload.
    Skip {
        left: u16,
        memory: Option<u64>,
    },
    Pages {
        pages: u64,
    },
    Footer {
        pages: u64,
    },
    Size,
    Device(DeviceBuffer),
    /// The buffer was given out; its last byte is checked here, where the place of an error does not depend on
    /// how the buffer was cut.
    Complete {
        last: u8,
    },
}

/// A device buffer while it passes.
#[derive(Debug, Clone, Copy)]
struct DeviceBuffer {
    size_bytes: u64,
    left_bytes: u64,
}

impl CheckpointReader {
    pub(super) fn new(offset: u64, ram_id: u32, ram: RamRecords) -> Self {
        Self { offset, state: State::Request, ram_id, ram }
    }

    /// Reads up to the next event and moves `input` past it. `None`: the rest of `input` is an incomplete
    /// record, to be given again in front of what comes next, or is used up.
    ///
    /// # Errors
    /// [`StreamError`]; the connection cannot be used any more.
    #[inline]
    pub fn read<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<CheckpointEvent<'a>>, StreamError> {
        self.advance(input)
    }

    /// Bytes consumed so far, the precopy included.
    pub fn offset_bytes(&self) -> u64 {
        self.offset
    }

    /// Whether the last checkpoint is complete and nothing of the next was read, not even its request.
    pub fn between_checkpoints(&self) -> bool {
        matches!(self.state, State::Request)
    }

    fn section(&mut self, input: &mut Input<'_>, memory: Option<u64>) -> Result<Option<u64>, Stop> {
        match (input.u8()?, memory) {
            (wire::COMMAND, _) => {
                let (_, left) = Command::read(input)?;
                self.state = State::Skip { left, memory };
                Ok(None)
            }
            (wire::SECTION_END, None) => {
                let found = input.be32()?;
                if found != self.ram_id {
                    return Err(Fault::SectionId { found, ram: Some(self.ram_id) }.into());
                }
                self.state = State::Pages { pages: 0 };
                Ok(None)
            }
            (wire::EOF, Some(pages)) => {
                self.state = State::Size;
                Ok(Some(pages))
            }
            (found, None) => {
                Err(Fault::SectionType { found, expected: "a command or the SECTION_END of ram" }.into())
            }
            (found, Some(_)) => {
                Err(Fault::SectionType { found, expected: "the end mark (0x00), after ram" }.into())
            }
        }
    }

    fn device<'a>(buffer: &mut DeviceBuffer, input: &mut Input<'a>) -> Result<&'a [u8], Stop> {
        let piece = input.some(buffer.left_bytes)?;
        if buffer.left_bytes == buffer.size_bytes {
            vmdesc::check_first(piece.first().copied())?;
        }
        buffer.left_bytes -= piece.len() as u64;
        Ok(piece)
    }
}

impl<'a> Machine<'a> for CheckpointReader {
    type Event = CheckpointEvent<'a>;

    #[inline]
    fn step(&mut self, input: &mut Input<'a>) -> Result<Option<CheckpointEvent<'a>>, Stop> {
        match &mut self.state {
            State::Pages { pages } => match self.ram.read(input)? {
                RamRecord::Page(page) => {
                    *pages += 1;
                    return Ok(Some(CheckpointEvent::Page(page)));
                }
                RamRecord::End => self.state = State::Footer { pages: *pages },
            },
            State::Device(buffer) => {
                let piece = Self::device(buffer, input)?;
                if buffer.left_bytes == 0 {
                    self.state = State::Complete { last: piece.last().copied().unwrap_or_default() };
                }
                return Ok(Some(CheckpointEvent::Device(piece)));
            }
            State::Request => {
                message(input, ColoMessage::CheckpointRequest)?;
                self.state = State::Send;
                return Ok(Some(CheckpointEvent::Requested));
            }
            State::Send => {
                message(input, ColoMessage::VmstateSend)?;
                self.state = State::Section { memory: None };
                return Ok(Some(CheckpointEvent::Stopped));
            }
            State::Section { memory } => {
                let memory = *memory;
                return Ok(self.section(input, memory)?.map(|pages| CheckpointEvent::MemoryEnd { pages }));
            }
            State::Skip { left: 0, memory } => self.state = State::Section { memory: *memory },
            State::Skip { left, .. } => *left -= skip(input, *left)?,
            State::Footer { pages } => {
                footer(input, self.ram_id)?;
                self.state = State::Section { memory: Some(*pages) };
            }
            State::Size => {
                message(input, ColoMessage::VmstateSize)?;
                let size_bytes = input.be64()?;
                ProtocolError::check_len("device buffer bytes", size_bytes, limits::MAX_DEVICE_BYTES)?;
                if size_bytes == 0 {
                    return Err(Fault::Incomplete("a device buffer of 0 bytes").into());
                }
                self.state = State::Device(DeviceBuffer { size_bytes, left_bytes: size_bytes });
                return Ok(Some(CheckpointEvent::DeviceSize(size_bytes)));
            }
            State::Complete { last } => {
                vmdesc::check_last(Some(*last))?;
                self.state = State::Request;
                return Ok(Some(CheckpointEvent::Complete));
            }
        }
        Ok(None)
    }

    fn place(&self) -> Place {
        match self.state {
            State::Request | State::Send | State::Size => Place::Messages,
            State::Section { .. } | State::Skip { .. } => Place::Sections,
            State::Pages { .. } => Place::Pages,
            State::Footer { .. } => Place::Footer,
            State::Device(_) | State::Complete { .. } => Place::DeviceBuffer,
        }
    }

    fn offset(&mut self) -> &mut u64 {
        &mut self.offset
    }
}

/// Reads the message whose turn it is.
fn message(input: &mut Input<'_>, expected: ColoMessage) -> Result<(), Stop> {
    let found = ColoMessage::try_from(input.be32()?)?;
    if found != expected {
        return Err(Fault::UnexpectedMessage { found, expected }.into());
    }
    Ok(())
}
