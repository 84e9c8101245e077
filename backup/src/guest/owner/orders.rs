//! What the engine orders, carried out.

use super::Owner;
use crate::engine::{Command, Event, Way};
use crate::promoter::{Activation, LocalDomain, PromoteError, Promoter, Standby, StandbySpec};
use crate::worker::Job;
use std::sync::Arc;
use understudy_proto::control::Role;
use understudy_proto::rpc::Failure;
use understudy_proto::rpc::admin::Progress;
use understudy_proto::rpc::epoch::BackupMessage;

/// A call of the promoter that ended.
pub(super) enum Called {
    Prepared(Result<Standby, PromoteError>),
    Checked(Result<LocalDomain, PromoteError>),
    Loaded(Result<(), PromoteError>),
    Activated(Result<Activation, PromoteError>),
    Discarded(Result<(), PromoteError>),
}

impl From<Called> for Event {
    fn from(called: Called) -> Self {
        match called {
            Called::Prepared(r) => Self::Prepared(r.map(|standby| match standby {
                Standby::Warm(_) => Way::Warm,
                Standby::Cold(reason) => Way::Cold(reason),
            })),
            Called::Checked(r) => Self::Checked(r),
            Called::Loaded(r) => Self::Loaded(r),
            Called::Activated(r) => Self::Activated(r),
            Called::Discarded(r) => Self::Discarded(r),
        }
    }
}

impl Owner {
    pub(super) async fn carry_out(&mut self, command: Command) -> Option<Event> {
        let job = match command {
            Command::Send(id, message) => return self.send(id, message),
            Command::Ack(id, proof) => return self.send(id, BackupMessage::Ack(proof.at())),
            Command::Close(id) => {
                self.connections.remove(&id);
                return None;
            }
            Command::WriteControl { file, required } => return self.write_control(file, required).await,
            Command::Open(attempt, begin, seed) => Job::Open(attempt, begin, seed),
            Command::Frame(frame) => Job::Frame(frame),
            Command::Device(piece) => Job::Device(piece),
            Command::Verify(manifest) => Job::Verify(manifest),
            Command::Apply(attempt) => Job::Apply(attempt),
            Command::DiscardEpoch => Job::DiscardEpoch,
            Command::DropImage => {
                self.taken = None;
                self.hands.give(Job::DropImage).await;
                // It may be remembered for years.
                if self.engine.record().role == Role::Released {
                    self.hands.rest();
                }
                return None;
            }
            Command::TakeImage => Job::TakeImage,
            Command::Prepare(seed) => {
                let spec = self.spec(seed);
                self.call(move |p, _| Called::Prepared(p.prepare(&spec)));
                return None;
            }
            Command::Adopt(number) => match self.shared.clone() {
                Some(shared) => Job::Adopt(number, shared),
                None => return Some(Event::Adopted(number, Err("its memory is not open here".into()))),
            },
            Command::CheckStandby => {
                self.call(|p, guest| Called::Checked(p.local(guest)));
                return None;
            }
            Command::Discard => {
                self.call(|p, guest| Called::Discarded(p.discard(guest)));
                return None;
            }
            Command::Load => {
                let Some(image) = self.taken.clone() else {
                    return Some(Event::Loaded(Err(PromoteError::new("the image is gone"))));
                };
                let spec = self.spec(Arc::clone(image.seed()));
                self.call(move |p, _| Called::Loaded(p.load(&spec, &image)));
                return None;
            }
            Command::Activate => {
                let spec = self.taken.take().map(|image| self.spec(Arc::clone(image.seed())));
                self.call(move |p, guest| Called::Activated(p.activate(guest, spec.as_ref())));
                return None;
            }
            Command::Progress(progress) => {
                // Whoever asked may have gone; the promotion goes on.
                if let Some(asking) = &self.asking {
                    let _ = asking.try_send(Ok(progress));
                }
                return None;
            }
            Command::FailoverDone(outcome) => {
                self.taken = None;
                self.failover_done(*outcome);
                return None;
            }
        };
        self.hands.give(job).await;
        None
    }

    fn spec(&self, seed: Arc<understudy_proto::rpc::epoch::Seed>) -> StandbySpec {
        StandbySpec { guest: self.engine.record().guest, seed, persistent: self.engine.persistent() }
    }

    /// Calls the promoter on a thread that may wait. The engine has one call under way at a time.
    fn call(
        &self,
        call: impl FnOnce(&dyn Promoter, understudy_proto::ids::GuestId) -> Called + Send + 'static,
    ) {
        let (promoter, guest, done) =
            (Arc::clone(&self.tools.promoter), self.engine.record().guest, self.call_tx.clone());
        tokio::task::spawn_blocking(move || {
            let called = call(&*promoter, guest);
            // Nobody waits when the owner has ended.
            let _ = done.blocking_send(called);
        });
    }

    fn failover_done(&mut self, outcome: Result<understudy_proto::rpc::admin::FailoverReport, Failure>) {
        let guest = self.engine.record().guest;
        let message = match outcome {
            Ok(report) => {
                tracing::info!(%guest, epoch = report.epoch.0, generation = report.generation.0, total = ?report.total, "promoted");
                for warning in &report.warnings {
                    tracing::warn!(%guest, warning, "after the promotion");
                }
                Ok(Progress {
                    phase: "done".into(),
                    percent: Some(100),
                    text: format!("the guest runs here, going on from epoch {}", report.epoch),
                    done: true,
                    failover: Some(report),
                })
            }
            Err(failure) => {
                tracing::warn!(%guest, reason = failure.reason, "no promotion");
                Err(failure)
            }
        };
        if let Some(asking) = self.asking.take() {
            // Whoever asked may have gone.
            let _ = asking.try_send(message);
        }
    }
}
