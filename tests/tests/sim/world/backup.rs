//! The backup agent around its engine: what its commands do, and what becomes of them.

mod promoter;

use std::collections::VecDeque;
use std::sync::Arc;

use understudy_backup::engine::{Command, ConnectionId, Engine, Event, Identity};
use understudy_backup::image::Image;
use understudy_backup::promoter::LocalDomain;
use understudy_proto::control::{ControlFile, Role};
use understudy_proto::ids::Incarnation;
use understudy_proto::negotiate::{self, Offer};
use understudy_proto::ownership::Term;
use understudy_proto::rpc::admin::{GuestState, LOADED};
use understudy_proto::rpc::epoch::{BackupMessage, EpochRef, PrimaryMessage};
use understudy_watchdog::owner::{Event as OwnerEvent, Image as HeldImage};

use super::host::Process;
use super::net::{Message, Side};
use super::worker::{Report, Worker};
use super::{HOSTS, What, World, keeper};
use crate::bugs::Bug;
use crate::invariants;

/// How often time passes for the engine.
const TICK: u64 = 250;

/// See the module's description.
pub(crate) struct BackupAgent {
    life: u64,
    engine: Option<Engine>,
    pub(super) worker: Worker,
    /// The image while it is promoted.
    taken: Option<Arc<Image>>,
    /// Who waits for the end of a failover.
    asking: Option<Asking>,
    /// Reports and calls come in order.
    reports_at: u64,
}

/// A keeper of this life, its question, and whether it waits for the load only.
#[derive(Debug, Clone, Copy)]
struct Asking {
    life: u64,
    question: u64,
    hold: bool,
}

/// A call of the promoter.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Call {
    Prepare,
    Check,
    Discard,
    Load,
    Activate,
}

/// What it is told.
#[derive(Debug)]
pub(crate) enum Input {
    Tick,
    Message(u64, Box<PrimaryMessage>),
    StreamEnds(u64, String),
    Report(Report),
    Image,
    Called(Call),
    /// By the keeper of this life, with this question, under this term.
    Failover(u64, u64, bool, Term),
    Confirm(u64, u64, bool, Term),
}

impl BackupAgent {
    pub(crate) fn record(&self) -> Option<&ControlFile> {
        self.engine.as_ref().map(Engine::record)
    }

    /// The epoch it holds.
    pub(crate) fn holds(&self) -> Option<EpochRef> {
        self.engine.as_ref()?.committed().map(|(at, _)| at)
    }

    /// The image, when nothing of an epoch is about to go into it.
    pub(crate) fn image(&self) -> Option<&Arc<Image>> {
        self.worker.image().filter(|_| !self.worker.holds_verified())
    }

    /// Whether the epoch it holds is in the image, or verified and about to be.
    pub(crate) fn is_whole(&self) -> bool {
        let applied = self.worker.image().and_then(|image| image.at());
        self.worker.holds_verified() || applied == self.holds()
    }

    pub(crate) fn incarnation(&self) -> Incarnation {
        Incarnation(uuid::Uuid::from_u128(self.life.into()))
    }

    /// What status says: state, the image it would promote, last committed epoch, generation.
    pub(super) fn status(&self) -> Option<(GuestState, Option<HeldImage>, u64, u64)> {
        let engine = self.engine.as_ref()?;
        let (state, record) = (engine.state(), engine.record());
        if record.role == Role::Released {
            return None;
        }
        let (incarnation, generation) = (self.incarnation(), record.generation);
        let image = matches!(state, GuestState::Standby | GuestState::Promoting)
            .then_some(HeldImage { incarnation, generation });
        Some((state, image, record.last_committed.map_or(0, |epoch| epoch.0), generation.0))
    }
}

impl World {
    fn identity(h: usize, life: u64) -> Identity {
        Identity {
            host: HOSTS[h].to_owned(),
            incarnation: Incarnation(uuid::Uuid::from_u128(life.into())),
            qemu_version: None,
            libvirt_version: None,
            staging_max_bytes: 1 << 20,
        }
    }

    pub(super) fn start_backup(&mut self, h: usize, life: u64) {
        let record = self.hosts[h].disk.control.clone();
        let role = record.as_ref().map_or(Role::Released, |record| record.role);
        let local = match self.local_domain(h) {
            LocalDomain::Waiting => LocalDomain::Absent,
            LocalDomain::Loaded if role == Role::Standby => LocalDomain::Absent,
            local => local,
        };
        if local == LocalDomain::Absent {
            self.hosts[h].qemu = None;
        }
        let engine = record.map(|record| Engine::restarted(Self::identity(h, life), record, local));
        let agent =
            BackupAgent { life, engine, worker: Worker::default(), taken: None, asking: None, reports_at: 0 };
        self.hosts[h].backup = Some(agent);
        self.after(TICK, What::Backup(h, life, Input::Tick));
    }

