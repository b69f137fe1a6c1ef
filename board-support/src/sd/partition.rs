//! Where on the card the image is: the first partition of type [`IMAGE_KIND`] of a card with a master boot record.

use core::ops::Range;

use super::BLOCK;

/// The type of partitions that hold raw data for one program.
pub const IMAGE_KIND: u8 = 0xda;

/// Offset of the first of four entries, and their length.
const TABLE: usize = 446;
const ENTRY: usize = 16;

/// The image's blocks by the card's first block; `None` if there is no such partition.
pub fn image_blocks(first: &[u8; BLOCK]) -> Option<Range<u64>> {
    if first[BLOCK - 2..] != [0x55, 0xaa] {
        return None;
    }
    let (entries, _) = first[TABLE..BLOCK - 2].as_chunks::<ENTRY>();
    entries.iter().find_map(|entry| {
        let word = |at: usize| u64::from(u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]));
        let (start, count) = (word(8), word(12));
        (entry[4] == IMAGE_KIND && start > 0 && count > 0).then_some(start..start + count)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(entries: &[(u8, u32, u32)]) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        for (i, &(kind, start, count)) in entries.iter().enumerate() {
            let entry = &mut block[TABLE + i * ENTRY..][..ENTRY];
            entry[4] = kind;
            entry[8..12].copy_from_slice(&start.to_le_bytes());
            entry[12..16].copy_from_slice(&count.to_le_bytes());
        }
        block[BLOCK - 2..].copy_from_slice(&[0x55, 0xaa]);
        block
    }

    #[test]
    fn the_first_partition_of_the_type_is_taken() {
        let block = record(&[(0x0c, 2048, 65536), (IMAGE_KIND, 67584, 16312), (IMAGE_KIND, 99999, 1)]);
        assert_eq!(image_blocks(&block), Some(67584..67584 + 16312));
        let last = record(&[(0, 0, 0), (0, 0, 0), (0, 0, 0), (IMAGE_KIND, u32::MAX, u32::MAX)]);
        assert_eq!(image_blocks(&last), Some(0xffff_ffff..0x1_ffff_fffe));
    }

    #[test]
    fn what_is_none_is_not_taken() {
        assert_eq!(image_blocks(&[0; BLOCK]), None);
        assert_eq!(image_blocks(&record(&[(0x0c, 2048, 65536)])), None);
        assert_eq!(image_blocks(&record(&[(IMAGE_KIND, 0, 5), (IMAGE_KIND, 5, 0)])), None);
        let mut unsigned = record(&[(IMAGE_KIND, 1, 1)]);
        unsigned[BLOCK - 1] = 0;
        assert_eq!(image_blocks(&unsigned), None);
    }
}
