//! The messages of the epoch stream as both agents use them. The `.proto` file says who sends what when.

use crate::control::Role;
use crate::epoch::{EpochKind, EpochManifest};
use crate::ids::{EpochId, Generation, GuestId, Incarnation};
use crate::layout::MemoryLayout;
use crate::negotiate::{Agreement, Offer};
pub use crate::rpc::lane::LaneKey;
use bytes::Bytes;
use std::fmt;

/// From the primary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PrimaryMessage {
    /// Opens the stream.
    Hello(Hello),
    /// Comes before a full epoch.
    Seed(Seed),
    /// Opens an epoch.
    Begin(Begin),
    /// Pages of the open epoch.
    Pages(Pages),
    /// A piece of the open epoch's device buffer.
    Device(DevicePiece),
    /// Ends the open epoch.
    Manifest(EpochManifest),
    /// Sign of life; the counter comes back.
    Heartbeat(u64),
    /// Ends the protection.
    Goodbye(GoodbyeReason),
}

/// From the backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackupMessage {
    /// Accepts the stream.
    HelloAck(HelloAck),
    /// The epoch is committed.
    Ack(EpochRef),
    /// The epoch was dropped; a full one must follow.
    Reject(Reject),
    /// The stream is refused and ends.
    Refused(Refused),
    /// State of the standby domain.
    Standby(Standby),
    /// Answer to a heartbeat.
    HeartbeatReply(u64),
}

/// First message of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// What the primary can speak.
    pub offer: Offer,
    /// The guest.
    pub guest: GuestId,
    /// Its libvirt name.
    pub guest_name: String,
    /// Its owner as the primary knows it.
    pub generation: Generation,
    /// Grows with every stream the primary opens for the guest.
    pub session: u64,
    /// Host name of the primary.
    pub primary_host: String,
    /// QEMU that runs the guest, e.g. `7.2.22`.
    pub qemu_version: String,
    /// Versioned machine type.
    pub machine: String,
    /// Whether the domain has a persistent definition on the primary.
    pub persistent: bool,
    /// What lanes name this stream by; `None` if it has none.
    pub lane_key: Option<LaneKey>,
}

/// Machine description that holds from the next full epoch on.
#[derive(Clone, PartialEq, Eq)]
pub struct Seed {
    /// RAM blocks, configuration section, section id.
    pub layout: MemoryLayout,
    /// Migratable domain XML with its secrets.
    pub domain_xml: String,
}

impl fmt::Debug for Seed {
    /// Leaves the XML out: it may hold secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seed")
            .field("layout", &self.layout)
            .field("domain_xml_bytes", &self.domain_xml.len())
            .finish()
    }
}

/// Opens an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Begin {
    /// Owner of the guest.
    pub generation: Generation,
    /// The epoch.
    pub epoch: EpochId,
    /// Full or delta.
    pub kind: EpochKind,
}

/// A page frame.
#[derive(Clone, PartialEq, Eq)]
pub struct Pages {
    /// The open epoch.
    pub epoch: EpochId,
    /// A frame for [`crate::frame::FrameReader`].
    pub frame: Bytes,
}

impl fmt::Debug for Pages {
    /// Leaves the guest's bytes out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pages").field("epoch", &self.epoch).field("frame_bytes", &self.frame.len()).finish()
    }
}

/// A piece of a device buffer.
#[derive(Clone, PartialEq, Eq)]
pub struct DevicePiece {
    /// The open epoch.
    pub epoch: EpochId,
    /// Where in the buffer it lies.
    pub offset_bytes: u64,
    /// The piece.
    pub data: Bytes,
}

impl fmt::Debug for DevicePiece {
    /// Leaves the guest's bytes out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DevicePiece")
            .field("epoch", &self.epoch)
            .field("offset_bytes", &self.offset_bytes)
            .field("data_bytes", &self.data.len())
            .finish()
    }
}

impl DevicePiece {
    /// Cuts a device buffer into messages; nothing is copied.
    pub fn split(epoch: EpochId, device: &Bytes) -> impl Iterator<Item = Self> + use<> {
        let device = device.clone();
        let step = crate::limits::DEVICE_CHUNK_BYTES;
        (0..device.len()).step_by(step).map(move |at| Self {
            epoch,
            offset_bytes: at as u64,
            data: device.slice(at..device.len().min(at + step)),
        })
    }
}

