//! The networks: streams between agents, datagrams between watchdogs, questions to the witness.

use std::collections::{BTreeMap, VecDeque};

use understudy_proto::ownership::{Owner, Ownership};
use understudy_proto::rpc::epoch::{BackupMessage, PrimaryMessage};

use super::faults::Fault;
use super::host::Process;
use super::keeper;
use super::{What, World, backup, primary};

/// A network: the one the epochs take, and that of everything else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cut {
    /// From a host, on a path (0: replication, 1: management).
    Path(usize, usize),
    /// Between a host and the witness.
    Witness(usize),
}

/// An end of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Primary,
    Backup,
}

impl Side {
    fn index(self) -> usize {
        usize::from(self == Self::Backup)
    }

    fn other(self) -> Self {
        if self == Self::Primary { Self::Backup } else { Self::Primary }
    }
}

/// What goes over a stream.
#[derive(Debug, Clone)]
pub(crate) enum Message {
    Forth(PrimaryMessage),
    Back(BackupMessage),
    /// The other side has closed it.
    End(String),
}

/// A stream.
#[derive(Debug)]
struct Stream {
    primary: usize,
    session: u64,
    lives: [u64; 2],
    open: [bool; 2],
    /// When the last message to each side arrives.
    last: [u64; 2],
    /// What a cut keeps from each side.
    stalled: [VecDeque<Message>; 2],
    /// Since when each side hears nothing.
    silent: [Option<u64>; 2],
    /// How long it waits then.
    patience: u64,
}

/// See the module's description.
#[derive(Debug, Default)]
pub(crate) struct Net {
    pub(super) cuts: Vec<Cut>,
    streams: BTreeMap<u64, Stream>,
    next: u64,
}

impl Net {
    pub(super) fn is_cut(&self, cut: Cut) -> bool {
        self.cuts.contains(&cut)
    }
}

impl World {
    /// Whether one host's words arrive at the other.
    fn reaches(&self, from: usize, path: usize) -> bool {
        !self.net.is_cut(Cut::Path(from, path)) && self.hosts[0].up && self.hosts[1].up
    }

    pub(super) fn linked(&self) -> bool {
        self.reaches(0, 0) && self.reaches(1, 0)
    }

    /// Opens a stream to the other host's backup agent; `None` if it does not answer.
    pub(super) fn open_stream(&mut self, h: usize, session: u64) -> Option<u64> {
        let peer = 1 - h;
        if !self.linked() || !self.hosts[peer].answers(Process::Backup, self.now) {
            return None;
        }
        let lives = [self.hosts[h].life(Process::Primary)?, self.hosts[peer].life(Process::Backup)?];
        self.net.next += 1;
        let stream = Stream {
            primary: h,
            session,
            lives,
            open: [true; 2],
            last: [self.now; 2],
            stalled: Default::default(),
            silent: [None; 2],
            patience: 1500 + self.random.below(3000),
        };
        let number = self.net.next;
        self.net.streams.insert(number, stream);
        Some(number)
    }

    pub(super) fn stream_is_open(&self, number: u64, side: Side) -> bool {
        self.net.streams.get(&number).is_some_and(|stream| stream.open[side.index()])
    }

    /// Sends from this side.
    pub(super) fn send(&mut self, number: u64, from: Side, message: Message) {
        let delay = 1 + if self.seldom(40) { self.random.below(400) } else { self.random.below(8) };
        let now = self.now;
        let Some(stream) = self.net.streams.get_mut(&number).filter(|stream| stream.open[from.index()])
        else {
            return;
        };
        let to = from.other();
        let last = &mut stream.last[to.index()];
        *last = (*last).max(now + delay);
        let when = *last;
        self.at(when, What::Stream(number, to, message));
    }

    /// Closes it from this side, which knows.
    pub(super) fn close_stream(&mut self, number: u64, side: Side, reason: &str) {
        if self.stream_is_open(number, side) {
            self.send(number, side, Message::End(reason.to_owned()));
            if let Some(stream) = self.net.streams.get_mut(&number) {
                stream.open[side.index()] = false;
            }
        }
    }

