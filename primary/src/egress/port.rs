//! Which network devices of a host a guest sends through, by its domain's XML.

use understudy_libvirt::domain_xml::{DomainFacts, Interface};

/// Longest name of a network device.
const NAME_BYTES: usize = 15;

/// What the gate's own devices are called.
const PREFIX: &str = "usg-";

/// A network device of this host that a guest sends through.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Port {
    /// The tap or macvtap.
    pub device: String,
}

/// Why an interface cannot be gated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortRefusal {
    /// In words.
    pub reason: String,
    /// What to do about it.
    pub remedy: String,
}

/// The devices a running guest sends through.
///
/// # Errors
/// A refusal for every interface whose frames pass no queue of this host.
pub fn ports(facts: &DomainFacts) -> Result<Vec<Port>, Vec<PortRefusal>> {
    let mut found = Vec::new();
    let mut refusals = Vec::new();
    for interface in &facts.interfaces {
        match port(interface) {
            Ok(port) => found.push(port),
            Err(why) => {
                let which = interface.mac.as_deref().unwrap_or("without a MAC");
                refusals.push(PortRefusal {
                    reason: format!(
                        "what network card {which} of domain {} sends cannot be held back: {why}",
                        facts.name
                    ),
                    remedy: format!(
                        "make it one of type 'bridge', 'network' or 'direct' with `virsh edit {}`, or give --ungated to \
                         protect the guest without output commit: after a failover clients may have seen what the guest \
                         never said",
                        facts.name
                    ),
                });
            }
        }
    }
    if refusals.is_empty() { Ok(found) } else { Err(refusals) }
}

/// The devices that vhost-net serves, as far as the domain's XML tells: libvirt has it do so wherever it can and was not told
/// otherwise.
pub fn by_vhost(facts: &DomainFacts) -> Vec<&str> {
    let virtio = |interface: &&Interface| {
        interface.model.as_deref().is_some_and(|model| model.starts_with("virtio"))
            && interface.driver.as_deref() != Some("qemu")
    };
    facts.interfaces.iter().filter(virtio).filter_map(|interface| interface.target.as_deref()).collect()
}

fn port(interface: &Interface) -> Result<Port, String> {
    match interface.kind.as_str() {
        "bridge" | "network" | "ethernet" | "direct" => {}
        "user" => return Err("QEMU itself, or passt, makes its connections (type 'user')".to_owned()),
        "vhostuser" => return Err("another process takes its frames (type 'vhostuser')".to_owned()),
        "hostdev" | "vdpa" => {
            return Err(format!("it is a device of the host passed through (type '{}')", interface.kind));
        }
        other => return Err(format!("its frames pass no network device of this host (type '{other}')")),
    }
    match interface.target.as_deref() {
        Some(device) if !device.is_empty() && device.len() <= NAME_BYTES => {
            Ok(Port { device: device.to_owned() })
        }
        Some(device) => Err(format!("{device:?} is no name of a network device")),
        None => Err("libvirt names no network device of this host for it".to_owned()),
    }
}

/// Name of the ifb that holds what comes from `tap`: the same in every run of the agent.
pub fn gate_device(tap: &str) -> String {
    let plain = format!("{PREFIX}{tap}");
    if plain.len() <= NAME_BYTES { plain } else { format!("{PREFIX}{:08x}", crc32fast::hash(tap.as_bytes())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(kind: &str, target: Option<&str>) -> DomainFacts {
        let interface =
            Interface { kind: kind.into(), target: target.map(Into::into), ..Interface::default() };
        DomainFacts { name: "web".into(), interfaces: vec![interface], ..DomainFacts::default() }
    }

    #[test]
    fn vhost_serves_virtio_unless_told_otherwise() {
        let with = |model: Option<&str>, driver: Option<&str>| {
            let mut facts = facts("bridge", Some("vnet3"));
            facts.interfaces[0].model = model.map(Into::into);
            facts.interfaces[0].driver = driver.map(Into::into);
            !by_vhost(&facts).is_empty()
        };
        assert!(with(Some("virtio"), None) && with(Some("virtio-transitional"), Some("vhost")));
        assert!(!with(Some("virtio"), Some("qemu")) && !with(Some("e1000"), None) && !with(None, None));
    }

    #[test]
    fn what_passes_no_queue_is_refused_with_its_reason() {
        for kind in ["bridge", "network", "ethernet", "direct"] {
            assert_eq!(ports(&facts(kind, Some("vnet3"))).unwrap(), [Port { device: "vnet3".into() }]);
        }
        for kind in ["user", "vhostuser", "hostdev", "vdpa", "udp", "mcast", ""] {
            let refused = ports(&facts(kind, Some("vnet3"))).unwrap_err();
            assert!(refused[0].reason.contains(&format!("'{kind}'")), "{refused:?}");
            assert!(refused[0].remedy.contains("--ungated"));
        }
        assert!(ports(&facts("bridge", None)).is_err());
        assert!(ports(&facts("bridge", Some("a-name-much-too-long"))).is_err());
        assert_eq!(ports(&DomainFacts::default()).unwrap(), []);
    }

    #[test]
    fn gate_devices_have_short_names_of_their_own() {
        assert_eq!(gate_device("vnet12"), "usg-vnet12");
        let long = gate_device("tap-of-a-guest1");
        assert!(long.len() <= NAME_BYTES && long.starts_with(PREFIX), "{long}");
        assert_ne!(long, gate_device("tap-of-a-guest2"));
        assert_eq!(long, gate_device("tap-of-a-guest1"));
    }
}
