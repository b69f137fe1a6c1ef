//! Boot code: entered at the image's first byte with translation off.
//!
//! The linker script (`ld/riscv64.ld`) gives the addresses and the hart that boots; the board gives
//! `extern "C" fn board_main(hart: usize, device_tree: usize) -> !`. In machine mode every hart comes here, and those
//! that do not boot sleep until they are called by [`call`]; some never are, because they have no floating point (the
//! FU540's hart 0). In supervisor mode the firmware sends one hart, and it is the one that boots. Further harts come to
//! `_secondary` and go on in [`super::smp`].
//!
//! `tp` has a core's number plus 1.

use core::arch::global_asm;
use core::ops::Range;

unsafe extern "C" {
    static __stack_bottom: u8;
    static __stack_top: u8;
    static __core_stacks: u8;
    /// Cores that there are stacks for, and the bytes of each stack but the first: the linker script's.
    static core_stacks_shape: [usize; 2];
    #[cfg(feature = "s-mode")]
    static _secondary: u8;
}

/// The stack that `board_main` runs on.
pub fn stack() -> Range<usize> {
    (&raw const __stack_bottom).addr()..(&raw const __stack_top).addr()
}

/// The stack of a further core, from 1 on.
pub(super) fn core_stack(core: usize) -> Range<usize> {
    // SAFETY: constants of the boot code.
    let [_, len] = unsafe { core_stacks_shape };
    let start = (&raw const __core_stacks).addr() + (core - 1) * len;
    start..start + len
}

/// Cores that there are stacks for, the first one among them.
pub(super) fn cores() -> usize {
    // SAFETY: constants of the boot code.
    let [cores, _] = unsafe { core_stacks_shape };
    cores
}

/// Where firmware is to start further harts, a1 being the core's number.
#[cfg(feature = "s-mode")]
pub(super) fn secondary_entry() -> usize {
    (&raw const _secondary).addr()
}

/// Number of this core: 0 for the one that booted.
pub(super) fn this_core() -> usize {
    let tp: usize;
    // SAFETY: reads a register, which the boot code has set and nobody changes.
    unsafe { core::arch::asm!("mv {tp}, tp", tp = out(reg) tp, options(nomem, nostack, preserves_flags)) };
    tp - 1
}

/// Tells hart `hart`, which sleeps where it came out of reset, that it is core `core`; it looks when a software
/// interrupt wakes it.
#[cfg(not(feature = "s-mode"))]
pub(super) fn call(hart: usize, core: usize) {
    use core::sync::atomic::{AtomicUsize, Ordering};
    unsafe extern "C" {
        /// Two words: the hart called last, and its core's number. In .data, so that no hart sees it before its value.
        static hart_called: [AtomicUsize; 2];
    }
    // SAFETY: words of the boot code, which only reads them; aligned to 8 bytes.
    let [called, number] = unsafe { &hart_called };
    number.store(core, Ordering::Relaxed);
    called.store(hart, Ordering::Release);
}

/// Keeps all harts but the one that boots; leaves a0 with the hart's number.
#[cfg(not(feature = "s-mode"))]
macro_rules! choose_hart {
    () => {
        "csrr   a0, mhartid
         lwu    t0, boot_hart
         bne    a0, t0, 5f"
    };
}
/// The firmware has chosen; a0 has the hart's number.
#[cfg(feature = "s-mode")]
macro_rules! choose_hart {
    () => {
        ""
    };
}

/// Where harts wait for [`call`]. A software interrupt is not taken, it only ends `wfi`.
#[cfg(not(feature = "s-mode"))]
macro_rules! park {
    () => {
        "
5:  li      t0, 1 << 3                  // MSIE
    csrw    mie, t0
6:  wfi
    la      t0, hart_called
    ld      t1, 0(t0)
    bne     t1, a0, 6b
    fence   r, rw
    ld      a1, 8(t0)
    j       _secondary
.balign 4
boot_hart:
    .word   BOOT_HART
.section .data.hart_called, \"aw\"
.balign 8
.global hart_called
hart_called:
    .dword  -1, 0
.section .text.boot, \"ax\"
"
    };
}
/// Harts wait in the firmware.
#[cfg(feature = "s-mode")]
macro_rules! park {
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
2:  li      tp, 1
    mv      s0, zero
    mv      ra, zero
    call    board_main
9:  wfi
    j       9b
"#,
    park!(),
    r#"
// A further hart: a1 is its core's number, which gives it its stack.
.global _secondary
_secondary:
"#,
    super::csr!("csrw   ", "ie, zero"),
    "la     t0, trap_entry",
    super::csr!("csrw   ", "tvec, t0"),
    r#"
    .option push
    .option norelax
    la      gp, __global_pointer$
    .option pop
    addi    tp, a1, 1
    la      sp, __core_stacks
    la      t0, core_stacks_shape
    ld      t0, 8(t0)
    mv      t1, a1
7:  add     sp, sp, t0
    addi    t1, t1, -1
    bnez    t1, 7b
    li      t0, 1 << 13                 // FS: initial
"#,
    super::csr!("csrs   ", "status, t0"),
    r#"
    csrw    0x003, zero                 // fcsr
    mv      s0, zero
    mv      ra, zero
    mv      a0, a1
    call    forebay_secondary
.balign 8
.global core_stacks_shape
core_stacks_shape:
    .dword  CORES, CORE_STACK_SIZE
"#
);
