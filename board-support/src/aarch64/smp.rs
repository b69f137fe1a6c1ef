//! Further cores: how they are started, and what they do.
//!
//! A core that computes serves the [`Team`]; between jobs it waits for an event (`wfe`), which `sev` sends. A core that
//! is not needed sleeps for good (`wfi`).

use core::arch::asm;
use core::ptr::NonNull;

use forebay_kernels::exec::Workers;
use smccc::psci;

use super::{boot, cache, clock};
use crate::cores::{Cores, Further, Power, Team};

/// Bytes at the top of a further core's stack that exceptions use.
pub(super) const EXCEPTION_STACK: usize = 4096;

static TEAM: Team = Team::new(wait_for_event, send_event);

fn wait_for_event() {
    aarch64_cpu::asm::wfe();
}

fn send_event() {
    // SAFETY: a barrier, so that what was stored is seen by who wakes, and a hint.
    unsafe { asm!("dsb ish", "sev", options(nostack, preserves_flags)) };
}

/// A further core, with its stack, MMU and caches.
#[unsafe(no_mangle)]
extern "C" fn forebay_secondary(core: usize) -> ! {
    if TEAM.wants(core) {
        TEAM.serve();
    }
    loop {
        aarch64_cpu::asm::wfi();
    }
}

/// Arm's Power State Coordination Interface: firmware, or an emulator in its place.
#[derive(Clone, Copy, Debug)]
pub struct Psci {
    /// The exception level on which the boot code was entered: on EL1 the firmware is called by HVC, on EL2 by SMC,
    /// and on EL3 there is none.
    pub entered: u64,
}

impl Power for Psci {
    const STARTS_ALL: bool = false;

    fn start(&self, core: usize) -> bool {
        let (core, entry) = (core as u64, boot::secondary_entry() as u64);
        match self.entered {
            1 => psci::cpu_on::<smccc::Hvc>(core, entry, 0).is_ok(),
            2 => psci::cpu_on::<smccc::Smc>(core, entry, 0).is_ok(),
            _ => false,
        }
    }
}

/// A spin table: each core waits for an address in a word of its own.
#[derive(Clone, Copy, Debug)]
pub struct SpinTable {
    words: usize,
}

impl SpinTable {
    /// The table whose word for core n is at `words + 8 * n`.
    ///
    /// # Safety
    /// That many words are mapped memory that only waiting cores read.
    pub const unsafe fn new(words: usize) -> Self {
        Self { words }
    }
}

impl Power for SpinTable {
    const STARTS_ALL: bool = true;

    fn start(&self, core: usize) -> bool {
        let Some(word) = NonNull::new(core::ptr::with_exposed_provenance_mut::<u64>(self.words + 8 * core)) else {
            return false;
        };
        // SAFETY: the promise of `new`; the core reads the word after it has reached memory.
        unsafe { word.write_volatile(boot::secondary_entry() as u64) };
        cache::flush(NonNull::slice_from_raw_parts(word.cast(), size_of::<u64>()));
        send_event();
        true
    }
}

/// The cores of a machine: what there is of [`boot`]'s stacks, started by `P`.
#[derive(Clone, Copy, Debug)]
pub struct ManyCores<P>(pub P);

impl<P: Power> Cores for ManyCores<P> {
    /// To be called once.
    fn start(&self, count: usize) -> &'static dyn Workers {
        // SAFETY: the linker script keeps memory for as many stacks.
        unsafe { TEAM.start(&self.0, count, boot::cores(), boot::core_stack, &clock()) };
        &TEAM
    }

    fn further(&self) -> Option<Further> {
        TEAM.further(boot::core_stack)
    }
}
