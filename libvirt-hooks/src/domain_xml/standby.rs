//! The XML of a standby, made from that of the guest it stands by for.

use understudy_hook::metadata::{COMMAND_NAMESPACE, STATE_NAMESPACE};

use super::XmlError;
use super::tree::{Element, Node};

/// libvirt's namespace for arguments that go to QEMU past it.
const QEMU_NAMESPACE: &str = "http://libvirt.org/schemas/domain/qemu/1.0";

/// Machine types that change their meaning from one QEMU to the next although they look like pinned ones.
const UNPINNED_WITH_DASH: [&str; 3] = ["ubuntu-q35", "s390-ccw-virtio", "x-remote"];

/// Our namespace in a domain's `<metadata>`. An element of it stands in a standby with shared memory, and keeps
/// the `<memoryBacking>` that the guest's own XML has.
const METADATA_NAMESPACE: &str = "urn:understudy:standby:1";
const METADATA_ELEMENT: &str = "understudy:standby";

/// Whether a machine type means the same hardware in every QEMU (`pc-q35-7.2`), and not whatever is newest
/// there (`q35`).
pub fn is_pinned_machine(machine: &str) -> bool {
    machine.contains('-') && !UNPINNED_WITH_DASH.contains(&machine)
}

/// The XML of a guest for use on another host, at the same time with the same virtual CPU.
///
/// libvirt's migratable XML has the CPU as it was asked for; what the guest really sees, libvirt settles at start
/// and writes into the live XML only. So this is `migratable` with the `<cpu>` of `live`, which libvirt checks
/// against the other host when a domain is started from it. A guest that once was a standby itself, and has taken
/// over, still has the waiting for a stream in its live XML; here it is left out.
///
/// # Errors
/// If one of the two is malformed or too large, or they are not of the same domain.
pub fn portable_xml(migratable: &str, live: &str) -> Result<String, XmlError> {
    let mut root = domain(migratable)?;
    let live = domain(live)?;
    let uuid = |root: &Element| root.find(&["uuid"]).map(Element::text);
    if uuid(&root) != uuid(&live) {
        return Err(XmlError::Unsuitable {
            what: "<uuid>",
            value: uuid(&live).unwrap_or_default(),
            reason: "the two documents are not of the same domain".to_owned(),
        });
    }
    if let Some(live) = live.find(&["cpu"]) {
        match root.child_mut("cpu") {
            Some(cpu) => *cpu = live.clone(),
            None => root.children.push(Node::Element(live.clone())),
        }
    }
    forget_standby(&mut root);
    forget_reports(&mut root);
    Ok(root.write())
}

/// The XML of a standby: `xml` (migratable, with its secrets) with QEMU waiting for an incoming stream, and without
/// what belongs to the host it came from.
///
/// Kept: everything the guest can see (machine type, addresses, MACs, devices), paths, and what happens on
/// shutdown, reboot and crash. Dropped: the domain's id, names of taps and aliases that libvirt made up, security
/// labels that it chose itself.
///
/// # Errors
/// If the XML is malformed or too large; if its machine type is an alias, because the standby's QEMU may take it
/// for other hardware; if it already waits for an incoming stream.
pub fn standby_xml(xml: &str) -> Result<String, XmlError> {
    let mut root = domain(xml)?;
    let machine = root.find(&["os", "type"]).and_then(|kind| kind.attribute("machine"));
    let machine = machine.ok_or(XmlError::Missing { what: "<os><type machine=..>" })?;
    if !is_pinned_machine(machine) {
        return Err(XmlError::Unsuitable {
            what: "the machine type",
            value: machine.to_owned(),
            reason: "it means other hardware in another QEMU; use the XML of the running domain, or define it with a \
                     versioned one such as pc-q35-7.2"
                .to_owned(),
        });
    }
    root.attributes.retain(|(name, _)| name != "id");
    root.remove(|element| element.name == "seclabel" && element.attribute("type") == Some("dynamic"));
    if let Some(devices) = root.child_mut("devices") {
        devices.elements_mut().for_each(forget_host);
    }

    let prefix = match qemu_prefix(&root) {
        Some(prefix) => prefix,
        None => {
            root.attributes.push(("xmlns:qemu".to_owned(), QEMU_NAMESPACE.to_owned()));
            "qemu".to_owned()
        }
    };
    let argument = |value: &str| Node::Element(Element::new(format!("{prefix}:arg")).with("value", value));
    let name = format!("{prefix}:commandline");
    if root.child_mut(&name).is_none() {
        root.children.push(Node::Element(Element::new(name.as_str())));
    }
    if let Some(commandline) = root.child_mut(&name) {
        if commandline.elements().any(|element| element.attribute("value") == Some("-incoming")) {
            return Err(XmlError::Unsuitable {
                what: "the QEMU command line in the XML",
                value: "-incoming".to_owned(),
                reason: "it already waits for an incoming stream; it is a standby's XML".to_owned(),
            });
        }
        commandline.children.extend([argument("-incoming"), argument("defer")]);
    }
    Ok(root.write())
}

