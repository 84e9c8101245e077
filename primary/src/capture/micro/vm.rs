//! A micro-VM: made new, or restored from what another one was.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use understudy_proto::ProtocolError;
use understudy_proto::layout::{MemoryLayout, RamBlock};
use understudy_proto::units::{PAGE_BYTES, PageData};

use super::dirty::{DirtyPage, DirtyTracking, RING_ENTRIES, Tracker};
use super::error::MicroError;
use super::state::{VcpuState, portable_msrs};
use super::vcpu::Vcpu;
use super::{boot, program};
use crate::sys::{GuestMemory, Slots};

/// Name of the block with page tables and program.
const LOW: &str = "micro.low";

/// Name of the block the program writes to.
const DATA: &str = "micro.data";

/// Where Intel's KVM may put pages of its own; beyond all memory a micro-VM can have.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// Why micro-VMs cannot be had on this machine; `None` if they can.
pub fn unusable() -> Option<String> {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => return Some(format!("/dev/kvm cannot be opened: {error}")),
    };
    let needed = [Cap::UserMemory, Cap::Irqchip, Cap::VcpuEvents, Cap::Debugregs, Cap::Xsave, Cap::Xcrs];
    let missing: Vec<_> = needed.into_iter().filter(|cap| !kvm.check_extension(*cap)).collect();
    if !missing.is_empty() {
        return Some(format!("this KVM lacks {missing:?}"));
    }
    let shape = Shape { pages: 1, written_pages: 1, rounds_per_report: 1, tracking: DirtyTracking::Log };
    let tried = MicroVm::create(&shape).and_then(|vm| vm.run_until_report());
    tried.err().map(|error| format!("a micro-VM does not run: {error}"))
}

/// What a new micro-VM is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Pages the program might write.
    pub pages: u64,
    /// Pages it does write, the first ones; with none it only counts.
    pub written_pages: u64,
    /// Rounds over them between two reports.
    pub rounds_per_report: u64,
    /// How dirty pages are to be found, if this KVM can.
    pub tracking: DirtyTracking,
}

/// A micro-VM; its clones are the same one. It ends with the last of them.
#[derive(Debug, Clone)]
pub struct MicroVm {
    machine: Arc<Machine>,
}

#[derive(Debug)]
struct Machine {
    slots: Arc<Slots>,
    layout: Arc<MemoryLayout>,
    tracking: DirtyTracking,
    inner: Mutex<Option<Inner>>,
}

#[derive(Debug)]
struct Inner {
    // Dropped before the ring, which is the vCPU's.
    vcpu: Vcpu,
    tracker: Tracker,
}

impl MicroVm {
    /// A new one, before its first step.
    ///
    /// # Errors
    /// If the shape makes no sense or KVM refuses something.
    pub fn create(shape: &Shape) -> Result<Self, MicroError> {
        if shape.written_pages > shape.pages || shape.rounds_per_report == 0 {
            let reason = format!("{shape:?}: it cannot write more pages than it has, nor never report");
            return Err(ProtocolError::invalid("shape of a micro-VM", reason).into());
        }
        let block = |name: &str, used_bytes| RamBlock { name: name.to_owned(), used_bytes };
        let data_bytes = shape.pages.saturating_mul(PAGE_BYTES as u64);
        let blocks = vec![block(LOW, boot::LOW_BYTES as u64), block(DATA, data_bytes)];
        let vm = Self::build(&MemoryLayout::new(blocks, Vec::new(), 0)?, shape.tracking, |vcpu, slots| {
            let (Some(low), Some(data)) = (slots.block(0), slots.block(1)) else {
                return Err(MicroError::Off);
            };
            boot::fill_low(low)?;
            for (at, page) in (0..data.len_bytes()).step_by(PAGE_BYTES).zip(0..) {
                if !data.write(at, &program::initial_page(page)) {
                    return Err(MicroError::WrongState { is: "smaller than its pages" });
                }
            }
            begin(vcpu, shape)
        })?;
        Ok(vm)
    }

