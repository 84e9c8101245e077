//! The `plug` qdisc: its options, which no crate knows, and its counters.

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_ECHO, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage, TcStats2};

use super::{Route, doing};
use crate::egress::{GateError, Held};

/// Name of the qdisc.
const PLUG: &str = "plug";

/// Name of the qdisc that is none.
const NO_QUEUE: &str = "noqueue";

/// `TCA_OPTIONS` of linux/rtnetlink.h.
const TCA_OPTIONS: u16 = 2;

/// Handle of our qdiscs, by which they are known again: `7573:`, "us".
const HANDLE: TcHandle = TcHandle { major: 0x7573, minor: 0 };

/// `enum tc_plug_action` (TCQ_PLUG_*) of linux/pkt_sched.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::egress) enum Action {
    /// What is here is one epoch, and what comes waits behind it.
    Buffer = 0,
    /// That epoch may go.
    ReleaseOne = 1,
    /// Everything may go, also what comes.
    ReleaseIndefinite = 2,
    /// Bytes that may wait.
    Limit = 3,
}

/// `struct tc_plug_qopt { int action; __u32 limit; }` of linux/pkt_sched.h, in the machine's byte order.
fn options(action: Action, limit: u32) -> TcAttribute {
    let mut bytes = (action as i32).to_ne_bytes().to_vec();
    bytes.extend_from_slice(&limit.to_ne_bytes());
    TcAttribute::Other(DefaultNla::new(TCA_OPTIONS, bytes))
}

fn message(index: u32, action: Action, limit: u32) -> RouteNetlinkMessage {
    let mut message = root(index);
    message.header.handle = HANDLE;
    message.attributes = vec![TcAttribute::Kind(PLUG.to_owned()), options(action, limit)];
    RouteNetlinkMessage::NewQueueDiscipline(message)
}

fn root(index: u32) -> TcMessage {
    let mut message = TcMessage::with_index(index.cast_signed());
    message.header.parent = TcHandle::ROOT;
    message
}

/// The qdisc at the root of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::egress) enum Root {
    /// What the kernel has put there.
    Default,
    /// None at all, said so by somebody: libvirt does of every interface it makes.
    NoQueue,
    /// Ours.
    Gate,
    /// Somebody else's, of this kind.
    Other(String),
}

impl Route {
    /// Makes `plug` the root qdisc of a device; it holds everything from the start.
    pub(in crate::egress) fn add_plug(
        &mut self,
        index: u32,
        name: &str,
        limit_bytes: u32,
    ) -> Result<(), GateError> {
        let request = message(index, Action::Limit, limit_bytes);
        let instead = if self.root(index, name)? == Root::NoQueue { NLM_F_REPLACE } else { NLM_F_EXCL };
        let result = self.ask(request, NLM_F_CREATE | instead);
        doing(result, || format!("make a plug qdisc on {name} (is the kernel module sch_plug there?)"))
            .map(drop)
    }

    /// Tells a `plug` something.
    pub(in crate::egress) fn plug(
        &mut self,
        index: u32,
        name: &str,
        action: Action,
    ) -> Result<(), GateError> {
        doing(self.ask(message(index, action, 0), 0), || format!("tell the plug of {name} {action:?}"))
            .map(drop)
    }

    /// Takes a `plug` away, with all it holds. In its place comes `noqueue`, as libvirt gives it to a macvtap.
    pub(in crate::egress) fn replace_plug(&mut self, index: u32, name: &str) -> Result<(), GateError> {
        let mut message = root(index);
        message.attributes = vec![TcAttribute::Kind(NO_QUEUE.to_owned())];
        let result = self.ask(RouteNetlinkMessage::NewQueueDiscipline(message), NLM_F_CREATE | NLM_F_REPLACE);
        doing(result, || format!("take the plug of {name} away")).map(drop)
    }

    /// What is at the root of a device.
    pub(in crate::egress) fn root(&mut self, index: u32, name: &str) -> Result<Root, GateError> {
        Ok(match self.qdisc(root(index), name)? {
            Some(found) if found.header.handle == HANDLE && kind(&found) == PLUG => Root::Gate,
            Some(found) if kind(&found) == NO_QUEUE => Root::NoQueue,
            // The kernel gives handles to none of its own choice.
            Some(found) if found.header.handle != TcHandle::UNSPEC => Root::Other(kind(&found).to_owned()),
            _ => Root::Default,
        })
    }

    /// What waits in a `plug`.
    pub(in crate::egress) fn held(&mut self, index: u32, name: &str) -> Result<Held, GateError> {
        let found = self.qdisc(root(index), name)?;
        let attributes = found.map(|found| found.attributes).unwrap_or_default();
        let stats = attributes.into_iter().find_map(|attribute| match attribute {
            TcAttribute::Stats2(stats) => stats.into_iter().find_map(|stats| match stats {
                TcStats2::Queue(queue) => Some(queue),
                _ => None,
            }),
            _ => None,
        });
        let Some(queue) = stats else {
            return Err(GateError::NoDevice { device: format!("{name} with a plug") });
        };
        Ok(Held { frames: queue.qlen.into(), bytes: queue.backlog.into(), dropped: queue.drops.into() })
    }

    /// The one qdisc at a place. The kernel leaves out those it has built in.
    pub(super) fn qdisc(&mut self, message: TcMessage, name: &str) -> Result<Option<TcMessage>, GateError> {
        // Without ECHO older kernels send the answer to those who listen for changes only.
        let result = self.ask(RouteNetlinkMessage::GetQueueDiscipline(message), NLM_F_ECHO);
        let replies = match result {
            // Newer kernels say EINVAL of those they have built in, older ones nothing.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => {
                return Ok(None);
            }
            other => doing(other, || format!("look at the qdiscs of {name}"))?,
        };
        Ok(replies.into_iter().find_map(|reply| match reply {
            RouteNetlinkMessage::NewQueueDiscipline(found) => Some(found),
            _ => None,
        }))
    }
}

/// Name of a qdisc or filter.
pub(super) fn kind(message: &TcMessage) -> &str {
    let mut kinds = message.attributes.iter().filter_map(|attribute| match attribute {
        TcAttribute::Kind(kind) => Some(kind.as_str()),
        _ => None,
    });
    kinds.next_back().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::Emitable;

    use super::*;

    #[test]
    fn the_options_are_the_kernels_struct() {
        let RouteNetlinkMessage::NewQueueDiscipline(message) = message(7, Action::Limit, 0x0102_0304) else {
            panic!("no request for a qdisc")
        };
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        let mut expected = Vec::new();
        for word in [0u32, 7, 0x7573_0000, 0xffff_ffff, 0] {
            expected.extend_from_slice(&word.to_ne_bytes());
        }
        for half in [9u16, 1] {
            expected.extend_from_slice(&half.to_ne_bytes());
        }
        expected.extend_from_slice(b"plug\0\0\0\0");
        for half in [12u16, 2] {
            expected.extend_from_slice(&half.to_ne_bytes());
        }
        for word in [3u32, 0x0102_0304] {
            expected.extend_from_slice(&word.to_ne_bytes());
        }
        assert_eq!(bytes, expected);
        assert_eq!(
            [Action::Buffer, Action::ReleaseOne, Action::ReleaseIndefinite].map(|a| a as i32),
            [0, 1, 2]
        );
    }
}
