//! The program that runs inside the micro-VM. `crate::capture::micro::program` says what its registers and pages mean.

use std::arch::global_asm;

// Position-independent and flat; runs at CPL 3 with IOPL 3, uses no stack.
//
//   r12 steps taken          r13 next page           r14 pages that are written   r15 where they begin
//   r11 chain over all steps rbx, rbp its constants  r10 slot of this round       rsi, rdi rounds until the next report
//   st0 steps again          ymm1 four sums          ymm2 what each step adds to them
global_asm!(
    ".pushsection .rodata.understudy_micro, \"a\", @progbits",
    ".globl understudy_micro_begin",
    "understudy_micro_begin:",
    // The FPU begins with an empty stack.
    "fldz",
    "test r14, r14",
    "jz 4f",
    "2:",
    "inc r12",
    "imul r11, rbx",
    "add r11, rbp",
    "fld1",
    "faddp st(1), st",
    "vpaddq ymm1, ymm1, ymm2",
    "mov rax, r13",
    "shl rax, 12",
    "add rax, r15",
    // The page: steps, chain, steps by the FPU, the four sums, and the step in the slot of this round.
    "mov [rax], r12",
    "mov [rax + 8], r11",
    "fld st(0)",
    "fistp qword ptr [rax + 16]",
    "vmovdqu [rax + 32], ymm1",
    "mov [rax + 64 + r10 * 8], r12",
    "inc r13",
    "cmp r13, r14",
    "jb 2b",
    // A round is over: every page was written once.
    "xor r13d, r13d",
    "inc r10",
    "cmp r10, 448",
    "jb 3f",
    "xor r10d, r10d",
    "3:",
    "dec rsi",
    "jnz 2b",
    "mov rsi, rdi",
    "mov eax, r12d",
    "out 0x70, eax",
    "jmp 2b",
    // Nothing is to be written: only counts.
    "4:",
    "inc r12",
    "pause",
    "jmp 4b",
    ".globl understudy_micro_end",
    "understudy_micro_end:",
    ".popsection",
);

unsafe extern "C" {
    static understudy_micro_begin: u8;
    static understudy_micro_end: u8;
}

/// The program's machine code.
pub(crate) fn micro_program() -> &'static [u8] {
    let (begin, end) = (&raw const understudy_micro_begin, &raw const understudy_micro_end);
    let len_bytes = (end as usize).saturating_sub(begin as usize);
    // SAFETY: both labels are in the same read-only section above, the second behind the first, with code between.
    unsafe { std::slice::from_raw_parts(begin, len_bytes) }
}
