//! Data caches, for devices that do not look into them.

use core::arch::asm;
use core::ptr::NonNull;

/// Writes `bytes` back to memory, where every observer sees them, and forgets them, so that they are read anew.
pub fn flush(bytes: NonNull<[u8]>) {
    let types: usize;
    // SAFETY: reads the caches' identification.
    unsafe { asm!("mrs {}, ctr_el0", out(reg) types, options(pure, nomem, nostack, preserves_flags)) };
    // DminLine: words of the shortest line, as a power of two.
    let line = 4 << (types >> 16 & 0xf);
    let start = bytes.cast::<u8>().as_ptr().expose_provenance();
    let mut address = start & !(line - 1);
    // SAFETY: cleaning loses nothing, so it is right for every line, also for those that the range shares; the
    // barriers order it with accesses before and after. The compiler must not keep memory in registers across it.
    unsafe {
        asm!("dsb sy", options(nostack, preserves_flags));
        while address < start + bytes.len() {
            asm!("dc civac, {}", in(reg) address, options(nostack, preserves_flags));
            address += line;
        }
        asm!("dsb sy", options(nostack, preserves_flags));
    }
}
