//! What the watchdog is asked: who runs a guest is its business.

use crate::args::{AboutArgs, FailoverArgs};
use std::path::Path;
use understudy_proto::rpc::owner::{KeeperClient, Question, Told, WATCHDOG_SOCKET};
use understudy_proto::rpc::{Failure, FailureKind, transport};

/// Asks the watchdog of this host and prints its answer.
pub(crate) async fn ask(run_dir: &Path, question: Question, args: &AboutArgs) -> Result<(), Failure> {
    let told = connect(run_dir).await?.ask(question, &args.domain).await?;
    print(&told, args.json);
    Ok(())
}

/// A failover by the watchdog, which asks the arbiter; `None` if no watchdog here keeps the guest.
///
/// # Errors
/// If the guest may not run here.
pub(crate) async fn failover(run_dir: &Path, args: &FailoverArgs) -> Result<Option<()>, Failure> {
    let Ok(mut keeper) = connect(run_dir).await else { return Ok(None) };
    match keeper.ask(Question::Failover, &args.domain).await {
        Ok(told) => {
            print(&told, args.json);
            Ok(Some(()))
        }
        Err(failure) if failure.kind == FailureKind::NotFound => Ok(None),
        Err(failure) => Err(failure),
    }
}

fn print(told: &Told, json: bool) {
    println!("{}", if json { told.json.trim_end() } else { told.text.trim_end() });
}

async fn connect(run_dir: &Path) -> Result<KeeperClient, Failure> {
    let channel = transport::connect_unix(&run_dir.join(WATCHDOG_SOCKET)).await.map_err(|failure| Failure {
        remedy: "start understudy-watchdog on this host with --peer and --witness-at, or use root if it runs; --run-dir \
                 says where its socket is"
            .to_owned(),
        ..failure
    })?;
    Ok(KeeperClient::new(channel))
}
