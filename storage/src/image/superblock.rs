//! Superblocks: the image's root, in two slots, and the table of sections in it.

use core::fmt;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{
    Crc32c, ImageError, MAGIC, MAX_PAGE, MAX_SECTIONS, MIN_PAGE, SUPERBLOCK_SLOT, VERSION_MAJOR, VERSION_MINOR,
    Violation, crc32c, data_start, round_up,
};

/// Section flag: a reader that does not know the kind must refuse the image.
const MUST_UNDERSTAND: u32 = 1;

/// Fixed part of a superblock as stored.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    major: U16,
    minor: U16,
    /// CRC-32C of the first `size` bytes, this field taken as zero.
    crc: U32,
    generation: U64,
    image_len: U64,
    id: [u8; 16],
    page: U32,
    /// Bytes of this header, the section records, and whatever a later minor version appends.
    size: U32,
    sections: U16,
    reserved: [u8; 6],
}

/// A section record as stored.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct Record {
    kind: U32,
    flags: U32,
    offset: U64,
    len: U64,
    crc: U32,
    reserved: U32,
}

const HEADER: usize = size_of::<Header>();
const RECORD: usize = size_of::<Record>();
const CRC_FIELD: core::ops::Range<usize> = 12..16;
const _: () = assert!(HEADER == 64 && RECORD == 32);
const _: () = assert!(HEADER + MAX_SECTIONS * RECORD <= SUPERBLOCK_SLOT as usize);

/// What a section holds. Storage gives the bytes no meaning, except those of [`SectionKind::Extents`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum SectionKind {
    /// 1: the model's description.
    Model,
    /// 2: the table of tensors.
    Tensors,
    /// 3: the table of extents.
    Extents,
    /// 4: the tokenizer's tables.
    Tokenizer,
    /// 5: the chat template.
    ChatTemplate,
    /// 6: free metadata.
    Metadata,
    /// 7: the planner's choices.
    Plan,
    /// 8: authentication tags, one per extent.
    Auth,
    /// 9: the signed manifest.
    Manifest,
    /// 10: the chat template as plain texts.
    ChatTurns,
    /// A kind of a later version that may be skipped.
    Other(u32),
}

impl SectionKind {
    /// The kind with this code; [`SectionKind::Other`] if there is none.
    #[must_use]
    pub const fn from_code(code: u32) -> Self {
        match code {
            1 => Self::Model,
            2 => Self::Tensors,
            3 => Self::Extents,
            4 => Self::Tokenizer,
            5 => Self::ChatTemplate,
            6 => Self::Metadata,
            7 => Self::Plan,
            8 => Self::Auth,
            9 => Self::Manifest,
            10 => Self::ChatTurns,
            other => Self::Other(other),
        }
    }

    /// The code that is stored.
    #[must_use]
    pub const fn code(self) -> u32 {
        match self {
            Self::Model => 1,
            Self::Tensors => 2,
            Self::Extents => 3,
            Self::Tokenizer => 4,
            Self::ChatTemplate => 5,
            Self::Metadata => 6,
            Self::Plan => 7,
            Self::Auth => 8,
            Self::Manifest => 9,
            Self::ChatTurns => 10,
            Self::Other(code) => code,
        }
    }

    /// Whether an image is useless to a reader that does not know this kind.
    const fn flags(self) -> u32 {
        match self {
            Self::Model | Self::Tensors | Self::Extents => MUST_UNDERSTAND,
            _ => 0,
        }
    }
}

impl fmt::Display for SectionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::Model => "model",
            Self::Tensors => "tensors",
            Self::Extents => "extents",
            Self::Tokenizer => "tokenizer",
            Self::ChatTemplate => "chat template",
            Self::Metadata => "metadata",
            Self::Plan => "plan",
            Self::Auth => "auth",
            Self::Manifest => "manifest",
            Self::ChatTurns => "chat turns",
            Self::Other(code) => return write!(f, "kind {code}"),
        };
        f.write_str(name)
    }
}

/// A run of bytes in the image with a meaning and a checksum.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Section {
    /// What it holds.
    pub kind: SectionKind,
    /// First byte; a multiple of the page.
    pub offset: u64,
    /// Bytes, without the padding up to the page; at least 1.
    pub len: u64,
    /// CRC-32C of the `len` bytes.
    pub crc: u32,
}

impl Section {
    const NONE: Self = Self { kind: SectionKind::Other(0), offset: 0, len: 0, crc: 0 };

