//! What can be wrong with a stream.

use super::colo::ColoMessage;
use crate::ProtocolError;

/// A stream that cannot be read, with where and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("QEMU stream, byte {offset:#x}, {place}: {fault}")]
pub struct StreamError {
    /// Offset of the offending record, in bytes since the connection began.
    pub offset: u64,
    /// The part of the stream it is in.
    pub place: Place,
    /// What is wrong with it.
    #[source]
    pub fault: Box<Fault>,
}

impl StreamError {
    pub(super) fn new(offset: u64, place: Place, fault: Fault) -> Self {
        Self { offset, place, fault: Box::new(fault) }
    }
}

/// A part of the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Magic and version.
    Header,
    /// The CONFIGURATION section.
    Configuration,
    /// Between two sections.
    Sections,
    /// The list of RAM blocks in the SECTION_START of `ram`.
    BlockTable,
    /// Page records of `ram`.
    Pages,
    /// The footer of a section of `ram`.
    Footer,
    /// The device sections behind memory.
    Devices,
    /// The JSON behind the device sections.
    Description,
    /// Between the parts of a checkpoint.
    Messages,
    /// The device buffer of a checkpoint.
    DeviceBuffer,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Header => "file header",
            Self::Configuration => "CONFIGURATION section",
            Self::Sections => "start of a section",
            Self::BlockTable => "RAM block table",
            Self::Pages => "RAM pages",
            Self::Footer => "footer of a RAM section",
            Self::Devices => "device sections",
            Self::Description => "VMDESCRIPTION",
            Self::Messages => "COLO messages",
            Self::DeviceBuffer => "COLO device buffer",
        })
    }
}

/// What is wrong. Texts name the value and, where the operator can do something, what.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// The first bytes are not those of a migration stream.
    #[error("magic {magic:#010x} and version {version} found, 0x5145564d and 3 expected")]
    NotAStream {
        /// First word.
        magic: u32,
        /// Second word.
        version: u32,
    },
    /// A section type that has no business here.
    #[error("section type {found:#04x} found, expected {expected}")]
    SectionType {
        /// The byte found.
        found: u8,
        /// What may stand here.
        expected: &'static str,
    },
    /// A name is not UTF-8.
    #[error("{what} {name:?} is not valid UTF-8")]
    NotText {
        /// Which name.
        what: &'static str,
        /// The name, lossily.
        name: String,
    },
    /// A subsection of CONFIGURATION whose length is not known.
    #[error("subsection {name:?} version {version} is not known")]
    UnknownSubsection {
        /// Its name.
        name: String,
        /// Its version.
        version: u32,
    },
    /// The guest's page size is not 4096.
    #[error("target pages of 2^{bits} bytes, only 2^12 are supported")]
    PageBits {
        /// Bits of a page offset.
        bits: u32,
    },
    /// A migration capability changes the stream in a way that is not read here.
    #[error(
        "migration capability {capability:?} is on ({seen}); switch it off with migrate-set-capabilities"
    )]
    Capability {
        /// Name as in QMP.
        capability: String,
        /// What showed that it is on.
        seen: String,
    },
    /// A command that cannot be skipped.
    #[error("command {number} ({name}) is not supported here")]
    Command {
        /// Its number.
        number: u16,
        /// Its name in QEMU's source.
        name: &'static str,
    },
    /// A section that sends its state in parts, other than `ram`.
    #[error(
        "section {id} of {name:?}, instance {instance}, version {version}: only \"ram\" version 4 may come before \
         the end of memory; a device that sends its state early or in parts is not supported"
    )]
    ForeignSection {
        /// Section id.
        id: u32,
        /// Name of the handler.
        name: String,
        /// Instance id.
        instance: u32,
        /// Version of the payload.
        version: u32,
    },
    /// A section id that was not announced as `ram`.
    #[error("section id {found}, but \"ram\" is {}", .ram.map_or("not announced yet".into(), |id| id.to_string()))]
    SectionId {
        /// The id found.
        found: u32,
        /// The id of `ram`.
        ram: Option<u32>,
    },
    /// The byte or id behind a section is not its footer.
    #[error("footer {marker:#04x} {found} found, 0x7e {expected} expected")]
    Footer {
        /// The byte before the id.
        marker: u8,
        /// The id.
        found: u32,
        /// The id of the section.
        expected: u32,
    },
    /// A RAM record with a combination of flags that does not exist.
    #[error("RAM record word {word:#018x} has flags {:#05x}, which is no known record", .word & 0xfff)]
    RamFlags {
        /// The whole word.
        word: u64,
    },
    /// A block table where none may be, or none where one must be.
    #[error("{0}")]
    BlockTable(&'static str),
    /// Block sizes do not add up to the announced sum.
    #[error(
        "RAM block {name:?} has {used_bytes:#x} bytes, only {left_bytes:#x} of the announced sum are left"
    )]
    BlockSum {
        /// Name of the block.
        name: String,
        /// Its size.
        used_bytes: u64,
        /// What is left of the sum.
        left_bytes: u64,
    },
    /// A page of a block that is not in the table.
    #[error("RAM block {name:?} is not in the block table")]
    UnknownBlock {
        /// Name of the block.
        name: String,
    },
    /// A record continues the previous block, and there is none.
    #[error(
        "RAM record word {word:#018x} continues the previous block, but there was none on this connection"
    )]
    NoCurrentBlock {
        /// The whole word.
        word: u64,
    },
    /// A page behind the end of its block.
    #[error("page at {offset:#x} of RAM block {name:?}, which has {used_bytes:#x} bytes")]
    PageOutside {
        /// Byte offset of the page.
        offset: u64,
        /// Name of the block.
        name: String,
        /// Size of the block.
        used_bytes: u64,
    },
    /// A zero page with a fill byte.
    #[error("zero page with fill byte {fill:#04x}")]
    ZeroFill {
        /// The byte.
        fill: u8,
    },
    /// A message number that does not exist.
    #[error("COLO message {value} is not known, known are 0 to 6")]
    UnknownMessage {
        /// The value.
        value: u32,
    },
    /// A message out of turn or in the wrong direction.
    #[error("COLO message {found} ({}), expected {expected}", .found.direction())]
    UnexpectedMessage {
        /// The message.
        found: ColoMessage,
        /// The one whose turn it is.
        expected: ColoMessage,
    },
    /// The stream was declared complete too early.
    #[error("the stream is not complete: {0}")]
    Incomplete(&'static str),
    /// Device state that is not a run of device sections and an end mark.
    #[error("{what}: byte {found:#04x} found, {expected:#04x} expected")]
    DeviceBytes {
        /// Which byte.
        what: &'static str,
        /// Its value.
        found: u8,
        /// What it must be.
        expected: u8,
    },
    /// The description and the device sections do not agree.
    #[error("description of device {device:?}: {reason}")]
    Description {
        /// Name of the device, or of the part of the JSON.
        device: String,
        /// The disagreement.
        reason: String,
    },
    /// A limit of [`crate::limits`] or a rule of [`crate::layout::MemoryLayout`].
    #[error(transparent)]
    Limit(#[from] ProtocolError),
}
