//! The output gate: what a guest sends leaves the host only when the backup has committed the epoch it was sent in
//! (invariant 1), and not at all while nobody is there to say so (invariant 7).
//!
//! ```text
//! tap of the guest --clsact: redirect all--> ifb, root qdisc `plug` --released--> bridge or Open vSwitch
//! macvtap, root qdisc `plug` --released--> network
//! ```
//!
//! The kernel holds the frames, so they wait while the agent is dead. [`engine`] decides, without a kernel, what the
//! qdiscs are told; [`Keeper`] is what the capture and the owner of a guest share; [`NetlinkGate`] does it by netlink.

pub mod engine;
mod keeper;
mod kernel;
mod netlink;
#[cfg(feature = "test-hooks")]
pub mod planted;
mod port;
mod watch;

use std::time::Duration;

pub use engine::{GateEngine, Op, Sealing, State};
pub use keeper::{Keeper, SharedKeeper};
pub use kernel::NetlinkGate;
pub use port::{Port, PortRefusal, by_vhost, gate_device, ports};
pub use watch::Watch;

/// How long released frames may take to leave.
pub const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// Bytes that may wait in the gate of one interface. More than a guest sends in any epoch at 10 Gbit/s, and far above
/// [`HIGH_WATER_BYTES`], at which its epoch ends: a frame is dropped only when no epoch is committed for long.
pub const LIMIT_BYTES: u32 = 256 << 20;

/// Waiting bytes at which an epoch ends however short it is.
pub const HIGH_WATER_BYTES: u64 = 1 << 20;

/// What is in the gate of a guest, all its interfaces together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Held {
    /// Frames that wait.
    pub frames: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Frames that found the gate full, since it was made.
    pub dropped: u64,
}

/// Why the gate could not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum GateError {
    /// The kernel refused.
    #[error("cannot {action}: {source}")]
    Kernel {
        /// What was tried, and on what.
        action: String,
        /// The kernel's reason.
        source: std::io::Error,
    },
    /// Something else is where the gate has to be.
    #[error("{device} cannot be gated: {reason}; {remedy}")]
    Occupied {
        /// The interface.
        device: String,
        /// What is there.
        reason: String,
        /// What to do.
        remedy: String,
    },
    /// The interface is not there, or no longer.
    #[error("there is no network device {device}")]
    NoDevice {
        /// Its name.
        device: String,
    },
    /// Frames that were released are still there.
    #[error("{frames} released frames have not left {device} within {limit:?}")]
    NotDrained {
        /// The device they wait in.
        device: String,
        /// How many.
        frames: u64,
        /// How long they had.
        limit: Duration,
    },
    /// Somebody else has a hand in the host's network.
    #[error("somebody has taken the gate of {device} away: what the guest said since may have left early")]
    TakenAway {
        /// The interface.
        device: String,
    },
    /// An interface of the guest has no gate.
    #[error("an interface of the guest is not gated: {reason}")]
    Hole {
        /// Why.
        reason: String,
    },
    /// The gate was told something out of turn; nothing was done.
    #[error("the output gate is {state}: {what} is out of turn")]
    OutOfTurn {
        /// Its state.
        state: &'static str,
        /// What it was told.
        what: String,
    },
}

/// The gate of one guest: every interface of it. Its calls block, and those at a stop are short.
pub trait OutputGate: Send {
    /// Does what the engine decided, on every interface.
    ///
    /// # Errors
    /// [`GateError`], here and below. A gate that failed half way holds more than it should, never less.
    fn apply(&mut self, op: Op) -> Result<(), GateError>;

    /// What waits.
    fn held(&mut self) -> Result<Held, GateError>;

    /// Gates the interfaces the guest has now and takes away the gates of those it has no longer. A new one holds
    /// everything from the start if `shut`.
    fn adjust(&mut self, ports: &[Port], shut: bool) -> Result<(), GateError>;

    /// Whether all of it still stands; [`OutputGate::adjust`] mends it.
    ///
    /// # Errors
    /// [`GateError::TakenAway`] if not.
    fn intact(&mut self) -> Result<(), GateError>;

    /// Lets everything out and takes the gate away, in the order that loses no frame.
    fn remove(&mut self) -> Result<(), GateError>;

    /// Throws away what is held. What the guest sends afterwards goes nowhere.
    fn discard(&mut self) -> Result<(), GateError>;
}
