//! Sockets that hear what comes into a network device, and what is taken out of the host's network.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, netlink, socket_with, sockopt};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// `PACKET_IGNORE_OUTGOING` of linux/if_packet.h.
const PACKET_IGNORE_OUTGOING: libc::c_int = 23;

/// Multicast groups of linux/rtnetlink.h.
const RTMGRP_LINK: u32 = 1;
const RTMGRP_TC: u32 = 8;

/// Raised by the kernel to its least, which one frame fills.
const ROOM_BYTES: usize = 1;

/// A socket that becomes readable when a frame comes in from the other side of a device: for a tap, from its guest.
///
/// # Errors
/// The system's, for example because there is no such device.
pub(crate) fn frames_of(index: u32) -> io::Result<OwnedFd> {
    // Protocol 0 hears nothing until the socket is bound to its device.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::PACKET, SocketType::RAW, flags, None)?;
    sockopt::set_socket_recv_buffer_size(&socket, ROOM_BYTES)?;
    let on: libc::c_int = 1;
    let length = |bytes: usize| libc::socklen_t::try_from(bytes).unwrap_or(0);
    // SAFETY: the descriptor is open, and the option's value is an int of the length given, read during the call.
    let status = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            PACKET_IGNORE_OUTGOING,
            (&raw const on).cast(),
            length(size_of::<libc::c_int>()),
        )
    };
    if status != 0 {
        return Err(io::Error::last_os_error());
    }
    let every_protocol = u16::try_from(libc::ETH_P_ALL).unwrap_or(3).to_be();
    let address = libc::sockaddr_ll {
        sll_family: u16::try_from(libc::AF_PACKET).unwrap_or(17),
        sll_protocol: every_protocol,
        sll_ifindex: index.cast_signed(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: the descriptor is open, and the address is a complete sockaddr_ll of the length given, read during the call.
    let status = unsafe {
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length(size_of::<libc::sockaddr_ll>()))
    };
    if status != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(socket)
}

/// A socket that becomes readable when a device, a qdisc or a filter of this network namespace is deleted, or a filter is
/// made. The kernel drops what else its groups say, so the gate's own work, two messages an epoch, wakes nobody.
///
/// # Errors
/// The system's.
pub(crate) fn deletions() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    // Protocol 0 is NETLINK_ROUTE.
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
    let heard = [libc::RTM_DELLINK, libc::RTM_DELQDISC, libc::RTM_DELTFILTER, libc::RTM_NEWTFILTER];
    let statement = |code: u32, jt: usize, k: u32| libc::sock_filter {
        // All of them are small constants.
        code: u16::try_from(code).unwrap_or(0),
        jt: u8::try_from(jt).unwrap_or(0),
        jf: 0,
        k,
    };
    // The type of the first message, which a filter reads as if it were in network order. What is said of a replaced qdisc
    // begins with the deletion of the old one.
    let mut program = vec![statement(libc::BPF_LD | libc::BPF_H | libc::BPF_ABS, 0, 4)];
    for (index, kind) in heard.into_iter().enumerate() {
        let kind = u32::from(kind.to_be());
        program.push(statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, heard.len() - index, kind));
    }
    program.push(statement(libc::BPF_RET | libc::BPF_K, 0, 0));
    program.push(statement(libc::BPF_RET | libc::BPF_K, 0, u32::MAX));
    let program =
        libc::sock_fprog { len: u16::try_from(program.len()).unwrap_or(0), filter: program.as_mut_ptr() };
    // SAFETY: the descriptor is open; the option's value is a sock_fprog of the length given, whose statements live until
    // the end of the call, which copies them.
    let status = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            libc::socklen_t::try_from(size_of::<libc::sock_fprog>()).unwrap_or(0),
        )
    };
    if status != 0 {
        return Err(io::Error::last_os_error());
    }
    // After the filter, so that nothing else is ever in it.
    bind(&socket, &netlink::SocketAddrNetlink::new(0, RTMGRP_LINK | RTMGRP_TC))?;
    Ok(socket)
}

/// A descriptor whose readability a task can wait for.
///
/// # Errors
/// Outside of a runtime, or the system's.
pub(crate) fn watched(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is owned by the result and stays open, and the same, until that is dropped.
    let watched = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) };
    watched.map_err(|error| error.into_parts().1)
}
