//! Exceptions: none is expected but that of the probe for semihosting, so each ends the run with a report.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU8, Ordering};

use cortex_m::peripheral::SCB;

use super::boot;

global_asm!(
    r#"
.section .text.exception_entry, "ax"
.type exception_entry, %function
.thumb_func
exception_entry:
    mrs     r0, psp
    mrs     r1, ipsr
    push    {{r4, lr}}
    bl      forebay_exception
    pop     {{r4, pc}}
.size exception_entry, . - exception_entry
"#
);

/// `bkpt #0xab`: a semihosting call.
const CALL: u16 = 0xbeab;

/// What the processor pushes before it enters an exception.
#[repr(C)]
struct Frame {
    r0: u32,
    r1_to_r3: [u32; 3],
    r12: u32,
    lr: u32,
    pc: u32,
    psr: u32,
}

/// Whether a debugger or an emulator answers semihosting calls. Asked once: in an exception a call that nobody answers
/// would lock the processor up.
pub fn semihosting_answers() -> bool {
    const UNKNOWN: u8 = 0;
    const NO: u8 = 1;
    const YES: u8 = 2;
    static ANSWER: AtomicU8 = AtomicU8::new(UNKNOWN);
    let known = ANSWER.load(Ordering::Relaxed);
    if known != UNKNOWN {
        return known == YES;
    }
    // SYS_ERRNO, which has no effect. Nobody gives this error's number; the handler below gives it for nobody.
    let mut r0 = 0x13u32;
    // SAFETY: a semihosting call, or a breakpoint that the handler below returns from.
    unsafe { asm!("bkpt #0xab", inout("r0") r0, in("r1") 0, options(nostack)) };
    let answers = r0 != NOBODY;
    ANSWER.store(if answers { YES } else { NO }, Ordering::Relaxed);
    answers
}

/// What a semihosting call gives when nobody answers.
const NOBODY: u32 = 0x8000_0bad;

/// Bits of the configurable fault status register, and what they say.
const CAUSES: [(u32, &str); 14] = [
    (1 << 0, "no permission to fetch"),
    (1 << 1, "no permission to read or write"),
    (1 << 4, "no permission to push an exception's frame"),
    (1 << 5, "no permission to save floating point"),
    (1 << 8, "the bus answered a fetch with an error"),
    (1 << 9, "the bus answered with an error"),
    (1 << 10, "the bus answered a write with an error"),
    (1 << 12, "the bus answered with an error while an exception's frame was pushed"),
    (1 << 13, "the bus answered with an error while floating point was saved"),
    (1 << 16, "undefined instruction"),
    (1 << 17, "not a Thumb instruction"),
    (1 << 19, "no coprocessor, or floating point is off"),
    (1 << 24, "misaligned address"),
    (1 << 25, "division by zero"),
];
/// BFAR is valid.
const BUS_ADDRESS: u32 = 1 << 15;
/// Bytes beneath the stack that an overflow may reach.
const GUARD: usize = 1 << 20;

#[unsafe(no_mangle)]
extern "C" fn forebay_exception(frame: *mut Frame, exception: u32) {
    // SAFETY: registers of the processor that are only read.
    let (cfsr, bfar) = unsafe { ((*SCB::PTR).cfsr.read(), (*SCB::PTR).bfar.read()) };
    let stack = boot::stack();
    let sp = frame.addr();
    let beneath = |address: usize| address < stack.start && address >= stack.start - GUARD;
    if beneath(sp) || (cfsr & BUS_ADDRESS != 0 && beneath(bfar as usize)) {
        panic!("stack overflow: {} bytes are not enough (sp {sp:#x})", stack.len());
    }
    if !(stack.start..=stack.end - size_of::<Frame>()).contains(&sp) {
        panic!("exception {exception} with the stack at {sp:#x} (status {cfsr:#x})");
    }
    // SAFETY: the processor has pushed it there.
    let frame = unsafe { &mut *frame };
    const HARD_FAULT: u32 = 3;
    let code = core::ptr::with_exposed_provenance::<u16>(frame.pc as usize);
    // SAFETY: without a fault's status the instruction was executed, so it can be read.
    if exception == HARD_FAULT && cfsr == 0 && unsafe { code.read() } == CALL {
        frame.r0 = NOBODY;
        frame.pc += 2;
        // SAFETY: the flags of what has been dealt with are cleared by writing them.
        unsafe { (*SCB::PTR).hfsr.write((*SCB::PTR).hfsr.read()) };
        return;
    }
    let kind = match exception {
        2 => "non-maskable interrupt",
        HARD_FAULT => "hard fault",
        4 => "memory fault",
        5 => "bus fault",
        6 => "usage fault",
        _ => "unexpected exception",
    };
    let cause = CAUSES.iter().find(|(bit, _)| cfsr & bit != 0).map_or("no status", |(_, cause)| cause);
    panic!("{kind}: {cause} (status {cfsr:#x}, pc {:#x}, address {bfar:#x}, sp {sp:#x})", frame.pc);
}
