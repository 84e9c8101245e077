//! What follows from what the agents of both hosts say.

use understudy_proto::heartbeat::Heartbeat;
use understudy_proto::ids::{EpochId, Generation};

use super::event::Seeded;

/// What the primary agent of this host says of a guest whose epochs it sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sending {
    /// Generation of the guest.
    pub generation: Generation,
    /// Last epoch the backup has acknowledged.
    pub committed: EpochId,
}

impl Sending {
    /// The backup that holds everything let out so far, if the other host's watchdog says that its agent does: the image
    /// must be of this generation and not older than what was acknowledged here. Two lives of a backup agent cannot be
    /// taken for each other: what one has acknowledged the next does not hold.
    pub fn seeded(&self, peer: &Heartbeat) -> Option<Seeded> {
        let incarnation = peer.image?;
        (peer.generation == self.generation && peer.epoch >= self.committed).then(|| Seeded {
            backup: peer.host.clone(),
            incarnation,
            generation: self.generation,
            epoch: peer.epoch,
        })
    }
}
