//! ARMv7-M with a floating-point unit (Cortex-M4F, M7): from reset to `board_main`, and faults that report.

pub mod boot;
mod exceptions;

use core::fmt;

pub use exceptions::semihosting_answers;

/// The processor, by its part number (CPUID).
#[derive(Clone, Copy, Debug)]
pub struct Processor;

impl fmt::Display for Processor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // SAFETY: a register that only tells what it is.
        let id = unsafe { (*cortex_m::peripheral::CPUID::PTR).base.read() };
        f.write_str(match (id >> 24, id >> 4 & 0xfff) {
            (0x41, 0xc24) => "Cortex-M4F",
            (0x41, 0xc27) => "Cortex-M7",
            _ => "an ARMv7-M processor",
        })
    }
}
