//! Exceptions: none is expected but that of the probe for semihosting, so each ends the run with a report.

use core::arch::global_asm;

use super::boot;

global_asm!(
    r#"
.section .text.vectors, "ax"
.balign 2048
.global exception_vectors
exception_vectors:
.set vector, 0
.rept 16
    .balign 128
    mov     x0, #vector
    b       exception_entry
    .set vector, vector + 1
.endr
exception_entry:
    mrs     x1, esr_el1
    mrs     x2, elr_el1
    mrs     x3, far_el1
    mrs     x4, sp_el0
    // The handler runs on the exceptions' own stack, whatever became of the other one. It returns where to go on, if
    // the exception was expected.
    str     x30, [sp, #-16]!
    bl      forebay_exception
    ldr     x30, [sp], #16
    msr     elr_el1, x0
    eret

// Whether a debugger or an emulator answers HLT #0xF000: if none does, the instruction is undefined, and the handler
// goes on behind it.
.global semihosting_probe, semihosting_call, semihosting_absent
semihosting_probe:
    mov     x0, #0x13                   // SYS_ERRNO, which has no effect
    mov     x1, xzr
semihosting_call:
    hlt     #0xf000
    mov     x0, #1
    ret
semihosting_absent:
    mov     x0, xzr
    ret
"#
);

unsafe extern "C" {
    fn semihosting_probe() -> u64;
    static semihosting_call: u8;
    static semihosting_absent: u8;
}

/// Whether a debugger or an emulator answers semihosting calls.
pub fn semihosting_answers() -> bool {
    // SAFETY: follows the calling convention, except that an exception in it clobbers registers which a call may
    // clobber too.
    unsafe { semihosting_probe() != 0 }
}

/// The exception classes (ESR_EL1.EC) that a program without system calls can meet.
fn class(esr: u64) -> &'static str {
    match esr >> 26 & 0x3f {
        0x00 => "undefined instruction",
        0x07 => "floating point or SIMD is off",
        0x0e => "illegal execution state",
        0x15 => "supervisor call",
        0x18 => "trapped system register",
        0x20 | 0x21 => "instruction abort",
        0x22 => "misaligned program counter",
        0x24 | 0x25 => "data abort",
        0x26 => "misaligned stack pointer",
        0x2c => "floating-point exception",
        0x2f => "SError",
        0x3c => "breakpoint",
        _ => "unexpected exception class",
    }
}

/// Why an abort happened: ESR_EL1's fault status code.
fn abort_cause(esr: u64) -> &'static str {
    let class = esr >> 26 & 0x3f;
    if !(0x20..=0x25).contains(&class) {
        return "";
    }
    match esr & 0x3f {
        0x04..=0x07 => ": address not mapped",
        0x08..=0x0b => ": access flag",
        0x0c..=0x0f => ": no permission",
        0x10 => ": the bus answered with an error",
        0x21 => ": misaligned address",
        _ => ": other fault",
    }
}

#[unsafe(no_mangle)]
extern "C" fn forebay_exception(vector: u64, esr: u64, elr: u64, far: u64, sp: u64) -> u64 {
    const UNKNOWN: u64 = 0;
    if esr >> 26 & 0x3f == UNKNOWN && elr == (&raw const semihosting_call).addr() as u64 {
        return (&raw const semihosting_absent).addr() as u64;
    }
    let kind = ["synchronous", "interrupt", "fast interrupt", "SError"][(vector % 4) as usize];
    let stack = boot::stack();
    if (stack.start as u64).wrapping_sub(far) < super::pages::BLOCK && abort_cause(esr) == ": address not mapped" {
        panic!("stack overflow: {} bytes are not enough (pc {elr:#x}, sp {sp:#x})", stack.len());
    }
    panic!(
        "{kind} exception: {}{} (esr {esr:#x}, pc {elr:#x}, address {far:#x}, sp {sp:#x})",
        class(esr),
        abort_cause(esr)
    );
}
