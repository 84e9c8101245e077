//! May the guest be stopped for a checkpoint now?
//!
//! QEMU aborts when a checkpoint begins in a run state that has no way to COLO (an I/O error, a panic, ...), and a
//! checkpoint of a suspended guest ends by resuming it. So REPLY is sent only to a guest that is known to run.
//! [`RunTracker`] knows it from QEMU's events, which may come late, and from what the agent itself does.
//!
//! Every own checkpoint makes one STOP and one RESUME. The tracker waits until both have arrived before it allows
//! the next, so any STOP left over is somebody else's. After anything else out of the ordinary it wants
//! `query-status` to say `running`, in answer to a question asked after the last event.
//!
//! What remains: the guest's state can change after the last look at it and before QEMU has taken the REPLY, a time
//! as long as an event needs to arrive. An operator's suspend in that time is undone by the checkpoint; an I/O error
//! or panic in it makes QEMU abort, which is the death of the primary and handled as one. An operator's *resume* in
//! the stopped window starts the vCPUs while QEMU copies: leave suspend and resume of a protected guest to the agent.

use std::fmt;

use serde_json::Value;
use understudy_libvirt::{DomainEvent, Lifecycle, QmpEvent, RunState};

/// Whether a checkpoint may begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The guest runs: REPLY may be sent.
    Yes,
    /// An event is going to change the verdict.
    Wait(WaitReason),
    /// Only `query-status` can tell: give what it says to [`RunTracker::answer`]. If that leads here again, the guest
    /// does not run: ask again after a while.
    AskQemu(Question),
    /// There will be no checkpoint of this guest any more: switch protection off.
    Ended(EndReason),
}

/// What is being waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WaitReason {
    /// The agent's own checkpoint is under way, or its events have not arrived.
    OwnCheckpoint,
    /// Somebody else has stopped the guest, for example `virsh suspend`.
    StoppedByOthers,
    /// The guest sleeps (S3).
    Asleep,
    /// The guest has shut down. libvirt now ends QEMU, or resets and restarts it.
    ShutDown,
    /// No events arrive: subscribe anew, then call [`RunTracker::subscribed`].
    NoEvents,
}

/// Why there is nothing left to capture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EndReason {
    /// QEMU was told to end.
    QemuQuits {
        /// QEMU's word for the cause, for example `host-signal`.
        cause: String,
    },
    /// libvirt reports the domain as stopped.
    Stopped {
        /// libvirt's reason, for example `shutdown` or `destroyed`.
        detail: String,
    },
    /// The guest's kernel has panicked.
    Panicked,
}

/// A question for QEMU, to be handed back with its answer: an answer to an older question proves nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Question(u64);

/// See the module's description.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunTracker {
    /// Counts whatever makes an older answer worthless.
    changes: u64,
    /// Only `running` from QEMU clears it.
    ask: bool,
    in_checkpoint: bool,
    /// STOP and RESUME events that own checkpoints still owe.
    stops_owed: u32,
    resumes_owed: u32,
    stopped_by_others: bool,
    asleep: bool,
    shut_down: bool,
    no_events: bool,
    ended: Option<EndReason>,
}

impl Default for RunTracker {
    fn default() -> Self {
        Self::new()
    }
}

impl RunTracker {
    /// Of a guest about which nothing is known: QEMU has to be asked first.
    pub fn new() -> Self {
        Self {
            changes: 0,
            ask: true,
            in_checkpoint: false,
            stops_owed: 0,
            resumes_owed: 0,
            stopped_by_others: false,
            asleep: false,
            shut_down: false,
            no_events: false,
            ended: None,
        }
    }

    /// Whether a checkpoint may begin now. Feed all events at hand first.
    pub fn verdict(&self) -> Verdict {
        if let Some(reason) = &self.ended {
            Verdict::Ended(reason.clone())
        } else if self.no_events {
            Verdict::Wait(WaitReason::NoEvents)
        } else if self.in_checkpoint {
            Verdict::Wait(WaitReason::OwnCheckpoint)
        } else if self.shut_down {
            Verdict::Wait(WaitReason::ShutDown)
        } else if self.asleep {
            Verdict::Wait(WaitReason::Asleep)
        } else if self.stopped_by_others {
            Verdict::Wait(WaitReason::StoppedByOthers)
        } else if self.ask {
            Verdict::AskQemu(Question(self.changes))
        } else if self.stops_owed > 0 || self.resumes_owed > 0 {
            Verdict::Wait(WaitReason::OwnCheckpoint)
        } else {
            Verdict::Yes
        }
    }

    /// A question whose answer is worth nothing here, only that there is one.
    pub fn question(&self) -> Question {
        Question(self.changes)
    }

