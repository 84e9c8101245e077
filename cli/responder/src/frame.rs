//! The frames that carry a line, in both directions. Pure; the packets are complete, with their checksums.
//!
//! Their network addresses are of the ranges for benchmarks (RFC 2544, RFC 5180) and belong to nobody, so that no kernel
//! takes part in it; their hardware addresses are those of the two network cards.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::wire::MAX_BYTES;

/// A hardware address.
pub type Mac = [u8; 6];

/// Of the frames that have a tag.
pub const VLAN: u16 = 116;

/// Who is asked, in every frame that has an IPv4 address, and who asks.
pub const GUEST_V4: Ipv4Addr = Ipv4Addr::new(198, 18, 116, 2);
const CLIENT_V4: Ipv4Addr = Ipv4Addr::new(198, 18, 116, 1);

/// The same in IPv6.
pub const GUEST_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 2, 0, 0x116, 0, 0, 0, 2);
const CLIENT_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 2, 0, 0x116, 0, 0, 0, 1);

/// All hosts of a network segment, as IPv4 and as hardware address.
const ALL_HOSTS: Ipv4Addr = Ipv4Addr::new(224, 0, 0, 1);
const ALL_HOSTS_MAC: Mac = [0x01, 0, 0x5e, 0, 0, 1];

/// Of both ends of the datagrams to all hosts.
const DATAGRAM_PORT: u16 = 7423;

/// "us", of the echoes.
const IDENTIFIER: u16 = 0x7573;

/// RFC 4727: kept for experiments, ignored by everybody else.
const EXPERIMENT: u8 = 253;

const ETHERNET_BYTES: usize = 14;
const ARP_BYTES: usize = 28;
const IPV4_BYTES: usize = 20;
const IPV6_BYTES: usize = 40;
const ECHO_BYTES: usize = 8;
const UDP_BYTES: usize = 8;
/// A neighbour's message up to its options, and its first option: a hardware address.
const NEIGHBOUR_BYTES: usize = 24;
const ADDRESS_OPTION_BYTES: usize = 8;

const TYPE_IPV4: u16 = 0x0800;
const TYPE_ARP: u16 = 0x0806;
const TYPE_IPV6: u16 = 0x86dd;
const ICMP: u8 = 1;
const UDP: u8 = 17;
const ICMP_V6: u8 = 58;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// ICMP echo.
    Echo,
    /// ICMPv6 echo.
    EchoV6,
    /// ARP.
    Arp,
    /// IPv6 neighbour discovery.
    Neighbour,
    /// ICMP echo with a tag of 802.1Q.
    Vlan,
    /// A UDP datagram whose answer goes to all hosts.
    Multicast,
}

/// Whether it asks or answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the client to the guest.
    Question,
    /// Back.
    Answer,
}

/// A frame as it is on the wire, but for its tag, which the kernel keeps beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// From the hardware addresses on.
    pub bytes: Vec<u8>,
    /// The tag of 802.1Q.
    pub tag: Option<u16>,
}

/// What is in a frame of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Carried<'a> {
    /// What it is.
    pub protocol: Protocol,
    /// Who sent it.
    pub from: Mac,
    /// Whom it was sent to.
    pub to: Mac,
    /// The line in it.
    pub line: &'a str,
}

impl Protocol {
    /// Every one.
    pub const ALL: [Self; 6] =
        [Self::Echo, Self::EchoV6, Self::Arp, Self::Neighbour, Self::Vlan, Self::Multicast];

