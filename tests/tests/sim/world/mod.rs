//! Two hosts, a witness, a network and a client, in one thread and from one seed.
//!
//! The engines of the primary agent, its gate, the backup agent and the watchdog are those that are shipped, as are the
//! backup's assembly of epochs and the witness's store. What carries their commands out (the daemons around them, QEMU,
//! the kernel's gate, libvirt, the network, disks, clocks) is modelled here, one file for each.

pub(crate) mod arbiter;
mod backup;
mod capture;
mod client;
mod clock;
mod faults;
pub(crate) mod guest;
mod heal;
pub(crate) mod host;
mod keeper;
mod lan;
mod net;
pub(crate) mod plug;
mod primary;
mod queue;
mod worker;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use understudy_proto::ids::GuestId;
use understudy_tests::conformance::{self, Step};
use understudy_watchdog::owner::{LostBackup, Policies, QemuCrash, Timing};

use crate::bugs::Bug;
use crate::invariants::Watchers;
use crate::random::Random;
use arbiter::Arbiter;
use client::Client;
use faults::Fault;
use guest::Truth;
use host::{Host, Process};
use net::{Message, Net, Side};
use plug::Frame;
use queue::Queue;

pub(crate) const HOSTS: [&str; 2] = ["alpha", "beta"];

/// Until then things fail, in milliseconds.
pub(crate) const CHAOS: u64 = 14_000;

/// By so much later the guest must be served again.
pub(crate) const HEAL: u64 = 150_000;

/// More never happens in a world, unless something goes round in circles.
const EVENTS: u64 = 120_000;

/// What is going to happen.
#[derive(Debug)]
pub(crate) enum What {
    Guest(usize, u16),
    Request(usize, u64),
    Answer(Frame),
    Client,
    Primary(usize, u64, primary::Input),
    Backup(usize, u64, backup::Input),
    Keeper(usize, u64, keeper::Input),
    Stream(u64, Side, Message),
    Streams,
    Swap(Box<understudy_proto::ownership::Ownership>),
    Read(usize, u64),
    Fault(Fault),
    Undo(Fault),
    Start(usize, Process),
    Boot(usize),
    Supervisor(usize, u16),
    Operator(usize),
}

/// What happened in a world.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) epochs: u64,
    pub(crate) answers: u64,
    pub(crate) takeovers: u64,
    pub(crate) solos: u64,
    pub(crate) reclaims: u64,
    pub(crate) pairs: u64,
    pub(crate) destroyed: u64,
    pub(crate) full_copies: u64,
    /// No copy of the guest was left that could be started.
    pub(crate) lost: u64,
}

impl Seen {
    pub(crate) fn add(&mut self, other: &Self) {
        self.epochs += other.epochs;
        self.answers += other.answers;
        self.takeovers += other.takeovers;
        self.solos += other.solos;
        self.reclaims += other.reclaims;
        self.pairs += other.pairs;
        self.destroyed += other.destroyed;
        self.full_copies += other.full_copies;
        self.lost += other.lost;
    }
}

/// See the module's description.
pub(crate) struct World {
    pub(crate) bug: Bug,
    pub(crate) random: Random,
    /// For what was not always in this world: drawing it from the other would make every seed another world.
    side: Random,
    pub(crate) now: u64,
    queue: Queue<What>,
    pub(crate) guest: GuestId,
    pub(crate) hosts: [Host; 2],
    net: Net,
    pub(crate) arbiter: Arbiter,
    pub(crate) client: Client,
    /// What the guest was at the end of every epoch, by the number of the capture.
    pub(crate) truth: HashMap<u64, Truth>,
    captures: u64,
    instances: u16,
    lives: u64,
    pub(crate) watchers: Watchers,
    pub(crate) seen: Seen,
    /// What the keepers take their hosts for.
    steps: Vec<Step>,
    policies: Policies,
    timing: Timing,
    pub(crate) chaos: bool,
    healed: heal::Healed,
    trace: Option<Vec<String>>,
    violation: Option<String>,
}

impl World {
    pub(crate) fn new(seed: u64, bug: Bug, traced: bool) -> Self {
        let mut random = Random::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let origin = Instant::now();
        let mut clock = || clock::Clock::new(origin, random.below(1_000_000), 950 + random.below(100));
        let hosts = [Host::new(clock()), Host::new(clock())];
        let lost_backup = if random.below(5) > 0 { LostBackup::Solo } else { LostBackup::Hold };
        let timing = Timing {
            heartbeat: Duration::from_millis(200),
            claim_patience: Duration::from_secs(6),
            ..Timing::default()
        };
        let mut world = Self {
            bug,
            random,
            side: Random::new(seed ^ 0x5151_0002),
            now: 0,
            queue: Queue::new(),
            guest: GuestId(uuid::Uuid::from_u128(1)),
            hosts,
            net: Net::default(),
            arbiter: Arbiter::new(),
            client: Client::default(),
            truth: HashMap::new(),
            captures: 0,
            instances: 1,
            lives: 0,
            watchers: Watchers::default(),
            seen: Seen::default(),
            steps: Vec::new(),
            policies: Policies { lost_backup, qemu_crash: QemuCrash::Failover },
            timing,
            chaos: true,
            healed: heal::Healed::default(),
            trace: traced.then(Vec::new),
            violation: None,
        };
        world.begin();
        world
    }

