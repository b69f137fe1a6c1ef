//! RISC-V over `riscv-rt`: traps that report, a guard beneath the stack, the clock.
//!
//! Without features this is machine mode on the bare machine; with `s-mode` it is supervisor mode under SBI firmware.
//!
//! `riscv-rt` boots (registers, FPU, `.data`, `.bss`); this module replaces its trap entry, because a trap after a
//! stack overflow needs a stack of its own.

use core::arch::global_asm;
use core::ops::Range;

#[cfg(not(feature = "s-mode"))]
use riscv::register::{Permission, pmpaddr0, pmpaddr1, pmpcfg0};

#[cfg(feature = "s-mode")]
pub mod sbi;

/// An instruction that reads a control register of the mode that this is built for.
#[cfg(not(feature = "s-mode"))]
macro_rules! read_csr {
    ($register:literal, $name:literal) => {
        concat!("csrr ", $register, ", m", $name)
    };
}
#[cfg(feature = "s-mode")]
macro_rules! read_csr {
    ($register:literal, $name:literal) => {
        concat!("csrr ", $register, ", s", $name)
    };
}

unsafe extern "C" {
    // `riscv-rt` calls the stack's lowest address its end.
    static __estack: u8;
    static _stack_start: u8;
}

/// The stack that `main` runs on.
pub fn stack() -> Range<usize> {
    (&raw const __estack).addr()..(&raw const _stack_start).addr()
}

/// The `time` counter, on machines where the present mode can read it.
pub fn time() -> u64 {
    riscv::register::time::read64()
}

/// Takes the right to write from the code and the constants, which lie between `code` and the stack, even for machine
/// mode: so a stack that overflows faults. Lasts until reset.
#[cfg(not(feature = "s-mode"))]
pub fn guard_stack(code: usize) {
    // SAFETY: the first entry only gives the second one its lower bound; what the second covers is never written.
    unsafe {
        pmpaddr0::write(code >> 2);
        pmpaddr1::write(stack().start >> 2);
        pmpcfg0::set_pmp(1, riscv::register::Range::TOR, Permission::RX, true);
    }
}

/// Ends an emulation by writing to the test device at `address` (`sifive,test0`).
///
/// # Safety
/// `address` is that device, or a place that may be written.
pub unsafe fn finish(address: usize, status: u8) -> ! {
    let word = if status == 0 { 0x5555 } else { u32::from(status) << 16 | 0x3333 };
    // SAFETY: the caller's promise.
    unsafe { core::ptr::with_exposed_provenance_mut::<u32>(address).write_volatile(word) };
    loop {
        core::hint::spin_loop();
    }
}

global_asm!(
    r#"
.section .trap.start, "ax"
.balign 4
.global _start_trap
.global _pre_init_trap
_start_trap:
_pre_init_trap:
    // No trap is expected, not while booting either, so nothing is saved.
    mv      a3, sp
    la      sp, {stack} + {size}
"#,
    read_csr!("a0", "cause"),
    read_csr!("a1", "epc"),
    read_csr!("a2", "tval"),
    "j forebay_trap",
    stack = sym TRAP_STACK,
    size = const TRAP_STACK_SIZE,
);

const TRAP_STACK_SIZE: usize = 8 << 10;

#[repr(C, align(16))]
struct TrapStack([u8; TRAP_STACK_SIZE]);

/// Written only through `sp`.
static mut TRAP_STACK: TrapStack = TrapStack([0; TRAP_STACK_SIZE]);

#[unsafe(no_mangle)]
extern "C" fn forebay_trap(cause: usize, pc: usize, value: usize, sp: usize) -> ! {
    let interrupt = cause >> (usize::BITS - 1) == 1;
    let stack = stack();
    if !interrupt && cause == 7 && value < stack.start && sp <= stack.start + 4096 {
        panic!("stack overflow: {} bytes are not enough (pc {pc:#x}, sp {sp:#x})", stack.len());
    }
    let name = match (interrupt, cause) {
        (true, _) => "unexpected interrupt",
        (_, 0) => "misaligned instruction address",
        (_, 1) => "instruction access fault",
        (_, 2) => "illegal instruction",
        (_, 3) => "breakpoint",
        (_, 4) => "misaligned load",
        (_, 5) => "load access fault",
        (_, 6) => "misaligned store",
        (_, 7) => "store access fault",
        (_, 8..=11) => "environment call",
        _ => "unexpected trap",
    };
    panic!("{name} (cause {cause:#x}, pc {pc:#x}, address or instruction {value:#x}, sp {sp:#x})");
}