    pub(super) fn stream_arrives(&mut self, number: u64, to: Side, message: Message) {
        let Some(stream) = self.net.streams.get(&number) else { return };
        let from = if to == Side::Backup { stream.primary } else { 1 - stream.primary };
        let stalls = !self.reaches(from, 0) || !stream.stalled[to.index()].is_empty();
        let Some(stream) = self.net.streams.get_mut(&number) else { return };
        if stalls {
            stream.stalled[to.index()].push_back(message);
        } else {
            self.deliver(number, to, message);
        }
    }

    fn deliver(&mut self, number: u64, to: Side, message: Message) {
        let Some(stream) = self.net.streams.get_mut(&number) else { return };
        if !stream.open[to.index()] {
            return;
        }
        let (h, session, life) = (stream.primary, stream.session, stream.lives[to.index()]);
        if matches!(message, Message::End(_)) {
            stream.open[to.index()] = false;
        }
        match (to, message) {
            (Side::Backup, Message::Forth(message)) => {
                let input = backup::Input::Message(number, Box::new(message));
                self.after(0, What::Backup(1 - h, life, input));
            }
            (Side::Backup, Message::End(reason)) => {
                self.after(0, What::Backup(1 - h, life, backup::Input::StreamEnds(number, reason)));
            }
            (Side::Primary, Message::Back(message)) => {
                let input = primary::Input::Message(number, session, Box::new(message));
                self.after(0, What::Primary(h, life, input));
            }
            (Side::Primary, Message::End(reason)) => {
                self.after(0, What::Primary(h, life, primary::Input::StreamEnds(number, session, reason)));
            }
            _ => {}
        }
    }

    /// What was held up arrives; a side that has heard nothing for long gives the stream up.
    pub(super) fn look_after_streams(&mut self) {
        let numbers: Vec<u64> = self.net.streams.keys().copied().collect();
        for number in numbers {
            for side in [Side::Primary, Side::Backup] {
                self.look_after(number, side);
            }
        }
        self.net.streams.retain(|_, stream| stream.open != [false; 2]);
    }

    fn look_after(&mut self, number: u64, side: Side) {
        let Some(stream) = self.net.streams.get(&number) else { return };
        let (at, peer) = match side {
            Side::Primary => (stream.primary, 1 - stream.primary),
            Side::Backup => (1 - stream.primary, stream.primary),
        };
        let (mine, theirs) = match side {
            Side::Primary => (Process::Primary, Process::Backup),
            Side::Backup => (Process::Backup, Process::Primary),
        };
        let here = self.hosts[at].life(mine) == Some(stream.lives[side.index()]);
        let there = self.hosts[peer].life(theirs) == Some(stream.lives[side.other().index()])
            && self.hosts[peer].answers(theirs, self.now);
        let heard = there && self.linked();
        let arrives = self.reaches(peer, 0);
        let now = self.now;
        let Some(stream) = self.net.streams.get_mut(&number) else { return };
        if !here {
            stream.open[side.index()] = false;
            return;
        }
        let since = if heard { None } else { Some(stream.silent[side.index()].unwrap_or(now)) };
        stream.silent[side.index()] = since;
        let held = if arrives { std::mem::take(&mut stream.stalled[side.index()]) } else { VecDeque::new() };
        let gives_up = since.is_some_and(|since| now >= since + stream.patience);
        for message in held {
            self.deliver(number, side, message);
        }
        if gives_up {
            self.send(number, side, Message::End("the other side has given up".to_owned()));
            self.deliver(number, side, Message::End("nothing is heard".to_owned()));
        }
    }

