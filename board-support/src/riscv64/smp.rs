//! Further harts: how they are started, and what they do.
//!
//! A hart that computes serves the [`Team`]; between jobs it waits for a software interrupt, which is pending but never
//! taken. In machine mode harts wake each other through the CLINT, in supervisor mode the firmware does it.

use core::arch::asm;

use forebay_kernels::exec::Workers;

use super::{boot, vector};
use crate::app::Clock;
use crate::cores::{Cores, Further, Power, Team};

static TEAM: Team = Team::new(wait, power::wake);

/// Waits until a software interrupt is pending, and withdraws it. Whoever sends one has published the job before, and
/// the job is looked for after this.
fn wait() {
    riscv::asm::wfi();
    power::withdraw();
    // SAFETY: a barrier: the withdrawal, which may be a write to a device, comes before what is read next.
    unsafe { asm!("fence iorw, iorw", options(nostack, preserves_flags)) };
}

/// A further core, with its stack.
#[unsafe(no_mangle)]
extern "C" fn forebay_secondary(core: usize) -> ! {
    power::listen();
    if TEAM.wants(core) && vector::join() {
        TEAM.serve();
    }
    loop {
        riscv::asm::wfi();
    }
}

/// Machine mode: the harts behind the one that boots, called from where they came out of reset.
#[cfg(not(feature = "s-mode"))]
mod power {
    use super::{TEAM, asm, boot};
    use crate::cores::Power;

    /// The CLINT's software interrupts: a word for each hart.
    const MSIP: usize = 0x0200_0000;

    fn interrupt(hart: usize, pending: bool) {
        let word = core::ptr::with_exposed_provenance_mut::<u32>(MSIP + 4 * hart);
        // SAFETY: every board that has harts to call in machine mode has its CLINT there; interrupts are never taken.
        // The barrier has what was stored seen before the interrupt.
        unsafe {
            asm!("fence rw, o", options(nostack, preserves_flags));
            word.write_volatile(pending.into());
        }
    }

    fn this_hart() -> usize {
        riscv::register::mhartid::read()
    }

    pub(super) fn listen() {
        // SAFETY: the interrupt is enabled in `mie` but not in `mstatus`: it ends `wfi` and is not taken.
        unsafe { riscv::register::mie::set_msoft() };
    }

    pub(super) fn withdraw() {
        interrupt(this_hart(), false);
    }

    pub(super) fn wake() {
        // Only the core that booted wakes others: jobs within jobs are not shared.
        let first = this_hart() - boot::this_core();
        (1..=TEAM.serving()).for_each(|core| interrupt(first + core, true));
    }

    /// The harts that follow the one that boots. One that is not there does not come when it is called.
    #[derive(Clone, Copy, Debug)]
    pub struct Clint;

    impl Power for Clint {
        const STARTS_ALL: bool = false;

        fn start(&self, core: usize) -> bool {
            let hart = this_hart() + core;
            boot::call(hart, core);
            interrupt(hart, true);
            true
        }
    }
}

/// Supervisor mode: the firmware starts harts (SBI's extension HSM) and wakes them (IPI).
#[cfg(feature = "s-mode")]
mod power {
    use core::sync::atomic::{AtomicUsize, Ordering};

    use heapless::Vec;
    use sbi_rt::HartMask;

    use super::{boot, vector};
    use crate::cores::Power;

    /// The harts that were started, a bit each.
    static STARTED: AtomicUsize = AtomicUsize::new(0);

    pub(super) fn listen() {
        // SAFETY: the interrupt is enabled in `sie` but not in `sstatus`: it ends `wfi` and is not taken.
        unsafe { riscv::register::sie::set_ssoft() };
    }

    pub(super) fn withdraw() {
        // SAFETY: the only source of this interrupt is `wake`.
        unsafe { riscv::register::sip::clear_ssoft() };
    }

    pub(super) fn wake() {
        // A hart that cannot be woken takes no part, which holds nobody up.
        let _ = sbi_rt::send_ipi(HartMask::from_mask_base(STARTED.load(Ordering::Relaxed), 0));
    }

    /// The harts of a device tree.
    #[derive(Clone, Debug)]
    pub struct Hsm(Vec<usize, 8>);

    impl Hsm {
        /// All harts but `boot`, the one that booted.
        pub fn of(tree: Option<&fdt::Fdt<'_>>, boot: usize) -> Self {
            let harts = tree.into_iter().flat_map(vector::harts).map(|cpu| cpu.ids().first());
            Self(harts.filter(|hart| *hart != boot && *hart < usize::BITS as usize).take(8).collect())
        }
    }

    impl Power for Hsm {
        const STARTS_ALL: bool = false;

        fn start(&self, core: usize) -> bool {
            let Some(&hart) = self.0.get(core - 1) else { return false };
            if sbi_rt::hart_start(hart, boot::secondary_entry(), core).is_err() {
                return false;
            }
            STARTED.fetch_or(1 << hart, Ordering::Relaxed);
            true
        }
    }
}

#[cfg(not(feature = "s-mode"))]
pub use power::Clint;
#[cfg(feature = "s-mode")]
pub use power::Hsm;

/// The harts of a machine: what there is of [`boot`]'s stacks, started by `P`.
#[derive(Clone, Debug)]
pub struct ManyHarts<P> {
    /// What starts them.
    pub power: P,
    /// The clock.
    pub clock: Clock,
}

impl<P: Power> Cores for ManyHarts<P> {
    /// To be called once.
    fn start(&self, count: usize) -> &'static dyn Workers {
        // SAFETY: the linker script keeps memory for as many stacks.
        unsafe { TEAM.start(&self.power, count, boot::cores(), boot::core_stack, &self.clock) };
        &TEAM
    }

    fn further(&self) -> Option<Further> {
        TEAM.further(boot::core_stack)
    }
}
