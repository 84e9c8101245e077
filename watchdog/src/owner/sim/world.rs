//! Time, network, arbiter and chance.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use understudy_proto::heartbeat::Heartbeat;
use understudy_proto::ids::{EpochId, Generation, GuestId};
use understudy_proto::ownership::{Owner, Ownership, Term};

use super::super::model::Bug;
use super::super::{
    Command, Engine, Event, Input, LostBackup, Output, Policies, QemuCrash, Role, Sending, Timing,
};
use super::Fault;
use super::agent::{Agents, Copy, incarnation};

const HOSTS: [&str; 2] = ["a", "b"];
/// Until then things fail, in milliseconds.
const CHAOS: u64 = 40_000;
/// By then the guest must be served again.
const END: u64 = 110_000;
const EPOCH: u64 = 100;

/// What happened in a world.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) takeovers: u64,
    pub(super) solos: u64,
    pub(super) reclaims: u64,
    pub(super) protected_again: u64,
    pub(super) destroyed: u64,
    /// No copy of the guest was left.
    pub(super) lost: u64,
}

impl Seen {
    pub(super) fn add(&mut self, other: &Self) {
        self.takeovers += other.takeovers;
        self.solos += other.solos;
        self.reclaims += other.reclaims;
        self.protected_again += other.protected_again;
        self.destroyed += other.destroyed;
        self.lost += other.lost;
    }
}

#[derive(Debug, Clone)]
enum What {
    /// The guest of a host executes an epoch, if there is one.
    Epoch(usize),
    /// The watchdog of a host sends heartbeats, and looks at its agents.
    Beat(usize),
    Tick(usize, u64),
    Heard(usize, Heartbeat),
    /// A checkpoint arrives at the backup of this life; the second is its length.
    Checkpoint(usize, u64, Copy),
    Held(usize, u64, Copy),
    Ack(usize, u64, u64, u64),
    /// At the arbiter.
    Swap(Ownership),
    Read(usize, u64),
    Record(usize, u64, Option<Ownership>),
    Loaded(usize, u64, u64),
    Fail(u64),
    Return(usize),
    DogReturns(usize),
    Heal(Cut),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    /// From a host, on a path: 0 replication, 1 management.
    Path(usize, usize),
    Arbiter(usize),
    Witness,
}

#[derive(Debug)]
struct Host {
    up: bool,
    agents: Agents,
    /// `None`: it is dead. The number is that of its life.
    dog: Option<(u64, Engine)>,
    lives: u64,
    /// It does nothing until then.
    frozen: u64,
    beats: u64,
    peer: Option<Heartbeat>,
    seeding_since: Option<u64>,
}

pub(super) struct World {
    fault: Fault,
    chance: u64,
    now: u64,
    origin: Instant,
    order: u64,
    queue: BinaryHeap<Reverse<(u64, u64)>>,
    what: std::collections::HashMap<u64, What>,
    hosts: [Host; 2],
    cuts: Vec<Cut>,
    record: Option<Ownership>,
    out: Vec<u16>,
    last_out: u64,
    instances: u16,
    policies: Policies,
    seen: Seen,
    violation: Option<String>,
}

