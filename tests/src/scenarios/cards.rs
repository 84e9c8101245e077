//! Guests whose network card is not a plain tap in a bridge that QEMU serves: their output is gated as any other, and they fail over.

use std::time::Duration;

use anyhow::Result;

use super::{Scenario, advances, failover, output, start};
use crate::lab::Lab;
use crate::lab::domain::{Card, GuestSpec};
use crate::lab::plan::HostName::{self, Alpha};
use crate::lab::plan::{GUEST_BRIDGE, Net, OVS_BRIDGE};

/// Only when they are asked for by name.
pub(super) const ON_REQUEST: &[Scenario] = &[
    ("cards: a tap served by vhost-net is gated, and fails over", |lab| gated(lab, Card::Vhost)),
    ("cards: a card with two queues is gated, and fails over", |lab| gated(lab, Card::Queues(2))),
    ("cards: a macvtap is gated, and fails over", |lab| gated(lab, Card::Macvtap)),
    ("cards: a tap in Open vSwitch is gated, and fails over", |lab| {
        HostName::ALL.into_iter().try_for_each(|host| open_vswitch(lab, host))?;
        gated(lab, Card::OpenVswitch)
    }),
];

const LIMIT: Duration = Duration::from_secs(90);

/// Gives a host Open vSwitch, whose bridge takes the LAN and the host's address on it from the kernel's bridge.
fn open_vswitch(lab: &Lab, host: HostName) -> Result<()> {
    lab.shell(
        host,
        &format!(
        "set -e
         command -v ovs-vsctl > /dev/null || {{ echo 'this scenario needs the package openvswitch-switch'; exit 1; }}
         modprobe openvswitch
         mkdir -p /run/openvswitch /var/log/openvswitch
         ovsdb-tool create /run/openvswitch/conf.db /usr/share/openvswitch/vswitch.ovsschema
         ovsdb-server --remote=punix:/run/openvswitch/db.sock --pidfile --detach /run/openvswitch/conf.db
         ovs-vsctl --no-wait init
         ovs-vswitchd --pidfile --detach --log-file
         ovs-vsctl add-br {OVS_BRIDGE} -- set bridge {OVS_BRIDGE} other-config:hwaddr=$(cat /sys/class/net/{GUEST_BRIDGE}/address)
         address=$(ip -brief -4 address show dev {GUEST_BRIDGE} | awk '{{ print $3 }}')
         ip link set {lan} nomaster
         ip link set {GUEST_BRIDGE} down
         ip address flush dev {GUEST_BRIDGE}
         ovs-vsctl add-port {OVS_BRIDGE} {lan}
         ip address add $address dev {OVS_BRIDGE}
         ip link set {OVS_BRIDGE} up",
        lan = Net::Lan.name(),
        ),
    )?;
    Ok(())
}

/// Frames wait while the agent is away, none is lost, and a power cut takes nothing back that a client has heard.
fn gated(lab: &Lab, card: Card) -> Result<()> {
    let mut guest = start(lab, Alpha, &GuestSpec { vcpus: 2, card, ..GuestSpec::new("g1") })?;
    let boot = guest.count()?.boot;
    lab.protect("g1", Alpha)?;
    advances(lab, LIMIT)?;
    output::agent_killed(lab, &mut guest)?;
    lab.must_understudy(Alpha, &["unprotect", "g1"])?;
    failover::cut(lab, Alpha, &boot, failover::WARM)
}
