//! All of a vCPU, and of the interrupt controllers beside it, and the bytes it travels in.
//!
//! | bytes | field |
//! |---|---|
//! | 8 | magic |
//! | 4 | version |
//! | 4 | number of MSRs |
//! | 16 each | MSRs: index, padding, value |
//! | the rest | KVM's structs, in the order of [`VcpuState`] |
//!
//! All little-endian. KVM's structs are its ABI: they do not change within a version of this format.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_SIPI_VECTOR, Msrs, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use understudy_proto::ProtocolError;
use zerocopy::{FromBytes, IntoBytes};

use super::error::MicroError;
use crate::sys::load_xsave;

const MAGIC: [u8; 8] = *b"USTMICRO";
const VERSION: u32 = 1;

/// More than KVM's list has on any processor.
const MAX_MSRS: usize = 1024;

const IRQCHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// The state of the vCPU and of the VM's interrupt controllers at a stop.
#[derive(Debug)]
pub struct VcpuState {
    /// Model-specific registers that this KVM lets one read and write back.
    pub msrs: Vec<kvm_msr_entry>,
    /// General registers.
    pub regs: kvm_regs,
    /// Segments, control registers, APIC base.
    pub sregs: kvm_sregs,
    /// Extended control registers.
    pub xcrs: kvm_xcrs,
    /// FPU and vector registers.
    pub xsave: kvm_xsave,
    /// Exceptions and interrupts under way.
    pub events: kvm_vcpu_events,
    /// Debug registers.
    pub debug: kvm_debugregs,
    /// Local APIC.
    pub lapic: kvm_lapic_state,
    /// Runs, halted, ...
    pub mp: kvm_mp_state,
    /// Both PICs and the IOAPIC.
    pub irqchips: [kvm_irqchip; 3],
}

/// The MSRs of KVM's list that can be read and written back on this machine.
pub(super) fn portable_msrs(vcpu: &VcpuFd, listed: &[u32]) -> Vec<u32> {
    let restorable = |index: &u32| {
        let entry = [kvm_msr_entry { index: *index, ..kvm_msr_entry::default() }];
        let Ok(mut one) = Msrs::from_entries(&entry) else { return false };
        vcpu.get_msrs(&mut one).is_ok_and(|read| read == 1) && vcpu.set_msrs(&one).is_ok_and(|set| set == 1)
    };
    listed.iter().copied().take(MAX_MSRS).filter(restorable).collect()
}

impl VcpuState {
    /// Reads it from a vCPU that does not run.
    pub(super) fn save(vm: &VmFd, vcpu: &VcpuFd, msrs: &[u32]) -> Result<Self, MicroError> {
        let mut irqchips = IRQCHIPS.map(|chip_id| kvm_irqchip { chip_id, ..kvm_irqchip::default() });
        for irqchip in &mut irqchips {
            vm.get_irqchip(irqchip).map_err(MicroError::kvm("give an interrupt controller"))?;
        }
        Ok(Self {
            // First, as it may change what follows: an interrupt under way is put where the rest expects it.
            mp: vcpu.get_mp_state().map_err(MicroError::kvm("give the run state"))?,
            msrs: read_msrs(vcpu, msrs)?,
            regs: vcpu.get_regs().map_err(MicroError::kvm("give the registers"))?,
            sregs: vcpu.get_sregs().map_err(MicroError::kvm("give the system registers"))?,
            xcrs: vcpu.get_xcrs().map_err(MicroError::kvm("give the extended control registers"))?,
            xsave: vcpu.get_xsave().map_err(MicroError::kvm("give the FPU"))?,
            events: vcpu.get_vcpu_events().map_err(MicroError::kvm("give the events"))?,
            debug: vcpu.get_debug_regs().map_err(MicroError::kvm("give the debug registers"))?,
            lapic: vcpu.get_lapic().map_err(MicroError::kvm("give the local APIC"))?,
            irqchips,
        })
    }

