//! The primary agent around its engine: what its commands do, and what becomes of them.

mod protect;

mod stream;

use std::time::{Duration, Instant};

use understudy_libvirt::{DomainEvent, Lifecycle, RunState};
use understudy_primary::egress::{SharedKeeper, State};
use understudy_primary::engine::{Command, Engine, Event, Outcome, OutcomeKind};
use understudy_proto::epoch::Committed;
use understudy_proto::ids::Generation;
use understudy_proto::ownership::{Orders, Term};
use understudy_proto::rpc::admin::GuestState;
use understudy_proto::rpc::epoch::{BackupMessage, GoodbyeReason, PrimaryMessage};
use understudy_watchdog::owner::Sending;

use super::capture::{Call, Capture};
use super::host::Process;
use super::net::{Message, Side};
use super::{HOSTS, What, World, keeper};
use crate::bugs::Bug;

/// Beyond it an agent knows that it stood still, as `understudy_primary` has it.
const STILL: Duration = Duration::from_secs(1);

/// Between two looks whether an instance that has lost the guest is there.
const GONE: u64 = 2000;

/// Turns are never further apart.
const TURN: u64 = 500;

/// See the module's description.
pub(crate) struct PrimaryAgent {
    life: u64,
    entry: Option<Entry>,
    protections: u64,
    orders: Orders,
}

/// What it knows of the guest.
enum Entry {
    /// Protected before the agent died; not yet again.
    Waiting(u64),
    Owned(Box<Protection>),
}

/// A protection.
pub(super) struct Protection {
    pub(super) number: u64,
    pub(super) generation: u64,
    engine: Engine,
    pub(super) gate: SharedKeeper,
    pub(super) capture: Capture,
    stream: Option<u64>,
    /// The epoch that is on its way, as the messages it is made of, and whether they are sent as they come.
    feed: Option<(Vec<PrimaryMessage>, bool)>,
    pulse: Instant,
    ticks_at: u64,
    pub(super) outcome: Option<Outcome>,
    pub(super) listening: bool,
    unprotecting: Vec<(u64, u64)>,
}

/// What it is told.
#[derive(Debug)]
pub(crate) enum Input {
    /// It has been started.
    Begin,
    Protect,
    /// By the keeper of this life, with this question, under this term.
    Unprotect(u64, u64, Term),
    Hold(Term),
    Tick(u64),
    /// Whether the instance of a superseded guest is gone is looked at.
    Gone(u64),
    Connect(u64, u64),
    Event(u64, Box<Event>),
    Done(u64, u64),
    Message(u64, u64, Box<BackupMessage>),
    StreamEnds(u64, u64, String),
}

impl World {
    pub(super) fn start_primary(&mut self, h: usize, life: u64) {
        let entry = self.hosts[h].disk.protected.map(Entry::Waiting);
        self.hosts[h].primary = Some(PrimaryAgent { life, entry, protections: 0, orders: Orders::default() });
        let later = 20 + self.below(200);
        self.after(later, What::Primary(h, life, Input::Begin));
    }

    pub(super) fn protection(&mut self, h: usize) -> Option<&mut Protection> {
        match self.hosts[h].primary.as_mut()?.entry.as_mut()? {
            Entry::Owned(protection) => Some(protection),
            Entry::Waiting(_) => None,
        }
    }

    /// The protection that is not over.
    pub(super) fn ongoing(&mut self, h: usize, number: u64) -> Option<&mut Protection> {
        self.protection(h).filter(|p| p.number == number && p.outcome.is_none())
    }

    pub(super) fn primary_input(&mut self, h: usize, input: Input) {
        match input {
            Input::Begin => self.begin_primary(h),
            Input::Protect => self.protect(h, true),
            Input::Unprotect(life, question, term) => self.unprotect(h, life, question, term),
            Input::Hold(term) => {
                if let Some(agent) = &mut self.hosts[h].primary {
                    let promised = agent.orders.hold(term);
                    self.note(|| format!("{} primary promises to hold: {promised:?}", HOSTS[h]));
                }
            }
            Input::Tick(number) => {
                let now = self.now;
                // As with the keeper's.
                if let Some(protection) = self.ongoing(h, number).filter(|ongoing| ongoing.ticks_at <= now) {
                    protection.ticks_at = u64::MAX;
                    self.primary_event(h, number, Event::Tick);
                }
            }
            Input::Gone(number) => self.is_it_gone(h, number),
            Input::Connect(number, session) => self.connect(h, number, session),
            Input::Event(number, event) => self.primary_event(h, number, *event),
            Input::Done(number, call) => self.capture_done(h, number, call),
            Input::Message(stream, session, message) => self.hears(h, stream, session, *message),
            Input::StreamEnds(stream, session, reason) => {
                if let Some(protection) = self.protection(h).filter(|p| p.stream == Some(stream)) {
                    protection.stream = None;
                    let number = protection.number;
                    self.primary_event(h, number, Event::Disconnected { session, reason });
                }
            }
        }
    }

