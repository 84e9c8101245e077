//! The gate's engine against a model of `plug`, as sch_plug.c of Linux 6.1 has it, with random guests and backups.

use std::collections::VecDeque;

use proptest::prelude::*;
use understudy_proto::epoch::Captured;
use understudy_proto::ids::Generation;

use super::*;

/// A frame is the epoch in which the guest sent it.
type Frame = u64;

/// `struct plug_sched_data`, with what has left it.
#[derive(Debug, Default)]
struct Plug {
    queue: VecDeque<Frame>,
    throttled: bool,
    indefinite: bool,
    current: usize,
    last: usize,
    to_release: usize,
    left: Vec<Frame>,
}

impl Plug {
    fn open() -> Self {
        let mut plug = Self { throttled: true, ..Self::default() };
        plug.release_indefinite();
        plug
    }

    fn enqueue(&mut self, frame: Frame) {
        if !self.indefinite {
            self.current += 1;
        }
        self.queue.push_back(frame);
        self.dequeue();
    }

    fn dequeue(&mut self) {
        while !self.throttled {
            if !self.indefinite {
                if self.to_release == 0 {
                    self.throttled = true;
                    return;
                }
                self.to_release -= 1;
            }
            match self.queue.pop_front() {
                Some(frame) => self.left.push(frame),
                None => return,
            }
        }
    }

    fn buffer(&mut self) {
        self.last = self.current;
        self.current = 0;
        if self.indefinite {
            self.throttled = true;
        }
        self.indefinite = false;
    }

    fn release_one(&mut self) {
        self.to_release += self.last;
        self.last = 0;
        self.throttled = false;
        self.dequeue();
    }

    fn release_indefinite(&mut self) {
        self.indefinite = true;
        (self.to_release, self.last, self.current) = (0, 0, 0);
        self.throttled = false;
        self.dequeue();
    }

    fn apply(&mut self, op: &Op) {
        match op.kind() {
            Kind::Seal => self.buffer(),
            Kind::ReleaseSealed => self.release_one(),
            Kind::Flush => {
                self.release_indefinite();
                self.buffer();
            }
        }
    }
}

fn committed(epoch: u64) -> Committed {
    let generation = Generation(1);
    Captured::new(generation, EpochId(epoch)).acknowledged(generation, EpochId(epoch)).unwrap()
}

/// What may happen between a guest, its capture and its backup.
#[derive(Debug, Clone)]
enum Turn {
    /// The guest sends so many frames.
    Send(usize),
    /// The epoch ends; `full` if it is a full copy, which is forced where a delta makes no sense.
    Stop { full: bool },
    /// The backup acknowledges what it has been given, if anything.
    Ack,
    /// The epoch in flight is given up.
    GiveUp,
    /// A qdisc refuses the next operation.
    Refuse,
    /// The agent dies and another one comes.
    Restart,
}

fn turns() -> impl Strategy<Value = Vec<Turn>> {
    let turn = prop_oneof![
        5 => (0..4usize).prop_map(Turn::Send),
        4 => any::<bool>().prop_map(|full| Turn::Stop { full }),
        4 => Just(Turn::Ack),
        1 => Just(Turn::GiveUp),
        1 => Just(Turn::Refuse),
        1 => Just(Turn::Restart),
    ];
    proptest::collection::vec(turn, 1..80)
}

/// What an agent could do wrong; the checks below must notice each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// An epoch is released when it is captured, before the backup has it.
    ReleaseBeforeAck,
    /// The guest runs on, and sends, before its epoch is sealed.
    SealAfterResume,
    /// A guest that has to stay stopped until its full copy is committed runs on.
    RunOn,
    /// The gate is opened when its agent is restarted.
    OpenAtRestart,
    /// It is taken away, with what it holds, instead.
    DeleteAtRestart,
}

