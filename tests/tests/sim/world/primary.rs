//! The primary agent around its engine: what its commands do, and what becomes of them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use understudy_libvirt::{DomainEvent, Lifecycle, RunState};
use understudy_primary::egress::{GateEngine, SharedKeeper, State};
use understudy_primary::engine::{Command, Engine, Event, Outcome, OutcomeKind, Settings};
use understudy_proto::control::Role;
use understudy_proto::epoch::Committed;
use understudy_proto::ids::Generation;
use understudy_proto::negotiate::Offer;
use understudy_proto::rpc::admin::GuestState;
use understudy_proto::rpc::epoch::{BackupMessage, GoodbyeReason, Hello, PrimaryMessage};
use understudy_watchdog::owner::Sending;

use super::capture::{Call, Capture};
use super::guest::Kind;
use super::host::Process;
use super::net::{Message, Side};
use super::plug::{self, PlugGate};
use super::{HOSTS, What, World, keeper};
use crate::bugs::Bug;

/// Beyond it an agent knows that it stood still, as `understudy_primary` has it.
const STILL: Duration = Duration::from_secs(1);

/// Turns are never further apart.
const TURN: u64 = 500;

/// See the module's description.
pub(crate) struct PrimaryAgent {
    life: u64,
    entry: Option<Entry>,
    protections: u64,
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
    /// By the keeper of this life, with this question.
    Unprotect(u64, u64),
    Tick(u64),
    Connect(u64, u64),
    Event(u64, Box<Event>),
    Done(u64, u64),
    Message(u64, u64, Box<BackupMessage>),
    StreamEnds(u64, u64, String),
}

