//! From a payload back to its page.

use super::lz4;
use crate::ProtocolError;
use crate::frame::{Codec, Record};
use crate::units::PageData;

/// The content of a record's page, `None` if it is zeros. `before` is the page as in the epoch before, `None` where
/// nothing may refer to it; `scratch` may be used for the content.
///
/// # Errors
/// If the payload is not what the codec makes, or refers to a page that may not be referred to; naming the page.
pub fn decode<'a>(
    record: &Record<'a>,
    before: Option<&'a PageData>,
    scratch: &'a mut PageData,
) -> Result<Option<&'a PageData>, ProtocolError> {
    match record.codec {
        Codec::Zero => Ok(None),
        Codec::Raw => raw(record).map(Some),
        Codec::Unchanged => before.map(Some).ok_or_else(|| no_reference(record)),
        Codec::Xbzrle | Codec::Lz4 => {
            if record.codec == Codec::Xbzrle {
                scratch.copy_from_slice(before.ok_or_else(|| no_reference(record))?);
            }
            apply(record, scratch)?;
            Ok(Some(scratch))
        }
        Codec::Batch => Err(fault(record, "a batch is no page")),
    }
}

/// Turns `page`, as in the epoch before, into what the record says, in place.
///
/// # Errors
/// If the payload is not what the codec makes, naming the page; its content is undefined then.
pub fn apply(record: &Record<'_>, page: &mut PageData) -> Result<(), ProtocolError> {
    match record.codec {
        Codec::Zero => page.fill(0),
        Codec::Raw => page.copy_from_slice(raw(record)?),
        Codec::Unchanged => {}
        Codec::Xbzrle => xbzrle::decode(record.payload, page).map_err(|error| fault(record, error))?,
        Codec::Lz4 => lz4::unpack(record.payload, page).map_err(|error| fault(record, error))?,
        Codec::Batch => return Err(fault(record, "a batch is no page")),
    }
    Ok(())
}

fn raw<'a>(record: &Record<'a>) -> Result<&'a PageData, ProtocolError> {
    record.payload.try_into().map_err(|_| fault(record, format!("{} bytes", record.payload.len())))
}

fn no_reference(record: &Record<'_>) -> ProtocolError {
    fault(record, "refers to the epoch before, where nothing may")
}

fn fault(record: &Record<'_>, reason: impl std::fmt::Display) -> ProtocolError {
    let Record { block, page, codec, .. } = record;
    ProtocolError::invalid(
        "page payload",
        format!("{reason} (page {page} of block {block}, codec {})", codec.name()),
    )
}