    /// An own checkpoint begins: call it before REPLY goes out.
    pub fn reply_sent(&mut self) {
        self.changes += 1;
        self.in_checkpoint = true;
        self.stops_owed += 1;
        self.resumes_owed += 1;
    }

    /// The own checkpoint is over. Its events may be still to come.
    pub fn checkpoint_done(&mut self) {
        self.changes += 1;
        self.in_checkpoint = false;
    }

    /// Capture has been armed and started (again): whatever the guest was stopped for before is over.
    pub fn started(&mut self) {
        self.ask_anew();
        self.in_checkpoint = false;
    }

    /// Events arrive (again): what happened meanwhile is unknown.
    pub fn subscribed(&mut self) {
        self.ask_anew();
        self.no_events = false;
    }

    /// Takes QEMU's answer to `question`. Only `running` helps, and only if nothing has happened since.
    pub fn answer(&mut self, question: Question, state: &RunState) {
        if question != Question(self.changes) {
            return;
        }
        match state {
            RunState::Running => {
                self.ask = false;
                self.stops_owed = 0;
                self.resumes_owed = 0;
            }
            RunState::GuestPanicked => self.end(EndReason::Panicked),
            _ => {}
        }
    }

    /// Takes an event. Unknown ones are ignored.
    pub fn event(&mut self, event: &DomainEvent) {
        match event {
            DomainEvent::Qmp(event) => self.qmp(event),
            DomainEvent::Lifecycle { kind: Lifecycle::Stopped, detail } => {
                self.end(EndReason::Stopped { detail: detail.clone() });
            }
            DomainEvent::Lifecycle { kind: Lifecycle::Crashed, .. } => self.end(EndReason::Panicked),
            // A domain that is undefined while it runs runs on; the rest is said by QEMU's own events.
            DomainEvent::Lifecycle { .. } | DomainEvent::Devices => {}
            DomainEvent::Lost { .. } => self.ask_anew(),
            DomainEvent::ConnectionClosed { .. } => {
                self.ask_anew();
                self.no_events = true;
            }
        }
    }

    fn qmp(&mut self, event: &QmpEvent) {
        match event.name.as_str() {
            "STOP" if self.stops_owed > 0 => self.stops_owed -= 1,
            "STOP" => self.stopped_by_others = true,
            "RESUME" if self.resumes_owed > self.stops_owed && !self.is_unusual() => self.resumes_owed -= 1,
            "RESUME" => {
                self.stopped_by_others = false;
                self.asleep = false;
                self.shut_down = false;
                self.ask = true;
            }
            "SUSPEND" => self.asleep = true,
            "WAKEUP" => {
                self.asleep = false;
                self.ask = true;
            }
            "SHUTDOWN" => match event.data.get("reason").and_then(Value::as_str) {
                // Nobody can make a QEMU that was told to quit run again.
                Some(cause @ ("host-qmp-quit" | "host-signal" | "host-ui" | "host-error")) => {
                    self.end(EndReason::QemuQuits { cause: cause.to_owned() });
                }
                _ => self.shut_down = true,
            },
            // A reset wakes a guest that slept or had shut down; it does not start one that was stopped.
            "RESET" => {
                self.asleep = false;
                self.shut_down = false;
                self.ask = true;
            }
            "BLOCK_IO_ERROR" | "GUEST_PANICKED" | "GUEST_CRASHLOADED" | "SUSPEND_DISK" | "WATCHDOG"
            | "COLO_EXIT" | "MEMORY_FAILURE" => self.ask = true,
            // POWERDOWN only asks the guest to shut down; the rest does not stop vCPUs.
            _ => return,
        }
        self.changes += 1;
    }

    fn is_unusual(&self) -> bool {
        self.stopped_by_others || self.asleep || self.shut_down
    }

    fn ask_anew(&mut self) {
        self.changes += 1;
        self.ask = true;
        self.stops_owed = 0;
        self.resumes_owed = 0;
        self.stopped_by_others = false;
        self.asleep = false;
        self.shut_down = false;
    }

    fn end(&mut self, reason: EndReason) {
        self.changes += 1;
        self.ended.get_or_insert(reason);
    }
}

impl fmt::Display for WaitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OwnCheckpoint => "a checkpoint is under way",
            Self::StoppedByOthers => "the guest is suspended; `virsh resume` starts it",
            Self::Asleep => "the guest sleeps (S3)",
            Self::ShutDown => "the guest has shut down",
            Self::NoEvents => "no events arrive from libvirt",
        })
    }
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::QemuQuits { cause } => write!(f, "QEMU was ended ({cause})"),
            Self::Stopped { detail } => write!(f, "the domain has stopped ({detail})"),
            Self::Panicked => f.write_str("the guest has panicked"),
        }
    }
}

#[cfg(test)]
mod tests;
