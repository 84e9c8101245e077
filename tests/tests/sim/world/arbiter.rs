//! The witness: its shipped store, and everything that ever was in it.

use std::sync::atomic::{AtomicU64, Ordering};

use understudy_proto::ids::GuestId;
use understudy_proto::ownership::{Owner, Ownership, Term};
use understudy_proto::rpc::witness::Stored;
use understudy_watchdog::witness::Store;

thread_local! {
    /// Making one takes longer than a world; every seed is a guest of its own in it.
    static STORE: (Store, tempfile::TempDir) = {
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder");
        (Store::open(folder.path()).expect("a store"), folder)
    };
}

/// See the module's description.
#[derive(Debug)]
pub(crate) struct Arbiter {
    guest: GuestId,
    pub(crate) up: bool,
    /// Every record, oldest first: the term counts in it.
    pub(crate) history: Vec<Ownership>,
}

impl Arbiter {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let guest = GuestId(uuid::Uuid::from_u128(NEXT.fetch_add(1, Ordering::Relaxed).into()));
        Self { guest, up: true, history: Vec::new() }
    }

    pub(crate) fn read(&self) -> Option<Ownership> {
        let stored = STORE.with(|(store, _)| store.read(self.guest)).expect("it reads");
        stored.map(|stored| Ownership::decode(stored.term, &stored.record).expect("a record"))
    }

    pub(crate) fn swap(&mut self, new: &Ownership) -> bool {
        let stored = Stored { term: new.term, record: new.encode().expect("a record").into() };
        let (done, _) = STORE.with(|(store, _)| store.swap(self.guest, &stored)).expect("it writes");
        if done {
            self.history.push(new.clone());
        }
        done
    }

    pub(crate) fn current(&self) -> Option<&Ownership> {
        self.history.last()
    }

    /// The record of this term, if there was one.
    pub(crate) fn of(&self, term: Term) -> Option<&Ownership> {
        let at = usize::try_from(term.0).ok()?.checked_sub(1)?;
        self.history.get(at)
    }

    /// Who may let output out that nobody has committed; `None`: nobody has protected the guest yet.
    pub(crate) fn alone(&self) -> Option<&str> {
        match &self.current()?.owner {
            Owner::Solo { owner } | Owner::Ended { by: owner } => Some(owner),
            Owner::Pair { .. } | Owner::Claim { .. } => Some(""),
        }
    }
}
