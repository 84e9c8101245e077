//! The watchdog around its engine: looks at the agents, heartbeats, what its commands do.

mod looks;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use understudy_proto::heartbeat::Heartbeat;
use understudy_proto::ids::{EpochId, Generation};
use understudy_proto::ownership::{Ownership, Term};
use understudy_tests::conformance::{Said, Step};
use understudy_watchdog::owner::{
    Command, Engine, Event, Input as Told, Local, LostBackup, Output, Role, Sending,
};

use super::faults::Fault;
use super::guest::Kind;
use super::host::Process;
use super::{HOSTS, What, World, backup, primary};
use crate::bugs::Bug;
use crate::invariants;

/// Between two looks at the agents.
const LOOK: u64 = 200;

/// How long an agent may take over a question.
const ANSWER: u64 = 2000;

/// How long a command may take.
const LIMIT: u64 = 60_000;

/// As the keeper has them: a guest alone that is not there for so long was ended; a full copy whose backup is lost for so
/// long is given up.
const GONE: Duration = Duration::from_secs(5);
const LOST: Duration = Duration::from_secs(10);

/// What a look finds.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Seen {
    local: Local,
    sending: Option<Sending>,
    listed: bool,
    protecting: bool,
    degraded: bool,
    superseded: bool,
    /// Generation of a guest that is over, and whether nobody has ended it.
    over: Option<(u64, bool)>,
    place: Place,
    epoch: u64,
    qemu: Option<Instant>,
}

/// Whether an instance is here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Answers,
    Hangs,
    Off,
    Unknown,
}

/// See the module's description.
pub(crate) struct Keeper {
    life: u64,
    engine: Engine,
    peer: Option<Heartbeat>,
    last: Option<Seen>,
    beats: u64,
    opening: u32,
    outdated: bool,
    hands: VecDeque<Command>,
    /// The question whose answer is waited for, and the command.
    asked: Option<(u64, Command)>,
    questions: u64,
    ticks_at: u64,
    crashed: bool,
    protecting: bool,
    gone_since: Option<Instant>,
    lost_since: Option<Instant>,
}

/// What it is told.
#[derive(Debug)]
pub(crate) enum Input {
    Tick,
    Beat,
    Look,
    Looks,
    Heard(Box<Heartbeat>),
    Record(Option<Box<Ownership>>),
    Done(u64, Option<Box<Event>>),
    Overdue(u64),
}

impl Keeper {
    /// The newest record it has read.
    pub(crate) fn record(&self) -> Option<&Ownership> {
        self.engine.protocol().record()
    }
}

impl World {
    pub(super) fn start_keeper(&mut self, h: usize, life: u64) {
        let now = self.local(h);
        let engine = Engine::new(HOSTS[h], self.policies, self.timing, now);
        self.hosts[h].keeper = Some(Keeper {
            life,
            engine,
            peer: None,
            last: None,
            beats: 0,
            opening: 0,
            outdated: false,
            hands: VecDeque::new(),
            asked: None,
            questions: 0,
            ticks_at: u64::MAX,
            crashed: false,
            protecting: false,
            gone_since: None,
            lost_since: None,
        });
        for input in [Input::Beat, Input::Look] {
            let later = 5 + self.below(100);
            self.after(later, What::Keeper(h, life, input));
        }
    }

    /// What a keeper takes its host for.
    pub(crate) fn role(&self, h: usize) -> Option<&Role> {
        self.hosts[h].keeper.as_ref().map(|keeper| keeper.engine.protocol().role())
    }

    pub(super) fn keeper_input(&mut self, h: usize, input: Input) {
        let Some(life) = self.hosts[h].life(Process::Keeper) else { return };
        match input {
            Input::Tick => {
                let Some(keeper) = &mut self.hosts[h].keeper else { return };
                // Another one is planned: of two there would be two for ever.
                if keeper.ticks_at > self.now {
                    return;
                }
                keeper.ticks_at = u64::MAX;
                self.tell(h, Told::Tick);
            }
            Input::Beat => {
                let interval = u64::try_from(self.timing.heartbeat.as_millis()).unwrap_or(100);
                self.after(interval, What::Keeper(h, life, Input::Beat));
                self.beat(h);
            }
            Input::Look => {
                let Some(keeper) = &mut self.hosts[h].keeper else { return };
                keeper.outdated = keeper.opening > 0;
                let slow = [Process::Primary, Process::Backup]
                    .into_iter()
                    .any(|agent| self.hosts[h].frozen_until(agent) > self.now);
                let later = if slow { ANSWER } else { 2 + self.below(30) };
                self.after(later, What::Keeper(h, life, Input::Looks));
            }
            Input::Looks => {
                let seen = self.look(h);
                self.seen(h, seen);
                self.after(LOOK, What::Keeper(h, life, Input::Look));
            }
            Input::Heard(beat) => {
                let Some(keeper) = &mut self.hosts[h].keeper else { return };
                let number = |beat: &Heartbeat| (beat.life, beat.number);
                if keeper.peer.as_ref().is_none_or(|peer| number(peer) < number(&beat)) {
                    keeper.peer = Some((*beat).clone());
                }
                self.tell(h, Told::Heartbeat(*beat));
            }
            Input::Record(record) => self.tell(h, Told::Event(Event::Record(record.map(|record| *record)))),
            Input::Done(question, event) => self.hand_is_free(h, question, event.map(|event| *event)),
            Input::Overdue(question) => {
                let Some(keeper) = &self.hosts[h].keeper else { return };
                let loads = matches!(&keeper.asked, Some((asked, Command::Load(_))) if *asked == question);
                self.hand_is_free(h, question, loads.then_some(Event::LoadFailed));
            }
        }
    }

