//! A small XML tree: enough to look at libvirt's documents and to change a few places without touching the rest.

use quick_xml::escape::{escape, partial_escape, resolve_predefined_entity};
use quick_xml::events::{BytesStart, Event};
use quick_xml::{Reader, XmlVersion};

use super::XmlError;

/// The largest document read, in bytes. A domain with hundreds of devices has about 200 KB.
pub(crate) const MAX_XML_BYTES: usize = 1 << 20;
/// The deepest nesting read. libvirt's own documents stay below 15; metadata of others may be anything.
const MAX_DEPTH: usize = 64;

/// One element with everything in it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Element {
    /// With its prefix, as written.
    pub(crate) name: String,
    pub(crate) attributes: Vec<(String, String)>,
    pub(crate) children: Vec<Node>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Node {
    Element(Element),
    /// Unescaped.
    Text(String),
    Comment(String),
}

impl Element {
    pub(crate) fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    pub(crate) fn with(mut self, attribute: &str, value: &str) -> Self {
        self.attributes.push((attribute.to_owned(), value.to_owned()));
        self
    }

    /// Reads a document, within [`MAX_XML_BYTES`], and returns its root.
    pub(crate) fn parse(xml: &str) -> Result<Self, XmlError> {
        if xml.len() > MAX_XML_BYTES {
            return Err(XmlError::TooLarge { bytes: xml.len(), max: MAX_XML_BYTES });
        }
        let mut reader = Reader::from_str(xml);
        let mut open: Vec<Self> = Vec::new();
        let mut root = None;
        loop {
            let at = reader.buffer_position();
            let malformed = |reason: String| XmlError::Malformed { at, reason };
            let event = reader.read_event().map_err(|error| malformed(error.to_string()))?;
            match event {
                Event::Start(start) => {
                    if open.len() == MAX_DEPTH {
                        return Err(malformed(format!("nested deeper than {MAX_DEPTH} elements")));
                    }
                    open.push(Self::from_start(&start).map_err(malformed)?);
                }
                Event::Empty(start) => {
                    let element = Self::from_start(&start).map_err(malformed)?;
                    close(&mut open, &mut root, element).map_err(malformed)?;
                }
                Event::End(_) => {
                    let element = open.pop().ok_or_else(|| malformed("an end without a start".to_owned()))?;
                    close(&mut open, &mut root, element).map_err(malformed)?;
                }
                Event::Text(text) => add_text(&mut open, &text.xml10_content()).map_err(malformed)?,
                Event::CData(text) => add_text(&mut open, &text.xml10_content()).map_err(malformed)?,
                Event::GeneralRef(reference) => {
                    let character =
                        reference.resolve_char_ref().map_err(|error| malformed(error.to_string()))?;
                    let name = reference.xml10_content();
                    match (character, resolve_predefined_entity(&name)) {
                        (Some(character), _) => add_text(&mut open, character.encode_utf8(&mut [0; 4])),
                        (None, Some(text)) => add_text(&mut open, text),
                        (None, None) => Err(format!("unknown entity {name:?}")),
                    }
                    .map_err(malformed)?;
                }
                Event::Comment(comment) => {
                    if let Some(parent) = open.last_mut() {
                        parent.children.push(Node::Comment(comment.xml10_content().into_owned()));
                    }
                }
                Event::DocType(_) => return Err(malformed("a document type is not accepted".to_owned())),
                Event::Decl(_) | Event::PI(_) => {}
                Event::Eof => break,
            }
        }
        match (root, open.pop()) {
            (Some(root), None) => Ok(root),
            (_, Some(element)) => Err(XmlError::Malformed {
                at: reader.buffer_position(),
                reason: format!("<{}> has no end", element.name),
            }),
            (None, None) => Err(XmlError::Malformed { at: 0, reason: "there is no element".to_owned() }),
        }
    }