/// The definition of a guest that has taken over: its standby's XML, or what libvirt made of it, with nothing left of
/// the waiting for a stream. Without it the next cold start would wait for ever.
///
/// # Errors
/// If the XML is malformed or too large.
pub fn clean_xml(xml: &str) -> Result<String, XmlError> {
    let mut root = domain(xml)?;
    forget_standby(&mut root);
    Ok(root.write())
}

/// The XML of a standby like [`standby_xml`] makes it, with its memory in a shared file that a process of this host
/// can map. What the guest's own XML says about the backing of memory is kept aside in the metadata, for
/// [`clean_xml`] and [`portable_xml`].
///
/// # Errors
/// Those of [`standby_xml`]; and if the guest's memory is of a kind that must not be replaced by a shared file, or
/// is not all of it: the reason is in the words of an operator.
pub fn shared_standby_xml(xml: &str) -> Result<String, XmlError> {
    let mut root = domain(&standby_xml(xml)?)?;
    may_share(&root)?;
    let mut kept = Element::new(METADATA_ELEMENT).with("xmlns:understudy", METADATA_NAMESPACE);
    let before = root.child_mut("memoryBacking").cloned();
    root.remove(|element| element.name == "memoryBacking");
    let mut backing = before.clone().unwrap_or_else(|| Element::new("memoryBacking"));
    backing.remove(|element| matches!(element.name.as_str(), "source" | "access"));
    backing.children.push(Node::Element(Element::new("source").with("type", "file")));
    backing.children.push(Node::Element(Element::new("access").with("mode", "shared")));
    root.children.push(Node::Element(backing));
    kept.children.extend(before.map(Node::Element).map(in_our_namespace));
    if root.child_mut("metadata").is_none() {
        root.children.push(Node::Element(Element::new("metadata")));
    }
    if let Some(metadata) = root.child_mut("metadata") {
        metadata.children.push(Node::Element(kept));
    }
    Ok(root.write())
}

/// libvirt accepts only elements with a namespace in metadata; those inside ours get it by prefix.
fn in_our_namespace(node: Node) -> Node {
    prefixed(node, &|name| format!("understudy:{name}"))
}

fn out_of_our_namespace(node: Node) -> Node {
    prefixed(node, &|name| name.strip_prefix("understudy:").unwrap_or(name).to_owned())
}

fn prefixed(node: Node, rename: &dyn Fn(&str) -> String) -> Node {
    match node {
        Node::Element(mut element) => {
            element.name = rename(&element.name);
            element.children = element.children.into_iter().map(|child| prefixed(child, rename)).collect();
            Node::Element(element)
        }
        other => other,
    }
}

/// Whether all memory of the guest can be a shared file of ordinary pages.
fn may_share(root: &Element) -> Result<(), XmlError> {
    let refuse = |what: &'static str, value: &str, reason: &str| {
        Err(XmlError::Unsuitable { what, value: value.to_owned(), reason: reason.to_owned() })
    };
    if root.find(&["memoryBacking", "hugepages"]).is_some() {
        return refuse("<memoryBacking>", "hugepages", "memory of huge pages has no file with a name to map");
    }
    if root.find(&["memoryBacking", "locked"]).is_some() {
        return refuse("<memoryBacking>", "locked", "it would take all of the memory a second time at once");
    }
    let mode = root.find(&["memoryBacking", "allocation"]).and_then(|a| a.attribute("mode"));
    if mode == Some("immediate") {
        return refuse("<allocation>", "immediate", "it would take all of the memory a second time at once");
    }
    let cells = root.find(&["cpu", "numa"]).into_iter().flat_map(|numa| numa.all("cell"));
    for cell in cells {
        if let Some(access) = cell.attribute("memAccess").filter(|access| *access != "shared") {
            return refuse("memAccess of a NUMA cell", access, "only shared memory can be mapped");
        }
    }
    if let Some(devices) = root.find(&["devices"]) {
        if let Some(model) = devices.all("memory").find_map(|device| device.attribute("model")) {
            return refuse("a memory device", model, "only memory that is there at boot can be shared");
        }
        if let Some(name) = devices.all("shmem").find_map(|device| device.attribute("name")) {
            return refuse("<shmem>", name, "QEMU would take its memory for the guest's own");
        }
    }
    Ok(())
}

