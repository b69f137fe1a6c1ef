//! The container: round trips, every rule with an example that breaks it, and hostile bytes.

use forebay_storage::image::{
    ChecksumError, ExtentKind, ExtentRecord, ExtentTable, ImageError, MAX_SECTIONS, SUPERBLOCK_SLOT, Section,
    SectionKind, Superblock, Violation, crc32c, data_start,
};
use proptest::prelude::*;
use zerocopy::IntoBytes;

#[path = "../../tests/fuzz/src/image.rs"]
mod fuzz;

const PAGE: u32 = 4096;
const SLOT: usize = SUPERBLOCK_SLOT as usize;
/// Where the extent table of [`image`] is.
const TABLE: usize = 2 * SLOT;

fn bytes(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + seed * 17 + i / 251) as u8).collect()
}

/// An extent of these levels, with its bytes appended to the image.
fn put_extent(image: &mut Vec<u8>, kind: ExtentKind, lens: &[usize]) -> ExtentRecord {
    let offset = image.len() as u64;
    let mut levels = Vec::new();
    for (i, &len) in lens.iter().enumerate() {
        let level = bytes(len, image.len() + i);
        levels.push((len as u32, crc32c(&level)));
        image.extend(level);
    }
    ExtentRecord::new(kind, offset, &levels)
}

/// A small valid image: two extents, a table of them, a tokenizer section.
fn image() -> (Vec<u8>, Superblock) {
    let page = PAGE as usize;
    let mut image = vec![0; TABLE + 2 * page];
    let records = [
        put_extent(&mut image, ExtentKind::Resident, &[2 * page]),
        put_extent(&mut image, ExtentKind::Unit, &[page, 2 * page, page]),
    ];
    let table = records.as_bytes();
    image[TABLE..TABLE + table.len()].copy_from_slice(table);
    let tokenizer = bytes(100, 9);
    let at = TABLE + page;
    image[at..at + 100].copy_from_slice(&tokenizer);

    let mut superblock = Superblock::new(PAGE, 7, *b"0123456789abcdef", image.len() as u64).unwrap();
    for (kind, offset, content) in
        [(SectionKind::Extents, TABLE, table), (SectionKind::Tokenizer, at, tokenizer.as_slice())]
    {
        let section = Section { kind, offset: offset as u64, len: content.len() as u64, crc: crc32c(content) };
        superblock.push_section(section).unwrap();
    }
    let mut slot = [0; SLOT];
    superblock.write(&mut slot);
    image[..SLOT].copy_from_slice(&slot);
    (image, superblock)
}

fn parse(image: &[u8]) -> Result<Superblock, ImageError> {
    Superblock::parse(&image[..2 * SLOT], image.len() as u64)
}

/// Slot A of [`image`] with some bytes changed and the checksum put right.
fn patched(at: usize, patch: &[u8]) -> Result<Superblock, ImageError> {
    let (mut image, _) = image();
    image[at..at + patch.len()].copy_from_slice(patch);
    fuzz::reseal(&mut image[..SLOT]);
    parse(&image)
}

#[test]
fn round_trip() {
    let (image, superblock) = image();
    let parsed = parse(&image).unwrap();
    assert_eq!(parsed, superblock);
    assert_eq!((parsed.page(), parsed.generation(), parsed.minor()), (PAGE, 7, 0));
    assert_eq!((parsed.id(), parsed.image_len()), (*b"0123456789abcdef", image.len() as u64));
    assert_eq!(parsed.section(SectionKind::Plan), None);
    assert_eq!(parsed.sections().count(), 2);

    let section = parsed.section(SectionKind::Extents).unwrap();
    let stored = &image[section.offset as usize..][..section.len as usize];
    section.verify(stored).unwrap();
    // Read by whole pages, as a device does.
    section.verify(&image[section.offset as usize..]).unwrap();
    let table = ExtentTable::parse(stored, &parsed).unwrap();
    assert_eq!((table.len(), table.is_empty()), (2, false));
    assert_eq!(table.get(2), None);
    let unit = table.get(1).unwrap();
    assert_eq!((unit.kind(), table.records()[0].kind()), (ExtentKind::Unit, ExtentKind::Resident));
    assert_eq!((unit.levels(), unit.level_len(1), unit.level_len(3)), (3, 8192, 0));
    assert_eq!((unit.prefix_len(0), unit.prefix_len(2), unit.prefix_len(9)), (0, 12288, 16384));
    assert_eq!(unit.total_len(), 16384);
    assert!(fuzz::check(&image));
}

