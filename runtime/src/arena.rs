//! The one piece of memory that everything lives in.

use core::cell::Cell;
use core::mem::MaybeUninit;

use bump_into::BumpInto;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Alignment of an arena's two ends and of every buffer that a device fills, in bytes.
pub const PAGE: usize = 4096;
/// Alignment and granularity of every other piece, in bytes: a cache line.
pub const LINE: usize = 64;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone, Copy)]
#[repr(C, align(4096))]
struct Page([u8; PAGE]);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; LINE]);

/// The arena has too few bytes left for a piece.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the arena has {left} bytes left where {need} are needed")]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct OutOfArena {
    /// Bytes asked for.
    pub need: usize,
    /// Bytes that are left.
    pub left: usize,
}

/// Memory that is handed out piece by piece and never taken back.
///
/// Pieces are zeroed when they are handed out, so a page fault or a bad bank shows then and not during decoding.
/// Taking all [`PAGE`] pieces before the others keeps the sum exact: no byte is lost to alignment.
pub struct Arena<'a> {
    /// Zeros that [`Self::pages`] takes first, as they are.
    zeros: Cell<&'a mut [u8]>,
    bump: BumpInto<'a>,
    len: usize,
}

impl<'a> Arena<'a> {
    /// Takes the whole pages of `memory`; what lies before the first and after the last is not used.
    pub fn new(memory: &'a mut [MaybeUninit<u8>]) -> Self {
        let start = memory.as_ptr().align_offset(PAGE).min(memory.len());
        let len = (memory.len() - start) / PAGE * PAGE;
        Self { zeros: Cell::default(), bump: BumpInto::from_slice(&mut memory[start..start + len]), len }
    }

    /// An arena of which `zeros` is one part, for pieces that devices fill, and `memory` the other. Where a system gives
    /// a zeroed page when it is first written to, such pieces cost nothing until something is read into them, and then
    /// it is the read that waits for the page, while others are under way: a large pool does not delay the first token.
    ///
    /// Of `zeros` whole pages are used too.
    pub fn with_zeros(zeros: &'a mut [u8], memory: &'a mut [MaybeUninit<u8>]) -> Self {
        let start = zeros.as_ptr().align_offset(PAGE).min(zeros.len());
        let len = (zeros.len() - start) / PAGE * PAGE;
        let rest = Self::new(memory);
        Self { zeros: Cell::new(&mut zeros[start..start + len]), len: len + rest.len, ..rest }
    }

    /// Bytes of the whole arena, a multiple of [`PAGE`].
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the arena holds no page at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes not yet handed out.
    pub fn left(&self) -> usize {
        let zeros = self.zeros.take();
        let len = zeros.len();
        self.zeros.set(zeros);
        len + self.bump.available_bytes()
    }

    fn out_of(&self, need: usize) -> OutOfArena {
        OutOfArena { need, left: self.left() }
    }

    /// `bytes` (rounded up to [`PAGE`]), aligned to [`PAGE`].
    pub fn pages(&self, bytes: usize) -> Result<&'a mut [u8], OutOfArena> {
        let count = bytes.div_ceil(PAGE);
        let zeros = self.zeros.take();
        if count <= zeros.len() / PAGE {
            let (pages, rest) = zeros.split_at_mut(count * PAGE);
            self.zeros.set(rest);
            return Ok(pages);
        }
        self.zeros.set(zeros);
        let pages = self.bump.alloc_n_with(count, core::iter::repeat_with(Page::new_zeroed));
        pages.map(IntoBytes::as_mut_bytes).map_err(|_| self.out_of(bytes))
    }

    /// `bytes` (rounded up to [`LINE`]), aligned to [`LINE`].
    pub fn lines(&self, bytes: usize) -> Result<&'a mut [u8], OutOfArena> {
        let count = bytes.div_ceil(LINE);
        let lines = self.bump.alloc_n_with(count, core::iter::repeat_with(Line::new_zeroed));
        lines.map(IntoBytes::as_mut_bytes).map_err(|_| self.out_of(bytes))
    }

    /// `count` zeros, aligned to [`LINE`].
    pub fn f32s(&self, count: usize) -> Result<&'a mut [f32], OutOfArena> {
        let lines = self.lines(count * size_of::<f32>())?;
        let left = self.left();
        let floats = <[f32]>::mut_from_bytes(lines).map_err(|_| OutOfArena { need: count, left })?;
        Ok(&mut floats[..count])
    }

    /// A table of `count` values made by `f`; takes [`table_bytes`].
    pub fn table<T>(&self, count: usize, f: impl FnMut() -> T) -> Result<&'a mut [T], OutOfArena> {
        let bytes = count * size_of::<T>();
        let pad = bytes.next_multiple_of(LINE) - bytes;
        let taken = self.bump.alloc_n_with(pad, core::iter::repeat(0u8)).is_ok();
        let table = if taken { self.bump.alloc_n_with(count, core::iter::repeat_with(f)).ok() } else { None };
        table.ok_or(self.out_of(bytes + pad))
    }
}

/// Bytes that [`Arena::table`] takes for `count` values of `T`.
pub const fn table_bytes<T>(count: usize) -> u64 {
    (count * size_of::<T>()).next_multiple_of(LINE) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_come_from_the_zeros_first() {
        let (mut zeros, mut memory) = ([0u8; 5 * PAGE], [MaybeUninit::new(7u8); 4 * PAGE]);
        let arena = Arena::with_zeros(&mut zeros, &mut memory);
        // Wherever the two begin, whole pages are left.
        let (len, whole) = (arena.len(), 7 * PAGE..=9 * PAGE);
        assert!(whole.contains(&len) && len.is_multiple_of(PAGE) && arena.left() == len);
        let mut taken = 0;
        while let Ok(page) = arena.pages(PAGE - 1) {
            assert!(page.len() == PAGE && page.as_ptr().align_offset(PAGE) == 0 && page.iter().all(|b| *b == 0));
            taken += PAGE;
            assert_eq!(arena.left(), len - taken);
        }
        assert_eq!(taken, len);
        assert_eq!(arena.pages(1), Err(OutOfArena { need: 1, left: 0 }));
    }
}
