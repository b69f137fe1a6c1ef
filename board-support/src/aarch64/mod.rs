//! AArch64: from reset to `board_main`, and what runs beneath it.
//!
//! [`boot`] leaves EL3 or EL2, turns the MMU and the caches on and calls the board's `board_main` on EL1.

pub mod boot;
pub mod cache;
mod critical;
pub mod exceptions;
pub mod pages;
pub mod smp;

use core::fmt;

use aarch64_cpu::registers::{CNTFRQ_EL0, CNTVCT_EL0, MIDR_EL1, Readable};

use crate::app::Clock;

/// Ticks of the generic timer's virtual counter.
fn ticks() -> u64 {
    // The barrier keeps the read from being executed early.
    aarch64_cpu::asm::barrier::isb(aarch64_cpu::asm::barrier::SY);
    CNTVCT_EL0.get()
}

/// The generic timer.
pub fn clock() -> Clock {
    Clock { now: ticks, hertz: CNTFRQ_EL0.get() }
}

/// What the code runs on.
#[derive(Clone, Copy, Debug)]
pub struct Processor {
    /// The exception level on which the boot code was entered.
    pub entered: u64,
}

impl fmt::Display for Processor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, entered at EL{}", name(), self.entered)
    }
}

fn name() -> &'static str {
    const ARM: u64 = 0x41;
    match (MIDR_EL1.read(MIDR_EL1::Implementer), MIDR_EL1.read(MIDR_EL1::PartNum)) {
        (ARM, 0xd03) => "Cortex-A53",
        (ARM, 0xd04) => "Cortex-A35",
        (ARM, 0xd05) => "Cortex-A55",
        (ARM, 0xd07) => "Cortex-A57",
        (ARM, 0xd08) => "Cortex-A72",
        (ARM, 0xd0b) => "Cortex-A76",
        (ARM, 0xd0c) => "Neoverse N1",
        _ => "an AArch64 processor",
    }
}