    /// Checks the section's bytes. `bytes` may go on past the section (the padding that was read with it).
    ///
    /// # Errors
    /// [`ImageError::TooShort`] if `bytes` is not the whole section, [`ImageError::SectionChecksum`].
    pub fn verify(&self, bytes: &[u8]) -> Result<(), ImageError> {
        let whole = usize::try_from(self.len).ok().and_then(|len| bytes.get(..len)).ok_or(ImageError::TooShort {
            what: "section",
            len: bytes.len() as u64,
            expected: self.len,
        })?;
        let computed = crc32c(whole);
        if computed == self.crc {
            Ok(())
        } else {
            Err(ImageError::SectionChecksum { kind: self.kind, stored: self.crc, computed })
        }
    }

    /// Bytes the section takes in the image, padding included; the section has been validated.
    fn end(&self, page: u32) -> u64 {
        self.offset.saturating_add(round_up(self.len, page).unwrap_or(u64::MAX))
    }
}

/// The image's root: its size, page, identity, and where its sections are.
///
/// A value of this type has been validated: sections are aligned, inside the image, and disjoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Superblock {
    page: u32,
    minor: u16,
    count: u16,
    generation: u64,
    image_len: u64,
    id: [u8; 16],
    table: [Section; MAX_SECTIONS],
}

impl Superblock {
    /// Starts the superblock of an image of `image_len` bytes.
    ///
    /// # Errors
    /// [`ImageError::Superblock`] if `page` is not a power of two from 512 to 1 MiB, or `image_len` is not a
    /// multiple of it that has room for the superblocks.
    pub fn new(page: u32, generation: u64, id: [u8; 16], image_len: u64) -> Result<Self, ImageError> {
        let wrong = |field, value, violation| ImageError::Superblock { field, value, violation };
        if !page.is_power_of_two() || !(MIN_PAGE..=MAX_PAGE).contains(&page) {
            let (min, max) = (MIN_PAGE, MAX_PAGE);
            return Err(wrong("page", page.into(), Violation::NotAPage { min, max }));
        }
        if !image_len.is_multiple_of(page.into()) {
            return Err(wrong("image_len", image_len, Violation::Misaligned { page }));
        }
        let min = data_start(page);
        if image_len < min {
            return Err(wrong("image_len", image_len, Violation::Below { min }));
        }
        Ok(Self {
            page,
            minor: VERSION_MINOR,
            count: 0,
            generation,
            image_len,
            id,
            table: [Section::NONE; MAX_SECTIONS],
        })
    }

    /// The same image at another generation, for the next manifest.
    #[must_use]
    pub fn with_generation(self, generation: u64) -> Self {
        Self { generation, ..self }
    }

    /// Adds a section.
    ///
    /// # Errors
    /// [`ImageError::Section`], [`ImageError::Duplicate`] or [`ImageError::TooManySections`]; the superblock is
    /// then unchanged.
    pub fn push_section(&mut self, section: Section) -> Result<(), ImageError> {
        let index = usize::from(self.count);
        let wrong =
            |field, value, violation| ImageError::Section { index, kind: section.kind, field, value, violation };
        if index >= MAX_SECTIONS {
            return Err(ImageError::TooManySections);
        }
        if section.kind == SectionKind::Other(0) {
            return Err(wrong("kind", 0, Violation::Below { min: 1 }));
        }
        if section.len == 0 {
            return Err(wrong("len", 0, Violation::Below { min: 1 }));
        }
        let page = self.page;
        if !section.offset.is_multiple_of(page.into()) {
            return Err(wrong("offset", section.offset, Violation::Misaligned { page }));
        }
        let min = data_start(page);
        if section.offset < min {
            return Err(wrong("offset", section.offset, Violation::Below { min }));
        }
        let padded = round_up(section.len, page).unwrap_or(u64::MAX);
        if section.offset.checked_add(padded).is_none_or(|end| end > self.image_len) {
            let (len, end) = (section.len, self.image_len);
            return Err(wrong("offset", section.offset, Violation::PastEnd { len, end }));
        }
        if let Some((index, kind)) = self.overlapped(section.offset, section.offset + padded) {
            return Err(wrong("offset", section.offset, Violation::OverlapsSection { index, kind }));
        }
        let known = !matches!(section.kind, SectionKind::Other(_));
        if let Some(first) = self.sections().position(|s| known && s.kind == section.kind) {
            return Err(ImageError::Duplicate { index, kind: section.kind, first });
        }
        // A code in disguise, `Other(1)`, is stored as what it says.
        self.table[index] = Section { kind: SectionKind::from_code(section.kind.code()), ..section };
        self.count += 1;
        Ok(())
    }

