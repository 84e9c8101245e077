//! From a difference back to the page.

use crate::{PAGE_BYTES, Page};

/// Why bytes are not the encoding of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The bytes end inside of a pair.
    #[error("the pair at byte {at} needs {needed} bytes more, {available} are there")]
    Truncated {
        /// Offset in the encoding.
        at: usize,
        /// Bytes needed from there on.
        needed: usize,
        /// Bytes that are there.
        available: usize,
    },
    /// A length takes more than two bytes.
    #[error("the length at byte {at} is longer than two bytes")]
    LongLength {
        /// Offset in the encoding.
        at: usize,
    },
    /// A run without a byte, other than the zero run at the page's beginning.
    #[error("the run at byte {at} has length 0")]
    EmptyRun {
        /// Offset in the encoding.
        at: usize,
    },
    /// A run reaches behind the page.
    #[error("the run at byte {at} ends at {end} of the page, which has {PAGE_BYTES} bytes")]
    Outside {
        /// Offset in the encoding.
        at: usize,
        /// Where in the page it would end.
        end: usize,
    },
}

/// Turns the old version in `page` into the new one.
///
/// # Errors
/// If `encoded` is not the encoding of a page. Some of its runs may be in `page` then.
pub fn decode(encoded: &[u8], page: &mut Page) -> Result<(), DecodeError> {
    let (mut at, mut end) = (0, 0);
    while at < encoded.len() {
        let (gap, gap_bytes) = length(encoded, at)?;
        if gap == 0 && at != 0 {
            return Err(DecodeError::EmptyRun { at });
        }
        let start = end + gap;
        if start > PAGE_BYTES {
            return Err(DecodeError::Outside { at, end: start });
        }
        at += gap_bytes;
        let (run, run_bytes) = length(encoded, at)?;
        if run == 0 {
            return Err(DecodeError::EmptyRun { at });
        }
        end = start + run;
        if end > PAGE_BYTES {
            return Err(DecodeError::Outside { at, end });
        }
        at += run_bytes;
        let rest = &encoded[at..];
        let Some(new) = rest.get(..run) else {
            return Err(DecodeError::Truncated { at, needed: run, available: rest.len() });
        };
        copy(&mut page[start..end], new);
        at += run;
    }
    Ok(())
}

/// Copies all of `from` to `to`, of the same length. Short runs, the usual ones, are done with two moves of fixed size
/// that overlap.
#[inline(always)]
fn copy(to: &mut [u8], from: &[u8]) {
    fn ends<const N: usize>(to: &mut [u8], from: &[u8]) -> Option<()> {
        *to.first_chunk_mut::<N>()? = *from.first_chunk()?;
        *to.last_chunk_mut::<N>()? = *from.last_chunk()?;
        Some(())
    }
    let copied = match to.len() {
        4..=8 => ends::<4>(to, from),
        9..=16 => ends::<8>(to, from),
        17..=32 => ends::<16>(to, from),
        33..=64 => ends::<32>(to, from),
        _ => None,
    };
    if copied.is_none() {
        to.copy_from_slice(from);
    }
}

/// The length at an offset and the bytes it takes. Two bytes must be there even for a short one: something follows every
/// length.
#[inline(always)]
fn length(encoded: &[u8], at: usize) -> Result<(usize, usize), DecodeError> {
    let rest = encoded.get(at..).unwrap_or_default();
    let Some(&[first, second]) = rest.first_chunk::<2>() else {
        return Err(DecodeError::Truncated { at, needed: 2, available: rest.len() });
    };
    if first < 0x80 {
        Ok((usize::from(first), 1))
    } else if second < 0x80 {
        Ok((usize::from(first & 0x7f) | usize::from(second) << 7, 2))
    } else {
        Err(DecodeError::LongLength { at })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(encoded: &[u8]) -> String {
        decode(encoded, &mut [0; PAGE_BYTES]).unwrap_err().to_string()
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        assert_eq!(error(&[1]), "the pair at byte 0 needs 2 bytes more, 1 are there");
        assert_eq!(error(&[1, 2, 9]), "the pair at byte 2 needs 2 bytes more, 1 are there");
        assert_eq!(error(&[1, 1, 9, 0, 1, 9]), "the run at byte 3 has length 0");
        assert_eq!(error(&[1, 0, 9]), "the run at byte 1 has length 0");
        assert_eq!(error(&[0x80, 0x80, 9]), "the length at byte 0 is longer than two bytes");
        assert_eq!(
            error(&[0xff, 0x7f, 1, 9]),
            "the run at byte 0 ends at 16383 of the page, which has 4096 bytes"
        );
        assert_eq!(
            error(&[0xff, 0x1f, 2, 9, 9]),
            "the run at byte 2 ends at 4097 of the page, which has 4096 bytes"
        );
    }

    #[test]
    fn nothing_is_no_change() {
        let mut page = [7; PAGE_BYTES];
        decode(&[], &mut page).unwrap();
        assert_eq!(page, [7; PAGE_BYTES]);
    }
}