    fn beat(&mut self, h: usize) {
        let now = self.local(h);
        let Some(keeper) = &mut self.hosts[h].keeper else { return };
        keeper.beats += 1;
        let protocol = keeper.engine.protocol();
        let (last, image) = (keeper.last.as_ref(), protocol.local().image);
        let known = protocol.record().map_or(Generation(0), |record| record.generation);
        let generation = image.map(|image| image.generation).or(protocol.local().generation).unwrap_or(known);
        let over = last.and_then(|seen| seen.over).is_some_and(|(over, _)| over >= generation.0);
        let beat = Heartbeat {
            guest: self.guest,
            host: HOSTS[h].to_owned(),
            life: keeper.life,
            number: keeper.beats,
            term: protocol.term(),
            generation,
            epoch: EpochId(last.map_or(0, |seen| seen.epoch)),
            qemu_age: last.and_then(|seen| seen.qemu).map(|at| now.saturating_duration_since(at)),
            image: image.map(|image| image.incarnation),
            ended: *protocol.role() == Role::Ended || (over && !keeper.crashed),
            yields: false,
            crashed: keeper.crashed,
            settings: None,
        };
        self.beat_arrives_at(1 - h, &beat);
    }

    fn tell(&mut self, h: usize, told: Told) {
        let now = self.local(h);
        let Some(keeper) = &mut self.hosts[h].keeper else { return };
        let (life, protecting) = (keeper.life, keeper.protecting);
        let recovering = matches!(keeper.engine.protocol().role(), Role::Recovering { .. });
        for output in keeper.engine.step(told, now) {
            match output {
                // As the keeper has it: a protection that was begun before its life goes on.
                Output::Command(Command::OpenGate(_)) if recovering && protecting => {}
                Output::Command(Command::Read) => self.ask_to_read(h, life),
                Output::Command(Command::Swap(_))
                    if self.bug == Bug::ReopenOnRestart
                        && matches!(self.role(h), Some(Role::Recovering { .. })) => {}
                Output::Command(Command::Swap(new)) => {
                    let said = Said::Asks(format!("{:?}", new.owner));
                    self.steps.push(Step { host: HOSTS[h].to_owned(), life, term: new.term.0, said });
                    self.ask_to_swap(h, &new);
                }
                Output::Command(command) => self.hand(h, command),
                Output::Became(role) => {
                    self.note(|| format!("{} keeper: {}", HOSTS[h], role.label()));
                    self.became(h, &role);
                }
                Output::Suspected(why) => {
                    self.note(|| format!("{} keeper: suspects, {why}", HOSTS[h]));
                }
                Output::Heard | Output::TookOver(_) => {}
            }
        }
        let clock = self.hosts[h].clock;
        let Some(keeper) = &mut self.hosts[h].keeper else { return };
        let due = clock.when(keeper.engine.deadline(), self.now);
        if due < keeper.ticks_at {
            keeper.ticks_at = due;
            self.at(due, What::Keeper(h, life, Input::Tick));
        }
    }

    fn became(&mut self, h: usize, role: &Role) {
        if let Some(keeper) = &self.hosts[h].keeper {
            let (life, term) = (keeper.life, keeper.engine.protocol().term().0);
            let said = Said::Is(role.label().to_owned());
            self.steps.push(Step { host: HOSTS[h].to_owned(), life, term, said });
        }
        for what in invariants::became(self, h, role) {
            self.wrong(what);
        }
        match (self.bug, role) {
            (Bug::SoloWithoutSwap, Role::Asking) if self.policies.lost_backup == LostBackup::Solo => {
                self.hand(h, Command::OpenGate(Term(u64::MAX)));
            }
            (Bug::ReopenOnRestart, Role::Recovering { since }) => {
                self.hand(h, Command::OpenGate(since.next()));
            }
            (Bug::SeedWithOpenGate, Role::Protected) => {
                if let Some(gate) = &self.hosts[h].plug {
                    super::plug::lock(gate).leaks = false;
                }
            }
            _ => {}
        }
    }

