//! The only place where an error becomes a gRPC status or comes from one.
//!
//! The status message is the reason. The rest travels as metadata, so that any gRPC client shows a readable error:
//! `understudy-code`, `understudy-remedy-bin`, `understudy-retryable`; and again as the standard details that generic
//! clients know how to read, `google.rpc.ErrorInfo` and `google.rpc.RetryInfo`.

use crate::ProtocolError;
use crate::ownership::Outdated;
use crate::rpc::convert::shortened_to;
use std::borrow::Cow;
use std::collections::HashMap;
use std::time::Duration;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// Whose reasons they are, in `google.rpc.ErrorInfo`.
pub const ERROR_DOMAIN: &str = "understudy";

/// Bytes of a reason. A status travels as headers, of which clients take 16 KiB in all; there a byte may take three.
const MAX_REASON_BYTES: usize = 2500;

/// Bytes of a remedy, which is there twice.
const MAX_REMEDY_BYTES: usize = 1200;

/// How long whoever retries should wait, as told to generic clients.
const RETRY_DELAY: Duration = Duration::from_secs(1);

const CODE: &str = "understudy-code";
const REMEDY: &str = "understudy-remedy-bin";
const RETRYABLE: &str = "understudy-retryable";

/// What sort of failure it is: decides the gRPC code and the exit status of the command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// The request itself is wrong.
    InvalidArgument,
    /// No such guest or domain.
    NotFound,
    /// The request is right but the state of things forbids it.
    FailedPrecondition,
    /// The other side cannot be reached or went away.
    Unavailable,
    /// The agent failed.
    Internal,
}

/// A failure as it crosses processes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Failure {
    /// What sort of failure.
    pub kind: FailureKind,
    /// Machine-readable, e.g. `primary-alive`. Lower case, digits and dashes.
    pub code: Cow<'static, str>,
    /// What was wrong, with which value.
    pub reason: String,
    /// What to do about it; empty if nothing is known to help.
    pub remedy: String,
    /// Whether the same request may succeed later without anyone doing anything.
    pub retryable: bool,
}

impl Failure {
    /// A failure without a remedy that a retry does not cure.
    pub fn new(kind: FailureKind, code: impl Into<Cow<'static, str>>, reason: impl Into<String>) -> Self {
        Self { kind, code: code.into(), reason: reason.into(), remedy: String::new(), retryable: false }
    }

    /// With what a person can do about it.
    #[must_use]
    pub fn with_remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = remedy.into();
        self
    }

    /// That a retry may cure.
    #[must_use]
    pub fn retryable(mut self) -> Self {
        self.retryable = true;
        self
    }

    /// `wrong-agent`: this agent does not do that; `other` names the one that does.
    pub fn wrong_agent(what: &str, other: &str) -> Self {
        Self::new(FailureKind::FailedPrecondition, "wrong-agent", format!("{what} is not done by this agent"))
            .with_remedy(format!("ask the {other} agent"))
    }
}

impl From<ProtocolError> for Failure {
    fn from(e: ProtocolError) -> Self {
        Self::new(FailureKind::InvalidArgument, "protocol", e.to_string())
            .with_remedy("check that both hosts run compatible versions of Understudy")
    }
}

impl From<Outdated> for Failure {
    fn from(e: Outdated) -> Self {
        Self::new(FailureKind::FailedPrecondition, "order-outdated", e.to_string())
            .with_remedy(
                "nothing is to be done, the watchdog goes by the newer record; if the arbiter has lost its records, restart \
                 this agent",
            )
    }
}

impl From<tonic::transport::Error> for Failure {
    fn from(e: tonic::transport::Error) -> Self {
        Self::new(FailureKind::Unavailable, "unreachable", with_sources(&e)).retryable()
    }
}