    fn begin(&mut self) {
        for h in 0..2 {
            for process in Process::ALL {
                self.start(h, process);
            }
            let later = 1000 + self.below(500);
            self.at(later, What::Operator(h));
        }
        let mut guest = guest::Qemu::standby();
        (guest.kind, guest.instance, guest.generation) = (guest::Kind::Active, 1, 1);
        self.hosts[0].qemu = Some(guest);
        self.at(5, What::Guest(0, 1));
        self.at(10, What::Client);
        self.at(250, What::Streams);
        self.plan_faults();
    }

    /// Runs to the end.
    ///
    /// # Errors
    /// What was violated, and when.
    pub(crate) fn live(&mut self) -> Result<Seen, String> {
        let mut events = 0;
        while let Some((when, what)) = self.queue.pop() {
            self.now = when;
            events += 1;
            if events > EVENTS {
                return Err(format!(
                    "at {when} ms: {EVENTS} things have happened, the last one was {what:?}"
                ));
            }
            if self.chaos && when >= CHAOS {
                self.heal();
            }
            self.happen(what);
            self.flush_gates();
            self.check();
            if let Some(violation) = self.violation.take() {
                return Err(violation);
            }
            if !self.chaos && self.at_rest()? {
                break;
            }
        }
        self.seen.answers = self.client.answers;
        conformance::accept(&self.steps).map_err(|why| format!("the log of this world is refused: {why}"))?;
        Ok(self.seen.clone())
    }

    /// What was told of it, if it was to be.
    pub(crate) fn trace(&mut self) -> Vec<String> {
        self.trace.take().unwrap_or_default()
    }

    pub(crate) fn note(&mut self, what: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:7} {}", self.now, what()));
        }
    }

    pub(crate) fn wrong(&mut self, what: String) {
        self.note(|| format!("VIOLATION {what}"));
        let now = self.now;
        self.violation.get_or_insert_with(|| format!("at {now} ms: {what}"));
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.random.below(limit.max(1))
    }

    /// One time in so many, while things may fail.
    fn seldom(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0 && self.chaos
    }

    fn at(&mut self, when: u64, what: What) {
        self.queue.push(when.max(self.now), what);
    }

    fn after(&mut self, later: u64, what: What) {
        self.at(self.now + later, what);
    }

    fn local(&self, h: usize) -> Instant {
        self.hosts[h].clock.at(self.now)
    }

    fn happen(&mut self, what: What) {
        match what {
            What::Guest(h, instance) => self.guest_lives(h, instance),
            What::Request(h, request) => self.request(h, request),
            What::Answer(frame) => self.answer(frame),
            What::Client => self.client_asks(),
            What::Primary(h, life, input) => match self.turn(h, Process::Primary, life) {
                Turn::Now => self.primary_input(h, input),
                Turn::Later(when) => self.at(when, What::Primary(h, life, input)),
                Turn::Never => {}
            },
            What::Backup(h, life, input) => match self.turn(h, Process::Backup, life) {
                Turn::Now => self.backup_input(h, input),
                Turn::Later(when) => self.at(when, What::Backup(h, life, input)),
                Turn::Never => {}
            },
            What::Keeper(h, life, input) => match self.turn(h, Process::Keeper, life) {
                Turn::Now => self.keeper_input(h, input),
                Turn::Later(when) => self.at(when, What::Keeper(h, life, input)),
                Turn::Never => {}
            },
            What::Stream(number, side, message) => self.stream_arrives(number, side, message),
            What::Streams => {
                self.look_after_streams();
                self.after(250, What::Streams);
            }
            What::Swap(new) => self.swap_arrives(&new),
            What::Read(h, life) => self.read_arrives(h, life),
            What::Fault(fault) => self.fault(fault),
            What::Undo(fault) => self.undo(fault),
            What::Start(h, process) => {
                if self.hosts[h].up && !self.hosts[h].is_alive(process) {
                    self.start(h, process);
                }
            }
            What::Boot(h) => self.boot(h),
            What::Supervisor(h, instance) => self.supervise(h, instance),
            What::Operator(h) => self.operator(h),
        }
    }

    /// Whether a process takes its turn.
    fn turn(&self, h: usize, process: Process, life: u64) -> Turn {
        let host = &self.hosts[h];
        if !host.up || host.life(process) != Some(life) {
            return Turn::Never;
        }
        let frozen = host.frozen_until(process);
        if frozen > self.now { Turn::Later(frozen) } else { Turn::Now }
    }

    fn check(&mut self) {
        for what in crate::invariants::always(self) {
            self.wrong(what);
        }
    }
}

enum Turn {
    Now,
    Later(u64),
    Never,
}
