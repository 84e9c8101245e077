//! A QEMU of a few lines that plays the peer's side of capture, with faults on order. It shares no code with the
//! readers.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use understudy_libvirt::{Monitor, MonitorError};

/// A moment in the protocol, before the bytes it is named after are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Precopy,
    Devices,
    Request,
    Send,
    Memory,
    DeviceBuffer,
}

impl Place {
    pub(super) const ALL: [Self; 6] =
        [Self::Precopy, Self::Devices, Self::Request, Self::Send, Self::Memory, Self::DeviceBuffer];
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    None,
    /// The process ends.
    Dies(Place),
    /// Nothing more is sent.
    Hangs(Place),
    /// Nonsense is sent.
    Garbage(Place),
    /// The socket is closed, the process lives.
    Closes(Place),
    /// REQUEST comes again instead of SEND.
    RequestTwice,
    /// The full copy ends with this status instead of `colo`, with the guest stopped.
    EndsAs(&'static str),
    /// Orders are not answered before the full copy is read, of which there is more than the socket holds.
    MonitorShut,
    /// `x-colo-lost-heartbeat` is refused the first time.
    HeartbeatRefused,
    /// `x-colo-lost-heartbeat` is accepted and has no effect.
    HeartbeatIgnored,
}

pub(super) struct State {
    pub(super) version: (u32, u32, u32),
    pub(super) capabilities: BTreeMap<&'static str, bool>,
    pub(super) parameters: Map<String, Value>,
    pub(super) run_state: &'static str,
    pub(super) status: Option<&'static str>,
    pub(super) mode: &'static str,
    pub(super) yank: bool,
    pub(super) gone: bool,
    pub(super) fault: Fault,
    /// COLO needs the return path.
    pub(super) return_path: bool,
    /// Set by a test's barrier; every LOADED must find it set.
    pub(super) barrier_done: bool,
    /// Breaches of the protocol by the peer.
    pub(super) complaints: Vec<String>,
    given: Option<UnixStream>,
    connection: Option<UnixStream>,
}

#[derive(Clone)]
pub(super) struct FakeQemu(Arc<Mutex<State>>);

impl FakeQemu {
    pub(super) fn new(version: (u32, u32, u32), fault: Fault) -> Self {
        let capabilities = ["events", "return-path", "multifd", "x-colo", "xbzrle"];
        let parameters = json!({"x-checkpoint-delay": 20_000, "max-bandwidth": 1 << 27, "downtime-limit": 300,
                                "multifd-channels": 2});
        Self(Arc::new(Mutex::new(State {
            version,
            capabilities: capabilities.into_iter().map(|name| (name, name == "xbzrle")).collect(),
            parameters: parameters.as_object().unwrap().clone(),
            run_state: "running",
            status: None,
            mode: "none",
            yank: false,
            gone: false,
            fault,
            return_path: version.0 >= 11,
            barrier_done: false,
            complaints: Vec::new(),
            given: None,
            connection: None,
        })))
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn migrate(&self) -> Result<Value, MonitorError> {
        let mut state = self.state();
        let socket = state.given.take().ok_or_else(|| refused("migrate", "no such descriptor"))?;
        state.connection = Some(socket.try_clone().unwrap());
        state.status = Some("active");
        state.yank = true;
        let qemu = self.clone();
        std::thread::spawn(move || Migration { qemu, socket }.run());
        Ok(json!({}))
    }

    /// As QEMU's monitor, which waits for a lock that is held while the last part of a copy is written.
    fn wait_while_shut(&self) -> Result<(), MonitorError> {
        let end = Instant::now() + SHORT * 10;
        while self.state().run_state == "running" && self.state().yank {
            if Instant::now() >= end {
                self.state().complaints.push("nothing is read while an order waits".into());
                let (command, reason) = ("migrate-set-parameters".into(), "it is not answered".into());
                return Err(MonitorError::Failed { command, reason });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn lost_heartbeat(&self) -> Result<Value, MonitorError> {
        let mut state = self.state();
        if state.mode != "primary" {
            return Err(refused("x-colo-lost-heartbeat", "VM is not in COLO mode"));
        }
        match state.fault {
            Fault::HeartbeatIgnored => return Ok(json!({})),
            Fault::HeartbeatRefused => {
                state.fault = Fault::None;
                return Err(refused("x-colo-lost-heartbeat", "try again"));
            }
            _ => {}
        }
        state.mode = "none";
        state.status = Some("completed");
        state.run_state = "running";
        state.yank = false;
        if let Some(connection) = state.connection.take() {
            let _ = connection.shutdown(Shutdown::Both);
        }
        Ok(json!({}))
    }

    fn set_capabilities(&self, arguments: &Value) -> Result<Value, MonitorError> {
        let mut state = self.state();
        let mut wanted = state.capabilities.clone();
        for entry in arguments["capabilities"].as_array().unwrap() {
            let name = entry["capability"].as_str().unwrap();
            let Some(slot) = wanted.iter_mut().find(|(known, _)| **known == name) else {
                return Err(refused("migrate-set-capabilities", "no such capability"));
            };
            *slot.1 = entry["state"].as_bool().unwrap();
        }
        if wanted["x-colo"] && wanted["return-path"] != state.return_path {
            let words = match state.return_path {
                true => "Capability 'x-colo' requires capability 'return-path'",
                // A real one takes it, and dies of it.
                false => "return-path is on",
            };
            return Err(refused("migrate-set-capabilities", words));
        }
        if state.yank {
            return Err(refused("migrate-set-capabilities", "There's a migration process in progress"));
        }
        state.capabilities = wanted;
        Ok(json!({}))
    }
}

fn refused(command: &str, desc: &str) -> MonitorError {
    MonitorError::Qmp { command: command.into(), class: "GenericError".into(), desc: desc.into() }
}

impl Monitor for FakeQemu {
    fn execute(&self, command: &str, arguments: Value) -> Result<Value, MonitorError> {
        if command == "migrate-set-parameters" && self.state().fault == Fault::MonitorShut {
            self.wait_while_shut()?;
        }
        let mut state = self.state();
        if state.gone {
            return Err(MonitorError::Gone { command: command.into(), reason: "dead".into() });
        }
        Ok(match command {
            "query-version" => {
                let (major, minor, micro) = state.version;
                json!({"qemu": {"major": major, "minor": minor, "micro": micro}, "package": ""})
            }
            "query-status" => json!({"status": state.run_state}),
            "query-migrate" => state.status.map_or(json!({}), |status| json!({"status": status})),
            "query-colo-status" => json!({"mode": state.mode}),
            "query-yank" if state.yank => json!([{"type": "migration"}]),
            "query-yank" => json!([]),
            "query-migrate-parameters" => Value::Object(state.parameters.clone()),
            "query-migrate-capabilities" => {
                state.capabilities.iter().map(|(name, on)| json!({"capability": name, "state": on})).collect()
            }
            "migrate-set-parameters" => {
                // An order to allow a longer stop may cross the end of the copy.
                let only_limit = arguments.as_object().unwrap().keys().all(|name| name == "downtime-limit");
                if state.mode == "primary" && !only_limit {
                    state.complaints.push("parameters set in COLO".into());
                }
                state.parameters.extend(arguments.as_object().unwrap().clone());
                json!({})
            }
            "cont" => {
                state.run_state = "running";
                json!({})
            }
            "stop" => {
                state.run_state = "paused";
                json!({})
            }
            "migrate" | "x-colo-lost-heartbeat" | "migrate-set-capabilities" => {
                drop(state);
                return match command {
                    "migrate" => self.migrate(),
                    "migrate-set-capabilities" => self.set_capabilities(&arguments),
                    _ => self.lost_heartbeat(),
                };
            }
            other => panic!("{other} must not be needed"),
        })
    }

    fn execute_with_fd(&self, command: &str, _: Value, fd: BorrowedFd<'_>) -> Result<Value, MonitorError> {
        assert_eq!(command, "getfd");
        self.state().given = Some(fd.try_clone_to_owned().unwrap().into());
        Ok(json!({}))
    }
}

/// The migration thread.
struct Migration {
    qemu: FakeQemu,
    socket: UnixStream,
}

/// The connection has come to an end, one way or the other.
struct Over;

impl Migration {
    fn run(mut self) {
        let mut in_colo = false;
        let _over = self.play(&mut in_colo);
        let mut state = self.qemu.state();
        // In COLO, QEMU waits for lost-heartbeat now, with the guest as it is.
        if !in_colo && !state.gone && state.status == Some("active") {
            state.status = Some("failed");
            state.run_state = "running";
        }
        if !in_colo {
            state.yank = false;
        }
    }

    fn play(&mut self, in_colo: &mut bool) -> Result<(), Over> {
        let fault = self.qemu.state().fault;
        self.put(Place::Precopy, &precopy(if fault == Fault::MonitorShut { 100 } else { 1 }))?;
        self.qemu.state().run_state = "finish-migrate";
        let sections = if fault == Fault::Garbage(Place::Devices) { vec![0xff; 64] } else { devices() };
        self.put(Place::Devices, &[sections, description()].concat())?;
        if let Fault::EndsAs(status) = fault {
            let mut state = self.qemu.state();
            state.status = Some(status);
            state.run_state = "postmigrate";
            return Err(Over);
        }
        if self.qemu.state().return_path {
            self.qemu.state().status = Some("device");
            let mut shut = [0; 8];
            self.socket.read_exact(&mut shut).map_err(|_| Over)?;
            self.expect("SHUT", &shut, &[0, 1, 0, 4, 0, 0, 0, 0]);
        }
        {
            let mut state = self.qemu.state();
            state.mode = "primary";
            state.status = Some("colo");
            *in_colo = true;
        }
        self.word("READY", 0)?;
        for n in 0u8.. {
            self.qemu.state().run_state = "running";
            self.put(Place::Request, &[0, 0, 0, 1])?;
            self.word("REPLY", 2)?;
            self.qemu.state().run_state = "colo";
            let send = if self.qemu.state().fault == Fault::RequestTwice { 1 } else { 3 };
            self.socket.set_nonblocking(true).map_err(|_| Over)?;
            let mut early = [0; 8];
            let early_bytes = rustix::net::recv(&self.socket, &mut early, rustix::net::RecvFlags::PEEK);
            self.socket.set_nonblocking(false).map_err(|_| Over)?;
            if early_bytes.is_ok_and(|(_, count)| count > 4) {
                self.qemu.state().complaints.push("LOADED before SEND".into());
            }
            self.put(Place::Send, &[0, 0, 0, send])?;
            self.put(Place::Memory, &memory(n))?;
            self.put(
                Place::DeviceBuffer,
                &[&[0, 0, 0, 4, 0, 0, 0, 0], &be32(devices().len())[..], &devices()].concat(),
            )?;
            self.word("RECEIVED", 5)?;
            self.word("LOADED", 6)?;
            let mut state = self.qemu.state();
            if !std::mem::take(&mut state.barrier_done) {
                state.complaints.push("LOADED before the barrier".into());
            }
        }
        Ok(())
    }

    fn put(&mut self, place: Place, bytes: &[u8]) -> Result<(), Over> {
        let fault = self.qemu.state().fault;
        match fault {
            Fault::Dies(at) if at == place => {
                let mut state = self.qemu.state();
                state.gone = true;
                state.connection = None;
                return Err(Over);
            }
            Fault::Closes(at) if at == place => {
                let _ = self.socket.shutdown(Shutdown::Both);
                return Err(Over);
            }
            Fault::Hangs(at) if at == place => {
                // Until somebody closes or shuts the connection down; what is said meanwhile is not heard.
                while self.socket.read(&mut [0; 64]).is_ok_and(|count| count > 0) {}
                return Err(Over);
            }
            Fault::Garbage(at) if at == place && at != Place::Devices => {
                self.socket.write_all(&[0xff; 64]).map_err(|_| Over)?;
            }
            _ => {}
        }
        // In pieces, so that records are cut off.
        for piece in bytes.chunks(1000) {
            self.socket.write_all(piece).map_err(|_| Over)?;
        }
        Ok(())
    }

    fn word(&mut self, name: &str, wanted: u32) -> Result<(), Over> {
        let mut word = [0; 4];
        self.socket.read_exact(&mut word).map_err(|_| Over)?;
        self.expect(name, &word, &wanted.to_be_bytes());
        Ok(())
    }

    fn expect(&self, name: &str, found: &[u8], wanted: &[u8]) {
        if found != wanted {
            self.qemu.state().complaints.push(format!("{name} expected, {found:?} found"));
        }
    }
}

pub(super) const RAM_PAGES: u64 = 16;

fn be32(n: usize) -> [u8; 4] {
    u32::try_from(n).unwrap().to_be_bytes()
}

fn counted(name: &str) -> Vec<u8> {
    [&[u8::try_from(name.len()).unwrap()], name.as_bytes()].concat()
}

/// Header, CONFIGURATION, ENABLE_COLO, block table, all pages (page n full of n) so many times, the end of memory.
fn precopy(times: u64) -> Vec<u8> {
    let mut v =
        b"QEVM\0\0\0\x03\x07\0\0\0\x06pc-7.2\x08\0\x08\0\0\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04".to_vec();
    v.extend(((RAM_PAGES * 4096) | 4).to_be_bytes());
    v.extend(counted("pc.ram"));
    v.extend((RAM_PAGES * 4096).to_be_bytes());
    v.extend(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02\x02\0\0\0\x02");
    for number in 0..times * RAM_PAGES {
        let page = number % RAM_PAGES;
        v.extend(((page * 4096) | if number == 0 { 0x8 } else { 0x28 }).to_be_bytes());
        if number == 0 {
            v.extend(counted("pc.ram"));
        }
        v.extend([u8::try_from(page).unwrap(); 4096]);
    }
    v.extend(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02\x03\0\0\0\x02\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02");
    v
}

pub(super) fn devices() -> Vec<u8> {
    b"\x04\0\0\0\x09\x05timer\0\0\0\0\0\0\0\x02\x01\x02\x03\x04\x05\x06\x07\x08\x7e\0\0\0\x09\0".to_vec()
}

fn description() -> Vec<u8> {
    let json = json!({"page_size": 4096, "devices": [{"name": "timer", "instance_id": 0, "vmsd_name": "timer",
        "version": 2, "fields": [{"name": "ticks", "type": "int64", "size": 8}]}]});
    let json = json.to_string();
    [&[6], &be32(json.len())[..], json.as_bytes()].concat()
}

/// Page 1 is all zeros, page 2 full of 100 + n; the block is that of the precopy.
fn memory(n: u8) -> Vec<u8> {
    let mut v = b"\x08\0\x0b\0\0\x03\0\0\0\x02".to_vec();
    v.extend((4096u64 | 0x22).to_be_bytes());
    v.push(0);
    v.extend((8192u64 | 0x28).to_be_bytes());
    v.extend([100u8.wrapping_add(n); 4096]);
    v.extend(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02\0");
    v
}

/// Bounds short enough for a test that runs into them, far longer than anything else takes, also beside a lab.
pub(super) const SHORT: Duration = Duration::from_millis(1200);
