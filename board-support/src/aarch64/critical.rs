//! A critical section for one core or several: interrupts are masked and a lock names its owner, so that sections nest.

use core::sync::atomic::{AtomicU64, Ordering};

use aarch64_cpu::registers::{DAIF, MPIDR_EL1, Readable, Writeable};
use critical_section::RawRestoreState;

/// The owner's affinity plus one; 0 when nobody is inside.
static OWNER: AtomicU64 = AtomicU64::new(0);
/// Set in the state that `release` gets if the section was entered from inside another one.
const NESTED: u8 = 1 << 7;

struct MaskAndLock;
critical_section::set_impl!(MaskAndLock);

// SAFETY: between the outermost acquire and release no interrupt comes on this core and no other core owns the lock.
unsafe impl critical_section::Impl for MaskAndLock {
    unsafe fn acquire() -> RawRestoreState {
        // D, A, I and F are bits 9 to 6.
        let masks = (DAIF.get() >> 6 & 0xf) as u8;
        DAIF.write(DAIF::D::Masked + DAIF::A::Masked + DAIF::I::Masked + DAIF::F::Masked);
        let me = (MPIDR_EL1.get() & 0xff_00ff_ffff) + 1;
        if OWNER.load(Ordering::Relaxed) == me {
            return masks | NESTED;
        }
        while OWNER.compare_exchange_weak(0, me, Ordering::Acquire, Ordering::Relaxed).is_err() {
            core::hint::spin_loop();
        }
        masks
    }

    unsafe fn release(state: RawRestoreState) {
        if state & NESTED == 0 {
            OWNER.store(0, Ordering::Release);
        }
        DAIF.set(u64::from(state & 0xf) << 6);
    }
}