#[test]
fn levels_are_verified_on_their_own_and_together() {
    let (mut image, superblock) = image();
    let table = image[TABLE..TABLE + 128].to_vec();
    let table = ExtentTable::parse(&table, &superblock).unwrap();
    let unit = table.get(1).unwrap();
    let start = unit.offset() as usize;
    let level = |level: usize| start + unit.prefix_len(level) as usize;
    assert_eq!(unit.verify(0, &image[start..level(3)]), Ok(3));
    assert_eq!(unit.verify(0, &image[start..level(2)]), Ok(2));
    assert_eq!(unit.verify(1, &image[level(1)..level(3)]), Ok(2));
    assert_eq!(unit.verify(2, &image[level(2)..level(3)]), Ok(1));
    assert_eq!(unit.verify(0, &[]), Ok(0));
    // A part of a level, more than all levels, a level that is not there, bytes of another level.
    assert_eq!(unit.verify(0, &image[start..level(1) + 1]), Err(ChecksumError { level: 1 }));
    assert_eq!(unit.verify(2, &image[level(2)..level(3)].repeat(2)), Err(ChecksumError { level: 3 }));
    assert_eq!(unit.verify(9, &[1]), Err(ChecksumError { level: 9 }));
    assert_eq!(unit.verify(usize::MAX, &[1]), Err(ChecksumError { level: usize::MAX }));
    assert_eq!(unit.verify(2, &image[level(0)..level(1)]), Err(ChecksumError { level: 2 }));
    // Any one bit.
    for (bit, bad) in [(0, 0), (level(1) - start, 1), (level(3) - start - 1, 2)] {
        image[start + bit] ^= 0x10;
        assert_eq!(unit.verify(0, &image[start..level(3)]), Err(ChecksumError { level: bad }));
        image[start + bit] ^= 0x10;
    }
}

#[test]
fn the_newer_valid_superblock_wins() {
    let (mut image, superblock) = image();
    let mut slot = [0; SLOT];
    superblock.with_generation(8).write(&mut slot);
    image[SLOT..2 * SLOT].copy_from_slice(&slot);
    assert_eq!(parse(&image).unwrap().generation(), 8);
    // An update that was cut short anywhere leaves the one before.
    for cut in 0..(64 + 2 * 32) {
        let mut torn = image.clone();
        torn[SLOT + cut..2 * SLOT].fill(0xff);
        assert_eq!(parse(&torn).unwrap().generation(), 7, "cut at {cut}");
    }
    // The other way round: B holds, A is being written.
    image[100] ^= 1;
    assert_eq!(parse(&image).unwrap().generation(), 8);
    // Equal generations: A.
    let (mut image, superblock) = self::image();
    let mut other = Superblock::new(PAGE, 7, [0; 16], superblock.image_len()).unwrap();
    other.write(&mut slot);
    image[SLOT..2 * SLOT].copy_from_slice(&slot);
    assert_eq!(parse(&image).unwrap(), superblock);
    // Neither: what is wrong with A, or with B if A is empty.
    other = other.with_generation(9);
    other.write(&mut slot);
    slot[20] ^= 1;
    image[SLOT..2 * SLOT].copy_from_slice(&slot);
    image[..SLOT].fill(0);
    assert!(matches!(parse(&image), Err(ImageError::SuperblockChecksum { .. })));
    image[..SLOT].fill(0xff);
    image[SLOT..2 * SLOT].fill(0xff);
    assert_eq!(parse(&image), Err(ImageError::NotAnImage { found: [0xff; 8] }));
}

