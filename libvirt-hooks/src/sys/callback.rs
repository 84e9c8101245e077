//! Subscriptions: libvirt's callbacks, turned into events for a [`Sink`].

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int, c_longlong, c_uint, c_void};
use std::fmt;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;
use virt::domain::Domain;
use virt::error::Error;
use virt_sys::{virConnectPtr, virDomainPtr};

use super::link::Link;
use crate::event::{DomainChange, DomainEvent, HostEvent, Lifecycle, QmpEvent};

/// Where the events of a subscription go. Called on libvirt's event thread: it must not block.
pub(crate) trait Sink: Send + Sync {
    fn accept(&self, event: DomainEvent);

    /// The same for a subscription to all domains of a host.
    fn accept_host(&self, _event: HostEvent) {}
}

/// The sinks of all live subscriptions, by the number that libvirt was given in place of a pointer.
static SINKS: Mutex<Sinks> = Mutex::new(Sinks { last: 0, by_token: BTreeMap::new() });

struct Sinks {
    last: usize,
    by_token: BTreeMap<usize, Arc<dyn Sink>>,
}

fn sinks() -> MutexGuard<'static, Sinks> {
    SINKS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A sink's place in [`SINKS`], given up when dropped.
struct Token(usize);

impl Token {
    fn new(sink: Arc<dyn Sink>) -> Self {
        let mut sinks = sinks();
        sinks.last += 1;
        let token = sinks.last;
        sinks.by_token.insert(token, sink);
        Self(token)
    }

    /// The number in the guise in which libvirt hands it back; never dereferenced.
    fn opaque(&self) -> *mut c_void {
        ptr::without_provenance_mut(self.0)
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        let sink = sinks().by_token.remove(&self.0);
        // Outside of the lock: the sink's own drop may do anything.
        drop(sink);
    }
}

fn deliver(opaque: *mut c_void, event: impl FnOnce() -> DomainEvent) {
    let sink = sinks().by_token.get(&opaque.addr()).cloned();
    if let Some(sink) = sink {
        sink.accept(event());
    }
}

/// One callback registered with libvirt for one domain; taken back when dropped.
pub(crate) struct Subscription {
    connect: Link,
    id: c_int,
    qmp: bool,
    token: Token,
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription")
            .field("id", &self.id)
            .field("qmp", &self.qmp)
            .field("token", &self.token.0)
            .finish_non_exhaustive()
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let connect = self.connect.as_ptr();
        // SAFETY: the connection is alive because `self.connect` holds a reference; `id` came from the matching register
        // call on the same connection and is given back only here.
        let status = unsafe {
            if self.qmp {
                virt_sys::virConnectDomainQemuMonitorEventDeregister(connect, self.id)
            } else {
                virt_sys::virConnectDomainEventDeregisterAny(connect, self.id)
            }
        };
        if status < 0 {
            // Nothing to be done, and usual after the daemon has gone: the token's removal silences the callback.
            tracing::debug!(error = Error::last_error().message(), "unsubscribing from libvirt events");
        }
    }
}

/// As libvirt takes the callbacks of all events.
type Generic = unsafe extern "C" fn(virConnectPtr, virDomainPtr, *mut c_void);

/// Subscribes to an event of `domain`, or of all domains. `callback` has the arguments of the event, passed as [`Generic`].
fn register(
    connect: &Link,
    domain: Option<&Domain>,
    event: c_uint,
    callback: Generic,
    sink: Arc<dyn Sink>,
) -> Result<Subscription, Error> {
    let token = Token::new(sink);
    // SAFETY: connection and domain are valid while their owners live, and libvirt takes references of its own; no domain
    // stands for all of them; `opaque` is only handed back, and needs no freeing.
    let id = unsafe {
        virt_sys::virConnectDomainEventRegisterAny(
            connect.as_ptr(),
            domain.map_or(ptr::null_mut(), Domain::as_ptr),
            event.cast_signed(),
            Some(callback),
            token.opaque(),
            None,
        )
    };
    if id < 0 {
        return Err(Error::last_error());
    }
    Ok(Subscription { connect: connect.clone(), id, qmp: false, token })
}

