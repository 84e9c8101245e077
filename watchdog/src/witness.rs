//! The built-in arbiter: `understudy-watchdog --witness`.
//!
//! Runs in a third place, which must not fail together with either host. Everything it knows is one small database; what
//! it has answered is on the disk.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use tracing::info;
use understudy_proto::ids::GuestId;
use understudy_proto::ownership::Term;
use understudy_proto::rpc::transport::{self, Security, TcpIncoming};
use understudy_proto::rpc::witness::{Stored, WitnessService, witness_routes};
use understudy_proto::rpc::{Failure, FailureKind, async_trait};

/// File name of the database in the witness's folder.
pub const FILE: &str = "witness.redb";

/// Guest to term and record.
const RECORDS: TableDefinition<'_, u128, (u64, &[u8])> = TableDefinition::new("records");

/// The database of a witness.
#[derive(Debug)]
pub struct Store {
    database: Database,
    path: PathBuf,
}

impl Store {
    /// Opens the database in `folder`, or makes one. Only one process can have it open.
    ///
    /// # Errors
    /// Naming the file. A damaged one is not replaced: records that are forgotten are guests with two owners.
    pub fn open(folder: &Path) -> Result<Self, Failure> {
        let path = folder.join(FILE);
        let made = std::fs::create_dir_all(folder).map_err(|error| failed(&path, &error));
        let database = made.and_then(|()| Database::create(&path).map_err(|error| failed(&path, &error)))?;
        let store = Self { database, path };
        // The table is there from now on, so reading need not make it.
        let begun = store.database.begin_write().map_err(|error| store.failed(&error))?;
        begun.open_table(RECORDS).map_err(|error| store.failed(&error))?;
        begun.commit().map_err(|error| store.failed(&error))?;
        Ok(store)
    }

    /// The record of a guest.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub fn read(&self, guest: GuestId) -> Result<Option<Stored>, Failure> {
        let read = self.database.begin_read().map_err(|error| self.failed(&error))?;
        let table = read.open_table(RECORDS).map_err(|error| self.failed(&error))?;
        let found = table.get(guest.0.as_u128()).map_err(|error| self.failed(&error))?;
        Ok(found.map(|found| stored(found.value())))
    }

    /// Replaces the record of the term before `new`; gives whether it did, and what is there now. The database writes
    /// one at a time, and each is on the disk when this returns.
    ///
    /// # Errors
    /// If the database cannot be written: then the record is one or the other.
    pub fn swap(&self, guest: GuestId, new: &Stored) -> Result<(bool, Option<Stored>), Failure> {
        let begun = self.database.begin_write().map_err(|error| self.failed(&error))?;
        let mut table = begun.open_table(RECORDS).map_err(|error| self.failed(&error))?;
        let key = guest.0.as_u128();
        let old = table.get(key).map_err(|error| self.failed(&error))?.map(|found| stored(found.value()));
        if old.as_ref().map_or(Term::NONE, |old| old.term).next() != new.term {
            return Ok((false, old));
        }
        table.insert(key, (new.term.0, new.record.as_ref())).map_err(|error| self.failed(&error))?;
        drop(table);
        begun.commit().map_err(|error| self.failed(&error))?;
        Ok((true, Some(new.clone())))
    }

    fn failed(&self, error: &dyn std::fmt::Display) -> Failure {
        failed(&self.path, error)
    }
}

fn stored((term, record): (u64, &[u8])) -> Stored {
    Stored { term: Term(term), record: record.to_vec().into() }
}

fn failed(path: &Path, error: &dyn std::fmt::Display) -> Failure {
    Failure::new(FailureKind::Internal, "witness-store", format!("{}: {error}", path.display()))
        .with_remedy("check the disk of the witness; until it answers, no guest changes its owner")
}

/// Serves a [`Store`].
#[derive(Debug, Clone)]
pub struct Witness(Arc<Store>);

impl Witness {
    /// Of this database.
    pub fn new(store: Store) -> Self {
        Self(Arc::new(store))
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let store = Arc::clone(&self.0);
        tokio::task::spawn_blocking(move || work(&store)).await.map_err(|error| {
            Failure::new(FailureKind::Internal, "witness-store", format!("the store ended: {error}"))
        })?
    }
}

