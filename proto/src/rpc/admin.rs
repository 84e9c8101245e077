//! What an operator asks an agent, as agents and command use it.

use crate::ids::{EpochId, Generation, GuestId, Incarnation};
use crate::ownership::Term;
use crate::pace::EpochGoals;
use crate::policy::{GuestPolicy, GuestSettings};
use serde::Serialize;
use std::time::Duration;

/// Asks the primary agent to protect a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProtectRequest {
    /// Name, UUID or id.
    pub domain: String,
    /// Backup host, see [`super::transport::authority`].
    pub to: String,
    /// Wanted length of an epoch; the agent's default if `None`. Whole milliseconds travel.
    pub epoch: Option<Duration>,
    /// Allows replication without TLS.
    pub insecure: bool,
    /// Lets the guest's output through as it comes.
    pub ungated: bool,
    /// Epochs have the length that fits these goals, beginning with `epoch`.
    pub goals: Option<EpochGoals>,
    /// A watchdog's order: the record it is given under.
    pub term: Option<Term>,
    /// What differs from the watchdog's defaults.
    pub policy: GuestPolicy,
}

/// One step of something that takes time.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    /// Machine-readable name of the step.
    pub phase: String,
    /// 0 to 100, if known.
    pub percent: Option<u8>,
    /// For people.
    pub text: String,
    /// The last message of a success.
    pub done: bool,
    /// With `done` of a failover.
    pub failover: Option<FailoverReport>,
}

impl Progress {
    /// A step without percentage.
    pub fn step(phase: impl Into<String>, text: impl Into<String>) -> Self {
        Self { phase: phase.into(), percent: None, text: text.into(), done: false, failover: None }
    }
}

/// Asks the primary agent to end the protection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnprotectRequest {
    /// Name, UUID or id.
    pub domain: String,
    /// A watchdog's order: the record it is given under.
    pub term: Option<Term>,
}

/// Answer to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnprotectReply {
    /// What was done, for people.
    pub text: String,
}

/// Asks an agent what it knows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StatusRequest {
    /// Name, UUID or id; all guests if `None`.
    pub domain: Option<String>,
}

/// Answer to it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StatusReply {
    /// The guests the agent knows.
    pub guests: Vec<GuestStatus>,
    /// Its host.
    pub host: String,
    /// Which agent it is.
    pub role: AgentRole,
}

/// Asks the primary agent to change settings of a protected guest. `None` stays as it is; one thing is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetRequest {
    /// Name, UUID or id.
    pub domain: String,
    /// Wanted length of an epoch. Whole milliseconds travel.
    pub epoch: Option<Duration>,
    /// The length is to be found for these goals; without them `epoch` stays fixed.
    pub goals: Option<EpochGoals>,
    /// Takes the place of what was chosen before.
    pub policy: Option<GuestPolicy>,
}

/// Answer to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetReply {
    /// What was done, for people.
    pub text: String,
}

/// Asks the backup agent to start a guest from its last committed epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailoverRequest {
    /// Name, UUID or id.
    pub domain: String,
    /// The operator vouches that the old host cannot run the guest any more.
    pub i_have_fenced: bool,
    /// Load, then wait for a [`ConfirmRequest`] before the guest may run. The step [`LOADED`] says that it waits.
    pub hold: bool,
    /// A watchdog's order: the record it is given under.
    pub term: Option<Term>,
}

/// Name of the step with which a failover that is held says that it waits.
pub const LOADED: &str = "loaded";

/// Ends the wait of a failover that is held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfirmRequest {
    /// Name, UUID or id.
    pub domain: String,
    /// Let the guest run; otherwise the failover is given up and the image stays.
    pub proceed: bool,
    /// A watchdog's order: the record it is given under.
    pub term: Option<Term>,
}

/// Which agent speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum AgentRole {
    /// The agent beside the protected guest.
    Primary,
    /// The agent that holds the image.
    Backup,
}

