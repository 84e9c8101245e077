//! The state the guest begins with: long mode, flat, CPL 3. There is no firmware and no kernel, so nothing of it ever
//! runs at CPL 0, which some hypervisors can only emulate.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs, kvm_xcr, kvm_xcrs};
use understudy_proto::units::PAGE_BYTES;

use super::error::MicroError;
use super::program::{CHAIN_FACTOR, CHAIN_STEP, LANES};
use super::vm::Shape;
use crate::sys::{GuestMemory, micro_program};

/// Bytes of the first block: page tables and program.
pub(super) const LOW_BYTES: usize = 64 << 10;

/// Guest-physical and guest-virtual address of the pages the program writes.
pub(super) const DATA_ADDRESS: u64 = LARGE_PAGE_BYTES;

/// Pages the page tables can map behind [`DATA_ADDRESS`].
pub(super) const MAX_PAGES: u64 = (512 - 1) * LARGE_PAGE_BYTES / PAGE_BYTES as u64;

const LARGE_PAGE_BYTES: u64 = 2 << 20;

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
const PROGRAM: u64 = 0x5000;

/// What page table entries say: present, writable, for CPL 3.
const TABLE: u64 = 0x7;
/// A page of 2 MiB.
const LARGE: u64 = 0x80;

/// Writes page tables and program into the first block.
pub(super) fn fill_low(low: &GuestMemory) -> Result<(), MicroError> {
    let mut ok = low.write(offset(PML4), &(PDPT | TABLE).to_le_bytes());
    ok &= low.write(offset(PDPT), &(DIRECTORY | TABLE).to_le_bytes());
    for entry in 0..512u64 {
        let value = (entry * LARGE_PAGE_BYTES) | TABLE | LARGE;
        ok &= low.write(offset(DIRECTORY + 8 * entry), &value.to_le_bytes());
    }
    ok &= low.write(offset(PROGRAM), micro_program());
    if ok { Ok(()) } else { Err(MicroError::WrongState { is: "larger than its first block" }) }
}

fn offset(address: u64) -> usize {
    usize::try_from(address).unwrap_or(usize::MAX)
}

/// The general registers the program starts with.
pub(super) fn registers(shape: &Shape) -> kvm_regs {
    kvm_regs {
        rip: PROGRAM,
        // IOPL 3: the program reports by `out`.
        rflags: 0x3002,
        r14: shape.written_pages,
        r15: DATA_ADDRESS,
        rbx: CHAIN_FACTOR,
        rbp: CHAIN_STEP,
        rsi: shape.rounds_per_report,
        rdi: shape.rounds_per_report,
        ..kvm_regs::default()
    }
}

/// Changes the system registers of a new vCPU.
pub(super) fn system_registers(sregs: &mut kvm_sregs) {
    let segment = |selector, type_, l| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 3,
        db: 1 - l,
        s: 1,
        l,
        g: 1,
        ..kvm_segment::default()
    };
    sregs.cs = segment(0x33, 0xb, 1);
    let data = segment(0x2b, 0x3, 0);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, selector: 0x40, type_: 0xb, present: 1, ..kvm_segment::default() };
    sregs.ldt = kvm_segment { unusable: 1, ..kvm_segment::default() };
    // Nothing uses them, but a state that lost them must be seen to differ.
    sregs.fs.base = 0x0000_1234_5678_9000;
    sregs.gs.base = 0x0000_0fed_cba9_8000;
    sregs.cr3 = PML4;
    // PAE, OSFXSR, OSXMMEXCPT, OSXSAVE
    sregs.cr4 = 0x4_0620;
    // PG, NE, ET, MP, PE
    sregs.cr0 = 0x8000_0033;
    // LMA, LME, SCE
    sregs.efer = 0x501;
}

/// x87, SSE and AVX switched on.
pub(super) fn extended_control() -> kvm_xcrs {
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..kvm_xcrs::default() };
    xcrs.xcrs[0] = kvm_xcr { xcr: 0, value: 7, ..kvm_xcr::default() };
    xcrs
}

/// Puts the program's constant vector, the third of the state's registers (ymm2), into an XSAVE area in standard form.
pub(super) fn vector_registers(region: &mut [u32]) {
    const XMM: usize = 160 / 4;
    const XSTATE_BV: usize = 512 / 4;
    const YMM_HIGH: usize = 576 / 4;
    let halves = |value: u64| {
        let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
        [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])]
    };
    let [first, second, third, fourth] = LANES.map(halves);
    for (at, words) in [(XMM + 8, [first, second]), (YMM_HIGH + 8, [third, fourth])] {
        for (word, value) in words.iter().flatten().enumerate() {
            if let Some(target) = region.get_mut(at + word) {
                *target = *value;
            }
        }
    }
    // Control words as after reset: no exceptions, full precision.
    if let Some(control) = region.get_mut(0) {
        *control = 0x37f;
    }
    if let Some(mxcsr) = region.get_mut(24 / 4) {
        *mxcsr = 0x1f80;
    }
    // x87, SSE and AVX state are there.
    if let Some(state) = region.get_mut(XSTATE_BV) {
        *state |= 7;
    }
}
