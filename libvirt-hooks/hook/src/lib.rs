//! How a domain's XML switches protection on, and how libvirt's hook tells the agent.
//!
//! - [`metadata`]: the element a user writes, the command and the state beside it;
//! - [`call`]: one line to the agent and one back;
//! - [`client`]: the hook itself, which has two seconds for everything.
//!
//! **Nothing here may reach libvirt.** While a hook runs, libvirt waits for it and holds the domain: a hook that asks
//! libvirt anything waits for itself. A test looks through the dependencies of this crate.
#![forbid(unsafe_code)]

pub mod call;
pub mod client;
pub mod metadata;
