//! The error of every libvirt call.

use virt::error::{ErrorDomain, ErrorNumber};

/// Why something asked of libvirt was not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LibvirtError {
    /// libvirt refused or failed.
    #[error("cannot {action}: {message}")]
    Refused {
        /// What was asked, as an infinitive.
        action: String,
        /// libvirt's own words.
        message: String,
    },
    /// There is no such domain (any more).
    #[error("cannot {action}: there is no such domain: {message}; `virsh list --all` shows what there is")]
    NoDomain {
        /// What was asked, as an infinitive.
        action: String,
        /// libvirt's own words.
        message: String,
    },
    /// The libvirt daemon cannot be reached, or the connection to it has broken.
    #[error("cannot {action}: libvirt is not reachable: {message}; check that its daemon runs")]
    Unreachable {
        /// What was asked, as an infinitive.
        action: String,
        /// libvirt's own words.
        message: String,
    },
    /// This libvirt, or the driver behind the URI, cannot do it at all.
    #[error("cannot {action}: this libvirt does not support it: {message}")]
    Unsupported {
        /// What was asked, as an infinitive.
        action: String,
        /// libvirt's own words.
        message: String,
    },
    /// The call was not made because an argument cannot be right.
    #[error("cannot {action}: {reason}")]
    Invalid {
        /// What was asked, as an infinitive.
        action: String,
        /// Which argument, its value and what is wrong with it.
        reason: String,
    },
}

impl LibvirtError {
    pub(crate) fn new(action: impl Into<String>, error: &virt::error::Error) -> Self {
        let (action, message) = (action.into(), error.message().to_owned());
        match (error.code(), error.domain()) {
            (ErrorNumber::NoDomain, _) => Self::NoDomain { action, message },
            (ErrorNumber::NoSupport | ErrorNumber::ArgumentUnsupported, _) => {
                Self::Unsupported { action, message }
            }
            (ErrorNumber::NoConnect | ErrorNumber::InvalidConn | ErrorNumber::Rpc, _) => {
                Self::Unreachable { action, message }
            }
            // The client side of libvirt reports a broken socket under many codes, but under this domain.
            (_, ErrorDomain::Rpc) => Self::Unreachable { action, message },
            _ => Self::Refused { action, message },
        }
    }

    /// `Ok` if `text` can be handed to C.
    pub(crate) fn check_text(action: &str, name: &str, text: &str) -> Result<(), Self> {
        if text.contains('\0') {
            let reason = format!("{name} contains a NUL byte");
            return Err(Self::Invalid { action: action.to_owned(), reason });
        }
        Ok(())
    }
}
