//! The element that switches protection on.

use std::collections::BTreeSet;
use std::time::Duration;

use super::error::{bad, nearest, not_one_of};
#[cfg(test)]
use super::policy;
use super::policy::Policy;
use super::tree::Node;
use super::{MetadataError, PROTECT_NAMESPACE};

/// Shortest epoch that can be asked for.
pub const EPOCH_MIN: Duration = Duration::from_millis(5);

/// Longest epoch that can be asked for.
pub const EPOCH_MAX: Duration = Duration::from_secs(60);

pub(super) const PROTECT: &str = "protect";
const ATTRIBUTES: &[&str] = &[
    "enabled",
    "backup",
    "epoch",
    "required",
    "insecure",
    "output",
    "on-lost-backup",
    "on-qemu-crash",
    "spares",
];
const CHILDREN: &[&str] = &["disk", "nic"];
const YES_NO: &[&str] = &["yes", "no"];

/// What a user wants of a domain.
///
/// ```xml
/// <understudy:protect xmlns:understudy='urn:understudy:domain:1' enabled='yes' backup='hostb' epoch='25ms'/>
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Protect {
    /// Whether it is to be protected at all.
    pub enabled: bool,
    /// The backup, as `HOST` or `HOST:PORT`; empty only if not enabled.
    pub backup: String,
    /// Length of an epoch; `None` leaves it to the agent.
    pub epoch: Option<Epoch>,
    /// The domain is not to be started where it cannot be protected.
    pub required: bool,
    /// Replication without TLS is allowed.
    pub insecure: bool,
    /// What becomes of the guest's network output.
    pub output: Output,
    /// What is to be done on failures; `None`: nothing is said of it.
    pub policy: Option<Policy>,
    /// Disks that have a policy of their own.
    pub disks: Vec<DiskPolicy>,
    /// Network cards that have a policy of their own.
    pub nics: Vec<NicPolicy>,
}

/// How long an epoch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Epoch {
    /// As long as is found to be best while epochs run.
    Auto,
    /// Always so long.
    Fixed(Duration),
}

/// What becomes of network output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Output {
    /// It waits until the epoch it belongs to is committed.
    #[default]
    Gated,
    /// It leaves as it comes.
    Ungated,
}

/// A disk with a policy of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskPolicy {
    /// As in `<target dev='vda'/>`.
    pub target: String,
    /// `buffer`: writes are replicated with the epoch. `ignore`: they are not.
    pub replicated: bool,
}

/// A network card with a policy of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NicPolicy {
    /// As in `<mac address='..'/>`, in lower case.
    pub mac: String,
    /// `gate` or `open`.
    pub output: Output,
}

impl Protect {
    /// The element in the XML of a domain, if there is one.
    ///
    /// # Errors
    /// What is wrong with the document or the element.
    pub fn in_domain(xml: &str) -> Result<Option<Self>, MetadataError> {
        let root = Node::parse(xml)?;
        if root.name != "domain" {
            let place = "a document that should be a domain's".to_owned();
            return Err(MetadataError::UnknownElement { found: root.name, place, nearest: "domain" });
        }
        let mut elements = root.in_metadata(PROTECT_NAMESPACE);
        let Some(first) = elements.next() else { return Ok(None) };
        if elements.next().is_some() {
            return Err(MetadataError::Twice { what: format!("an element of {PROTECT_NAMESPACE}") });
        }
        Self::read(first).map(Some)
    }

