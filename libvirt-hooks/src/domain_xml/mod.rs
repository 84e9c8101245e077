//! What a domain's XML says, and the XML of a standby made from it.
//!
//! Everything not named here is kept or ignored: libvirt adds elements with every release.

mod facts;
mod standby;
mod tree;

use std::collections::BTreeSet;

pub use facts::{Disk, DomainFacts, Graphics, HostDevice, Interface, MemoryBacking};
pub use standby::{clean_xml, is_pinned_machine, portable_xml, shared_standby_xml, standby_xml};
use tree::Element;

/// Why a document was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum XmlError {
    /// It is larger than anything libvirt makes.
    #[error("the XML has {bytes} bytes, the limit is {max}")]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// It is not well-formed XML.
    #[error("the XML is malformed at byte {at}: {reason}")]
    Malformed {
        /// Where.
        at: u64,
        /// What is wrong.
        reason: String,
    },
    /// Something that every document of this kind has is not there.
    #[error("the XML has no {what}")]
    Missing {
        /// What, as a path of elements.
        what: &'static str,
    },
    /// It is well-formed but says something that cannot be used.
    #[error("{what} is {value:?}: {reason}")]
    Unsuitable {
        /// Which element or attribute.
        what: &'static str,
        /// Its value.
        value: String,
        /// Why that will not do, and what would.
        reason: String,
    },
}

/// Every machine type, alias or pinned, that a host's capabilities XML lists for full guests of `arch`.
///
/// # Errors
/// If it is not the XML of capabilities, or too large.
pub fn machine_types(capabilities: &str, arch: &str) -> Result<BTreeSet<String>, XmlError> {
    let root = Element::parse(capabilities)?;
    if root.name != "capabilities" {
        return Err(XmlError::Missing { what: "<capabilities>" });
    }
    let guests =
        root.all("guest").filter(|guest| guest.find(&["os_type"]).is_some_and(|os| os.text() == "hvm"));
    let arches =
        guests.flat_map(|guest| guest.all("arch")).filter(|element| element.attribute("name") == Some(arch));
    // An emulator may have machines of its own inside its <domain>.
    let machines = arches.flat_map(|arch| {
        let of_domains = arch.all("domain").flat_map(|domain| domain.all("machine"));
        arch.all("machine").chain(of_domains)
    });
    Ok(machines.map(Element::text).collect())
}

#[cfg(test)]
mod tests;
