//! The image container: whatever the bytes are, parsing does not panic, and what is accepted keeps its promises.

use forebay_storage::image::{
    Crc32c, ExtentRecord, ExtentTable, MAGIC, MAX_LEVELS, SUPERBLOCK_SLOT, SectionKind, Superblock, VERSION_MAJOR,
    data_start, round_up,
};

const SLOT: usize = SUPERBLOCK_SLOT as usize;

/// Takes `data` as an image: once as it is, and once with both superblocks' magic, version and checksum put right,
/// so that what lies behind them is reached.
pub fn run(data: &[u8]) {
    check(data);
    let mut image = data.to_vec();
    for slot in image.chunks_mut(SLOT).take(2) {
        reseal(slot);
    }
    check(&image);
}

/// Puts a superblock's magic, version and checksum right.
pub fn reseal(slot: &mut [u8]) {
    if slot.len() < 64 {
        return;
    }
    slot[..8].copy_from_slice(&MAGIC);
    slot[8..10].copy_from_slice(&VERSION_MAJOR.to_le_bytes());
    let size = u32::from_le_bytes([slot[52], slot[53], slot[54], slot[55]]) as usize;
    if !(64..=slot.len()).contains(&size) {
        return;
    }
    slot[12..16].fill(0);
    let mut digest = Crc32c::new();
    digest.update(&slot[..size]);
    slot[12..16].copy_from_slice(&digest.finish().to_le_bytes());
}

/// Returns whether the image has a valid superblock and a valid table of extents.
pub fn check(image: &[u8]) -> bool {
    let slots = &image[..image.len().min(2 * SLOT)];
    let superblock = match Superblock::parse(slots, image.len() as u64) {
        Ok(superblock) => superblock,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return false;
        }
    };
    let page = u64::from(superblock.page());
    assert!(page.is_power_of_two() && (512..=1 << 20).contains(&page));
    assert!(superblock.image_len() <= image.len() as u64 && superblock.image_len() % page == 0);

    let mut slot = [0xff; SLOT];
    superblock.write(&mut slot);
    let again = Superblock::parse_slot(&slot, superblock.image_len()).expect("what is written can be read");
    assert!(again.sections().eq(superblock.sections()));
    assert_eq!(
        (again.page(), again.generation(), again.id(), again.image_len()),
        (superblock.page(), superblock.generation(), superblock.id(), superblock.image_len())
    );

    let mut taken: Vec<(u64, u64)> = vec![(0, data_start(superblock.page()))];
    for section in superblock.sections() {
        let end = section.offset + round_up(section.len, superblock.page()).expect("validated");
        assert!(section.len > 0 && section.offset % page == 0 && end <= superblock.image_len());
        taken.push((section.offset, end));
        let bytes = &image[section.offset as usize..][..section.len as usize];
        let _ = section.verify(bytes);
        assert!(section.verify(&bytes[1..]).is_err());
    }
    let Some(section) = superblock.section(SectionKind::Extents) else { return disjoint(taken) };
    let bytes = &image[section.offset as usize..][..section.len as usize];
    let table = match ExtentTable::parse(bytes, &superblock) {
        Ok(table) => table,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            disjoint(taken);
            return false;
        }
    };
    for record in table.records() {
        extent(record, image);
        assert!(record.offset() % page == 0 && record.offset() + record.total_len() <= superblock.image_len());
        taken.push((record.offset(), record.offset() + record.total_len()));
    }
    disjoint(taken)
}

fn extent(record: &ExtentRecord, image: &[u8]) {
    let levels = record.levels();
    assert!((1..=MAX_LEVELS).contains(&levels));
    let bytes = &image[record.offset() as usize..][..record.total_len() as usize];
    let mut good = 0;
    for level in 0..levels {
        let range = record.prefix_len(level) as usize..record.prefix_len(level + 1) as usize;
        assert_eq!(range.len(), record.level_len(level) as usize);
        if record.verify(level, &bytes[range]).is_ok() && good == level {
            good += 1;
        }
    }
    // All at once says the same as one by one.
    match record.verify(0, bytes) {
        Ok(all) => assert_eq!((all, good), (levels, levels)),
        Err(error) => assert_eq!(error.level, good),
    }
    assert_eq!(record.verify(0, &bytes[..bytes.len() - 1]).unwrap_err().level, good.min(levels - 1));
}

/// Ranges that were accepted share no byte.
fn disjoint(mut ranges: Vec<(u64, u64)>) -> bool {
    ranges.sort_unstable();
    assert!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{ranges:?}");
    true
}