    fn from_start(start: &BytesStart<'_>) -> Result<Self, String> {
        let mut element = Self::new(start.name().into_inner());
        for attribute in start.attributes() {
            let attribute = attribute.map_err(|error| error.to_string())?;
            let value =
                attribute.normalized_value(XmlVersion::Implicit1_0).map_err(|error| error.to_string())?;
            element.attributes.push((attribute.key.into_inner().to_owned(), value.into_owned()));
        }
        Ok(element)
    }

    /// The document, without a declaration.
    pub(crate) fn write(&self) -> String {
        let mut out = String::new();
        self.write_to(&mut out);
        out.push('\n');
        out
    }

    fn write_to(&self, out: &mut String) {
        out.push('<');
        out.push_str(&self.name);
        for (name, value) in &self.attributes {
            out.push(' ');
            out.push_str(name);
            out.push_str("='");
            // Line ends in an attribute would be read back as spaces.
            out.push_str(&escape(value.as_str()).replace('\n', "&#10;").replace('\t', "&#9;"));
            out.push('\'');
        }
        if self.children.is_empty() {
            out.push_str("/>");
            return;
        }
        out.push('>');
        for child in &self.children {
            match child {
                Node::Element(element) => element.write_to(out),
                Node::Text(text) => out.push_str(&partial_escape(text.as_str())),
                Node::Comment(comment) => {
                    out.push_str("<!--");
                    out.push_str(comment);
                    out.push_str("-->");
                }
            }
        }
        out.push_str("</");
        out.push_str(&self.name);
        out.push('>');
    }

    pub(crate) fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// The elements directly in it.
    pub(crate) fn elements(&self) -> impl Iterator<Item = &Self> {
        self.children.iter().filter_map(|child| match child {
            Node::Element(element) => Some(element),
            _ => None,
        })
    }

    /// The elements of that name directly in it.
    pub(crate) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Self> {
        self.elements().filter(move |element| element.name == name)
    }

    /// The first element at that path of names.
    pub(crate) fn find(&self, path: &[&str]) -> Option<&Self> {
        let mut element = self;
        for name in path {
            element = element.elements().find(|child| child.name == *name)?;
        }
        Some(element)
    }

    /// The first element of that name directly in it.
    pub(crate) fn child_mut(&mut self, name: &str) -> Option<&mut Self> {
        self.elements_mut().find(|element| element.name == name)
    }

    pub(crate) fn elements_mut(&mut self) -> impl Iterator<Item = &mut Self> {
        self.children.iter_mut().filter_map(|child| match child {
            Node::Element(element) => Some(element),
            _ => None,
        })
    }

    /// Removes the elements directly in it that `unwanted` picks, each with the blank text in front of it.
    pub(crate) fn remove(&mut self, mut unwanted: impl FnMut(&Self) -> bool) {
        let mut kept: Vec<Node> = Vec::with_capacity(self.children.len());
        for child in std::mem::take(&mut self.children) {
            if matches!(&child, Node::Element(element) if unwanted(element)) {
                if matches!(kept.last(), Some(Node::Text(text)) if text.trim().is_empty()) {
                    kept.pop();
                }
            } else {
                kept.push(child);
            }
        }
        self.children = kept;
    }

    /// Its text, without surrounding blanks.
    pub(crate) fn text(&self) -> String {
        let texts = self.children.iter().filter_map(|child| match child {
            Node::Text(text) => Some(text.as_str()),
            _ => None,
        });
        texts.collect::<String>().trim().to_owned()
    }
}

/// Puts a finished element into its parent, or makes it the root.
fn close(open: &mut [Element], root: &mut Option<Element>, element: Element) -> Result<(), String> {
    match (open.last_mut(), root.is_some()) {
        (Some(parent), _) => parent.children.push(Node::Element(element)),
        (None, false) => *root = Some(element),
        (None, true) => return Err(format!("<{}> after the end of the document", element.name)),
    }
    Ok(())
}

