//! A critical section for one hart or several: interrupts are masked and a lock names its owner, so that sections nest.

use core::arch::asm;
use core::sync::atomic::{AtomicUsize, Ordering};

use critical_section::RawRestoreState;

use super::boot;

/// The owner's number plus one; 0 when nobody is inside.
static OWNER: AtomicUsize = AtomicUsize::new(0);
/// Set in the state that `release` gets if interrupts were on.
const INTERRUPTS: u8 = 1 << 0;
/// Set if the section was entered from inside another one.
const NESTED: u8 = 1 << 1;
/// The status register's interrupt enable: MIE or SIE.
const ENABLE: usize = if cfg!(feature = "s-mode") { 1 << 1 } else { 1 << 3 };

struct MaskAndLock;
critical_section::set_impl!(MaskAndLock);

// SAFETY: between the outermost acquire and release no interrupt comes on this hart and no other hart owns the lock.
unsafe impl critical_section::Impl for MaskAndLock {
    unsafe fn acquire() -> RawRestoreState {
        let status: usize;
        // SAFETY: masks interrupts; `release` restores them.
        unsafe {
            asm!(super::csr!("csrrc  {status}, ", "status, {enable}"), status = out(reg) status, enable = in(reg) ENABLE)
        };
        let interrupts = if status & ENABLE != 0 { INTERRUPTS } else { 0 };
        let me = boot::this_core() + 1;
        if OWNER.load(Ordering::Relaxed) == me {
            return interrupts | NESTED;
        }
        while OWNER.compare_exchange_weak(0, me, Ordering::Acquire, Ordering::Relaxed).is_err() {
            core::hint::spin_loop();
        }
        interrupts
    }

    unsafe fn release(state: RawRestoreState) {
        if state & NESTED == 0 {
            OWNER.store(0, Ordering::Release);
        }
        if state & INTERRUPTS != 0 {
            // SAFETY: they were on before `acquire`.
            unsafe { asm!(super::csr!("csrs   ", "status, {enable}"), enable = in(reg) ENABLE) };
        }
    }
}
