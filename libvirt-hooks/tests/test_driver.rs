//! Connection, domains and lifecycle events against libvirt's own test driver, which needs no daemon and no QEMU.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use understudy_libvirt::{
    Connection, DomainChange, DomainEvent, DomainState, EventStream, HostEvent, LibvirtError, Lifecycle,
    Monitor, MonitorError, XmlFlags, qmp,
};

const PATIENCE: Duration = Duration::from_secs(20);

/// One test at a time: this driver has one set of domains and one queue of events for a whole process, and loses events
/// of one connection while another one subscribes or closes (libvirt 9.0: one run of ten). Daemons have a queue for each.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn lifecycle(kind: Lifecycle, detail: &str) -> DomainEvent {
    DomainEvent::Lifecycle { kind, detail: detail.to_owned() }
}

fn next(events: &EventStream) -> DomainEvent {
    events.recv_timeout(PATIENCE).unwrap()
}

#[test]
fn domains_are_found_by_id_uuid_and_name() {
    let _alone = alone();
    let connection = Connection::open("test:///default").unwrap();
    assert!(connection.is_alive() && !connection.hostname().unwrap().is_empty());
    let domain = connection.find_domain("test").unwrap();
    assert_eq!(domain.name(), "test");
    assert!(domain.is_active().unwrap() && domain.is_persistent().unwrap());
    assert_eq!(connection.find_domain(&domain.uuid().to_string()).unwrap().name(), "test");
    assert_eq!(connection.find_domain("1").unwrap().uuid(), domain.uuid());
    assert!(connection.domains().unwrap().iter().any(|other| other.uuid() == domain.uuid()));
    assert!(domain.xml(XmlFlags::default()).unwrap().contains("<name>test</name>"));

    let missing = connection.find_domain("no-such").unwrap_err();
    assert!(matches!(missing, LibvirtError::NoDomain { .. }), "{missing}");
    assert!(missing.to_string().contains("\"no-such\""), "{missing}");
    assert!(matches!(connection.find_domain("a\0b"), Err(LibvirtError::Invalid { .. })));
}

#[test]
fn a_uri_that_nobody_answers_is_unreachable() {
    let error = Connection::open("qemu+unix:///system?socket=/nonexistent/libvirt-sock").unwrap_err();
    assert!(matches!(error, LibvirtError::Unreachable { .. }), "{error:?}");
    assert!(error.to_string().contains("/nonexistent/libvirt-sock"), "{error}");
}

#[test]
fn events_go_to_the_stream_of_their_domain() {
    let _alone = alone();
    let connection = Connection::open("test:///default").unwrap();
    let running = connection.find_domain("test").unwrap();
    let xml = "<domain type='test'><name>other</name><memory unit='MiB'>8</memory><os><type>hvm</type></os></domain>";
    let other = connection.define(xml).unwrap();
    assert_eq!(other.state().unwrap(), DomainState::ShutOff);
    let events = connection.subscribe(&running).unwrap();
    let events_of_other = connection.subscribe(&other).unwrap();
    assert!(!events.has_qmp_events());

    running.suspend().unwrap();
    assert_eq!(running.state().unwrap(), DomainState::Paused);
    running.resume().unwrap();
    assert_eq!(running.state().unwrap(), DomainState::Running);
    other.undefine().unwrap();
    assert_eq!(next(&events), lifecycle(Lifecycle::Suspended, "paused"));
    assert_eq!(next(&events), lifecycle(Lifecycle::Resumed, "unpaused"));
    // That it was defined is told to whoever has subscribed when libvirt gets round to telling it.
    let told = next(&events_of_other);
    let told = if told == lifecycle(Lifecycle::Defined, "added") { next(&events_of_other) } else { told };
    assert_eq!(told, lifecycle(Lifecycle::Undefined, "removed"));
    assert!(events.try_recv().is_err() && events_of_other.try_recv().is_err());
    assert!(matches!(other.xml(XmlFlags::default()), Err(LibvirtError::NoDomain { .. })));

    // A stream may outlive every other handle on its connection.
    drop((connection, other, events_of_other));
    running.suspend().unwrap();
    running.resume().unwrap();
    drop(running);
    assert_eq!(next(&events), lifecycle(Lifecycle::Suspended, "paused"));
    assert_eq!(next(&events), lifecycle(Lifecycle::Resumed, "unpaused"));
}