macro_rules! labelled {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $label:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
        #[serde(rename_all = "lowercase")]
        pub enum $name { $($(#[$vdoc])* $variant,)+ }
        impl $name {
            /// Every value.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];
            /// The word for it, on the wire and for people.
            pub fn label(self) -> &'static str {
                match self { $(Self::$variant => $label,)+ }
            }
        }
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.label())
            }
        }
    };
}
labelled! {
    /// What a guest is to the agent that speaks.
    GuestState {
        /// Primary: the full copy is under way. Backup: it has begun, nothing is committed yet.
        Seeding = "seeding",
        /// Primary: epochs are acknowledged.
        Protected = "protected",
        /// Primary: the backup is not reachable or a full copy is needed again; the guest runs.
        Degraded = "degraded",
        /// Primary: protection was ended.
        Unprotected = "unprotected",
        /// Backup: a committed image is here.
        Standby = "standby",
        /// Backup: a promotion is under way.
        Promoting = "promoting",
        /// Backup: the guest runs here.
        Promoted = "promoted",
        /// The guest has a newer owner elsewhere.
        Superseded = "superseded",
        /// The guest is gone.
        Ended = "ended",
        /// The guest is gone, and nobody has ended it: its QEMU died, or it panicked.
        Crashed = "crashed",
        /// Nothing works until someone acts; `detail` says what.
        Failed = "failed",
    }
}

/// What an agent knows of a guest. `None` and empty: not known to this agent.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GuestStatus {
    /// libvirt name.
    pub domain: String,
    /// libvirt UUID.
    pub uuid: GuestId,
    /// Which agent says this.
    pub role: AgentRole,
    /// What the guest is to it.
    pub state: GuestState,
    /// The other host.
    pub peer: String,
    /// Owner of the guest.
    pub generation: Generation,
    /// Last committed epoch.
    pub committed_epoch: Option<EpochId>,
    /// Milliseconds since it was committed.
    pub committed_age_ms: Option<u64>,
    /// Epochs since protection began.
    pub epochs_total: u64,
    /// Full copies among them.
    pub full_copies_total: u64,
    /// Time the guest is stopped for a checkpoint, median, milliseconds.
    pub pause_p50_ms: Option<f64>,
    /// The same, 99th percentile.
    pub pause_p99_ms: Option<f64>,
    /// Pages of an epoch, median.
    pub dirty_pages_p50: Option<u64>,
    /// The same, 99th percentile.
    pub dirty_pages_p99: Option<u64>,
    /// Wanted length of an epoch, milliseconds.
    pub epoch_ms: Option<u32>,
    /// Bytes of frames and device buffers since protection began.
    pub bytes_total: u64,
    /// State of the standby domain, for people.
    pub standby: String,
    /// QEMU version on this host.
    pub qemu: String,
    /// libvirt version on this host.
    pub libvirt: String,
    /// Why the state is what it is, for people.
    pub detail: String,
    /// Of the failover that made this host run the guest.
    pub failover: Option<FailoverReport>,
    /// Life of the backup agent that says this.
    pub incarnation: Option<Incarnation>,
    /// Orders of this term or an older one to let the guest's output go are refused.
    pub held_term: Option<Term>,
    /// What becomes of the guest's output, for people.
    pub output: String,
    /// Bytes that wait for a commit.
    pub output_waiting_bytes: Option<u64>,
    /// Frames that found the output gate full.
    pub output_dropped_total: Option<u64>,
    /// How its pages are encoded, where this agent does that.
    pub encoding: Option<EncodingReport>,
    /// Why epochs are as long as they are; empty where their length is fixed or not known.
    pub pace: String,
    /// How it is protected, if by this agent.
    pub settings: Option<GuestSettings>,
    /// Connections that its epochs go by now.
    pub connections: Option<u32>,
}

