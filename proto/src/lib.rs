//! The contract between Understudy's processes.
//!
//! A type belongs here only if two processes must read the same bytes the same way: identities, epochs,
//! page frames, what is negotiated, and QEMU's migration stream. The core does no input or output and has
//! no clock; everything gRPC is behind the feature `rpc`, threads that work on pages are behind `pool`.
#![forbid(unsafe_code)]

pub mod codec;
pub mod control;
pub mod digest;
pub mod epoch;
pub mod error;
pub mod frame;
pub mod heartbeat;
pub mod ids;
pub mod layout;
pub mod limits;
pub mod negotiate;
pub mod ownership;
pub mod pace;
pub mod policy;
#[cfg(feature = "pool")]
pub mod pool;
pub mod protected;
pub mod qemu;
#[cfg(feature = "rpc")]
pub mod rpc;
#[cfg(feature = "rpc")]
pub mod sealed;
pub mod units;

pub use error::ProtocolError;