/// A world of one guest: its agent follows the rules of the primary's engine.
struct World {
    gate: GateEngine,
    plug: Plug,
    /// The epoch the guest is in.
    epoch: u64,
    in_flight: Option<u64>,
    /// The last one the backup has.
    committed: u64,
    /// A full copy comes next.
    need_full: bool,
    /// The guest waits for the commit of a full copy.
    stopped: bool,
    protected: bool,
    /// The last epoch before protection: its output was free to go.
    free: u64,
    refuses: bool,
    fault: Fault,
    sent: Vec<Frame>,
}

impl World {
    fn new() -> Self {
        Self {
            gate: GateEngine::open(),
            plug: Plug::open(),
            epoch: 1,
            in_flight: None,
            committed: 0,
            need_full: true,
            stopped: false,
            protected: false,
            free: 0,
            refuses: false,
            fault: Fault::None,
            sent: Vec::new(),
        }
    }

    fn step(&mut self, event: Event<'_>) -> Result<(), GateError> {
        if let Some(op) = self.gate.step(event)? {
            if std::mem::take(&mut self.refuses) {
                self.gate.step(Event::Failed).unwrap();
                return Err(GateError::NoDevice { device: "usg-vnet0".into() });
            }
            self.plug.apply(&op);
        }
        Ok(())
    }

    fn resume(&mut self) {
        self.step(Event::Resuming).unwrap();
        self.stopped = false;
    }

    fn send(&mut self) {
        self.sent.push(self.epoch);
        self.plug.enqueue(self.epoch);
    }

    fn give_up(&mut self) {
        self.in_flight = None;
        self.need_full = true;
        if self.stopped {
            self.resume();
        }
    }

    fn turn(&mut self, turn: &Turn) {
        match turn {
            Turn::Send(count) if !self.stopped || self.fault == Fault::RunOn => {
                (0..*count).for_each(|_| self.send());
            }
            Turn::Stop { full } if self.in_flight.is_none() => {
                let kind = if *full || self.need_full { EpochKind::Full } else { EpochKind::Delta };
                let ended = self.epoch;
                self.epoch += 1;
                if self.fault == Fault::SealAfterResume && self.protected {
                    self.send();
                }
                if self.step(Event::Stopped(EpochId(ended), kind)).is_err() {
                    self.need_full = true;
                    return;
                }
                if !self.protected {
                    (self.protected, self.free) = (true, ended);
                }
                self.need_full = false;
                self.in_flight = Some(ended);
                self.stopped = self.gate.sealing() == Sealing::StayStopped;
                if self.fault == Fault::ReleaseBeforeAck {
                    self.plug.release_one();
                }
            }
            Turn::Ack => {
                if let Some(epoch) = self.in_flight.take() {
                    self.committed = epoch;
                    if self.step(Event::Committed(&committed(epoch))).is_err() {
                        self.need_full = true;
                    }
                    if self.stopped {
                        self.resume();
                    }
                }
            }
            Turn::GiveUp => self.give_up(),
            Turn::Refuse => self.refuses = true,
            Turn::Restart if self.protected => {
                self.give_up();
                self.refuses = false;
                self.gate = GateEngine::found();
                match self.fault {
                    Fault::OpenAtRestart => self.plug.release_indefinite(),
                    Fault::DeleteAtRestart => self.plug.queue.clear(),
                    _ => self.plug.buffer(),
                }
            }
            _ => {}
        }
    }

