//! An external fencing command as licence: who has switched the other host off may go on.
//!
//! The command is called as fence agents are: options on its standard input, one `key=value` a line, `action=off` among
//! them; exit status 0 is success. Success alone is a licence: a refusal, a command that cannot be started, one that
//! takes too long or dies are all no licence.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tracing::{info, warn};
use understudy_proto::ids::GuestId;
use understudy_proto::ownership::{Owner, Ownership};
use understudy_proto::rpc::witness::Stored;
use understudy_proto::rpc::{Failure, FailureKind, async_trait};

use super::Arbiter;
use crate::witness::Store;

/// What a fencing command has done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FenceOutcome {
    /// The other host is off.
    Fenced,
    /// The command says that it has failed.
    Refused(String),
    /// Whether the other host is off is not known: the command could not be run, or has not ended in time.
    Unknown(String),
}

/// How to fence the other host.
#[derive(Debug, Clone)]
pub struct FenceCommand {
    /// The program.
    pub program: PathBuf,
    /// Its options; `action` is given by the watchdog.
    pub options: Vec<(String, String)>,
    /// How long it may take.
    pub timeout: Duration,
}

impl FenceCommand {
    /// Runs it once.
    pub async fn fence(&self) -> FenceOutcome {
        let mut input = String::from("action=off\n");
        for (key, value) in self.options.iter().filter(|(key, _)| key != "action") {
            input.push_str(&format!("{key}={value}\n"));
        }
        let mut command = Command::new(&self.program);
        // Its options may hold passwords: they are neither arguments nor logged.
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) => return FenceOutcome::Unknown(format!("{}: {error}", self.program.display())),
        };
        if let Some(mut stdin) = child.stdin.take() {
            // A command that needs no options may not read them; its exit status alone counts.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
        match tokio::time::timeout(self.timeout, child.wait()).await {
            Ok(Ok(status)) if status.success() => FenceOutcome::Fenced,
            Ok(Ok(status)) if status.code().is_some() => FenceOutcome::Refused(status.to_string()),
            Ok(Ok(status)) => FenceOutcome::Unknown(status.to_string()),
            Ok(Err(error)) => FenceOutcome::Unknown(error.to_string()),
            Err(_) => FenceOutcome::Unknown(format!("has not ended within {:?}", self.timeout)),
        }
    }
}

/// Two hosts without a third place: each keeps its own record, and takes the guest from the other only after switching
/// it off.
#[derive(Debug, Clone)]
pub struct Fencing {
    me: String,
    command: FenceCommand,
    store: Arc<Store>,
}

impl Fencing {
    /// With a database of this host's own.
    pub fn new(me: impl Into<String>, command: FenceCommand, store: Arc<Store>) -> Self {
        Self { me: me.into(), command, store }
    }

    /// Whether `new` ends a right of the other host that it may be using at this moment.
    fn takes(&self, old: Option<&Ownership>, new: &Ownership) -> bool {
        let others = match old.map(|old| &old.owner) {
            Some(Owner::Pair { .. }) => true,
            Some(Owner::Claim { by, .. }) => *by != self.me,
            Some(Owner::Solo { owner }) => *owner != self.me,
            Some(Owner::Ended { .. }) | None => false,
        };
        others && matches!(&new.owner, Owner::Claim { .. } | Owner::Solo { .. })
    }
}

#[async_trait]
impl Arbiter for Fencing {
    async fn read(&self, guest: GuestId) -> Result<Option<Ownership>, Failure> {
        let store = Arc::clone(&self.store);
        let read = tokio::task::spawn_blocking(move || store.read(guest)).await.map_err(ended)??;
        read.map(|stored| Ownership::decode(stored.term, &stored.record)).transpose().map_err(Failure::from)
    }

