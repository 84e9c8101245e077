//! Everything that can happen next.

use std::collections::BTreeSet;

use stateright::{Model, Property};
use understudy_proto::ids::{EpochId, Generation};
use understudy_proto::ownership::{Owner, Ownership, Term};

use super::super::{Command, Event, Local, Role};
use super::state::{Msg, N, Node, State, dog, life};
use super::{Bug, properties};

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Act {
    Exec(N),
    Send(N),
    Deliver(Msg),
    Suspect(N),
    Impatient(N),
    Retry(N),
    Apply(Ownership),
    Read(N),
    ReadOld(N),
    Look(N),
    Loaded(N, bool),
    SeedBegins(N),
    SeedFailed(N),
    CrashHost(N),
    CrashDog(N),
    CrashBackupAgent(N),
}

#[derive(Debug, Clone)]
pub(super) struct Bounded {
    pub(super) epochs: usize,
    pub(super) terms: u64,
    pub(super) crashes: u8,
    pub(super) start: Start,
    pub(super) bug: Bug,
}

/// How the world begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Start {
    /// Protected, term 1.
    Pair,
    /// The first host alone, term 2.
    Solo,
}

impl Model for Bounded {
    type State = State;
    type Action = Act;

    fn init_states(&self) -> Vec<State> {
        let owner = Owner::Pair { primary: "a".into(), backup: "b".into(), incarnation: life(1) };
        let record = Ownership { term: Term(1), generation: Generation(1), epoch: None, owner };
        let mut state = State {
            nodes: [Node::new(0, self.bug), Node::new(1, self.bug)],
            record: record.clone(),
            before: None,
            net: BTreeSet::new(),
            swaps: BTreeSet::new(),
            out: BTreeSet::new(),
            crashes: 0,
        };
        for n in 0..2 {
            let local = state.nodes[n].local();
            state.tell(n, Event::Local(local));
            state.tell(n, Event::Record(Some(record.clone())));
        }
        if self.start == Start::Solo {
            state.nodes[1].image = None;
            state.tell(1, Event::Local(Local::default()));
            state.tell(0, Event::Suspect);
            state.record = state.swaps.pop_first().unwrap();
            for n in 0..2 {
                state.tell(n, Event::Record(Some(state.record.clone())));
            }
        }
        vec![state]
    }

    fn actions(&self, state: &State, acts: &mut Vec<Act>) {
        for n in 0..2 {
            let node = &state.nodes[n];
            let role = node.dog.role();
            if node.runs && !node.paused && node.hist.len() < self.epochs {
                acts.push(Act::Exec(n));
            }
            if node.runs && node.streaming && (node.hist.len() > node.sent_len || node.sent == 0) {
                acts.push(Act::Send(n));
            }
            match role {
                Role::Protected | Role::Standby => acts.push(Act::Suspect(n)),
                Role::Held => acts.push(Act::Impatient(n)),
                Role::Loading => acts.extend([Act::Loaded(n, true), Act::Loaded(n, false)]),
                Role::Solo if node.runs => acts.push(Act::SeedBegins(n)),
                Role::Seeding { aborted: false, .. } => acts.push(Act::SeedFailed(n)),
                _ => {}
            }
            if node.dog.wanted().is_some_and(|wanted| !state.swaps.contains(&wanted)) {
                acts.push(Act::Retry(n));
            }
            acts.push(Act::Read(n));
            acts.push(Act::ReadOld(n));
            if node.dog.local() != node.local() {
                acts.push(Act::Look(n));
            }
            if state.crashes < self.crashes {
                acts.extend([Act::CrashHost(n), Act::CrashDog(n)]);
                if node.image.is_some() {
                    acts.push(Act::CrashBackupAgent(n));
                }
            }
        }
        acts.extend(state.net.iter().cloned().map(Act::Deliver));
        acts.extend(state.swaps.iter().cloned().map(Act::Apply));
    }

    fn next_state(&self, old: &State, act: Act) -> Option<State> {
        let mut state = old.clone();
        match act {
            Act::Exec(n) => {
                let node = &mut state.nodes[n];
                node.hist.push(node.id);
                if !node.gated {
                    node.release(usize::MAX, &mut state.out);
                }
            }
            Act::Send(n) => {
                let to_life = state.nodes[1 - n].life;
                let node = &mut state.nodes[n];
                node.sent += 1;
                node.sent_len = node.hist.len();
                state.net.insert(Msg::Checkpoint {
                    to: 1 - n,
                    life: to_life,
                    generation: node.generation,
                    number: node.sent,
                    hist: node.hist.clone(),
                });
            }
            Act::Deliver(msg) => state.deliver(msg),
            Act::Suspect(n) => {
                state.tell(n, Event::Suspect);
                if self.bug == Bug::SoloWithoutSwap && *state.nodes[n].dog.role() == Role::Asking {
                    state.carry_out(n, Command::OpenGate(state.nodes[n].gate_term));
                }
            }
            Act::Impatient(n) => state.tell(n, Event::Impatient),
            Act::Retry(n) => state.swaps.extend(state.nodes[n].dog.wanted()),
            Act::Apply(new) => {
                state.swaps.remove(&new);
                if state.record.term.next() != new.term {
                    return None;
                }
                state.before = Some(std::mem::replace(&mut state.record, new));
            }
            Act::Read(n) => state.tell(n, Event::Record(Some(state.record.clone()))),
            Act::ReadOld(n) => state.tell(n, Event::Record(Some(state.before.clone()?))),
            Act::Look(n) => state.tell(n, Event::Local(state.nodes[n].local())),
            Act::Loaded(n, well) => state.tell(n, if well { Event::Loaded } else { Event::LoadFailed }),
            Act::SeedBegins(n) => {
                let last = EpochId(state.nodes[n].sent.into());
                let after = if self.bug == Bug::OldAck { EpochId(0) } else { last };
                state.tell(n, Event::SeedBegins { after });
                state.nodes[n].streaming = true;
                state.nodes[n].sent_len = 0;
            }
            Act::SeedFailed(n) => state.tell(n, Event::SeedFailed),
            Act::CrashHost(n) => {
                state.crashes += 1;
                let node = &mut state.nodes[n];
                node.die();
                node.dog = dog(n, self.bug);
                node.life += 1;
                node.image = None;
                node.accepting = true;
                node.gate_term = Term::NONE;
            }
            Act::CrashDog(n) => {
                state.crashes += 1;
                state.nodes[n].dog = dog(n, self.bug);
                let local = state.nodes[n].local();
                state.tell(n, Event::Local(local));
            }
            Act::CrashBackupAgent(n) => {
                state.crashes += 1;
                let node = &mut state.nodes[n];
                node.life += 1;
                node.image = None;
                node.accepting = true;
            }
        }
        if state.record.term.0 > self.terms {
            return None;
        }
        // What can have no effect any more.
        let term = state.record.term;
        state.swaps.retain(|new| new.term > term);
        let State { nodes, net, .. } = &mut state;
        net.retain(|msg| match msg {
            Msg::Checkpoint { to, life, generation, .. } => {
                nodes[*to].life == *life && nodes[*to].known <= *generation
            }
            Msg::Ack { to, generation, .. } => nodes[*to].runs && nodes[*to].generation == *generation,
        });
        (state != *old).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties::all()
    }
}
