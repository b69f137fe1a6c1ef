//! The image container: superblocks, sections and extents.
//!
//! `docs/format.md` is the specification; this module reads and writes it. Everything read from an image is a
//! claim: [`Superblock::parse`] and [`ExtentTable::parse`] check every offset, length, count and reserved byte
//! before anything is handed out, and no input makes them panic.

mod checksum;
mod error;
mod extent;
mod superblock;

pub use checksum::{Crc32c, crc32c};
pub use error::{ImageError, Violation};
pub use extent::{ChecksumError, ExtentKind, ExtentRecord, ExtentTable};
pub use superblock::{Section, SectionKind, Superblock};

/// First bytes of every superblock.
pub const MAGIC: [u8; 8] = *b"FOREBAY\0";
/// A reader refuses any other major version.
pub const VERSION_MAJOR: u16 = 1;
/// A reader accepts a higher minor version.
pub const VERSION_MINOR: u16 = 0;
/// Bytes of a superblock slot: slot A starts at 0, slot B here.
pub const SUPERBLOCK_SLOT: u64 = 4096;
/// Most sections in one image.
pub const MAX_SECTIONS: usize = 32;
/// Most levels in one extent.
pub const MAX_LEVELS: usize = 4;
/// Smallest page, in bytes.
pub const MIN_PAGE: u32 = 512;
/// Largest page, in bytes.
pub const MAX_PAGE: u32 = 1 << 20;

/// First offset after the superblock slots that is a multiple of `page`: where sections and extents may begin.
#[must_use]
pub const fn data_start(page: u32) -> u64 {
    let slots = 2 * SUPERBLOCK_SLOT;
    if page as u64 > slots { page as u64 } else { slots }
}

/// `len` rounded up to a multiple of the power of two `page`; `None` if that does not fit 64 bits.
#[must_use]
pub const fn round_up(len: u64, page: u32) -> Option<u64> {
    len.checked_next_multiple_of(page as u64)
}
