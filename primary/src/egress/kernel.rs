//! The gate as the kernel's qdiscs make it.

use std::time::{Duration, Instant};

use netlink_packet_route::link::InfoKind;
use tracing::{info, warn};

use super::engine::Kind;
use super::netlink::Route;
use super::netlink::filter::Incoming;
use super::netlink::link::Device;
use super::netlink::plug::{Action, Root};
use super::watch::Watcher;
use super::{
    DRAIN_LIMIT, GateEngine, GateError, Held, LIMIT_BYTES, Op, OutputGate, Port, Watch, gate_device,
};

/// Between two looks at frames that are on their way out.
const DRAIN_POLL: Duration = Duration::from_micros(200);

/// One interface with its gate.
#[derive(Debug)]
struct Gated {
    port: Port,
    /// The guest's device.
    device: Device,
    /// The ifb with the `plug`; a macvtap has it itself.
    ifb: Option<Device>,
}

impl Gated {
    /// Where the `plug` is.
    fn plug(&self) -> &Device {
        self.ifb.as_ref().unwrap_or(&self.device)
    }
}

/// The gate of a guest in this host's kernel.
#[derive(Debug)]
pub struct NetlinkGate {
    route: Route,
    gated: Vec<Gated>,
    watcher: Watcher,
    /// Frames dropped by gates that are gone.
    dropped: u64,
}

impl NetlinkGate {
    /// Whether the interfaces can be gated; nothing is touched.
    ///
    /// # Errors
    /// [`GateError`] of the first one that cannot, here and below.
    pub fn check(ports: &[Port]) -> Result<(), GateError> {
        let mut route = Route::open()?;
        ports.iter().try_for_each(|port| look(&mut route, port).map(drop))
    }

    /// Gates the interfaces of a guest, letting everything through; gates that an earlier agent has left are taken
    /// over, shut. Blocks, as everything here.
    ///
    /// # Errors
    /// See above; then none is gated that was not before.
    pub fn install(ports: &[Port]) -> Result<(Self, GateEngine), GateError> {
        let mut gate =
            Self { route: Route::open()?, gated: Vec::new(), watcher: Watcher::new()?, dropped: 0 };
        // One that is found makes all of them hold what comes: the guest is under protection.
        let mut found = false;
        for port in ports {
            found |= matches!(look(&mut gate.route, port)?, Place::Found { .. });
        }
        if let Err(error) = gate.adjust(ports, found) {
            if !found && let Err(error) = gate.remove() {
                warn!(%error, "a gate that was begun cannot be taken away");
            }
            return Err(error);
        }
        let engine = if found { GateEngine::found() } else { GateEngine::open() };
        Ok((gate, engine))
    }

    /// What tells when a frame waits.
    ///
    /// # Errors
    /// If the system gives no descriptor.
    pub fn watch(&self) -> Result<Watch, GateError> {
        self.watcher.watch()
    }

    pub(super) fn tell(&mut self, kind: Kind) -> Result<(), GateError> {
        match kind {
            Kind::Seal => {
                self.tell_all(Action::Buffer)?;
                self.watcher.clear();
                Ok(())
            }
            Kind::ReleaseSealed => self.tell_all(Action::ReleaseOne),
            Kind::Flush => {
                let left = self.tell_all(Action::ReleaseIndefinite).and_then(|()| self.drain_all());
                // Shut again whatever became of it (invariant 7).
                let shut = self.tell_all(Action::Buffer);
                self.watcher.clear();
                shut.and(left)
            }
        }
    }

    /// Test hook: everything but IPv4 passes the gate by.
    #[cfg(feature = "test-hooks")]
    pub(super) fn gate_ipv4_only(&mut self) -> Result<(), GateError> {
        for gated in &self.gated {
            let device = &gated.device;
            self.route.redirect_ipv4_only(device.index, &device.name, gated.plug().index)?;
        }
        Ok(())
    }

    /// Whether the gate is as it was made. That of a device that is gone is: nothing comes through it.
    fn stands(&mut self, gated: &Gated) -> Result<bool, GateError> {
        Ok(match look(&mut self.route, &gated.port) {
            Ok(Place::Found { device, ifb }) => {
                (device.index, ifb.map(|ifb| ifb.index))
                    == (gated.device.index, gated.ifb.as_ref().map(|ifb| ifb.index))
            }
            Ok(Place::Free { .. }) | Err(GateError::Occupied { .. }) => false,
            Err(GateError::NoDevice { .. }) => true,
            Err(error) => return Err(error),
        })
    }

    fn tell_all(&mut self, action: Action) -> Result<(), GateError> {
        // All of them, whatever happens to one: what is not told holds too much, and that is mended by a full copy.
        let mut result = Ok(());
        for gated in &self.gated {
            let plug = gated.plug();
            result = result.and(self.route.plug(plug.index, &plug.name, action));
        }
        result
    }

