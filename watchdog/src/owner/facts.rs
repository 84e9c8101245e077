//! What follows from what the agents of both hosts say.

use understudy_proto::heartbeat::Heartbeat;
use understudy_proto::ids::{EpochId, Generation};
use understudy_proto::ownership::Term;

use super::event::Seeded;

/// What the primary agent of this host says of a guest whose epochs it sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sending {
    /// Generation of the guest.
    pub generation: Generation,
    /// Last epoch the backup has acknowledged.
    pub committed: EpochId,
    /// The agent refuses orders of this term or an older one to let the guest's output go. `None`: it is of before there
    /// was such a promise, and carries out whatever it is told.
    pub held: Option<Term>,
}

impl Sending {
    /// The backup that holds everything let out so far, if the other host's watchdog says that its agent does: the image
    /// must be of this generation and not older than what was acknowledged here. Two lives of a backup agent cannot be
    /// taken for each other: what one has acknowledged the next does not hold.
    ///
    /// Nothing that was ordered under the record of `term` or one before it may let output go any more: the order may be
    /// that of another life of this watchdog and still be on its way to an agent that stands still.
    pub fn seeded(&self, peer: &Heartbeat, term: Term) -> Option<Seeded> {
        let incarnation = peer.image?;
        let held = self.held.is_none_or(|held| held >= term);
        (held && peer.generation == self.generation && peer.epoch >= self.committed).then(|| Seeded {
            backup: peer.host.clone(),
            incarnation,
            generation: self.generation,
            epoch: peer.epoch,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use understudy_proto::ids::{GuestId, Incarnation};

    #[test]
    fn a_backup_counts_when_nothing_of_the_past_can_open_the_gate() {
        let peer = Heartbeat {
            guest: GuestId(uuid::Uuid::nil()),
            host: "b".into(),
            life: 1,
            number: 1,
            term: Term(3),
            generation: Generation(2),
            epoch: EpochId(9),
            qemu_age: None,
            image: Some(Incarnation(uuid::Uuid::nil())),
            ended: false,
            yields: false,
            crashed: false,
            settings: None,
        };
        let sending = |held| Sending { generation: Generation(2), committed: EpochId(9), held };
        let counts = |held| sending(held).seeded(&peer, Term(4)).is_some();
        assert!(counts(Some(Term(4))) && counts(Some(Term(5))));
        assert!(!counts(Some(Term(3))), "an order of term 4 may be on its way");
        assert!(counts(None), "an agent that cannot promise is taken as before");
        assert!(sending(Some(Term::NONE)).seeded(&peer, Term::NONE).is_some(), "there was never an order");
        let behind = Heartbeat { epoch: EpochId(8), ..peer.clone() };
        assert!(sending(Some(Term(4))).seeded(&behind, Term(4)).is_none());
    }
}