    /// Reads the valid superblock of the higher generation (slot A if they are equal) from `slots`, the first
    /// `2 * SUPERBLOCK_SLOT` bytes of a store of `store_len` bytes. A slot that cannot be read counts as
    /// missing, so that an update cut short leaves the one before.
    ///
    /// # Errors
    /// If neither slot is valid, what is wrong with slot A, or with slot B if A holds no superblock at all.
    pub fn parse(slots: &[u8], store_len: u64) -> Result<Self, ImageError> {
        let (a, b) = slots.split_at_checked(SUPERBLOCK_SLOT as usize).unwrap_or((slots, &[]));
        match (Self::parse_slot(a, store_len), Self::parse_slot(b, store_len)) {
            (Ok(a), Ok(b)) => Ok(if b.generation > a.generation { b } else { a }),
            (Ok(valid), Err(wrong)) => {
                report_fallback("A", "B", &wrong);
                Ok(valid)
            }
            (Err(wrong), Ok(valid)) => {
                report_fallback("B", "A", &wrong);
                Ok(valid)
            }
            (Err(ImageError::NotAnImage { .. }), Err(wrong))
                if !b.is_empty() && !matches!(wrong, ImageError::NotAnImage { .. }) =>
            {
                Err(wrong)
            }
            (Err(wrong), Err(_)) => Err(wrong),
        }
    }

    /// Reads the superblock at the start of `slot`, of a store of `store_len` bytes.
    ///
    /// # Errors
    /// Whatever is wrong first: magic, version, checksum, header, sections.
    pub fn parse_slot(slot: &[u8], store_len: u64) -> Result<Self, ImageError> {
        let slot = &slot[..slot.len().min(SUPERBLOCK_SLOT as usize)];
        let short = |expected: usize| ImageError::TooShort {
            what: "superblock slot",
            len: slot.len() as u64,
            expected: expected as u64,
        };
        let (header, _) = Header::ref_from_prefix(slot).map_err(|_| short(HEADER))?;
        if header.magic != MAGIC {
            return Err(ImageError::NotAnImage { found: header.magic });
        }
        let (major, minor) = (header.major.get(), header.minor.get());
        if major != VERSION_MAJOR {
            return Err(ImageError::Version { major, minor });
        }
        let wrong = |field, value, violation| ImageError::Superblock { field, value, violation };

        let size = header.size.get();
        if u64::from(size) > SUPERBLOCK_SLOT {
            let max = SUPERBLOCK_SLOT;
            return Err(wrong("size", size.into(), Violation::Above { max }));
        }
        let size = size as usize;
        if size < HEADER {
            let min = HEADER as u64;
            return Err(wrong("size", size as u64, Violation::Below { min }));
        }
        let used = slot.get(..size).ok_or(short(size))?;
        let stored = header.crc.get();
        let computed = checksum(used);
        if computed != stored {
            return Err(ImageError::SuperblockChecksum { stored, computed });
        }

        let count = usize::from(header.sections.get());
        if count > MAX_SECTIONS {
            let max = MAX_SECTIONS as u64;
            return Err(wrong("sections", count as u64, Violation::Above { max }));
        }
        let records = used
            .get(HEADER..HEADER + count * RECORD)
            .ok_or(wrong("size", size as u64, Violation::Below { min: (HEADER + count * RECORD) as u64 }))?
            .chunks_exact(RECORD);
        // A later minor version may have given the reserved bytes a meaning that can be ignored.
        let strict = !newer(minor);
        if strict {
            if let Some(&byte) = header.reserved.iter().find(|&&byte| byte != 0) {
                return Err(wrong("reserved", byte.into(), Violation::Not { expected: 0 }));
            }
            let expected = (HEADER + count * RECORD) as u64;
            if size as u64 != expected {
                return Err(wrong("size", size as u64, Violation::Not { expected }));
            }
        }

        let image_len = header.image_len.get();
        let mut superblock = Self::new(header.page.get(), header.generation.get(), header.id, image_len)?;
        superblock.minor = minor;
        if image_len > store_len {
            return Err(ImageError::TooShort { what: "store", len: store_len, expected: image_len });
        }
        for (index, bytes) in records.enumerate() {
            let Ok(record) = Record::ref_from_bytes(bytes) else {
                return Err(short(size));
            };
            superblock.push_record(index, record, strict)?;
        }
        Ok(superblock)
    }

