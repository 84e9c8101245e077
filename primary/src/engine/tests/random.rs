//! Random sequences of events against what must always hold. The world below answers commands as capture, backup
//! and libvirt would, in any order and with any failure, and objects to every command that may not be given.

use proptest::prelude::*;
use understudy_proto::rpc::epoch::RejectCode;

use super::*;

/// What the capture thread is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    Nothing,
    Arm,
    Start,
    WaitReady,
    Checkpoint,
    CheckpointHeld,
    Disarm,
    Rescue,
}

/// The backup, and everything else the engine talks to.
#[derive(Debug)]
struct World {
    bench: Bench,
    doing: Doing,
    interrupted: bool,
    /// The call that is over left capture ready for a checkpoint.
    ready: bool,
    armed: bool,
    /// The last checkpoint has left the guest stopped.
    stopped: bool,
    session: Option<u64>,
    connecting: Option<u64>,
    life: u128,
    held: Option<u64>,
    /// Epochs the backup may acknowledge: begun, and not forgotten.
    begun: Option<u64>,
    captured: bool,
    released: u64,
    question: Option<Question>,
    guest_runs: bool,
    needs_sync: bool,
    finished: bool,
    paused: bool,
    /// Commands that stopped the guest: proof that the sequences get anywhere.
    checkpoints: u64,
}

impl std::fmt::Debug for Bench {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.engine.fmt(f)
    }
}

impl World {
    fn new() -> Self {
        Self {
            bench: Bench::new(settings()),
            doing: Doing::Nothing,
            interrupted: false,
            ready: false,
            armed: false,
            stopped: false,
            session: None,
            connecting: Some(7),
            life: 1,
            held: None,
            begun: None,
            captured: false,
            released: 0,
            question: None,
            guest_runs: true,
            needs_sync: true,
            finished: false,
            paused: false,
            checkpoints: 0,
        }
    }

    fn step(&mut self, event: Event) {
        let commands = self.bench.step(event);
        for command in commands {
            assert!(!self.finished, "{command:?} after the end");
            self.command(command);
        }
    }

    fn command(&mut self, command: Command) {
        let hold = matches!(command, Command::CheckpointHeld(_));
        let call = |world: &mut Self, doing| {
            assert_eq!(world.doing, Doing::Nothing, "two calls at once: {doing:?}");
            world.doing = doing;
        };
        match command {
            Command::Connect { session, .. } => {
                assert!(self.connecting.is_none() && self.session.is_none_or(|old| old < session));
                (self.connecting, self.session) = (Some(session), None);
            }
            Command::Arm(epoch) => {
                assert!(!self.armed && self.session.is_some() && self.guest_runs);
                assert!(self.begun.is_none(), "two epochs in flight");
                assert!(
                    epoch.0 > self.released && self.held.is_none_or(|held| epoch.0 > held),
                    "{epoch} goes back"
                );
                (self.begun, self.captured) = (Some(epoch.0), false);
                self.needs_sync = false;
                call(self, Doing::Arm);
            }
            Command::Checkpoint(epoch) | Command::CheckpointHeld(epoch) => {
                assert!(self.ready && self.armed, "capture is not ready");
                assert!(self.session.is_some() && !self.needs_sync, "the backup is not synchronised");
                assert!(self.begun.is_none(), "two epochs in flight");
                assert!(self.guest_runs, "invariant 9: the guest is not known to run");
                assert!(epoch.0 > self.released);
                (self.begun, self.captured, self.ready) = (Some(epoch.0), false, false);
                self.checkpoints += 1;
                call(self, if hold { Doing::CheckpointHeld } else { Doing::Checkpoint });
            }
            Command::Start => call(self, Doing::Start),
            Command::WaitReady => {
                assert!(!self.stopped, "invariant 10: the guest waits for a start");
                call(self, Doing::WaitReady);
            }
            Command::Disarm => {
                self.ready = false;
                call(self, Doing::Disarm);
            }
            Command::Rescue => call(self, Doing::Rescue),
            Command::Interrupt => self.interrupted = true,
            Command::Forget => (self.begun, self.captured) = (None, false),
            Command::Resend => assert!(self.begun.is_some() && self.session.is_some()),
            Command::Release(committed) => {
                let epoch = committed.epoch().0;
                assert!(epoch > self.released, "commits go back: {epoch} after {}", self.released);
                assert_eq!(self.held, Some(epoch), "released what the backup does not hold");
                self.released = epoch;
                self.begun = None;
            }
            Command::AskQemu(question) => {
                assert!(self.question.is_none(), "two questions at once");
                self.question = Some(question);
            }
            Command::Resubscribe => {}
            Command::PauseGuest => self.paused = true,
            Command::Finish { .. } => {
                assert!(!self.armed && self.doing == Doing::Nothing, "ended with the capture active");
                assert!(!self.stopped, "invariant 10: the guest was left stopped");
                self.finished = true;
            }
        }
    }

