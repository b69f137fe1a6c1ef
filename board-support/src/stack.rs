//! How much of the stack was used: free stack is painted at the start and looked at in the end.

use core::ops::Range;

/// What unused stack holds.
const PAINT: u64 = 0x5aa5_f00d_c0de_57ac;
/// Bytes beneath the caller's frame that are left alone: the frame of the painter itself.
const MARGIN: usize = 512;

/// A stack's memory, lowest address first.
#[derive(Clone, Debug)]
pub struct Stack(Range<usize>);

impl Stack {
    /// Paints what is free of the stack at `range`, on which the caller runs.
    ///
    /// # Safety
    /// `range` is the writable memory of the present stack, aligned to 8 bytes, and used by nothing else.
    #[inline(never)]
    pub unsafe fn paint(range: Range<usize>) -> Self {
        let here = 0u64;
        let free = (&raw const here).addr().saturating_sub(MARGIN).clamp(range.start, range.end);
        for address in (range.start..free & !7).step_by(8) {
            // SAFETY: inside of the stack (the caller's promise), beneath every frame in use.
            unsafe { core::ptr::with_exposed_provenance_mut::<u64>(address).write_volatile(PAINT) };
        }
        Self(range)
    }

    /// Paints all of the stack at `range`, which nobody runs on yet.
    ///
    /// # Safety
    /// `range` is writable memory, aligned to 8 bytes, and used by nothing else.
    pub unsafe fn paint_all(range: Range<usize>) -> Self {
        for address in range.clone().step_by(8) {
            // SAFETY: the caller's promise.
            unsafe { core::ptr::with_exposed_provenance_mut::<u64>(address).write_volatile(PAINT) };
        }
        Self(range)
    }

    /// The stack at `range`, painted before.
    ///
    /// # Safety
    /// As for `paint_all`, except that a core may run on it.
    pub unsafe fn painted(range: Range<usize>) -> Self {
        Self(range)
    }

    /// Bytes of the stack.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether the stack has no bytes at all.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Most bytes that were ever in use.
    pub fn high_water(&self) -> usize {
        let untouched = self.0.clone().step_by(8).take_while(|address| {
            // SAFETY: inside of the stack's memory, by `paint`'s contract; a volatile read of whatever is there.
            unsafe { core::ptr::with_exposed_provenance::<u64>(*address).read_volatile() == PAINT }
        });
        self.len() - untouched.count() * 8
    }
}