    /// An instance that has lost the guest is remembered until it is gone.
    fn is_it_gone(&mut self, h: usize, number: u64) {
        let superseded = |protection: &&mut Protection| {
            let outcome = protection.outcome.as_ref();
            protection.number == number
                && outcome.is_some_and(|outcome| outcome.kind == OutcomeKind::Superseded)
        };
        let Some(protection) = self.protection(h) else { return };
        let Some(protection) = Some(protection).filter(superseded) else { return };
        let generation = protection.generation;
        if self.hosts[h].qemu.is_none() || self.is_past(h, generation) {
            self.forget_protection(h);
        } else if let Some(life) = self.hosts[h].life(Process::Primary) {
            self.after(GONE, What::Primary(h, life, Input::Gone(number)));
        }
    }

    fn forget_protection(&mut self, h: usize) {
        if !self.hosts[h].disk.full {
            self.hosts[h].disk.protected = None;
        }
    }

    fn unprotect(&mut self, h: usize, life: u64, question: u64, term: Term) {
        let looks = self.bug != Bug::OrdersOfThePast;
        let Some(agent) = &mut self.hosts[h].primary else { return };
        let taken = agent.orders.open(Some(term).filter(|_| looks));
        if let Err(outdated) = taken {
            self.note(|| format!("{} primary refuses to end the protection: {outdated}", HOSTS[h]));
            self.after(2, What::Keeper(h, life, keeper::Input::Done(question, None)));
            return;
        }
        match &mut agent.entry {
            Some(Entry::Owned(protection)) if protection.outcome.is_none() => {
                protection.unprotecting.push((life, question));
                let number = protection.number;
                self.primary_event(h, number, Event::Unprotect);
                return;
            }
            Some(Entry::Owned(protection)) => {
                let _ = protection.gate.remove();
                agent.entry = None;
            }
            Some(Entry::Waiting(_)) | None => agent.entry = None,
        }
        agent.orders.opened();
        self.forget_protection(h);
        self.after(2, What::Keeper(h, life, keeper::Input::Done(question, None)));
    }

    /// The engine takes an event, and what it says is done.
    pub(super) fn primary_event(&mut self, h: usize, number: u64, event: Event) {
        let now = self.local(h);
        let Some(protection) = self.ongoing(h, number) else { return };
        let still = now.saturating_duration_since(std::mem::replace(&mut protection.pulse, now));
        let mut events = vec![event];
        if still > STILL {
            events.insert(0, Event::StoodStill(still));
        }
        for event in events {
            self.note(|| format!("{} primary: {event:?}", HOSTS[h]));
            let Some(protection) = self.ongoing(h, number) else { return };
            for command in protection.engine.step(event, now) {
                self.note(|| format!("{} primary -> {command:?}", HOSTS[h]));
                self.primary_command(h, number, command);
            }
        }
        let Some(protection) = self.ongoing(h, number) else { return };
        let (deadline, planned) = (protection.engine.deadline(), protection.ticks_at);
        let clock = self.hosts[h].clock;
        let due = deadline.map_or(u64::MAX, |at| clock.when(at, self.now)).min(self.now + TURN);
        if due < planned
            && let Some(agent) = &self.hosts[h].primary
        {
            let life = agent.life;
            self.at(due, What::Primary(h, life, Input::Tick(number)));
            if let Some(protection) = self.protection(h) {
                protection.ticks_at = due;
            }
        }
    }

    /// An event that comes a little later.
    pub(super) fn primary_later(&mut self, h: usize, number: u64, later: u64, event: Event) {
        if let Some(agent) = &self.hosts[h].primary {
            let life = agent.life;
            self.after(later, What::Primary(h, life, Input::Event(number, Box::new(event))));
        }
    }

    fn primary_command(&mut self, h: usize, number: u64, command: Command) {
        let Some(life) = self.hosts[h].primary.as_ref().map(|agent| agent.life) else { return };
        match command {
            Command::Connect { session, after } => {
                let later = u64::try_from(after.as_millis()).unwrap_or(0) + 1 + self.below(10);
                self.after(later, What::Primary(h, life, Input::Connect(number, session)));
            }
            Command::Arm(epoch) => self.capture(h, number, Call::Arm(epoch)),
            Command::Start => self.capture(h, number, Call::Start),
            Command::WaitReady => self.capture(h, number, Call::WaitReady),
            Command::Checkpoint(epoch) => self.capture(h, number, Call::Checkpoint(epoch, false)),
            Command::CheckpointHeld(epoch) => self.capture(h, number, Call::Checkpoint(epoch, true)),
            Command::Disarm => self.capture(h, number, Call::Disarm),
            Command::Rescue => self.capture(h, number, Call::Rescue),
            Command::Interrupt => {
                if let Some(protection) = self.protection(h) {
                    protection.capture.interrupted = true;
                }
            }
            Command::Resend => self.resend(h),
            Command::Forget => {
                if let Some(protection) = self.protection(h) {
                    protection.feed = None;
                }
            }
            Command::Release(committed) => self.release(h, number, &committed),
            Command::AskQemu(question) => {
                let state = self.hosts[h].qemu.as_ref().filter(|qemu| !qemu.hung).map(|qemu| {
                    match (qemu.paused, qemu.stopped) {
                        (true, _) => RunState::Paused,
                        (_, true) => RunState::Colo,
                        _ => RunState::Running,
                    }
                });
                let later = if state.is_some() { 1 + self.below(5) } else { 1000 };
                self.primary_later(h, number, later, Event::Answer(question, state));
            }
            Command::Resubscribe => self.primary_later(h, number, 50, Event::Subscribed),
            Command::PauseGuest => {
                if let Some(qemu) = &mut self.hosts[h].qemu {
                    qemu.paused = true;
                }
                self.primary_later(h, number, 3, Event::Paused(Ok(())));
            }
            Command::Finish { goodbye, outcome } => self.finish(h, goodbye, outcome),
        }
    }

