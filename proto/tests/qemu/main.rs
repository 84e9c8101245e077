//! The readers and the writer of QEMU's streams, on streams made by hand, recorded from QEMU, and random ones.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod handmade;
mod properties;
mod recorded;
mod refusals;
mod support;
