//! The whole library against a real libvirtd with a real QEMU (emulated, so that it runs anywhere as root): monitor,
//! descriptors, events, a standby that takes a guest over, a restart of the daemon.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use understudy_libvirt::domain_xml::{DomainFacts, clean_xml, standby_xml};
use understudy_libvirt::preflight::{Guest, Inputs, check};
use understudy_libvirt::{
    Connection, Domain, DomainEvent, DomainState, EventStream, Lifecycle, Monitor, MonitorError, RunState,
    XmlFlags, qmp,
};

const PATIENCE: Duration = Duration::from_secs(60);

/// A daemon of our own; it and everything it started end with this value, or with this process.
struct Libvirtd {
    child: Child,
    input: Option<ChildStdin>,
    dir: tempfile::TempDir,
}

impl Libvirtd {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/private-libvirtd.sh");
        let log = std::fs::File::create(dir.path().join("script.log")).unwrap();
        let mut child = Command::new(script)
            .arg(dir.path())
            .stdin(Stdio::piped())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let input = child.stdin.take();
        Self { child, input, dir }
    }

    fn connect(&mut self) -> Connection {
        let uri = format!("qemu+unix:///system?socket={}/libvirt-sock", self.dir.path().display());
        let deadline = Instant::now() + PATIENCE;
        loop {
            let opened = Connection::open(&uri);
            match opened.and_then(|connection| connection.versions().map(|_| connection)) {
                Ok(connection) => return connection,
                Err(error) if Instant::now() > deadline || self.child.try_wait().unwrap().is_some() => {
                    let log = |name| std::fs::read_to_string(self.dir.path().join(name)).unwrap_or_default();
                    panic!("{error}\n{}\n{}", log("script.log"), log("libvirtd.log"));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    fn restart(&mut self) {
        writeln!(self.input.as_mut().unwrap(), "restart").unwrap();
    }
}

impl Drop for Libvirtd {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ = self.child.wait();
    }
}

/// What keeps this test from running here.
fn missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("it needs root".to_owned());
    }
    let programs = ["unshare", "ip", "libvirtd", "virtlogd", "qemu-system-x86_64"];
    let there = |program: &&str| {
        ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].iter().any(|dir| Path::new(dir).join(program).exists())
    };
    if let Some(program) = programs.iter().find(|program| !there(program)) {
        return Some(format!("{program} is not installed"));
    }
    let probe =
        Command::new("unshare").args(["--mount", "--net", "--pid", "--fork", "true"]).status().unwrap();
    (!probe.success()).then(|| "it may not make namespaces".to_owned())
}

fn guest_xml(name: &str) -> String {
    format!(
        "<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
           <os><type arch='x86_64' machine='pc'>hvm</type></os><features><acpi/></features>
           <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
             <interface type='user'><mac address='52:54:00:00:00:01'/><model type='virtio'/></interface>
             <memballoon model='none'/></devices></domain>"
    )
}

/// Waits for an event that `wanted` picks; what comes before it is of no interest.
fn wait_for(events: &EventStream, what: &str, wanted: impl Fn(&DomainEvent) -> bool) -> DomainEvent {
    let mut seen = Vec::new();
    loop {
        match events.recv_timeout(PATIENCE) {
            Ok(event) if wanted(&event) => return event,
            Ok(event) => seen.push(event),
            Err(error) => panic!("no {what}: {error}; seen {seen:?}"),
        }
    }
}

fn is_qmp(name: &'static str) -> impl Fn(&DomainEvent) -> bool {
    move |event| matches!(event, DomainEvent::Qmp(event) if event.name == name)
}

fn is_lifecycle(kind: Lifecycle) -> impl Fn(&DomainEvent) -> bool {
    move |event| matches!(event, DomainEvent::Lifecycle { kind: seen, .. } if *seen == kind)
}

fn wait_for_migration(monitor: &dyn Monitor, wanted: &str) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let info = qmp::query_migrate(monitor).unwrap();
        if info.status.as_deref() == Some(wanted) {
            return;
        }
        assert!(Instant::now() < deadline, "not {wanted}: {info:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_real_guest() {
    if let Some(reason) = missing() {
        println!("skipped: {reason}");
        return;
    }
    let mut daemon = Libvirtd::start();
    let connection = daemon.connect();
    let domain = connection.create_paused(&guest_xml("guest")).unwrap();
    let events = connection.subscribe(&domain).unwrap();
    assert!(events.has_qmp_events());

    the_monitor_answers(&connection, &domain);
    stops_and_resumes_are_seen(&domain, &events);
    a_descriptor_reaches_qemu(&domain);
    preflight_sees_what_is_there(&domain);
    a_standby_takes_over(&connection, &domain);
    an_end_is_seen(&connection);
    what_is_dropped_is_closed(&mut daemon);
    a_restarted_daemon_is_noticed_and_joined_again(&mut daemon, &domain, &events);
}

