//! Vector instructions. Everything unsafe of this crate is in here.
//!
//! A value of [`Avx2`] or [`Avx512`] is proof that the processor has what its functions are compiled for: it can only be
//! had from `found`.
#![cfg_attr(target_arch = "x86_64", allow(unsafe_code))]

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86_64::{Avx2, Avx512};