    fn hand(&mut self, h: usize, command: Command) {
        if let Command::HoldGate(term) = command {
            return self.have_it_held(h, term);
        }
        let Some(keeper) = &mut self.hosts[h].keeper else { return };
        keeper.opening += u32::from(matches!(command, Command::OpenGate(_)));
        keeper.hands.push_back(command);
        self.next_hand(h);
    }

    /// Waits for nothing, and nobody waits for it: it may come to nothing.
    pub(super) fn have_it_held(&mut self, h: usize, term: Term) {
        let later = 1 + self.side.below(5);
        if self.chaos && self.side.below(2) == 0 {
            return;
        }
        if let Some(agent) = self.hosts[h].life(Process::Primary) {
            self.note(|| format!("{} keeper -> hold the gate, term {term}", HOSTS[h]));
            self.after(later, What::Primary(h, agent, primary::Input::Hold(term)));
        }
    }

    /// An order that its keeper does not outlive may be carried out long after it was given: the agent stands still, or
    /// what brings it the order does.
    fn order_is_late(&mut self, h: usize) -> u64 {
        if !self.chaos || self.side.below(6) > 0 {
            return 0;
        }
        self.after(0, What::Fault(Fault::Kill(h, Process::Keeper)));
        let back = 100 + self.side.below(300);
        self.after(back, What::Start(h, Process::Keeper));
        300 + self.side.below(4000)
    }

    fn next_hand(&mut self, h: usize) {
        let Some(keeper) = &mut self.hosts[h].keeper else { return };
        if keeper.asked.is_some() {
            return;
        }
        let Some(command) = keeper.hands.pop_front() else { return };
        keeper.questions += 1;
        let (life, question) = (keeper.life, keeper.questions);
        keeper.asked = Some((question, command.clone()));
        self.note(|| format!("{} keeper -> {command:?}", HOSTS[h]));
        let limit = if matches!(command, Command::OpenGate(_)) { LIMIT / 2 } else { LIMIT };
        self.after(limit, What::Keeper(h, life, Input::Overdue(question)));
        let host = &self.hosts[h];
        let (primary, backup) = (host.life(Process::Primary), host.life(Process::Backup));
        let later = 1 + self.random.below(5);
        let refused = match command {
            Command::Load(term) => match backup {
                Some(agent) => {
                    let input = backup::Input::Failover(life, question, true, term);
                    return self.after(later, What::Backup(h, agent, input));
                }
                None => Some(Event::LoadFailed),
            },
            Command::Activate(term) | Command::Abandon(term) => {
                let proceed = matches!(command, Command::Activate(_));
                if let Some(agent) = backup {
                    let input = backup::Input::Confirm(life, question, proceed, term);
                    return self.after(later, What::Backup(h, agent, input));
                }
                None
            }
            Command::OpenGate(term) => {
                if let Some(agent) = primary {
                    let later = later + self.order_is_late(h);
                    let input = primary::Input::Unprotect(life, question, term);
                    return self.after(later, What::Primary(h, agent, input));
                }
                None
            }
            Command::DestroyGuest(_) => {
                self.seen.destroyed += 1;
                self.end_guest(h, "destroyed");
                None
            }
            Command::HoldGate(_) | Command::PauseGuest(_) | Command::ResumeGuest(_) => None,
            Command::Read | Command::Swap(_) => None,
        };
        self.after(later, What::Keeper(h, life, Input::Done(question, refused.map(Box::new))));
    }

    fn hand_is_free(&mut self, h: usize, question: u64, event: Option<Event>) {
        let Some(keeper) = &mut self.hosts[h].keeper else { return };
        let Some((_, command)) = keeper.asked.take_if(|(asked, _)| *asked == question) else { return };
        if matches!(command, Command::OpenGate(_)) {
            keeper.opening = keeper.opening.saturating_sub(1);
            keeper.outdated = true;
        }
        if let Some(event) = event {
            self.tell(h, Told::Event(event));
        }
        self.next_hand(h);
    }

    /// A person, or a script: protects a guest that is not, as soon as that can be done.
    pub(super) fn operator(&mut self, h: usize) {
        let later = 400 + self.below(800);
        self.after(later, What::Operator(h));
        let alone = matches!(self.role(h), None | Some(Role::Unknown | Role::Solo | Role::Ended));
        let runs = self.hosts[h].qemu.as_ref().is_some_and(|qemu| qemu.kind == Kind::Active);
        let mine = match self.arbiter.alone() {
            None => true,
            Some(owner) => owner == HOSTS[h],
        };
        if let Some(life) = self.hosts[h].life(Process::Primary)
            && alone
            && runs
            && mine
        {
            self.after(1, What::Primary(h, life, primary::Input::Protect));
        }
    }
}