impl World {
    pub(super) fn new(seed: u64, fault: Fault) -> Self {
        let host = |n| Host {
            up: true,
            agents: Agents::new(n == 0),
            dog: None,
            lives: 0,
            frozen: 0,
            beats: 0,
            peer: None,
            seeding_since: None,
        };
        let mut world = Self {
            fault,
            chance: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15),
            now: 0,
            origin: Instant::now(),
            order: 0,
            queue: BinaryHeap::new(),
            what: std::collections::HashMap::new(),
            hosts: [host(0), host(1)],
            cuts: Vec::new(),
            record: None,
            out: Vec::new(),
            last_out: 0,
            instances: 1,
            policies: Policies::default(),
            seen: Seen::default(),
            violation: None,
        };
        let solo = world.below(4) > 0;
        world.policies.lost_backup = if solo { LostBackup::Solo } else { LostBackup::Hold };
        world.policies.qemu_crash = QemuCrash::Failover;
        for n in 0..2 {
            world.start_dog(n);
            world.at(world.now + n as u64 * 7, What::Epoch(n));
            world.at(world.now + n as u64 * 13, What::Beat(n));
        }
        for _ in 0..world.below(10) + 1 {
            let (when, what) = (3000 + world.below(CHAOS - 3000), world.next());
            world.at(when, What::Fail(what));
        }
        world
    }

    /// Splitmix64.
    fn next(&mut self) -> u64 {
        self.chance = self.chance.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.chance;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    fn at(&mut self, when: u64, what: What) {
        self.order += 1;
        self.queue.push(Reverse((when.max(self.now), self.order)));
        self.what.insert(self.order, what);
    }

    fn cut(&self, cut: Cut) -> bool {
        self.cuts.contains(&cut)
    }

    fn instant(&self) -> Instant {
        self.origin + Duration::from_millis(self.now)
    }

    fn wrong(&mut self, what: String) {
        let now = self.now;
        self.violation.get_or_insert_with(|| format!("at {now} ms: {what}"));
    }

    pub(super) fn live(&mut self) -> Result<Seen, String> {
        while let Some(Reverse((when, order))) = self.queue.pop() {
            if when > END {
                break;
            }
            self.now = when;
            let Some(what) = self.what.remove(&order) else { continue };
            self.happen(what);
            self.check();
            if let Some(violation) = self.violation.take() {
                return Err(violation);
            }
        }
        self.served()?;
        Ok(self.seen.clone())
    }

    fn check(&mut self) {
        let serving: Vec<usize> =
            (0..2).filter(|n| self.hosts[*n].up && self.hosts[*n].agents.serves()).collect();
        if serving.len() > 1 {
            self.wrong("invariant 4: both hosts serve".into());
        }
        for n in serving {
            let hist = &self.hosts[n].agents.hist;
            if hist.len() < self.out.len() {
                self.wrong(format!("invariant 1: {} serves and lacks output that was let out", HOSTS[n]));
            }
        }
    }

    /// In the end.
    fn served(&mut self) -> Result<(), String> {
        if self.last_out + 3000 >= END {
            return Ok(());
        }
        let left = self
            .hosts
            .iter()
            .any(|host| host.agents.runs && !host.agents.hangs || host.agents.image.is_some());
        if !left {
            self.seen.lost += 1;
            return Ok(());
        }
        // An image that the owner of the past has left behind is nobody's to start.
        let roles: Vec<_> = self
            .hosts
            .iter()
            .map(|host| host.dog.as_ref().map(|(_, dog)| dog.protocol().role().clone()))
            .collect();
        let usable = self.hosts.iter().enumerate().any(|(n, host)| {
            let running = host.agents.runs && !host.agents.hangs;
            match self.record.as_ref().map(|record| (&record.owner, record.generation)) {
                Some((Owner::Pair { primary, backup, incarnation: of }, generation)) => {
                    (primary == HOSTS[n] && running)
                        || (backup == HOSTS[n]
                            && host.agents.image.as_ref().is_some_and(|image| {
                                image.generation == generation.0 && incarnation(host.agents.life) == *of
                            }))
                }
                Some((Owner::Solo { owner }, _)) => {
                    owner == HOSTS[n] && (running || host.agents.image.is_some())
                }
                Some((Owner::Claim { by, from, .. }, _)) => {
                    (from == HOSTS[n] && running) || (by == HOSTS[n] && host.agents.image.is_some())
                }
                Some((Owner::Ended { .. }, _)) | None => false,
            }
        });
        if !usable {
            self.seen.lost += 1;
            return Ok(());
        }
        let agents: Vec<_> = self
            .hosts
            .iter()
            .map(|host| {
                (
                    &host.agents.runs,
                    host.agents.gated,
                    host.agents.paused,
                    host.agents.image.as_ref().map(|i| (i.number, i.generation)),
                )
            })
            .collect();
        Err(format!(
            "nothing was let out since {} ms; record {:?}, roles {roles:?}, agents {agents:?}, {:?}",
            self.last_out, self.record, self.policies
        ))
    }

    fn start_dog(&mut self, n: usize) {
        let host = &mut self.hosts[n];
        host.lives += 1;
        host.peer = None;
        host.seeding_since = None;
        let origin = self.origin + Duration::from_millis(self.now);
        let mut dog = Engine::new(
            HOSTS[n],
            self.policies,
            Timing { claim_patience: Duration::from_secs(6), ..Timing::default() },
            origin,
        );
        if let Fault::Engine(bug) = self.fault {
            dog.protocol_mut().bug = bug;
        }
        host.dog = Some((host.lives, dog));
        let local = host.agents.local();
        self.tell(n, Input::Event(Event::Local(local)));
    }

    /// The watchdog of a host, if it lives and is not stopped.
    fn tell(&mut self, n: usize, input: Input) {
        let now = self.instant();
        let host = &mut self.hosts[n];
        if !host.up || self.now < host.frozen {
            return;
        }
        let Some((life, dog)) = &mut host.dog else { return };
        let life = *life;
        let outputs = dog.step(input, now);
        let due = dog.deadline().saturating_duration_since(self.origin).as_millis();
        self.at(u64::try_from(due).unwrap().max(self.now + 1), What::Tick(n, life));
        for output in outputs {
            match output {
                Output::Command(command) => self.carry_out(n, life, command),
                Output::Suspected(_) => {
                    if self.fault == Fault::Engine(Bug::SoloWithoutSwap)
                        && matches!(self.role(n), Some(Role::Protected | Role::Asking))
                        && self.policies.lost_backup == LostBackup::Solo
                    {
                        self.open(n);
                    }
                }
                Output::Became(Role::Protected) if self.term() > Term(2) => self.seen.protected_again += 1,
                Output::Became(_) | Output::Heard => {}
                Output::TookOver(_) => self.seen.takeovers += 1,
            }
        }
    }

    fn role(&self, n: usize) -> Option<Role> {
        self.hosts[n].dog.as_ref().map(|(_, dog)| dog.protocol().role().clone())
    }

    fn term(&self) -> Term {
        self.record.as_ref().map_or(Term::NONE, |record| record.term)
    }

    /// Most things take little; some take very long.
    fn delay(&mut self) -> u64 {
        match self.below(50) {
            0 => 500 + self.below(5000),
            1..=5 => 50 + self.below(300),
            _ => 1 + self.below(20),
        }
    }

    fn open(&mut self, n: usize) {
        let agents = &mut self.hosts[n].agents;
        if agents.runs {
            agents.gated = false;
            agents.streaming = false;
            let all = agents.hist.len();
            self.release(n, all);
        }
    }

    fn release(&mut self, n: usize, upto: usize) {
        let agents = &mut self.hosts[n].agents;
        let upto = upto.min(agents.hist.len());
        for at in agents.released..upto {
            let what = agents.hist[at];
            match self.out.get(at) {
                Some(seen) if *seen == what => {}
                Some(seen) => {
                    let text =
                        format!("invariant 1: epoch {at} was let out by instance {seen} and by {what}");
                    let now = self.now;
                    self.violation.get_or_insert_with(|| format!("at {now} ms: {text}"));
                }
                None if at == self.out.len() => self.out.push(what),
                // Committed, but the primary died before it let it out: lost on the wire, as a frame may be.
                None => self.out.extend_from_slice(&agents.hist[self.out.len()..=at]),
            }
            self.last_out = self.now;
        }
        agents.released = agents.released.max(upto);
    }

    fn carry_out(&mut self, n: usize, life: u64, command: Command) {
        let reaches = !self.cut(Cut::Arbiter(n)) && !self.cut(Cut::Witness);
        let delay = self.delay();
        match command {
            Command::Read if reaches => self.at(self.now + delay, What::Read(n, life)),
            Command::Swap(new) if reaches => {
                self.at(self.now + delay, What::Swap(new.clone()));
                if self.below(10) == 0 {
                    let again = self.delay() * 3;
                    self.at(self.now + again, What::Swap(new));
                }
            }
            Command::Read | Command::Swap(_) => {}
            Command::HoldGate(term) => {
                let agents = &mut self.hosts[n].agents;
                agents.gate_term = agents.gate_term.max(term);
                agents.gated = true;
            }
            Command::OpenGate(term) => {
                if term >= self.hosts[n].agents.gate_term {
                    self.hosts[n].agents.gate_term = term;
                    self.open(n);
                }
            }
            Command::PauseGuest(_) => self.hosts[n].agents.paused = true,
            Command::ResumeGuest(_) => {
                self.seen.reclaims += 1;
                self.hosts[n].agents.paused = false;
            }
            Command::DestroyGuest(_) => {
                self.seen.destroyed += 1;
                self.hosts[n].agents.end_guest();
            }
            Command::Load(_) => {
                let agents = &mut self.hosts[n].agents;
                agents.accepting = false;
                agents.load += 1;
                let load = agents.load;
                let took = 50 + self.below(400);
                self.at(self.now + took, What::Loaded(n, life, load));
            }
            Command::Abandon(_) => {
                let agents = &mut self.hosts[n].agents;
                agents.accepting = true;
                agents.load += 1;
            }
            Command::Activate(_) => {
                let id = self.instances + 1;
                if self.hosts[n].agents.activate(id) {
                    self.instances = id;
                }
            }
        }
    }

    fn happen(&mut self, what: What) {
        match what {
            What::Epoch(n) => {
                self.at(self.now + EPOCH, What::Epoch(n));
                self.epoch(n);
            }
            What::Beat(n) => {
                self.at(self.now + 100, What::Beat(n));
                self.beat(n);
            }
            What::Tick(n, life) => {
                if self.hosts[n].dog.as_ref().is_some_and(|(now, _)| *now == life) {
                    if self.now < self.hosts[n].frozen {
                        let later = self.hosts[n].frozen;
                        self.at(later, What::Tick(n, life));
                    } else if self.hosts[n]
                        .dog
                        .as_ref()
                        .is_some_and(|(_, dog)| dog.deadline() <= self.instant())
                    {
                        self.tell(n, Input::Tick);
                    }
                }
            }
            What::Heard(n, heartbeat) => {
                if self.hosts[n].up && self.hosts[n].dog.is_some() && self.now >= self.hosts[n].frozen {
                    let newer = self.hosts[n]
                        .peer
                        .as_ref()
                        .is_none_or(|peer| (peer.life, peer.number) < (heartbeat.life, heartbeat.number));
                    if newer {
                        self.hosts[n].peer = Some(heartbeat.clone());
                    }
                    self.tell(n, Input::Heartbeat(heartbeat));
                }
            }
            What::Checkpoint(to, life, copy) => self.checkpoint(to, life, copy),
            What::Held(to, life, copy) => {
                let agents = &mut self.hosts[to].agents;
                if agents.life == life && agents.accepting {
                    agents.image = Some(copy);
                }
            }
            What::Ack(to, life, generation, number) => self.ack(to, life, generation, number),
            What::Swap(new) => {
                if !self.cut(Cut::Witness) && self.term().next() == new.term {
                    if matches!(new.owner, Owner::Solo { .. })
                        && matches!(self.record.as_ref().map(|r| &r.owner), Some(Owner::Pair { .. }))
                    {
                        self.seen.solos += 1;
                    }
                    self.record = Some(new);
                }
            }
            What::Read(n, life) => {
                if !self.cut(Cut::Witness) {
                    let delay = self.delay();
                    self.at(self.now + delay, What::Record(n, life, self.record.clone()));
                }
            }
            What::Record(n, life, record) => {
                let current = self.hosts[n].dog.as_ref().is_some_and(|(now, _)| *now == life);
                if current && !self.cut(Cut::Arbiter(n)) {
                    self.tell(n, Input::Event(Event::Record(record)));
                }
            }
            What::Loaded(n, life, load) => {
                let current = self.hosts[n].dog.as_ref().is_some_and(|(now, _)| *now == life);
                let agents = &self.hosts[n].agents;
                if current && agents.load == load {
                    let well = agents.image.is_some() && self.below(5) > 0;
                    self.tell(n, Input::Event(if well { Event::Loaded } else { Event::LoadFailed }));
                }
            }
            What::Fail(what) => self.fail(what),
            What::Return(n) => {
                self.hosts[n].up = true;
                self.start_dog(n);
            }
            What::DogReturns(n) => {
                if self.hosts[n].up && self.hosts[n].dog.is_none() {
                    self.start_dog(n);
                }
            }
            What::Heal(cut) => {
                if let Some(at) = self.cuts.iter().position(|other| *other == cut) {
                    self.cuts.swap_remove(at);
                }
            }
        }
    }

    fn epoch(&mut self, n: usize) {
        let host = &mut self.hosts[n];
        let agents = &mut host.agents;
        if !host.up || !agents.runs || agents.hangs || agents.paused {
            return;
        }
        agents.hist.push(agents.id);
        let all = agents.hist.len();
        if !agents.gated || self.fault == Fault::ReleaseBeforeAck {
            self.release(n, all);
        }
        let peer = 1 - n;
        let agents = &mut self.hosts[n].agents;
        // The stream is one connection: both ways must work. What is not acknowledged is sent again, in full.
        if agents.streaming
            && !self.cuts.contains(&Cut::Path(n, 0))
            && !self.cuts.contains(&Cut::Path(peer, 0))
            && self.hosts[peer].up
        {
            let agents = &mut self.hosts[n].agents;
            agents.sent += 1;
            agents.in_flight = Some((agents.sent, all));
            let copy = Copy {
                hist: Rc::new(agents.hist.clone()),
                number: agents.sent,
                generation: agents.generation,
            };
            let (life, delay) = (self.hosts[peer].agents.life, 1 + self.below(30));
            self.at(self.now + delay, What::Checkpoint(peer, life, copy));
        }
    }

    fn checkpoint(&mut self, to: usize, life: u64, copy: Copy) {
        let host = &mut self.hosts[to];
        let agents = &mut host.agents;
        let newer = agents
            .image
            .as_ref()
            .is_none_or(|image| (image.generation, image.number) < (copy.generation, copy.number));
        if !host.up
            || agents.life != life
            || !agents.accepting
            || agents.runs
            || copy.generation < agents.known
            || !newer
        {
            return;
        }
        agents.known = copy.generation;
        let (number, generation) = (copy.number, copy.generation);
        if self.fault == Fault::AckBeforeComplete {
            let later = self.now + 250;
            self.at(later, What::Held(to, life, copy));
        } else {
            agents.image = Some(copy);
        }
        let delay = 1 + self.below(30);
        // It is lost with the connection.
        if !self.cut(Cut::Path(to, 0)) {
            self.at(self.now + delay, What::Ack(1 - to, life, generation, number));
        }
    }

    fn ack(&mut self, to: usize, _life: u64, generation: u64, number: u64) {
        let agents = &mut self.hosts[to].agents;
        if !agents.runs
            || agents.generation != generation
            || agents.in_flight.is_none_or(|(sent, _)| sent != number)
        {
            return;
        }
        let Some((number, len)) = agents.in_flight.take() else { return };
        agents.committed = number;
        self.release(to, len);
        self.tell(to, Input::Alive);
    }

    fn beat(&mut self, n: usize) {
        if !self.hosts[n].up || self.hosts[n].dog.is_none() || self.now < self.hosts[n].frozen {
            return;
        }
        let local = self.hosts[n].agents.local();
        if self.hosts[n].dog.as_ref().is_some_and(|(_, dog)| dog.protocol().local() != local) {
            self.tell(n, Input::Event(Event::Local(local)));
        }
        let seeded = self.hosts[n].agents.sending().zip(self.hosts[n].peer.as_ref());
        if let Some(seeded) = seeded.and_then(|(sending, peer): (Sending, _)| sending.seeded(peer)) {
            self.tell(n, Input::Event(Event::Seeded(seeded)));
        }
        self.protect_again(n);
        self.send_heartbeats(n);
    }

    /// What an operator or a script does: protect a guest that runs alone as soon as the other host is there.
    fn protect_again(&mut self, n: usize) {
        let peer = &self.hosts[1 - n];
        let possible =
            peer.up && !peer.agents.runs && !self.cut(Cut::Path(n, 0)) && !self.cut(Cut::Path(1 - n, 0));
        match (self.role(n), self.hosts[n].seeding_since) {
            (Some(Role::Solo), _) if possible && self.hosts[n].agents.runs && self.below(20) == 0 => {
                self.hosts[n].seeding_since = Some(self.now);
                let after = EpochId(self.hosts[n].agents.sent);
                self.tell(n, Input::Event(Event::SeedBegins { after }));
                self.hosts[n].agents.streaming = true;
            }
            (Some(Role::Seeding { aborted: false, .. }), Some(since)) if self.now > since + 8000 => {
                self.hosts[n].seeding_since = None;
                self.hosts[n].agents.streaming = false;
                self.tell(n, Input::Event(Event::SeedFailed));
            }
            // After a restart of the watchdog, or a copy that came to its end.
            (Some(Role::Protected), _) => self.hosts[n].agents.streaming = self.hosts[n].agents.runs,
            _ => {}
        }
    }

    fn send_heartbeats(&mut self, n: usize) {
        self.hosts[n].beats += 1;
        let host = &self.hosts[n];
        let Some((life, dog)) = &host.dog else { return };
        let agents = &host.agents;
        let image = agents.image.as_ref();
        let generation = image.map_or(agents.generation.max(agents.known), |image| image.generation);
        let heartbeat = Heartbeat {
            guest: GuestId(uuid::Uuid::nil()),
            host: HOSTS[n].to_owned(),
            life: *life,
            number: host.beats,
            term: dog.protocol().term(),
            generation: Generation(generation),
            epoch: EpochId(image.map_or(agents.committed, |image| image.number)),
            qemu_age: agents
                .runs
                .then(|| if agents.hangs { Duration::from_secs(20) } else { Duration::ZERO }),
            image: image.map(|_| incarnation(agents.life)),
            ended: false,
            yields: false,
            crashed: false,
        };
        for path in 0..2 {
            for _ in 0..1 + u64::from(self.below(20) == 0) {
                let delay = self.delay();
                if self.below(20) > 0 && !self.cut(Cut::Path(n, path)) {
                    self.at(self.now + delay, What::Heard(1 - n, heartbeat.clone()));
                }
            }
        }
    }

    fn fail(&mut self, what: u64) {
        let n = usize::try_from(what & 1).unwrap();
        let long = 200 + (what >> 20) % 9000;
        let cut = |world: &mut Self, cut| {
            world.cuts.push(cut);
            world.at(world.now + long, What::Heal(cut));
        };
        match (what >> 8) % 14 {
            0 | 1 => {
                if self.hosts[n].up {
                    self.hosts[n].up = false;
                    self.hosts[n].dog = None;
                    self.hosts[n].agents.end_guest();
                    self.hosts[n].agents.end_backup();
                    self.hosts[n].agents.gate_term = Term::NONE;
                    self.at(self.now + 2000 + long, What::Return(n));
                }
            }
            2 | 3 => {
                self.hosts[n].dog = None;
                self.at(self.now + long, What::DogReturns(n));
            }
            4 => self.hosts[n].frozen = self.now + long,
            5 => self.hosts[n].agents.end_backup(),
            6 => self.hosts[n].agents.end_guest(),
            7 => self.hosts[n].agents.hangs = self.hosts[n].agents.runs,
            8 => {
                for path in 0..2 {
                    cut(self, Cut::Path(n, path));
                }
            }
            9 => {
                for host in 0..2 {
                    for path in 0..2 {
                        cut(self, Cut::Path(host, path));
                    }
                }
            }
            10 => cut(self, Cut::Path(n, 0)),
            11 => {
                // All links of one host.
                for path in 0..2 {
                    cut(self, Cut::Path(n, path));
                    cut(self, Cut::Path(1 - n, path));
                }
                cut(self, Cut::Arbiter(n));
            }
            12 => cut(self, Cut::Arbiter(n)),
            _ => cut(self, Cut::Witness),
        }
    }
}