#[async_trait]
impl WitnessService for Witness {
    async fn read(&self, guest: GuestId) -> Result<Option<Stored>, Failure> {
        self.blocking(move |store| store.read(guest)).await
    }

    async fn swap(&self, guest: GuestId, new: Stored) -> Result<(bool, Option<Stored>), Failure> {
        let term = new.term.0;
        let done = self.blocking(move |store| store.swap(guest, &new)).await?;
        info!(%guest, term, swapped = done.0, "a record was to be replaced");
        Ok(done)
    }
}

/// Serves the database in `folder` on `address` until the process ends.
///
/// # Errors
/// If the database cannot be opened, the address not be bound, or the files of TLS not be used.
pub async fn serve(folder: &Path, address: SocketAddr, security: Security) -> Result<(), Failure> {
    let store = Store::open(folder)?;
    let incoming = transport::listen(address).map_err(|error| {
        Failure::new(
            FailureKind::Unavailable,
            "cannot-listen",
            format!("cannot listen on {address}: {error}"),
        )
    })?;
    info!(%address, store = %store.path.display(), tls = matches!(security, Security::Tls(_)), "the witness serves");
    serve_on(incoming, store, security).await
}

/// The same on what is bound already.
pub(crate) async fn serve_on(incoming: TcpIncoming, store: Store, security: Security) -> Result<(), Failure> {
    if let Security::Tls(files) = &security {
        files.server_config().map_err(|reason| {
            Failure::new(FailureKind::FailedPrecondition, "tls-files", reason)
                .with_remedy("make the witness certificates as for libvirt's own TLS, in --pki-dir")
        })?;
    }
    let routes = witness_routes(Arc::new(Witness::new(store)));
    transport::serve(routes, incoming, security).await.map_err(|error| {
        Failure::new(FailureKind::Internal, "witness", format!("the witness ended: {error}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(n: u128) -> GuestId {
        GuestId(uuid::Uuid::from_u128(n))
    }

    fn new(term: u64, text: &str) -> Stored {
        Stored { term: Term(term), record: text.as_bytes().to_vec().into() }
    }

    #[test]
    fn a_swap_needs_the_term_before() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        assert_eq!(store.read(guest(1)).unwrap(), None);
        assert_eq!(store.swap(guest(1), &new(2, "early")).unwrap(), (false, None));
        assert_eq!(store.swap(guest(1), &new(1, "a")).unwrap(), (true, Some(new(1, "a"))));
        assert_eq!(store.swap(guest(1), &new(1, "b")).unwrap(), (false, Some(new(1, "a"))));
        assert_eq!(store.swap(guest(1), &new(2, "c")).unwrap(), (true, Some(new(2, "c"))));
        assert_eq!(store.read(guest(1)).unwrap(), Some(new(2, "c")));
        assert_eq!(store.read(guest(2)).unwrap(), None);
    }

    #[test]
    fn of_many_that_want_the_same_term_one_gets_it() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        for term in 1..=5 {
            let won: Vec<bool> = std::thread::scope(|scope| {
                let racers: Vec<_> = (0..4)
                    .map(|n| {
                        let store = &store;
                        scope.spawn(move || store.swap(guest(1), &new(term, &n.to_string())).unwrap().0)
                    })
                    .collect();
                racers.into_iter().map(|racer| racer.join().unwrap()).collect()
            });
            assert_eq!(won.iter().filter(|won| **won).count(), 1);
        }
    }

    #[test]
    fn what_was_answered_is_there_after_a_restart_and_one_process_has_it() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        store.swap(guest(1), &new(1, "a")).unwrap();
        assert!(Store::open(folder.path()).unwrap_err().reason.contains(FILE));
        // As a copy of the file at this moment would be found after a power cut.
        let elsewhere = tempfile::tempdir().unwrap();
        std::fs::copy(folder.path().join(FILE), elsewhere.path().join(FILE)).unwrap();
        drop(store);
        for place in [folder.path(), elsewhere.path()] {
            assert_eq!(Store::open(place).unwrap().read(guest(1)).unwrap(), Some(new(1, "a")));
        }
    }

    #[test]
    fn a_damaged_database_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(FILE), "garbage".repeat(1000)).unwrap();
        let failure = Store::open(folder.path()).unwrap_err();
        assert!(failure.reason.contains(FILE), "{failure}");
    }
}
