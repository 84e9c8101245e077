//! One stream to the backup.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use understudy_proto::rpc::epoch::{BackupMessage, Hello, PrimaryMessage};
use understudy_proto::rpc::transport::Security;
use understudy_proto::rpc::{EpochsClient, FallibleStream, transport};

/// A stream on which nothing is heard for so long, not even an answer to a heartbeat, is lost.
pub(super) const SILENCE_LIMIT: Duration = Duration::from_secs(5);

/// Messages handed to the transport ahead: a few of 256 KiB, so that a heartbeat does not wait long.
const OUTBOUND_MESSAGES: usize = 4;

/// An open stream.
pub(super) struct Live {
    pub(super) session: u64,
    pub(super) outbound: mpsc::Sender<PrimaryMessage>,
    pub(super) inbound: FallibleStream<BackupMessage>,
    /// When the backup last said anything.
    pub(super) heard: Instant,
    /// HelloAck is here.
    pub(super) accepted: bool,
}

pub(super) type Opening = BoxFuture<'static, Result<Live, String>>;

/// Opens a stream after a pause of half to all of `after`.
pub(super) fn open(host: String, security: Security, hello: Hello, after: Duration) -> Opening {
    Box::pin(async move {
        tokio::time::sleep(jittered(after)).await;
        let channel = transport::connect(&host, &security).await.map_err(|failure| failure.reason)?;
        let session = hello.session;
        let (outbound, messages) = mpsc::channel(OUTBOUND_MESSAGES);
        // The first message never waits: the channel is empty.
        outbound.try_send(PrimaryMessage::Hello(hello)).map_err(|error| error.to_string())?;
        let mut client = EpochsClient::new(channel);
        let opening = client.replicate(ReceiverStream::new(messages));
        let inbound = tokio::time::timeout(SILENCE_LIMIT, opening)
            .await
            .map_err(|_| format!("{host} does not answer"))?
            .map_err(|failure| failure.reason)?;
        Ok(Live { session, outbound, inbound, heard: Instant::now(), accepted: false })
    })
}

/// Guests that lost the same backup should not all come back at the same moment.
fn jittered(after: Duration) -> Duration {
    let random = RandomState::new().build_hasher().finish();
    let half = after / 2;
    let parts = u32::try_from(random % 1000).unwrap_or(0);
    half + half * parts / 1000
}

/// # Cancel safety
/// The future stays where it is until it is done.
pub(super) async fn opened(opening: &mut Option<(u64, Opening)>) -> Result<Live, String> {
    match opening {
        Some((_, opening)) => opening.await,
        None => std::future::pending().await,
    }
}

/// Waits until a message can be sent; false if the stream is closed.
///
/// # Cancel safety
/// The room is not kept.
pub(super) async fn room(outbound: Option<&mpsc::Sender<PrimaryMessage>>) -> bool {
    match outbound {
        Some(outbound) => outbound.reserve().await.is_ok(),
        None => std::future::pending().await,
    }
}

/// The next message; `None` at the end of the stream.
///
/// # Cancel safety
/// Messages stay in the stream.
pub(super) async fn message(
    inbound: Option<&mut FallibleStream<BackupMessage>>,
) -> Option<Result<BackupMessage, String>> {
    match inbound {
        Some(inbound) => inbound.next().await.map(|item| item.map_err(|failure| failure.reason)),
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jitter_stays_between_half_and_all() {
        let after = Duration::from_secs(2);
        for _ in 0..100 {
            let pause = jittered(after);
            assert!(pause >= after / 2 && pause <= after, "{pause:?}");
        }
        assert_eq!(jittered(Duration::ZERO), Duration::ZERO);
    }
}
