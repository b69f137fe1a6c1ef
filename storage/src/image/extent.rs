//! Extents: page-aligned runs of bytes, in levels, that are read in one piece.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::superblock::newer;
use super::{ImageError, MAX_LEVELS, Superblock, Violation, crc32c, data_start};

/// What an extent is to the cache.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum ExtentKind {
    /// 1: a chunk that is read once and stays.
    Resident,
    /// 2: a unit (an expert, a neuron cluster) that comes and goes.
    Unit,
}

impl ExtentKind {
    /// The code that is stored.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Resident => 1,
            Self::Unit => 2,
        }
    }
}

/// The bytes of a level do not have their checksum, or are not all there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[error("level {level} of the extent: the bytes do not have their checksum")]
pub struct ChecksumError {
    /// The first bad level.
    pub level: usize,
}

/// An extent as stored: where it is, and the length and CRC-32C of each of its levels.
///
/// Level `i` follows level `i - 1` directly, so the first `n` levels are one contiguous read.
/// Records from [`ExtentTable`] have been validated.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct ExtentRecord {
    offset: U64,
    len: [U32; MAX_LEVELS],
    crc: [U32; MAX_LEVELS],
    kind: u8,
    levels: u8,
    flags: U16,
    reserved: [u8; 20],
}

const RECORD: usize = size_of::<ExtentRecord>();
const _: () = assert!(RECORD == 64);

impl ExtentRecord {
    /// A record of `levels`, each its length in bytes and CRC-32C, in the order they are stored from `offset`.
    ///
    /// Nothing is checked here: [`ExtentTable::parse`] refuses no levels, more than [`MAX_LEVELS`], and
    /// lengths that are zero or not a multiple of the page.
    #[must_use]
    pub fn new(kind: ExtentKind, offset: u64, levels: &[(u32, u32)]) -> Self {
        let mut record = Self {
            offset: offset.into(),
            len: [0.into(); MAX_LEVELS],
            crc: [0.into(); MAX_LEVELS],
            kind: kind.code(),
            levels: u8::try_from(levels.len()).unwrap_or(u8::MAX),
            flags: 0.into(),
            reserved: [0; 20],
        };
        for (i, &(len, crc)) in levels.iter().take(MAX_LEVELS).enumerate() {
            record.len[i] = len.into();
            record.crc[i] = crc.into();
        }
        record
    }