    /// What another micro-VM was: its layout, the bytes of every block, and its device buffer. It does not run yet.
    ///
    /// # Errors
    /// If they are not those of a micro-VM, or KVM refuses something.
    pub fn restore<'a>(
        layout: &MemoryLayout,
        blocks: impl IntoIterator<Item = &'a [u8]>,
        device: &[u8],
        tracking: DirtyTracking,
    ) -> Result<Self, MicroError> {
        let state = VcpuState::decode(device)?;
        let vm = Self::build(layout, tracking, |_, slots| {
            let mut blocks = blocks.into_iter();
            for memory in slots.blocks() {
                let bytes = blocks.next().ok_or(ProtocolError::Missing { field: "bytes of a RAM block" })?;
                if bytes.len() != memory.len_bytes() || !memory.write(0, bytes) {
                    let reason = format!("{} bytes, the layout says {}", bytes.len(), memory.len_bytes());
                    return Err(ProtocolError::invalid("RAM block", reason).into());
                }
            }
            Ok(())
        })?;
        vm.with(|inner| inner.vcpu.load(Box::new(state)))?;
        Ok(vm)
    }

    fn build(
        layout: &MemoryLayout,
        tracking: DirtyTracking,
        fill: impl FnOnce(&VcpuFd, &Slots) -> Result<(), MicroError>,
    ) -> Result<Self, MicroError> {
        let names: Vec<_> = layout.blocks().iter().map(|block| block.name.as_str()).collect();
        let pages = layout.total_bytes() / PAGE_BYTES as u64;
        if names != [LOW, DATA] || pages > boot::MAX_PAGES.min(RING_ENTRIES as u64 / 2) {
            let reason = format!("blocks {names:?} with {pages} pages");
            return Err(ProtocolError::invalid("layout of a micro-VM", reason).into());
        }
        let kvm = Kvm::new().map_err(MicroError::kvm("open /dev/kvm"))?;
        let vm = new_vm(&kvm)?;
        // Before the vCPU, which gets its ring when it is made.
        let tracking = tracking.enable(&vm);
        let mut blocks = Vec::new();
        for (block, address) in layout.blocks().iter().zip([0, boot::DATA_ADDRESS]) {
            let bytes = usize::try_from(block.used_bytes).unwrap_or(usize::MAX);
            let memory = GuestMemory::new(bytes).map_err(MicroError::system("have memory for the guest"))?;
            blocks.push((address, memory));
        }
        let slots = Slots::new(vm, blocks).map_err(MicroError::kvm("take the guest's memory"))?;
        let slots = Arc::new(slots);
        let vcpu = slots.vm().create_vcpu(0).map_err(MicroError::kvm("make a vCPU"))?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(MicroError::kvm("tell what processors it can show"))?;
        vcpu.set_cpuid2(&cpuid).map_err(MicroError::kvm("take the processor's features"))?;
        let listed = kvm.get_msr_index_list().map_err(MicroError::kvm("list its MSRs"))?;
        let msrs = portable_msrs(&vcpu, listed.as_slice());
        fill(&vcpu, &slots)?;
        let tracker = tracking.tracker(&vcpu)?;
        let vcpu = Vcpu::start(Arc::clone(&slots), vcpu, msrs)?;
        let inner = Mutex::new(Some(Inner { vcpu, tracker }));
        let layout = Arc::new(layout.clone());
        Ok(Self { machine: Arc::new(Machine { slots, layout, tracking, inner }) })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Inner>> {
        self.machine.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, work: impl FnOnce(&mut Inner) -> Result<T, MicroError>) -> Result<T, MicroError> {
        work(self.lock().as_mut().ok_or(MicroError::Off)?)
    }

    /// Its blocks.
    pub fn layout(&self) -> &Arc<MemoryLayout> {
        &self.machine.layout
    }

    /// How its dirty pages are found in fact.
    pub fn tracking(&self) -> DirtyTracking {
        self.machine.tracking
    }

    /// Lets it run.
    ///
    /// # Errors
    /// If it runs, or is switched off.
    pub fn run(&self) -> Result<(), MicroError> {
        self.with(|inner| inner.vcpu.run())
    }

    /// Stops it between two instructions, wherever it is.
    ///
    /// # Errors
    /// If it does not run, or had ended by itself.
    pub fn pause(&self) -> Result<(), MicroError> {
        self.with(|inner| inner.vcpu.pause())
    }

    /// Whether it runs.
    pub fn is_running(&self) -> bool {
        self.lock().as_ref().is_some_and(|inner| inner.vcpu.is_running())
    }

    /// Lets it run to the end of a round, where all of memory is what the steps taken say. Gives their lower half. Never
    /// comes back from a program that writes no page.
    ///
    /// # Errors
    /// If it runs already, or ends.
    pub fn run_until_report(&self) -> Result<u32, MicroError> {
        self.with(|inner| inner.vcpu.run_until_report())
    }

    /// The state of its vCPU. It must be stopped.
    ///
    /// # Errors
    /// If it runs.
    pub fn save(&self) -> Result<Box<VcpuState>, MicroError> {
        self.with(|inner| inner.vcpu.save())
    }

    /// Its general registers. It must be stopped.
    ///
    /// # Errors
    /// If it runs.
    pub fn registers(&self) -> Result<kvm_regs, MicroError> {
        self.with(|inner| inner.vcpu.registers())
    }

    /// Steps the program has taken. It must be stopped.
    ///
    /// # Errors
    /// If it runs.
    pub fn steps(&self) -> Result<u64, MicroError> {
        self.registers().map(|registers| registers.r12)
    }

    /// Copies a page; false if there is none there. Of a guest that runs the copy may be torn.
    #[must_use]
    pub fn read_page(&self, (slot, page): DirtyPage, to: &mut PageData) -> bool {
        let Some(memory) = self.machine.slots.block(slot.into()) else { return false };
        usize::try_from(page).is_ok_and(|page| memory.read_page(page, to))
    }

    /// Switches the tracking of dirty pages.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn track(&self, on: bool) -> Result<(), MicroError> {
        self.machine.slots.set_logging(on).map_err(MicroError::kvm("switch dirty tracking"))
    }

    /// Adds the pages dirtied since the last call, in ascending order, and protects them again. It must be stopped.
    ///
    /// # Errors
    /// If it runs or KVM refuses; then what was dirty is not known any more.
    pub fn take_dirty(&self, pages: &mut Vec<DirtyPage>) -> Result<(), MicroError> {
        self.with(|inner| {
            if inner.vcpu.is_running() {
                return Err(MicroError::WrongState { is: "running" });
            }
            inner.tracker.take(&self.machine.slots, pages)
        })
    }

    /// Ends it at once, as a power cut does. Every later call fails.
    pub fn power_off(&self) {
        *self.lock() = None;
    }
}

