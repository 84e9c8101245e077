//! Under which terms the orders about each guest were given: what is older is not carried out.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use understudy_proto::ids::GuestId;
use understudy_proto::ownership::{Orders, Outdated, Term};

/// The guests of this host that watchdogs have given orders about.
#[derive(Debug, Default)]
pub(super) struct Ordered(Mutex<BTreeMap<GuestId, Orders>>);

/// An order to let output go that was taken; it is done when this is dropped.
#[derive(Debug)]
pub(super) struct Opening<'a>(&'a Ordered, GuestId);

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        self.0.of(self.1, Orders::opened);
    }
}

impl Ordered {
    pub(super) fn of<T>(&self, guest: GuestId, order: impl FnOnce(&mut Orders) -> T) -> T {
        order(self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(guest).or_default())
    }

    /// Takes an order to let the guest's output go.
    pub(super) fn open(&self, guest: GuestId, term: Option<Term>) -> Result<Opening<'_>, Outdated> {
        self.of(guest, |orders| orders.open(term))?;
        Ok(Opening(self, guest))
    }

    /// Up to which term such orders are refused.
    pub(super) fn held(&self, guest: GuestId) -> Term {
        self.of(guest, |orders| orders.held())
    }
}
