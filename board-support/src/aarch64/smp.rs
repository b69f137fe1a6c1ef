//! Further cores: how they are started, and what they do.
//!
//! A core that computes serves the [`Team`]; between jobs it waits for an event (`wfe`), which `sev` sends. A core that
//! is not needed sleeps for good (`wfi`).

use core::arch::asm;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicUsize, Ordering};

use forebay_kernels::exec::Workers;
use smccc::psci;

use super::{boot, cache, clock};
use crate::cores::{Cores, Team};
use crate::stack::Stack;

/// Bytes at the top of a further core's stack that exceptions use.
pub(super) const EXCEPTION_STACK: usize = 4096;
/// Seconds that a core may take to come up.
const LIMIT: u64 = 2;

static TEAM: Team = Team::new(wait_for_event, send_event);
/// Cores that compute, the first one among them. Written before any core is started.
static COMPUTING: AtomicUsize = AtomicUsize::new(1);

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
    if core < COMPUTING.load(Ordering::Acquire) {
        TEAM.serve();
    }
    loop {
        aarch64_cpu::asm::wfi();
    }
}

/// A way to start cores.
pub trait Power {
    /// Whether cores that are not needed, too, should be brought from where they wait to where they sleep.
    const STARTS_ALL: bool;

    /// Starts core `core` at `entry`. False if there is none.
    fn start(&self, core: usize, entry: usize) -> bool;
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

    fn start(&self, core: usize, entry: usize) -> bool {
        let (core, entry) = (core as u64, entry as u64);
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

    fn start(&self, core: usize, entry: usize) -> bool {
        let Some(word) = NonNull::new(core::ptr::with_exposed_provenance_mut::<u64>(self.words + 8 * core)) else {
            return false;
        };
        // SAFETY: the promise of `new`; the core reads the word after it has reached memory.
        unsafe { word.write_volatile(entry as u64) };
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
        let have = boot::cores();
        let count = count.min(have);
        COMPUTING.store(count, Ordering::Release);
        for core in 1..count {
            // SAFETY: the stack of a core that has not been started.
            unsafe { Stack::paint_all(boot::core_stack(core)) };
            if !self.0.start(core, boot::secondary_entry()) {
                break;
            }
            let (start, limit) = (clock(), LIMIT * clock().hertz);
            let begin = (start.now)();
            while TEAM.serving() < core && (start.now)().wrapping_sub(begin) < limit {
                core::hint::spin_loop();
            }
            if TEAM.serving() < core {
                break;
            }
        }
        if P::STARTS_ALL {
            for core in count..have {
                let _ = self.0.start(core, boot::secondary_entry());
            }
        }
        &TEAM
    }

    fn stack_use(&self) -> Option<(usize, usize)> {
        let uses = (1..=TEAM.serving()).map(|core| {
            // SAFETY: `start` has painted it.
            let stack = unsafe { Stack::painted(boot::core_stack(core)) };
            (stack.high_water(), stack.len())
        });
        uses.max()
    }
}
