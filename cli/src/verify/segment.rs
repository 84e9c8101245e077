//! The network segment that the client shares with the guest: its own network card, and the guest's hardware address.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::time::{Duration, Instant};

use understudy_responder::frame::Mac;
use understudy_responder::sys;

/// How long the guest may take to tell its hardware address.
const LIMIT: Duration = Duration::from_secs(10);

/// The two ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    /// The client's network card.
    pub(crate) card: i32,
    pub(crate) ours: Mac,
    pub(crate) theirs: Mac,
}

impl Segment {
    /// On `interface`, to the guest of this hardware address, or to that of the first IPv4 address.
    pub(crate) fn find(
        interface: &str,
        mac: Option<Mac>,
        addresses: &[IpAddr],
        port: u16,
    ) -> Result<Self, String> {
        let wrong = |error: io::Error| format!("network interface {interface}: {error}");
        let card = sys::card(interface).map_err(wrong)?;
        let ours = fs::read_to_string(format!("/sys/class/net/{interface}/address")).map_err(wrong)?;
        let ours = parse_mac(ours.trim())?;
        let theirs = match (mac, addresses.iter().find_map(v4)) {
            (Some(mac), _) => mac,
            (None, Some(address)) => resolve(interface, address, port)?,
            (None, None) => {
                return Err("no IPv4 address to learn the hardware address by: give --mac".to_owned());
            }
        };
        Ok(Self { card, ours, theirs })
    }
}

fn v4(address: &IpAddr) -> Option<Ipv4Addr> {
    match address {
        IpAddr::V4(address) => Some(*address),
        IpAddr::V6(_) => None,
    }
}

/// Has the kernel ask by ARP, and reads what it has learnt.
fn resolve(interface: &str, address: Ipv4Addr, port: u16) -> Result<Mac, String> {
    let text = |error: io::Error| error.to_string();
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).map_err(text)?;
    let end = Instant::now() + LIMIT;
    while Instant::now() < end {
        // One that cannot be sent is sent again.
        let _ = socket.send_to(b"\n", (address, port));
        std::thread::sleep(Duration::from_millis(100));
        let table = fs::read_to_string("/proc/net/arp").map_err(text)?;
        if let Some(mac) = neighbour(&table, interface, address) {
            return Ok(mac);
        }
    }
    Err(format!("{address} is not on the segment of {interface}: give --mac, or leave --interface out"))
}

/// A line is `10.77.0.10 0x1 0x2 52:54:00:77:01:0a * lan`; flag 2 says that the address is known.
fn neighbour(table: &str, interface: &str, address: Ipv4Addr) -> Option<Mac> {
    let wanted = address.to_string();
    table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).find_map(|words| match words[..] {
        [ip, _, flags, mac, _, card] if ip == wanted && card == interface => {
            let flags = u32::from_str_radix(flags.trim_start_matches("0x"), 16).ok()?;
            (flags & 2 != 0).then(|| parse_mac(mac).ok()).flatten()
        }
        _ => None,
    })
}

/// Six numbers of two digits.
pub(crate) fn parse_mac(text: &str) -> Result<Mac, String> {
    let numbers: Vec<u8> = text.split(':').filter_map(|part| u8::from_str_radix(part, 16).ok()).collect();
    numbers.try_into().map_err(|_| format!("{text:?} is no hardware address such as 52:54:00:12:34:56"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "IP address       HW type     Flags       HW address            Mask     Device
10.77.0.10       0x1         0x2         52:54:00:77:01:0a     *        lan
10.77.0.11       0x1         0x0         00:00:00:00:00:00     *        lan
";

    #[test]
    fn only_what_the_kernel_knows_counts() {
        let of = |last, card| neighbour(TABLE, card, Ipv4Addr::new(10, 77, 0, last));
        assert_eq!(of(10, "lan"), Some([0x52, 0x54, 0, 0x77, 1, 10]));
        assert_eq!((of(10, "repl"), of(11, "lan"), of(1, "lan")), (None, None, None));
    }

    #[test]
    fn hardware_addresses_are_read() {
        assert!(parse_mac("52:54:00:77:01:0a").is_ok());
        for wrong in ["", "52:54:00:77:01", "52:54:00:77:01:0a:0b", "52:54:00:77:01:xx", "52:54:00:77:01:1ff"]
        {
            assert!(parse_mac(wrong).is_err(), "{wrong:?}");
        }
    }
}