    /// The call of the capture comes to its end, well or badly.
    fn complete(&mut self, well: bool) {
        let well = well && !self.interrupted;
        let doing = std::mem::replace(&mut self.doing, Doing::Nothing);
        let failed = CaptureFailure {
            reason: "failed".to_owned(),
            left_stopped: !well && self.life.is_multiple_of(2),
            gone: false,
        };
        match (doing, well) {
            (Doing::Nothing, _) => {}
            (Doing::Arm, true) => {
                self.armed = true;
                self.captured = self.begun.is_some();
                // What the gate holds is tangled now and then.
                self.step(Event::Armed { stay_stopped: self.released.is_multiple_of(2) });
            }
            (Doing::Start | Doing::WaitReady, true) => {
                self.ready = true;
                let started = std::mem::take(&mut self.stopped);
                self.step(Event::Ready);
                if started {
                    self.step(qmp("RESUME", json!(null)));
                }
            }
            (Doing::CheckpointHeld, true) => {
                self.captured = self.begun.is_some();
                self.stopped = true;
                self.step(Event::Captured);
                self.step(qmp("STOP", json!(null)));
            }
            (Doing::Checkpoint, true) => {
                self.captured = self.begun.is_some();
                self.step(Event::Captured);
                self.step(qmp("STOP", json!(null)));
                self.step(qmp("RESUME", json!(null)));
            }
            (Doing::Disarm, _) => {
                (self.armed, self.stopped) = (false, false);
                self.interrupted = false;
                self.step(Event::Disarmed(Ok(())));
            }
            (Doing::Rescue, _) => {
                (self.armed, self.stopped) = (false, false);
                self.interrupted = false;
                self.step(Event::Rescued(if well { Ok(()) } else { Err(failed) }));
            }
            (_, false) => {
                (self.armed, self.stopped) = (false, false);
                self.step(Event::CaptureFailed(failed));
            }
        }
    }

    fn is_stopping(&self) -> bool {
        matches!(self.doing, Doing::Checkpoint | Doing::CheckpointHeld) || self.stopped
    }

    fn lose(&mut self) {
        if let Some(session) = self.session.take().or(self.connecting.take()) {
            self.step(Event::Disconnected { session, reason: "cut".to_owned() });
        }
    }

    fn happen(&mut self, what: u8) {
        match what {
            0..=39 => {
                self.bench.now += Duration::from_millis(u64::from(what) * 10);
                self.step(Event::Tick);
            }
            40..=99 => self.complete(true),
            100..=107 => self.complete(false),
            108..=149 => {
                if let Some(session) = self.connecting.take() {
                    self.session = Some(session);
                    let ack = hello(life(self.life), self.held);
                    self.step(Event::Connected { session, ack });
                }
            }
            150..=155 | 157 => self.lose(),
            158..=161 => {
                // The backup agent is restarted.
                self.life += 1;
                self.held = None;
                self.needs_sync = true;
                self.lose();
            }
            162..=199 => {
                // The whole epoch arrives; the acknowledgement may be lost with the stream.
                if let (Some(session), Some(epoch), true) = (self.session, self.begun, self.captured)
                    && self.held != Some(epoch)
                {
                    self.held = Some(epoch);
                    if what.is_multiple_of(8) {
                        self.lose();
                    } else {
                        self.step(Event::OutputHeld { bytes: u64::from(what % 3) << 24 });
                        self.step(Event::Acked { session, at: at(epoch) });
                    }
                }
            }
            156 => {
                if self.captured && self.session.is_some() && self.begun.is_some() {
                    self.session = None;
                }
                self.step(Event::StoodStill(Duration::from_secs(5)));
            }
            200 => self.step(Event::OutputWaiting { pressing: self.life.is_multiple_of(2) }),
            201 => {
                self.needs_sync = true;
                self.step(Event::OutputFailed("no".to_owned()));
            }
            202..=203 => {
                if let (Some(session), Some(epoch)) = (self.session, self.begun) {
                    let reject = Reject { at: at(epoch), code: RejectCode::Internal, text: "no".to_owned() };
                    self.needs_sync = true;
                    self.step(Event::Rejected { session, reject });
                }
            }
            204..=239 => {
                if let Some(question) = self.question.take() {
                    let state = if self.guest_runs { RunState::Running } else { RunState::Paused };
                    self.step(Event::Answer(question, Some(state)));
                }
            }
            240..=243 if !self.is_stopping() => {
                self.guest_runs = false;
                self.step(qmp("STOP", json!(null)));
            }
            244..=252 if !self.is_stopping() && !self.guest_runs => {
                self.guest_runs = true;
                self.step(qmp("RESUME", json!(null)));
            }
            253 if self.checkpoints > 5 => self.step(Event::Unprotect),
            254 if self.checkpoints > 5 => {
                if let Some(session) = self.session.take() {
                    self.step(Event::Refused { session, refused: refusal(RefusedCode::Superseded) });
                }
            }
            255 if self.checkpoints > 5 => self.step(lifecycle(Lifecycle::Stopped, "destroyed")),
            _ => {}
        }
    }

    /// Nothing fails any more: the pair must come to rest protected, or have ended.
    fn heal(&mut self) {
        if !self.guest_runs {
            self.guest_runs = true;
            self.step(qmp("RESUME", json!(null)));
        }
        let before = self.released;
        for _ in 0..400 {
            for what in [39, 40, 108, 163, 204, 165] {
                self.happen(what);
            }
            if self.paused {
                self.paused = false;
                self.step(Event::Paused(Ok(())));
            }
        }
        if !self.finished {
            assert!(self.released > before + 2, "stuck: {self:?}");
            assert_eq!(self.bench.state(), GuestState::Protected);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn invariants_hold_and_the_pair_heals(events in proptest::collection::vec(any::<u8>(), 0..600)) {
        let mut world = World::new();
        for what in events {
            world.happen(what);
            prop_assert!(world.released <= world.held.unwrap_or(u64::MAX));
        }
        world.heal();
    }
}

#[test]
fn the_random_world_gets_somewhere() {
    let mut world = World::new();
    world.heal();
    assert!(world.checkpoints > 100, "{}", world.checkpoints);
}