fn add_text(open: &mut [Element], text: &str) -> Result<(), String> {
    let Some(parent) = open.last_mut() else {
        let blank = text.trim().is_empty();
        return if blank { Ok(()) } else { Err("text outside of the document".to_owned()) };
    };
    // Text around an entity comes in pieces.
    if let Some(Node::Text(before)) = parent.children.last_mut() {
        before.push_str(text);
    } else {
        parent.children.push(Node::Text(text.to_owned()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_it_does_not_know_survives() {
        let xml =
            "<a x='1 &amp; 2&#10;3' y=\"it's\"><!-- note --><b:c xmlns:b='u'>1 &lt; 2 &#x41;</b:c>\n<d/></a>";
        let tree = Element::parse(xml).unwrap();
        assert_eq!(tree.attribute("x"), Some("1 & 2\n3"));
        assert_eq!(tree.find(&["b:c"]).unwrap().text(), "1 < 2 A");
        let written = tree.write();
        assert_eq!(Element::parse(&written).unwrap(), tree);
        assert_eq!(
            written,
            "<a x='1 &amp; 2&#10;3' y='it&apos;s'><!-- note --><b:c xmlns:b='u'>1 &lt; 2 A</b:c>\n<d/></a>\n"
        );
    }

    #[test]
    fn malformed_documents_are_errors() {
        for xml in [
            "",
            "  ",
            "text",
            "<a>",
            "<a></b>",
            "</a>",
            "<a/><b/>",
            "<a/>text",
            "<a b='1' b='2'/>",
            "<a b=1/>",
            "<a>&unknown;</a>",
            "<a b='&unknown;'/>",
            "<!DOCTYPE a [<!ENTITY e 'x'>]><a>&e;</a>",
            "<a>&#0;</a>",
            "<a><!-- ",
        ] {
            assert!(matches!(Element::parse(xml), Err(XmlError::Malformed { .. })), "{xml:?}");
        }
    }

    #[test]
    fn size_and_depth_are_bounded() {
        let deep = |depth: usize| "<a>".repeat(depth) + &"</a>".repeat(depth);
        assert!(Element::parse(&deep(MAX_DEPTH)).is_ok());
        assert!(Element::parse(&deep(MAX_DEPTH + 1)).unwrap_err().to_string().contains("64"));
        let large = format!("<a>{}</a>", " ".repeat(MAX_XML_BYTES));
        assert!(matches!(Element::parse(&large), Err(XmlError::TooLarge { .. })));
    }

    fn element() -> impl Strategy<Value = Element> {
        let name = "[a-z][a-z0-9:_-]{0,6}";
        let text = "[ -~\n\t\u{e9}\u{20ac}]{1,12}";
        let attributes = prop::collection::btree_map(name, "[ -~\n\t\u{e9}]{0,8}", 0..3)
            .prop_map(|map| map.into_iter().collect::<Vec<_>>());
        let leaf = (name, attributes.clone()).prop_map(|(name, attributes)| Element {
            name,
            attributes,
            children: Vec::new(),
        });
        leaf.prop_recursive(4, 32, 4, move |inner| {
            let node = prop_oneof![inner.prop_map(Node::Element), text.prop_map(Node::Text)];
            (name, attributes.clone(), prop::collection::vec(node, 0..4)).prop_map(
                |(name, attributes, children)| {
                    // Neighbouring texts are one text.
                    let mut element = Element { name, attributes, children: Vec::new() };
                    for child in children {
                        match (child, element.children.last_mut()) {
                            (Node::Text(text), Some(Node::Text(before))) => before.push_str(&text),
                            (child, _) => element.children.push(child),
                        }
                    }
                    element
                },
            )
        })
    }

    proptest! {
        #[test]
        fn written_documents_read_back_the_same(element in element()) {
            prop_assert_eq!(Element::parse(&element.write()).unwrap(), element);
        }

        #[test]
        fn any_text_is_read_or_refused(text in "[<>/a='\"&;#x!\\[\\]\\- ]{0,40}") {
            let _ = Element::parse(&text);
        }
    }
}
