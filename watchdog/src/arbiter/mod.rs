//! Who decides which host runs a guest.

#[cfg(feature = "etcd")]
mod etcd;
mod fence;
mod witness;

#[cfg(feature = "etcd")]
pub use etcd::EtcdArbiter;
pub use fence::{FenceCommand, FenceOutcome, Fencing};
pub use witness::WitnessArbiter;

use understudy_proto::ids::GuestId;
use understudy_proto::ownership::Ownership;
use understudy_proto::rpc::{Failure, async_trait};

/// Keeps one record per guest and replaces it by compare-and-swap.
///
/// A read sees every swap that took effect before it began. What came of a swap is learnt by reading: its own answer may
/// be lost, or be about an earlier copy of it.
#[async_trait]
pub trait Arbiter: Send + Sync {
    /// The record of a guest, `None` if there is none.
    ///
    /// # Errors
    /// If the arbiter does not answer, or not usably. Then nothing is known and nothing may be concluded.
    async fn read(&self, guest: GuestId) -> Result<Option<Ownership>, Failure>;

    /// Asks for the record of the term before `new` to be replaced by it.
    ///
    /// # Errors
    /// If it is not known whether that has happened or will.
    async fn swap(&self, guest: GuestId, new: &Ownership) -> Result<(), Failure>;

    /// What it is, for people.
    fn name(&self) -> String;
}
