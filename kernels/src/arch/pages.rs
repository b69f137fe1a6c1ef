//! Large pages for memory that is streamed through.

use core::mem::MaybeUninit;

/// Asks the system to back `memory` with large pages where it can: weights that stream from memory otherwise wait for
/// a page walk every 4 KiB. The contents stay. To be called before the memory is first written; a refusal is no harm.
pub fn prefer_huge(memory: &mut [MaybeUninit<u8>]) {
    #[cfg(target_os = "linux")]
    {
        use rustix::mm::{Advice, madvise};
        /// Smallest page of any Linux; larger ones divide the range less well, and the system then refuses it.
        const PAGE: usize = 4096;
        let start = memory.as_ptr().align_offset(PAGE).min(memory.len());
        let len = (memory.len() - start) / PAGE * PAGE;
        if len > 0 {
            // SAFETY: the range lies inside `memory`, and this advice changes the contents of no page.
            let _ = unsafe { madvise(memory[start..].as_mut_ptr().cast(), len, Advice::LinuxHugepage) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = memory;
}