impl GuestStatus {
    /// A status with everything unknown that may be.
    pub fn new(domain: impl Into<String>, uuid: GuestId, role: AgentRole, state: GuestState) -> Self {
        Self {
            domain: domain.into(),
            uuid,
            role,
            state,
            peer: String::new(),
            generation: Generation::FIRST,
            committed_epoch: None,
            committed_age_ms: None,
            epochs_total: 0,
            full_copies_total: 0,
            pause_p50_ms: None,
            pause_p99_ms: None,
            dirty_pages_p50: None,
            dirty_pages_p99: None,
            epoch_ms: None,
            bytes_total: 0,
            standby: String::new(),
            qemu: String::new(),
            libvirt: String::new(),
            detail: String::new(),
            failover: None,
            incarnation: None,
            held_term: None,
            output: String::new(),
            output_waiting_bytes: None,
            output_dropped_total: None,
            encoding: None,
            pace: String::new(),
            settings: None,
            connections: None,
        }
    }
}

/// How the pages of a guest are encoded; counts are since its protection began.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct EncodingReport {
    /// As the agent was told: `off`, `auto`, `always`.
    pub mode: String,
    /// What is done now, for people; empty before the first epoch.
    pub plan: String,
    /// Why, for people.
    pub reason: String,
    /// Bytes of page frames as captured.
    pub raw_bytes: u64,
    /// Bytes of page frames as sent.
    pub sent_bytes: u64,
    /// Raw bytes to each byte sent; `None` before the first.
    pub ratio: Option<f64>,
    /// Bytes the page cache takes.
    pub cache_bytes: u64,
    /// First writes of an epoch that found the page in the cache.
    pub cache_hits: u64,
    /// Those that did not.
    pub cache_misses: u64,
    /// Hits to each of these writes, 0 to 1; `None` before the first.
    pub cache_hit_rate: Option<f64>,
    /// Pages by codec, of epochs that were encoded; for people.
    pub pages: String,
    /// Threads that may encode the guest's pages; 0 from agents that do not say.
    pub threads: u32,
}

impl EncodingReport {
    /// With `ratio` and `cache_hit_rate` from the counts; they do not travel.
    #[must_use]
    pub fn with_rates(self) -> Self {
        let rate = |part: u64, whole: u64| (whole > 0).then(|| part as f64 / whole as f64);
        Self {
            ratio: rate(self.raw_bytes, self.sent_bytes),
            cache_hit_rate: rate(self.cache_hits, self.cache_hits.saturating_add(self.cache_misses)),
            ..self
        }
    }
}

/// What a failover did. Durations travel as whole microseconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FailoverReport {
    /// The committed epoch the guest goes on from.
    pub epoch: EpochId,
    /// The generation the promotion took.
    pub generation: Generation,
    /// Waiting until that epoch was in the image.
    #[serde(rename = "finish_apply_us", serialize_with = "micros")]
    pub finish_apply: Duration,
    /// Writing the control file.
    #[serde(rename = "record_us", serialize_with = "micros")]
    pub record: Duration,
    /// Creating the standby domain.
    #[serde(rename = "prepare_us", serialize_with = "micros")]
    pub prepare: Duration,
    /// Sending memory and device state into it.
    #[serde(rename = "load_us", serialize_with = "micros")]
    pub load: Duration,
    /// Until libvirt says it runs.
    #[serde(rename = "resume_us", serialize_with = "micros")]
    pub resume: Duration,
    /// Asking QEMU to announce its network cards.
    #[serde(rename = "announce_us", serialize_with = "micros")]
    pub announce: Duration,
    /// From the request to the guest running.
    #[serde(rename = "total_us", serialize_with = "micros")]
    pub total: Duration,
    /// What went wrong after the guest ran.
    pub warnings: Vec<String>,
}

fn micros<S: serde::Serializer>(d: &Duration, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_u64(u64::try_from(d.as_micros()).unwrap_or(u64::MAX))
}