/// Takes out what only a standby has.
fn forget_standby(root: &mut Element) {
    forget_incoming(root);
    forget_shared(root);
}

/// Takes out what an agent reported or was told of the guest where it ran; what its owner wants of it stays.
fn forget_reports(root: &mut Element) {
    let ours = |element: &Element| {
        let spoken = |uri: &str| [STATE_NAMESPACE, COMMAND_NAMESPACE].contains(&uri);
        element.attributes.iter().any(|(name, value)| name.starts_with("xmlns") && spoken(value))
    };
    if let Some(metadata) = root.child_mut("metadata") {
        metadata.remove(ours);
    }
    root.remove(|element| element.name == "metadata" && element.elements().next().is_none());
}

/// Gives the guest back the `<memoryBacking>` of its own.
fn forget_shared(root: &mut Element) {
    // libvirt may have given our namespace another prefix.
    let ours = |element: &Element| {
        element.attributes.iter().any(|(name, value)| {
            name.starts_with("xmlns:") && value == METADATA_NAMESPACE && element.name.ends_with(":standby")
        })
    };
    let Some(metadata) = root.child_mut("metadata") else { return };
    let Some(kept) = metadata.elements().find(|element| ours(element)).cloned() else { return };
    metadata.remove(ours);
    root.remove(|element| element.name == "metadata" && element.elements().next().is_none());
    root.remove(|element| element.name == "memoryBacking");
    let elements = kept.children.into_iter().filter(|child| matches!(child, Node::Element(_)));
    root.children.extend(elements.map(out_of_our_namespace));
}

/// Takes `-incoming` and its value off the QEMU command line, and everything that is empty or unused then.
fn forget_incoming(root: &mut Element) {
    let Some(prefix) = qemu_prefix(root) else { return };
    let name = format!("{prefix}:commandline");
    if let Some(commandline) = root.child_mut(&name) {
        let mut value_follows = false;
        commandline.remove(|element| {
            let incoming = element.attribute("value") == Some("-incoming");
            let ours = incoming || value_follows;
            value_follows = incoming;
            ours
        });
    }
    root.remove(|element| element.name == name && element.elements().next().is_none());
    let used = format!("{prefix}:");
    if !root.elements().any(|element| element.name.starts_with(&used)) {
        let declaration = format!("xmlns:{prefix}");
        root.attributes.retain(|(name, _)| *name != declaration);
    }
}

fn domain(xml: &str) -> Result<Element, XmlError> {
    let root = Element::parse(xml)?;
    if root.name == "domain" { Ok(root) } else { Err(XmlError::Missing { what: "<domain>" }) }
}

/// The prefix that the document has given to [`QEMU_NAMESPACE`].
fn qemu_prefix(root: &Element) -> Option<String> {
    let declared = root.attributes.iter().find(|(_, value)| value == QEMU_NAMESPACE);
    declared.and_then(|(name, _)| name.strip_prefix("xmlns:")).map(str::to_owned)
}

/// Takes out of a device what only the host it runs on gave it.
fn forget_host(device: &mut Element) {
    device.remove(|element| {
        let made_up = |attribute: &str, prefixes: &[&str]| {
            element
                .attribute(attribute)
                .is_some_and(|value| prefixes.iter().any(|prefix| value.starts_with(prefix)))
        };
        match element.name.as_str() {
            "alias" => !made_up("name", &["ua-"]),
            "target" => made_up("dev", &["vnet", "macvtap", "macvlan"]),
            _ => false,
        }
    });
}