/// Why the primary ends the protection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GoodbyeReason {
    /// The guest is gone.
    Ended,
    /// An operator said so; the guest runs on.
    Unprotected,
}

/// An epoch of a generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EpochRef {
    /// Owner of the guest.
    pub generation: Generation,
    /// The epoch.
    pub epoch: EpochId,
}

/// Accepts a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HelloAck {
    /// What both sides speak.
    pub agreement: Agreement,
    /// Life of the backup agent.
    pub incarnation: Incarnation,
    /// What the backup holds; `None` asks for a full epoch.
    pub last_committed: Option<EpochRef>,
    /// Host name of the backup.
    pub host: String,
    /// Its QEMU, if known.
    pub qemu_version: Option<String>,
    /// Its libvirt, if known.
    pub libvirt_version: Option<String>,
}

/// Why an epoch was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RejectCode {
    /// Counts or digests differ, or a frame does not decode.
    Corrupt,
    /// A delta whose predecessor is not committed.
    NoBase,
    /// Messages out of order.
    OutOfOrder,
    /// More than the backup may hold.
    TooLarge,
    /// A failure of the backup itself.
    Internal,
}

/// An epoch was dropped; the primary goes on with a full one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reject {
    /// Which epoch.
    pub at: EpochRef,
    /// Why.
    pub code: RejectCode,
    /// Why, in words.
    pub text: String,
}

/// Why a stream is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefusedCode {
    /// The guest has a newer owner: the primary must stop its guest.
    Superseded,
    /// No common version, or a machine this backup cannot run.
    Incompatible,
    /// Another stream of the guest is open, or a promotion is under way.
    Busy,
    /// A message broke the protocol.
    Protocol,
    /// Not enough memory for the image.
    NoMemory,
    /// A domain of this UUID runs on the backup without Understudy.
    Conflict,
    /// A failure of the backup itself.
    Internal,
}

/// Refuses a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Why.
    pub code: RefusedCode,
    /// Why, in words.
    pub text: String,
    /// What to do about it; empty if nothing is known to help.
    pub remedy: String,
    /// The generation the backup knows for the guest.
    pub generation: Option<Generation>,
}

/// State of the standby domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StandbyState {
    /// There is none.
    None,
    /// Being created.
    Preparing,
    /// Waits, paused.
    Ready,
    /// Cannot be created.
    Failed,
}

impl StandbyState {
    /// A word for it.
    pub fn label(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Preparing => "preparing",
            Self::Ready => "ready",
            Self::Failed => "failed",
        }
    }
}

/// The standby domain, with the reason of its state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standby {
    /// State.
    pub state: StandbyState,
    /// Why; empty if there is nothing to say.
    pub text: String,
}

/// Asks whether a backup could take a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeRequest {
    /// What the primary can speak.
    pub offer: Offer,
    /// The guest, if the question is about one.
    pub guest: Option<GuestId>,
    /// The versioned machine type that would have to run.
    pub machine: Option<String>,
}

/// What a backup says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeReply {
    /// What the backup can speak.
    pub offer: Offer,
    /// Its host name.
    pub host: String,
    /// Its life.
    pub incarnation: Incarnation,
    /// Its QEMU, if known.
    pub qemu_version: Option<String>,
    /// Its libvirt, if known.
    pub libvirt_version: Option<String>,
    /// Whether it can run the machine type; `None` if not asked or not known.
    pub machine_supported: Option<bool>,
    /// MemAvailable of its kernel, bytes.
    pub free_memory_bytes: u64,
    /// What it has of the guest.
    pub guest: Option<GuestRecord>,
    /// What keeps it from taking a guest; empty if nothing does.
    pub trouble: String,
}

/// What a backup's control file says of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestRecord {
    /// What the backup is for the guest.
    pub role: Role,
    /// The newest generation it knows.
    pub generation: Generation,
    /// Last epoch it recorded as committed; may lag behind.
    pub last_committed: Option<EpochId>,
    /// Host of the primary it last heard from.
    pub primary_host: String,
}
