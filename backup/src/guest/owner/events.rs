//! What has happened, as the engine is told of it.

use super::streams::protocol_refusal;
use super::{Action, Called, Owner};
use crate::engine::Event;
use crate::guest::Request;
use crate::promoter::Standby;
use crate::worker::Report;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use understudy_proto::rpc::epoch::BackupMessage;
use understudy_proto::rpc::{Failure, FailureKind};

impl Owner {
    pub(super) async fn apply(&mut self, action: Action) {
        match action {
            Action::Report(Report::Verified(proof)) => {
                self.stats.committed(proof.kind(), proof.pages(), proof.bytes());
                self.happen(Event::Verified(proof)).await;
            }
            Action::Report(Report::Rejected(attempt, at, fault)) => {
                tracing::warn!(guest = %self.engine.record().guest, epoch = at.epoch.0, reason = fault.text, "epoch rejected");
                self.happen(Event::Rejected(attempt, at, fault)).await;
            }
            Action::Report(Report::Applied(_)) => (),
            Action::Report(Report::ApplyFailed(reason)) => {
                tracing::error!(guest = %self.engine.record().guest, reason, "image lost");
                self.happen(Event::ApplyFailed(reason)).await;
            }
            Action::Report(Report::Adopted(number, result)) => {
                match &result {
                    Ok(()) => tracing::info!(guest = %self.engine.record().guest, "memory is in the standby"),
                    Err(reason) => {
                        tracing::warn!(guest = %self.engine.record().guest, reason, "memory stays out of the standby");
                    }
                }
                self.happen(Event::Adopted(number, result)).await;
            }
            Action::Report(Report::Image(image)) => {
                let at = image.as_ref().and_then(|i| i.at());
                self.taken = image.filter(|_| self.engine.wants_image());
                self.happen(Event::ImageReady(at)).await;
            }
            Action::Called(called) => {
                match &called {
                    Called::Prepared(Ok(Standby::Warm(shared))) => self.shared = Some(Arc::clone(shared)),
                    Called::Prepared(Ok(Standby::Cold(reason))) if !reason.is_empty() => {
                        tracing::info!(guest = %self.engine.record().guest, reason, "the standby is cold");
                    }
                    // What runs, or is no more, is not ours to write to.
                    Called::Activated(Ok(_)) | Called::Discarded(_) => self.shared = None,
                    _ => (),
                }
                self.happen(called.into()).await;
            }
            Action::Request(Request::Connect(connect)) => self.connect(*connect).await,
            Action::Request(Request::Failover { i_have_fenced, hold, term, asking }) => {
                if let Err(outdated) = self.engine.take_order(term) {
                    // Whoever asked may have gone.
                    let _ = asking.try_send(Err(outdated.into()));
                } else if self.asking.is_some() {
                    let failure = Failure::new(
                        FailureKind::FailedPrecondition,
                        "promoting",
                        format!("guest {} is being promoted already", self.engine.record().name),
                    );
                    // Whoever asked may have gone.
                    let _ = asking.try_send(Err(failure.retryable()));
                } else {
                    self.asking = Some(asking);
                    let event = if hold { Event::Claimed } else { Event::Failover { i_have_fenced } };
                    self.happen(event).await;
                }
            }
            Action::Request(Request::Confirm(proceed, term, reply)) => {
                let answer = match self.engine.take_order(term) {
                    Err(outdated) => Err(outdated.into()),
                    Ok(()) => {
                        let waits = self.engine.awaits_confirmation();
                        self.happen(Event::Confirm { proceed }).await;
                        if waits || !proceed { Ok(()) } else { Err(self.nothing_waits()) }
                    }
                };
                // Whoever asked may have gone.
                let _ = reply.send(answer);
            }
            Action::Request(Request::Release(reply)) => {
                let may = self.engine.may_release();
                if may.is_ok() {
                    self.happen(Event::Release).await;
                }
                // Whoever asked may have gone.
                let _ = reply.send(may);
            }
            Action::Message(id, Some(Ok(message))) => self.happen(Event::Message(id, message)).await,
            Action::Message(id, ended) => {
                let reason = match ended {
                    Some(Err(failure)) => {
                        if failure.kind == FailureKind::InvalidArgument {
                            // The message did not pass its checks; a connection that broke hears nothing.
                            self.send(id, BackupMessage::Refused(protocol_refusal(&failure)));
                        }
                        failure.reason
                    }
                    _ => "the primary closed it".to_owned(),
                };
                self.connections.remove(&id);
                tracing::info!(guest = %self.engine.record().guest, reason, "stream ended");
                self.happen(Event::Disconnected(id, reason)).await;
            }
            Action::Tick => {
                if self.unwritten.swap(false, Ordering::Relaxed) {
                    self.happen(Event::ControlNotWritten).await;
                }
                self.happen(Event::Tick).await;
            }
            Action::Request(Request::Shutdown(_)) | Action::Stop(_) => (),
        }
    }

    fn nothing_waits(&self) -> Failure {
        let text = format!("no failover of guest {} waits for a confirmation", self.engine.record().name);
        Failure::new(FailureKind::FailedPrecondition, "nothing-waits", text)
    }
}
