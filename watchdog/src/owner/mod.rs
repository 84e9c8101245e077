//! Who runs a guest: detection, claim, confirmation. Pure: events and the time in, commands out.
//!
//! [`Protocol`] is the part without time: what a record of the arbiter means for this host and which record it wants
//! next. Every interleaving of two of them is checked up to a bound. [`Engine`] adds what needs time: suspicion,
//! patience, and how often to look.

mod detector;
mod engine;
mod event;
mod facts;
mod protocol;
mod report;

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;

pub use detector::Suspicion;
pub use engine::{Engine, Input, Output, Timing};
pub use event::{Command, Event, Image, Local, LostBackup, Policies, QemuCrash, Role, Seeded};
pub use facts::Sending;
pub use protocol::Protocol;
pub use report::Takeover;
