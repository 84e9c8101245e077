//! One stream to the backup.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::time::Instant;
use tokio_stream::StreamExt;
use understudy_proto::rpc::epoch::{BackupMessage, Hello, PrimaryMessage};
use understudy_proto::rpc::lane::LaneKey;
use understudy_proto::rpc::transport::Security;
use understudy_proto::rpc::{EpochsClient, FallibleStream, transport};

use super::lanes::{Connections, Ends};

/// A stream on which nothing is heard for so long, not even an answer to a heartbeat, is lost.
pub(super) const SILENCE_LIMIT: Duration = Duration::from_secs(5);

/// An open stream.
pub(super) struct Live {
    pub(super) session: u64,
    pub(super) outbound: Connections,
    pub(super) inbound: FallibleStream<BackupMessage>,
    /// When the backup last said anything.
    pub(super) heard: Instant,
    /// HelloAck is here.
    pub(super) accepted: bool,
    /// What its lanes name it by, once both sides have agreed on lanes.
    pub(super) lane_key: Option<LaneKey>,
    pub(super) ends: Ends,
}

pub(super) type Opening = BoxFuture<'static, Result<Live, String>>;

/// Opens a stream after a pause of half to all of `after`.
pub(super) fn open(host: String, security: Security, hello: Hello, after: Duration) -> Opening {
    Box::pin(async move {
        tokio::time::sleep(jittered(after)).await;
        let channel = transport::connect(&host, &security).await.map_err(|failure| failure.reason)?;
        let (session, lane_key) = (hello.session, hello.lane_key);
        let (mut outbound, messages) = Connections::new();
        // The first message never waits: the channel is empty.
        if !outbound.try_send(PrimaryMessage::Hello(hello)) {
            return Err("the stream took no message".to_owned());
        }
        let mut client = EpochsClient::new(channel);
        let opening = client.replicate(messages);
        let inbound = tokio::time::timeout(SILENCE_LIMIT, opening)
            .await
            .map_err(|_| format!("{host} does not answer"))?
            .map_err(|failure| failure.reason)?;
        Ok(Live {
            session,
            outbound,
            inbound,
            heard: Instant::now(),
            accepted: false,
            lane_key,
            ends: Ends::default(),
        })
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
pub(super) async fn room(outbound: Option<&Connections>, frame: bool) -> bool {
    match outbound {
        Some(outbound) => outbound.room(frame).await,
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