fn the_monitor_answers(connection: &Connection, domain: &Domain) {
    let hypervisor = connection.versions().unwrap().hypervisor;
    let qemu = qmp::query_version(domain).unwrap();
    assert_eq!(qemu.numbers(), (hypervisor.major, hypervisor.minor, hypervisor.micro));
    assert_eq!(qmp::query_status(domain), Ok(RunState::Prelaunch));
    assert_eq!(qmp::query_kvm_enabled(domain), Ok(false));
    assert_eq!(qmp::query_colo_mode(domain).as_deref(), Ok("none"));
    assert_eq!(qmp::query_yank_has_migration(domain), Ok(false));
    assert_eq!(qmp::query_capabilities(domain).unwrap().get("x-colo"), Some(&false));
    qmp::set_capabilities(domain, &[("x-ignore-shared", true)]).unwrap();
    assert_eq!(qmp::query_capabilities(domain).unwrap().get("x-ignore-shared"), Some(&true));
    qmp::set_capabilities(domain, &[("x-ignore-shared", false)]).unwrap();

    let unknown = domain.execute("no-such-command", serde_json::Value::Null).unwrap_err();
    assert!(unknown.is_command_not_found(), "{unknown}");
    let refused = qmp::colo_lost_heartbeat(domain).unwrap_err();
    assert!(matches!(refused, MonitorError::Qmp { .. }), "{refused}");
    assert!(connection.machine_types("x86_64").unwrap().contains("pc-q35-7.2"));
    assert!(connection.free_memory_bytes().unwrap() > 0);
    assert!(!domain.is_persistent().unwrap() && !domain.has_job().unwrap());
}

fn stops_and_resumes_are_seen(domain: &Domain, events: &EventStream) {
    let before = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    domain.resume().unwrap();
    let DomainEvent::Qmp(resume) = wait_for(events, "RESUME", is_qmp("RESUME")) else { unreachable!() };
    assert_eq!(qmp::query_status(domain), Ok(RunState::Running));
    domain.suspend().unwrap();
    let DomainEvent::Qmp(stop) = wait_for(events, "STOP", is_qmp("STOP")) else { unreachable!() };
    wait_for(events, "Suspended", is_lifecycle(Lifecycle::Suspended));
    assert_eq!(qmp::query_status(domain), Ok(RunState::Paused));
    assert_eq!(domain.state().unwrap(), DomainState::Paused);
    let after = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    assert!(before <= resume.timestamp && resume.timestamp <= stop.timestamp && stop.timestamp <= after);
    assert!(stop.timestamp.subsec_nanos() % 1000 == 0);
    // Not by libvirt's own doing, but past it.
    qmp::cont(domain).unwrap();
    wait_for(events, "RESUME", is_qmp("RESUME"));
    wait_for(events, "Resumed", is_lifecycle(Lifecycle::Resumed));
}

fn a_descriptor_reaches_qemu(domain: &Domain) {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    qmp::getfd(domain, "understudy-test", theirs.as_fd()).unwrap();
    drop(theirs);
    qmp::migrate(domain, "fd:understudy-test").unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut magic = [0; 4];
    ours.read_exact(&mut magic).unwrap();
    assert_eq!(&magic, b"QEVM");
    assert_eq!(qmp::query_yank_has_migration(domain), Ok(true));
    drop(ours);
    wait_for_migration(domain, "failed");
    assert_eq!(qmp::query_status(domain), Ok(RunState::Running));

    let (unused, _other) = UnixStream::pair().unwrap();
    qmp::getfd(domain, "unused", unused.as_fd()).unwrap();
    qmp::closefd(domain, "unused").unwrap();
    assert!(matches!(qmp::closefd(domain, "unused"), Err(MonitorError::Qmp { .. })));
}

fn preflight_sees_what_is_there(domain: &Domain) {
    let guest = Guest::gather(domain).unwrap();
    assert_eq!(guest.facts.machine, "pc-i440fx-7.2".replace("7.2", &machine_version(&guest)));
    let inputs = Inputs {
        guest,
        host: "here".into(),
        protected_to: None,
        generation: 0,
        backup_address: "there:7420".into(),
        backup: Err("connection refused".into()),
    };
    let codes: Vec<_> = check(&inputs).into_iter().map(|refusal| refusal.code).collect();
    assert_eq!(codes, ["not-kvm", "backup-unreachable"]);
}

/// The newest machine version of a QEMU is its own.
fn machine_version(guest: &Guest) -> String {
    let version = &guest.qemu.as_ref().unwrap().version;
    format!("{}.{}", version.major, version.minor)
}

