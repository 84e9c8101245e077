//! Commands: done once, by the agent that takes the element out.

use super::error::nearest;
use super::tree::Node;
use super::{COMMAND_NAMESPACE, MetadataError};

/// Something to be done once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Run the guest on the other host.
    Failover,
}

impl Command {
    /// The element, with its namespace or without any.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(xml: &str) -> Result<Self, MetadataError> {
        let node = Node::parse(xml)?;
        if node.name != "failover" || !node.belongs_to(COMMAND_NAMESPACE) {
            let place = format!("namespace {COMMAND_NAMESPACE}");
            let nearest = nearest(&node.name, &["failover"]);
            return Err(MetadataError::UnknownElement { found: node.name, place, nearest });
        }
        if let Some((found, _)) = node.attributes.first() {
            let expected = "a failover takes no attributes".to_owned();
            return Err(MetadataError::BadValue {
                element: "failover",
                attribute: "(none)",
                found: found.clone(),
                expected,
            });
        }
        if node.text || !node.children.is_empty() {
            return Err(MetadataError::Text { element: "failover" });
        }
        Ok(Self::Failover)
    }
}
