//! The kernel's side of the gate: links, qdiscs and filters, one request at a time on one socket.
//!
//! The socket blocks. Two of the requests are made while the guest is stopped, by a thread that has nothing else to do;
//! through a task of a runtime each would take twice as long. What is made and taken apart once goes the same way.

pub(super) mod filter;
pub(super) mod link;
pub(super) mod plug;

use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use super::GateError;

/// A netlink answer is at most this long; the kernel cuts its dumps to the reader's buffer.
const REPLY_BYTES: usize = 64 << 10;

/// A connection to the kernel's routing subsystem.
#[derive(Debug)]
pub(super) struct Route {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Route {
    pub(super) fn open() -> Result<Self, GateError> {
        let open = || {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            Ok(socket)
        };
        let socket =
            open().map_err(|source| GateError::Kernel { action: "open a netlink socket".into(), source })?;
        Ok(Self { socket, sequence: 0, buffer: Vec::with_capacity(REPLY_BYTES) })
    }

    /// Sends a request and collects what comes back, up to the kernel's acknowledgement or the end of a dump.
    pub(super) fn ask(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        request.header.sequence_number = self.sequence;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let mut replies = Vec::new();
        loop {
            self.buffer.clear();
            self.socket.recv(&mut self.buffer, 0)?;
            if self.take(&mut replies)? {
                return Ok(replies);
            }
        }
    }

    /// Takes the messages of one datagram; true at the end of the answer.
    fn take(&self, replies: &mut Vec<RouteNetlinkMessage>) -> io::Result<bool> {
        let mut rest = self.buffer.as_slice();
        while !rest.is_empty() {
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
            // Messages begin at multiples of four bytes.
            let length = (message.header.length as usize).next_multiple_of(4).max(16);
            rest = rest.get(length..).unwrap_or_default();
            if message.header.sequence_number != self.sequence {
                // The rest of an answer that was given up.
                continue;
            }
            match message.payload {
                NetlinkPayload::Error(error) => match error.code {
                    None => return Ok(true),
                    Some(code) => return Err(io::Error::from_raw_os_error(code.get().wrapping_neg())),
                },
                NetlinkPayload::Done(_) => return Ok(true),
                NetlinkPayload::InnerMessage(message) => replies.push(message),
                _ => {}
            }
        }
        Ok(false)
    }
}

/// Says what was being done when the kernel refused.
pub(super) fn doing<T>(result: io::Result<T>, action: impl FnOnce() -> String) -> Result<T, GateError> {
    result.map_err(|source| GateError::Kernel { action: action(), source })
}
