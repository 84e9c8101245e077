//! The ways a protection ends.

use std::time::Instant;

use understudy_proto::rpc::epoch::GoodbyeReason;

use super::{Capture, Command, Engine, Outcome, OutcomeKind, REPEAT_INTERVAL};
use crate::capture::run_state::EndReason;

#[derive(Debug)]
pub(super) struct End {
    pub(super) outcome: Outcome,
    goodbye: Option<GoodbyeReason>,
    pause: Pause,
}

/// Whether the guest must not run on (invariant 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pause {
    /// It may.
    No,
    /// It is to be stopped as soon as that can be done.
    AtOnce,
    /// It is to be stopped, once more, when capture has ended and not before then: the end of capture starts it.
    From(Instant),
    /// It is being stopped.
    Asked,
    /// It is stopped.
    Done,
}

impl End {
    pub(super) fn deadline(&self) -> Option<Instant> {
        match self.pause {
            Pause::From(at) => Some(at),
            _ => None,
        }
    }
}

impl Engine {
    pub(super) fn unprotect(&mut self) {
        let text = "protection was ended, the guest runs on".to_owned();
        self.begin_end(OutcomeKind::Unprotected, text, String::new(), Some(GoodbyeReason::Unprotected));
    }

    pub(super) fn shutdown(&mut self) {
        let text = "the primary agent was ended; it protects the guest again when it is back".to_owned();
        self.begin_end(OutcomeKind::AgentStopped, text, String::new(), None);
    }

    pub(super) fn fail(&mut self, reason: String, remedy: String) {
        self.begin_end(OutcomeKind::Failed, reason, remedy, Some(GoodbyeReason::Unprotected));
    }

    pub(super) fn foreign_migration(&mut self) {
        let text = "another migration of the guest was started (virsh save, dump or migrate)".to_owned();
        let remedy = "protect the guest again when that is over".to_owned();
        self.begin_end(OutcomeKind::Failed, text, remedy, Some(GoodbyeReason::Unprotected));
    }

    pub(super) fn superseded(&mut self, reason: &str) {
        let text = format!("{} runs the guest now: {reason}; the guest is paused here", self.settings.peer);
        let remedy =
            "end this instance with `virsh destroy`, then protect the guest from the other host".to_owned();
        self.begin_end(OutcomeKind::Superseded, text, remedy, None);
    }

    /// The guest is gone. After a crash the backup keeps its image: what to do with it is the operator's decision.
    pub(super) fn guest_ended(&mut self, reason: &EndReason) {
        let crashed = match reason {
            EndReason::Panicked => true,
            EndReason::QemuQuits { cause } => cause == "host-error",
            EndReason::Stopped { detail } => matches!(detail.as_str(), "crashed" | "failed"),
        };
        let (goodbye, remedy) = if crashed {
            let remedy = format!(
                "the last committed epoch is kept on {}: `understudy failover` there starts the guest from it",
                self.settings.peer
            );
            (None, remedy)
        } else {
            (Some(GoodbyeReason::Ended), String::new())
        };
        if let Some(end) = &mut self.end {
            // Nothing is left to pause, and the reason it was being ended for stays.
            end.pause = Pause::No;
            return;
        }
        let kind = if crashed { OutcomeKind::Crashed } else { OutcomeKind::Ended };
        self.begin_end(kind, reason.to_string(), remedy, goodbye);
    }

    fn begin_end(&mut self, kind: OutcomeKind, text: String, remedy: String, goodbye: Option<GoodbyeReason>) {
        // The first reason stays, except that a newer owner beats everything.
        if self.end.is_some() && kind != OutcomeKind::Superseded {
            return;
        }
        let pause = if kind == OutcomeKind::Superseded { Pause::AtOnce } else { Pause::No };
        self.end = Some(End { outcome: Outcome { kind, text, remedy }, goodbye, pause });
    }

    pub(super) fn paused(&mut self, result: Result<(), String>, now: Instant) {
        if let Some(end) = &mut self.end
            && end.pause == Pause::Asked
        {
            end.pause = match result {
                // Paused while capture was active: once more at its end.
                Ok(()) if self.capture != Capture::Idle => Pause::From(now),
                Ok(()) => Pause::Done,
                Err(_) => Pause::From(now + REPEAT_INTERVAL),
            };
        }
    }

    pub(super) fn decide_end(&mut self, now: Instant, out: &mut Vec<Command>) {
        // Not within a checkpoint: QEMU would forget it when it lets the guest run.
        if let Some(end) = &mut self.end
            && end.pause == Pause::AtOnce
            && !matches!(self.capture, Capture::Stopping { .. })
        {
            out.push(Command::PauseGuest);
            end.pause = Pause::Asked;
        }
        self.wind_down(out);
        if self.capture != Capture::Idle {
            return;
        }
        let Some(mut end) = self.end.take() else { return };
        match end.pause {
            Pause::From(at) if now >= at => {
                out.push(Command::PauseGuest);
                end.pause = Pause::Asked;
            }
            Pause::No | Pause::Done => {
                let goodbye = end.goodbye.filter(|_| self.link.is_up());
                if end.goodbye.is_some() && goodbye.is_none() && self.committed.is_some() {
                    end.outcome.text.push_str(&format!(
                        "; {} could not be told and keeps the last epoch",
                        self.settings.peer
                    ));
                }
                out.push(Command::Finish { goodbye, outcome: end.outcome.clone() });
                self.over = Some(end.outcome);
                return;
            }
            Pause::AtOnce | Pause::From(_) | Pause::Asked => {}
        }
        self.end = Some(end);
    }
}
