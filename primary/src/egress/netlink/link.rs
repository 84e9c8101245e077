//! Network devices: the guest's, which are only looked at, and the gate's own.

use std::io;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::{LinkIfb, LinkUnspec};

use super::{Route, doing};
use crate::egress::GateError;

/// A device, as it is now.
#[derive(Debug, Clone)]
pub(in crate::egress) struct Device {
    pub(in crate::egress) index: u32,
    pub(in crate::egress) name: String,
    /// `None` for hardware.
    pub(in crate::egress) kind: Option<InfoKind>,
    /// Frames an ifb has taken and not yet given on; counted by the kernel.
    pub(in crate::egress) inside: u64,
}

impl Device {
    fn of(message: LinkMessage, name: &str) -> Self {
        let mut device = Self { index: message.header.index, name: name.to_owned(), kind: None, inside: 0 };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::LinkInfo(infos) => {
                    device.kind = infos.into_iter().find_map(|info| match info {
                        LinkInfo::Kind(kind) => Some(kind),
                        _ => None,
                    });
                }
                LinkAttribute::Stats64(stats) => {
                    let gone = stats.tx_packets.saturating_add(stats.rx_dropped);
                    device.inside = stats.rx_packets.saturating_sub(gone);
                }
                _ => {}
            }
        }
        device
    }
}

impl Route {
    /// The device of that name.
    pub(in crate::egress) fn device(&mut self, name: &str) -> Result<Option<Device>, GateError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        let replies = match self.ask(RouteNetlinkMessage::GetLink(message), 0) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(None),
            other => doing(other, || format!("look for the device {name}"))?,
        };
        Ok(replies.into_iter().find_map(|reply| match reply {
            RouteNetlinkMessage::NewLink(link) => Some(Device::of(link, name)),
            _ => None,
        }))
    }

    /// Makes an ifb, which is down: what is redirected to it is dropped until it is up.
    pub(in crate::egress) fn add_ifb(&mut self, name: &str) -> Result<Device, GateError> {
        let message = LinkIfb::new(name).build();
        let result = self.ask(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL);
        doing(result, || format!("make the device {name} (is the kernel module ifb there?)"))?;
        self.device(name)?.ok_or_else(|| GateError::NoDevice { device: name.to_owned() })
    }

    pub(in crate::egress) fn set_up(&mut self, device: &Device) -> Result<(), GateError> {
        // What the kernel itself says over IPv6 on a new device would wait among the guest's frames. It goes nowhere
        // when it is released, but it would show as waiting output.
        let switch = format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", device.name);
        if let Err(error) = std::fs::write(&switch, "1") {
            tracing::debug!(%error, switch, "IPv6 stays as it is on the gate's device");
        }
        let message = LinkUnspec::new_with_index(device.index).up().build();
        let result = self.ask(RouteNetlinkMessage::SetLink(message), 0);
        doing(result, || format!("switch the device {} on", device.name)).map(drop)
    }

    /// Deletes a device with all that is in it. One that is gone is deleted.
    pub(in crate::egress) fn delete(&mut self, device: &Device) -> Result<(), GateError> {
        let mut message = LinkMessage::default();
        message.header.index = device.index;
        let result: io::Result<_> = match self.ask(RouteNetlinkMessage::DelLink(message), 0) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(Vec::new()),
            other => other,
        };
        doing(result, || format!("delete the device {}", device.name)).map(drop)
    }
}
