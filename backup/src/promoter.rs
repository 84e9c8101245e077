//! What turns a committed image into a running guest. Behind a trait: the standby that is loaded at promotion is
//! one way, a standby whose memory is kept up to date is another.

use crate::image::Image;
use crate::shared::SharedMemory;
use std::sync::Arc;
use std::time::Duration;
use understudy_proto::ids::GuestId;
use understudy_proto::rpc::epoch::Seed;

/// What this host has of a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LocalDomain {
    /// Nothing that is active.
    Absent,
    /// Our standby, waiting for its incoming stream.
    Waiting,
    /// Our standby, loaded, never started.
    Loaded,
    /// A domain of this UUID runs, or is paused without being ours to discard.
    Active,
}

/// What a standby is made from.
#[derive(Debug, Clone)]
pub struct StandbySpec {
    /// The guest.
    pub guest: GuestId,
    /// Its layout and domain XML.
    pub seed: Arc<Seed>,
    /// Whether it has a persistent definition on the primary, and so gets one here when it is activated.
    pub persistent: bool,
}

/// What activation did once the guest ran.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Activation {
    /// Until libvirt said it runs.
    pub resume: Duration,
    /// Asking QEMU to announce its network cards.
    pub announce: Duration,
    /// What failed without keeping the guest from running.
    pub warnings: Vec<String>,
}

/// How the memory of an image comes into a standby.
#[derive(Debug, Clone)]
pub enum Standby {
    /// The standby has it in files: the image moves into them, and a promotion brings only the rest.
    Warm(Arc<SharedMemory>),
    /// Through the stream, all of it, at promotion. Why; empty if nothing needs to be said.
    Cold(String),
}

/// A step of a promotion that failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct PromoteError {
    /// What failed, with the values.
    pub reason: String,
    /// What to do about it; empty if nothing is known to help.
    pub remedy: String,
    /// Whether the guest may have run: memory it shares is then of no epoch any more.
    pub may_have_run: bool,
}

impl PromoteError {
    /// An error without a remedy.
    pub fn new(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), remedy: String::new(), may_have_run: false }
    }

    /// Of a guest that may have run.
    #[must_use]
    pub fn having_run(mut self) -> Self {
        self.may_have_run = true;
        self
    }

    /// With what a person can do.
    #[must_use]
    pub fn with_remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = remedy.into();
        self
    }
}

/// What the host could tell about itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostFacts {
    /// QEMU that new domains get.
    pub qemu_version: Option<String>,
    /// libvirt.
    pub libvirt_version: Option<String>,
    /// What keeps this host from running a guest; empty if nothing does.
    pub trouble: String,
}

/// Makes, loads, starts and discards standby domains. All calls block; one at a time per guest, and each may be
/// repeated. None of them touches a domain that is [`LocalDomain::Active`].
pub trait Promoter: Send + Sync + 'static {
    /// What this host is.
    fn host_facts(&self) -> HostFacts;

    /// Whether this host can run a versioned machine type; `None` if that is not known.
    fn supports_machine(&self, machine: &str) -> Option<bool>;

    /// The domain that libvirt knows by this number; `None` if there is none, or none can be asked.
    fn by_id(&self, _id: u32) -> Option<GuestId> {
        None
    }

    /// What this host has of the guest.
    ///
    /// # Errors
    /// If it cannot be found out.
    fn local(&self, guest: GuestId) -> Result<LocalDomain, PromoteError>;

    /// Makes the standby, silent and paused. Replaces one that was there. Its memory is in shared files if that can
    /// be had.
    ///
    /// # Errors
    /// If there is none afterwards.
    fn prepare(&self, spec: &StandbySpec) -> Result<Standby, PromoteError>;

    /// Brings the image into the waiting standby, which stays paused. Memory that is the standby's already stays
    /// where it is.
    ///
    /// # Errors
    /// The standby is of no use afterwards and must be discarded.
    fn load(&self, spec: &StandbySpec, image: &Arc<Image>) -> Result<(), PromoteError>;

    /// Lets the loaded standby run and announces it. `spec` is `None` after a restart of the agent.
    ///
    /// # Errors
    /// If it does not run; whether it may have for a moment is said.
    fn activate(&self, guest: GuestId, spec: Option<&StandbySpec>) -> Result<Activation, PromoteError>;

    /// Destroys the standby if there is one, waiting or loaded.
    ///
    /// # Errors
    /// If it may still be there.
    fn discard(&self, guest: GuestId) -> Result<(), PromoteError>;
}
