//! Who owns a guest, as the arbiter keeps it: one record per guest, replaced only by compare-and-swap.
//!
//! Every replacement takes the next [`Term`], so a term names a record: whoever compares the term compares all of it.
//! Watchdogs read and write records; the arbiter stores them without looking inside.

use serde::{Deserialize, Serialize};

use crate::ProtocolError;
use crate::ids::{EpochId, Generation, Incarnation};

/// Bytes of the longest host name in a record; names in DNS are no longer.
pub const MAX_HOST_BYTES: usize = 255;

/// Bytes of the longest record: two names, an identity and numbers, as JSON.
pub const MAX_RECORD_BYTES: usize = 4096;

/// Number of a record; the first is 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Term(pub u64);

impl Term {
    /// Where there is no record.
    pub const NONE: Self = Self(0);

    /// The term of the record that replaces this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl std::fmt::Display for Term {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Who may do what with the guest.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Owner {
    /// The guest runs on `primary` with its output held for commits; `backup` may claim it while it is this life of its
    /// agent, the one that holds the image.
    Pair {
        /// Where the guest runs.
        primary: String,
        /// Where its image is.
        backup: String,
        /// Which life of the backup agent holds it.
        incarnation: Incarnation,
    },
    /// `by` is about to run the guest, and nobody's output goes out until that is confirmed or taken back.
    Claim {
        /// The claimant.
        by: String,
        /// The primary it is claimed from.
        from: String,
        /// Life of the claimant's backup agent.
        incarnation: Incarnation,
    },
    /// The guest runs on `owner` alone; nothing is held.
    Solo {
        /// Where it runs.
        owner: String,
    },
    /// The guest was shut down or its protection ended: there is nothing to claim.
    Ended {
        /// Who said so.
        by: String,
    },
}

/// A record.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Ownership {
    /// Its number.
    pub term: Term,
    /// Generation of the guest under this record. A host that knows only an older one has lost the guest.
    pub generation: Generation,
    /// Last epoch known to be committed when the record was written; for people.
    pub epoch: Option<EpochId>,
    /// Who may do what.
    pub owner: Owner,
}

impl Ownership {
    /// The bytes an arbiter stores.
    ///
    /// # Errors
    /// If a name is too long.
    pub fn encode(&self) -> Result<Vec<u8>, ProtocolError> {
        self.validate()?;
        serde_json::to_vec(self)
            .map_err(|error| ProtocolError::invalid("ownership record", error.to_string()))
    }

    /// What an arbiter gave, which must be the record of `term`.
    ///
    /// # Errors
    /// [`ProtocolError`]; nothing is guessed.
    pub fn decode(term: Term, bytes: &[u8]) -> Result<Self, ProtocolError> {
        ProtocolError::check_len("ownership record bytes", bytes.len() as u64, MAX_RECORD_BYTES as u64)?;
        let record: Self = serde_json::from_slice(bytes)
            .map_err(|error| ProtocolError::invalid("ownership record", error.to_string()))?;
        if record.term != term {
            let text = format!("says term {}, is kept as term {term}", record.term);
            return Err(ProtocolError::invalid("ownership record", text));
        }
        record.validate()?;
        Ok(record)
    }

    fn validate(&self) -> Result<(), ProtocolError> {
        if self.term == Term::NONE {
            return Err(ProtocolError::invalid("ownership term", "0, the first record is 1"));
        }
        match &self.owner {
            Owner::Pair { primary: one, backup: other, .. } | Owner::Claim { by: one, from: other, .. } => {
                check_host(one).and_then(|()| check_host(other))
            }
            Owner::Solo { owner } | Owner::Ended { by: owner } => check_host(owner),
        }
    }
}

/// An order that is not carried out: whoever gave it did not know the record that counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the order is of term {given}, term {newest} is known here")]
pub struct Outdated {
    /// Term of the order.
    pub given: Term,
    /// The term that makes it void.
    pub newest: Term,
}

/// What an agent knows of the terms its orders about a guest were given under. An order may arrive long after it was
/// given, when its watchdog has died and another has read, and made, other records: a process that stands still has it in
/// its socket.
///
/// It lives as long as the process of the agent, as does the socket: an order that was given to one life of an agent
/// reaches no other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Orders {
    newest: Option<Term>,
    held: Option<Term>,
    /// Orders to let output go that were taken and are not done.
    opening: u32,
}

