//! The end of the precopy: device sections, which carry no lengths, an end mark, and a JSON description that
//! gives the lengths.

use super::error::{Fault, Place};
use super::wire::{self, Input, Stop};
use crate::limits;
use serde::Deserialize;
use std::ops::Range;

/// Bytes of a footer and of the end mark behind it.
const FOOTER_AND_EOF_BYTES: usize = 6;

/// How the caller knows that the precopy is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndSeen {
    /// QEMU said that its migration is in state `colo` and the socket was empty after that. The only proof
    /// where the machine type sends no description.
    ColoState,
    /// The socket has been quiet for a while (QEMU 11, which is in state `device` until it is answered).
    Quiet,
}

/// A device's part of the device buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceSection {
    /// QEMU's name for the device's state, e.g. `timer` or `0000:00:02.0/virtio-net`.
    pub name: String,
    /// Tells devices of the same name apart.
    pub instance: u32,
    /// The section with head and footer, as range of the device buffer.
    pub bytes: Range<usize>,
}

/// Where the device sections end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tail {
    /// Bytes of the device buffer, its end mark included.
    device_bytes: usize,
    /// `None`: QEMU sent none, or an empty one.
    pub(super) description: Option<Description>,
}

/// The JSON, as far as it is needed.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Description {
    page_size: u64,
    devices: Vec<Device>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct Device {
    name: String,
    instance_id: u32,
    /// Devices of the old style, such as user networking, leave it out.
    version: Option<u32>,
    /// Of a device that describes no fields.
    size: Option<u64>,
    #[serde(default)]
    fields: Vec<Field>,
    #[serde(default)]
    subsections: Vec<Subsection>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct Field {
    size: u64,
    array_len: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct Subsection {
    vmsd_name: String,
    #[serde(default)]
    fields: Vec<Field>,
    #[serde(default)]
    subsections: Vec<Subsection>,
}

/// Finds the end mark in a tail that is complete: it is followed by nothing or by a description that ends
/// with the tail.
pub(super) fn find(tail: &[u8]) -> Option<Tail> {
    const HEAD_BYTES: usize = 6;
    let first = tail.len().saturating_sub(limits::MAX_DESCRIPTION_BYTES + HEAD_BYTES);
    let candidates = tail.get(first..)?.windows(HEAD_BYTES).enumerate();
    for (at, head) in candidates {
        let &[wire::EOF, wire::DESCRIPTION, l0, l1, l2, l3] = head else { continue };
        let json_bytes = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
        let json = tail.get(first + at + HEAD_BYTES..)?;
        let device_bytes = first + at + 1;
        if json.len() != json_bytes || !ends_like_devices(tail.get(..device_bytes)?) {
            continue;
        }
        if json.is_empty() {
            return Some(Tail { device_bytes, description: None });
        }
        if let Ok(description) = serde_json::from_slice(json) {
            return Some(Tail { device_bytes, description: Some(description) });
        }
    }
    ends_like_devices(tail).then_some(Tail { device_bytes: tail.len(), description: None })
}

/// Divides the tail into device buffer and description and checks one against the other. Errors come with
/// the offset in the tail.
pub(super) fn split(
    tail: &[u8],
    seen: EndSeen,
) -> Result<(usize, Vec<DeviceSection>), (usize, Place, Fault)> {
    check_first(tail.first().copied()).map_err(|fault| (0, Place::Devices, fault))?;
    let end = tail.len();
    let incomplete = |what| (end, Place::Description, Fault::Incomplete(what));
    let Some(Tail { device_bytes, description }) = find(tail) else {
        return Err(incomplete("no end mark, nor a description, at the end of the device sections"));
    };
    if device_bytes as u64 > limits::MAX_DEVICE_BYTES {
        let limit = crate::ProtocolError::TooLarge {
            what: "device buffer bytes",
            len: device_bytes as u64,
            max: limits::MAX_DEVICE_BYTES,
        };
        return Err((device_bytes, Place::Devices, limit.into()));
    }
    match description {
        Some(description) => {
            let device = tail.get(..device_bytes).unwrap_or_default();
            let sections = description.walk(device)?;
            Ok((device_bytes, sections))
        }
        None if seen == EndSeen::ColoState => Ok((device_bytes, vec![])),
        None => Err(incomplete("no description, and QEMU did not say that it is in state colo")),
    }
}

/// Checks the first byte of a device buffer.
pub(super) fn check_first(first: Option<u8>) -> Result<(), Fault> {
    check_byte("first byte of the device sections", first, wire::SECTION_FULL)
}

/// Checks the last byte of a device buffer.
pub(super) fn check_last(last: Option<u8>) -> Result<(), Fault> {
    check_byte("last byte of the device sections", last, wire::EOF)
}

fn check_byte(what: &'static str, found: Option<u8>, expected: u8) -> Result<(), Fault> {
    match found {
        Some(found) if found == expected => Ok(()),
        Some(found) => Err(Fault::DeviceBytes { what, found, expected }),
        None => Err(Fault::Incomplete("no device sections")),
    }
}

/// A footer and an end mark.
fn ends_like_devices(bytes: &[u8]) -> bool {
    let end = bytes.last_chunk::<FOOTER_AND_EOF_BYTES>();
    matches!(end, Some([wire::FOOTER, _, _, _, _, wire::EOF]))
}

impl Description {
    /// Walks from section to section by the lengths the description gives.
    fn walk(&self, device: &[u8]) -> Result<Vec<DeviceSection>, (usize, Place, Fault)> {
        let disagree = |at, device: &str, reason: String| {
            let device = device.to_owned();
            (at, Place::Description, Fault::Description { device, reason })
        };
        if self.page_size != crate::units::PAGE_BYTES as u64 {
            let reason = format!("{}, only 4096 is supported", self.page_size);
            return Err(disagree(0, "page_size", reason));
        }
        let mut input = Input::new(device);
        let position = |input: &Input<'_>| device.len() - input.rest().len();
        let mut sections = Vec::new();
        for d in &self.devices {
            let start = position(&input);
            d.read(&mut input).map_err(|stop| match stop {
                Stop::Fault(fault) => (start, Place::Devices, *fault),
                Stop::Short => disagree(start, &d.name, "longer than the device sections".into()),
            })?;
            let bytes = start..position(&input);
            sections.push(DeviceSection { name: d.name.clone(), instance: d.instance_id, bytes });
        }
        match input.rest() {
            [wire::EOF] => Ok(sections),
            rest => {
                let reason = format!("{} bytes behind the last device, expected the end mark", rest.len());
                Err(disagree(position(&input), "(end)", reason))
            }
        }
    }
}

impl Device {
    fn read(&self, input: &mut Input<'_>) -> Result<(), Stop> {
        let disagree = |reason| Fault::Description { device: self.name.clone(), reason };
        check_first(input.rest().first().copied())?;
        input.u8()?;
        let id = input.be32()?;
        let name = input.counted()?;
        let (instance, version) = (input.be32()?, input.be32()?);
        let expected = (self.name.as_bytes(), self.instance_id, self.version.unwrap_or(version));
        if (name, instance, version) != expected {
            let name = String::from_utf8_lossy(name);
            return Err(disagree(format!(
                "instance {}, version {} announced, section of {name:?}, instance {instance}, version {version} found",
                expected.1, expected.2
            ))
            .into());
        }
        let body_bytes = match self.size {
            Some(size) if self.fields.is_empty() => Some(size),
            _ => body_bytes(&self.fields, &self.subsections),
        };
        let body_bytes = body_bytes.and_then(|b| usize::try_from(b).ok());
        input.bytes(body_bytes.ok_or_else(|| disagree("its sizes overflow".into()))?)?;
        super::precopy::footer(input, id)
    }
}

/// Bytes of fields and subsections; `None` if the sum overflows. The depth of the recursion is bounded by
/// that of the JSON parser.
fn body_bytes(fields: &[Field], subsections: &[Subsection]) -> Option<u64> {
    const MARKER_LENGTH_AND_VERSION_BYTES: u64 = 1 + 1 + 4;
    let mut sum = 0u64;
    for f in fields {
        sum = sum.checked_add(f.size.checked_mul(f.array_len.unwrap_or(1))?)?;
    }
    for s in subsections {
        let head = MARKER_LENGTH_AND_VERSION_BYTES + s.vmsd_name.len() as u64;
        sum = sum.checked_add(head)?.checked_add(body_bytes(&s.fields, &s.subsections)?)?;
    }
    Some(sum)
}