    /// Writes it to a vCPU that does not run.
    pub(super) fn load(&self, vm: &VmFd, vcpu: &VcpuFd) -> Result<(), MicroError> {
        for irqchip in &self.irqchips {
            vm.set_irqchip(irqchip).map_err(MicroError::kvm("take an interrupt controller"))?;
        }
        vcpu.set_sregs(&self.sregs).map_err(MicroError::kvm("take the system registers"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(MicroError::kvm("take the extended control registers"))?;
        load_xsave(vcpu, &self.xsave).map_err(MicroError::kvm("take the FPU"))?;
        let msrs = Msrs::from_entries(&self.msrs).map_err(|_| too_many(self.msrs.len()))?;
        let taken = vcpu.set_msrs(&msrs).map_err(MicroError::kvm("take the MSRs"))?;
        if let Some(refused) = self.msrs.get(taken) {
            let value = format!("{:#x} with {:#x}, which KVM refuses", refused.index, refused.data);
            return Err(ProtocolError::invalid("MSR", value).into());
        }
        vcpu.set_lapic(&self.lapic).map_err(MicroError::kvm("take the local APIC"))?;
        vcpu.set_mp_state(self.mp).map_err(MicroError::kvm("take the run state"))?;
        vcpu.set_debug_regs(&self.debug).map_err(MicroError::kvm("take the debug registers"))?;
        vcpu.set_regs(&self.regs).map_err(MicroError::kvm("take the registers"))?;
        // Last: setting the registers forgets a pending exception.
        let mut events = self.events;
        events.flags |= KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SIPI_VECTOR;
        vcpu.set_vcpu_events(&events).map_err(MicroError::kvm("take the events"))
    }

    /// As a device buffer.
    pub fn encode(&self) -> Vec<u8> {
        let count = u32::try_from(self.msrs.len()).unwrap_or(u32::MAX);
        let mut bytes = Vec::with_capacity(16 << 10);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&count.to_le_bytes());
        for part in [
            self.msrs.as_bytes(),
            self.regs.as_bytes(),
            self.sregs.as_bytes(),
            self.xcrs.as_bytes(),
            self.xsave.as_bytes(),
            self.events.as_bytes(),
            self.debug.as_bytes(),
            self.lapic.as_bytes(),
            self.mp.as_bytes(),
            self.irqchips.as_bytes(),
        ] {
            bytes.extend_from_slice(part);
        }
        bytes
    }

    /// Out of a device buffer. What the values mean is KVM's to check when they are loaded.
    ///
    /// # Errors
    /// If it is not one, of another version, or not exactly as long as it says.
    pub fn decode(bytes: &[u8]) -> Result<Self, ProtocolError> {
        let mut rest = bytes;
        let magic: [u8; 8] = take(&mut rest, "magic")?;
        if magic != MAGIC {
            return Err(ProtocolError::invalid("device buffer", "not that of a micro-VM".to_owned()));
        }
        let version = u32::from_le_bytes(take(&mut rest, "version")?);
        if version != VERSION {
            return Err(ProtocolError::invalid(
                "version of a micro-VM's state",
                format!("{version}, known is {VERSION}"),
            ));
        }
        let count = u32::from_le_bytes(take(&mut rest, "number of MSRs")?);
        ProtocolError::check_len("MSRs", count.into(), MAX_MSRS as u64)?;
        let state = Self {
            msrs: (0..count).map(|_| take(&mut rest, "MSR")).collect::<Result<_, _>>()?,
            regs: take(&mut rest, "registers")?,
            sregs: take(&mut rest, "system registers")?,
            xcrs: take(&mut rest, "extended control registers")?,
            xsave: take(&mut rest, "FPU")?,
            events: take(&mut rest, "events")?,
            debug: take(&mut rest, "debug registers")?,
            lapic: take(&mut rest, "local APIC")?,
            mp: take(&mut rest, "run state")?,
            irqchips: take(&mut rest, "interrupt controllers")?,
        };
        if rest.is_empty() {
            Ok(state)
        } else {
            Err(ProtocolError::invalid(
                "device buffer",
                format!("{} bytes longer than a micro-VM's state", rest.len()),
            ))
        }
    }
}

fn take<T: FromBytes>(rest: &mut &[u8], what: &'static str) -> Result<T, ProtocolError> {
    let (value, behind) = T::read_from_prefix(rest).map_err(|_| ProtocolError::Truncated {
        what,
        needed: size_of::<T>() as u64,
        available: rest.len() as u64,
    })?;
    *rest = behind;
    Ok(value)
}

fn too_many(count: usize) -> MicroError {
    ProtocolError::invalid("MSRs", format!("{count} of them")).into()
}

fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, MicroError> {
    let entries: Vec<_> =
        indices.iter().map(|index| kvm_msr_entry { index: *index, ..kvm_msr_entry::default() }).collect();
    let mut msrs = Msrs::from_entries(&entries).map_err(|_| too_many(entries.len()))?;
    let read = vcpu.get_msrs(&mut msrs).map_err(MicroError::kvm("give the MSRs"))?;
    match indices.get(read) {
        None => Ok(msrs.as_slice().to_vec()),
        Some(index) => {
            Err(ProtocolError::invalid("MSR", format!("{index:#x} cannot be read any more")).into())
        }
    }
}
