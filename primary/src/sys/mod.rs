//! The only unsafe code of this crate: a packet socket, what the allocator keeps, and what the micro-VM needs of KVM and
//! of memory that a guest writes to.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod dirty_ring;
#[cfg(target_arch = "x86_64")]
mod guest_memory;
mod heap;
#[cfg(target_arch = "x86_64")]
mod kvm;
mod packet;
#[cfg(target_arch = "x86_64")]
mod program;

#[cfg(target_arch = "x86_64")]
pub(crate) use dirty_ring::DirtyRing;
#[cfg(target_arch = "x86_64")]
pub(crate) use guest_memory::GuestMemory;
pub(crate) use heap::keep_freed_memory;
#[cfg(target_arch = "x86_64")]
pub(crate) use kvm::{Slots, load_xsave};
pub(crate) use packet::{deletions, frames_of, watched};
#[cfg(target_arch = "x86_64")]
pub(crate) use program::micro_program;
