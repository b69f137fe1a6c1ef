//! Page tables: an identity map of the first 4 GiB in blocks of 2 MiB, made at compile time.

use core::ops::Range;

/// Bytes of a block.
pub const BLOCK: u64 = 2 << 20;
/// Bytes that one [`Level2`] maps.
pub const GIGABYTE: u64 = 1 << 30;

/// Valid block, accessed, inner shareable.
const VALID: u64 = 1 | 3 << 8 | 1 << 10;
const DEVICE: u64 = 1 << 2;
const READ_ONLY: u64 = 1 << 7;
/// Neither privilege may execute.
const NO_EXECUTE: u64 = 1 << 53 | 1 << 54;
/// EL0 may not execute; there is none.
const NO_EXECUTE_EL0: u64 = 1 << 54;

/// What a range of addresses is. Ranges that are not named fault.
#[derive(Clone, Debug)]
pub struct Region {
    range: Range<u64>,
    attributes: u64,
}

impl Region {
    /// Cacheable memory for code and data.
    pub const fn memory(range: Range<u64>) -> Self {
        Self { range, attributes: VALID | NO_EXECUTE_EL0 }
    }
    /// Cacheable memory that is only read: memory-mapped flash.
    pub const fn flash(range: Range<u64>) -> Self {
        Self { range, attributes: VALID | READ_ONLY | NO_EXECUTE }
    }
    /// Registers of devices (nGnRE).
    pub const fn device(range: Range<u64>) -> Self {
        Self { range, attributes: VALID | DEVICE | NO_EXECUTE }
    }
}

/// The blocks of one gigabyte.
#[repr(C, align(4096))]
#[derive(Debug)]
pub struct Level2([u64; 512]);

impl Level2 {
    /// Maps `regions` within the gigabyte from `base` on. Fails to compile if one is not made of whole blocks in it.
    pub const fn new(base: u64, regions: &[Region]) -> Self {
        let mut entries = [0; 512];
        let mut r = 0;
        while r < regions.len() {
            let Range { start, end } = regions[r].range;
            assert!(base.is_multiple_of(GIGABYTE) && start >= base && end <= base + GIGABYTE);
            assert!(start.is_multiple_of(BLOCK) && end.is_multiple_of(BLOCK));
            let mut address = start;
            while address < end {
                entries[((address - base) / BLOCK) as usize] = address | regions[r].attributes;
                address += BLOCK;
            }
            r += 1;
        }
        Self(entries)
    }
}

/// An entry of the first level: nothing, or a table's address with its two low bits set. A pointer, because only the
/// linker knows the address.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
struct Entry(*const u8);

/// The first level: four gigabytes.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Level1([Entry; 4]);

// SAFETY: the entries are addresses for the MMU; nobody follows them as pointers, and they never change.
unsafe impl Sync for Level1 {}

impl Level1 {
    /// A map of the gigabytes that have a table.
    pub const fn new(tables: [Option<&'static Level2>; 4]) -> Self {
        let mut entries = [Entry(core::ptr::null()); 4];
        let mut i = 0;
        while i < 4 {
            if let Some(table) = tables[i] {
                entries[i] = Entry((&raw const *table).cast::<u8>().wrapping_add(3));
            }
            i += 1;
        }
        Self(entries)
    }
}
