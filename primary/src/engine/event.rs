//! What the engine is told and what it asks for.

use std::time::Duration;

use understudy_libvirt::{DomainEvent, RunState};
use understudy_proto::epoch::{Committed, EpochKind};
use understudy_proto::ids::{EpochId, Generation};
use understudy_proto::pace::EpochGoals;
use understudy_proto::rpc::admin::GuestState;
use understudy_proto::rpc::epoch::{EpochRef, GoodbyeReason, HelloAck, Refused, Reject};

use crate::capture::run_state::Question;

/// What is fixed for one protection of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Owner of the guest.
    pub generation: Generation,
    /// The guest runs this long between two stops; with `goals`, at first.
    pub epoch: Duration,
    /// The length of epochs is found while they run.
    pub goals: Option<EpochGoals>,
    /// It runs at least this long if its output waits.
    pub floor: Duration,
    /// An operator waits for the first commit: until then a failure ends the protection instead of being retried.
    pub attended: bool,
    /// Number of the first stream to the backup; larger than any an earlier agent of this host used.
    pub first_session: u64,
    /// The backup, for texts.
    pub peer: String,
}

/// What has happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// The time asked for by [`super::Engine::deadline`] has come.
    Tick,
    /// libvirt or QEMU reports something about the guest.
    Domain(DomainEvent),
    /// `query-status` was answered; `None` if it failed.
    Answer(Question, Option<RunState>),
    /// Events arrive again after [`Command::Resubscribe`].
    Subscribed,
    /// The backup has accepted a stream.
    Connected {
        /// Which stream.
        session: u64,
        /// Its first message.
        ack: HelloAck,
    },
    /// A stream has ended, or could not be opened.
    Disconnected {
        /// Which stream.
        session: u64,
        /// Why.
        reason: String,
    },
    /// The backup has refused a stream.
    Refused {
        /// Which stream.
        session: u64,
        /// Why.
        refused: Refused,
    },
    /// The backup has committed an epoch.
    Acked {
        /// On which stream it said so.
        session: u64,
        /// The epoch.
        at: EpochRef,
    },
    /// The backup has dropped an epoch.
    Rejected {
        /// On which stream it said so.
        session: u64,
        /// The epoch and why.
        reject: Reject,
    },
    /// The full copy is complete and on its way; the guest is stopped.
    Armed {
        /// It must stay so until the copy is committed: the gate holds output of which nobody knows the epochs.
        stay_stopped: bool,
    },
    /// The guest runs and can be stopped for a checkpoint.
    Ready,
    /// A checkpoint is complete and on its way; the guest runs.
    Captured,
    /// A call of the capture failed. Capture has ended.
    CaptureFailed(CaptureFailure),
    /// [`Command::Disarm`] is done, or has failed for the reason given.
    Disarmed(Result<(), CaptureFailure>),
    /// [`Command::Rescue`] is done, or has failed for the reason given.
    Rescued(Result<(), CaptureFailure>),
    /// [`Command::PauseGuest`] is done (or there is no guest any more), or has failed for the reason given.
    Paused(Result<(), String>),
    /// A frame of the guest waits in the gate since its last stop.
    OutputWaiting {
        /// So much waits that nothing else matters.
        pressing: bool,
    },
    /// So many bytes are in the gate at a moment that counts: just before a commit is taken.
    OutputHeld {
        /// All of them, sealed or not.
        bytes: u64,
    },
    /// What the epoch whose commit comes next was like.
    Measured {
        /// How long it kept the guest stopped, by QEMU's clock; `None` if its events were lost.
        stop: Option<Duration>,
        /// Bytes sent since the last commit.
        bytes: u64,
    },
    /// The gate has not released what it was told to, for the reason given. What it holds waits for a full copy.
    OutputFailed(String),
    /// The agent did nothing for so long that it may have been taken for dead: what has arrived meanwhile may be out of
    /// date.
    StoodStill(Duration),
    /// An operator wants another length of epochs.
    Pace {
        /// As in [`Settings`].
        epoch: Duration,
        /// As in [`Settings`].
        goals: Option<EpochGoals>,
    },
    /// The other host is to take the guest over as planned work: it stands still behind the next commit.
    HandOver,
    /// It is not.
    TakeBack,
    /// An operator ends the protection.
    Unprotect,
    /// The agent ends; the protection is to go on with the next one.
    Shutdown,
}

