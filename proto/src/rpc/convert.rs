//! Checks shared by the conversions.

use crate::ids::{EpochId, Generation, GuestId};
use crate::{ProtocolError, limits};
use bytes::Bytes;

pub(super) fn required<T>(field: &'static str, value: Option<T>) -> Result<T, ProtocolError> {
    value.ok_or(ProtocolError::Missing { field })
}

pub(super) fn text(field: &'static str, value: String) -> Result<String, ProtocolError> {
    ProtocolError::check_len(field, value.len() as u64, limits::MAX_TEXT_BYTES as u64)?;
    Ok(value)
}

pub(super) fn optional_text(
    field: &'static str,
    value: Option<String>,
) -> Result<Option<String>, ProtocolError> {
    value.map(|v| text(field, v)).transpose()
}

/// Cuts a text of our own to what the other side accepts.
pub(super) fn shortened(value: String) -> String {
    shortened_to(value, limits::MAX_TEXT_BYTES)
}

/// Cuts a text to so many bytes.
pub(super) fn shortened_to(mut value: String, max_bytes: usize) -> String {
    if value.len() > max_bytes {
        let end = (0..=max_bytes).rev().find(|i| value.is_char_boundary(*i)).unwrap_or(0);
        value.truncate(end);
    }
    value
}

pub(super) fn sixteen(field: &'static str, value: &[u8]) -> Result<[u8; 16], ProtocolError> {
    value.try_into().map_err(|_| ProtocolError::invalid(field, format!("{} bytes, expected 16", value.len())))
}

pub(super) fn guest(value: &[u8]) -> Result<GuestId, ProtocolError> {
    sixteen("guest UUID", value).map(|b| GuestId(uuid::Uuid::from_bytes(b)))
}

pub(super) fn uuid_bytes(value: uuid::Uuid) -> Bytes {
    Bytes::copy_from_slice(value.as_bytes())
}

/// The top value is kept free, so that the next one always exists.
fn counter(field: &'static str, value: u64) -> Result<u64, ProtocolError> {
    if value == u64::MAX {
        return Err(ProtocolError::invalid(field, format!("{value}, which has no successor")));
    }
    Ok(value)
}

pub(super) fn generation(value: u64) -> Result<Generation, ProtocolError> {
    if value == 0 {
        return Err(ProtocolError::invalid("generation", "0, the first is 1"));
    }
    counter("generation", value).map(Generation)
}

pub(super) fn epoch(value: u64) -> Result<EpochId, ProtocolError> {
    counter("epoch", value).map(EpochId)
}
