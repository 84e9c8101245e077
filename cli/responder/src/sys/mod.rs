//! Packet sockets with the tags of 802.1Q that the kernel takes out of frames and puts beside them. The only unsafe code of
//! this crate.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use crate::frame::{Frame, GUEST_V4, GUEST_V6};

/// How long [`PacketSocket::receive`] waits.
const WAIT: Duration = Duration::from_millis(100);

/// Room for what comes at once when a gate opens.
const ROOM_BYTES: libc::c_int = 4 << 20;

/// `ETH_P_8021Q` in network order, and where it goes in a frame.
const TAG_TYPE: [u8; 2] = [0x81, 0];
const TAG_AT: usize = 12;

/// Which frames a socket hears.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hears {
    /// Those of everybody.
    All,
    /// ARP, and what goes to the addresses that nobody has: the kernel passes nothing else on, so a guest with much
    /// traffic does not pay for it.
    Questions,
}

/// What came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    /// Bytes of it.
    pub length: usize,
    /// Its tag.
    pub tag: Option<u16>,
    /// The network card it came to.
    pub card: i32,
    /// It was sent to this card's own hardware address, by somebody else.
    pub is_for_us: bool,
    /// We have sent it.
    pub is_ours: bool,
}

/// A socket that hears and sends whole frames.
#[derive(Debug)]
pub struct PacketSocket(OwnedFd);

/// Of the network card of this name.
///
/// # Errors
/// The system's, if there is none.
pub fn card(name: &str) -> io::Result<i32> {
    let name = CString::new(name)?;
    // SAFETY: the name is a string that ends with a zero byte, read during the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    i32::try_from(index).ok().filter(|index| *index != 0).ok_or_else(io::Error::last_os_error)
}

fn every_protocol() -> u16 {
    u16::try_from(libc::ETH_P_ALL).unwrap_or(3).to_be()
}

/// An instruction of a classic packet filter.
fn op(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: u16::try_from(code).unwrap_or(0), jt, jf, k }
}

/// Accepts ARP, IPv4 to [`GUEST_V4`], and IPv6 to what begins as [`GUEST_V6`].
fn questions() -> [libc::sock_filter; 9] {
    let half = libc::BPF_LD | libc::BPF_H | libc::BPF_ABS;
    let word = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let give = libc::BPF_RET | libc::BPF_K;
    let [v6, v6b] = [GUEST_V6.segments()[0], GUEST_V6.segments()[1]].map(u32::from);
    [
        op(half, 0, 0, 12),
        op(equal, 6, 0, 0x0806),
        op(equal, 0, 2, 0x0800),
        op(word, 0, 0, 30),
        op(equal, 3, 2, GUEST_V4.to_bits()),
        op(word, 0, 0, 38),
        op(equal, 1, 0, v6 << 16 | v6b),
        op(give, 0, 0, 0),
        op(give, 0, 0, u32::MAX),
    ]
}

impl PacketSocket {
    /// On one network card, or on all.
    ///
    /// # Errors
    /// The system's: it needs CAP_NET_RAW.
    pub fn open(card: Option<i32>, hears: Hears) -> io::Result<Self> {
        // SAFETY: no memory is passed. Protocol 0 hears nothing until it is bound.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and has no other owner.
        let socket = Self(unsafe { OwnedFd::from_raw_fd(fd) });
        socket.set(libc::SOL_PACKET, libc::PACKET_AUXDATA, &1 as &libc::c_int)?;
        let wait = libc::timeval {
            tv_sec: 0,
            tv_usec: libc::suseconds_t::try_from(WAIT.as_micros()).unwrap_or(100_000),
        };
        socket.set(libc::SOL_SOCKET, libc::SO_RCVTIMEO, &wait)?;
        socket.set(libc::SOL_SOCKET, libc::SO_RCVBUF, &ROOM_BYTES)?;
        if hears == Hears::Questions {
            let mut filter = questions();
            let length = libc::c_ushort::try_from(filter.len()).unwrap_or(0);
            let program = libc::sock_fprog { len: length, filter: filter.as_mut_ptr() };
            socket.set(libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)?;
        }
        let address = address(card.unwrap_or(0), every_protocol());
        // SAFETY: the descriptor is open, and the address is a complete sockaddr_ll of the length given, read during the call.
        let status = unsafe { libc::bind(socket.0.as_raw_fd(), (&raw const address).cast(), ADDRESS_BYTES) };
        if status == 0 { Ok(socket) } else { Err(io::Error::last_os_error()) }
    }

