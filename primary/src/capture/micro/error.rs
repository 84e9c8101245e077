//! What can go wrong with a micro-VM.

use understudy_proto::ProtocolError;
use vmm_sys_util::errno;

/// A call of a micro-VM failed.
#[derive(Debug, thiserror::Error)]
pub enum MicroError {
    /// KVM refused a call.
    #[error("KVM refused to {what}: {source}")]
    Kvm {
        /// What it was asked for.
        what: &'static str,
        /// Its reason.
        source: errno::Error,
    },
    /// The system gave no memory, thread or mapping.
    #[error("cannot {what}: {source}")]
    System {
        /// What it was asked for.
        what: &'static str,
        /// Its reason.
        source: std::io::Error,
    },
    /// The guest did what its program never does.
    #[error("the guest ended: {exit}")]
    Exit {
        /// KVM's words.
        exit: String,
    },
    /// The guest was asked for something while it runs, or does not.
    #[error("the guest is {is}")]
    WrongState {
        /// What it is instead.
        is: &'static str,
    },
    /// It was switched off.
    #[error("the guest is switched off")]
    Off,
    /// Something to be restored is not what a micro-VM is made from.
    #[error("cannot be restored: {0}")]
    Restore(#[from] ProtocolError),
}

impl MicroError {
    /// Names the call of KVM that failed.
    pub(super) fn kvm(what: &'static str) -> impl FnOnce(errno::Error) -> Self {
        move |source| Self::Kvm { what, source }
    }

    /// Names what the system refused.
    pub(super) fn system<E: Into<std::io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { what, source: source.into() }
    }
}