/// Why a call of the capture failed, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaptureFailure {
    /// In words.
    pub reason: String,
    /// QEMU could not be brought out of COLO: the guest may be stopped.
    pub left_stopped: bool,
    /// There is no QEMU (or no way to it) any more.
    pub gone: bool,
}

/// What is to be done. Answers come back as [`Event`]s.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// Open a stream, after a delay to be jittered.
    Connect {
        /// Its number.
        session: u64,
        /// How long to wait before.
        after: Duration,
    },
    /// Begin a full copy that becomes this epoch.
    Arm(EpochId),
    /// Let the guest run after the full copy, or after a checkpoint that holds it, then wait until it can be stopped.
    Start,
    /// Wait until the guest can be stopped.
    WaitReady,
    /// Stop the guest, capture this epoch, let it run.
    Checkpoint(EpochId),
    /// Make the call of the capture that is under way return.
    Interrupt,
    /// Stop the guest and capture this epoch; it stays stopped until [`Command::Start`].
    CheckpointHeld(EpochId),
    /// End the capture; the guest runs on.
    Disarm,
    /// Bring QEMU out of COLO after a capture that failed to do so itself.
    Rescue,
    /// Send the unacknowledged epoch again on the new stream.
    Resend,
    /// Drop the unacknowledged epoch.
    Forget,
    /// The epoch is committed: whatever waited for it may go (invariants 1 and 8).
    Release(Committed),
    /// Ask QEMU for its run state.
    AskQemu(Question),
    /// Subscribe to the guest's events anew.
    Resubscribe,
    /// Stop the guest: it has a newer owner (invariant 4).
    PauseGuest,
    /// End everything; the last command there is.
    Finish {
        /// What the backup is told, if it can be told anything.
        goodbye: Option<GoodbyeReason>,
        /// How it ended.
        outcome: Outcome,
    },
}

/// How a protection ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The kind of end.
    pub kind: OutcomeKind,
    /// In words.
    pub text: String,
    /// What to do about it; empty if nothing is to be done.
    pub remedy: String,
}

/// Kinds of ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutcomeKind {
    /// Protection was ended, the guest runs on.
    Unprotected,
    /// The guest is gone.
    Ended,
    /// The same, and nobody has ended it.
    Crashed,
    /// The guest has a newer owner and is paused here.
    Superseded,
    /// Nothing works until someone acts.
    Failed,
    /// The agent ends; its successor goes on.
    AgentStopped,
}

impl OutcomeKind {
    /// What status calls it.
    pub fn state(self) -> GuestState {
        match self {
            Self::Unprotected => GuestState::Unprotected,
            Self::Ended => GuestState::Ended,
            Self::Crashed => GuestState::Crashed,
            Self::Superseded => GuestState::Superseded,
            Self::Failed => GuestState::Failed,
            Self::AgentStopped => GuestState::Degraded,
        }
    }
}

/// What the engine says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// State in a word.
    pub state: GuestState,
    /// Why, in words.
    pub detail: String,
    /// Last committed epoch.
    pub committed: Option<EpochId>,
    /// The epoch that is captured or not yet acknowledged.
    pub in_flight: Option<(EpochId, EpochKind)>,
    /// Length of the next epoch.
    pub epoch: Duration,
    /// Why it is that long; empty if it is fixed.
    pub pace: String,
    /// The committed epoch the guest stands at for the other host to take over.
    pub handed_over: Option<EpochId>,
}