    async fn swap(&self, guest: GuestId, new: &Ownership) -> Result<(), Failure> {
        let old = self.read(guest).await?;
        if old.as_ref().map(|old| old.term.next()).is_some_and(|next| next != new.term) {
            return Ok(());
        }
        if self.takes(old.as_ref(), new) {
            warn!(%guest, program = %self.command.program.display(), "the other host is to be switched off");
            match self.command.fence().await {
                FenceOutcome::Fenced => info!(%guest, "the other host is off"),
                FenceOutcome::Refused(why) | FenceOutcome::Unknown(why) => {
                    let text = format!("{} gave no licence: {why}", self.command.program.display());
                    return Err(Failure::new(FailureKind::Unavailable, "not-fenced", text).retryable().with_remedy(
                        "make sure that the other host is off, then run `understudy failover --i-have-fenced`",
                    ));
                }
            }
        }
        let (store, record) = (Arc::clone(&self.store), new.encode()?.into());
        let new = Stored { term: new.term, record };
        tokio::task::spawn_blocking(move || store.swap(guest, &new)).await.map_err(ended)?.map(|_| ())
    }

    fn name(&self) -> String {
        format!("fencing by {}", self.command.program.display())
    }
}

fn ended(error: tokio::task::JoinError) -> Failure {
    Failure::new(FailureKind::Internal, "witness-store", format!("the store ended: {error}"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    use understudy_proto::ids::{Generation, Incarnation};
    use understudy_proto::ownership::Term;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn script(folder: &Path, body: &str, timeout: Duration) -> FenceCommand {
        let program = folder.join("fence_test");
        std::fs::write(&program, format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let options = vec![("ip".into(), "bmc".into()), ("action".into(), "status".into())];
        FenceCommand { program, options, timeout }
    }

    #[tokio::test]
    async fn options_come_on_standard_input_and_success_alone_is_success() {
        let folder = tempfile::tempdir().unwrap();
        let said = folder.path().join("said");
        let body = format!("cat > {}; exit 0", said.display());
        assert_eq!(script(folder.path(), &body, LONG).fence().await, FenceOutcome::Fenced);
        assert_eq!(std::fs::read_to_string(said).unwrap(), "action=off\nip=bmc\n");
        let refused = script(folder.path(), "exit 3", LONG).fence().await;
        assert!(matches!(refused, FenceOutcome::Refused(_)), "{refused:?}");
        let killed = script(folder.path(), "kill -9 $$", LONG).fence().await;
        assert!(matches!(killed, FenceOutcome::Unknown(_)), "{killed:?}");
        let hangs = script(folder.path(), "exec sleep 600", Duration::from_millis(50)).fence().await;
        assert!(matches!(hangs, FenceOutcome::Unknown(_)), "{hangs:?}");
        let missing = FenceCommand { program: "/nonexistent/fence".into(), options: vec![], timeout: LONG };
        assert!(matches!(missing.fence().await, FenceOutcome::Unknown(_)));
    }

    #[tokio::test]
    async fn without_a_licence_the_guest_is_not_taken() {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(folder.path()).unwrap());
        let guest = GuestId(uuid::Uuid::from_u128(1));
        let incarnation = Incarnation(uuid::Uuid::from_u128(2));
        let record =
            |term, owner| Ownership { term: Term(term), generation: Generation(1), epoch: None, owner };
        let pair = Owner::Pair { primary: "alpha".into(), backup: "beta".into(), incarnation };
        let claim = record(2, Owner::Claim { by: "beta".into(), from: "alpha".into(), incarnation });
        let solo = record(3, Owner::Solo { owner: "beta".into() });
        for (body, licence) in [("exit 1", false), ("kill -9 $$", false), ("exit 0", true)] {
            let fencing = Fencing::new("beta", script(folder.path(), body, LONG), Arc::clone(&store));
            // What takes nothing from anybody needs none.
            fencing.swap(guest, &record(1, pair.clone())).await.unwrap();
            assert_eq!(fencing.swap(guest, &claim).await.is_ok(), licence, "{body}");
            let now = fencing.read(guest).await.unwrap().unwrap().term;
            assert_eq!(now, if licence { Term(2) } else { Term(1) });
        }
        // What was claimed with a licence is confirmed without another.
        let fencing = Fencing::new("beta", script(folder.path(), "exit 1", LONG), Arc::clone(&store));
        fencing.swap(guest, &solo).await.unwrap();
        assert_eq!(fencing.read(guest).await.unwrap(), Some(solo));
    }
}