#[test]
fn a_driver_without_a_monitor_says_so() {
    let _alone = alone();
    let connection = Connection::open("test:///default").unwrap();
    let domain = connection.find_domain("test").unwrap();
    let error = qmp::query_status(&domain).unwrap_err();
    assert!(matches!(&error, MonitorError::Failed { command, .. } if command == "query-status"), "{error}");
    let (fd, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let error =
        domain.execute_with_fd("getfd", serde_json::json!({}), std::os::fd::AsFd::as_fd(&fd)).unwrap_err();
    assert!(matches!(error, MonitorError::FdUnsupported { .. }), "{error}");
}

fn running(connection: &Connection, name: &str) -> understudy_libvirt::Domain {
    let xml = format!(
        "<domain type='test'><name>{name}</name><memory unit='MiB'>8</memory><os><type>hvm</type></os></domain>"
    );
    // Domains of this driver belong to the whole process; it cannot create one paused, and we create no other.
    let link = virt::connect::Connect::open(Some("test:///default")).unwrap();
    virt::domain::Domain::create_xml(&link, &xml, 0).unwrap();
    connection.find_domain(name).unwrap()
}

#[test]
fn metadata_is_set_read_removed_and_reported_by_namespace() {
    let _alone = alone();
    const USER: &str = "urn:understudy:domain:1";
    let connection = Connection::open("test:///default").unwrap();
    let domain = running(&connection, "marked");
    let watch = connection.watch().unwrap();
    assert_eq!(domain.metadata(USER).unwrap(), None);
    let xml = "<protect enabled='yes' backup='b'><disk target='vda' policy='buffer'/></protect>";
    domain.set_live_metadata(USER, "u", Some(xml)).unwrap();
    domain.set_live_metadata("urn:other", "o", Some("<x/>")).unwrap();
    // As an XML it has its namespace, alone it has none.
    let all = domain.xml(XmlFlags::default()).unwrap();
    assert!(all.contains("<u:protect xmlns:u=\"urn:understudy:domain:1\""), "{all}");
    assert!(domain.metadata(USER).unwrap().unwrap().starts_with("<protect enabled="));
    domain.set_live_metadata(USER, "u", None).unwrap();
    assert_eq!(domain.metadata(USER).unwrap(), None);
    assert!(domain.metadata("urn:other").unwrap().is_some());
    // Suspending and resuming is what checkpoints do all the time.
    domain.suspend().unwrap();
    domain.resume().unwrap();
    domain.destroy().unwrap();
    let started = DomainChange::Lifecycle { kind: Lifecycle::Started, detail: "booted".to_owned() };
    let mut seen = Vec::new();
    while let Some(event) = watch.next(PATIENCE) {
        let HostEvent::Domain { domain: of, change } = event else { panic!("{event:?}") };
        // That it was started may only be told now.
        if of != domain.uuid() || (seen.is_empty() && change == started) {
            continue;
        }
        let last = matches!(change, DomainChange::Lifecycle { .. });
        seen.push(change);
        if last {
            break;
        }
    }
    let of = |uri: &str| DomainChange::Metadata { uri: uri.to_owned() };
    let ended = DomainChange::Lifecycle { kind: Lifecycle::Stopped, detail: "destroyed".to_owned() };
    assert_eq!(seen, [of(USER), of("urn:other"), of(USER), ended]);
}

#[test]
fn the_elements_of_understudy_survive_libvirt() {
    let _alone = alone();
    use understudy_hook::metadata::{PROTECT_NAMESPACE, Protect, STATE_NAMESPACE, STATE_PREFIX, State};
    let connection = Connection::open("test:///default").unwrap();
    let domain = running(&connection, "reported");
    // Children have no namespace of their own where `virsh metadata --set` is given the plain element.
    let xml = "<protect enabled='yes' backup='b'><disk target='vda' policy='buffer'/></protect>";
    domain.set_live_metadata(PROTECT_NAMESPACE, "understudy", Some(xml)).unwrap();
    let alone = Protect::parse(&domain.metadata(PROTECT_NAMESPACE).unwrap().unwrap()).unwrap();
    let state = State { value: "failed".into(), detail: "no <way> & no 'means'".into(), ..State::default() };
    domain.set_live_metadata(STATE_NAMESPACE, STATE_PREFIX, Some(&state.to_xml())).unwrap();
    let all = domain.xml(XmlFlags::default()).unwrap();
    assert_eq!(Protect::in_domain(&all).unwrap(), Some(alone));
    assert_eq!(State::parse(&domain.metadata(STATE_NAMESPACE).unwrap().unwrap()).unwrap(), state);
}
