//! What an operator asks the keeper.

use std::path::Path;

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::UnixListenerStream;
use understudy_proto::rpc::owner::{KeeperService, Question, Told, WATCHDOG_SOCKET, keeper_routes};
use understudy_proto::rpc::{Failure, FailureKind, async_trait, transport};

use super::handing::Reply;

/// Questions that may wait.
const QUESTIONS: usize = 16;

/// A question and where its answer goes.
#[derive(Debug)]
pub struct Asking {
    pub(super) question: Question,
    pub(super) domain: String,
    pub(super) reply: Reply,
}

/// Questions to a keeper.
pub type Questions = mpsc::Receiver<Asking>;

struct Service(mpsc::Sender<Asking>);

#[async_trait]
impl KeeperService for Service {
    async fn ask(&self, question: Question, domain: String) -> Result<Told, Failure> {
        let (reply, answer) = oneshot::channel();
        let ended = || Failure::new(FailureKind::Unavailable, "ended", "the watchdog has given no answer");
        self.0.send(Asking { question, domain, reply }).await.map_err(|_| ended())?;
        answer.await.map_err(|_| ended())?
    }
}

/// Serves `watchdog.sock` in `run_dir` from now on.
///
/// # Errors
/// If the socket cannot be made.
pub async fn listen(run_dir: &Path) -> std::io::Result<Questions> {
    let socket = run_dir.join(WATCHDOG_SOCKET);
    std::fs::create_dir_all(run_dir)?;
    if UnixStream::connect(&socket).await.is_ok() {
        return Err(std::io::Error::other(format!(
            "another understudy-watchdog answers on {}; end that one first",
            socket.display()
        )));
    }
    match std::fs::remove_file(&socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListenerStream::new(UnixListener::bind(&socket)?);
    let (asked, questions) = mpsc::channel(QUESTIONS);
    let routes = keeper_routes(std::sync::Arc::new(Service(asked)));
    tokio::spawn(async move {
        if let Err(error) = transport::server().add_routes(routes).serve_with_incoming(listener).await {
            tracing::error!(%error, "the watchdog's socket failed");
        }
    });
    Ok(questions)
}
