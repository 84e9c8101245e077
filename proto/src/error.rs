//! The one error of everything that reads a peer's bytes.

/// A message, frame or field from a peer that cannot be accepted. Every variant names the field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// A field has a value outside its range or is inconsistent with another one.
    #[error("{field} is invalid: {reason}")]
    Invalid {
        /// Which field.
        field: &'static str,
        /// The value and what was expected instead.
        reason: String,
    },
    /// A required field is absent.
    #[error("{field} is missing")]
    Missing {
        /// Which field.
        field: &'static str,
    },
    /// A length or count is over its limit; nothing was allocated for it.
    #[error("{what} is {len}, the limit is {max}")]
    TooLarge {
        /// What was measured, with its unit.
        what: &'static str,
        /// The value received.
        len: u64,
        /// The limit from [`crate::limits`].
        max: u64,
    },
    /// The bytes end before the record they announce.
    #[error("{what} is truncated: {needed} bytes announced, {available} present")]
    Truncated {
        /// Which record.
        what: &'static str,
        /// Bytes the record needs.
        needed: u64,
        /// Bytes there are.
        available: u64,
    },
}

impl ProtocolError {
    /// An [`ProtocolError::Invalid`] with its reason as text.
    pub fn invalid(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid { field, reason: reason.into() }
    }

    /// `Ok(len)` if `len <= max`, [`ProtocolError::TooLarge`] otherwise.
    pub fn check_len(what: &'static str, len: u64, max: u64) -> Result<u64, Self> {
        if len > max { Err(Self::TooLarge { what, len, max }) } else { Ok(len) }
    }
}
