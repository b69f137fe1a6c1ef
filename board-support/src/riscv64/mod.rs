//! RISC-V: from reset to `board_main`, traps that report, a guard beneath the stack, the clock, the vector unit, further
//! harts.
//!
//! Without features this is machine mode on the bare machine; with `s-mode` it is supervisor mode under SBI firmware.

/// An instruction on a control register of the mode that this is built for.
#[cfg(not(feature = "s-mode"))]
macro_rules! csr {
    ($before:literal, $name:literal) => {
        concat!($before, "m", $name)
    };
}
#[cfg(feature = "s-mode")]
macro_rules! csr {
    ($before:literal, $name:literal) => {
        concat!($before, "s", $name)
    };
}
use csr;

pub mod boot;
mod critical;
#[cfg(feature = "s-mode")]
pub mod sbi;
pub mod sifive;
pub mod smp;
mod vector;

use core::arch::global_asm;

pub use vector::Vectors;

#[cfg(not(feature = "s-mode"))]
use riscv::register::{Permission, pmpaddr0, pmpaddr1, pmpcfg0};

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
        pmpaddr1::write(boot::stack().start >> 2);
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
.section .text.trap, "ax"
.balign 4
trap_entry:
"#,
    csr!("csrw   ", "scratch, t0"),
    csr!("csrr   t0, ", "cause"),
    r#"
    addi    t0, t0, -3
    bnez    t0, 1f
    // A breakpoint: in a semihosting call, `slli zero, zero, 0x1f` stands before it. No debugger has taken it, so the
    // call fails.
"#,
    csr!("csrr   t0, ", "epc"),
    r#"
    lw      t0, -4(t0)
    li      a0, 0x01f01013
    bne     t0, a0, 1f
"#,
    csr!("csrr   t0, ", "epc"),
    "addi   t0, t0, 4",
    csr!("csrw   ", "epc, t0"),
    "li     a0, -1",
    csr!("csrr   t0, ", "scratch"),
    csr!("", "ret"),
    // No other trap is expected, not while booting either, so nothing is saved.
    "1: mv  a3, sp",
    "la     sp, {stack} + {size}",
    csr!("csrr   a0, ", "cause"),
    csr!("csrr   a1, ", "epc"),
    csr!("csrr   a2, ", "tval"),
    "j      forebay_trap",
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
    let stack = boot::stack();
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
