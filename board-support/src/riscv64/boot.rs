//! Boot code: entered at the image's first byte with translation off.
//!
//! The linker script (`ld/riscv64.ld`) gives the addresses and the hart that boots; the board gives
//! `extern "C" fn board_main(hart: usize, device_tree: usize) -> !`. In machine mode every hart comes here, and those
//! that do not boot sleep, because some of them have no floating point (the FU540's hart 0). In supervisor mode the
//! firmware sends one hart, and it is the one that boots.

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

/// Keeps all harts but the one that boots; leaves a0 with the hart's number.
#[cfg(not(feature = "s-mode"))]
macro_rules! choose_hart {
    () => {
        "csrr   a0, mhartid
         lwu    t0, boot_hart
         bne    a0, t0, 9f"
    };
}
/// The firmware has chosen; a0 has the hart's number.
#[cfg(feature = "s-mode")]
macro_rules! choose_hart {
    () => {
        ""
    };
}

global_asm!(
    r#"
.section .text.boot, "ax"
.global _start
_start:
"#,
    super::csr!("csrw   ", "ie, zero"),
    "la     t0, trap_entry",
    super::csr!("csrw   ", "tvec, t0"),
    choose_hart!(),
    r#"
    .option push
    .option norelax
    la      gp, __global_pointer$
    .option pop
    la      sp, __stack_top
    li      t0, 1 << 13                 // FS: initial
"#,
    super::csr!("csrs   ", "status, t0"),
    r#"
    csrw    0x003, zero                 // fcsr
    la      t0, __bss_start
    la      t1, __bss_end
1:  bgeu    t0, t1, 2f
    sd      zero, 0(t0)
    addi    t0, t0, 8
    j       1b
2:  mv      s0, zero
    mv      ra, zero
    call    board_main
9:  wfi
    j       9b
.balign 4
boot_hart:
    .word   BOOT_HART
"#
);