#[test]
fn header_rules() {
    use ImageError::{NotAnImage, SuperblockChecksum, TooManySections, TooShort, Version};
    let (image, _) = image();
    let len = image.len() as u64;
    assert!(matches!(Superblock::parse(&[], len), Err(TooShort { len: 0, expected: 64, .. })));
    assert!(matches!(Superblock::parse(&image[..63], len), Err(TooShort { len: 63, .. })));
    assert!(matches!(Superblock::parse(&image[..127], len), Err(TooShort { len: 127, expected: 128, .. })));
    assert!(Superblock::parse(&image[..128], len).is_ok());
    assert_eq!(
        Superblock::parse(&image[..SLOT], len - 1),
        Err(TooShort { what: "store", len: len - 1, expected: len })
    );
    let mut other = image.clone();
    other[0] = b'X';
    assert_eq!(parse(&other), Err(NotAnImage { found: *b"XOREBAY\0" }));
    other[0] = b'F';
    other[16] ^= 1;
    assert!(matches!(parse(&other), Err(SuperblockChecksum { .. })));
    other[16] ^= 1;
    other[8] = 2;
    assert_eq!(parse(&other), Err(Version { major: 2, minor: 0 }));

    let header = |field, value, violation| Err(ImageError::Superblock { field, value, violation });
    let size = |size: u32| patched(52, &size.to_le_bytes());
    assert_eq!(size(63), header("size", 63, Violation::Below { min: 64 }));
    assert_eq!(size(5000), header("size", 5000, Violation::Above { max: 4096 }));
    assert_eq!(size(127), header("size", 127, Violation::Below { min: 128 }));
    assert_eq!(size(129), header("size", 129, Violation::Not { expected: 128 }));
    assert_eq!(patched(56, &[33]), header("sections", 33, Violation::Above { max: 32 }));
    assert_eq!(patched(58, &[1]), header("reserved", 1, Violation::Not { expected: 0 }));
    let page = |page: u32| patched(48, &page.to_le_bytes());
    for bad in [0, 1, 256, 4095, 4097, 2 << 20, u32::MAX] {
        assert_eq!(page(bad), header("page", bad.into(), Violation::NotAPage { min: 512, max: 1 << 20 }));
    }
    assert!(page(512).is_ok());
    let image_len = |len: u64| patched(24, &len.to_le_bytes());
    assert_eq!(image_len(len - 1), header("image_len", len - 1, Violation::Misaligned { page: PAGE }));
    assert_eq!(image_len(4096), header("image_len", 4096, Violation::Below { min: 8192 }));
    assert!(matches!(image_len(len + 4096), Err(TooShort { what: "store", .. })));

    let mut superblock = Superblock::new(512, 0, [0; 16], 1 << 20).unwrap();
    for i in 0..MAX_SECTIONS as u64 {
        let kind = SectionKind::Other(100);
        superblock.push_section(Section { kind, offset: 8192 + i * 512, len: 1, crc: 0 }).unwrap();
    }
    let full = superblock;
    let one_more = Section { kind: SectionKind::Plan, offset: 1 << 19, len: 1, crc: 0 };
    assert_eq!(superblock.push_section(one_more), Err(TooManySections));
    assert_eq!(superblock, full);
    let mut slot = [0; SLOT];
    full.write(&mut slot);
    assert_eq!(Superblock::parse_slot(&slot, 1 << 20), Ok(full));
}

