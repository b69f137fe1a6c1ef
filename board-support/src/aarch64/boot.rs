//! Boot code: entered at the image's first byte with MMU off, on EL3, EL2 or EL1.
//!
//! The linker script (`ld/aarch64.ld`) gives the addresses; the board gives `PAGE_TABLE`, a
//! [`Level1`](super::pages::Level1), and `extern "C" fn board_main(level: u64, argument: usize) -> !`, which is told
//! the exception level it all began on, and what the loader left in x0: a device tree's address, if the loader has one
//! to give. `board_main` runs on SP_EL0, and exceptions take SP_EL1, which has a small stack of its own: so an
//! overflown stack can still be reported.
//!
//! Further cores come to `_secondary`, when somebody starts them there, and go on in [`super::smp`].

use core::arch::global_asm;
use core::mem::MaybeUninit;
use core::ops::Range;

use super::smp::EXCEPTION_STACK;

const PAGE: usize = 4096;

unsafe extern "C" {
    static __stack_bottom: u8;
    static __stack_top: u8;
    static __core_stacks: u8;
    static __bss_end: u8;
    /// Addresses that are sizes.
    static CORE_STACK_SIZE: u8;
    static CORES: u8;
    static _secondary: u8;
}

/// The stack that `board_main` runs on.
pub fn stack() -> Range<usize> {
    (&raw const __stack_bottom).addr()..(&raw const __stack_top).addr()
}

/// The memory from the image's end up to `end`, in whole pages; empty if there is none.
///
/// # Safety
/// That memory is mapped, cacheable, and used by nothing else; this is called once.
pub unsafe fn free_memory(end: usize) -> &'static mut [MaybeUninit<u8>] {
    let start = (&raw const __bss_end).expose_provenance().next_multiple_of(PAGE);
    let len = end.saturating_sub(start) & !(PAGE - 1);
    // SAFETY: the caller's promise; whatever the bytes are, they need not be initialised.
    unsafe { core::slice::from_raw_parts_mut(core::ptr::with_exposed_provenance_mut(start), len) }
}

/// The stack of a further core, from 1 on; the topmost bytes are for exceptions.
pub(super) fn core_stack(core: usize) -> Range<usize> {
    let len = (&raw const CORE_STACK_SIZE).addr();
    let start = (&raw const __core_stacks).addr() + (core - 1) * len;
    start..start + len - EXCEPTION_STACK
}

/// Cores that there are stacks for, the first one among them.
pub(super) fn cores() -> usize {
    (&raw const CORES).addr()
}

/// Where further cores are to start, with the MMU off, on any exception level.
pub(super) fn secondary_entry() -> usize {
    (&raw const _secondary).addr()
}

global_asm!(
    r#"
.section .text.boot, "ax"
.global _start
_start:
    msr     daifset, #0xf
    mov     x20, x0
    // Where all cores come out of reset together, those that are not the first one sleep for good.
    mrs     x1, mpidr_el1
    tst     x1, #0xffffff               // affinity levels 2 to 0
    b.ne    9f
    mrs     x1, CurrentEL
    lsr     x19, x1, #2                 // the board is told
    bl      to_el1
    adrp    x1, __exception_stack_top
    add     x1, x1, :lo12:__exception_stack_top
    adrp    x2, __stack_top
    add     x2, x2, :lo12:__stack_top
    bl      prepare
    // Memory is written only from here on, so that nothing is written behind the caches' back.
    adrp    x1, __bss_start
    add     x1, x1, :lo12:__bss_start
    adrp    x2, __bss_end
    add     x2, x2, :lo12:__bss_end
3:  cmp     x1, x2
    b.hs    4f
    stp     xzr, xzr, [x1], #16
    b       3b
4:  mov     x29, xzr
    mov     x30, xzr
    mov     x0, x19
    mov     x1, x20
    bl      board_main
9:  wfi
    b       9b

// A further core: its number is its affinity 0, which gives it its stack.
.global _secondary
_secondary:
    msr     daifset, #0xf
    bl      to_el1
    mrs     x19, mpidr_el1
    and     x19, x19, #0xff
    ldr     x2, =CORE_STACK_SIZE
    adrp    x1, __core_stacks
    add     x1, x1, :lo12:__core_stacks
    madd    x1, x19, x2, x1
    sub     x2, x1, #{exception_stack}
    bl      prepare
    mov     x29, xzr
    mov     x30, xzr
    mov     x0, x19
    bl      forebay_secondary

// Returns on EL1 with MMU and caches off.
to_el1:
    mrs     x1, CurrentEL
    cmp     x1, #(3 << 2)
    b.ne    1f
    // EL3: the lower levels are non-secure and AArch64, HVC works, SMC traps to nobody.
    mov     x2, #0x5b1                  // RW, HCE, SMD, RES1, NS
    msr     scr_el3, x2
    msr     cptr_el3, xzr
    mov     x2, #0x3c9                  // EL2h, masked
    mrs     x3, id_aa64pfr0_el1
    tst     x3, #0xf00
    mov     x4, #0x3c5                  // EL1h, masked, where there is no EL2
    csel    x2, x4, x2, eq
    msr     spsr_el3, x2
    adr     x2, 1f
    msr     elr_el3, x2
    ldr     x2, =0x30d00800
    msr     sctlr_el1, x2
    isb
    eret
1:  mrs     x1, CurrentEL
    cmp     x1, #(2 << 2)
    b.ne    2f
    // EL2: EL1 is AArch64 and has timers, FP and SIMD to itself.
    mov     x2, #(1 << 31)              // RW
    msr     hcr_el2, x2
    mov     x2, #3                      // EL1PCTEN, EL1PCEN
    msr     cnthctl_el2, x2
    msr     cntvoff_el2, xzr
    mov     x2, #0x33ff                 // RES1, no traps
    msr     cptr_el2, x2
    msr     hstr_el2, xzr
    mrs     x2, mpidr_el1
    msr     vmpidr_el2, x2
    mrs     x2, midr_el1
    msr     vpidr_el2, x2
    ldr     x2, =0x30d00800             // RES1 bits: MMU and caches off
    msr     sctlr_el1, x2
    mov     x2, #0x3c5                  // EL1h, masked
    msr     spsr_el2, x2
    adr     x2, 2f
    msr     elr_el2, x2
    isb
    eret
2:  ret

// x1: top of the stack for exceptions, x2: top of the stack. Turns FP, SIMD, MMU and caches on.
prepare:
    msr     spsel, #1
    mov     sp, x1
    msr     spsel, #0
    mov     sp, x2
    adrp    x1, exception_vectors
    add     x1, x1, :lo12:exception_vectors
    msr     vbar_el1, x1
    mov     x1, #(3 << 20)              // FP and SIMD for EL1 and EL0
    msr     cpacr_el1, x1
    // Table walks are cacheable; 32-bit addresses, 4 KiB pages, no upper half.
    ldr     x1, =0x04ff                 // attribute 1: device nGnRE; attribute 0: write-back
    msr     mair_el1, x1
    ldr     x1, =((64 - 32) | (1 << 8) | (1 << 10) | (3 << 12) | (1 << 23))
    msr     tcr_el1, x1
    adrp    x1, PAGE_TABLE
    add     x1, x1, :lo12:PAGE_TABLE
    msr     ttbr0_el1, x1
    dsb     sy
    tlbi    vmalle1
    ic      iallu
    dsb     sy
    isb
    ldr     x1, =0x30d01805             // RES1, I, C, M
    msr     sctlr_el1, x1
    isb
    ret
.ltorg
"#,
    exception_stack = const EXCEPTION_STACK,
);
