//! A host with one guest, for random sequences: what QEMU does is modelled, and every command of the engine is judged.

use std::collections::VecDeque;

use super::*;

/// What happens in the world.
#[derive(Debug, Clone)]
pub(super) enum Deed {
    /// The agent dies.
    Die,
    /// An agent starts. It frees the guest, as every agent does, and checkpoints begin.
    Start,
    /// A checkpoint stops the guest; the agent's word for it may outlive the agent.
    Stop,
    /// The checkpoint is over.
    Resume,
    /// An operator suspends the guest, or something else stops it.
    Suspend(RunState),
    /// An operator resumes it.
    Unsuspend,
    /// QEMU takes no notice of the next order.
    Deaf,
    /// libvirt is away for so many answers.
    Away(u8),
    /// Time passes, in milliseconds.
    Wait(u64),
}

pub(super) fn deed() -> impl Strategy<Value = Deed> {
    let others = ["paused", "io-error", "guest-panicked", "shutdown", "suspended"].map(RunState::from_name);
    prop_oneof![
        2 => Just(Deed::Die),
        2 => Just(Deed::Start),
        4 => Just(Deed::Stop),
        3 => Just(Deed::Resume),
        1 => proptest::sample::select(others.to_vec()).prop_map(Deed::Suspend),
        1 => Just(Deed::Unsuspend),
        1 => Just(Deed::Deaf),
        1 => (1_u8..4).prop_map(Deed::Away),
        6 => (0_u64..3000).prop_map(Deed::Wait),
        1 => (3000_u64..9000).prop_map(Deed::Wait),
    ]
}

pub(super) struct World {
    now: Instant,
    engine: Engine,
    answers_in: Duration,
    /// Commands on their way, with the time of their answers.
    under_way: VecDeque<(Instant, Command)>,
    alive: bool,
    /// When the engine hears of the agent's death or start.
    heard_at: Option<Instant>,
    colo: bool,
    state: RunState,
    runs: u64,
    stopped_at: Option<Instant>,
    deaf: bool,
    away: u8,
    /// Whether libvirt or QEMU has misbehaved since the stop: then there is no bound.
    excused: bool,
    /// The state in the last answer.
    told: RunState,
    longest: Duration,
}

impl World {
    pub(super) fn new(answers_in: Duration) -> Self {
        let now = Instant::now();
        let mut world = Self {
            now,
            engine: Engine::new(HUNG_AFTER),
            answers_in,
            under_way: VecDeque::new(),
            alive: true,
            heard_at: None,
            colo: true,
            state: RunState::Running,
            runs: 0,
            stopped_at: None,
            deaf: false,
            away: 0,
            excused: false,
            told: RunState::Running,
            longest: Duration::ZERO,
        };
        world.step(Event::Record(vec![listed(A)]));
        world.step(Event::Life(Life::Alive));
        world
    }

    /// Gives the longest time the guest was held by a checkpoint with neither an agent nor an excuse.
    pub(super) fn live(mut self, deeds: &[Deed]) -> Duration {
        for deed in deeds {
            self.happen(deed);
        }
        // In the end there is neither an agent nor trouble, and the guest must not be held.
        self.away = 0;
        self.deaf = false;
        self.happen(&Deed::Die);
        self.wait(ms(60_000));
        assert!(!self.is_held(), "the guest is left in {} with COLO {}", self.state, self.colo);
        self.longest
    }

    /// In a checkpoint or about to be put into one that nobody ends.
    fn is_held(&self) -> bool {
        self.colo && matches!(self.state, RunState::Colo | RunState::FinishMigrate | RunState::Running)
    }

