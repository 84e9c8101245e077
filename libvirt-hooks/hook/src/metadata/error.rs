//! What can be wrong with an element, in the words of whoever wrote it.

/// Why an element was not accepted. It always names what would be right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MetadataError {
    /// More than is read.
    #[error("the XML has {bytes} bytes, the limit is {max}")]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// Not XML.
    #[error("the XML is malformed at byte {at}: {reason}")]
    Malformed {
        /// Where.
        at: u64,
        /// What is wrong.
        reason: String,
    },
    /// An element that does not belong there.
    #[error("<{found}> is not known in {place}; did you mean <{nearest}>?")]
    UnknownElement {
        /// As written, without prefix.
        found: String,
        /// Where it stands.
        place: String,
        /// The valid one that is written most like it.
        nearest: &'static str,
    },
    /// An attribute the element does not have.
    #[error("<{element}> has no attribute {found:?}; did you mean {nearest:?}?")]
    UnknownAttribute {
        /// The element.
        element: &'static str,
        /// As written.
        found: String,
        /// The valid one that is written most like it.
        nearest: &'static str,
    },
    /// A value the attribute cannot have.
    #[error("{attribute} of <{element}> is {found:?}; {expected}")]
    BadValue {
        /// The element.
        element: &'static str,
        /// The attribute.
        attribute: &'static str,
        /// As written.
        found: String,
        /// What would be right, nearest first.
        expected: String,
    },
    /// An attribute that must be there.
    #[error("<{element}> lacks the attribute {attribute:?}: {why}")]
    Missing {
        /// The element.
        element: &'static str,
        /// The attribute.
        attribute: &'static str,
        /// What it would say.
        why: &'static str,
    },
    /// Two that speak of the same thing.
    #[error("{what} stands there twice; leave one")]
    Twice {
        /// What.
        what: String,
    },
    /// Text where only elements belong.
    #[error("<{element}> contains text; everything is said in attributes")]
    Text {
        /// The element.
        element: &'static str,
    },
}

/// The word of `valid` that is written most like `found`. `valid` is not empty.
pub(super) fn nearest(found: &str, valid: &[&'static str]) -> &'static str {
    let found = found.rsplit(':').next().unwrap_or(found).to_lowercase();
    valid.iter().copied().min_by_key(|word| strsim::damerau_levenshtein(&found, word)).unwrap_or_default()
}

/// A [`MetadataError::BadValue`] for a value that must be one of `valid`.
pub(super) fn not_one_of(
    element: &'static str,
    attribute: &'static str,
    found: &str,
    valid: &[&'static str],
) -> MetadataError {
    let all = valid.iter().map(|word| format!("{word:?}")).collect::<Vec<_>>().join(", ");
    let expected = format!("did you mean {:?}? It is one of {all}", nearest(found, valid));
    MetadataError::BadValue { element, attribute, found: found.to_owned(), expected }
}

/// A value that is not what it should be.
pub(super) fn bad(
    element: &'static str,
    attribute: &'static str,
    found: &str,
    expected: String,
) -> MetadataError {
    MetadataError::BadValue { element, attribute, found: found.to_owned(), expected }
}
