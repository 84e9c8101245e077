//! One guest of a keeper.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc;
use tracing::{debug, error, info, warn};
use understudy_proto::heartbeat::Heartbeat;
use understudy_proto::ids::{EpochId, Generation, GuestId};

use super::{Answer, Seen, Settings};
use crate::arbiter::Arbiter;
use crate::keeper::Host;
use crate::owner::{Command, Engine, Event, Input, Output, Role, Seeded};

/// Commands that may wait for one that takes long. The protocol gives them again.
const COMMANDS: usize = 64;

pub(super) struct Kept {
    guest: GuestId,
    pub(super) engine: Engine,
    hands: mpsc::Sender<Command>,
    arbiter: mpsc::Sender<Command>,
    peer: Option<Heartbeat>,
    last: Option<Seen>,
    beats: u64,
    /// Commands that open the gate and are not done; until then the agent's word about a protection is of before.
    opening: u32,
    /// The look under way began before the gate was open.
    outdated: bool,
}

impl Kept {
    pub(super) fn new(
        guest: GuestId,
        settings: &Settings,
        arbiter: Arc<dyn Arbiter>,
        host: Arc<dyn Host>,
        outbox: mpsc::Sender<Answer>,
        now: Instant,
    ) -> Self {
        let (hands, mut orders) = mpsc::channel::<Command>(COMMANDS);
        let answers = outbox.clone();
        tokio::spawn(async move {
            while let Some(command) = orders.recv().await {
                let opens = matches!(command, Command::OpenGate(_));
                let event = host.carry_out(guest, command).await;
                let answer = event.map(|event| Answer::Event(guest, event));
                for answer in answer.into_iter().chain(opens.then_some(Answer::Opened(guest))) {
                    if answers.send(answer).await.is_err() {
                        return;
                    }
                }
            }
        });
        let (asked, mut questions) = mpsc::channel::<Command>(COMMANDS);
        tokio::spawn(async move {
            let mut silent = false;
            while let Some(question) = questions.recv().await {
                let answer = match &question {
                    Command::Swap(new) => arbiter.swap(guest, new).await.map(|()| None),
                    _ => arbiter.read(guest).await.map(|record| Some(Event::Record(record))),
                };
                match answer {
                    Ok(event) => {
                        silent = false;
                        if let Some(event) = event
                            && outbox.send(Answer::Event(guest, event)).await.is_err()
                        {
                            return;
                        }
                    }
                    Err(failure) => {
                        if !std::mem::replace(&mut silent, true) {
                            warn!(%guest, arbiter = arbiter.name(), reason = failure.reason, "the arbiter gives no answer: nothing changes hands");
                        }
                    }
                }
            }
        });
        Self {
            guest,
            engine: Engine::new(settings.host.clone(), settings.policies, settings.timing, now),
            hands,
            arbiter: asked,
            peer: None,
            last: None,
            beats: 0,
            opening: 0,
            outdated: false,
        }
    }

    pub(super) fn event(&mut self, event: Event, now: Instant) {
        self.step(Input::Event(event), now);
    }

    pub(super) fn tick(&mut self, now: Instant) {
        self.step(Input::Tick, now);
    }

    pub(super) fn look_begins(&mut self) {
        self.outdated = self.opening > 0;
    }

    pub(super) fn opened(&mut self) {
        self.opening = self.opening.saturating_sub(1);
        // What is being looked at now may be of before.
        self.outdated = true;
    }

    pub(super) fn heard(&mut self, heartbeat: Heartbeat, now: Instant) {
        let newer = self
            .peer
            .as_ref()
            .is_none_or(|peer| (peer.life, peer.number) < (heartbeat.life, heartbeat.number));
        if newer {
            self.peer = Some(heartbeat.clone());
        }
        self.step(Input::Heartbeat(heartbeat), now);
    }