    /// Offset of the first byte in the image; a multiple of the page.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset.get()
    }

    /// Number of levels, 1 to [`MAX_LEVELS`].
    #[must_use]
    pub fn levels(&self) -> usize {
        usize::from(self.levels).min(MAX_LEVELS)
    }

    /// Bytes of level `level`; 0 if there is no such level.
    #[must_use]
    pub fn level_len(&self, level: usize) -> u32 {
        self.lens().nth(level).unwrap_or(0)
    }

    /// Bytes of the first `levels` levels (of all of them, if there are fewer).
    #[must_use]
    pub fn prefix_len(&self, levels: usize) -> u64 {
        self.lens().take(levels).map(u64::from).sum()
    }

    /// Bytes of all levels.
    #[must_use]
    pub fn total_len(&self) -> u64 {
        self.prefix_len(MAX_LEVELS)
    }

    /// What the extent is to the cache.
    #[must_use]
    pub fn kind(&self) -> ExtentKind {
        if self.kind == ExtentKind::Resident.code() { ExtentKind::Resident } else { ExtentKind::Unit }
    }

    /// Checks `bytes`, consecutive whole levels from `first_level` on. Returns how many levels that was.
    ///
    /// # Errors
    /// [`ChecksumError`] with the first level that has not its checksum, or of which `bytes` has only a part.
    pub fn verify(&self, first_level: usize, bytes: &[u8]) -> Result<usize, ChecksumError> {
        let mut rest = bytes;
        let mut verified = 0;
        while !rest.is_empty() {
            let level = first_level.saturating_add(verified);
            let bad = ChecksumError { level };
            if level >= self.levels() {
                return Err(bad);
            }
            let (head, tail) = rest.split_at_checked(self.len[level].get() as usize).ok_or(bad)?;
            if head.is_empty() || crc32c(head) != self.crc[level].get() {
                return Err(bad);
            }
            rest = tail;
            verified += 1;
        }
        Ok(verified)
    }

    fn lens(&self) -> impl Iterator<Item = u32> + '_ {
        self.len.iter().take(self.levels()).map(|len| len.get())
    }

    /// Checks everything about the record that does not take its neighbours. Returns the end of the extent.
    fn validate(&self, index: usize, superblock: &Superblock) -> Result<u64, ImageError> {
        let wrong = |field, value, violation| Err(ImageError::Extent { index, field, value, violation });
        let page = superblock.page();
        if self.kind == 0 {
            return wrong("kind", 0, Violation::Below { min: 1 });
        }
        if self.kind > ExtentKind::Unit.code() {
            let max = ExtentKind::Unit.code().into();
            return wrong("kind", self.kind.into(), Violation::Above { max });
        }
        if self.levels == 0 {
            return wrong("levels", 0, Violation::Below { min: 1 });
        }
        if usize::from(self.levels) > MAX_LEVELS {
            let max = MAX_LEVELS as u64;
            return wrong("levels", self.levels.into(), Violation::Above { max });
        }
        if self.flags.get() != 0 {
            let expected = 0;
            return wrong("flags", self.flags.get().into(), Violation::Not { expected });
        }
        let lens = self.len.map(U32::get);
        let crcs = self.crc.map(U32::get);
        let (used, unused) = lens.split_at(self.levels());
        for &len in used {
            if len == 0 {
                return wrong("len", 0, Violation::Below { min: 1 });
            }
            if !len.is_multiple_of(page) {
                return wrong("len", len.into(), Violation::Misaligned { page });
            }
        }
        let expected = 0;
        for &value in unused.iter().chain(&crcs[self.levels()..]) {
            if value != 0 {
                return wrong("unused level", value.into(), Violation::Not { expected });
            }
        }
        if !newer(superblock.minor())
            && let Some(&byte) = self.reserved.iter().find(|&&byte| byte != 0)
        {
            return wrong("reserved", byte.into(), Violation::Not { expected });
        }

        let offset = self.offset();
        if !offset.is_multiple_of(page.into()) {
            return wrong("offset", offset, Violation::Misaligned { page });
        }
        let min = data_start(page);
        if offset < min {
            return wrong("offset", offset, Violation::Below { min });
        }
        let len = self.total_len();
        let limit = superblock.image_len();
        let end = match offset.checked_add(len) {
            Some(end) if end <= limit => end,
            _ => return wrong("offset", offset, Violation::PastEnd { len, end: limit }),
        };
        if let Some((index, kind)) = superblock.overlapped(offset, end) {
            let violation = Violation::OverlapsSection { index, kind };
            return wrong("offset", offset, violation);
        }
        Ok(end)
    }
}

/// The extents of an image, as stored and validated.
#[derive(Clone, Copy, Debug)]
pub struct ExtentTable<'a> {
    records: &'a [ExtentRecord],
}

impl<'a> ExtentTable<'a> {
    /// Validates `bytes`, the extents section without its padding: every extent is aligned, inside the image,
    /// after the one before, and apart from superblocks and sections. The section's own checksum is
    /// [`Section::verify`](super::Section::verify)'s.
    ///
    /// # Errors
    /// [`ImageError::Extent`] with the first bad record, [`ImageError::PartialRecord`].
    pub fn parse(bytes: &'a [u8], superblock: &Superblock) -> Result<Self, ImageError> {
        let records = <[ExtentRecord]>::ref_from_bytes(bytes)
            .map_err(|_| ImageError::PartialRecord { len: bytes.len() as u64, record: RECORD as u64 })?;
        let mut min = data_start(superblock.page());
        for (index, record) in records.iter().enumerate() {
            let end = record.validate(index, superblock)?;
            if record.offset() < min {
                return Err(ImageError::Extent {
                    index,
                    field: "offset",
                    value: record.offset(),
                    violation: Violation::Below { min },
                });
            }
            min = end;
        }
        Ok(Self { records })
    }

    /// Number of extents.
    #[must_use]
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Extent `index`.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<&'a ExtentRecord> {
        self.records.get(index)
    }

    /// All extents, by increasing offset.
    #[must_use]
    pub fn records(&self) -> &'a [ExtentRecord] {
        self.records
    }
}
