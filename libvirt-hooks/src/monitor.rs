//! One QMP command, however it reaches QEMU.

use std::os::fd::BorrowedFd;

use serde_json::{Map, Value};

/// A way to QEMU's monitor. Calls block until QEMU has answered: make them from a thread that may wait.
///
/// Commands of one caller run in the order of the calls; several threads may share a monitor.
pub trait Monitor: Send + Sync {
    /// Runs `command` with `arguments` (an object, or null for none) and returns what QEMU calls `return`.
    ///
    /// # Errors
    /// [`MonitorError::Qmp`] when QEMU refused, [`MonitorError::Gone`] when there is no QEMU to ask any more,
    /// [`MonitorError::Failed`] for everything in between: then it is unknown whether the command took effect.
    fn execute(&self, command: &str, arguments: Value) -> Result<Value, MonitorError>;

    /// Like [`Monitor::execute`], with `fd` sent along for a command that takes one over (`getfd`, `add-fd`).
    ///
    /// # Errors
    /// As [`Monitor::execute`], and [`MonitorError::FdUnsupported`] when this monitor cannot carry a descriptor:
    /// nothing was sent, use a path instead.
    fn execute_with_fd(
        &self,
        command: &str,
        arguments: Value,
        fd: BorrowedFd<'_>,
    ) -> Result<Value, MonitorError>;
}

/// Why a monitor command has no result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MonitorError {
    /// QEMU answered with an error.
    #[error("QEMU refused {command}: {desc} ({class})")]
    Qmp {
        /// The command.
        command: String,
        /// QEMU's error class, for example `GenericError` or `CommandNotFound`.
        class: String,
        /// QEMU's own words.
        desc: String,
    },
    /// The command was not answered, or not in a way that can be understood. It may have taken effect.
    #[error("{command} failed: {reason}")]
    Failed {
        /// The command.
        command: String,
        /// What happened.
        reason: String,
    },
    /// QEMU, or the way to it, does not exist any more.
    #[error("{command} was not answered, the monitor is gone: {reason}")]
    Gone {
        /// The command.
        command: String,
        /// What happened.
        reason: String,
    },
    /// This monitor cannot carry a file descriptor. Nothing was sent to QEMU.
    #[error("{command} cannot carry a file descriptor: {reason}; use a unix socket path instead")]
    FdUnsupported {
        /// The command.
        command: String,
        /// What is missing.
        reason: String,
    },
}

impl MonitorError {
    /// True if QEMU does not know the command at all.
    pub fn is_command_not_found(&self) -> bool {
        matches!(self, Self::Qmp { class, .. } if class == "CommandNotFound")
    }

    pub(crate) fn failed(command: &str, reason: impl Into<String>) -> Self {
        Self::Failed { command: command.to_owned(), reason: reason.into() }
    }

    pub(crate) fn gone(command: &str, reason: impl Into<String>) -> Self {
        Self::Gone { command: command.to_owned(), reason: reason.into() }
    }
}

/// The request object of a command, without an id.
pub(crate) fn request(command: &str, arguments: Value) -> Map<String, Value> {
    let mut request = Map::new();
    request.insert("execute".to_owned(), Value::String(command.to_owned()));
    if !arguments.is_null() {
        request.insert("arguments".to_owned(), arguments);
    }
    request
}

/// The outcome that a reply object (`{"return": ..}` or `{"error": ..}`) stands for.
pub(crate) fn outcome(command: &str, reply: Value) -> Result<Value, MonitorError> {
    let Value::Object(mut reply) = reply else {
        return Err(MonitorError::failed(command, "the reply is not an object"));
    };
    if let Some(value) = reply.remove("return") {
        return Ok(value);
    }
    let Some(error) = reply.remove("error") else {
        return Err(MonitorError::failed(command, "the reply has neither `return` nor `error`"));
    };
    let field = |name: &str| error.get(name).and_then(Value::as_str).unwrap_or("unknown").to_owned();
    Err(MonitorError::Qmp { command: command.to_owned(), class: field("class"), desc: field("desc") })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn reply_with_return_is_its_value() {
        assert_eq!(outcome("x", json!({"return": {"a": 1}, "id": "libvirt-7"})), Ok(json!({"a": 1})));
        assert_eq!(outcome("x", json!({"return": null})), Ok(Value::Null));
    }

    #[test]
    fn reply_with_error_keeps_class_and_text() {
        let error = outcome("cont", json!({"error": {"class": "CommandNotFound", "desc": "no", "new": 1}}));
        let error = error.unwrap_err();
        assert!(error.is_command_not_found());
        assert_eq!(error.to_string(), "QEMU refused cont: no (CommandNotFound)");
        assert!(matches!(outcome("x", json!({"error": 3})), Err(MonitorError::Qmp { .. })));
    }

    #[test]
    fn nonsense_is_an_error() {
        for nonsense in [json!([]), json!(1), json!({}), json!({"retrun": 1})] {
            assert!(matches!(outcome("x", nonsense), Err(MonitorError::Failed { .. })));
        }
    }

    #[test]
    fn null_arguments_are_left_out() {
        assert_eq!(Value::Object(request("stop", Value::Null)), json!({"execute": "stop"}));
        let with = Value::Object(request("x", json!({"a": 1})));
        assert_eq!(with, json!({"execute": "x", "arguments": {"a": 1}}));
    }
}
