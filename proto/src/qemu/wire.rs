//! Constants of the stream and the cursor over the bytes at hand.

use super::error::{Fault, Place, StreamError};

/// `QEVM`.
pub(super) const MAGIC: u32 = 0x5145_564d;
/// The only version of the stream.
pub(super) const VERSION: u32 = 3;

pub(super) const EOF: u8 = 0x00;
pub(super) const SECTION_START: u8 = 0x01;
pub(super) const SECTION_PART: u8 = 0x02;
pub(super) const SECTION_END: u8 = 0x03;
pub(super) const SECTION_FULL: u8 = 0x04;
pub(super) const SUBSECTION: u8 = 0x05;
pub(super) const DESCRIPTION: u8 = 0x06;
pub(super) const CONFIGURATION: u8 = 0x07;
pub(super) const COMMAND: u8 = 0x08;
pub(super) const FOOTER: u8 = 0x7e;

/// Name of the section that carries memory.
pub(super) const RAM_SECTION: &str = "ram";
/// Version of its payload, the same since QEMU 1.0.
pub(super) const RAM_VERSION: u32 = 4;

/// Low bits of a RAM record's first word; the rest is a byte offset. All flags fit below the smallest page.
pub(super) const FLAGS_MASK: u64 = 0xfff;
pub(super) const FLAG_ZERO: u64 = 0x002;
pub(super) const FLAG_MEM_SIZE: u64 = 0x004;
pub(super) const FLAG_PAGE: u64 = 0x008;
pub(super) const FLAG_EOS: u64 = 0x010;
pub(super) const FLAG_CONTINUE: u64 = 0x020;

/// Why a record was not read.
#[derive(Debug)]
pub(super) enum Stop {
    /// It ends behind the bytes at hand.
    Short,
    /// It is not acceptable. Boxed, because results of the page loop must stay small.
    Fault(Box<Fault>),
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        Self::Fault(Box::new(fault))
    }
}

impl From<crate::ProtocolError> for Stop {
    fn from(e: crate::ProtocolError) -> Self {
        Fault::Limit(e).into()
    }
}

/// A cursor; every method either takes all it needs or reports [`Stop::Short`].
#[derive(Debug, Clone)]
pub(super) struct Input<'a> {
    rest: &'a [u8],
}

impl<'a> Input<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(super) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    #[inline]
    pub(super) fn array<const N: usize>(&mut self) -> Result<&'a [u8; N], Stop> {
        let (head, rest) = self.rest.split_first_chunk::<N>().ok_or(Stop::Short)?;
        self.rest = rest;
        Ok(head)
    }

    pub(super) fn bytes(&mut self, count: usize) -> Result<&'a [u8], Stop> {
        let (head, rest) = self.rest.split_at_checked(count).ok_or(Stop::Short)?;
        self.rest = rest;
        Ok(head)
    }

    /// At most `count` bytes, at least one.
    pub(super) fn some(&mut self, count: u64) -> Result<&'a [u8], Stop> {
        let take = usize::try_from(count).map_or(self.rest.len(), |c| c.min(self.rest.len()));
        if take == 0 { Err(Stop::Short) } else { self.bytes(take) }
    }

    pub(super) fn u8(&mut self) -> Result<u8, Stop> {
        self.array::<1>().map(|[b]| *b)
    }

    pub(super) fn be16(&mut self) -> Result<u16, Stop> {
        self.array().map(|b| u16::from_be_bytes(*b))
    }

    pub(super) fn be32(&mut self) -> Result<u32, Stop> {
        self.array().map(|b| u32::from_be_bytes(*b))
    }

    #[inline]
    pub(super) fn be64(&mut self) -> Result<u64, Stop> {
        self.array().map(|b| u64::from_be_bytes(*b))
    }

    /// A string with its length in one byte before it.
    pub(super) fn counted(&mut self) -> Result<&'a [u8], Stop> {
        let count = self.u8()?;
        self.bytes(usize::from(count))
    }
}

/// Place in a stream: what a reader has consumed and what it is in the middle of.
pub(super) trait Machine<'a> {
    type Event;

    /// Reads one record. Changes `self` only if it succeeds; `Ok(None)` is a record that needs no event.
    fn step(&mut self, input: &mut Input<'a>) -> Result<Option<Self::Event>, Stop>;

    fn place(&self) -> Place;

    fn offset(&mut self) -> &mut u64;

    /// Reads records until there is an event or the bytes run out, and moves `input` past what was read.
    #[inline]
    fn advance(&mut self, input: &mut &'a [u8]) -> Result<Option<Self::Event>, StreamError> {
        loop {
            let mut cursor = Input::new(input);
            match self.step(&mut cursor) {
                Ok(event) => {
                    *self.offset() += (input.len() - cursor.rest().len()) as u64;
                    *input = cursor.rest();
                    if event.is_some() {
                        return Ok(event);
                    }
                }
                Err(Stop::Short) => return Ok(None),
                Err(Stop::Fault(fault)) => {
                    return Err(StreamError::new(*self.offset(), self.place(), *fault));
                }
            }
        }
    }
}
