//! XBZRLE: the difference between two versions of a memory page, as QEMU encodes it for live migration.
//!
//! # The format
//!
//! An encoded page is a sequence of pairs, each a *zero run* and a *nonzero run* (of the exclusive or of both versions):
//!
//! ```text
//! page         = pair*
//! pair         = zero-run nonzero-run
//! zero-run     = length              bytes that are as they were
//! nonzero-run  = length byte{length} the new bytes that follow them
//! length       = one byte below 0x80, or two: low seven bits with 0x80 set, then the high seven bits
//! ```
//!
//! - A page begins with a zero run, of length 0 if its first byte changed. Every other length is at least 1.
//! - What follows the last nonzero run is unchanged and not mentioned. A page without changes has no encoding; QEMU
//!   sends nothing for it.
//! - The bytes are the new ones, not their exclusive or with the old ones: a decoder writes over its old version.
//! - A nonzero run may hold bytes that did not change. QEMU's encoder makes none such; this one does, see [`MAX_GAP`].
//! - There is no checksum and no length of the page: decoded over another old version it gives another page. Whoever
//!   uses it must know that both sides have the same old version.
//!
//! # What this crate does
//!
//! [`encode`] compares both versions into a bit per byte (vector instructions where there are any), closes short gaps in
//! these bits, counts the encoding's bytes, and only then writes, run by run. [`decode`] follows QEMU's rules exactly:
//! what QEMU refuses is refused.
#![deny(unsafe_code)]

mod decode;
mod encode;
mod mask;
mod sys;

pub use decode::{DecodeError, decode};
pub use encode::{Backend, Outcome, encode, encoded_bytes};

/// Bytes of a page: that of QEMU's targets with 4 KiB pages, x86 among them.
pub const PAGE_BYTES: usize = 4096;

/// A page.
pub type Page = [u8; PAGE_BYTES];

/// Unchanged bytes between two changes that are sent along rather than counted. A new pair costs two bytes and the
/// time of a run; eight is where the time is won and few bytes are lost.
pub const MAX_GAP: usize = 7;

/// Bytes of the longest encoding: a page whose every byte changed.
pub const MAX_ENCODED_BYTES: usize = PAGE_BYTES + 3;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
