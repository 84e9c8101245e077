//! What an epoch is, and the order of what happens to it: captured <= sent <= committed <= released
//! (invariant 8). The tokens here can only be built from each other in that order.

use crate::digest::Digest;
use crate::frame::FrameTotals;
use crate::ids::{EpochId, Generation};
use crate::{ProtocolError, limits};

/// How the pages of an epoch relate to what the backup has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EpochKind {
    /// All of memory: replaces whatever the backup holds.
    Full,
    /// The pages dirtied since the epoch before, which the backup must have committed.
    Delta,
}

/// Ends an epoch on the wire: the backup commits only what matches it in every field (invariant 2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EpochManifest {
    /// Owner of the guest when the epoch was captured.
    pub generation: Generation,
    /// Number of the epoch.
    pub epoch: EpochId,
    /// Full copy or delta.
    pub kind: EpochKind,
    /// Page frames sent for the epoch.
    pub frames: u64,
    /// Page records in them.
    pub pages: u64,
    /// Bytes of all page frames.
    pub frame_bytes: u64,
    /// Digest of all pages in the order sent.
    pub pages_digest: Digest,
    /// Bytes of the device buffer.
    pub device_bytes: u64,
    /// Digest of the device buffer.
    pub device_digest: Digest,
}

impl EpochManifest {
    /// Of an epoch whose frames hold `totals`, and whose device buffer is this.
    pub fn new(
        generation: Generation,
        epoch: EpochId,
        kind: EpochKind,
        totals: &FrameTotals,
        device: &[u8],
    ) -> Self {
        Self {
            generation,
            epoch,
            kind,
            frames: totals.frames,
            pages: totals.pages,
            frame_bytes: totals.frame_bytes,
            pages_digest: totals.digest,
            device_bytes: device.len() as u64,
            device_digest: Digest::of(device),
        }
    }

    /// Checks what can be checked without the epoch's data.
    ///
    /// # Errors
    /// If the device buffer is empty or over its limit.
    pub fn validate(&self) -> Result<(), ProtocolError> {
        ProtocolError::check_len("device buffer bytes", self.device_bytes, limits::MAX_DEVICE_BYTES)?;
        if self.device_bytes == 0 {
            return Err(ProtocolError::invalid("device buffer bytes", "0, a guest always has device state"));
        }
        Ok(())
    }
}

/// Proof that the backup has committed an epoch. Made only from a received acknowledgement, see
/// [`Captured::acknowledged`]; a release of output needs one (invariant 1).
#[derive(Debug, PartialEq, Eq)]
pub struct Committed {
    epoch: EpochId,
}

impl Committed {
    /// The epoch that is committed.
    pub fn epoch(&self) -> EpochId {
        self.epoch
    }
}

/// An epoch that was captured here and is not yet acknowledged. Not `Clone`: it is turned into [`Committed`]
/// once or given up.
#[derive(Debug, PartialEq, Eq)]
pub struct Captured {
    generation: Generation,
    epoch: EpochId,
}

impl Captured {
    /// To be called by the capture engine when the last byte of the epoch is here.
    pub fn new(generation: Generation, epoch: EpochId) -> Self {
        Self { generation, epoch }
    }

    /// The epoch.
    pub fn epoch(&self) -> EpochId {
        self.epoch
    }

    /// Turns the capture into a commit, if the acknowledgement is for exactly this epoch and generation.
    ///
    /// # Errors
    /// Gives the capture back with the reason otherwise.
    pub fn acknowledged(
        self,
        generation: Generation,
        epoch: EpochId,
    ) -> Result<Committed, (Self, ProtocolError)> {
        if (generation, epoch) == (self.generation, self.epoch) {
            Ok(Committed { epoch })
        } else {
            let reason = format!(
                "acknowledges epoch {epoch} of generation {generation}, waiting for epoch {} of generation {}",
                self.epoch, self.generation
            );
            Err((self, ProtocolError::invalid("ack", reason)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_matching_ack_commits() {
        let captured = Captured::new(Generation(2), EpochId(7));
        let (captured, _) = captured.acknowledged(Generation(1), EpochId(7)).unwrap_err();
        let (captured, err) = captured.acknowledged(Generation(2), EpochId(8)).unwrap_err();
        assert_eq!(
            err.to_string(),
            "ack is invalid: acknowledges epoch 8 of generation 2, waiting for epoch 7 of generation 2"
        );
        assert_eq!(captured.acknowledged(Generation(2), EpochId(7)).unwrap().epoch(), EpochId(7));
    }
}
