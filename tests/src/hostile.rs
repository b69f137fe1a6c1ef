//! Images that lie: bytes are changed and every checksum is made right again, so that only validation stands
//! between the lie and the engine.

use forebay_storage::image::{ExtentRecord, SUPERBLOCK_SLOT, SectionKind, Superblock, crc32c};

const SLOT: usize = SUPERBLOCK_SLOT as usize;
/// Offsets of the fields that this module rewrites; docs/format.md specifies them.
const SUPERBLOCK_CRC: usize = 12;
const SUPERBLOCK_SIZE: usize = 52;
const RECORDS: usize = 64;
const RECORD: usize = 32;
const RECORD_CRC: usize = 24;
const EXTENT: usize = size_of::<ExtentRecord>();

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Makes the checksums of slot A, of its sections and of the extents right, as far as they lie inside the image.
pub fn reseal(image: &mut [u8]) {
    let sections = usize::from(u16::from_le_bytes([image[56], image[57]])).min((SLOT - RECORDS) / RECORD);
    let section = |image: &[u8], i: usize| {
        let record = &image[RECORDS + i * RECORD..][..RECORD];
        let offset = u64::from_le_bytes(record[8..16].try_into().unwrap());
        let len = u64::from_le_bytes(record[16..24].try_into().unwrap());
        let end = offset.checked_add(len).filter(|end| *end <= image.len() as u64)?;
        Some((u32_at(record, 0), offset as usize..end as usize))
    };
    for i in 0..sections {
        // Kind 3 is the table of extents, whose records carry the checksums of what they point to.
        if let Some((3, range)) = section(image, i) {
            for at in range.step_by(EXTENT) {
                reseal_extent(image, at);
            }
        }
    }
    for i in 0..sections {
        if let Some((_, range)) = section(image, i) {
            let crc = crc32c(&image[range]);
            image[RECORDS + i * RECORD + RECORD_CRC..][..4].copy_from_slice(&crc.to_le_bytes());
        }
    }
    let size = (u32_at(image, SUPERBLOCK_SIZE) as usize).clamp(RECORDS, SLOT);
    image[SUPERBLOCK_CRC..][..4].fill(0);
    let crc = crc32c(&image[..size]);
    image[SUPERBLOCK_CRC..][..4].copy_from_slice(&crc.to_le_bytes());
}

fn reseal_extent(image: &mut [u8], at: usize) {
    if at + EXTENT > image.len() {
        return;
    }
    let mut offset = u64::from_le_bytes(image[at..at + 8].try_into().unwrap());
    for level in 0..usize::from(image[at + 41]).min(4) {
        let len = u64::from(u32_at(image, at + 8 + 4 * level));
        let Some(end) = offset.checked_add(len).filter(|end| *end <= image.len() as u64) else { return };
        let crc = crc32c(&image[offset as usize..end as usize]);
        image[at + 24 + 4 * level..][..4].copy_from_slice(&crc.to_le_bytes());
        offset = end;
    }
}

/// Byte ranges of an image's parts, named.
pub fn parts(image: &[u8]) -> Vec<(&'static str, std::ops::Range<usize>)> {
    let superblock = Superblock::parse(&image[..2 * SLOT], image.len() as u64).expect("a good image");
    let mut parts = vec![("superblock", 0..SLOT)];
    for section in superblock.sections() {
        let name = match section.kind {
            SectionKind::Model => "MODEL",
            SectionKind::Tensors => "TENSORS",
            SectionKind::Extents => "EXTENTS",
            SectionKind::Tokenizer => "TOKENIZER",
            _ => "other",
        };
        parts.push((name, section.offset as usize..(section.offset + section.len) as usize));
    }
    parts
}
