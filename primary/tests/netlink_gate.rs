//! The gate in a kernel: a veth pair stands for a guest's tap. It needs root and a kernel with `plug`; without them it
//! says so and is left out.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test ends by panicking")]

use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::runtime::{Builder, Runtime};
use understudy_primary::egress::{GateError, NetlinkGate, Port, Sealing, SharedKeeper, State, Watch};
use understudy_proto::epoch::{Captured, Committed, EpochKind};
use understudy_proto::ids::{EpochId, Generation};

/// Only a bound: what is released arrives in microseconds.
const ARRIVES: Duration = Duration::from_secs(5);

/// What has not arrived by then was held. Too short it would let a leak pass, never fail a gate that holds.
const HELD: Duration = Duration::from_millis(300);

fn sh(script: &str) -> bool {
    Command::new("sh").args(["-ec", script]).status().unwrap().success()
}

/// A network namespace, for as long as a process lives in it.
struct Namespace(Child);

impl Namespace {
    fn new() -> Option<Self> {
        let child =
            Command::new("unshare").args(["-n", "sleep", "300"]).stderr(Stdio::null()).spawn().ok()?;
        let mut namespace = Self(child);
        let ours = std::fs::read_link("/proc/self/ns/net").ok()?;
        while std::fs::read_link(namespace.path()).is_ok_and(|theirs| theirs == ours) {
            // It ends by itself if it may not.
            if namespace.0.try_wait().ok()?.is_some() {
                return None;
            }
            std::thread::yield_now();
        }
        Some(namespace)
    }

    fn path(&self) -> String {
        format!("/proc/{}/ns/net", self.0.id())
    }

