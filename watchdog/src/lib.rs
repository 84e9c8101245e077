//! The supervisor of the primary agent: lets a guest run that the agent has left stopped.
//!
//! QEMU stops a guest for every checkpoint and starts it when its peer, the primary agent, has answered; it has no time
//! limit. An agent that dies in that moment leaves the guest stopped for ever. The supervisor is a process of its own
//! that needs nothing of the agent: [`life`] tells when it dies, [`record`] which guests it had, [`monitor`] is the way
//! to their QEMUs. [`engine`] decides and [`supervisor`] carries out.
//!
//! It only ever lets a guest *run*. It opens nothing for the guest's output: whatever held that when the agent died goes
//! on holding it (invariant 7), until an agent is back and has committed what the guest did.

pub mod arbiter;
pub mod bound;
pub mod config;
pub mod engine;
pub mod keeper;
pub mod life;
pub mod look;
pub mod monitor;
pub mod owner;
pub mod record;
pub mod supervisor;
pub mod witness;

mod worker;
