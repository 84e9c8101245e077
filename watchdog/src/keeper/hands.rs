//! What takes time is done by tasks of their own: one asks the arbiter, one the agents, both in order.

use std::sync::Arc;

use tokio::sync::mpsc;
use tracing::{error, warn};
use understudy_proto::ids::GuestId;
use understudy_proto::ownership::Term;
use understudy_proto::policy::GuestSettings;

use super::Answer;
use crate::arbiter::{Arbiter, FenceCommand};
use crate::keeper::Host;
use crate::owner::{Command, Event};

/// Commands that may wait for one that takes long. The protocol gives them again.
const COMMANDS: usize = 64;

#[derive(Clone)]
pub(super) struct Hands {
    guest: GuestId,
    agents: mpsc::Sender<Command>,
    /// Promises to hold output. They wait for nothing: an agent that stands still would keep everything else waiting.
    promises: mpsc::Sender<Command>,
    arbiter: mpsc::Sender<Command>,
    host: Arc<dyn Host>,
    outbox: mpsc::Sender<Answer>,
}

pub(super) fn start(
    guest: GuestId,
    arbiter: Arc<dyn Arbiter>,
    host: Arc<dyn Host>,
    outbox: mpsc::Sender<Answer>,
) -> Hands {
    let (agents, orders) = mpsc::channel(COMMANDS);
    tokio::spawn(carry_out(guest, Arc::clone(&host), orders, outbox.clone()));
    let (promises, holds) = mpsc::channel(1);
    tokio::spawn(carry_out(guest, Arc::clone(&host), holds, outbox.clone()));
    let (asked, questions) = mpsc::channel(COMMANDS);
    tokio::spawn(ask(guest, arbiter, questions, outbox.clone()));
    Hands { guest, agents, promises, arbiter: asked, host, outbox }
}

impl Hands {
    pub(super) fn give(&self, command: Command) {
        if matches!(command, Command::Read | Command::Swap(_)) {
            // When the arbiter is behind, what waits is as good.
            let _ = self.arbiter.try_send(command);
        } else if matches!(command, Command::HoldGate(_)) {
            // It is asked for again until the agent's status says that it is so.
            let _ = self.promises.try_send(command);
        } else if let Err(refused) = self.agents.try_send(command) {
            error!(guest = %self.guest, command = ?refused.into_inner(), "too much waits to be carried out");
        }
    }

    pub(super) fn protect(&self, to: String, as_before: Option<GuestSettings>, term: Term) {
        let Self { guest, host, outbox, .. } = self.clone();
        tokio::spawn(async move {
            let result = host.protect(guest, &to, as_before, term).await;
            // The keeper has ended if nobody takes it.
            let _ = outbox.send(Answer::Protected(guest, to, result)).await;
        });
    }

    pub(super) fn hand_over(&self, term: Term) {
        let Self { guest, host, outbox, .. } = self.clone();
        tokio::spawn(async move {
            let _ = outbox.send(Answer::HandedOver(guest, host.hand_over(guest, term).await)).await;
        });
    }

    pub(super) fn fence(&self, command: Arc<FenceCommand>) {
        let Self { guest, host, outbox, .. } = self.clone();
        tokio::spawn(async move {
            let outcome = super::fencing::fence_and_promote(guest, command, host).await;
            let _ = outbox.send(Answer::Fenced(guest, outcome)).await;
        });
    }

    pub(super) fn take_back(&self, term: Term) {
        let Self { guest, host, .. } = self.clone();
        tokio::spawn(async move {
            if let Err(failure) = host.take_back(guest, term).await {
                warn!(%guest, reason = failure.reason, "the guest is not told to run on; it does by itself soon");
            }
        });
    }
}

async fn carry_out(
    guest: GuestId,
    host: Arc<dyn Host>,
    mut orders: mpsc::Receiver<Command>,
    answers: mpsc::Sender<Answer>,
) {
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
}

async fn ask(
    guest: GuestId,
    arbiter: Arc<dyn Arbiter>,
    mut questions: mpsc::Receiver<Command>,
    answers: mpsc::Sender<Answer>,
) {
    let mut silent = false;
    while let Some(question) = questions.recv().await {
        let answer = match &question {
            Command::Swap(new) => arbiter.swap(guest, new).await.map(|()| None),
            _ => arbiter.read(guest).await.map(|record| Some(Event::Record(record))),
        };
        if answers.send(Answer::Arbiter(guest, answer.is_ok())).await.is_err() {
            return;
        }
        match answer {
            Ok(event) => {
                silent = false;
                if let Some(event) = event
                    && answers.send(Answer::Event(guest, event)).await.is_err()
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
}
