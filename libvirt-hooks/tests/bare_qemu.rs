//! The socket monitor against a real QEMU that no libvirt runs.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use understudy_libvirt::{Monitor, MonitorError, RunState, SocketMonitor, qmp};

const PATIENCE: Duration = Duration::from_secs(60);

/// Ends with this value.
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_bare_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let spawned = Command::new("qemu-system-x86_64")
        .args([
            "-machine",
            "pc",
            "-accel",
            "tcg",
            "-m",
            "16",
            "-display",
            "none",
            "-nodefaults",
            "-S",
            "-qmp",
        ])
        .arg(format!("unix:{},server=on,wait=off", path.display()))
        .stdin(Stdio::null())
        .spawn();
    let Ok(child) = spawned else {
        println!("skipped: qemu-system-x86_64 is not installed");
        return;
    };
    let mut qemu = Qemu(child);
    let deadline = Instant::now() + PATIENCE;
    let (monitor, events) = loop {
        match SocketMonitor::connect(&path) {
            Ok(connected) => break connected,
            Err(error) => {
                assert!(Instant::now() < deadline && qemu.0.try_wait().unwrap().is_none(), "{error}")
            }
        }
        std::thread::sleep(Duration::from_millis(5));
    };

    assert_eq!(qmp::query_status(&monitor), Ok(RunState::Prelaunch));
    assert!(qmp::query_version(&monitor).unwrap().major >= 6);
    qmp::cont(&monitor).unwrap();
    qmp::stop(&monitor).unwrap();
    let (resume, stop) = (events.recv_timeout(PATIENCE).unwrap(), events.recv_timeout(PATIENCE).unwrap());
    assert_eq!((resume.name.as_str(), stop.name.as_str()), ("RESUME", "STOP"));
    assert!(resume.timestamp <= stop.timestamp && !resume.timestamp.is_zero());
    // The longest reply there is.
    assert!(monitor.execute("query-qmp-schema", serde_json::Value::Null).unwrap().is_array());

    let (mut ours, theirs) = UnixStream::pair().unwrap();
    qmp::getfd(&monitor, "out", theirs.as_fd()).unwrap();
    drop(theirs);
    qmp::migrate(&monitor, "fd:out").unwrap();
    let mut magic = [0; 4];
    ours.read_exact(&mut magic).unwrap();
    assert_eq!(&magic, b"QEVM");

    qemu.0.kill().unwrap();
    assert!(matches!(qmp::query_status(&monitor), Err(MonitorError::Gone { .. })));
    while events.recv_timeout(PATIENCE).is_ok() {}
}