fn new_vm(kvm: &Kvm) -> Result<VmFd, MicroError> {
    let vm = kvm.create_vm().map_err(MicroError::kvm("make a VM"))?;
    vm.set_tss_address(TSS_ADDRESS).map_err(MicroError::kvm("take the address of its own pages"))?;
    vm.create_irq_chip().map_err(MicroError::kvm("make interrupt controllers"))?;
    Ok(vm)
}

/// Brings a new vCPU to the beginning of the program.
fn begin(vcpu: &VcpuFd, shape: &Shape) -> Result<(), MicroError> {
    let mut sregs = vcpu.get_sregs().map_err(MicroError::kvm("give the system registers"))?;
    boot::system_registers(&mut sregs);
    vcpu.set_sregs(&sregs).map_err(MicroError::kvm("take the system registers"))?;
    vcpu.set_xcrs(&boot::extended_control())
        .map_err(MicroError::kvm("take the extended control registers"))?;
    let mut xsave = vcpu.get_xsave().map_err(MicroError::kvm("give the FPU"))?;
    boot::vector_registers(&mut xsave.region);
    crate::sys::load_xsave(vcpu, &xsave).map_err(MicroError::kvm("take the FPU"))?;
    vcpu.set_regs(&boot::registers(shape)).map_err(MicroError::kvm("take the registers"))
}
