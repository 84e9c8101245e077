//! Which pages the guest has written since they were last asked for.

use std::fmt;

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, kvm_dirty_gfn,
    kvm_enable_cap,
};
use kvm_ioctls::{VcpuFd, VmFd};
use understudy_proto::units::PAGE_BYTES;

use super::error::MicroError;
use crate::sys::{DirtyRing, Slots};

/// Entries of a ring: so many that no guest of ours can fill one between two stops.
pub(super) const RING_ENTRIES: usize = 65536;
const RING_BYTES: usize = RING_ENTRIES * size_of::<kvm_dirty_gfn>();

/// Way of KVM to report dirty pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DirtyTracking {
    /// A bitmap; reading it protects the pages again.
    Log,
    /// A bitmap that is read first, and cleared and protected by a second call.
    ManualProtect,
    /// Entries in shared memory, one per page.
    Ring,
}

impl fmt::Display for DirtyTracking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Log => "dirty log",
            Self::ManualProtect => "manual protect",
            Self::Ring => "dirty ring",
        })
    }
}

/// A page: memory slot, page in it.
pub type DirtyPage = (u16, u64);

/// What a VM uses.
#[derive(Debug)]
pub(super) enum Tracker {
    Log,
    ManualProtect,
    Ring(DirtyRing),
}

impl DirtyTracking {
    /// Switches it on for a VM without vCPUs; falls back to what this KVM can do, in the end to the log.
    pub(super) fn enable(self, vm: &VmFd) -> Self {
        let has = |cap: u32, least: i32| vm.check_extension_raw(cap.into()) >= least;
        let enable = |cap: u32, value: usize| {
            let mut request = kvm_enable_cap { cap, ..kvm_enable_cap::default() };
            request.args[0] = value as u64;
            vm.enable_cap(&request).is_ok()
        };
        let ring_bytes = i32::try_from(RING_BYTES).unwrap_or(i32::MAX);
        let ring = |cap| has(cap, ring_bytes) && enable(cap, RING_BYTES);
        match self {
            Self::Ring if ring(KVM_CAP_DIRTY_LOG_RING_ACQ_REL) || ring(KVM_CAP_DIRTY_LOG_RING) => Self::Ring,
            // Once a ring is on there is no log; it was not switched on.
            Self::Ring | Self::ManualProtect
                if has(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 1)
                    && enable(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 1) =>
            {
                Self::ManualProtect
            }
            _ => Self::Log,
        }
    }

    /// For the VM's vCPU.
    pub(super) fn tracker(self, vcpu: &VcpuFd) -> Result<Tracker, MicroError> {
        Ok(match self {
            Self::Log => Tracker::Log,
            Self::ManualProtect => Tracker::ManualProtect,
            Self::Ring => Tracker::Ring(
                DirtyRing::new(vcpu, RING_BYTES).map_err(MicroError::system("map the dirty ring"))?,
            ),
        })
    }
}

impl Tracker {
    /// Adds the pages dirtied since the last call, each once, and protects them again. The guest must not run.
    pub(super) fn take(&mut self, slots: &Slots, pages: &mut Vec<DirtyPage>) -> Result<(), MicroError> {
        match self {
            Self::Ring(ring) => {
                let mut taken = 0u32;
                while let Some((slot, page)) = ring.take() {
                    taken += 1;
                    // Address space in the upper half: there is only one.
                    pages.push((u16::try_from(slot & 0xffff).unwrap_or(u16::MAX), page));
                }
                let reset = slots.reset_dirty_rings().map_err(MicroError::kvm("reset the dirty ring"))?;
                if reset != taken {
                    let exit = format!("{taken} entries of its dirty ring were taken and {reset} reset");
                    return Err(MicroError::Exit { exit });
                }
                // KVM may report a page twice.
                pages.sort_unstable();
                pages.dedup();
            }
            Self::Log | Self::ManualProtect => {
                for (slot, memory) in (0u16..).zip(slots.blocks()) {
                    let bytes = memory.len_bytes();
                    let bitmap = slots
                        .vm()
                        .get_dirty_log(slot.into(), bytes)
                        .map_err(MicroError::kvm("give the dirty log"))?;
                    let count = u32::try_from(bytes / PAGE_BYTES).unwrap_or(u32::MAX);
                    if matches!(self, Self::ManualProtect) {
                        slots
                            .clear_dirty_log(slot.into(), count, &bitmap)
                            .map_err(MicroError::kvm("clear the dirty log"))?;
                    }
                    for (base, word) in (0u64..).step_by(64).zip(&bitmap) {
                        let mut word = *word;
                        while word != 0 {
                            pages.push((slot, base + u64::from(word.trailing_zeros())));
                            word &= word - 1;
                        }
                    }
                }
            }
        }
        Ok(())
    }
}