    fn check(&self) {
        // Invariant 1: what was sent under protection has left only if its epoch is committed.
        if self.protected {
            let newest = self.plug.left.iter().max().copied().unwrap_or(0);
            assert!(
                newest <= self.committed.max(self.free),
                "epoch {newest} left, {} is committed",
                self.committed
            );
        }
        // Nothing is lost, nothing overtakes.
        let all: Vec<_> = self.plug.left.iter().chain(&self.plug.queue).copied().collect();
        assert_eq!(all, self.sent);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn no_frame_leaves_before_its_epoch_is_committed_and_none_is_lost(turns in turns()) {
        let mut world = World::new();
        for turn in &turns {
            world.turn(turn);
            world.check();
        }
        // Once things go well again everything comes out: a full copy and an epoch later nothing old is left.
        world.refuses = false;
        world.give_up();
        for _ in 0..2 {
            world.turn(&Turn::Stop { full: false });
            world.turn(&Turn::Ack);
            world.check();
        }
        let old = world.plug.queue.iter().filter(|epoch| **epoch <= world.committed).count();
        prop_assert_eq!(old, 0, "frames of committed epochs stay: the counts have slipped");
    }
}

#[test]
fn the_checks_notice_what_an_agent_does_wrong() {
    let play = |fault| {
        let mut world = World { fault, ..World::new() };
        let (stop, send) = (Turn::Stop { full: false }, Turn::Send(2));
        let epoch = [&send, &stop, &send, &Turn::Ack];
        let restart = [&send, &Turn::Restart, &send, &stop, &send, &Turn::Ack];
        for turn in epoch.into_iter().chain(epoch).chain(restart).chain(epoch) {
            world.turn(turn);
            world.check();
        }
    };
    play(Fault::None);
    for fault in [
        Fault::ReleaseBeforeAck,
        Fault::SealAfterResume,
        Fault::RunOn,
        Fault::OpenAtRestart,
        Fault::DeleteAtRestart,
    ] {
        assert!(std::panic::catch_unwind(|| play(fault)).is_err(), "{fault:?} goes unnoticed");
    }
}

#[test]
fn plug_slips_when_it_is_sealed_twice() {
    // Why the types are as they are.
    let mut plug = Plug { throttled: true, ..Plug::default() };
    (0..2).for_each(|_| plug.enqueue(1));
    plug.buffer();
    (0..3).for_each(|_| plug.enqueue(2));
    plug.buffer();
    (0..4).for_each(|_| plug.enqueue(3));
    plug.release_one();
    assert_eq!(plug.left, [1, 1, 2], "three leave: the count of the second epoch, the first one's is lost");
}

#[test]
fn only_the_epoch_that_was_sealed_can_be_released() {
    let mut gate = GateEngine::open();
    let sealed = gate.step(Event::Stopped(EpochId(1), EpochKind::Full)).unwrap();
    assert_eq!(sealed.map(|op| op.kind()), Some(Kind::Flush));
    assert!(gate.step(Event::Committed(&committed(2))).is_err());
    assert!(gate.step(Event::Stopped(EpochId(2), EpochKind::Delta)).is_err(), "one epoch at a time");
    let released = gate.step(Event::Committed(&committed(1))).unwrap();
    assert_eq!(released.map(|op| op.kind()), Some(Kind::ReleaseSealed));
    assert!(gate.step(Event::Committed(&committed(1))).is_err(), "once");
    assert_eq!(gate.state(), State::Unsealed);
}

#[test]
fn a_found_gate_waits_for_a_full_copy_with_the_guest_stopped() {
    let mut gate = GateEngine::found();
    assert!(gate.step(Event::Stopped(EpochId(4), EpochKind::Delta)).is_err());
    let sealed = gate.step(Event::Stopped(EpochId(5), EpochKind::Full)).unwrap();
    assert_eq!(sealed.map(|op| op.kind()), Some(Kind::Seal));
    assert_eq!(gate.sealing(), Sealing::StayStopped);
    gate.step(Event::Resuming).unwrap();
    assert!(gate.step(Event::Committed(&committed(5))).is_err(), "the guest ran on: nothing may be released");
    assert!(gate.step(Event::Stopped(EpochId(6), EpochKind::Full)).unwrap().is_some());
    let flushed = gate.step(Event::Committed(&committed(6))).unwrap();
    assert_eq!(flushed.map(|op| op.kind()), Some(Kind::Flush));
    assert_eq!((gate.state(), gate.sealing()), (State::Unsealed, Sealing::RunOn));
}
