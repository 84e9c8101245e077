//! What happens to a guest, as libvirt and QEMU report it.

use std::time::Duration;

use serde_json::Value;
use uuid::Uuid;

/// An event of QEMU's monitor. Any name may come: match the ones of interest, ignore the rest.
#[derive(Debug, Clone, PartialEq)]
pub struct QmpEvent {
    /// Its name, for example `STOP`.
    pub name: String,
    /// When QEMU says it happened: time since 1970 on the clock of QEMU's host, to the microsecond.
    pub timestamp: Duration,
    /// The event's `data`, null if it has none.
    pub data: Value,
}

impl QmpEvent {
    /// The event in a message of QEMU, `None` if the message is not an event.
    pub fn from_message(message: &Value) -> Option<Self> {
        let name = message.get("event")?.as_str()?.to_owned();
        let part =
            |field: &str| message.get("timestamp").and_then(|at| at.get(field)).and_then(Value::as_u64);
        let timestamp = Duration::from_secs(part("seconds").unwrap_or(0))
            .saturating_add(Duration::from_micros(part("microseconds").unwrap_or(0)));
        Some(Self { name, timestamp, data: message.get("data").cloned().unwrap_or(Value::Null) })
    }
}

/// A change in a domain's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifecycle {
    /// The configuration was defined or changed.
    Defined,
    /// The configuration was removed (a running guest runs on).
    Undefined,
    /// It was started, restored or came in by migration.
    Started,
    /// Its vCPUs were stopped; every checkpoint does this as well.
    Suspended,
    /// Its vCPUs run again; every checkpoint does this as well.
    Resumed,
    /// It does not exist any more; the detail tells why.
    Stopped,
    /// The guest has shut itself down; `Stopped` follows unless it is kept.
    Shutdown,
    /// The guest has suspended itself (S3 or S4).
    PmSuspended,
    /// The guest has crashed (panicked).
    Crashed,
    /// Something newer than this code: libvirt's number.
    Other(i32),
}

/// One thing an [`crate::EventStream`] delivers.
#[derive(Debug, Clone, PartialEq)]
pub enum DomainEvent {
    /// An event of QEMU's monitor, as QEMU sent it.
    Qmp(QmpEvent),
    /// A lifecycle event of libvirt.
    Lifecycle {
        /// What changed.
        kind: Lifecycle,
        /// Why, in libvirt's terms (`destroyed`, `crashed`, `migrated`, ...); the bare number if it is a new one.
        detail: String,
    },
    /// A device was plugged in or out: the domain's XML has changed.
    Devices,
    /// So many events were dropped here because the consumer was too slow: ask for the present state anew.
    Lost {
        /// How many.
        events: u64,
    },
    /// The connection to libvirt has ended; nothing follows. Open a new [`crate::Connection`].
    ConnectionClosed {
        /// Why, in words.
        reason: String,
    },
}

/// One thing a [`crate::HostWatch`] delivers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostEvent {
    /// Something of one domain has changed.
    Domain {
        /// Its UUID.
        domain: Uuid,
        /// What.
        change: DomainChange,
    },
    /// Events were dropped because the consumer was too slow: look at all domains.
    Lost,
    /// The connection to libvirt has ended; nothing follows. Open a new [`crate::Connection`].
    ConnectionClosed {
        /// Why, in words.
        reason: String,
    },
}

/// What has changed of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DomainChange {
    /// It was started, or has ended; other changes of its life are not reported here.
    Lifecycle {
        /// Which.
        kind: Lifecycle,
        /// As in [`DomainEvent::Lifecycle`].
        detail: String,
    },
    /// Metadata of this namespace was set or removed, by anyone.
    Metadata {
        /// The namespace; empty for a title or description.
        uri: String,
    },
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn event_with_timestamp() {
        let message =
            json!({"timestamp": {"seconds": 1_700_000_000, "microseconds": 250_000}, "event": "STOP"});
        let event = QmpEvent::from_message(&message).unwrap();
        assert_eq!(event.name, "STOP");
        assert_eq!(event.timestamp, Duration::from_micros(1_700_000_000_250_000));
        assert_eq!(event.data, Value::Null);
    }

    #[test]
    fn odd_events_do_not_fail() {
        let event =
            QmpEvent::from_message(&json!({"event": "NEW", "timestamp": "now", "data": [1]})).unwrap();
        assert_eq!((event.timestamp, event.data), (Duration::ZERO, json!([1])));
        let far = json!({"event": "X", "timestamp": {"seconds": u64::MAX, "microseconds": u64::MAX}});
        assert!(QmpEvent::from_message(&far).is_some());
        for other in [json!({"return": {}}), json!({"event": 1}), json!(null)] {
            assert_eq!(QmpEvent::from_message(&other), None);
        }
    }
}