    pub(super) fn seen(&mut self, mut seen: Seen, now: Instant) {
        let before = self.last.take();
        // A QEMU that does not answer was alive when it last did.
        if seen.qemu.is_none() {
            seen.qemu = before.as_ref().and_then(|before| before.qemu).filter(|_| seen.protecting);
        }
        let committed = before.as_ref().is_some_and(|before| before.epoch < seen.epoch);
        if committed {
            // Both agents have had to do with it.
            self.step(Input::Alive, now);
        }
        if self.engine.protocol().local() != seen.local {
            self.step(Input::Event(Event::Local(seen.local)), now);
        }
        // What the agent has let go is not protected any more, however that came: no image may be started from.
        let let_go = before.as_ref().is_some_and(|before| before.listed) && !seen.listed;
        let leads = matches!(self.engine.protocol().role(), Role::Protected | Role::Asking);
        if seen.ended || (let_go && leads) {
            self.step(Input::Event(Event::GuestEnded), now);
        }
        if !self.outdated && self.opening == 0 {
            self.protection(&seen, now);
        }
        self.last = Some(seen);
    }

    /// What a protection that goes on here means.
    fn protection(&mut self, seen: &Seen, now: Instant) {
        match self.engine.protocol().role() {
            Role::Solo if seen.protecting => {
                let after = seen.sending.map_or(EpochId(0), |sending| sending.committed);
                self.step(Input::Event(Event::SeedBegins { after }), now);
            }
            Role::Seeding { aborted: false, .. } if !seen.protecting => {
                self.step(Input::Event(Event::SeedFailed), now);
            }
            _ => {}
        }
        if let Some(seeded) = self.seeded(seen) {
            self.step(Input::Event(Event::Seeded(seeded)), now);
        }
    }

    fn seeded(&self, seen: &Seen) -> Option<Seeded> {
        seen.sending?.seeded(self.peer.as_ref()?)
    }

    pub(super) fn heartbeat(&mut self, host: &str, life: u64, now: Instant) -> Heartbeat {
        self.beats += 1;
        let protocol = self.engine.protocol();
        let last = self.last.as_ref();
        let image = protocol.local().image;
        let known = protocol.record().map_or(Generation(0), |record| record.generation);
        let generation = image.map(|image| image.generation).or(protocol.local().generation).unwrap_or(known);
        Heartbeat {
            guest: self.guest,
            host: host.to_owned(),
            life,
            number: self.beats,
            term: protocol.term(),
            generation,
            epoch: last.map_or(EpochId(0), |seen| seen.epoch),
            qemu_age: last.and_then(|seen| seen.qemu).map(|at| now.saturating_duration_since(at)),
            image: image.map(|image| image.incarnation),
            ended: *protocol.role() == Role::Ended || last.is_some_and(|seen| seen.ended),
        }
    }

    fn step(&mut self, input: Input, now: Instant) {
        let guest = self.guest;
        for output in self.engine.step(input, now) {
            match output {
                Output::Command(command @ (Command::Read | Command::Swap(_))) => {
                    if let Command::Swap(new) = &command {
                        info!(%guest, term = new.term.0, owner = ?new.owner, "asked of the arbiter");
                    }
                    // When it is behind, what waits is as good.
                    let _ = self.arbiter.try_send(command);
                }
                Output::Command(command) => {
                    self.opening += u32::from(matches!(command, Command::OpenGate(_)));
                    debug!(%guest, ?command, "to be carried out");
                    if let Err(refused) = self.hands.try_send(command) {
                        error!(%guest, command = ?refused.into_inner(), "too much waits to be carried out");
                    }
                }
                Output::Suspected(why) => {
                    let peer = self.engine.protocol().peer().unwrap_or_default();
                    warn!(%guest, peer, %why, "the other host is suspected");
                }
                Output::Heard => info!(%guest, "the other host is heard again"),
                Output::Became(role) => {
                    let term = self.engine.protocol().term().0;
                    info!(%guest, role = role.label(), term, "this host");
                }
                Output::TookOver(report) => match serde_json::to_string(&report) {
                    Ok(report) => warn!(%guest, report, "the guest was taken over"),
                    Err(error) => error!(%guest, %error, "the guest was taken over"),
                },
            }
        }
    }
}
