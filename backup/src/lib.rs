//! The agent that holds the committed image of a guest and promotes it.
//!
//! ```text
//!  primary agent ==gRPC==> agent: Hello checked, version agreed
//!                            |
//!                            v            one per guest
//!                          guest (owner) <---> engine (pure: every decision)
//!                           |   |    |
//!              frames, jobs |   |    | blocking calls
//!                           v   |    v
//!                        worker |  promoter (libvirt): standby domain, load, run
//!              assembly, image  v
//!                        control file
//! ```

pub mod agent;
pub mod assembly;
pub mod config;
pub mod control_store;
pub mod decode;
pub mod dump;
pub mod engine;
pub mod guest;
pub mod host;
pub mod image;
pub mod libvirt;
pub mod promoter;
pub mod server;
pub mod shared;
pub mod stats;
mod sys;
pub mod worker;