impl Orders {
    /// Takes an order, if it is not of an older term than one that was taken. `None` is an operator's.
    ///
    /// # Errors
    /// [`Outdated`].
    pub fn take(&mut self, term: Option<Term>) -> Result<(), Outdated> {
        let Some(given) = term else { return Ok(()) };
        if let Some(newest) = self.newest.filter(|newest| given < *newest) {
            return Err(Outdated { given, newest });
        }
        self.newest = Some(given);
        Ok(())
    }

    /// Takes an order to let the guest's output go; [`Self::opened`] is to follow. Under one term a watchdog first lets it
    /// go and then holds it.
    ///
    /// # Errors
    /// [`Outdated`].
    pub fn open(&mut self, term: Option<Term>) -> Result<(), Outdated> {
        if let (Some(given), Some(newest)) = (term, self.held)
            && given <= newest
        {
            return Err(Outdated { given, newest });
        }
        self.take(term)?;
        self.opening += 1;
        Ok(())
    }

    /// An order to let the guest's output go is done, or has failed.
    pub fn opened(&mut self) {
        self.opening = self.opening.saturating_sub(1);
    }

    /// Promises to take no order of this term or an older one to let the guest's output go.
    ///
    /// # Errors
    /// [`Outdated`].
    pub fn hold(&mut self, term: Term) -> Result<(), Outdated> {
        self.take(Some(term))?;
        self.held = Some(term);
        Ok(())
    }

    /// Up to which term that was promised. Not while an order that was taken before is not done.
    pub fn held(&self) -> Term {
        self.held.filter(|_| self.opening == 0).unwrap_or(Term::NONE)
    }
}

fn check_host(name: &str) -> Result<(), ProtocolError> {
    if name.is_empty() {
        return Err(ProtocolError::invalid("host name in a record", "empty"));
    }
    ProtocolError::check_len("host name bytes", name.len() as u64, MAX_HOST_BYTES as u64).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Ownership {
        let incarnation = Incarnation(uuid::Uuid::from_u128(7));
        let owner = Owner::Pair { primary: "alpha".into(), backup: "beta".into(), incarnation };
        Ownership { term: Term(3), generation: Generation(1), epoch: Some(EpochId(9)), owner }
    }

    #[test]
    fn a_record_is_read_back_only_under_its_own_term() {
        let bytes = record().encode().unwrap();
        assert_eq!(Ownership::decode(Term(3), &bytes).unwrap(), record());
        let error = Ownership::decode(Term(4), &bytes).unwrap_err().to_string();
        assert!(error.contains("says term 3, is kept as term 4"), "{error}");
    }

    #[test]
    fn an_order_of_the_past_is_void_whenever_it_arrives() {
        let mut orders = Orders::default();
        assert_eq!((orders.open(Some(Term(4))), orders.held()), (Ok(()), Term::NONE));
        orders.opened();
        // Under the same term it is held again: nothing opens any more that was to open before.
        assert_eq!((orders.hold(Term(4)), orders.held()), (Ok(()), Term(4)));
        let outdated = Err(Outdated { given: Term(4), newest: Term(4) });
        assert_eq!(orders.open(Some(Term(4))), outdated);
        assert_eq!(orders.take(Some(Term(4))), Ok(()), "other orders of this term are as good as before");
        assert_eq!(orders.take(Some(Term(3))), Err(Outdated { given: Term(3), newest: Term(4) }));
        assert_eq!(orders.hold(Term(3)), Err(Outdated { given: Term(3), newest: Term(4) }));
        assert_eq!((orders.open(Some(Term(5))), orders.held()), (Ok(()), Term::NONE), "it opens");
        assert_eq!(orders.hold(Term(6)), Ok(()));
        assert_eq!(orders.held(), Term::NONE, "what was taken before may not be done yet");
        orders.opened();
        assert_eq!(orders.held(), Term(6));
        assert_eq!((orders.open(None), orders.take(None)), (Ok(()), Ok(())), "an operator knows");
    }

    #[test]
    fn what_no_watchdog_writes_is_refused() {
        let long = "x".repeat(MAX_HOST_BYTES + 1);
        for owner in [Owner::Solo { owner: String::new() }, Owner::Ended { by: long }] {
            assert!(Ownership { owner, ..record() }.encode().is_err());
        }
        assert!(Ownership { term: Term::NONE, ..record() }.encode().is_err());
        assert!(Ownership::decode(Term(3), b"{}").is_err());
        assert!(Ownership::decode(Term(3), &vec![b' '; MAX_RECORD_BYTES + 1]).is_err());
    }
}
