//! The side of `understudy verify` that runs in the guest, and what both sides say to each other.
//!
//! Everything that is answered carries a stamp, the number of the answer among all that this guest has given, from one
//! counter in its memory. What carries it:
//!
//! | protocol | the stamp is in |
//! |---|---|
//! | UDP, TCP, over IPv4 and IPv6 | the payload; the guest's own sockets |
//! | ICMP and ICMPv6 echo | the payload of the reply |
//! | ARP | the bytes behind the packet, where a short frame has padding |
//! | IPv6 neighbour discovery | option 253 of the advertisement, which RFC 4727 keeps for experiments |
//! | 802.1Q | as ICMP echo, in a frame of VLAN [`frame::VLAN`] |
//! | multicast | the payload of a UDP datagram to all hosts (224.0.0.1) |
//!
//! All but the first go through a packet socket, in both directions, for addresses that nobody has: the guest's kernel
//! would answer for its own ones, without a stamp.

pub mod frame;
mod frames;
pub mod memory;
mod sockets;
pub mod sys;
pub mod wire;

use std::io;
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use memory::Memory;

/// Where the responder listens unless told otherwise.
pub const PORT: u16 = 7422;

/// What a responder answers, and what not.
#[derive(Debug)]
pub struct Started {
    /// Why it answers UDP and TCP only, if it does.
    pub without_frames: Option<io::Error>,
}

/// Answers on `port` from now on, on threads of its own; frames as well where the system allows it.
///
/// # Errors
/// If nothing can be listened on.
pub fn start(port: u16) -> io::Result<Started> {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let boot = since_1970.as_secs() << 32 | u64::from(since_1970.subsec_nanos());
    let memory = Arc::new(Mutex::new(Memory::new(boot)));
    sockets::start(port, &memory)?;
    Ok(Started { without_frames: frames::start(&memory).err() })
}
