//! The CONFIGURATION section: machine name, then subsections without lengths.

use super::error::Fault;
use super::wire::{self, Input, Stop};
use crate::{ProtocolError, limits};

const PAGE_BITS: &[u8] = b"configuration/target-page-bits";
const CAPABILITIES: &[u8] = b"configuration/capabilities";
const UUID: &[u8] = b"configuration/uuid";
const UUID_BYTES: usize = 16;

/// Machine name: be32 length, then the name.
pub(super) fn machine<'a>(input: &mut Input<'a>) -> Result<&'a str, Stop> {
    let name_bytes = input.be32()?;
    ProtocolError::check_len("machine name bytes", name_bytes.into(), limits::MAX_MACHINE_NAME_BYTES as u64)?;
    text("machine name", input.bytes(name_bytes as usize)?)
}

/// What a subsection says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Subsection<'a> {
    /// Bits of a page offset.
    PageBits(u32),
    /// The capabilities that change the stream and are on.
    Capabilities(Vec<&'a str>),
    /// The guest's UUID, with the capability `validate-uuid`.
    Uuid,
}

/// One subsection, its marker included.
pub(super) fn subsection<'a>(input: &mut Input<'a>) -> Result<Subsection<'a>, Stop> {
    let marker = input.u8()?;
    if marker != wire::SUBSECTION {
        return Err(Fault::SectionType { found: marker, expected: "a subsection (0x05)" }.into());
    }
    let name = input.counted()?;
    let version = input.be32()?;
    match (name, version) {
        (PAGE_BITS, 1) => Ok(Subsection::PageBits(input.be32()?)),
        (CAPABILITIES, 1) => {
            let count = input.be32()?;
            ProtocolError::check_len(
                "capability count",
                count.into(),
                limits::MAX_STREAM_CAPABILITIES as u64,
            )?;
            let names = (0..count).map(|_| text("capability", input.counted()?));
            Ok(Subsection::Capabilities(names.collect::<Result<_, Stop>>()?))
        }
        (UUID, 1) => input.bytes(UUID_BYTES).map(|_| Subsection::Uuid),
        _ => Err(Fault::UnknownSubsection { name: String::from_utf8_lossy(name).into(), version }.into()),
    }
}

impl Subsection<'_> {
    /// The bytes that say that this one capability, and no other that changes the stream, is on. QEMU finds
    /// subsections by name, in any order.
    pub(super) fn of_capability(name: &str) -> Result<Vec<u8>, ProtocolError> {
        let counted = |out: &mut Vec<u8>, text: &[u8]| {
            let len = u8::try_from(text.len())
                .map_err(|_| ProtocolError::invalid("capability name bytes", text.len().to_string()))?;
            out.push(len);
            out.extend_from_slice(text);
            Ok::<_, ProtocolError>(())
        };
        let mut out = vec![wire::SUBSECTION];
        counted(&mut out, CAPABILITIES)?;
        // Version of the subsection, number of capabilities.
        out.extend_from_slice(&1u32.to_be_bytes());
        out.extend_from_slice(&1u32.to_be_bytes());
        counted(&mut out, name.as_bytes())?;
        Ok(out)
    }

    /// Refuses what changes the rest of the stream in a way the readers do not follow.
    pub(super) fn check(&self) -> Result<(), Fault> {
        match self {
            Self::PageBits(12) | Self::Uuid => Ok(()),
            Self::PageBits(bits) => Err(Fault::PageBits { bits: *bits }),
            Self::Capabilities(names) => names.first().map_or(Ok(()), |name| {
                Err(Fault::Capability {
                    capability: (*name).into(),
                    seen: "listed in configuration/capabilities".into(),
                })
            }),
        }
    }
}

/// A whole CONFIGURATION body as kept in [`crate::layout::MemoryLayout::config`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Configuration {
    /// Versioned machine type, e.g. `pc-q35-7.2`.
    pub machine: String,
    /// The body without the list of capabilities: what fits an incoming QEMU that has none of them on.
    pub(super) body: Vec<u8>,
}

impl Configuration {
    /// Reads a stored body.
    ///
    /// # Errors
    /// [`Fault`] naming the value, also for a body that is cut off.
    pub fn parse(body: &[u8]) -> Result<Self, Fault> {
        let mut input = Input::new(body);
        let parsed = Self::read(&mut input);
        parsed.map_err(|stop| match stop {
            Stop::Fault(fault) => *fault,
            Stop::Short => Fault::Incomplete("the CONFIGURATION body is cut off"),
        })
    }

    fn read(input: &mut Input<'_>) -> Result<Self, Stop> {
        let whole = input.rest();
        let name = machine(input)?;
        let mut body = whole.get(..whole.len() - input.rest().len()).unwrap_or_default().to_vec();
        while !input.rest().is_empty() {
            let before = input.rest();
            if !matches!(subsection(input)?, Subsection::Capabilities(_)) {
                body.extend_from_slice(before.get(..before.len() - input.rest().len()).unwrap_or_default());
            }
        }
        Ok(Self { machine: name.into(), body })
    }
}

pub(super) fn text<'a>(what: &'static str, bytes: &'a [u8]) -> Result<&'a str, Stop> {
    std::str::from_utf8(bytes)
        .map_err(|_| Fault::NotText { what, name: String::from_utf8_lossy(bytes).into() }.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(subsections: &[&[u8]]) -> Vec<u8> {
        let mut v = b"\0\0\0\x06pc-7.2".to_vec();
        subsections.iter().for_each(|s| v.extend_from_slice(s));
        v
    }

    const UUID: &[u8] = b"\x05\x12configuration/uuid\0\0\0\x010123456789abcdef";
    const CAPS: &[u8] = b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0fx-ignore-shared";
    const BITS: &[u8] = b"\x05\x1econfiguration/target-page-bits\0\0\0\x01\0\0\0\x0c";

    #[test]
    fn capabilities_are_dropped_and_the_rest_is_kept() {
        let c = Configuration::parse(&body(&[BITS, CAPS, UUID])).unwrap();
        assert_eq!(c.machine, "pc-7.2");
        assert_eq!(c.body, body(&[BITS, UUID]));
    }

    #[test]
    fn what_would_change_the_stream_is_refused() {
        let check = |bytes: &[u8]| subsection(&mut Input::new(bytes)).unwrap().check();
        assert_eq!(check(UUID), Ok(()));
        assert_eq!(check(BITS), Ok(()));
        assert_eq!(
            check(CAPS).unwrap_err().to_string(),
            "migration capability \"x-ignore-shared\" is on (listed in configuration/capabilities); switch it \
             off with migrate-set-capabilities"
        );
        let mut big_pages = BITS.to_vec();
        *big_pages.last_mut().unwrap() = 16;
        assert_eq!(check(&big_pages), Err(Fault::PageBits { bits: 16 }));
    }

    #[test]
    fn bad_bodies_name_the_value() {
        let error = |b: &[u8]| Configuration::parse(b).unwrap_err().to_string();
        assert_eq!(
            error(&body(&[&UUID[..30]])),
            "the stream is not complete: the CONFIGURATION body is cut off"
        );
        assert_eq!(error(&body(&[b"\x05\x01x\0\0\0\x01"])), "subsection \"x\" version 1 is not known");
        assert_eq!(error(&body(&[b"\x04"])), "section type 0x04 found, expected a subsection (0x05)");
        assert_eq!(error(b"\xff\xff\xff\xff"), "machine name bytes is 4294967295, the limit is 1024");
        assert_eq!(error(b"\0\0\0\x01\xff"), "machine name \"\u{fffd}\" is not valid UTF-8");
    }
}