/// Subscribes to the lifecycle events of `domain`.
pub(crate) fn subscribe_lifecycle(
    connect: &Link,
    domain: &Domain,
    sink: Arc<dyn Sink>,
) -> Result<Subscription, Error> {
    type Specific = unsafe extern "C" fn(virConnectPtr, virDomainPtr, c_int, c_int, *mut c_void) -> c_int;
    // SAFETY: libvirt's documented way: the callback of event VIR_DOMAIN_EVENT_ID_LIFECYCLE is passed as the generic type
    // and cast back to `Specific` by libvirt before it is called; both are plain C function pointers.
    let callback = unsafe { std::mem::transmute::<Specific, Generic>(on_lifecycle) };
    register(connect, Some(domain), virt_sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE, callback, sink)
}

/// Subscribes to devices being plugged into `domain`, and out of it.
pub(crate) fn subscribe_devices(
    connect: &Link,
    domain: &Domain,
    sink: &Arc<dyn Sink>,
) -> Result<[Subscription; 2], Error> {
    type Specific = unsafe extern "C" fn(virConnectPtr, virDomainPtr, *const c_char, *mut c_void);
    // SAFETY: libvirt's documented way: the callback of the events DEVICE_ADDED and DEVICE_REMOVED, which have the same
    // arguments, is passed as the generic type and cast back to `Specific` by libvirt before it is called; both are plain C
    // function pointers.
    let callback = unsafe { std::mem::transmute::<Specific, Generic>(on_device) };
    let subscribe = |event| register(connect, Some(domain), event, callback, Arc::clone(sink));
    Ok([
        subscribe(virt_sys::VIR_DOMAIN_EVENT_ID_DEVICE_ADDED)?,
        subscribe(virt_sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED)?,
    ])
}

/// Subscribes to the starts and ends of all domains, and to changes of their metadata.
pub(crate) fn subscribe_host(connect: &Link, sink: &Arc<dyn Sink>) -> Result<[Subscription; 2], Error> {
    type OnLifecycle = unsafe extern "C" fn(virConnectPtr, virDomainPtr, c_int, c_int, *mut c_void) -> c_int;
    type OnMetadata = unsafe extern "C" fn(virConnectPtr, virDomainPtr, c_int, *const c_char, *mut c_void);
    // SAFETY: libvirt's documented way: the callback of an event is passed as the generic type, and cast back by libvirt to
    // the type that belongs to the event before it is called; all are plain C function pointers.
    let (lifecycle, metadata) = unsafe {
        (
            std::mem::transmute::<OnLifecycle, Generic>(on_host_lifecycle),
            std::mem::transmute::<OnMetadata, Generic>(on_host_metadata),
        )
    };
    let subscribe = |event, callback| register(connect, None, event, callback, Arc::clone(sink));
    Ok([
        subscribe(virt_sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle)?,
        subscribe(virt_sys::VIR_DOMAIN_EVENT_ID_METADATA_CHANGE, metadata)?,
    ])
}

/// Subscribes to all events of QEMU's monitor of `domain`.
pub(crate) fn subscribe_qmp(
    connect: &Link,
    domain: &Domain,
    sink: Arc<dyn Sink>,
) -> Result<Subscription, Error> {
    let token = Token::new(sink);
    // SAFETY: both pointers are valid while their owners live, and libvirt takes references of its own; a null event name
    // stands for every event; `opaque` is only handed back, and needs no freeing.
    let id = unsafe {
        virt_sys::virConnectDomainQemuMonitorEventRegister(
            connect.as_ptr(),
            domain.as_ptr(),
            ptr::null(),
            Some(on_qmp),
            token.opaque(),
            None,
            0,
        )
    };
    if id < 0 {
        return Err(Error::last_error());
    }
    Ok(Subscription { connect: connect.clone(), id, qmp: true, token })
}

/// Tells a sink when a connection ends; one per connection. [`CloseWatch::unregister`] must be called before the
/// connection is closed: libvirt holds a reference to the connection while the callback is registered.
pub(crate) struct CloseWatch {
    token: Token,
}

impl fmt::Debug for CloseWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CloseWatch").field("token", &self.token.0).finish()
    }
}

impl CloseWatch {
    pub(crate) fn register(connect: &Link, sink: Arc<dyn Sink>) -> Result<Self, Error> {
        let token = Token::new(sink);
        // SAFETY: the connection pointer is valid while `connect` lives; `opaque` is only handed back, and needs no freeing.
        let status = unsafe {
            virt_sys::virConnectRegisterCloseCallback(connect.as_ptr(), Some(on_close), token.opaque(), None)
        };
        if status < 0 { Err(Error::last_error()) } else { Ok(Self { token }) }
    }

