//! Flash that the processor sees as memory.

/// The bytes of a flash that is mapped at `base`.
///
/// A store over them is [`forebay_storage::MappedStore`]: the model is computed from where it lies.
///
/// # Safety
/// `base..base + len` is readable memory for the rest of the program, nothing else in the program refers to it, and
/// nothing programs or erases the flash.
pub unsafe fn mapped(base: usize, len: usize) -> &'static [u8] {
    // SAFETY: the caller's promise.
    unsafe { core::slice::from_raw_parts(core::ptr::with_exposed_provenance(base), len) }
}
