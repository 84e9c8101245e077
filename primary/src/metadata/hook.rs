//! The agent's end of libvirt's hook. While a hook waits libvirt holds the domain: **nothing here may ask libvirt**.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tracing::{debug, warn};
use understudy_hook::call::{Answer, Call, HOOK_SOCKET, MAX_LINE_BYTES, clipped, line, parse_line};

use crate::config::Config;
use crate::protect;

/// What a call may take here; the hook itself waits a little longer.
const LIMIT: Duration = Duration::from_millis(1500);

/// What a backup may take over the question whether it is there.
const REACH_LIMIT: Duration = Duration::from_millis(1200);

/// Calls at work at a time; libvirt makes one for each domain that starts.
const CALLS: usize = 64;

/// Binds the socket in `run_dir`, in the place of what a predecessor has left.
///
/// # Errors
/// Naming the path.
pub fn listen(run_dir: &Path) -> io::Result<UnixListener> {
    let path = run_dir.join(HOOK_SOCKET);
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(named(error)),
        _ => {}
    }
    let listener = UnixListener::bind(&path).map_err(named)?;
    // libvirt runs hooks as root.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).map_err(named)?;
    Ok(listener)
}

/// Answers hooks; does not return.
pub async fn serve(listener: UnixListener, config: Config) {
    let config = Arc::new(config);
    let room = Arc::new(Semaphore::new(CALLS));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!(%error, "the hook socket has trouble");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        // Beyond the room a hook is left without an answer, and goes on by itself.
        let Ok(place) = Arc::clone(&room).try_acquire_owned() else { continue };
        let config = Arc::clone(&config);
        tokio::spawn(async move {
            let _place = place;
            match tokio::time::timeout(LIMIT, answer(stream, &config)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => warn!(%error, "a call of libvirt's hook failed"),
                Err(_) => warn!("a call of libvirt's hook took too long"),
            }
        });
    }
}

async fn answer(mut stream: UnixStream, config: &Config) -> io::Result<()> {
    let mut bytes = Vec::new();
    let (from, mut to) = stream.split();
    BufReader::new(from.take(MAX_LINE_BYTES as u64)).read_until(b'\n', &mut bytes).await?;
    let call: Call = parse_line(&bytes)?;
    debug!(guest = call.guest, operation = call.operation, extra = call.extra, "libvirt's hook");
    let answer = decide(&call, config).await;
    if let Answer::Deny { reason } = &answer {
        warn!(guest = call.guest, reason, "its start is refused: it says required='yes'");
    }
    to.write_all(&line(&answer)?).await
}

/// A guest that must not run unprotected is refused if it is known beforehand that it cannot be protected.
async fn decide(call: &Call, config: &Config) -> Answer {
    let deny = |reason: String| Answer::Deny { reason: clipped(&reason) };
    if !call.may_refuse {
        return Answer::Ok;
    }
    if !call.mistake.is_empty() {
        return deny(format!("required='yes', but the metadata is wrong: {}", call.mistake));
    }
    // Asked once: `start` follows `prepare` at once.
    if call.operation != "prepare" {
        return Answer::Ok;
    }
    let reached = match config.security(call.insecure, &call.backup) {
        Ok(security) => protect::reach(&call.backup, &security, REACH_LIMIT).await,
        Err(refused) => Err(refused),
    };
    match reached {
        Ok(()) => Answer::Ok,
        Err(failure) => {
            deny(format!("required='yes', but the backup {} cannot be used: {}", call.backup, failure.reason))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(operation: &str, may_refuse: bool) -> Call {
        Call {
            guest: "web".into(),
            operation: operation.into(),
            phase: "begin".into(),
            extra: "-".into(),
            may_refuse,
            // Nobody listens there.
            backup: "127.0.0.1:1".into(),
            insecure: true,
            mistake: String::new(),
        }
    }

    async fn asked(socket: &Path, bytes: &[u8]) -> Vec<u8> {
        let mut stream = UnixStream::connect(socket).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        answer
    }

    #[tokio::test]
    async fn only_what_may_be_refused_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let listener = listen(folder.path()).unwrap();
        let config = <Config as clap::Parser>::try_parse_from(["understudy-primary"]).unwrap();
        tokio::spawn(serve(listener, config));
        let socket = folder.path().join(HOOK_SOCKET);
        let ask = async |call: &Call| parse_line::<Answer>(&asked(&socket, &line(call).unwrap()).await);
        for operation in ["prepare", "started", "reconnect", "release", "new"] {
            assert_eq!(ask(&call(operation, false)).await.unwrap(), Answer::Ok, "{operation}");
        }
        let Answer::Deny { reason } = ask(&call("prepare", true)).await.unwrap() else { panic!() };
        assert!(reason.contains("127.0.0.1:1 cannot be used"), "{reason}");
        assert_eq!(ask(&call("start", true)).await.unwrap(), Answer::Ok);
        let wrong = Call { mistake: "<protect> lacks ...".into(), ..call("start", true) };
        assert!(matches!(ask(&wrong).await.unwrap(), Answer::Deny { .. }));
        // Nonsense gets no answer and does no harm.
        for nonsense in [&b"\n"[..], b"{}\n", &[b'x'; MAX_LINE_BYTES + 9]] {
            assert_eq!(asked(&socket, nonsense).await, b"");
        }
        assert_eq!(ask(&call("reconnect", false)).await.unwrap(), Answer::Ok);
        // A successor takes the place of a socket that was left.
        assert!(super::listen(folder.path()).is_ok());
    }
}
