//! What the protocol is told and what it asks for.

use understudy_proto::ids::{EpochId, Generation, Incarnation};
use understudy_proto::ownership::{Ownership, Term};
use understudy_proto::policy::GuestPolicy;
pub use understudy_proto::policy::{LostBackup, QemuCrash};

/// Choices of the operator, per guest. A lost arbiter has no choice: nothing changes hands until it is back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Policies {
    /// What is done when the backup is lost.
    pub lost_backup: LostBackup,
    /// What is done when QEMU fails.
    pub qemu_crash: QemuCrash,
}

impl Policies {
    /// With what was chosen for the guest itself.
    #[must_use]
    pub fn of(self, guest: &GuestPolicy) -> Self {
        Self {
            lost_backup: guest.on_lost_backup.unwrap_or(self.lost_backup),
            qemu_crash: guest.on_qemu_crash.unwrap_or(self.qemu_crash),
        }
    }
}

/// What the agents of this host have of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Local {
    /// The guest's QEMU is here and works (it may be stopped).
    pub runs: bool,
    /// What a promotion here could start from.
    pub image: Option<Image>,
    /// Generation of the instance that runs here, if an agent here knows it.
    pub generation: Option<Generation>,
}

/// A committed image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Image {
    /// Life of the backup agent that holds it.
    pub incarnation: Incarnation,
    /// Generation of the guest it is of.
    pub generation: Generation,
}

/// A backup that holds a full copy of the guest that runs here.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Seeded {
    /// The backup host.
    pub backup: String,
    /// Life of its agent.
    pub incarnation: Incarnation,
    /// Generation of the copy.
    pub generation: Generation,
    /// Last epoch it has committed.
    pub epoch: EpochId,
}

/// Something has happened.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Event {
    /// The arbiter was read; `None`: it has no record of the guest.
    Record(Option<Ownership>),
    /// What is here of the guest.
    Local(Local),
    /// The other host has been silent on every path for too long, or says that its QEMU has. May come again.
    Suspect,
    /// The other host is heard again.
    Heard,
    /// The other host has claimed the guest and does not confirm it.
    Impatient,
    /// A full copy of the guest that runs here begins.
    SeedBegins {
        /// Last epoch that was begun before: its commit is not that of the copy.
        after: EpochId,
    },
    /// A backup holds the guest that runs here; released is only what it has committed.
    Seeded(Seeded),
    /// The full copy was given up.
    SeedFailed,
    /// The image is in the standby, which is ready to run.
    Loaded,
    /// It is not, and will not be without another [`Command::Load`].
    LoadFailed,
    /// The guest was shut down, destroyed by an operator, or its protection was ended.
    GuestEnded,
}

/// Something to do. Every command may be given again and must then do no more than it already did; a command with a
/// term is void once one of a newer term was carried out.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Command {
    /// Read the record; gives [`Event::Record`].
    Read,
    /// Replace the record if it is still of the term before, then read it: what came of it is only ever learnt by
    /// reading.
    Swap(Ownership),
    /// Output is let go only by commits from here on (invariant 1).
    HoldGate(Term),
    /// Output is let go at once.
    OpenGate(Term),
    /// Stop the guest and keep it.
    PauseGuest(Term),
    /// Let the guest run on after that.
    ResumeGuest(Term),
    /// The guest runs elsewhere: end the instance here, with what it still wanted to send.
    DestroyGuest(Term),
    /// Accept nothing more from the primary, bring the image into the standby, do not run it; gives
    /// [`Event::Loaded`] or [`Event::LoadFailed`].
    Load(Term),
    /// Let the loaded guest run here (loading it first if need be).
    Activate(Term),
    /// Give up a load: the primary's epochs may be accepted again.
    Abandon(Term),
}

/// What this host is to the guest.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Role {
    /// The record is not known yet, or says nothing about this host.
    Unknown,
    /// It runs here; output is let go by commits.
    Protected,
    /// The same, and the backup is to be taken out of the record.
    Asking,
    /// It runs here alone.
    Solo,
    /// It runs here alone, output held again, while a backup gets a full copy.
    Seeding {
        /// The term it began under.
        since: Term,
        /// Last epoch that was begun before.
        after: EpochId,
        /// The copy is complete.
        ready: Option<Seeded>,
        /// The copy was given up; the gate opens under the next term.
        aborted: bool,
    },
    /// It runs here alone, but what an earlier life of this watchdog has asked of the arbiter may still arrive there.
    /// The gate opens under the next term, which makes that void.
    Recovering {
        /// The term that was found.
        since: Term,
    },
    /// The other host has claimed it: it is stopped and kept.
    Held,
    /// The image is here.
    Standby,
    /// The image is here, and the guest is to be claimed.
    Claiming,
    /// The guest is claimed; the image goes into the standby.
    Loading,
    /// The standby is ready to run; the claim is to be confirmed.
    Loaded,
    /// The guest belongs to others and what is here of it is of no use.
    Stale,
    /// The guest was shut down or its protection ended.
    Ended,
}

impl Role {
    /// In a word.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Protected => "protected",
            Self::Asking => "asking",
            Self::Solo => "solo",
            Self::Seeding { .. } => "seeding",
            Self::Recovering { .. } => "recovering",
            Self::Held => "held",
            Self::Standby => "standby",
            Self::Claiming => "claiming",
            Self::Loading => "loading",
            Self::Loaded => "loaded",
            Self::Stale => "stale",
            Self::Ended => "ended",
        }
    }
}
