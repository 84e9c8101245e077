//! What the engine is told and what it asks for.

use crate::assembly::{Attempt, Fault, Proof};
use crate::promoter::{Activation, LocalDomain, PromoteError};
use bytes::Bytes;
use std::sync::Arc;
use understudy_proto::control::ControlFile;
use understudy_proto::epoch::EpochManifest;
use understudy_proto::ids::Incarnation;
use understudy_proto::negotiate::Agreement;
use understudy_proto::rpc::Failure;
use understudy_proto::rpc::admin::{FailoverReport, Progress};
use understudy_proto::rpc::epoch::{BackupMessage, Begin, EpochRef, Hello, PrimaryMessage, Seed};

/// A connection of the owner's, numbered by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ConnectionId(pub u64);

/// What does not change while the agent lives.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Host name.
    pub host: String,
    /// Life of the agent.
    pub incarnation: Incarnation,
    /// QEMU here.
    pub qemu_version: Option<String>,
    /// libvirt here.
    pub libvirt_version: Option<String>,
    /// Bytes of a delta that may be held before it is verified.
    pub staging_max_bytes: u64,
}

/// Something happened.
#[derive(Debug)]
pub enum Event {
    /// A primary asks to be taken.
    Hello {
        /// Where it is.
        connection: ConnectionId,
        /// What it said.
        hello: Box<Hello>,
        /// What both sides speak.
        agreement: Agreement,
        /// What this host has of the guest.
        local: LocalDomain,
    },
    /// A message on a stream that was taken.
    Message(ConnectionId, PrimaryMessage),
    /// A stream ended without the engine's doing.
    Disconnected(ConnectionId, String),
    /// The worker holds the epoch, and it is right.
    Verified(Proof),
    /// The worker dropped the epoch.
    Rejected(Attempt, EpochRef, Fault),
    /// The worker lost the image.
    ApplyFailed(String),
    /// Every ordered epoch is in the image; `None`: there is none.
    ImageReady(Option<EpochRef>),
    /// A required control file is on disk.
    ControlWritten,
    /// It is not; the commands that followed it were not carried out.
    ControlFailed(String),
    /// One that nothing depended on is not; it is tried again.
    ControlNotWritten,
    /// The standby was made, or not.
    Prepared(Result<Way, PromoteError>),
    /// The end of the move with this number: the image is in the standby's memory, or why it is not.
    Adopted(u64, Result<(), String>),
    /// What this host has of the guest, after [`Command::CheckStandby`].
    Checked(Result<LocalDomain, PromoteError>),
    /// The image is in the standby, or not.
    Loaded(Result<(), PromoteError>),
    /// The guest runs here, or not.
    Activated(Result<Activation, PromoteError>),
    /// The standby is gone, or may still be there.
    Discarded(Result<(), PromoteError>),
    /// An operator asks for promotion.
    Failover {
        /// That the old host cannot run the guest is vouched for.
        i_have_fenced: bool,
    },
    /// The watchdog has claimed the guest: promote, but wait for [`Event::Confirm`] before it may run. The claim is the
    /// licence that an operator would otherwise have to give.
    Claimed,
    /// The claim is confirmed, or is not.
    Confirm {
        /// The guest may run.
        proceed: bool,
    },
    /// An operator gives up what is here of the guest; [`super::Engine::may_release`] has agreed.
    Release,
    /// Time has passed.
    Tick,
    /// The agent ends.
    Shutdown,
}

/// Something to do, in the order given.
#[derive(Debug, PartialEq)]
pub enum Command {
    /// Send a message.
    Send(ConnectionId, BackupMessage),
    /// Acknowledge what is proven.
    Ack(ConnectionId, Proof),
    /// End a stream.
    Close(ConnectionId),
    /// Write the control file. If `required`, wait for it, and if it fails give [`Event::ControlFailed`] instead of
    /// carrying out what follows.
    WriteControl {
        /// Its content.
        file: ControlFile,
        /// Whether what follows depends on it.
        required: bool,
    },
    /// Begin an epoch; a full one has a seed.
    Open(Attempt, Begin, Option<Arc<Seed>>),
    /// Take a frame of it.
    Frame(Bytes),
    /// Take the next piece of its device buffer.
    Device(Bytes),
    /// Compare it with its manifest.
    Verify(EpochManifest),
    /// Make it the image's.
    Apply(Attempt),
    /// Drop it.
    DiscardEpoch,
    /// Drop the image and whatever is open.
    DropImage,
    /// Wait for the image to be up to date and take it.
    TakeImage,
    /// Make a standby of the newest seed.
    Prepare(Arc<Seed>),
    /// See whether it is there.
    CheckStandby,
    /// Move the image into its memory; the number comes back with [`Event::Adopted`].
    Adopt(u64),
    /// Remove it.
    Discard,
    /// Bring the image taken into it.
    Load,
    /// Let it run.
    Activate,
    /// Tell whoever asked for the failover.
    Progress(Progress),
    /// The same, at the end.
    FailoverDone(Box<Result<FailoverReport, Failure>>),
}

/// How memory comes into the standby.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// It can be moved into the standby ahead of a promotion; until that is done, and if it fails, cold.
    Warm,
    /// Through the stream, at promotion; why, or nothing if that goes without saying.
    Cold(String),
}
