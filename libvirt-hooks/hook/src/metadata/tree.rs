//! A small tree of elements with their namespaces resolved. Prefixes are the writer's own affair.

use quick_xml::XmlVersion;
use quick_xml::events::{BytesStart, Event};
use quick_xml::name::{Namespace, ResolveResult};
use quick_xml::reader::NsReader;

use super::{MAX_XML_BYTES, MetadataError};

/// The deepest nesting read. libvirt's own documents stay below 15; metadata of others may be anything.
const MAX_DEPTH: usize = 64;

/// One element.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) namespace: Option<String>,
    /// Without prefix.
    pub(super) name: String,
    /// Without declarations of namespaces; a prefix is part of the name.
    pub(super) attributes: Vec<(String, String)>,
    pub(super) children: Vec<Node>,
    /// Whether it contains text other than blanks.
    pub(super) text: bool,
}

impl Node {
    /// Reads a document and returns its root.
    pub(super) fn parse(xml: &str) -> Result<Self, MetadataError> {
        if xml.len() > MAX_XML_BYTES {
            return Err(MetadataError::TooLarge { bytes: xml.len(), max: MAX_XML_BYTES });
        }
        let mut reader = NsReader::from_str(xml);
        reader.config_mut().expand_empty_elements = true;
        let mut open: Vec<Self> = Vec::new();
        let mut root = None;
        loop {
            let at = reader.buffer_position();
            let malformed = |reason: String| MetadataError::Malformed { at, reason };
            let (namespace, event) =
                reader.read_resolved_event().map_err(|error| malformed(error.to_string()))?;
            match event {
                Event::Start(start) => {
                    if open.len() == MAX_DEPTH {
                        return Err(malformed(format!("nested deeper than {MAX_DEPTH} elements")));
                    }
                    let namespace = match namespace {
                        ResolveResult::Bound(Namespace(uri)) => Some(uri.to_owned()),
                        ResolveResult::Unbound => None,
                        ResolveResult::Unknown(prefix) => {
                            return Err(malformed(format!("the prefix {prefix:?} is not declared")));
                        }
                    };
                    open.push(Self::from_start(namespace, &start).map_err(malformed)?);
                }
                Event::End(_) => {
                    let element = open.pop().ok_or_else(|| malformed("an end without a start".to_owned()))?;
                    match (open.last_mut(), &root) {
                        (Some(parent), _) => parent.children.push(element),
                        (None, None) => root = Some(element),
                        (None, Some(_)) => {
                            return Err(malformed("a second element after the end".to_owned()));
                        }
                    }
                }
                Event::Text(text) => {
                    if !text.xml10_content().trim().is_empty() {
                        let parent = open.last_mut().ok_or_else(|| malformed("text outside".to_owned()))?;
                        parent.text = true;
                    }
                }
                Event::CData(_) | Event::GeneralRef(_) => {
                    let parent = open.last_mut().ok_or_else(|| malformed("text outside".to_owned()))?;
                    parent.text = true;
                }
                Event::DocType(_) => return Err(malformed("a document type is not accepted".to_owned())),
                Event::Empty(_) | Event::Comment(_) | Event::Decl(_) | Event::PI(_) => {}
                Event::Eof => break,
            }
        }
        let at = reader.buffer_position();
        match (root, open.pop()) {
            (Some(root), None) => Ok(root),
            (_, Some(element)) => {
                Err(MetadataError::Malformed { at, reason: format!("<{}> has no end", element.name) })
            }
            (None, None) => Err(MetadataError::Malformed { at, reason: "there is no element".to_owned() }),
        }
    }

    fn from_start(namespace: Option<String>, start: &BytesStart<'_>) -> Result<Self, String> {
        let name = start.local_name().as_ref().to_owned();
        let mut element = Self { namespace, name, ..Self::default() };
        for attribute in start.attributes() {
            let attribute = attribute.map_err(|error| error.to_string())?;
            let key = attribute.key.into_inner();
            if key == "xmlns" || key.starts_with("xmlns:") {
                continue;
            }
            let value =
                attribute.normalized_value(XmlVersion::Implicit1_0).map_err(|error| error.to_string())?;
            element.attributes.push((key.to_owned(), value.into_owned()));
        }
        Ok(element)
    }

    pub(super) fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// The elements of `namespace` in `<metadata>` of a domain's XML.
    pub(super) fn in_metadata<'a>(&'a self, namespace: &'a str) -> impl Iterator<Item = &'a Self> {
        let metadata = self.children.iter().filter(|child| child.name == "metadata");
        let inside = metadata.flat_map(|metadata| &metadata.children);
        inside.filter(move |element| element.namespace.as_deref() == Some(namespace))
    }

    /// Whether it belongs to `namespace`. libvirt takes the namespace off an element that it is asked for by its URI.
    pub(super) fn belongs_to(&self, namespace: &str) -> bool {
        self.namespace.as_deref().is_none_or(|own| own == namespace)
    }
}