#[test]
fn section_rules() {
    const TOKENIZER: usize = 64 + 32;
    let kind = SectionKind::Tokenizer;
    let section =
        |field, value, violation| Err::<Superblock, _>(ImageError::Section { index: 1, kind, field, value, violation });
    let offset = |offset: u64| patched(TOKENIZER + 8, &offset.to_le_bytes());
    let len = |len: u64| patched(TOKENIZER + 16, &len.to_le_bytes());
    let end = image().0.len() as u64;
    assert_eq!(offset(12345), section("offset", 12345, Violation::Misaligned { page: PAGE }));
    assert_eq!(
        offset(12345).unwrap_err().to_string(),
        "section 1 (tokenizer): offset 12345 is not a multiple of the page 4096"
    );
    assert_eq!(offset(4096), section("offset", 4096, Violation::Below { min: 8192 }));
    assert_eq!(offset(end), section("offset", end, Violation::PastEnd { len: 100, end }));
    assert_eq!(
        offset(0u64.wrapping_sub(4096)),
        section("offset", u64::MAX - 4095, Violation::PastEnd { len: 100, end })
    );
    let overlap = Violation::OverlapsSection { index: 0, kind: SectionKind::Extents };
    assert_eq!(offset(8192), section("offset", 8192, overlap));
    assert_eq!(
        offset(8192).unwrap_err().to_string(),
        "section 1 (tokenizer): offset 8192 overlaps section 0 (extents)"
    );
    assert_eq!(len(0), section("len", 0, Violation::Below { min: 1 }));
    assert_eq!(len(end), section("offset", 12288, Violation::PastEnd { len: end, end }));
    assert_eq!(len(u64::MAX), section("offset", 12288, Violation::PastEnd { len: u64::MAX, end }));
    assert_eq!(patched(TOKENIZER + 4, &[2]), section("flags", 2, Violation::Not { expected: 0 }));
    assert_eq!(patched(TOKENIZER + 28, &[3]), section("reserved", 3, Violation::Not { expected: 0 }));
    assert_eq!(patched(TOKENIZER, &[3]), Err(ImageError::Duplicate { index: 1, kind: SectionKind::Extents, first: 0 }));
    let zero = SectionKind::Other(0);
    let violation = Violation::Below { min: 1 };
    assert_eq!(
        patched(TOKENIZER, &[0]),
        Err(ImageError::Section { index: 1, kind: zero, field: "kind", value: 0, violation })
    );
    // An unknown kind is carried along, unless it says that it must be understood.
    let skipped = patched(TOKENIZER, &[77]).unwrap();
    assert_eq!(skipped.section(SectionKind::Other(77)).unwrap().len, 100);
    assert_eq!(patched(TOKENIZER, &[77, 0, 0, 0, 1]), Err(ImageError::MustUnderstand { index: 1, code: 77 }));
    for code in 1..=9 {
        assert!(!matches!(SectionKind::from_code(code), SectionKind::Other(_)));
        assert_eq!(SectionKind::from_code(code).code(), code);
    }

    let (image, superblock) = image();
    let stored = superblock.section(kind).unwrap();
    let bytes = &image[12288..12388];
    assert_eq!(stored.verify(bytes), Ok(()));
    assert_eq!(stored.verify(&bytes[..99]), Err(ImageError::TooShort { what: "section", len: 99, expected: 100 }));
    let wrong = Section { crc: stored.crc ^ 1, ..stored };
    let (stored, computed) = (wrong.crc, wrong.crc ^ 1);
    assert_eq!(wrong.verify(bytes), Err(ImageError::SectionChecksum { kind, stored, computed }));
}

#[test]
fn a_higher_minor_version_is_accepted_with_what_it_adds() {
    let (mut image, _) = image();
    image[10] = 3;
    image[52] = 160; // 32 bytes after the two records
    image[58..64].fill(9);
    image[64 + 28] = 5;
    image[64 + 4] |= 0x80;
    image[TABLE + 60] = 1;
    fuzz::reseal(&mut image[..SLOT]);
    let superblock = parse(&image).unwrap();
    assert_eq!(superblock.minor(), 3);
    assert!(ExtentTable::parse(&image[TABLE..TABLE + 128], &superblock).is_ok());
}

