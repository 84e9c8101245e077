//! Our elements in `<metadata>` of a domain. Each has a namespace of its own, so that libvirt keeps, replaces and
//! reports them one by one (`virsh metadata DOMAIN URI`):
//!
//! | namespace | element | written by |
//! |---|---|---|
//! | [`PROTECT_NAMESPACE`] | `<protect enabled='yes' backup='hostb'/>` | the user |
//! | [`COMMAND_NAMESPACE`] | `<failover/>`, taken out by the agent that takes it up | the user |
//! | [`STATE_NAMESPACE`] | `<state value='protected' .../>` | the agent, in the live XML only |
//!
//! `schema/understudy-domain.rng` says the same as [`Protect`] in RELAX NG.

mod command;
mod error;
mod policy;
mod protect;
mod state;
mod tree;

pub use command::Command;
pub use error::MetadataError;
pub use policy::Policy;
pub use protect::{DiskPolicy, EPOCH_MAX, EPOCH_MIN, Epoch, NicPolicy, Output, Protect, asks_to_be_required};
pub use state::State;

/// Namespace of the element that switches protection on.
pub const PROTECT_NAMESPACE: &str = "urn:understudy:domain:1";

/// Namespace of commands.
pub const COMMAND_NAMESPACE: &str = "urn:understudy:command:1";

/// Namespace of what the agent reports. Another one than the user's: a report is no order.
pub const STATE_NAMESPACE: &str = "urn:understudy:state:1";

/// The prefix under which libvirt is asked to keep the state.
pub const STATE_PREFIX: &str = "understudy-state";

/// The largest domain XML that is read, in bytes; those of libvirt with hundreds of devices have about 200 KB.
pub const MAX_XML_BYTES: usize = 1 << 20;

#[cfg(test)]
mod tests;