    pub(crate) fn unregister(&self, connect: &Link) {
        // SAFETY: the connection pointer is valid while `connect` lives.
        let status = unsafe { virt_sys::virConnectUnregisterCloseCallback(connect.as_ptr(), Some(on_close)) };
        if status < 0 {
            // Usual after the connection has closed by itself: the callback is used up then.
            tracing::debug!(error = Error::last_error().message(), "unregistering the close callback");
        }
    }
}

unsafe extern "C" fn on_close(_: virConnectPtr, reason: c_int, opaque: *mut c_void) {
    deliver(opaque, || {
        let reason = match u32::try_from(reason) {
            Ok(virt_sys::VIR_CONNECT_CLOSE_REASON_ERROR) => "an input or output error".to_owned(),
            Ok(virt_sys::VIR_CONNECT_CLOSE_REASON_EOF) => "the libvirt daemon closed it".to_owned(),
            Ok(virt_sys::VIR_CONNECT_CLOSE_REASON_KEEPALIVE) => {
                "the libvirt daemon does not answer".to_owned()
            }
            Ok(virt_sys::VIR_CONNECT_CLOSE_REASON_CLIENT) => "this side closed it".to_owned(),
            _ => format!("libvirt's reason {reason}"),
        };
        DomainEvent::ConnectionClosed { reason }
    });
}

unsafe extern "C" fn on_lifecycle(
    _: virConnectPtr,
    _: virDomainPtr,
    event: c_int,
    detail: c_int,
    opaque: *mut c_void,
) -> c_int {
    deliver(opaque, || {
        let kind = lifecycle(event);
        DomainEvent::Lifecycle { kind, detail: detail_name(kind, detail) }
    });
    0
}

unsafe extern "C" fn on_device(_: virConnectPtr, _: virDomainPtr, _: *const c_char, opaque: *mut c_void) {
    deliver(opaque, || DomainEvent::Devices);
}

unsafe extern "C" fn on_host_lifecycle(
    _: virConnectPtr,
    domain: virDomainPtr,
    event: c_int,
    detail: c_int,
    opaque: *mut c_void,
) -> c_int {
    let kind = lifecycle(event);
    // Every checkpoint of every guest suspends and resumes it.
    if matches!(kind, Lifecycle::Started | Lifecycle::Stopped) {
        let change = DomainChange::Lifecycle { kind, detail: detail_name(kind, detail) };
        deliver_host(domain, change, opaque);
    }
    0
}

unsafe extern "C" fn on_host_metadata(
    _: virConnectPtr,
    domain: virDomainPtr,
    _: c_int,
    uri: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt passes null or a NUL-terminated string that lives until the callback returns.
    let uri = (!uri.is_null()).then(|| unsafe { CStr::from_ptr(uri) }.to_string_lossy().into_owned());
    deliver_host(domain, DomainChange::Metadata { uri: uri.unwrap_or_default() }, opaque);
}

fn deliver_host(domain: virDomainPtr, change: DomainChange, opaque: *mut c_void) {
    let mut uuid = [0_u8; 16];
    // SAFETY: libvirt passes a domain that is valid until the callback returns, and writes the 16 bytes of a UUID.
    let status = unsafe { virt_sys::virDomainGetUUID(domain, uuid.as_mut_ptr()) };
    let sink = sinks().by_token.get(&opaque.addr()).cloned();
    if let Some(sink) = sink
        && status == 0
    {
        sink.accept_host(HostEvent::Domain { domain: uuid::Uuid::from_bytes(uuid), change });
    }
}

unsafe extern "C" fn on_qmp(
    _: virConnectPtr,
    _: virDomainPtr,
    event: *const c_char,
    seconds: c_longlong,
    micros: c_uint,
    details: *const c_char,
    opaque: *mut c_void,
) {
    let text = |text: *const c_char| {
        // SAFETY: libvirt passes null or a NUL-terminated string that lives until the callback returns.
        (!text.is_null())
            .then(|| CString::from(unsafe { CStr::from_ptr(text) }).to_string_lossy().into_owned())
    };
    let name = text(event);
    let details = text(details);
    deliver(opaque, || {
        let seconds = Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
        let data = details.map_or(Value::Null, |details| {
            // Bytes that are no JSON are still an event: the consumer decides by its name.
            serde_json::from_str(&details).unwrap_or(Value::String(details))
        });
        DomainEvent::Qmp(QmpEvent {
            name: name.unwrap_or_default(),
            timestamp: seconds.saturating_add(Duration::from_micros(u64::from(micros))),
            data,
        })
    });
}