    /// The kernel of a process that died closes its streams.
    pub(super) fn process_is_gone(&mut self, h: usize, process: Process) {
        let side = match process {
            Process::Primary => Side::Primary,
            Process::Backup => Side::Backup,
            Process::Keeper => return,
        };
        let of = |stream: &Stream| {
            let at = if side == Side::Primary { stream.primary } else { 1 - stream.primary };
            at == h
        };
        let mine: Vec<u64> =
            self.net.streams.iter().filter(|(_, stream)| of(stream)).map(|(number, _)| *number).collect();
        for number in mine {
            self.close_stream(number, side, "the other side has died");
        }
    }

    /// A datagram of a watchdog, over every path: lost, doubled, overtaken.
    pub(super) fn beat_arrives_at(&mut self, h: usize, beat: &understudy_proto::heartbeat::Heartbeat) {
        let Some(life) = self.hosts[h].life(Process::Keeper) else { return };
        let bytes = beat.encode().expect("a heartbeat");
        for path in 0..2 {
            let copies = if self.seldom(20) { 2 } else { 1 };
            for _ in 0..copies {
                if self.seldom(15) || !self.reaches(1 - h, path) {
                    continue;
                }
                let later = 1 + if self.seldom(30) { self.below(1500) } else { self.below(15) };
                let heard = understudy_proto::heartbeat::Heartbeat::decode(&bytes).expect("a heartbeat");
                self.after(later, What::Keeper(h, life, keeper::Input::Heard(Box::new(heard))));
            }
        }
    }

    fn witness_delay(&mut self) -> u64 {
        1 + if self.seldom(25) { self.below(3000) } else { self.below(10) }
    }

    pub(super) fn ask_to_swap(&mut self, h: usize, new: &Ownership) {
        if self.net.is_cut(Cut::Witness(h)) || self.seldom(25) {
            return;
        }
        // A copy is complete: what its host asks for now must not count in another life.
        let paired = matches!(new.owner, Owner::Pair { .. });
        if self.seldom(if paired { 6 } else { 25 }) {
            // Who has asked dies, and its question arrives when its next life is there.
            let later = 300 + self.below(1500);
            self.after(later, What::Swap(Box::new(new.clone())));
            self.after(0, What::Fault(Fault::Kill(h, Process::Keeper)));
            let later = 100 + self.below(300);
            return self.after(later, What::Start(h, Process::Keeper));
        }
        for _ in 0..if self.seldom(20) { 2 } else { 1 } {
            let later = self.witness_delay();
            self.after(later, What::Swap(Box::new(new.clone())));
        }
    }

    pub(super) fn ask_to_read(&mut self, h: usize, life: u64) {
        if !self.net.is_cut(Cut::Witness(h)) && !self.seldom(25) {
            let later = self.witness_delay();
            self.after(later, What::Read(h, life));
        }
    }

    pub(super) fn swap_arrives(&mut self, new: &Ownership) {
        if !self.arbiter.up {
            return;
        }
        let before = self.arbiter.current().cloned();
        let done = self.arbiter.swap(new);
        self.note(|| format!("witness: swap to {:?} {done}", new.owner));
        if !done {
            return;
        }
        match (&new.owner, before.map(|before| before.owner)) {
            (Owner::Solo { .. }, Some(Owner::Pair { .. })) => self.seen.solos += 1,
            (Owner::Solo { owner }, Some(Owner::Claim { by, .. })) if *owner == by => {
                self.seen.takeovers += 1
            }
            (Owner::Solo { .. }, Some(Owner::Claim { .. })) => self.seen.reclaims += 1,
            (Owner::Pair { .. }, _) => self.seen.pairs += 1,
            _ => {}
        }
        for what in crate::invariants::record(self) {
            self.wrong(what);
        }
        self.record_changed();
    }

    pub(super) fn read_arrives(&mut self, h: usize, life: u64) {
        if self.arbiter.up && !self.net.is_cut(Cut::Witness(h)) {
            let record = self.arbiter.read();
            let later = self.witness_delay();
            if !self.seldom(25) {
                let input = keeper::Input::Record(record.map(Box::new));
                self.after(later, What::Keeper(h, life, input));
            }
        }
    }
}