    /// The element alone, as `virsh metadata` gives and takes it: with its namespace or without any.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(xml: &str) -> Result<Self, MetadataError> {
        Self::read(&Node::parse(xml)?)
    }

    fn read(node: &Node) -> Result<Self, MetadataError> {
        if node.name != PROTECT || !node.belongs_to(PROTECT_NAMESPACE) {
            let place = format!("namespace {PROTECT_NAMESPACE}");
            return Err(MetadataError::UnknownElement { found: node.name.clone(), place, nearest: PROTECT });
        }
        known(node, PROTECT, ATTRIBUTES)?;
        let why = "say 'yes' or 'no'";
        let enabled = node.attribute("enabled").ok_or(MetadataError::Missing {
            element: PROTECT,
            attribute: "enabled",
            why,
        })?;
        let enabled = yes_no(PROTECT, "enabled", enabled)?;
        let flag =
            |name: &'static str| node.attribute(name).map_or(Ok(false), |value| yes_no(PROTECT, name, value));
        let mut wanted = Self {
            enabled,
            backup: node.attribute("backup").map_or(Ok(String::new()), backup)?,
            epoch: node.attribute("epoch").map(epoch).transpose()?,
            required: flag("required")?,
            insecure: flag("insecure")?,
            output: match node.attribute("output") {
                None | Some("gated") => Output::Gated,
                Some("ungated") => Output::Ungated,
                Some(other) => return Err(not_one_of(PROTECT, "output", other, &["gated", "ungated"])),
            },
            policy: Policy::read(node)?,
            disks: Vec::new(),
            nics: Vec::new(),
        };
        if enabled && wanted.backup.is_empty() {
            let why = "the host that is to hold the copy";
            return Err(MetadataError::Missing { element: PROTECT, attribute: "backup", why });
        }
        wanted.read_children(node)?;
        Ok(wanted)
    }

    fn read_children(&mut self, node: &Node) -> Result<(), MetadataError> {
        let mut seen = BTreeSet::new();
        for child in &node.children {
            let name = child.name.as_str();
            if !child.belongs_to(PROTECT_NAMESPACE) || !CHILDREN.contains(&name) {
                return Err(MetadataError::UnknownElement {
                    found: name.to_owned(),
                    place: format!("<{PROTECT}>"),
                    nearest: nearest(name, CHILDREN),
                });
            }
            let key = if name == "disk" { self.read_disk(child)? } else { self.read_nic(child)? };
            let what = format!("<{name}> for {key}");
            if !seen.insert(what.clone()) {
                return Err(MetadataError::Twice { what });
            }
        }
        Ok(())
    }

    fn read_disk(&mut self, node: &Node) -> Result<String, MetadataError> {
        known(node, "disk", &["target", "policy"])?;
        empty(node, "disk")?;
        let target = needed(node, "disk", "target", "the disk's target, for example 'vda'")?;
        if target.is_empty() || !target.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            let expected = "give what <target dev=.../> of the disk says, for example 'vda'".to_owned();
            return Err(bad("disk", "target", &target, expected));
        }
        let replicated = match needed(node, "disk", "policy", "'buffer' or 'ignore'")?.as_str() {
            "buffer" => true,
            "ignore" => false,
            other => return Err(not_one_of("disk", "policy", other, &["buffer", "ignore"])),
        };
        self.disks.push(DiskPolicy { target: target.clone(), replicated });
        Ok(target)
    }

    fn read_nic(&mut self, node: &Node) -> Result<String, MetadataError> {
        known(node, "nic", &["mac", "policy"])?;
        empty(node, "nic")?;
        let mac = needed(node, "nic", "mac", "the card's address")?.to_lowercase();
        let parts: Vec<_> = mac.split(':').collect();
        let is_byte = |part: &&str| part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
        if parts.len() != 6 || !parts.iter().all(is_byte) {
            let expected = "give six bytes in hexadecimal, for example '52:54:00:12:34:56'".to_owned();
            return Err(bad("nic", "mac", &mac, expected));
        }
        let output = match needed(node, "nic", "policy", "'gate' or 'open'")?.as_str() {
            "gate" => Output::Gated,
            "open" => Output::Ungated,
            other => return Err(not_one_of("nic", "policy", other, &["gate", "open"])),
        };
        self.nics.push(NicPolicy { mac: mac.clone(), output });
        Ok(mac)
    }
}

