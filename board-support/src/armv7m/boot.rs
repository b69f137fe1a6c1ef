//! Boot code: the vector table, and what comes between reset and `board_main`.
//!
//! The linker script (`ld/armv7m.ld`) gives the addresses; the board gives `extern "C" fn board_main() -> !`, which
//! runs on the process stack. Exceptions take the main stack, which is small and apart from it: so an overflown stack
//! can still be reported.

use core::arch::global_asm;
use core::ops::Range;

unsafe extern "C" {
    static __stack_bottom: u8;
    static __stack_top: u8;
}

/// The stack that `board_main` runs on.
pub fn stack() -> Range<usize> {
    (&raw const __stack_bottom).addr()..(&raw const __stack_top).addr()
}

global_asm!(
    r#"
.section .vectors, "a"
    .word   __exception_stack_top
    .word   _start
.rept 14                                // no interrupt is ever switched on
    .word   exception_entry
.endr

.section .text.boot, "ax"
.global _start
.type _start, %function
.thumb_func
_start:
    // The floating-point unit, for everybody (CPACR).
    ldr     r0, =0xe000ed88
    ldr     r1, [r0]
    orr     r1, r1, #(0xf << 20)
    str     r1, [r0]
    // Faults of memory, bus and usage have exceptions of their own (SHCSR).
    ldr     r0, =0xe000ed24
    ldr     r1, [r0]
    orr     r1, r1, #(7 << 16)
    str     r1, [r0]
    dsb
    isb
    ldr     r0, =__data_start
    ldr     r1, =__data_end
    ldr     r2, =__data_load
1:  cmp     r0, r1
    bhs     2f
    ldr     r3, [r2], #4
    str     r3, [r0], #4
    b       1b
2:  ldr     r0, =__bss_start
    ldr     r1, =__bss_end
    movs    r3, #0
3:  cmp     r0, r1
    bhs     4f
    str     r3, [r0], #4
    b       3b
4:  ldr     r0, =__stack_top
    msr     psp, r0
    movs    r0, #2                      // privileged, on the process stack
    msr     control, r0
    isb
    bl      board_main
9:  wfi
    b       9b
.size _start, . - _start
.ltorg
"#
);
