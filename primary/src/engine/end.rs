//! The ways a protection ends.

use std::time::{Duration, Instant};

use understudy_proto::rpc::epoch::GoodbyeReason;

use super::{ASK_INTERVAL, Asking, Capture, Command, Engine, Outcome, OutcomeKind, REPEAT_INTERVAL};
use crate::capture::run_state::EndReason;

/// How long QEMU may take over a sign of life.
const SIGN_LIMIT: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(super) struct End {
    pub(super) outcome: Outcome,
    goodbye: Option<GoodbyeReason>,
    pause: Pause,
    life: Life,
}

/// Whether the instance that runs on, and for which the backup drops its copy, is known to live (invariant 18). What
/// ended the capture may have been its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    /// It is, or no copy depends on it.
    Known,
    /// It will have to be asked when capture has ended.
    Unknown,
    /// It has until then to give a sign.
    Sought {
        until: Instant,
        /// When it is to be asked; `None` while it has not answered.
        ask_at: Option<Instant>,
    },
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
            _ => match self.life {
                Life::Sought { until, ask_at } => Some(ask_at.map_or(until, |at| at.min(until))),
                Life::Known | Life::Unknown => None,
            },
        }
    }

    /// QEMU has answered a question, or has not.
    pub(super) fn answered(&mut self, sign: bool, now: Instant) {
        // An answer to an older question may be older than what ended the capture.
        if let Life::Sought { until, ask_at: None } = self.life {
            self.life =
                if sign { Life::Known } else { Life::Sought { until, ask_at: Some(now + ASK_INTERVAL) } };
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
        let remedy = "protect the guest again when that is over; where it never is (QEMU 7.2), when the guest was shut \
                      down and started anew"
            .to_owned();
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
            // Nothing is left to pause or to ask, and the reason it was being ended for stays, ...
            (end.pause, end.life) = (Pause::No, Life::Known);
            // ... unless the copy that it was not needed for any more is the only one now.
            if !crashed || end.goodbye.is_none() || self.committed.is_none() {
                return;
            }
            self.end = None;
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
        let drops_copy = goodbye == Some(GoodbyeReason::Unprotected) && self.committed.is_some();
        let life = if drops_copy { Life::Unknown } else { Life::Known };
        self.end = Some(End { outcome: Outcome { kind, text, remedy }, goodbye, pause, life });
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
        let pause = end.pause;
        match pause {
            Pause::From(at) if now >= at => {
                out.push(Command::PauseGuest);
                end.pause = Pause::Asked;
            }
            Pause::No | Pause::Done if self.is_alive(&mut end, now, out) => {
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
            Pause::No | Pause::Done | Pause::AtOnce | Pause::From(_) | Pause::Asked => {}
        }
        self.end = Some(end);
    }

    /// Whether it is known that the guest runs on without its copy, or that the copy is to stay; sees to it that it becomes
    /// known.
    fn is_alive(&mut self, end: &mut End, now: Instant, out: &mut Vec<Command>) -> bool {
        if end.life == Life::Unknown {
            end.life = Life::Sought { until: now + SIGN_LIMIT, ask_at: Some(now) };
        }
        let Life::Sought { until, ask_at } = end.life else { return true };
        if now >= until {
            end.goodbye = None;
            let peer = &self.settings.peer;
            end.outcome.text.push_str(&format!("; QEMU gives no sign of life: {peer} keeps the last epoch"));
            return true;
        }
        if ask_at.is_some_and(|at| now >= at) {
            let ask_at = if let Asking::From(_) = self.asking {
                let question = self.run.question();
                self.asking = Asking::Asked(question);
                out.push(Command::AskQemu(question));
                None
            } else {
                Some(now + ASK_INTERVAL)
            };
            end.life = Life::Sought { until, ask_at };
        }
        false
    }
}