    fn drain_all(&mut self) -> Result<(), GateError> {
        let end = Instant::now() + DRAIN_LIMIT;
        self.gated.iter().try_for_each(|gated| drain(&mut self.route, gated, end))
    }

    /// Takes one gate away. The device of the guest may be gone.
    fn take_away(&mut self, gated: &Gated) -> Result<(), GateError> {
        let plug = gated.plug();
        if let Ok(held) = self.route.held(plug.index, &plug.name) {
            self.dropped += held.dropped;
        }
        self.watcher.forget(gated.device.index);
        let there = self.route.device(&gated.device.name)?.is_some_and(|now| now.index == gated.device.index);
        let Some(ifb) = &gated.ifb else {
            return if there { self.route.replace_plug(plug.index, &plug.name) } else { Ok(()) };
        };
        if there {
            self.route.delete_ingress(gated.device.index, &gated.device.name)?;
            // What had been redirected before.
            drain(&mut self.route, gated, Instant::now() + DRAIN_LIMIT)?;
        }
        self.route.delete(ifb)
    }
}

impl OutputGate for NetlinkGate {
    fn apply(&mut self, op: Op) -> Result<(), GateError> {
        self.tell(op.kind())
    }

    fn held(&mut self) -> Result<Held, GateError> {
        let mut all = Held { dropped: self.dropped, ..Held::default() };
        for gated in &self.gated {
            let plug = gated.plug();
            let held = self.route.held(plug.index, &plug.name)?;
            all.frames += held.frames;
            all.bytes += held.bytes;
            all.dropped += held.dropped;
        }
        Ok(all)
    }

    fn adjust(&mut self, ports: &[Port], shut: bool) -> Result<(), GateError> {
        let (stay, go): (Vec<_>, Vec<_>) =
            self.gated.drain(..).partition(|gated| ports.contains(&gated.port));
        // Those that somebody took away are made anew below, out of what is left of them.
        for gated in stay {
            if self.stands(&gated)? {
                self.gated.push(gated);
            } else {
                self.watcher.forget(gated.device.index);
            }
        }
        for gated in go {
            info!(device = gated.port.device, "the interface is gone, and its gate with it");
            self.take_away(&gated)?;
        }
        for port in ports {
            if !self.gated.iter().any(|gated| gated.port == *port) {
                let gated = gate(&mut self.route, port, shut)?;
                self.watcher.add(&gated.device, gated.ifb.is_some());
                self.gated.push(gated);
            }
        }
        Ok(())
    }

    fn intact(&mut self) -> Result<(), GateError> {
        let gated = std::mem::take(&mut self.gated);
        let result = gated.iter().try_for_each(|gated| match self.stands(gated) {
            Ok(false) => Err(GateError::TakenAway { device: gated.port.device.clone() }),
            Ok(true) => Ok(()),
            Err(error) => Err(error),
        });
        self.gated = gated;
        result
    }

    fn remove(&mut self) -> Result<(), GateError> {
        let mut result = self.tell_all(Action::ReleaseIndefinite).and_then(|()| self.drain_all());
        for gated in std::mem::take(&mut self.gated) {
            result = result.and(self.take_away(&gated));
        }
        result
    }

    fn discard(&mut self) -> Result<(), GateError> {
        let mut result = Ok(());
        for gated in std::mem::take(&mut self.gated) {
            self.watcher.forget(gated.device.index);
            // The redirect stays as long as the guest's device: it now leads nowhere. A macvtap keeps its plug.
            if let Some(ifb) = &gated.ifb {
                result = result.and(self.route.delete(ifb));
            }
        }
        result
    }
}

/// What is where a gate is to be.
enum Place {
    /// An earlier agent's gate.
    Found { device: Device, ifb: Option<Device> },
    /// Nothing, or what an earlier agent had begun.
    Free { device: Device, remains: Option<Device>, ingress: bool },
}