impl World {
    pub(super) fn start_primary(&mut self, h: usize, life: u64) {
        let entry = self.hosts[h].disk.protected.map(Entry::Waiting);
        self.hosts[h].primary = Some(PrimaryAgent { life, entry, protections: 0 });
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
            Input::Unprotect(life, question) => self.unprotect(h, life, question),
            Input::Tick(number) => {
                if let Some(protection) = self.ongoing(h, number) {
                    protection.ticks_at = u64::MAX;
                    self.primary_event(h, number, Event::Tick);
                }
            }
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

    /// What an agent does at its start: frees the guest, takes up what was protected.
    fn begin_primary(&mut self, h: usize) {
        if let Some(qemu) = &mut self.hosts[h].qemu
            && qemu.kind == Kind::Active
        {
            (qemu.stopped, qemu.colo) = (false, false);
        }
        self.take_up(h);
    }

    fn take_up(&mut self, h: usize) {
        let Some(agent) = &self.hosts[h].primary else { return };
        let Some(Entry::Waiting(_)) = agent.entry else { return };
        let life = agent.life;
        if self.hosts[h].qemu.is_none() {
            self.forget_protection(h);
            if let Some(agent) = &mut self.hosts[h].primary {
                agent.entry = None;
            }
            return;
        }
        self.protect(h, false);
        if let Some(PrimaryAgent { entry: Some(Entry::Waiting(_)), .. }) = &self.hosts[h].primary {
            self.after(2000, What::Primary(h, life, Input::Begin));
        }
    }

    fn forget_protection(&mut self, h: usize) {
        if !self.hosts[h].disk.full {
            self.hosts[h].disk.protected = None;
        }
    }

    /// What `understudy protect` does, or the agent itself after a restart.
    fn protect(&mut self, h: usize, attended: bool) {
        let Some(agent) = &self.hosts[h].primary else { return };
        let (life, number) = (agent.life, agent.protections + 1);
        let waiting = match &agent.entry {
            Some(Entry::Owned(protection)) if protection.outcome.is_none() => return,
            Some(Entry::Waiting(generation)) => Some(*generation),
            _ => None,
        };
        let active = self.hosts[h].qemu.as_ref().is_some_and(|qemu| qemu.kind == Kind::Active && !qemu.hung);
        let generation = match (waiting, attended) {
            (Some(generation), false) => Some(generation),
            (None, true) => self.generation_to_protect(h),
            _ => None,
        };
        let (Some(generation), true, false) = (generation, active, self.hosts[h].disk.full) else { return };
        self.hosts[h].disk.protected = Some(generation);
        let found = self.hosts[h].plug.is_some();
        let shared = match &self.hosts[h].plug {
            Some(plug) => Arc::clone(plug),
            None => self.new_plug(h),
        };
        let engine = if found { GateEngine::found() } else { GateEngine::open() };
        {
            let mut gate = plug::lock(&shared);
            if found {
                gate.buffer();
            } else {
                gate.release_all();
            }
            gate.leaks = self.bug == Bug::SeedWithOpenGate && self.arbiter.alone() == Some(HOSTS[h]);
        }
        let settings = Settings {
            generation: Generation(generation),
            epoch: Duration::from_millis(200),
            floor: Duration::from_millis(50),
            attended,
            first_session: life * 1_000_000 + number * 1000,
            peer: HOSTS[1 - h].to_owned(),
        };
        let now = self.local(h);
        let protection = Protection {
            number,
            generation,
            engine: Engine::new(settings, now),
            gate: SharedKeeper::new(engine, Box::new(PlugGate { plug: shared, bug: self.bug })),
            capture: Capture::default(),
            stream: None,
            feed: None,
            pulse: now,
            ticks_at: u64::MAX,
            outcome: None,
            listening: false,
            unprotecting: Vec::new(),
        };
        self.note(|| format!("{} protects generation {generation}, gate found: {found}", HOSTS[h]));
        if let Some(agent) = &mut self.hosts[h].primary {
            agent.protections = number;
            agent.entry = Some(Entry::Owned(Box::new(protection)));
        }
        self.primary_event(h, number, Event::Tick);
    }

    /// The newest generation there is a trace of, if nothing speaks against protecting the guest.
    fn generation_to_protect(&self, h: usize) -> Option<u64> {
        let peer = &self.hosts[1 - h];
        if !self.linked() || !peer.answers(Process::Backup, self.now) {
            return None;
        }
        let local = self.hosts[h].disk.control.as_ref();
        if local.is_some_and(|local| matches!(local.role, Role::Standby | Role::Promoting)) {
            return None;
        }
        let theirs = peer.backup.as_ref().and_then(super::backup::BackupAgent::record);
        let released = theirs.filter(|record| record.role == Role::Released).map(|record| record.generation.0);
        let generation =
            [Some(1), local.map(|local| local.generation.0), released].into_iter().flatten().max()?;
        let occupied = theirs.is_some_and(|record| {
            record.generation.0 >= generation && matches!(record.role, Role::Promoted | Role::Promoting)
        });
        (!occupied).then_some(generation)
    }

    fn unprotect(&mut self, h: usize, life: u64, question: u64) {
        let Some(agent) = &mut self.hosts[h].primary else { return };
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

    fn connect(&mut self, h: usize, number: u64, session: u64) {
        let Some(protection) = self.ongoing(h, number) else { return };
        let generation = Generation(protection.generation);
        let Some(stream) = self.open_stream(h, session) else {
            let later = 100 + self.below(900);
            let reason = "no answer".to_owned();
            return self.primary_later(h, number, later, Event::Disconnected { session, reason });
        };
        if let Some(protection) = self.ongoing(h, number) {
            protection.stream = Some(stream);
        }
        let hello = Hello {
            offer: Offer::ours(),
            guest: self.guest,
            guest_name: "web".to_owned(),
            generation,
            session,
            primary_host: HOSTS[h].to_owned(),
            qemu_version: String::new(),
            machine: String::new(),
            persistent: false,
        };
        self.send(stream, Side::Primary, Message::Forth(PrimaryMessage::Hello(hello)));
    }

    fn hears(&mut self, h: usize, stream: u64, session: u64, message: BackupMessage) {
        let held = self.seldom(15);
        let Some(protection) = self.protection(h).filter(|p| p.stream == Some(stream)) else { return };
        let number = protection.number;
        let event = match message {
            BackupMessage::HelloAck(ack) => Event::Connected { session, ack },
            BackupMessage::Ack(at) => {
                if held {
                    self.primary_event(h, number, Event::OutputHeld { bytes: 16 << 20 });
                }
                Event::Acked { session, at }
            }
            BackupMessage::Reject(reject) => Event::Rejected { session, reject },
            BackupMessage::Refused(refused) => {
                protection.stream = None;
                Event::Refused { session, refused }
            }
            BackupMessage::Standby(_) | BackupMessage::HeartbeatReply(_) => return,
        };
        self.primary_event(h, number, event);
    }

    /// A part of the epoch that is captured.
    pub(super) fn feed(&mut self, h: usize, message: PrimaryMessage) {
        if let Some(protection) = self.protection(h)
            && let Some((messages, live)) = &mut protection.feed
        {
            messages.push(message.clone());
            if let (true, Some(stream)) = (*live, protection.stream) {
                self.send(stream, Side::Primary, Message::Forth(message));
            }
        }
    }

    pub(super) fn new_feed(&mut self, h: usize) {
        if let Some(protection) = self.protection(h) {
            protection.feed = Some((Vec::new(), true));
        }
    }

    fn resend(&mut self, h: usize) {
        let Some(protection) = self.protection(h) else { return };
        let Some((messages, live)) = &mut protection.feed else { return };
        *live = true;
        let (messages, stream) = (messages.clone(), protection.stream);
        for message in messages {
            if let Some(stream) = stream {
                self.send(stream, Side::Primary, Message::Forth(message));
            }
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
            OutcomeKind::Ended | OutcomeKind::Superseded => protection.gate.discard(),
            OutcomeKind::Failed | OutcomeKind::AgentStopped => Ok(()),
        };
        let waiting = std::mem::take(&mut protection.unprotecting);
        let forget = outcome.kind != OutcomeKind::AgentStopped;
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
        for (life, question) in waiting {
            if let Some(agent) = &mut self.hosts[h].primary {
                agent.entry = None;
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

    /// What status says: state, what it sends, last committed epoch, generation.
    pub(super) fn primary_status(&self, h: usize) -> Option<(GuestState, Option<Sending>, u64)> {
        let entry = self.hosts[h].primary.as_ref()?.entry.as_ref()?;
        Some(match entry {
            Entry::Waiting(_) => (GuestState::Degraded, None, 0),
            Entry::Owned(protection) => {
                let view = protection.engine.view();
                let state = protection.outcome.as_ref().map_or(view.state, |outcome| outcome.kind.state());
                let generation = Generation(protection.generation);
                let sending = view.committed.map(|committed| Sending { generation, committed });
                (state, sending, view.committed.map_or(0, |epoch| epoch.0))
            }
        })
    }
}
