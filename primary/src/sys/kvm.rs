//! The calls of KVM that take addresses, and those that `kvm-ioctls` does not have.

use std::os::raw::c_uint;

use kvm_bindings::{
    KVM_MEM_LOG_DIRTY_PAGES, KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1,
    kvm_userspace_memory_region, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_iowr_nr};

use super::GuestMemory;

// Linux's Documentation/virt/kvm/api.rst 4.117: after KVM_GET_DIRTY_LOG with manual protection, clears and
// write-protects what is set in the bitmap.
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
// Linux's Documentation/virt/kvm/api.rst 8.29: write-protects the pages of all ring entries that were taken.
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

/// A VM with its memory. Whoever runs a vCPU of it holds on to this, so that no guest outlives its memory.
#[derive(Debug)]
pub(crate) struct Slots {
    // Dropped before the memory.
    vm: VmFd,
    blocks: Vec<(u64, GuestMemory)>,
}

impl Slots {
    /// Gives the VM its memory: each block at its guest-physical address, slots numbered in this order.
    ///
    /// # Errors
    /// If KVM refuses one.
    pub(crate) fn new(vm: VmFd, blocks: Vec<(u64, GuestMemory)>) -> Result<Self, errno::Error> {
        let slots = Self { vm, blocks };
        slots.set_logging(false)?;
        Ok(slots)
    }

    /// The VM.
    pub(crate) fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// The memory of every slot.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = &GuestMemory> {
        self.blocks.iter().map(|(_, memory)| memory)
    }

    /// The memory of a slot.
    pub(crate) fn block(&self, slot: usize) -> Option<&GuestMemory> {
        self.blocks.get(slot).map(|(_, memory)| memory)
    }

    /// Switches the tracking of dirty pages.
    ///
    /// # Errors
    /// If KVM refuses.
    pub(crate) fn set_logging(&self, on: bool) -> Result<(), errno::Error> {
        for (slot, (address, memory)) in (0..).zip(&self.blocks) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: *address,
                memory_size: memory.len_bytes() as u64,
                userspace_addr: memory.address(),
            };
            // SAFETY: the region is a mapping of our own that nothing but copies reaches, and it stays as long as the VM.
            unsafe { self.vm.set_user_memory_region(region) }?;
        }
        Ok(())
    }

    /// Clears and protects the pages set in `bitmap`, which KVM has just given for the slot.
    ///
    /// # Errors
    /// If KVM refuses.
    pub(crate) fn clear_dirty_log(&self, slot: u32, pages: u32, bitmap: &[u64]) -> Result<(), errno::Error> {
        if bitmap.len() < (pages as usize).div_ceil(64) {
            return Err(errno::Error::new(rustix::io::Errno::INVAL.raw_os_error()));
        }
        let clear = kvm_clear_dirty_log {
            slot,
            num_pages: pages,
            first_page: 0,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: bitmap.as_ptr().cast_mut().cast(),
            },
        };
        // SAFETY: KVM reads a bit per page, and the bitmap has as many. It writes nothing.
        match unsafe { ioctl_with_ref(&self.vm, KVM_CLEAR_DIRTY_LOG(), &clear) } {
            0.. => Ok(()),
            _ => Err(errno::Error::last()),
        }
    }

    /// Protects the pages of all ring entries that were taken; gives their number.
    ///
    /// # Errors
    /// If KVM refuses.
    pub(crate) fn reset_dirty_rings(&self) -> Result<c_uint, errno::Error> {
        // SAFETY: the call takes no argument.
        let count = unsafe { ioctl(&self.vm, KVM_RESET_DIRTY_RINGS()) };
        c_uint::try_from(count).map_err(|_| errno::Error::last())
    }
}

/// Gives a vCPU its FPU and vector registers.
///
/// # Errors
/// If KVM refuses them.
pub(crate) fn load_xsave(vcpu: &VcpuFd, xsave: &kvm_xsave) -> Result<(), errno::Error> {
    // SAFETY: KVM reads more than the struct's 4 KiB only where the process has asked for dynamically enabled features
    // (arch_prctl), which this one never does.
    unsafe { vcpu.set_xsave(xsave) }
}
