//! The messages with which QEMU and its COLO peer take turns.

use super::error::Fault;

/// A COLO message. [`ColoMessage::VmstateSize`] is followed by the size as a big-endian u64.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum ColoMessage {
    /// The peer has the precopy; the guest may run.
    CheckpointReady = 0,
    /// QEMU wants a checkpoint; the guest runs on until the reply.
    CheckpointRequest = 1,
    /// The peer agrees; QEMU stops the guest.
    CheckpointReply = 2,
    /// The guest is stopped, memory follows.
    VmstateSend = 3,
    /// Memory is complete, the device buffer follows.
    VmstateSize = 4,
    /// The peer has the device buffer.
    VmstateReceived = 5,
    /// The peer is done; QEMU lets the guest run.
    VmstateLoaded = 6,
}

/// Who sends a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// The QEMU whose guest is protected.
    FromQemu,
    /// Its peer, that is us.
    ToQemu,
}

impl std::fmt::Display for Direction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::FromQemu => "sent by QEMU",
            Self::ToQemu => "sent to QEMU",
        })
    }
}

impl ColoMessage {
    /// All messages, in the order of their numbers.
    pub const ALL: [Self; 7] = [
        Self::CheckpointReady,
        Self::CheckpointRequest,
        Self::CheckpointReply,
        Self::VmstateSend,
        Self::VmstateSize,
        Self::VmstateReceived,
        Self::VmstateLoaded,
    ];

    /// Who sends it.
    pub const fn direction(self) -> Direction {
        match self {
            Self::CheckpointRequest | Self::VmstateSend | Self::VmstateSize => Direction::FromQemu,
            Self::CheckpointReady | Self::CheckpointReply | Self::VmstateReceived | Self::VmstateLoaded => {
                Direction::ToQemu
            }
        }
    }
}

impl std::fmt::Display for ColoMessage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::CheckpointReady => "CHECKPOINT_READY",
            Self::CheckpointRequest => "CHECKPOINT_REQUEST",
            Self::CheckpointReply => "CHECKPOINT_REPLY",
            Self::VmstateSend => "VMSTATE_SEND",
            Self::VmstateSize => "VMSTATE_SIZE",
            Self::VmstateReceived => "VMSTATE_RECEIVED",
            Self::VmstateLoaded => "VMSTATE_LOADED",
        })
    }
}

impl TryFrom<u32> for ColoMessage {
    type Error = Fault;

    fn try_from(value: u32) -> Result<Self, Fault> {
        usize::try_from(value)
            .ok()
            .and_then(|v| Self::ALL.get(v).copied())
            .ok_or(Fault::UnknownMessage { value })
    }
}

/// What the peer says to QEMU. A type of its own, so that a message of QEMU's cannot be sent back to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerMessage {
    /// See [`ColoMessage::CheckpointReady`].
    Ready,
    /// See [`ColoMessage::CheckpointReply`].
    Reply,
    /// See [`ColoMessage::VmstateReceived`].
    Received,
    /// See [`ColoMessage::VmstateLoaded`].
    Loaded,
}

impl PeerMessage {
    /// The bytes to write to the migration socket.
    pub const fn encode(self) -> [u8; 4] {
        (self.message() as u32).to_be_bytes()
    }

    /// The message.
    pub const fn message(self) -> ColoMessage {
        match self {
            Self::Ready => ColoMessage::CheckpointReady,
            Self::Reply => ColoMessage::CheckpointReply,
            Self::Received => ColoMessage::VmstateReceived,
            Self::Loaded => ColoMessage::VmstateLoaded,
        }
    }
}

/// What a peer sends on the return path when it has read the whole precopy: SHUT, 4 bytes, no error. Only
/// where the capability `return-path` is on (QEMU 11), there before [`PeerMessage::Ready`].
pub const RETURN_PATH_SHUT: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 0];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_protocol() {
        for (number, message) in (0u32..).zip(ColoMessage::ALL) {
            assert_eq!(message as u32, number);
            assert_eq!(ColoMessage::try_from(number), Ok(message));
        }
        assert_eq!(
            ColoMessage::try_from(7).unwrap_err().to_string(),
            "COLO message 7 is not known, known are 0 to 6"
        );
        assert!(ColoMessage::try_from(u32::MAX).is_err());
    }

    #[test]
    fn a_peer_sends_only_messages_of_its_direction() {
        use PeerMessage::{Loaded, Ready, Received, Reply};
        for (m, bytes) in
            [(Ready, [0, 0, 0, 0]), (Reply, [0, 0, 0, 2]), (Received, [0, 0, 0, 5]), (Loaded, [0, 0, 0, 6])]
        {
            assert_eq!(m.encode(), bytes);
            assert_eq!(m.message().direction(), Direction::ToQemu);
        }
    }
}
