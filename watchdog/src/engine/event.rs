//! What the engine hears and what it wants done.

use std::fmt;
use std::time::Duration;

use understudy_libvirt::RunState;
use understudy_proto::ids::GuestId;
use understudy_proto::protected::ProtectedGuest;

use crate::life::Life;

/// Something has happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// What the agent's sign of life says has changed.
    Life(Life),
    /// The guests the agent protects; the whole list.
    Record(Vec<ProtectedGuest>),
    /// The answer to [`Command::Look`].
    Seen(GuestId, Result<Seen, Trouble>),
    /// The answer to [`Command::Order`].
    Done(GuestId, Result<(), Trouble>),
    /// Time has passed.
    Tick,
}

/// How closely to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Nothing more is asked of a guest that runs.
    Glance,
    /// All [`Facts`] but the count of runs.
    Full,
    /// All [`Facts`].
    Count,
}

/// What a look has shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// It runs; that was all the glance asked.
    Running,
    /// Everything.
    Full(Facts),
}

/// What QEMU says of a guest, asked in the order of the fields: without COLO and migration, the state is final.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// QEMU is the source of checkpoints.
    pub colo: bool,
    /// A migration holds its channel: it has not ended yet.
    pub migrating: bool,
    /// The capability for checkpoints is switched on; libvirt never does that. Asked only of a guest without either.
    pub armed: bool,
    /// A number that changes whenever a vCPU has run; `None` if this QEMU does not tell, or it was not asked.
    pub runs: Option<u64>,
    /// Its run state.
    pub state: RunState,
}

impl Facts {
    /// Stopped by a checkpoint or by the end of the full copy before the first one, and by nobody else.
    pub fn is_stopped_by_checkpoint(&self) -> bool {
        self.colo && matches!(self.state, RunState::Colo | RunState::FinishMigrate)
    }
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    /// The guest has no QEMU: it is off, or does not exist.
    Off,
    /// QEMU refused an order, in its words.
    Refused(String),
    /// libvirt or QEMU cannot be asked, in words.
    Unreachable(String),
}

/// What QEMU is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// `x-colo-lost-heartbeat`: checkpoints are over, the guest runs.
    LostHeartbeat,
    /// `cont`: for a QEMU that has left COLO, or has never entered it, without starting the guest.
    Continue,
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::LostHeartbeat => "x-colo-lost-heartbeat",
            Self::Continue => "cont",
        })
    }
}

/// Something is to be done.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Look at the guest; answered by [`Event::Seen`].
    Look(GuestId, Depth),
    /// Tell its QEMU; answered by [`Event::Done`].
    Order(GuestId, Order),
    /// What was asked last is not answered any more: go another way, and let a late answer be lost.
    Replace(GuestId),
    /// The guest is not on the list any more: a late answer is not wanted.
    Forget(GuestId),
    /// Tell people.
    Report(Report),
}

/// Why a guest is let run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// Its agent has died.
    Died,
    /// Its agent lives, and has held it stopped for too long.
    Hung,
}

/// What people should know.
#[derive(Debug, Clone, PartialEq)]
pub enum Report {
    /// Whether the agent lives, and how many guests it has.
    Agent {
        /// What its sign of life says.
        life: Life,
        /// Guests on its list.
        guests: usize,
    },
    /// About one guest.
    Guest {
        /// The guest.
        guest: GuestId,
        /// Its libvirt name.
        name: String,
        /// What there is to say.
        what: About,
    },
}

/// What there is to say about a guest.
#[derive(Debug, Clone, PartialEq)]
pub enum About {
    /// Its checkpoints are over, and it is not stopped by them any more.
    Freed {
        /// Why that was to be done.
        cause: Cause,
        /// The run state it was found in; `running` if it was not stopped and only its checkpoints were ended.
        found: RunState,
        /// The run state it is in now.
        now: RunState,
        /// Since the death or the stop was noticed.
        after: Duration,
    },
    /// It is stopped, but not by a checkpoint; it is left so.
    LeftAlone {
        /// Its run state.
        state: RunState,
    },
    /// Another agent lives before this was over: the guest is that one's.
    HandedOver,
    /// It is stopped by a checkpoint and its QEMU does not tell whether it is still the same stop: a hung agent would
    /// not be noticed.
    CannotTell,
    /// There is no answer yet.
    Silent {
        /// For so long.
        waited: Duration,
    },
    /// It cannot be looked at, or QEMU refused; it is tried again.
    Trouble {
        /// Why.
        reason: String,
    },
}