fn look(route: &mut Route, port: &Port) -> Result<Place, GateError> {
    let name = &port.device;
    let device = route.device(name)?.ok_or_else(|| GateError::NoDevice { device: name.clone() })?;
    let occupied = |reason: String, remedy: &str| GateError::Occupied {
        device: name.clone(),
        reason,
        remedy: format!("{remedy}, or give --ungated to protect the guest without output commit"),
    };
    if device.kind == Some(InfoKind::MacVtap) {
        return match route.root(device.index, name)? {
            Root::Gate => Ok(Place::Found { device, ifb: None }),
            Root::Default | Root::NoQueue => Ok(Place::Free { device, remains: None, ingress: false }),
            Root::Other(kind) => Err(occupied(
                format!("its root qdisc is a {kind}, as <bandwidth> of the domain makes one"),
                "take the <bandwidth> out of the interface",
            )),
        };
    }
    let ifb = route.device(&gate_device(name))?;
    if let Some(ifb) = &ifb
        && ifb.kind != Some(InfoKind::Ifb)
    {
        return Err(occupied(format!("there is another device called {}", ifb.name), "rename that device"));
    }
    match (route.incoming(device.index, name)?, ifb) {
        (Incoming::Plain, remains) => Ok(Place::Free { device, remains, ingress: false }),
        // `ingress` is what earlier agents made.
        (Incoming::Idle(kind), remains @ Some(_)) if ["clsact", "ingress"].contains(&kind.as_str()) => {
            Ok(Place::Free { device, remains, ingress: true })
        }
        (Incoming::Redirected(to), Some(ifb))
            if to == ifb.index && route.root(ifb.index, &ifb.name)? == Root::Gate =>
        {
            Ok(Place::Found { device, ifb: Some(ifb) })
        }
        // What is left of a gate whose device somebody has deleted: everything goes nowhere.
        (Incoming::Redirected(0), remains) => Ok(Place::Free { device, remains, ingress: true }),
        (Incoming::Idle(kind), _) => {
            Err(occupied(format!("somebody has put a {kind} qdisc on it"), "take that qdisc away"))
        }
        (Incoming::Redirected(_), _) => Err(occupied(
            "what it takes in is already redirected elsewhere".to_owned(),
            "take that redirect away",
        )),
        (Incoming::Other(what), _) => Err(occupied(
            format!("it has {what}, as <bandwidth> with <outbound> of the domain makes one"),
            "take the <outbound> limit out of the interface",
        )),
    }
}

/// Gates one interface, or takes over its gate.
fn gate(route: &mut Route, port: &Port, shut: bool) -> Result<Gated, GateError> {
    match look(route, port)? {
        Place::Found { device, ifb } => {
            let gated = Gated { port: port.clone(), device, ifb };
            let plug = gated.plug();
            info!(device = port.device, gate = plug.name, "an earlier agent's gate is taken over, shut");
            // It may have been open: of a guest that was not protected yet, and is about to be.
            route.plug(plug.index, &plug.name, Action::Buffer)?;
            Ok(gated)
        }
        Place::Free { device, remains, ingress } => {
            if ingress {
                route.delete_ingress(device.index, &device.name)?;
            }
            if let Some(remains) = remains {
                route.delete(&remains)?;
            }
            if device.kind == Some(InfoKind::MacVtap) {
                plug_on(route, &device, shut)?;
                return Ok(Gated { port: port.clone(), device, ifb: None });
            }
            let ifb = route.add_ifb(&gate_device(&port.device))?;
            if let Err(error) = redirect(route, &device, &ifb, shut) {
                // Without the redirect nothing is held in it.
                if let Err(error) = route.delete(&ifb) {
                    warn!(%error, "a gate that was begun cannot be taken away");
                }
                return Err(error);
            }
            Ok(Gated { port: port.clone(), device, ifb: Some(ifb) })
        }
    }
}

fn plug_on(route: &mut Route, device: &Device, shut: bool) -> Result<(), GateError> {
    route.add_plug(device.index, &device.name, LIMIT_BYTES)?;
    // It was made shut.
    if shut { Ok(()) } else { route.plug(device.index, &device.name, Action::ReleaseIndefinite) }
}

fn redirect(route: &mut Route, device: &Device, ifb: &Device, shut: bool) -> Result<(), GateError> {
    plug_on(route, ifb, shut)?;
    route.set_up(ifb)?;
    route.add_ingress(device.index, &device.name)?;
    route.add_redirect(device.index, &device.name, ifb.index).inspect_err(|_| {
        if let Err(error) = route.delete_ingress(device.index, &device.name) {
            warn!(%error, "a gate that was begun cannot be taken away");
        }
    })
}

/// Waits until what was released has left: the qdisc, and the ifb behind it, which has a queue of its own.
fn drain(route: &mut Route, gated: &Gated, end: Instant) -> Result<(), GateError> {
    let plug = gated.plug();
    loop {
        let waiting = route.held(plug.index, &plug.name)?.frames;
        let inside = match &gated.ifb {
            Some(ifb) => route.device(&ifb.name)?.map_or(0, |now| now.inside),
            None => 0,
        };
        if waiting + inside == 0 {
            return Ok(());
        }
        if Instant::now() >= end {
            let device = plug.name.clone();
            return Err(GateError::NotDrained { device, frames: waiting + inside, limit: DRAIN_LIMIT });
        }
        std::thread::sleep(DRAIN_POLL);
    }
}