fn lifecycle(event: c_int) -> Lifecycle {
    match u32::try_from(event) {
        Ok(virt_sys::VIR_DOMAIN_EVENT_DEFINED) => Lifecycle::Defined,
        Ok(virt_sys::VIR_DOMAIN_EVENT_UNDEFINED) => Lifecycle::Undefined,
        Ok(virt_sys::VIR_DOMAIN_EVENT_STARTED) => Lifecycle::Started,
        Ok(virt_sys::VIR_DOMAIN_EVENT_SUSPENDED) => Lifecycle::Suspended,
        Ok(virt_sys::VIR_DOMAIN_EVENT_RESUMED) => Lifecycle::Resumed,
        Ok(virt_sys::VIR_DOMAIN_EVENT_STOPPED) => Lifecycle::Stopped,
        Ok(virt_sys::VIR_DOMAIN_EVENT_SHUTDOWN) => Lifecycle::Shutdown,
        Ok(virt_sys::VIR_DOMAIN_EVENT_PMSUSPENDED) => Lifecycle::PmSuspended,
        Ok(virt_sys::VIR_DOMAIN_EVENT_CRASHED) => Lifecycle::Crashed,
        _ => Lifecycle::Other(event),
    }
}

/// libvirt numbers the details of each kind from 0; these are its names for them (`virDomainEvent*DetailType`).
fn detail_name(kind: Lifecycle, detail: c_int) -> String {
    let names: &[&str] = match kind {
        Lifecycle::Defined => &["added", "updated", "renamed", "from-snapshot"],
        Lifecycle::Undefined => &["removed", "renamed"],
        Lifecycle::Started => &["booted", "migrated", "restored", "from-snapshot", "wakeup", "recreated"],
        Lifecycle::Suspended => &[
            "paused",
            "migrated",
            "ioerror",
            "watchdog",
            "restored",
            "from-snapshot",
            "api-error",
            "postcopy",
            "postcopy-failed",
            "guest-shutdown",
        ],
        Lifecycle::Resumed => &["unpaused", "migrated", "from-snapshot", "postcopy", "postcopy-failed"],
        Lifecycle::Stopped => {
            &["shutdown", "destroyed", "crashed", "migrated", "saved", "failed", "from-snapshot", "recreated"]
        }
        Lifecycle::Shutdown => &["finished", "guest", "host"],
        Lifecycle::PmSuspended => &["memory", "disk"],
        Lifecycle::Crashed => &["panicked", "crashloaded"],
        Lifecycle::Other(_) => &[],
    };
    let known = usize::try_from(detail).ok().and_then(|detail| names.get(detail));
    known.map_or_else(|| detail.to_string(), |name| (*name).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_have_libvirts_numbers() {
        let check = |kind, number: u32, name| assert_eq!(detail_name(kind, number.cast_signed()), name);
        check(Lifecycle::Stopped, virt_sys::VIR_DOMAIN_EVENT_STOPPED_DESTROYED, "destroyed");
        check(Lifecycle::Stopped, virt_sys::VIR_DOMAIN_EVENT_STOPPED_FROM_SNAPSHOT, "from-snapshot");
        check(Lifecycle::Suspended, virt_sys::VIR_DOMAIN_EVENT_SUSPENDED_IOERROR, "ioerror");
        check(Lifecycle::Resumed, virt_sys::VIR_DOMAIN_EVENT_RESUMED_POSTCOPY_FAILED, "postcopy-failed");
        check(Lifecycle::Started, virt_sys::VIR_DOMAIN_EVENT_STARTED_WAKEUP, "wakeup");
        check(Lifecycle::Shutdown, virt_sys::VIR_DOMAIN_EVENT_SHUTDOWN_HOST, "host");
        assert_eq!(detail_name(Lifecycle::Crashed, 17), "17");
        assert_eq!(detail_name(Lifecycle::Other(40), -1), "-1");
        assert_eq!(lifecycle(40), Lifecycle::Other(40));
    }
}