    /// Puts the calling thread into it.
    fn enter(&self) -> bool {
        std::fs::File::open(self.path()).is_ok_and(|file| {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).is_ok()
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A network of its own with a "guest" in another one, behind the "tap" gv0.
struct World {
    _net: Namespace,
    guest: Namespace,
    host: UdpSocket,
}

impl World {
    fn new() -> Option<Self> {
        let net = Namespace::new().filter(Namespace::enter);
        let Some(net) = net else {
            println!("skipped: no network namespace can be made, which needs root");
            return None;
        };
        let plug = "ip link add probe type ifb && ip link set probe up && modprobe sch_plug 2>/dev/null; \
                    tc qdisc add dev probe root plug 2>/dev/null && ip link del probe";
        if !sh(plug) {
            println!("skipped: this kernel has no ifb or no plug");
            return None;
        }
        let guest = Namespace::new()?;
        let pid = guest.0.id();
        let script = format!(
            "ip link add gv0 address 02:00:00:00:00:01 type veth peer name gv1 address 02:00:00:00:00:02
             ip link set gv1 netns {pid}
             ip addr add 10.9.0.1/24 dev gv0; ip link set gv0 up; ip link set lo up
             in=\"nsenter -t {pid} -n\"
             $in sh -c 'echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6'
             $in ip addr add 10.9.0.2/24 dev gv1; $in ip link set gv1 up
             $in ip neigh add 10.9.0.1 lladdr 02:00:00:00:00:01 dev gv1"
        );
        assert!(sh(&script));
        let host = UdpSocket::bind("10.9.0.1:4000").unwrap();
        Some(Self { _net: net, guest, host })
    }

    /// The guest sends these numbers.
    fn send(&self, numbers: std::ops::Range<u32>) {
        let script = format!(
            "nsenter -t {} -n bash -c 'for i in $(seq {} {}); do echo $i > /dev/udp/10.9.0.1/4000; done'",
            self.guest.0.id(),
            numbers.start,
            numbers.end - 1
        );
        assert!(sh(&script));
    }

    /// Exactly these arrive, in this order, and nothing behind them.
    fn arrive(&self, numbers: std::ops::Range<u32>) {
        let mut buffer = [0; 64];
        self.host.set_read_timeout(Some(ARRIVES)).unwrap();
        for number in numbers {
            let length =
                self.host.recv(&mut buffer).unwrap_or_else(|e| panic!("{number} does not arrive: {e}"));
            assert_eq!(String::from_utf8_lossy(&buffer[..length]).trim(), number.to_string());
        }
        self.host.set_read_timeout(Some(HELD)).unwrap();
        if let Ok(length) = self.host.recv(&mut buffer) {
            panic!("{:?} has left", String::from_utf8_lossy(&buffer[..length]));
        }
    }
}

fn committed(epoch: u64) -> Committed {
    Captured::new(Generation(1), EpochId(epoch)).acknowledged(Generation(1), EpochId(epoch)).unwrap()
}

fn install(ports: &[Port]) -> SharedKeeper {
    let (gate, engine) = NetlinkGate::install(ports).unwrap();
    SharedKeeper::new(engine, Box::new(gate))
}

/// What the gate tells by itself.
struct Told {
    runtime: Runtime,
    watch: Watch,
}

impl Told {
    fn listen(gate: &NetlinkGate) -> Self {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let watch = runtime.block_on(async { gate.watch().unwrap() });
        Self { runtime, watch }
    }

    /// Something was taken out of the host's network since the last question.
    fn deletion(&self) -> bool {
        self.runtime.block_on(async { tokio::time::timeout(HELD, self.watch.deletion()).await.is_ok() })
    }
}

/// One test: each part begins where the one before has ended.
#[test]
fn the_gate_holds_releases_survives_its_agent_and_loses_nothing() {
    let Some(world) = World::new() else { return };
    let ports = [Port { device: "gv0".to_owned() }];
    NetlinkGate::check(&ports).unwrap();

    // Open: everything goes through.
    let keeper = install(&ports);
    assert_eq!(keeper.state(), State::Open);
    world.send(0..3);
    world.arrive(0..3);

    // Shut from the end of the full copy on; each commit lets out exactly its epoch.
    assert_eq!(keeper.stopped(EpochId(1), EpochKind::Full).unwrap(), Sealing::RunOn);
    world.send(3..5);
    world.arrive(0..0);
    assert_eq!(keeper.held().unwrap().frames, 2);
    keeper.committed(&committed(1)).unwrap();
    world.arrive(0..0);
    keeper.stopped(EpochId(2), EpochKind::Delta).unwrap();
    world.send(5..9);
    keeper.committed(&committed(2)).unwrap();
    world.arrive(3..5);
    keeper.stopped(EpochId(3), EpochKind::Delta).unwrap();
    keeper.committed(&committed(3)).unwrap();
    world.arrive(5..9);

    // The agent dies with a sealed epoch; its successor lets out nothing before a full copy is committed.
    keeper.stopped(EpochId(4), EpochKind::Delta).unwrap();
    world.send(9..11);
    drop(keeper);
    world.send(11..13);
    world.arrive(0..0);
    let keeper = install(&ports);
    assert_eq!(keeper.state(), State::Tangled);
    world.send(13..15);
    world.arrive(0..0);
    let (other, _) = NetlinkGate::install(&ports).unwrap();
    let told = Told::listen(&other);
    drop(other);
    assert_eq!(keeper.stopped(EpochId(5), EpochKind::Full).unwrap(), Sealing::StayStopped);
    world.arrive(0..0);
    keeper.committed(&committed(5)).unwrap();
    world.arrive(9..15);
    keeper.resuming();
    world.send(15..17);
    world.arrive(0..0);
    assert!(!told.deletion(), "its own work on the qdisc is nothing to look at");

    // As Open vSwitch does to its ports: it means another qdisc. Who means this one is noticed.
    assert!(sh("! tc qdisc del dev gv0 ingress 2>/dev/null"));
    keeper.intact().unwrap();
    world.arrive(0..0);
    assert!(!told.deletion());
    assert!(sh("tc qdisc del dev gv0 clsact"));
    assert!(told.deletion());
    assert!(matches!(keeper.intact(), Err(GateError::TakenAway { .. })));
    assert!(matches!(keeper.stopped(EpochId(6), EpochKind::Delta), Err(GateError::Hole { .. })));
    keeper.adjust(&ports).unwrap();
    keeper.intact().unwrap();
    told.deletion();
    assert!(sh("ip link del usg-gv0"));
    assert!(told.deletion());
    assert!(matches!(keeper.intact(), Err(GateError::TakenAway { .. })));
    keeper.adjust(&ports).unwrap();
    keeper.intact().unwrap();
    world.send(15..17);
    world.arrive(0..0);

    // Taken away with frames in it: none is lost, and what follows goes its usual way.
    keeper.remove().unwrap();
    world.arrive(15..17);
    world.send(17..19);
    world.arrive(17..19);
    assert!(sh("! ip link show usg-gv0 2>/dev/null && ! tc qdisc show dev gv0 | grep -E 'clsact|ingress'"));

    // What somebody else has put there is not touched.
    assert!(sh(
        "tc qdisc add dev gv0 ingress && tc filter add dev gv0 parent ffff: protocol all u32 match u8 0 0 action pass"
    ));
    let error = NetlinkGate::check(&ports).unwrap_err();
    assert!(matches!(error, GateError::Occupied { .. }), "{error}");
    assert!(NetlinkGate::install(&ports).is_err());
    assert!(sh("tc filter show dev gv0 parent ffff: | grep -q u32 && ! ip link show usg-gv0 2>/dev/null"));
    world.send(19..20);
    world.arrive(19..20);
    let error = NetlinkGate::check(&[Port { device: "gone0".to_owned() }]).unwrap_err();
    assert_eq!(error.to_string(), "there is no network device gone0");

    // A macvtap as libvirt makes it is gated at its root, and is as it was afterwards; one with a limit is refused.
    assert!(sh("modprobe macvtap 2>/dev/null; ip link add mv0 link gv0 type macvtap mode bridge
        ip link set mv0 up; tc qdisc replace dev mv0 root noqueue"));
    let ports = [Port { device: "mv0".to_owned() }];
    let keeper = install(&ports);
    keeper.intact().unwrap();
    assert!(sh("tc qdisc show dev mv0 | grep -q 'plug.*root'"));
    keeper.remove().unwrap();
    assert!(sh("tc qdisc show dev mv0 | grep -q 'noqueue.*root'"));
    assert!(sh("tc qdisc replace dev mv0 root pfifo"));
    assert!(matches!(NetlinkGate::check(&ports), Err(GateError::Occupied { .. })));
}