/// The error and what caused it, in one line.
fn with_sources(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut source = e.source();
    while let Some(s) = source {
        let cause = s.to_string();
        if !text.ends_with(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
        source = s.source();
    }
    text
}

impl From<Failure> for Status {
    fn from(f: Failure) -> Self {
        let code = match f.kind {
            FailureKind::InvalidArgument => Code::InvalidArgument,
            FailureKind::NotFound => Code::NotFound,
            FailureKind::FailedPrecondition => Code::FailedPrecondition,
            FailureKind::Unavailable => Code::Unavailable,
            FailureKind::Internal => Code::Internal,
        };
        let (reason, remedy) =
            (shortened_to(f.reason, MAX_REASON_BYTES), shortened_to(f.remedy, MAX_REMEDY_BYTES));
        let mut details = ErrorDetails::new();
        let mut told = vec![("retryable".to_owned(), f.retryable.to_string())];
        if !remedy.is_empty() {
            told.push(("remedy".to_owned(), remedy.clone()));
        }
        details.set_error_info(
            reason_word(&f.code),
            ERROR_DOMAIN,
            told.into_iter().collect::<HashMap<_, _>>(),
        );
        if f.retryable {
            details.set_retry_info(Some(RETRY_DELAY));
        }
        let mut metadata = MetadataMap::new();
        // A code that is no valid header value is one of ours gone wrong; the reason still arrives.
        if let Ok(v) = MetadataValue::try_from(f.code.as_ref()) {
            metadata.insert(CODE, v);
        }
        if !remedy.is_empty() {
            metadata.insert_bin(REMEDY, MetadataValue::from_bytes(remedy.as_bytes()));
        }
        metadata.insert(RETRYABLE, MetadataValue::from_static(if f.retryable { "1" } else { "0" }));
        Status::with_error_details_and_metadata(code, reason, details, metadata)
    }
}

/// A code as `google.rpc.ErrorInfo` wants reasons: `PRIMARY_ALIVE`.
fn reason_word(code: &str) -> String {
    let word = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' };
    code.chars().take(63).map(word).collect()
}

impl From<Status> for Failure {
    /// A status without our metadata comes from the transport, or from something that is not Understudy.
    fn from(s: Status) -> Self {
        let kind = match s.code() {
            Code::InvalidArgument | Code::OutOfRange => FailureKind::InvalidArgument,
            Code::NotFound => FailureKind::NotFound,
            Code::FailedPrecondition | Code::AlreadyExists | Code::Unimplemented | Code::PermissionDenied => {
                FailureKind::FailedPrecondition
            }
            Code::Internal | Code::DataLoss | Code::ResourceExhausted => FailureKind::Internal,
            _ => FailureKind::Unavailable,
        };
        let metadata = s.metadata();
        let text = |key| metadata.get(key).and_then(|v| v.to_str().ok());
        let remedy = metadata.get_bin(REMEDY).and_then(|v| v.to_bytes().ok());
        Self {
            kind,
            code: match text(CODE) {
                Some(code) => Cow::Owned(code.to_owned()),
                None if kind == FailureKind::Unavailable => Cow::Borrowed("disconnected"),
                None => Cow::Borrowed("grpc"),
            },
            reason: match (text(CODE), s.message()) {
                (None, "") => format!("the other side answered {:?}", s.code()),
                (None, message) => format!("{message} ({:?})", s.code()),
                (Some(_), message) => message.to_owned(),
            },
            remedy: remedy.map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default(),
            retryable: text(RETRYABLE).map_or(kind == FailureKind::Unavailable, |v| v == "1"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_survives_the_wire() {
        for kind in [
            FailureKind::InvalidArgument,
            FailureKind::NotFound,
            FailureKind::FailedPrecondition,
            FailureKind::Unavailable,
            FailureKind::Internal,
        ] {
            let failure = Failure::new(kind, "primary-alive", "the stream of \"web\" is open")
                .with_remedy("fence the old host\nthen say so")
                .retryable();
            assert_eq!(Failure::from(Status::from(failure.clone())), failure);
        }
        let plain = Failure::new(FailureKind::NotFound, "no-guest", "no guest é");
        assert_eq!(Failure::from(Status::from(plain.clone())), plain);
    }

    #[test]
    fn a_generic_client_reads_reason_and_retry_from_the_details() {
        let failure = Failure::new(FailureKind::FailedPrecondition, "primary-alive", "the stream is open")
            .with_remedy("fence it")
            .retryable();
        let details = Status::from(failure).get_error_details();
        let info = details.error_info().unwrap();
        assert_eq!((info.reason.as_str(), info.domain.as_str()), ("PRIMARY_ALIVE", ERROR_DOMAIN));
        assert_eq!(
            (info.metadata["retryable"].as_str(), info.metadata["remedy"].as_str()),
            ("true", "fence it")
        );
        assert!(details.retry_info().is_some());
        let never = Status::from(Failure::new(FailureKind::NotFound, "no-guest", "")).get_error_details();
        assert_eq!(never.error_info().unwrap().metadata["retryable"], "false");
        assert!(never.retry_info().is_none());
    }

    #[test]
    fn the_longest_failure_fits_into_the_headers_of_a_client() {
        let long = Failure::new(FailureKind::Internal, "x".repeat(100), "\n".repeat(1 << 20))
            .with_remedy("\n".repeat(1 << 20));
        let status = Status::from(long);
        let message = status.message().len() * 3;
        let base64 = |bytes: usize| bytes.div_ceil(3) * 4;
        let remedy = status.metadata().get_bin(REMEDY).unwrap().to_bytes().unwrap().len();
        assert!(message + base64(status.details().len()) + base64(remedy) < 15 << 10);
    }

    #[test]
    fn a_foreign_status_is_told_apart() {
        let gone = Failure::from(Status::unavailable("broken pipe"));
        assert_eq!((gone.code.as_ref(), gone.retryable), ("disconnected", true));
        let odd = Failure::from(Status::internal("h2 protocol error"));
        assert_eq!((odd.code.as_ref(), odd.retryable), ("grpc", false));
        assert_eq!(odd.reason, "h2 protocol error (Internal)");
    }
}
