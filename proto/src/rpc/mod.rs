//! gRPC between agents, and between an agent and its operator. Everything outside this module uses the domain
//! types here, checked on receipt; the generated types do not leave it.

pub mod admin;
mod admin_convert;
mod admin_service;
mod convert;
pub mod epoch;
mod epoch_convert;
mod epoch_service;
pub mod lane;
mod lane_merge;
pub mod owner;
mod secure;
pub mod status;
mod tls;
pub mod transport;
pub mod witness;

pub use admin_service::{AdminClient, AdminService, admin_routes};
pub use epoch_service::{EpochService, EpochsClient, Inbound, Outbound, epoch_routes};
pub use status::{Failure, FailureKind};
pub use tonic::async_trait;
pub use tonic::service::Routes;

use std::pin::Pin;
use tokio_stream::Stream;

/// A stream of results, as both agents hand them around.
pub type FallibleStream<T> = Pin<Box<dyn Stream<Item = Result<T, Failure>> + Send>>;

#[allow(missing_docs, unreachable_pub, missing_debug_implementations, clippy::all, clippy::pedantic)]
mod generated {
    pub(super) mod epoch {
        include!("../gen/understudy.epoch.v1.rs");
    }
    pub(super) mod admin {
        include!("../gen/understudy.admin.v1.rs");
    }
    pub(super) mod owner {
        include!("../gen/understudy.owner.v1.rs");
    }
    pub(super) mod witness {
        include!("../gen/understudy.witness.v1.rs");
    }
}