    fn happen(&mut self, deed: &Deed) {
        match deed {
            Deed::Die if self.alive => {
                self.alive = false;
                self.heard_at = Some(self.now + bound::NOTICE);
                // What was a long stop is now one without an agent.
                self.stopped_at = self.stopped_at.map(|_| self.now);
            }
            Deed::Start if !self.alive => {
                self.alive = true;
                self.heard_at = Some(self.now + bound::NOTICE);
                if self.is_held() {
                    self.run();
                }
                self.colo = true;
            }
            Deed::Stop if self.colo && self.state == RunState::Running => {
                self.state = RunState::Colo;
                self.stopped_at = Some(self.now);
                self.excused = self.away > 0 || self.deaf;
            }
            Deed::Resume if self.alive && self.state == RunState::Colo => self.run(),
            Deed::Suspend(state) if self.state == RunState::Running => self.state = state.clone(),
            Deed::Unsuspend if !matches!(self.state, RunState::Colo | RunState::Running) => {
                self.state = RunState::Running;
            }
            Deed::Deaf => {
                self.deaf = true;
                self.excused = true;
            }
            Deed::Away(answers) => {
                self.away = *answers;
                self.excused = true;
            }
            Deed::Wait(time) => self.wait(ms(*time)),
            _ => {}
        }
    }

    fn run(&mut self) {
        self.state = RunState::Running;
        self.runs += 1;
        self.stopped_at = None;
    }

    fn wait(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            let answer = self.under_way.front().map(|(at, _)| *at);
            let deadline = self.engine.deadline().map(|due| due.max(self.now));
            let Some(next) = [answer, deadline, self.heard_at].into_iter().flatten().min() else { break };
            if next > end {
                break;
            }
            self.now = next;
            self.check();
            if self.heard_at == Some(next) {
                self.heard_at = None;
                self.step(Event::Life(if self.alive { Life::Alive } else { Life::Dead }));
            } else if answer == Some(next) {
                if let Some((_, command)) = self.under_way.pop_front() {
                    let event = self.answer(command);
                    self.step(event);
                }
            } else {
                self.step(Event::Tick);
            }
        }
        self.now = end;
        self.check();
    }

    /// The bounds.
    fn check(&mut self) {
        let Some(since) = self.stopped_at.filter(|_| !self.excused) else { return };
        let bound = if self.alive { bound::hung(HUNG_AFTER) } else { bound::DEAD };
        let held = self.now - since;
        assert!(held <= bound, "held for {held:?}, the agent alive: {}", self.alive);
        self.longest = self.longest.max(held);
    }

    fn step(&mut self, event: Event) {
        for command in self.engine.step(event, self.now) {
            match &command {
                Command::Order(guest, order) => {
                    assert_eq!((*guest, *order), (A, Order::LostHeartbeat), "nothing here needs another");
                    self.judge_order();
                }
                Command::Look(..) => {}
                Command::Report(_) => continue,
                Command::Forget(_) | Command::Replace(_) => panic!("{command:?}"),
            }
            assert!(self.under_way.is_empty(), "two things at once: {command:?}");
            self.under_way.push_back((self.now + self.answers_in, command));
        }
    }

    /// Only without an agent (as far as that can be heard), or after a stop that is too long; and never a guest that was
    /// last seen stopped by others.
    fn judge_order(&self) {
        let heard_dead = self.engine.life == Life::Dead;
        let hung = self.stopped_at.is_some_and(|since| self.now - since >= HUNG_AFTER);
        assert!(heard_dead || hung || self.heard_at.is_some(), "an agent that works is disturbed");
        assert!(matches!(self.told, RunState::Running | RunState::Colo), "{} is disturbed", self.told);
    }

    fn answer(&mut self, command: Command) -> Event {
        if self.away > 0 {
            self.away -= 1;
            let trouble = Trouble::Unreachable("away".into());
            return match command {
                Command::Look(guest, _) => Event::Seen(guest, Err(trouble)),
                _ => Event::Done(A, Err(trouble)),
            };
        }
        match command {
            Command::Look(guest, depth) => {
                self.told = self.state.clone();
                let seen = if depth == Depth::Glance && self.state == RunState::Running {
                    Seen::Running
                } else {
                    let counted = self.colo && depth != Depth::Full;
                    let (colo, runs) = (self.colo, counted.then_some(self.runs));
                    Seen::Full(Facts {
                        colo,
                        migrating: false,
                        armed: !colo,
                        runs,
                        state: self.state.clone(),
                    })
                };
                Event::Seen(guest, Ok(seen))
            }
            _ if !self.colo => Event::Done(A, Err(Trouble::Refused("not in COLO mode".into()))),
            _ if std::mem::take(&mut self.deaf) => Event::Done(A, Ok(())),
            _ => {
                self.colo = false;
                self.run();
                Event::Done(A, Ok(()))
            }
        }
    }
}