/// Whether the XML of a domain asks not to be started unprotected, whatever else may be wrong with the element: a
/// mistake in another attribute must not start a guest that its owner wants protected.
pub fn asks_to_be_required(xml: &str) -> bool {
    let Ok(root) = Node::parse(xml) else { return false };
    let says = |node: &Node, name: &str| node.attribute(name) == Some("yes");
    root.in_metadata(PROTECT_NAMESPACE)
        .any(|element| says(element, "required") && element.attribute("enabled") != Some("no"))
}

fn known(node: &Node, element: &'static str, attributes: &[&'static str]) -> Result<(), MetadataError> {
    if let Some((found, _)) = node.attributes.iter().find(|(name, _)| !attributes.contains(&name.as_str())) {
        let nearest = nearest(found, attributes);
        return Err(MetadataError::UnknownAttribute { element, found: found.clone(), nearest });
    }
    if node.text { Err(MetadataError::Text { element }) } else { Ok(()) }
}

fn empty(node: &Node, element: &'static str) -> Result<(), MetadataError> {
    match node.children.first() {
        None => Ok(()),
        Some(child) => Err(MetadataError::UnknownElement {
            found: child.name.clone(),
            place: format!("<{element}>"),
            nearest: nearest(&child.name, CHILDREN),
        }),
    }
}

fn needed(
    node: &Node,
    element: &'static str,
    attribute: &'static str,
    why: &'static str,
) -> Result<String, MetadataError> {
    let value = node.attribute(attribute).map(str::to_owned);
    value.ok_or(MetadataError::Missing { element, attribute, why })
}

fn yes_no(element: &'static str, attribute: &'static str, value: &str) -> Result<bool, MetadataError> {
    match value {
        "yes" => Ok(true),
        "no" => Ok(false),
        other => Err(not_one_of(element, attribute, other, YES_NO)),
    }
}

/// The longest name of a host there is (DNS), and a port.
const MAX_BACKUP: usize = 253 + 6;

pub(super) fn backup(value: &str) -> Result<String, MetadataError> {
    let is_fine = |byte: u8| byte.is_ascii_alphanumeric() || b".-_:[]%".contains(&byte);
    if value.is_empty() || value.len() > MAX_BACKUP || !value.bytes().all(is_fine) {
        let expected = "give HOST, HOST:PORT, an address, or [ADDRESS]:PORT".to_owned();
        return Err(bad(PROTECT, "backup", value, expected));
    }
    Ok(value.to_owned())
}

fn epoch(value: &str) -> Result<Epoch, MetadataError> {
    if value == "auto" {
        return Ok(Epoch::Auto);
    }
    let number = |text: &str, unit: u64| text.parse::<u64>().ok().and_then(|n| n.checked_mul(unit));
    let millis = match (value.strip_suffix("ms"), value.strip_suffix('s')) {
        (Some(text), _) => number(text, 1),
        (None, Some(text)) => number(text, 1000),
        (None, None) => None,
    };
    match millis.map(Duration::from_millis) {
        Some(epoch) if (EPOCH_MIN..=EPOCH_MAX).contains(&epoch) => Ok(Epoch::Fixed(epoch)),
        _ => {
            let (min, max) = (EPOCH_MIN.as_millis(), EPOCH_MAX.as_secs());
            let unit = if value.bytes().all(|byte| byte.is_ascii_digit()) && !value.is_empty() {
                format!("did you mean \"{value}ms\"? ")
            } else {
                String::new()
            };
            let expected = format!("{unit}It is \"auto\" or a time from \"{min}ms\" to \"{max}s\"");
            Err(bad(PROTECT, "epoch", value, expected))
        }
    }
}

/// Every word of the grammar, for the test that compares it with the schema.
#[cfg(test)]
pub(super) fn words() -> impl Iterator<Item = &'static str> {
    let values =
        ["yes", "no", "gated", "ungated", "buffer", "ignore", "gate", "open", "auto", "target", "mac"];
    ATTRIBUTES.iter().chain(CHILDREN).copied().chain([PROTECT, "policy"]).chain(values).chain(policy::words())
}