#[test]
fn extent_rules() {
    use Violation::{Above, Below, Misaligned, Not, OverlapsSection, PastEnd};
    let (image, superblock) = image();
    let end = image.len() as u64;
    let table = &image[TABLE..TABLE + 128];
    let change = |at: usize, patch: &[u8]| {
        let mut table = table.to_vec();
        table[64 + at..64 + at + patch.len()].copy_from_slice(patch);
        ExtentTable::parse(&table, &superblock).map(|table| table.len())
    };
    let wrong = |field, value, violation| Err(ImageError::Extent { index: 1, field, value, violation });
    let offset = |offset: u64| change(0, &offset.to_le_bytes());
    let second = ExtentTable::parse(table, &superblock).unwrap().get(1).unwrap().offset();

    assert_eq!(
        ExtentTable::parse(&table[..65], &superblock).unwrap_err(),
        ImageError::PartialRecord { len: 65, record: 64 }
    );
    assert!(ExtentTable::parse(&[], &superblock).unwrap().is_empty());
    assert_eq!(offset(second), Ok(2));
    assert_eq!(offset(second + 1), wrong("offset", second + 1, Misaligned { page: PAGE }));
    assert_eq!(
        offset(second + 1).unwrap_err().to_string(),
        "extent 1: offset 24577 is not a multiple of the page 4096"
    );
    assert_eq!(offset(0), wrong("offset", 0, Below { min: data_start(PAGE) }));
    assert_eq!(offset(second - 4096), wrong("offset", second - 4096, Below { min: second }));
    assert_eq!(offset(second + 4096), wrong("offset", second + 4096, PastEnd { len: 16384, end }));
    assert_eq!(offset(u64::MAX - 4095), wrong("offset", u64::MAX - 4095, PastEnd { len: 16384, end }));
    assert_eq!(offset(8192), wrong("offset", 8192, OverlapsSection { index: 0, kind: SectionKind::Extents }));
    assert_eq!(offset(12288), wrong("offset", 12288, OverlapsSection { index: 1, kind: SectionKind::Tokenizer }));
    assert_eq!(change(40, &[0]), wrong("kind", 0, Below { min: 1 }));
    assert_eq!(change(40, &[3]), wrong("kind", 3, Above { max: 2 }));
    assert_eq!(change(41, &[0]), wrong("levels", 0, Below { min: 1 }));
    assert_eq!(change(41, &[5]), wrong("levels", 5, Above { max: 4 }));
    assert_eq!(change(42, &[0, 1]), wrong("flags", 256, Not { expected: 0 }));
    assert_eq!(change(8, &0u32.to_le_bytes()), wrong("len", 0, Below { min: 1 }));
    assert_eq!(change(12, &4097u32.to_le_bytes()), wrong("len", 4097, Misaligned { page: PAGE }));
    // Level 3 of three levels, length and checksum.
    assert_eq!(change(20, &[1]), wrong("unused level", 1, Not { expected: 0 }));
    assert_eq!(change(36, &[1]), wrong("unused level", 1, Not { expected: 0 }));
    for at in 44..64 {
        assert_eq!(change(at, &[1]), wrong("reserved", 1, Not { expected: 0 }));
    }
    // What cannot be stored is refused rather than cut.
    let five = ExtentRecord::new(ExtentKind::Unit, second, &[(4096, 0); 5]);
    assert_eq!(change(0, five.as_bytes()), wrong("levels", 5, Above { max: 4 }));
    assert_eq!(five.levels(), 4);
}

#[derive(Debug, Clone)]
struct Mutation {
    at: prop::sample::Index,
    byte: u8,
}

fn mutations() -> impl Strategy<Value = Vec<Mutation>> {
    prop::collection::vec(
        (any::<prop::sample::Index>(), prop_oneof![any::<u8>(), Just(0), Just(0xff), Just(0x80)])
            .prop_map(|(at, byte)| Mutation { at, byte }),
        0..6,
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn random_bytes_do_not_panic(data in prop::collection::vec(any::<u8>(), 0..9000)) {
        fuzz::run(&data);
    }

    /// Changes where the structure is: superblocks and extent table.
    #[test]
    fn mutated_images_keep_their_promises(superblock in mutations(), table in mutations()) {
        let (mut image, _) = image();
        for Mutation { at, byte } in superblock {
            image[at.index(64 + 2 * 32)] = byte;
        }
        for Mutation { at, byte } in table {
            image[TABLE + at.index(128)] = byte;
        }
        fuzz::run(&image);
    }

    #[test]
    fn any_layout_round_trips(
        page in (9u32..=13).prop_map(|bits| 1 << bits),
        generation: u64,
        id: [u8; 16],
        lens in prop::collection::vec(1u64..20_000, 0..9),
    ) {
        let mut offset = data_start(page);
        let mut sections = Vec::new();
        for (i, &len) in lens.iter().enumerate() {
            let kind = SectionKind::from_code(i as u32 + 1);
            sections.push(Section { kind, offset, len, crc: len as u32 ^ 0xabcd });
            offset += len.next_multiple_of(page.into());
        }
        let mut superblock = Superblock::new(page, generation, id, offset).unwrap();
        for &section in sections.iter().rev() {
            superblock.push_section(section).unwrap();
        }
        let mut slot = [1; SLOT];
        superblock.write(&mut slot);
        let parsed = Superblock::parse_slot(&slot, offset).unwrap();
        prop_assert_eq!(parsed, superblock);
        for section in sections {
            prop_assert_eq!(parsed.section(section.kind), Some(section));
        }
    }
}
