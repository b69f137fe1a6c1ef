//! Boot code: entered at the image's first byte with MMU off, on EL3, EL2 or EL1.
//!
//! The linker script (`ld/aarch64.ld`) gives the addresses; the board gives `PAGE_TABLE`, a
//! [`Level1`](super::pages::Level1), and `extern "C" fn board_main(level: u64) -> !`, which is told the exception level
//! it all began on. `board_main` runs on SP_EL0, and exceptions take SP_EL1, which has a small stack of its own: so an
//! overflown stack can still be reported.

use core::arch::global_asm;

unsafe extern "C" {
    static __stack_bottom: u8;
    static __stack_top: u8;
}

/// The stack that `board_main` runs on.
pub fn stack() -> core::ops::Range<usize> {
    (&raw const __stack_bottom).addr()..(&raw const __stack_top).addr()
}

global_asm!(
    r#"
.section .text.boot, "ax"
.global _start
_start:
    msr     daifset, #0xf
    // One core runs the model; the others sleep. Boards start them by PSCI or a spin table, if at all.
    mrs     x1, mpidr_el1
    tst     x1, #0xffffff               // affinity levels 2 to 0
    b.ne    9f

    mrs     x1, CurrentEL
    lsr     x19, x1, #2                 // the board is told
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
    adr     x2, 0f
    msr     elr_el3, x2
    ldr     x2, =0x30d00800
    msr     sctlr_el1, x2
    isb
    eret
0:  mrs     x1, CurrentEL
1:  cmp     x1, #(2 << 2)
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
2:  // EL1
    adrp    x1, __exception_stack_top
    add     x1, x1, :lo12:__exception_stack_top
    msr     spsel, #1
    mov     sp, x1
    msr     spsel, #0
    adrp    x1, __stack_top
    add     x1, x1, :lo12:__stack_top
    mov     sp, x1
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
    bl      board_main
9:  wfi
    b       9b
.ltorg
"#
);