    fn push_record(&mut self, index: usize, record: &Record, strict: bool) -> Result<(), ImageError> {
        let kind = SectionKind::from_code(record.kind.get());
        if matches!(kind, SectionKind::Other(_)) && record.flags.get() & MUST_UNDERSTAND != 0 {
            let code = kind.code();
            return Err(ImageError::MustUnderstand { index, code });
        }
        let unknown = record.flags.get() & !MUST_UNDERSTAND;
        for (field, value) in [("flags", unknown), ("reserved", record.reserved.get())] {
            if strict && value != 0 {
                return Err(ImageError::Section {
                    index,
                    kind,
                    field,
                    value: value.into(),
                    violation: Violation::Not { expected: 0 },
                });
            }
        }
        self.push_section(Section { kind, offset: record.offset.get(), len: record.len.get(), crc: record.crc.get() })
    }

    /// Serialises into a slot, with its checksum; the rest of the slot is zero.
    pub fn write(&self, out: &mut [u8; SUPERBLOCK_SLOT as usize]) {
        out.fill(0);
        let count = usize::from(self.count);
        let size = HEADER + count * RECORD;
        let header = Header {
            magic: MAGIC,
            major: VERSION_MAJOR.into(),
            minor: VERSION_MINOR.into(),
            crc: 0.into(),
            generation: self.generation.into(),
            image_len: self.image_len.into(),
            id: self.id,
            page: self.page.into(),
            size: (size as u32).into(),
            sections: self.count.into(),
            reserved: [0; 6],
        };
        out[..HEADER].copy_from_slice(header.as_bytes());
        for (bytes, section) in out[HEADER..size].chunks_exact_mut(RECORD).zip(self.sections()) {
            let record = Record {
                kind: section.kind.code().into(),
                flags: section.kind.flags().into(),
                offset: section.offset.into(),
                len: section.len.into(),
                crc: section.crc.into(),
                reserved: 0.into(),
            };
            bytes.copy_from_slice(record.as_bytes());
        }
        let crc = checksum(&out[..size]);
        out[CRC_FIELD].copy_from_slice(&crc.to_le_bytes());
    }

    /// Alignment of everything in the image, bytes: a power of two from 512 to 1 MiB.
    #[must_use]
    pub fn page(&self) -> u32 {
        self.page
    }

    /// Number of this manifest; the higher one of the two slots wins.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Bytes of the image: a multiple of the page, at most the store's.
    #[must_use]
    pub fn image_len(&self) -> u64 {
        self.image_len
    }

    /// The image's identity, given by whoever made it.
    #[must_use]
    pub fn id(&self) -> [u8; 16] {
        self.id
    }

    /// The minor version the image was written with.
    #[must_use]
    pub fn minor(&self) -> u16 {
        self.minor
    }

    /// The section of this kind.
    #[must_use]
    pub fn section(&self, kind: SectionKind) -> Option<Section> {
        self.sections().find(|section| section.kind == kind)
    }

    /// All sections in stored order, with those of kinds that are not known here.
    pub fn sections(&self) -> impl Iterator<Item = Section> + '_ {
        self.table.iter().copied().take(usize::from(self.count))
    }

    /// The section that shares bytes with `start..end`, if one does.
    pub(super) fn overlapped(&self, start: u64, end: u64) -> Option<(usize, SectionKind)> {
        self.sections()
            .enumerate()
            .find(|(_, s)| start < s.end(self.page) && s.offset < end)
            .map(|(index, s)| (index, s.kind))
    }
}

/// Says that only one slot could be used; a slot that was never written is nothing to speak of.
fn report_fallback(used: &str, other: &str, wrong: &ImageError) {
    if matches!(wrong, ImageError::NotAnImage { .. }) {
        return;
    }
    #[cfg(feature = "log")]
    log::warn!("superblock {used} is used, {other} cannot be: {wrong}");
    #[cfg(feature = "defmt")]
    defmt::warn!("superblock {} is used, {} cannot be: {}", used, other, wrong);
    #[cfg(not(any(feature = "log", feature = "defmt")))]
    let _ = (used, other);
}

/// Whether an image of this minor version may have fields that are not known here.
pub(super) fn newer(minor: u16) -> bool {
    (VERSION_MINOR + 1..).contains(&minor)
}

/// CRC-32C of a superblock's used bytes, its own field taken as zero.
fn checksum(used: &[u8]) -> u32 {
    let mut digest = Crc32c::new();
    digest.update(&used[..CRC_FIELD.start]);
    digest.update(&[0; CRC_FIELD.end - CRC_FIELD.start]);
    digest.update(&used[CRC_FIELD.end..]);
    digest.finish()
}