    /// Has every network card of now take in frames of every VLAN: one that nobody uses may be kept from the guest by its card, as
    /// QEMU's virtio-net does when no vhost-net serves it. Each is on its own; one that cannot is none the worse.
    pub fn take_every_vlan(&self) {
        // SAFETY: no memory is passed; what is returned ends with an entry of index 0, and is freed below.
        let cards = unsafe { libc::if_nameindex() };
        if cards.is_null() {
            return;
        }
        let mut next = cards;
        // SAFETY: `next` is at an entry of the list, up to and including the last, whose index is 0.
        while let index @ 1.. = unsafe { (*next).if_index } {
            let Ok(mr_ifindex) = libc::c_int::try_from(index) else { break };
            let mr_type = libc::c_ushort::try_from(libc::PACKET_MR_PROMISC).unwrap_or(1);
            let wanted = libc::packet_mreq { mr_ifindex, mr_type, mr_alen: 0, mr_address: [0; 8] };
            let _ = self.set(libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &wanted);
            // SAFETY: this entry is not the last one.
            next = unsafe { next.add(1) };
        }
        // SAFETY: the list is what `if_nameindex` gave, and nothing refers to it any more.
        unsafe { libc::if_freenameindex(cards) };
    }

    fn set<T>(&self, level: libc::c_int, option: libc::c_int, value: &T) -> io::Result<()> {
        let length = libc::socklen_t::try_from(size_of::<T>()).unwrap_or(0);
        // SAFETY: the descriptor is open, and the value is of the length given and of the type that each caller's option
        // takes; what it points to outlives the call.
        let status = unsafe {
            libc::setsockopt(self.0.as_raw_fd(), level, option, std::ptr::from_ref(value).cast(), length)
        };
        if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Sends a frame from this card, with its tag in it.
    ///
    /// # Errors
    /// The system's.
    pub fn send(&self, card: i32, frame: &Frame) -> io::Result<()> {
        let bytes = tagged(&frame.bytes, frame.tag);
        let address = address(card, 0);
        // SAFETY: the descriptor is open; frame and address are valid for the lengths given and read during the call.
        let sent = unsafe {
            libc::sendto(
                self.0.as_raw_fd(),
                bytes.as_ptr().cast(),
                bytes.len(),
                0,
                (&raw const address).cast(),
                ADDRESS_BYTES,
            )
        };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Takes the next frame; `None` if none comes within a tenth of a second.
    ///
    /// # Errors
    /// The system's.
    pub fn receive(&self, bytes: &mut [u8]) -> io::Result<Option<Received>> {
        let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        // Larger and better aligned than the one message that comes.
        let mut control = [0_u64; 16];
        let mut from = address(0, 0);
        // SAFETY: all zero is a valid msghdr: null pointers of no length.
        let mut message: libc::msghdr = unsafe { zeroed() };
        message.msg_name = (&raw mut from).cast();
        message.msg_namelen = ADDRESS_BYTES;
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        // SAFETY: the descriptor is open; every pointer of the message is to memory of ours of the length beside it, that
        // outlives the call.
        let length = unsafe { libc::recvmsg(self.0.as_raw_fd(), &raw mut message, 0) };
        let Ok(length) = usize::try_from(length) else {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(error),
            };
        };
        let kind = from.sll_pkttype;
        Ok(Some(Received {
            length,
            tag: tag(&message),
            card: from.sll_ifindex,
            is_for_us: kind == libc::PACKET_HOST && from.sll_hatype == libc::ARPHRD_ETHER,
            is_ours: kind == libc::PACKET_OUTGOING,
        }))
    }
}

const ADDRESS_BYTES: libc::socklen_t = 20;

fn address(card: i32, protocol: u16) -> libc::sockaddr_ll {
    libc::sockaddr_ll {
        sll_family: u16::try_from(libc::AF_PACKET).unwrap_or(17),
        sll_protocol: protocol,
        sll_ifindex: card,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    }
}

fn tag(message: &libc::msghdr) -> Option<u16> {
    // SAFETY: the kernel has filled in the message's control buffer and its length, and both still are as it left them.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(message) };
    while !header.is_null() {
        // SAFETY: a header that these functions give lies, complete, within the control buffer.
        let (level, kind) = unsafe { ((*header).cmsg_level, (*header).cmsg_type) };
        if (level, kind) == (libc::SOL_PACKET, libc::PACKET_AUXDATA) {
            // SAFETY: a message of this type holds a tpacket_auxdata, which may be read from any alignment this way.
            let extra = unsafe { libc::CMSG_DATA(header).cast::<libc::tpacket_auxdata>().read_unaligned() };
            return (extra.tp_status & libc::TP_STATUS_VLAN_VALID != 0).then_some(extra.tp_vlan_tci);
        }
        // SAFETY: as for the first header.
        header = unsafe { libc::CMSG_NXTHDR(message, header) };
    }
    None
}

/// The frame as it is on the wire.
pub fn tagged(bytes: &[u8], tag: Option<u16>) -> Vec<u8> {
    match (tag, bytes.split_at_checked(TAG_AT)) {
        (Some(tag), Some((addresses, rest))) => [addresses, &TAG_TYPE, &tag.to_be_bytes(), rest].concat(),
        _ => bytes.to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_goes_behind_the_addresses() {
        let bytes: Vec<u8> = (0..16).collect();
        assert_eq!(tagged(&bytes, Some(0x0102))[10..18], [10, 11, 0x81, 0, 1, 2, 12, 13]);
        assert_eq!(tagged(&bytes, None), bytes);
        assert_eq!(size_of::<libc::sockaddr_ll>(), ADDRESS_BYTES as usize);
    }
}
