//! Names and addresses: the same in every lab, since every lab has a network namespace of its own.
//!
//! ```text
//!   netns us-NAME          client: .254 on every network
//!   +-----------------------------------------------+
//!   |  bridge lan  10.77.0.0/24  guests live here   |
//!   |  bridge repl 10.78.0.0/24  replication        |
//!   |  bridge mgmt 10.79.0.0/24  lab exec, never cut|
//!   +---+---------------------------------------+---+
//!       | taps alpha-lan, -repl, -mgmt          | taps beta-...
//!    +--+---+                                +--+---+
//!    | alpha|  .1                            | beta |  .2
//!    +------+  lan is a port of br0          +------+
//! ```

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use anyhow::bail;
use serde::{Deserialize, Serialize};

/// Where the exec server of a host listens, on `mgmt`.
pub(crate) const EXEC_PORT: u16 = 7001;
/// Where the guest program answers.
pub(crate) const GUEST_PORT: u16 = 7000;
/// Where understudy-backup listens.
pub(crate) const BACKUP_PORT: u16 = 7420;
/// Where understudy-primary serves operators.
pub(crate) const PRIMARY_ADMIN_PORT: u16 = 7423;
/// Where understudy-backup serves operators.
pub(crate) const BACKUP_ADMIN_PORT: u16 = 7424;
/// The bridge the guests' interfaces are put into, in every host.
pub(crate) const GUEST_BRIDGE: &str = "br0";

/// A script in every host that starts its libvirt.
pub(crate) const START_LIBVIRT: &str = "/run/lab/start-libvirt";

/// Its counterpart in hosts that were given Open vSwitch.
pub(crate) const OVS_BRIDGE: &str = "ovs0";
/// The last part of the client's addresses.
const CLIENT: u8 = 254;

/// One of the lab's hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum HostName {
    Alpha,
    Beta,
}

/// One of the lab's networks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Net {
    /// Guests and clients.
    Lan,
    /// Epochs between the hosts.
    Repl,
    /// `lab exec`.
    Mgmt,
}

impl HostName {
    pub(crate) const ALL: [Self; 2] = [Self::Alpha, Self::Beta];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Alpha => "alpha",
            Self::Beta => "beta",
        }
    }

    pub(crate) fn other(self) -> Self {
        match self {
            Self::Alpha => Self::Beta,
            Self::Beta => Self::Alpha,
        }
    }

    fn number(self) -> u8 {
        match self {
            Self::Alpha => 1,
            Self::Beta => 2,
        }
    }

    pub(crate) fn address(self, net: Net) -> Ipv4Addr {
        net.address(self.number())
    }

    pub(crate) fn mac(self, net: Net) -> String {
        format!("52:54:00:{:02x}:00:{:02x}", net.octet(), self.number())
    }

    /// What the firmware says the machine is; libvirt identifies hosts by it.
    pub(crate) fn uuid(self) -> String {
        format!("5d2f1a00-7420-4c1e-9d00-0000000000{:02x}", self.number())
    }

    pub(crate) fn tap(self, net: Net) -> String {
        format!("{}-{}", self.name(), net.name())
    }
}

impl Net {
    pub(crate) const ALL: [Self; 3] = [Self::Lan, Self::Repl, Self::Mgmt];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Lan => "lan",
            Self::Repl => "repl",
            Self::Mgmt => "mgmt",
        }
    }

    fn octet(self) -> u8 {
        match self {
            Self::Lan => 77,
            Self::Repl => 78,
            Self::Mgmt => 79,
        }
    }

    fn address(self, last: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, self.octet(), 0, last)
    }

    pub(crate) fn client(self) -> Ipv4Addr {
        self.address(CLIENT)
    }
}

/// The address of guest `g1`, `g2`, ...: its number gives it.
pub(crate) fn guest_address(name: &str) -> Ipv4Addr {
    let number = name.trim_start_matches(|c: char| !c.is_ascii_digit()).parse::<u8>().unwrap_or(1);
    Net::Lan.address(9_u8.saturating_add(number.clamp(1, 200)))
}

/// The IPv6 address that goes with an address on the LAN, as the guest makes it of its own.
pub(crate) fn guest_v6(address: Ipv4Addr) -> Ipv6Addr {
    format!("fd77::{}", address.octets()[3]).parse().unwrap_or(Ipv6Addr::UNSPECIFIED)
}

impl FromStr for HostName {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match Self::ALL.into_iter().find(|host| host.name() == text) {
            Some(host) => Ok(host),
            None => bail!("no host `{text}` in the lab: there are alpha and beta"),
        }
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What can be cut, healed or listened to: `lan`, `repl` (every host's port), `lan:alpha`, `repl:beta` (one).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Link {
    pub(crate) net: Net,
    pub(crate) host: Option<HostName>,
}

impl Link {
    /// The taps it is made of.
    pub(crate) fn taps(self) -> Vec<String> {
        let hosts = HostName::ALL.into_iter().filter(|host| self.host.is_none_or(|only| only == *host));
        hosts.map(|host| host.tap(self.net)).collect()
    }

    /// Where its frames can be seen.
    pub(crate) fn device(self) -> String {
        self.host.map_or_else(|| self.net.name().to_owned(), |host| host.tap(self.net))
    }
}

impl FromStr for Link {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (net, host) = text.split_once(':').map_or((text, None), |(net, host)| (net, Some(host)));
        let net = match net {
            "lan" => Net::Lan,
            "repl" => Net::Repl,
            _ => bail!(
                "no link `{text}` in the lab: there are lan, repl, and lan:alpha, repl:beta, ... for one host"
            ),
        };
        Ok(Self { net, host: host.map(str::parse).transpose()? })
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host {
            Some(host) => write!(f, "{}:{host}", self.net.name()),
            None => f.write_str(self.net.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_named_by_network_and_host() {
        let both: Link = "lan".parse().unwrap();
        assert_eq!((both.taps(), both.device()), (vec!["alpha-lan".into(), "beta-lan".into()], "lan".into()));
        let one: Link = "repl:beta".parse().unwrap();
        assert_eq!((one.taps(), one.to_string()), (vec!["beta-repl".into()], "repl:beta".into()));
        assert!("mgmt".parse::<Link>().is_err(), "exec must go on working");
        assert!("lan:gamma".parse::<Link>().is_err());
    }

    #[test]
    fn interface_names_fit() {
        for (host, net) in HostName::ALL.into_iter().flat_map(|host| Net::ALL.map(|net| (host, net))) {
            assert!(host.tap(net).len() <= 15, "{}", host.tap(net));
        }
    }

    #[test]
    fn guests_have_addresses_of_their_own() {
        assert_eq!(guest_address("g1"), Ipv4Addr::new(10, 77, 0, 10));
        assert_eq!(guest_address("g2"), Ipv4Addr::new(10, 77, 0, 11));
        assert_ne!(guest_address("g200"), Net::Lan.client());
    }
}