    /// Its short name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Echo => "icmp",
            Self::EchoV6 => "icmpv6",
            Self::Arp => "arp",
            Self::Neighbour => "nd",
            Self::Vlan => "vlan",
            Self::Multicast => "multicast",
        }
    }

    /// The frame that carries `line`. Multicast answers go to all hosts, everything else to `to`.
    pub fn frame(self, direction: Direction, from: Mac, to: Mac, line: &str) -> Frame {
        let question = direction == Direction::Question;
        let v4 = if question { (CLIENT_V4, GUEST_V4) } else { (GUEST_V4, CLIENT_V4) };
        let v6 = if question { (CLIENT_V6, GUEST_V6) } else { (GUEST_V6, CLIENT_V6) };
        let (mut to, mut tag) = (to, None);
        let (ethertype, packet) = match self {
            Self::Echo => (TYPE_IPV4, echo_v4(question, v4, line)),
            Self::Vlan => {
                tag = Some(VLAN);
                (TYPE_IPV4, echo_v4(question, v4, line))
            }
            Self::Multicast if question => (TYPE_IPV4, datagram(v4, line)),
            Self::Multicast => {
                to = ALL_HOSTS_MAC;
                (TYPE_IPV4, datagram((GUEST_V4, ALL_HOSTS), line))
            }
            Self::Arp => (TYPE_ARP, arp(question, from, to, v4, line)),
            Self::EchoV6 => (TYPE_IPV6, echo_v6(question, v6, line)),
            Self::Neighbour => (TYPE_IPV6, neighbour(question, from, v6, line)),
        };
        let bytes = [&to[..], &from, &ethertype.to_be_bytes(), &packet].concat();
        Frame { bytes, tag }
    }
}

