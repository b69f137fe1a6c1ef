//! The one piece of memory that everything lives in.

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
    bump: BumpInto<'a>,
    len: usize,
}

impl<'a> Arena<'a> {
    /// Takes the whole pages of `memory`; what lies before the first and after the last is not used.
    pub fn new(memory: &'a mut [MaybeUninit<u8>]) -> Self {
        let start = memory.as_ptr().align_offset(PAGE).min(memory.len());
        let len = (memory.len() - start) / PAGE * PAGE;
        Self { bump: BumpInto::from_slice(&mut memory[start..start + len]), len }
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
        self.bump.available_bytes()
    }

    fn out_of(&self, need: usize) -> OutOfArena {
        OutOfArena { need, left: self.left() }
    }

    /// `bytes` (rounded up to [`PAGE`]), aligned to [`PAGE`].
    pub fn pages(&self, bytes: usize) -> Result<&'a mut [u8], OutOfArena> {
        let count = bytes.div_ceil(PAGE);
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
