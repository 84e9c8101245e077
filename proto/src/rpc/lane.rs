//! Lanes: further connections of an epoch stream, which bring page frames and nothing else. The `.proto` file says how.

use super::convert::{required, sixteen};
use super::epoch::{Pages, PrimaryMessage};
use super::generated::epoch as wire;
use crate::{ProtocolError, limits};
use bytes::Bytes;
use std::fmt;

/// What the lanes of a stream name it by. Who knows it may send pages into the stream.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct LaneKey(uuid::Uuid);

impl LaneKey {
    /// A key nobody can guess.
    pub fn random() -> Self {
        Self(uuid::Uuid::new_v4())
    }

    pub(super) fn from_wire(value: &[u8]) -> Result<Option<Self>, ProtocolError> {
        if value.is_empty() {
            return Ok(None);
        }
        sixteen("lane key", value).map(|bytes| Some(Self(uuid::Uuid::from_bytes(bytes))))
    }

    pub(super) fn to_wire(self) -> Bytes {
        Bytes::copy_from_slice(self.0.as_bytes())
    }
}

impl fmt::Debug for LaneKey {
    /// Leaves it out: it is a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LaneKey")
    }
}

/// In the place of a frame that goes by a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByLane {
    /// Which lane.
    pub lane: u32,
    /// Counts the frames by lanes, over all lanes.
    pub number: u64,
}

/// What goes by the stream itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MainMessage {
    /// A message.
    Message(PrimaryMessage),
    /// A frame is to be taken from a lane.
    ByLane(ByLane),
}

impl From<PrimaryMessage> for MainMessage {
    fn from(message: PrimaryMessage) -> Self {
        Self::Message(message)
    }
}

/// Opens a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaneOpen {
    /// Of the stream.
    pub key: LaneKey,
    /// 1 to [`limits::MAX_LANES`].
    pub lane: u32,
}

/// A frame on a lane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaneFrame {
    /// As in [`ByLane`].
    pub number: u64,
    /// The frame.
    pub pages: Pages,
}

/// What goes by a lane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LaneMessage {
    /// First of all.
    Open(LaneOpen),
    /// Everything else.
    Frame(LaneFrame),
}

/// A number that a lane can have.
fn lane_number(value: u32) -> Result<u32, ProtocolError> {
    if value == 0 {
        return Err(ProtocolError::invalid("lane", "0, the first is 1"));
    }
    ProtocolError::check_len("lane", value.into(), limits::MAX_LANES as u64)?;
    Ok(value)
}

impl TryFrom<wire::PrimaryMessage> for MainMessage {
    type Error = ProtocolError;

    fn try_from(value: wire::PrimaryMessage) -> Result<Self, ProtocolError> {
        match value.kind {
            Some(wire::primary_message::Kind::ByLane(m)) => {
                Ok(Self::ByLane(ByLane { lane: lane_number(m.lane)?, number: m.number }))
            }
            kind => wire::PrimaryMessage { kind }.try_into().map(Self::Message),
        }
    }
}

impl From<MainMessage> for wire::PrimaryMessage {
    fn from(value: MainMessage) -> Self {
        match value {
            MainMessage::Message(message) => message.into(),
            MainMessage::ByLane(ByLane { lane, number }) => {
                Self { kind: Some(wire::primary_message::Kind::ByLane(wire::ByLane { lane, number })) }
            }
        }
    }
}

impl TryFrom<wire::LaneMessage> for LaneMessage {
    type Error = ProtocolError;

    fn try_from(value: wire::LaneMessage) -> Result<Self, ProtocolError> {
        use wire::lane_message::Kind;
        Ok(match required("kind of lane message", value.kind)? {
            Kind::Open(m) => Self::Open(LaneOpen {
                key: required("lane key", LaneKey::from_wire(&m.key)?)?,
                lane: lane_number(m.lane)?,
            }),
            Kind::Frame(m) => Self::Frame(LaneFrame {
                number: m.number,
                pages: required("pages of a lane", m.pages)?.try_into()?,
            }),
        })
    }
}

impl From<LaneMessage> for wire::LaneMessage {
    fn from(value: LaneMessage) -> Self {
        use wire::lane_message::Kind;
        let kind = match value {
            LaneMessage::Open(m) => Kind::Open(wire::LaneOpen { key: m.key.to_wire(), lane: m.lane }),
            LaneMessage::Frame(LaneFrame { number, pages }) => Kind::Frame(wire::LaneFrame {
                number,
                pages: Some(wire::Pages { epoch: pages.epoch.0, data: pages.frame }),
            }),
        };
        Self { kind: Some(kind) }
    }
}