/// The checksum of the internet protocols (RFC 1071) over all `parts`, each but the last of an even length.
fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let mut sum = 0_u32;
    for pair in parts.iter().flat_map(|part| part.chunks(2)) {
        let (high, low) = (pair.first().copied().unwrap_or(0), pair.get(1).copied().unwrap_or(0));
        sum += u32::from(u16::from_be_bytes([high, low]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let folded = u16::try_from(sum).unwrap_or(0);
    (!folded).to_be_bytes()
}

/// Lines are short ([`MAX_BYTES`]).
fn length(bytes: usize) -> [u8; 2] {
    u16::try_from(bytes).unwrap_or(u16::MAX).to_be_bytes()
}

fn set(packet: &mut [u8], at: usize, value: [u8; 2]) {
    if let Some(place) = packet.get_mut(at..at + 2) {
        place.copy_from_slice(&value);
    }
}

/// Never forwarded: it may live one hop only.
fn ipv4(protocol: u8, (from, to): (Ipv4Addr, Ipv4Addr), payload: &[u8]) -> Vec<u8> {
    let total = length(IPV4_BYTES + payload.len());
    let mut header = vec![0x45, 0, total[0], total[1], 0, 0, 0, 0, 1, protocol, 0, 0];
    header.extend(from.octets());
    header.extend(to.octets());
    let sum = checksum(&[&header]);
    set(&mut header, 10, sum);
    header.extend(payload);
    header
}

/// `at` is where the payload has its checksum.
fn ipv6(hops: u8, (from, to): (Ipv6Addr, Ipv6Addr), mut payload: Vec<u8>, at: usize) -> Vec<u8> {
    let long = length(payload.len());
    let pseudo = [&from.octets()[..], &to.octets(), &[0, 0], &long, &[0, 0, 0, ICMP_V6]].concat();
    let sum = checksum(&[&pseudo, &payload]);
    set(&mut payload, at, sum);
    let mut packet = vec![0x60, 0, 0, 0, long[0], long[1], ICMP_V6, hops];
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend(payload);
    packet
}

fn echo(kind: u8, line: &str) -> Vec<u8> {
    [&[kind, 0, 0, 0][..], &IDENTIFIER.to_be_bytes(), &[0, 0], line.as_bytes()].concat()
}

fn echo_v4(question: bool, ends: (Ipv4Addr, Ipv4Addr), line: &str) -> Vec<u8> {
    let mut payload = echo(if question { 8 } else { 0 }, line);
    let sum = checksum(&[&payload]);
    set(&mut payload, 2, sum);
    ipv4(ICMP, ends, &payload)
}

fn echo_v6(question: bool, ends: (Ipv6Addr, Ipv6Addr), line: &str) -> Vec<u8> {
    ipv6(1, ends, echo(if question { 128 } else { 129 }, line), 2)
}

/// Without a checksum, as IPv4 allows.
fn datagram(ends: (Ipv4Addr, Ipv4Addr), line: &str) -> Vec<u8> {
    let port = DATAGRAM_PORT.to_be_bytes();
    let payload = [&port[..], &port, &length(UDP_BYTES + line.len()), &[0, 0], line.as_bytes()].concat();
    ipv4(UDP, ends, &payload)
}

fn arp(question: bool, from: Mac, to: Mac, ends: (Ipv4Addr, Ipv4Addr), line: &str) -> Vec<u8> {
    let operation = if question { 1 } else { 2 };
    let target = if question { [0; 6] } else { to };
    [
        &[0, 1, 8, 0, 6, 4, 0, operation][..],
        &from,
        &ends.0.octets(),
        &target,
        &ends.1.octets(),
        line.as_bytes(),
    ]
    .concat()
}

fn neighbour(question: bool, from: Mac, ends: (Ipv6Addr, Ipv6Addr), line: &str) -> Vec<u8> {
    // An advertisement is solicited and overrides.
    let (kind, flags, address) = if question { (135, 0, 1) } else { (136, 0x60, 2) };
    let mut payload = vec![kind, 0, 0, 0, flags, 0, 0, 0];
    payload.extend(GUEST_V6.octets());
    payload.extend([address, 1]);
    payload.extend(from);
    let eights = (2 + line.len()).div_ceil(8);
    let begin = payload.len();
    payload.extend([EXPERIMENT, u8::try_from(eights).unwrap_or(u8::MAX)]);
    payload.extend(line.as_bytes());
    payload.resize(begin + eights * 8, 0);
    ipv6(255, ends, payload, 2)
}

fn word(packet: &[u8], at: usize) -> Option<u16> {
    let bytes: [u8; 2] = packet.get(at..at + 2)?.try_into().ok()?;
    Some(u16::from_be_bytes(bytes))
}

/// Reads a frame; `None` if it is none of ours. A line may be followed by padding.
pub fn read(bytes: &[u8], tag: Option<u16>) -> Option<Carried<'_>> {
    let mac = |at: usize| -> Option<Mac> { bytes.get(at..at + 6)?.try_into().ok() };
    let (to, from) = (mac(0)?, mac(6)?);
    let packet = bytes.get(ETHERNET_BYTES..)?;
    let (protocol, rest) = match word(bytes, 12)? {
        TYPE_ARP if tag.is_none() => (Protocol::Arp, packet.get(ARP_BYTES..)?),
        TYPE_IPV4 => read_v4(packet, tag)?,
        TYPE_IPV6 if tag.is_none() => read_v6(packet)?,
        _ => return None,
    };
    let end = rest.iter().take(MAX_BYTES).position(|byte| *byte == b'\n')?;
    let line = std::str::from_utf8(rest.get(..end)?).ok()?;
    Some(Carried { protocol, from, to, line })
}

fn read_v4(packet: &[u8], tag: Option<u16>) -> Option<(Protocol, &[u8])> {
    // No options, and not a fragment.
    if packet.first() != Some(&0x45) || word(packet, 6)? & 0x3fff != 0 {
        return None;
    }
    let payload = packet.get(IPV4_BYTES..)?;
    match (*packet.get(9)?, tag.map(|tag| tag & 0xfff)) {
        (ICMP, tag) if word(payload, 4) == Some(IDENTIFIER) => {
            let protocol = match tag {
                None => Protocol::Echo,
                Some(VLAN) => Protocol::Vlan,
                Some(_) => return None,
            };
            Some((protocol, payload.get(ECHO_BYTES..)?))
        }
        (UDP, None) if word(payload, 2) == Some(DATAGRAM_PORT) => {
            Some((Protocol::Multicast, payload.get(UDP_BYTES..)?))
        }
        _ => None,
    }
}

fn read_v6(packet: &[u8]) -> Option<(Protocol, &[u8])> {
    if packet.first()? >> 4 != 6 || packet.get(6) != Some(&ICMP_V6) {
        return None;
    }
    let payload = packet.get(IPV6_BYTES..)?;
    match payload.first()? {
        128 | 129 if word(payload, 4) == Some(IDENTIFIER) => {
            Some((Protocol::EchoV6, payload.get(ECHO_BYTES..)?))
        }
        135 | 136 => {
            let option = payload.get(NEIGHBOUR_BYTES + ADDRESS_OPTION_BYTES..)?;
            (option.first() == Some(&EXPERIMENT))
                .then(|| option.get(2..))?
                .map(|line| (Protocol::Neighbour, line))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Answer, Request};

    const CLIENT: Mac = [2, 0, 0, 0, 0, 1];
    const GUEST: Mac = [2, 0, 0, 0, 0, 2];

    #[test]
    fn a_line_is_read_from_every_frame_as_it_was_put_in() {
        let request = Request { client: 7, number: u64::MAX };
        let answer = Answer { request, stamp: u64::MAX, heard: u64::MAX, boot: u64::MAX }.line();
        for protocol in Protocol::ALL {
            for (direction, line) in
                [(Direction::Question, request.line()), (Direction::Answer, answer.clone())]
            {
                let mut frame = protocol.frame(direction, CLIENT, GUEST, &line);
                // A short frame is padded on its way.
                frame.bytes.resize(frame.bytes.len().max(60) + 4, 0);
                let carried = read(&frame.bytes, frame.tag).unwrap_or_else(|| panic!("{protocol:?}"));
                assert_eq!(
                    (carried.protocol, carried.line, carried.from),
                    (protocol, line.trim_end(), CLIENT)
                );
                for cut in 0..frame.bytes.len() - 4 - line.len() {
                    assert_eq!(read(&frame.bytes[..cut], frame.tag), None, "{protocol:?} cut at {cut}");
                }
            }
        }
    }

    /// A receiver adds everything up, the sum included, and gets nothing.
    #[test]
    fn checksums_are_right() {
        let line = Request { client: 1, number: 2 }.line();
        let v4 = Protocol::Echo.frame(Direction::Question, CLIENT, GUEST, &line).bytes;
        assert_eq!(checksum(&[&v4[14..34]]), [0, 0]);
        assert_eq!(checksum(&[&v4[34..]]), [0, 0]);
        for protocol in [Protocol::EchoV6, Protocol::Neighbour] {
            let v6 = protocol.frame(Direction::Answer, GUEST, CLIENT, &line).bytes;
            let pseudo = [&v6[22..54], &[0, 0], &v6[18..20], &[0, 0, 0, 58]].concat();
            assert_eq!(checksum(&[&pseudo, &v6[54..]]), [0, 0], "{protocol:?}");
        }
    }

    #[test]
    fn a_frame_of_another_vlan_and_one_that_lost_its_tag_are_not_taken_for_ours() {
        let frame = Protocol::Vlan.frame(Direction::Answer, GUEST, CLIENT, "us1 1 2\n");
        assert_eq!(frame.tag, Some(VLAN));
        assert_eq!(read(&frame.bytes, Some(VLAN + 1)), None);
        assert_eq!(read(&frame.bytes, None).map(|carried| carried.protocol), Some(Protocol::Echo));
        let arp = Protocol::Arp.frame(Direction::Answer, GUEST, CLIENT, "us1 1 2\n");
        assert_eq!(read(&arp.bytes, Some(VLAN)), None);
    }

    #[test]
    fn answers_to_all_hosts_go_to_all_hosts() {
        let answer = Protocol::Multicast.frame(Direction::Answer, GUEST, CLIENT, "x\n").bytes;
        assert_eq!(answer[..6], ALL_HOSTS_MAC);
        let question = Protocol::Multicast.frame(Direction::Question, CLIENT, GUEST, "x\n").bytes;
        assert_eq!(question[..6], GUEST);
    }
}
