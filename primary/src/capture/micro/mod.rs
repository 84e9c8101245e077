//! The micro-VM: a KVM guest of our own, of a few pages and one vCPU, that writes what is known in advance.
//!
//! [`MicroSource`] captures it as [`super::ColoSource`] captures a guest of QEMU, and [`MicroVm::restore`] makes it
//! anew from an image and a device buffer. It is there for failovers by the thousand in tests, for a self-test of
//! a host's dirty tracking, and as the least that a stop can take.
//!
//! ```text
//! MicroSource --> MicroVm --> vcpu thread --> KVM_RUN
//!      |             |  \---> dirty pages: log, manual protect, ring
//!      |             \------> memory (copies only)
//!      \--> state: registers, MSRs, XSAVE, events, APIC <--> device buffer
//! ```

pub mod program;

mod boot;
mod dirty;
mod error;
mod source;
mod state;
mod vcpu;
mod vm;

#[cfg(test)]
mod tests;

pub use dirty::{DirtyPage, DirtyTracking};
pub use error::MicroError;
pub use source::MicroSource;
pub use state::VcpuState;
pub use vm::{MicroVm, Shape, unusable};
