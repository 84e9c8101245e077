//! What the agent reports beside the user's element.

use std::borrow::Cow;

use quick_xml::escape::escape;

use super::tree::Node;
use super::{MetadataError, STATE_NAMESPACE};

/// The longest text of one attribute, in bytes: it travels to every client that asks for the XML.
const MAX_TEXT: usize = 1024;

/// How a domain fares. Only what changes seldom: numbers that move with every epoch are in `understudy status`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct State {
    /// One word: `protected`, `seeding`, `degraded`, `failed`, `off`, `invalid`, ...
    pub value: String,
    /// The backup.
    pub backup: String,
    /// Owner of the guest; `None` if it has never been protected.
    pub generation: Option<u64>,
    /// Machine-readable reason of a failure.
    pub code: String,
    /// Why it is so.
    pub detail: String,
    /// What to do about it.
    pub remedy: String,
    /// The outcome of the last command.
    pub command: String,
    /// Whether the protection was begun by the element in the domain's XML, and so ends with it.
    pub by_metadata: bool,
}

impl State {
    /// The element as libvirt wants it: without a namespace of its own, which libvirt adds.
    pub fn to_xml(&self) -> String {
        let mut xml = String::from("<state");
        let generation = self.generation.map(|generation| generation.to_string()).unwrap_or_default();
        let by = if self.by_metadata { "metadata" } else { "" };
        let attributes = [
            ("value", self.value.as_str()),
            ("backup", &self.backup),
            ("generation", &generation),
            ("by", by),
            ("code", &self.code),
            ("detail", &self.detail),
            ("remedy", &self.remedy),
            ("command", &self.command),
        ];
        for (name, value) in attributes.into_iter().filter(|(_, value)| !value.is_empty()) {
            xml.push_str(&format!(" {name}='{}'", escape(printable(value).as_ref())));
        }
        xml.push_str("/>");
        xml
    }

    /// What an agent has written, if it can be read. Attributes that are not known are ignored: a newer agent may
    /// have written them.
    ///
    /// # Errors
    /// If it is no state.
    pub fn parse(xml: &str) -> Result<Self, MetadataError> {
        let node = Node::parse(xml)?;
        if node.name != "state" || !node.belongs_to(STATE_NAMESPACE) {
            let place = format!("namespace {STATE_NAMESPACE}");
            return Err(MetadataError::UnknownElement { found: node.name, place, nearest: "state" });
        }
        let text = |name| node.attribute(name).unwrap_or_default().to_owned();
        Ok(Self {
            value: text("value"),
            backup: text("backup"),
            generation: text("generation").parse().ok(),
            code: text("code"),
            detail: text("detail"),
            remedy: text("remedy"),
            command: text("command"),
            by_metadata: text("by") == "metadata",
        })
    }
}

/// The text within its bound, without characters that XML does not have.
fn printable(text: &str) -> Cow<'_, str> {
    let fine = |c: char| !c.is_control() && !matches!(c, '\u{fffe}' | '\u{ffff}');
    if text.len() <= MAX_TEXT && text.chars().all(fine) {
        return Cow::Borrowed(text);
    }
    let mut out = String::new();
    for c in text.chars() {
        if out.len() + c.len_utf8() > MAX_TEXT - 3 {
            out.push_str("...");
            break;
        }
        out.push(if fine(c) { c } else { ' ' });
    }
    Cow::Owned(out)
}
