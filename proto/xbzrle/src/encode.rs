//! From two pages to their difference.

use crate::mask::{self, Borders, Mask};
use crate::{Page, sys};

/// What came of encoding a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Both versions are equal: there is nothing to send.
    Unchanged,
    /// The first so many bytes of the buffer are the encoding. What is behind them is not as it was.
    Encoded(usize),
    /// The encoding is longer than the buffer, whose content is not as it was.
    DoesNotPay,
}

/// A way to do it that this processor has. All of them give the same bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backend(Kind);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2(sys::Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(sys::Avx512),
}

impl Backend {
    /// The one every processor has, eight bytes at a time.
    pub const PORTABLE: Self = Self(Kind::Portable);

    /// Those this processor has, the best one first.
    pub fn available() -> impl Iterator<Item = Self> {
        #[cfg(target_arch = "x86_64")]
        let vector = [sys::Avx512::found().map(Kind::Avx512), sys::Avx2::found().map(Kind::Avx2)];
        #[cfg(not(target_arch = "x86_64"))]
        let vector = [];
        vector.into_iter().flatten().chain([Kind::Portable]).map(Self)
    }

    /// The best one of this processor. Cheap: the processor is asked once.
    pub fn best() -> Self {
        Self::available().next().unwrap_or(Self::PORTABLE)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512(_) => "avx512",
        }
    }

    /// [`encode`] in this way.
    pub fn encode(self, old: &Page, new: &Page, out: &mut [u8]) -> Outcome {
        match self.0 {
            Kind::Portable => write(&mask::portable(old, new), new, out),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(found) => found.encode(old, new, out),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512(found) => found.encode(old, new, out),
        }
    }

    /// [`encoded_bytes`] in this way.
    pub fn encoded_bytes(self, old: &Page, new: &Page) -> usize {
        match self.0 {
            Kind::Portable => measure(&mask::portable(old, new)),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(found) => found.encoded_bytes(old, new),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512(found) => found.encoded_bytes(old, new),
        }
    }
}

/// Encodes `new` as its difference from `old` into the beginning of `out`.
///
/// The length of `out` is the limit: give as many bytes as the difference may cost, and at most
/// [`crate::MAX_ENCODED_BYTES`].
pub fn encode(old: &Page, new: &Page, out: &mut [u8]) -> Outcome {
    Backend::best().encode(old, new, out)
}

/// Bytes that [`encode`] would write, 0 for equal pages.
pub fn encoded_bytes(old: &Page, new: &Page) -> usize {
    Backend::best().encoded_bytes(old, new)
}

/// Lengths from here on take two bytes.
const LONG: usize = 0x80;

/// Runs up to this length are copied with one move of fixed size.
const SHORT_COPY: usize = 32;

/// Inlined into the functions of `sys`, to be compiled with the instructions they have.
#[inline(always)]
pub(crate) fn measure(mask: &Mask) -> usize {
    let borders = Borders::of(mask);
    let (mut bytes, mut done) = (borders.run_bytes + 2 * borders.runs, 0);
    borders.each(|from, to| {
        bytes += usize::from(from - done >= LONG) + usize::from(to - from >= LONG);
        done = to;
        true
    });
    bytes
}

/// Inlined like [`measure`].
#[inline(always)]
pub(crate) fn write(mask: &Mask, new: &Page, out: &mut [u8]) -> Outcome {
    if mask.iter().fold(0, |all, word| all | word) == 0 {
        return Outcome::Unchanged;
    }
    let borders = Borders::of(mask);
    // What it takes at least; nearly always all it takes.
    if borders.run_bytes + 2 * borders.runs > out.len() {
        return Outcome::DoesNotPay;
    }
    let (mut at, mut done, mut fits) = (0, 0, true);
    borders.each(|from, to| {
        match pair(&mut out[at..], from - done, &new[from..], to - from) {
            Some(bytes) => at += bytes,
            None => fits = false,
        }
        done = to;
        fits
    });
    if fits { Outcome::Encoded(at) } else { Outcome::DoesNotPay }
}

/// Writes a pair whose nonzero run is the first `run` bytes of `new`; the bytes it took, `None` if they do not fit.
#[inline(always)]
fn pair(out: &mut [u8], gap: usize, new: &[u8], run: usize) -> Option<usize> {
    if gap < LONG
        && run <= SHORT_COPY
        && let Some((head, body)) = out.split_first_chunk_mut::<2>()
        && let (Some(body), Some(new)) =
            (body.first_chunk_mut::<SHORT_COPY>(), new.first_chunk::<SHORT_COPY>())
    {
        *head = [seven(gap), seven(run)];
        *body = *new;
        return Some(2 + run);
    }
    let mut at = length(out, gap)?;
    at += length(out.get_mut(at..)?, run)?;
    out.get_mut(at..at + run)?.copy_from_slice(new.get(..run)?);
    Some(at + run)
}

/// Writes a length; the bytes it took, `None` if they do not fit.
#[inline(always)]
fn length(out: &mut [u8], value: usize) -> Option<usize> {
    if value < LONG {
        *out.first_mut()? = seven(value);
        Some(1)
    } else {
        *out.first_chunk_mut::<2>()? = [seven(value) | 0x80, seven(value >> 7)];
        Some(2)
    }
}

#[inline(always)]
#[allow(clippy::cast_possible_truncation)] // seven bits
fn seven(value: usize) -> u8 {
    (value & 0x7f) as u8
}