    fn release(&mut self, h: usize, number: u64, committed: &Committed) {
        let stopped = self.hosts[h].qemu.as_ref().is_some_and(|qemu| qemu.stopped);
        let Some(generation) = self.protection(h).map(|protection| protection.generation) else { return };
        for what in crate::invariants::released(self, generation, committed.epoch().0) {
            self.wrong(what);
        }
        let Some(protection) = self.protection(h) else { return };
        // Only while the guest is stopped for it may everything go.
        let result = if protection.gate.flushes() && !stopped {
            Err("the guest ran".to_owned())
        } else {
            protection.gate.committed(committed).map_err(|error| error.to_string())
        };
        protection.feed = None;
        if let Err(reason) = result {
            self.primary_later(h, number, 0, Event::OutputFailed(reason));
        }
        self.seen.epochs += 1;
    }

    fn finish(&mut self, h: usize, goodbye: Option<GoodbyeReason>, outcome: Outcome) {
        let Some(protection) = self.protection(h) else { return };
        let stream = protection.stream.take();
        let open = protection.gate.state() == State::Open;
        let _ = match outcome.kind {
            OutcomeKind::Unprotected => protection.gate.remove(),
            OutcomeKind::Failed if goodbye.is_some() || open => protection.gate.remove(),
            OutcomeKind::Ended | OutcomeKind::Crashed | OutcomeKind::Superseded => protection.gate.discard(),
            OutcomeKind::Failed | OutcomeKind::AgentStopped => Ok(()),
        };
        let waiting = std::mem::take(&mut protection.unprotecting);
        let superseded = outcome.kind == OutcomeKind::Superseded;
        let forget = outcome.kind != OutcomeKind::AgentStopped && !superseded;
        let number = protection.number;
        protection.outcome = Some(outcome);
        if let Some(stream) = stream {
            if let Some(reason) = goodbye {
                self.send(stream, Side::Primary, Message::Forth(PrimaryMessage::Goodbye(reason)));
            }
            self.close_stream(stream, Side::Primary, "the protection is over");
        }
        if forget {
            self.forget_protection(h);
        }
        if superseded && let Some(life) = self.hosts[h].life(Process::Primary) {
            self.after(GONE, What::Primary(h, life, Input::Gone(number)));
        }
        for (life, question) in waiting {
            if let Some(agent) = &mut self.hosts[h].primary {
                agent.entry = None;
                agent.orders.opened();
            }
            self.after(2, What::Keeper(h, life, keeper::Input::Done(question, None)));
        }
    }

    pub(super) fn tell_primary_of_end(&mut self, h: usize, detail: &str) {
        if let Some(number) = self.protection(h).map(|protection| protection.number) {
            let kind = Lifecycle::Stopped;
            let event = DomainEvent::Lifecycle { kind, detail: detail.to_owned() };
            let later = 1 + self.below(50);
            self.primary_later(h, number, later, Event::Domain(event));
        }
    }

    /// A frame of the guest waits in the gate.
    pub(super) fn frame_waits(&mut self, h: usize) {
        if let Some(protection) = self.protection(h)
            && std::mem::take(&mut protection.listening)
        {
            let number = protection.number;
            self.primary_later(h, number, 1, Event::OutputWaiting { pressing: false });
        }
    }

    /// The generation that status says.
    pub(super) fn said_generation(&self, h: usize) -> Option<u64> {
        Some(match self.hosts[h].primary.as_ref()?.entry.as_ref()? {
            Entry::Waiting(generation) => *generation,
            Entry::Owned(protection) => protection.generation,
        })
    }

    /// What status says: state, what it sends, last committed epoch, generation.
    pub(super) fn primary_status(&self, h: usize) -> Option<(GuestState, Option<Sending>, u64)> {
        let agent = self.hosts[h].primary.as_ref()?;
        Some(match agent.entry.as_ref()? {
            Entry::Waiting(_) => (GuestState::Degraded, None, 0),
            Entry::Owned(protection) => {
                let view = protection.engine.view();
                let state = protection.outcome.as_ref().map_or(view.state, |outcome| outcome.kind.state());
                let generation = Generation(protection.generation);
                let held = match self.bug {
                    // The keeper waits for no promise.
                    Bug::PairWithoutPromise => None,
                    _ => Some(agent.orders.held()),
                };
                let sending = view.committed.map(|committed| Sending { generation, committed, held });
                (state, sending, view.committed.map_or(0, |epoch| epoch.0))
            }
        })
    }
}