    pub(super) fn backup_input(&mut self, h: usize, input: Input) {
        match input {
            Input::Tick => {
                if let Some(life) = self.hosts[h].life(Process::Backup) {
                    self.after(TICK, What::Backup(h, life, Input::Tick));
                }
                self.backup_event(h, Event::Tick);
            }
            Input::Message(stream, message) => match *message {
                PrimaryMessage::Hello(hello) => {
                    let Ok(agreement) = negotiate::select(&Offer::ours(), &hello.offer) else { return };
                    let local = self.local_domain(h);
                    self.admit(h, &hello);
                    let connection = ConnectionId(stream);
                    let hello = Box::new(hello);
                    self.backup_event(h, Event::Hello { connection, hello, agreement, local });
                }
                message => self.backup_event(h, Event::Message(ConnectionId(stream), message)),
            },
            Input::StreamEnds(stream, reason) => {
                self.backup_event(h, Event::Disconnected(ConnectionId(stream), reason));
            }
            Input::Report(report) => {
                let event = match report {
                    Report::Verified(proof) => Event::Verified(proof),
                    Report::Rejected(attempt, at, fault) => Event::Rejected(attempt, at, fault),
                    Report::ApplyFailed(reason) => Event::ApplyFailed(reason),
                };
                self.backup_event(h, event);
            }
            Input::Image => {
                let Some(agent) = &mut self.hosts[h].backup else { return };
                let wanted = agent.engine.as_ref().is_some_and(Engine::wants_image);
                let image = agent.worker.image();
                let at = image.and_then(|image| image.at());
                agent.taken = image.filter(|_| wanted).cloned();
                self.backup_event(h, Event::ImageReady(at));
            }
            Input::Called(call) => self.called(h, call),
            Input::Failover(life, question, hold, term) => self.failover(h, life, question, hold, term),
            Input::Confirm(life, question, proceed, term) => self.confirm(h, life, question, proceed, term),
        }
    }

    /// The guest is known from its first Hello on.
    fn admit(&mut self, h: usize, hello: &understudy_proto::rpc::epoch::Hello) {
        let forgets = self.bug == Bug::NoGenerationCheck;
        let Some(agent) = &mut self.hosts[h].backup else { return };
        let life = agent.life;
        match &mut agent.engine {
            Some(engine) if forgets && hello.generation < engine.record().generation => {
                let role = Role::Standby;
                let record = ControlFile { role, generation: hello.generation, ..engine.record().clone() };
                *engine = Engine::restarted(Self::identity(h, life), record, LocalDomain::Absent);
            }
            Some(_) => {}
            none => {
                let name = hello.guest_name.clone();
                *none = Some(Engine::new(Self::identity(h, life), hello.guest, name));
            }
        }
    }

    /// Whether an order of this term counts.
    fn takes(&mut self, h: usize, term: Term) -> bool {
        let engine = self.hosts[h].backup.as_mut().and_then(|agent| agent.engine.as_mut());
        engine.is_none_or(|engine| engine.take_order(Some(term)).is_ok())
    }

    fn failover(&mut self, h: usize, life: u64, question: u64, hold: bool, term: Term) {
        let taken = self.takes(h, term);
        let Some(agent) = &mut self.hosts[h].backup else { return };
        if !taken || agent.asking.is_some() || agent.engine.is_none() {
            return self.answer_keeper(h, life, question, hold.then_some(OwnerEvent::LoadFailed));
        }
        agent.asking = Some(Asking { life, question, hold });
        let at_once = self.bug == Bug::PromoteWithoutConfirm;
        let event = if hold && !at_once { Event::Claimed } else { Event::Failover { i_have_fenced: true } };
        self.backup_event(h, event);
    }

    fn confirm(&mut self, h: usize, life: u64, question: u64, proceed: bool, term: Term) {
        if !self.takes(h, term) {
            return self.answer_keeper(h, life, question, None);
        }
        let waits = self.hosts[h]
            .backup
            .as_ref()
            .and_then(|agent| agent.engine.as_ref())
            .is_some_and(Engine::awaits_confirmation);
        self.backup_event(h, Event::Confirm { proceed });
        if waits || !proceed {
            self.answer_keeper(h, life, question, None);
        } else {
            // The record says that it is to run here; what was loaded for that is gone, so it is loaded again.
            self.failover(h, life, question, false, term);
        }
    }

    fn answer_keeper(&mut self, h: usize, life: u64, question: u64, event: Option<OwnerEvent>) {
        let later = 1 + self.below(5);
        self.after(later, What::Keeper(h, life, keeper::Input::Done(question, event.map(Box::new))));
    }

