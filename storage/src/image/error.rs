//! What can be wrong with an image.

use super::{MAX_SECTIONS, SectionKind, VERSION_MAJOR};

/// Why an image was refused: which field, its value, and what was expected.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum ImageError {
    /// The slot does not begin with [`MAGIC`](super::MAGIC).
    #[error("not an image: the first bytes are {found:02x?}, expected \"FOREBAY\\0\"")]
    NotAnImage {
        /// The bytes in place of the magic.
        found: [u8; 8],
    },
    /// Another major version.
    #[error("superblock: version {major}.{minor} is not supported, expected {VERSION_MAJOR}.x")]
    Version {
        /// Stored major version.
        major: u16,
        /// Stored minor version.
        minor: u16,
    },
    /// Fewer bytes were given than the structure takes.
    #[error("{what}: {len} bytes, expected {expected}")]
    TooShort {
        /// The structure.
        what: &'static str,
        /// Bytes there are.
        len: u64,
        /// Bytes it takes.
        expected: u64,
    },
    /// The superblock's bytes do not have their checksum.
    #[error("superblock: checksum {computed:#010x}, expected {stored:#010x}")]
    SuperblockChecksum {
        /// Checksum in the image.
        stored: u32,
        /// Checksum of the bytes.
        computed: u32,
    },
    /// A superblock field has a value it cannot have.
    #[error("superblock: {field} {value} {violation}")]
    Superblock {
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// The rule it breaks.
        violation: Violation,
    },
    /// A section record has a value it cannot have.
    #[error("section {index} ({kind}): {field} {value} {violation}")]
    Section {
        /// Position in the section table.
        index: usize,
        /// Kind of section.
        kind: SectionKind,
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// The rule it breaks.
        violation: Violation,
    },
    /// A section that this reader may not skip, and does not know.
    #[error("section {index}: kind {code} is not known here and must be understood")]
    MustUnderstand {
        /// Position in the section table.
        index: usize,
        /// The unknown kind.
        code: u32,
    },
    /// Two sections of one kind.
    #[error("section {index} ({kind}): section {first} is of that kind already")]
    Duplicate {
        /// Position of the second one.
        index: usize,
        /// The kind.
        kind: SectionKind,
        /// Position of the first one.
        first: usize,
    },
    /// The table of sections is full.
    #[error("more than {MAX_SECTIONS} sections")]
    TooManySections,
    /// A section's bytes do not have their checksum.
    #[error("section ({kind}): checksum {computed:#010x}, expected {stored:#010x}")]
    SectionChecksum {
        /// The section.
        kind: SectionKind,
        /// Checksum in the superblock.
        stored: u32,
        /// Checksum of the bytes.
        computed: u32,
    },
    /// The extents section is not a whole number of records.
    #[error("extents section: length {len} is not a multiple of the record size {record}")]
    PartialRecord {
        /// Bytes of the section.
        len: u64,
        /// Bytes of a record.
        record: u64,
    },
    /// An extent record has a value it cannot have.
    #[error("extent {index}: {field} {value} {violation}")]
    Extent {
        /// Position in the extent table.
        index: usize,
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// The rule it breaks.
        violation: Violation,
    },
}

/// The rule that a field's value breaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum Violation {
    /// Not a multiple of the page.
    #[error("is not a multiple of the page {page}")]
    Misaligned {
        /// The image's page.
        page: u32,
    },
    /// Not a power of two in range.
    #[error("is not a power of two from {min} to {max}")]
    NotAPage {
        /// Smallest page.
        min: u32,
        /// Largest page.
        max: u32,
    },
    /// Below the least value.
    #[error("is less than {min}")]
    Below {
        /// Least value.
        min: u64,
    },
    /// Above the greatest value.
    #[error("is more than {max}")]
    Above {
        /// Greatest value.
        max: u64,
    },
    /// Has one possible value, and it is another.
    #[error("is not {expected}")]
    Not {
        /// The only value there is.
        expected: u64,
    },
    /// The offset is fine, but the bytes from there reach past the end.
    #[error("and {len} bytes reach past the end {end}")]
    PastEnd {
        /// Bytes from the offset on, with padding.
        len: u64,
        /// End of the image.
        end: u64,
    },
    /// Shares bytes with a section.
    #[error("overlaps section {index} ({kind})")]
    OverlapsSection {
        /// Position of the other section.
        index: usize,
        /// Its kind.
        kind: SectionKind,
    },
}
