//! The backup's end of lanes: one stream again, in the order of the main one, whatever the lanes do.
//!
//! Each lane is a queue, and the stream says which queue the next frame is taken from; so nothing is ever sorted. What waits
//! in a lane is bounded by the HTTP/2 window of its connection.

use super::epoch::PrimaryMessage;
use super::lane::{ByLane, LaneFrame, LaneKey, LaneMessage, LaneOpen, MainMessage};
use super::status::{Failure, FailureKind};
use super::{FallibleStream, Inbound};
use crate::limits;
use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

/// How long the stream waits for a frame of a lane, and a lane for its first message. Shorter than the primary waits for a
/// sign of life, so that it is the backup that says what was missing.
const LANE_LIMIT: Duration = Duration::from_secs(4);

/// A lane on its way to its stream.
struct Lane {
    number: u32,
    frames: FallibleStream<LaneMessage>,
    /// The call ends with it.
    _open: mpsc::Sender<Infallible>,
}

type Streams = Mutex<HashMap<LaneKey, mpsc::Sender<Lane>>>;

/// The streams of a server that may have lanes.
#[derive(Clone, Default)]
pub(super) struct Lanes(Arc<Streams>);

impl Lanes {
    fn lock(&self) -> MutexGuard<'_, HashMap<LaneKey, mpsc::Sender<Lane>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a lane; what it returns ends when the stream has let it go.
    pub(super) async fn attach(
        &self,
        mut frames: FallibleStream<LaneMessage>,
    ) -> Result<ReceiverStream<Infallible>, Failure> {
        let LaneOpen { key, lane } = match tokio::time::timeout(LANE_LIMIT, frames.next()).await {
            Ok(Some(Ok(LaneMessage::Open(open)))) => open,
            Ok(Some(Err(failure))) => return Err(failure),
            Ok(Some(Ok(LaneMessage::Frame(_))) | None) | Err(_) => {
                return Err(violation("a lane begins by naming its stream, this one does not".to_owned()));
            }
        };
        let unknown = "no stream is open that this lane belongs to";
        let stream = self.lock().get(&key).cloned();
        let stream = stream.ok_or_else(|| Failure::new(FailureKind::NotFound, "no-stream", unknown))?;
        let (open, end) = mpsc::channel(1);
        stream.try_send(Lane { number: lane, frames, _open: open }).map_err(|error| match error {
            mpsc::error::TrySendError::Closed(_) => Failure::new(FailureKind::NotFound, "no-stream", unknown),
            mpsc::error::TrySendError::Full(_) => {
                violation("too many lanes are opened and not used".to_owned())
            }
        })?;
        Ok(ReceiverStream::new(end))
    }

    /// The messages of a stream, those that come by lanes in their places.
    pub(super) fn merged(&self, main: FallibleStream<MainMessage>) -> Inbound {
        let merge = Merge { main, streams: self.clone(), own: None, next: 0, ended: false };
        Box::pin(futures::stream::unfold(merge, |mut merge| async {
            let item = merge.next().await?;
            merge.ended = item.is_err();
            Some((item, merge))
        }))
    }
}

/// A stream that may have lanes.
struct Own {
    key: LaneKey,
    streams: Lanes,
    arrivals: mpsc::Receiver<Lane>,
    lanes: HashMap<u32, Lane>,
}

impl Drop for Own {
    fn drop(&mut self) {
        self.streams.lock().remove(&self.key);
    }
}

struct Merge {
    main: FallibleStream<MainMessage>,
    streams: Lanes,
    own: Option<Own>,
    /// Number of the next frame by a lane.
    next: u64,
    ended: bool,
}

impl Merge {
    async fn next(&mut self) -> Option<Result<PrimaryMessage, Failure>> {
        if self.ended {
            return None;
        }
        match self.main.next().await? {
            Err(failure) => Some(Err(failure)),
            Ok(MainMessage::ByLane(place)) => Some(self.frame(place).await),
            Ok(MainMessage::Message(message)) => {
                if let PrimaryMessage::Hello(hello) = &message
                    && let Some(key) = hello.lane_key
                    // A second Hello is refused by whoever reads this.
                    && self.own.is_none()
                    && let Err(failure) = self.open(key)
                {
                    return Some(Err(failure));
                }
                Some(Ok(message))
            }
        }
    }

    fn open(&mut self, key: LaneKey) -> Result<(), Failure> {
        let (arrive, arrivals) = mpsc::channel(limits::MAX_LANES);
        let mut streams = self.streams.lock();
        if streams.contains_key(&key) {
            return Err(violation("the key of its lanes is in use".to_owned()));
        }
        streams.insert(key, arrive);
        self.own = Some(Own { key, streams: self.streams.clone(), arrivals, lanes: HashMap::new() });
        Ok(())
    }

    /// The frame that the stream has given a place.
    async fn frame(&mut self, ByLane { lane, number }: ByLane) -> Result<PrimaryMessage, Failure> {
        if number != self.next {
            return Err(violation(format!(
                "frame {number} is to come by lane {lane}, the next one is {}",
                self.next
            )));
        }
        self.next += 1;
        let own = self
            .own
            .as_mut()
            .ok_or_else(|| violation("a frame by a lane, and no key for lanes".to_owned()))?;
        // A lane is here before it is accepted, so before anything can be sent by it.
        while let Ok(arrived) = own.arrivals.try_recv() {
            own.lanes.insert(arrived.number, arrived);
        }
        let from = own.lanes.get_mut(&lane);
        let from = from.ok_or_else(|| {
            violation(format!("frame {number} is to come by lane {lane}, which is not open"))
        })?;
        let broken = |why: String| {
            let reason = format!("lane {lane} has not brought frame {number}: {why}");
            Failure::new(FailureKind::Unavailable, "lane", reason).retryable()
        };
        match tokio::time::timeout(LANE_LIMIT, from.frames.next()).await {
            Err(_) => Err(broken(format!("nothing came for {} s", LANE_LIMIT.as_secs()))),
            Ok(None) => Err(broken("it has ended".to_owned())),
            Ok(Some(Err(failure))) if failure.kind == FailureKind::InvalidArgument => Err(failure),
            Ok(Some(Err(failure))) => Err(broken(failure.reason)),
            Ok(Some(Ok(LaneMessage::Open(_)))) => Err(violation(format!("lane {lane} was opened twice"))),
            Ok(Some(Ok(LaneMessage::Frame(LaneFrame { number: came, pages })))) => {
                if came != number {
                    return Err(violation(format!(
                        "lane {lane} has brought frame {came} in the place of {number}"
                    )));
                }
                Ok(PrimaryMessage::Pages(pages))
            }
        }
    }
}

fn violation(reason: String) -> Failure {
    Failure::new(FailureKind::InvalidArgument, "protocol", reason)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test ends by panicking")]
mod tests;