fn a_standby_takes_over(connection: &Connection, domain: &Domain) {
    // On one host two domains cannot have the same identity; on two hosts they do.
    let uuid = domain.uuid().to_string();
    let xml = standby_xml(&domain.portable_xml().unwrap()).unwrap();
    let xml = xml
        .replace("<name>guest</name>", "<name>standby</name>")
        .replace(&uuid, &uuid.replace(&uuid[..8], "01234567"));
    let standby = connection.create_paused(&xml).unwrap();
    assert_eq!(qmp::query_status(&standby), Ok(RunState::InMigrate));
    assert_eq!(standby.state().unwrap(), DomainState::Paused);

    // That it is the same machine, QEMU itself decides when it reads the guest's state.
    let (from, to) = UnixStream::pair().unwrap();
    qmp::getfd(&standby, "in", to.as_fd()).unwrap();
    qmp::getfd(domain, "out", from.as_fd()).unwrap();
    drop((from, to));
    qmp::migrate_incoming(&standby, "fd:in").unwrap();
    qmp::migrate(domain, "fd:out").unwrap();
    wait_for_migration(domain, "completed");
    wait_for_migration(&standby, "completed");
    assert_eq!(qmp::query_status(domain), Ok(RunState::PostMigrate));
    standby.resume().unwrap();
    qmp::announce_self(&standby).unwrap();
    assert_eq!(qmp::query_status(&standby), Ok(RunState::Running));
    assert_eq!(standby.state().unwrap(), DomainState::Running);

    let live = standby.xml(XmlFlags::default()).unwrap();
    assert_eq!(DomainFacts::parse(&live).unwrap().qemu_arguments, ["-incoming", "defer"]);
    assert!(standby_xml(&standby.portable_xml().unwrap()).is_ok(), "it cannot be protected in its turn");
    let inactive = standby.xml(XmlFlags { inactive: true, ..XmlFlags::default() }).unwrap();
    connection.define(&clean_xml(&inactive).unwrap()).unwrap();
    assert!(standby.is_persistent().unwrap());
    let definition = standby.xml(XmlFlags { inactive: true, ..XmlFlags::default() }).unwrap();
    assert!(!definition.contains("incoming") && !definition.contains("xmlns:qemu"), "{definition}");
    qmp::cont(domain).unwrap();
}

fn an_end_is_seen(connection: &Connection) {
    let standby = connection.find_domain("standby").unwrap();
    let events = connection.subscribe(&standby).unwrap();
    standby.undefine().unwrap();
    wait_for(&events, "Undefined", is_lifecycle(Lifecycle::Undefined));
    assert!(standby.is_active().unwrap() && !standby.is_persistent().unwrap());
    standby.destroy().unwrap();
    let stopped = wait_for(&events, "Stopped", is_lifecycle(Lifecycle::Stopped));
    assert_eq!(stopped, DomainEvent::Lifecycle { kind: Lifecycle::Stopped, detail: "destroyed".into() });
    let gone = qmp::query_status(&standby).unwrap_err();
    assert!(matches!(gone, MonitorError::Gone { .. }), "{gone}");
    assert!(connection.is_alive());
}

fn what_is_dropped_is_closed(daemon: &mut Libvirtd) {
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = descriptors();
    for _ in 0..3 {
        let connection = daemon.connect();
        let domain = connection.find_domain("guest").unwrap();
        let events = connection.subscribe(&domain).unwrap();
        assert!(descriptors() > before);
        drop((connection, domain));
        assert!(events.try_recv().is_err());
    }
    // The event loop closes them a little later.
    let deadline = Instant::now() + PATIENCE;
    while descriptors() > before {
        assert!(Instant::now() < deadline, "{} descriptors, {before} before", descriptors());
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn a_restarted_daemon_is_noticed_and_joined_again(
    daemon: &mut Libvirtd,
    domain: &Domain,
    events: &EventStream,
) {
    daemon.restart();
    wait_for(events, "end of the connection", |event| matches!(event, DomainEvent::ConnectionClosed { .. }));
    assert!(events.recv().is_err());
    assert!(!domain.connection().is_alive());
    let gone = qmp::query_status(domain).unwrap_err();
    assert!(matches!(gone, MonitorError::Gone { .. }), "{gone}");

    let connection = daemon.connect();
    let again = connection.find_domain("guest").unwrap();
    assert_eq!(again.uuid(), domain.uuid());
    let events = connection.subscribe(&again).unwrap();
    assert_eq!(qmp::query_status(&again), Ok(RunState::Running));
    again.suspend().unwrap();
    wait_for(&events, "STOP", is_qmp("STOP"));
    again.destroy().unwrap();
}
