//! What the agents of both hosts have and do, as far as the protocol can tell.

use std::collections::BTreeSet;

use understudy_proto::ids::{EpochId, Generation, Incarnation};
use understudy_proto::ownership::{Ownership, Term};

use super::super::{Command, Event, Image, Local, LostBackup, Policies, Protocol, Seeded};
use super::Bug;

pub(super) type N = usize;
pub(super) const HOSTS: [&str; 2] = ["a", "b"];

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Backup {
    pub(super) hist: Vec<u8>,
    pub(super) number: u8,
    pub(super) generation: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Node {
    pub(super) dog: Protocol,
    pub(super) runs: bool,
    pub(super) paused: bool,
    pub(super) gated: bool,
    pub(super) gate_term: Term,
    pub(super) generation: u64,
    /// The activation that executed each epoch.
    pub(super) hist: Vec<u8>,
    pub(super) released: usize,
    pub(super) id: u8,
    /// Epochs sent; the newest may be sent once.
    pub(super) sent: u8,
    pub(super) sent_len: usize,
    pub(super) streaming: bool,
    pub(super) life: u8,
    pub(super) image: Option<Backup>,
    /// Highest generation the backup agent knows.
    pub(super) known: u64,
    pub(super) accepting: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Msg {
    Checkpoint { to: N, life: u8, generation: u64, number: u8, hist: Vec<u8> },
    Ack { to: N, life: u8, generation: u64, number: u8, len: usize },
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct State {
    pub(super) nodes: [Node; 2],
    pub(super) record: Ownership,
    /// The record before, for reads that are overtaken.
    pub(super) before: Option<Ownership>,
    pub(super) net: BTreeSet<Msg>,
    pub(super) swaps: BTreeSet<Ownership>,
    pub(super) out: BTreeSet<Vec<u8>>,
    pub(super) crashes: u8,
}

pub(super) fn life(n: u8) -> Incarnation {
    Incarnation(uuid::Uuid::from_u128(u128::from(n)))
}

impl Node {
    pub(super) fn new(host: N, bug: Bug) -> Self {
        let primary = host == 0;
        Self {
            dog: dog(host, bug),
            runs: primary,
            paused: false,
            gated: true,
            gate_term: Term::NONE,
            generation: u64::from(primary),
            hist: vec![],
            released: 0,
            id: 1,
            sent: 0,
            sent_len: 0,
            streaming: primary,
            life: 1,
            image: (!primary).then(|| Backup { hist: vec![], number: 0, generation: 1 }),
            known: 1,
            accepting: true,
        }
    }

    pub(super) fn local(&self) -> Local {
        let image = self
            .image
            .as_ref()
            .map(|image| Image { incarnation: life(self.life), generation: Generation(image.generation) });
        let generation = self.runs.then_some(Generation(self.generation));
        Local { runs: self.runs, image, generation }
    }

    pub(super) fn serves(&self) -> bool {
        self.runs && !self.paused && !self.gated
    }

    pub(super) fn release(&mut self, upto: usize, out: &mut BTreeSet<Vec<u8>>) {
        for len in self.released + 1..=upto.min(self.hist.len()) {
            out.insert(self.hist[..len].to_vec());
            self.released = len;
        }
    }

    pub(super) fn die(&mut self) {
        self.runs = false;
        self.paused = false;
        self.hist.clear();
        self.released = 0;
        self.streaming = false;
        self.gated = true;
    }
}

pub(super) fn dog(host: N, bug: Bug) -> Protocol {
    let policies = Policies { lost_backup: LostBackup::Solo, ..Policies::default() };
    let mut dog = Protocol::new(HOSTS[host], policies);
    dog.bug = bug;
    dog
}

impl State {
    pub(super) fn tell(&mut self, n: N, event: Event) {
        let commands = self.nodes[n].dog.step(event);
        for command in commands {
            self.carry_out(n, command);
        }
    }

    pub(super) fn carry_out(&mut self, n: N, command: Command) {
        let Self { nodes, out, swaps, .. } = self;
        let node = &mut nodes[n];
        match command {
            Command::Read => {}
            Command::Swap(new) => drop(swaps.insert(new)),
            Command::HoldGate(term) => {
                node.gate_term = node.gate_term.max(term);
                node.gated = true;
            }
            Command::OpenGate(term) if term >= node.gate_term && node.runs => {
                node.gate_term = term;
                node.gated = false;
                node.streaming = false;
                node.release(usize::MAX, out);
            }
            Command::OpenGate(_) => {}
            Command::PauseGuest(_) => node.paused = true,
            Command::ResumeGuest(_) => node.paused = false,
            Command::DestroyGuest(_) => node.die(),
            Command::Load(_) => node.accepting = false,
            Command::Abandon(_) => node.accepting = true,
            Command::Activate(_) => {
                if let Some(image) = node.image.take().filter(|_| !node.runs) {
                    node.runs = true;
                    node.gated = true;
                    node.paused = false;
                    node.generation = image.generation + 1;
                    node.known = node.generation;
                    node.released = image.hist.len();
                    node.hist = image.hist;
                    node.id = u8::try_from(node.generation).unwrap() * 2 + u8::try_from(n).unwrap();
                    (node.sent, node.sent_len, node.accepting) = (0, 0, true);
                }
            }
        }
    }

    pub(super) fn deliver(&mut self, msg: Msg) {
        match msg {
            Msg::Checkpoint { to, life, generation, number, hist } => {
                let node = &mut self.nodes[to];
                let newer = node
                    .image
                    .as_ref()
                    .is_none_or(|image| (image.generation, image.number) < (generation, number));
                if node.life == life && node.accepting && !node.runs && generation >= node.known && newer {
                    node.known = generation;
                    let len = hist.len();
                    node.image = Some(Backup { hist, number, generation });
                    self.net.insert(Msg::Ack { to: 1 - to, life, generation, number, len });
                }
            }
            Msg::Ack { to, life: of, generation, number, len } => {
                let node = &mut self.nodes[to];
                if !node.runs || node.generation != generation {
                    return;
                }
                node.release(len, &mut self.out);
                let seeded = Seeded {
                    backup: HOSTS[1 - to].to_owned(),
                    incarnation: life(of),
                    generation: Generation(generation),
                    epoch: EpochId(number.into()),
                };
                self.tell(to, Event::Seeded(seeded));
            }
        }
    }
}
