//! The redirect: everything that a tap takes in from the guest goes to the gate's device, whatever its ethertype.

use netlink_packet_core::{NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionGeneric, TcActionMirror, TcActionMirrorOption, TcActionOption,
    TcActionType, TcAttribute, TcFilterMatchAll, TcFilterMatchAllOption, TcHandle, TcMessage, TcMirror,
    TcMirrorActionType, TcOption,
};

use super::plug::kind;
use super::{Route, doing};
use crate::egress::GateError;

/// `ETH_P_ALL` of linux/if_ether.h.
const ETH_P_ALL: u16 = 3;

/// Where filters of what comes in are attached, with the qdiscs `ingress` and `clsact` alike.
const INCOMING: TcHandle = TcHandle { major: 0xffff, minor: TcHandle::MIN_INGRESS };

/// The qdisc the redirect is in. Not `ingress`: Open vSwitch takes that one away from its ports whenever any device of
/// the host changes, by that name.
const PLACE: &str = "clsact";

/// What a tap does with what comes in from the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::egress) enum Incoming {
    /// Takes it as it is.
    Plain,
    /// The qdisc of this kind is there and does nothing yet.
    Idle(String),
    /// Redirects everything to this device; 0 if that was deleted since, and nothing arrives anywhere.
    Redirected(u32),
    /// Something else, in words.
    Other(String),
}

fn incoming_qdisc(index: u32) -> TcMessage {
    let mut message = TcMessage::with_index(index.cast_signed());
    message.header.parent = TcHandle::INGRESS;
    message
}

fn filter(index: u32) -> TcMessage {
    let mut message = TcMessage::with_index(index.cast_signed());
    message.header.parent = INCOMING;
    message
}

/// Priority 1 and this protocol, as `tcm_info` has them.
fn first_of(ethertype: u16) -> u32 {
    (1 << 16) | u32::from(ethertype.to_be())
}

/// The same with every protocol.
fn first_of_all() -> u32 {
    first_of(ETH_P_ALL)
}

fn redirect(index: u32, to: u32) -> TcMessage {
    let mut mirror = TcMirror::default();
    mirror.generic = TcActionGeneric::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))]),
    ];
    let mut message = filter(index);
    message.header.info = first_of_all();
    message.attributes = vec![
        TcAttribute::Kind(TcFilterMatchAll::KIND.to_owned()),
        TcAttribute::Options(vec![TcOption::MatchAll(TcFilterMatchAllOption::Action(vec![action]))]),
    ];
    message
}

/// The device a filter sends everything to, if that is what it does.
fn redirects_to(message: &TcMessage) -> Option<u32> {
    let options = message.attributes.iter().filter_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    });
    let actions = options.flatten().filter_map(|option| match option {
        TcOption::MatchAll(TcFilterMatchAllOption::Action(actions)) => Some(actions),
        _ => None,
    });
    let options =
        actions.flatten().flat_map(|action| &action.attributes).filter_map(|attribute| match attribute {
            TcActionAttribute::Options(options) => Some(options),
            _ => None,
        });
    options.flatten().find_map(|option| match option {
        TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))
            if mirror.eaction == TcMirrorActionType::EgressRedir =>
        {
            Some(mirror.ifindex)
        }
        _ => None,
    })
}

impl Route {
    /// What is done with what comes in from the guest.
    pub(in crate::egress) fn incoming(&mut self, index: u32, name: &str) -> Result<Incoming, GateError> {
        let Some(qdisc) = self.qdisc(incoming_qdisc(index), name)? else { return Ok(Incoming::Plain) };
        let result = self.ask(RouteNetlinkMessage::GetTrafficFilter(filter(index)), NLM_F_DUMP);
        let replies = doing(result, || format!("look at the filters of {name}"))?;
        let filters: Vec<TcMessage> = replies
            .into_iter()
            .filter_map(|reply| match reply {
                RouteNetlinkMessage::NewTrafficFilter(found) => Some(found),
                _ => None,
            })
            .collect();
        let target = filters.iter().find_map(redirects_to);
        // A filter is reported once for itself and once for every part it has.
        let alien = filters.iter().find(|found| found.header.info != first_of_all());
        Ok(match (target, alien.or(filters.first())) {
            (_, None) => Incoming::Idle(kind(&qdisc).to_owned()),
            (Some(target), _) if alien.is_none() => Incoming::Redirected(target),
            (_, Some(other)) => {
                Incoming::Other(format!("a {} filter in its {} qdisc", kind(other), kind(&qdisc)))
            }
        })
    }

    /// Makes the place for [`Route::add_redirect`].
    pub(in crate::egress) fn add_ingress(&mut self, index: u32, name: &str) -> Result<(), GateError> {
        let mut message = incoming_qdisc(index);
        message.header.handle = TcHandle { major: 0xffff, minor: 0 };
        message.attributes.push(TcAttribute::Kind(PLACE.to_owned()));
        let result = self.ask(RouteNetlinkMessage::NewQueueDiscipline(message), NLM_F_CREATE | NLM_F_EXCL);
        doing(result, || format!("make a {PLACE} qdisc on {name}")).map(drop)
    }

    /// Sends everything that comes in from the guest to the device `to`.
    pub(in crate::egress) fn add_redirect(
        &mut self,
        index: u32,
        name: &str,
        to: u32,
    ) -> Result<(), GateError> {
        let message = RouteNetlinkMessage::NewTrafficFilter(redirect(index, to));
        let result = self.ask(message, NLM_F_CREATE | NLM_F_EXCL);
        doing(result, || format!("redirect what comes from {name}")).map(drop)
    }

    /// Test hook: redirects IPv4 only, where everything was redirected.
    #[cfg(feature = "test-hooks")]
    pub(in crate::egress) fn redirect_ipv4_only(
        &mut self,
        index: u32,
        name: &str,
        to: u32,
    ) -> Result<(), GateError> {
        const ETH_P_IP: u16 = 0x0800;
        self.delete_ingress(index, name)?;
        self.add_ingress(index, name)?;
        let mut message = redirect(index, to);
        message.header.info = first_of(ETH_P_IP);
        let result = self.ask(RouteNetlinkMessage::NewTrafficFilter(message), NLM_F_CREATE | NLM_F_EXCL);
        doing(result, || format!("redirect IPv4 that comes from {name}")).map(drop)
    }

    /// Takes qdisc and redirect away: what comes from the guest goes its usual way.
    pub(in crate::egress) fn delete_ingress(&mut self, index: u32, name: &str) -> Result<(), GateError> {
        let result = self.ask(RouteNetlinkMessage::DelQueueDiscipline(incoming_qdisc(index)), 0);
        doing(result, || format!("take the redirect of {name} away")).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_redirect_takes_every_protocol_and_is_known_again() {
        let message = redirect(3, 9);
        assert_eq!(message.header.info.to_ne_bytes()[..2], ETH_P_ALL.to_be_bytes());
        assert_eq!(redirects_to(&message), Some(9));
        assert_eq!(redirects_to(&filter(3)), None);
    }
}