    fn backup_event(&mut self, h: usize, event: Event) {
        let now = self.local(h);
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            if !matches!(event, Event::Tick) {
                self.note(|| format!("{} backup: {event:?}", HOSTS[h]));
            }
            let Some(engine) = self.hosts[h].backup.as_mut().and_then(|agent| agent.engine.as_mut()) else {
                return;
            };
            for command in engine.step(event, now) {
                self.note(|| format!("{} backup -> {command:?}", HOSTS[h]));
                let required = matches!(command, Command::WriteControl { required: true, .. });
                let next = self.backup_command(h, command);
                let failed = required && matches!(next, Some(Event::ControlFailed(_)));
                events.extend(next);
                if failed {
                    break;
                }
            }
        }
    }

    fn report(&mut self, h: usize, report: Option<Report>) {
        if let Some(report) = report {
            self.backup_later(h, 1, 8, Input::Report(report));
        }
    }

    /// In order with everything else of its kind.
    fn backup_later(&mut self, h: usize, least: u64, more: u64, input: Input) {
        let later = self.now + least + self.below(more);
        let Some(agent) = &mut self.hosts[h].backup else { return };
        agent.reports_at = agent.reports_at.max(later);
        let (when, life) = (agent.reports_at, agent.life);
        self.at(when, What::Backup(h, life, input));
    }

    fn backup_command(&mut self, h: usize, command: Command) -> Option<Event> {
        let (bug, life) = (self.bug, self.hosts[h].life(Process::Backup)?);
        let worker = self.hosts[h].backup.as_mut().map(|agent| &mut agent.worker)?;
        match command {
            Command::Send(id, message) => self.send(id.0, Side::Backup, Message::Back(message)),
            Command::Ack(id, proof) => {
                self.acknowledge(h, id, proof.at());
            }
            Command::Close(id) => self.close_stream(id.0, Side::Backup, "the backup has closed it"),
            Command::WriteControl { file, required } => return self.write_control(h, file, required),
            Command::Open(attempt, begin, seed) => {
                let report = worker.open(attempt, begin, seed);
                self.report(h, report);
                if bug == Bug::AckBeforeComplete {
                    let at = EpochRef { generation: begin.generation, epoch: begin.epoch };
                    let stream = self.hosts[h].backup.as_ref()?.engine.as_ref()?.connection();
                    stream.into_iter().for_each(|id| self.acknowledge(h, id, at));
                }
            }
            Command::Frame(frame) => {
                let report = worker.frame(frame, bug == Bug::PartialEpoch);
                self.report(h, report);
            }
            Command::Device(piece) => worker.device(&piece),
            Command::Verify(manifest) => {
                let report = worker.verify(&manifest);
                self.report(h, report);
            }
            Command::Apply(attempt) => {
                let report = worker.apply(attempt);
                for what in invariants::applied(self, h) {
                    self.wrong(what);
                }
                self.report(h, report);
            }
            Command::DiscardEpoch => worker.discard(),
            Command::DropImage => {
                *worker = Worker::default();
                self.hosts[h].backup.as_mut()?.taken = None;
            }
            Command::TakeImage => self.backup_later(h, 1, 20, Input::Image),
            Command::Prepare(_) => self.call_promoter(h, life, Call::Prepare),
            Command::CheckStandby => self.call_promoter(h, life, Call::Check),
            Command::Adopt(number) => return Some(Event::Adopted(number, Err("cold".to_owned()))),
            Command::Discard => self.call_promoter(h, life, Call::Discard),
            Command::Load => self.call_promoter(h, life, Call::Load),
            Command::Activate => self.call_promoter(h, life, Call::Activate),
            Command::Progress(progress) => {
                let asking = self.hosts[h].backup.as_ref()?.asking.filter(|asking| asking.hold);
                if let Some(asking) = asking.filter(|_| progress.phase == LOADED) {
                    self.answer_keeper(h, asking.life, asking.question, Some(OwnerEvent::Loaded));
                }
            }
            Command::FailoverDone(outcome) => {
                let agent = self.hosts[h].backup.as_mut()?;
                agent.taken = None;
                let asking = agent.asking.take()?;
                let event = match (asking.hold, outcome.is_ok()) {
                    (true, true) => Some(OwnerEvent::Loaded),
                    (true, false) => Some(OwnerEvent::LoadFailed),
                    (false, _) => None,
                };
                self.answer_keeper(h, asking.life, asking.question, event);
            }
        }
        None
    }

    fn acknowledge(&mut self, h: usize, id: ConnectionId, at: EpochRef) {
        for what in invariants::acknowledged(self, h, at) {
            self.wrong(what);
        }
        self.send(id.0, Side::Backup, Message::Back(BackupMessage::Ack(at)));
    }

    fn write_control(&mut self, h: usize, file: ControlFile, required: bool) -> Option<Event> {
        for what in invariants::written(self, h, &file) {
            self.wrong(what);
        }
        if self.hosts[h].disk.full {
            let why = "no space left on device".to_owned();
            return Some(if required { Event::ControlFailed(why) } else { Event::ControlNotWritten });
        }
        let early = self.bug == Bug::RunBeforeRecord && file.role == Role::Promoting;
        if !early {
            self.hosts[h].disk.control = Some(file);
        }
        required.then_some(Event::ControlWritten)
    }
}
