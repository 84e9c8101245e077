//! The only unsafe code of this crate: what the micro-VM needs of KVM and of memory that a guest writes to.
#![allow(unsafe_code)]

mod dirty_ring;
mod guest_memory;
mod kvm;
mod program;

pub(crate) use dirty_ring::DirtyRing;
pub(crate) use guest_memory::GuestMemory;
pub(crate) use kvm::{Slots, load_xsave};
pub(crate) use program::micro_program;
