//! `forebay boards` and `forebay image`: what is written is read back, byte for byte, without mounting anything.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use fatfs::{FatType, FileSystem, FsOptions};
use forebay::boards::{BOARDS, BOOT_START, Basis, Board, BootFiles, MODEL_START, MODEL_TYPE, Medium, MediumKind};
use forebay::boards::{Bandwidth, Card, write_medium};
use forebay::convert::Silent;
use fscommon::StreamSlice;
use serde_json::Value;

fn scratch(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("boards").join(name);
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

fn output(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_forebay"));
    command.args(args).stdin(Stdio::null()).env_remove("FOREBAY_MODELS");
    command.env("FOREBAY_CACHE", Path::new(env!("CARGO_TARGET_TMPDIR")).join("boards-cache")).output().unwrap()
}

fn stdout(args: &[&str]) -> String {
    let out = output(args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

fn failure(code: i32, args: &[&str], words: &[&str]) {
    let out = output(args);
    let said = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(code), "{args:?}: {said}");
    for word in words {
        assert!(said.contains(word), "{args:?}: no {word:?} in {said}");
    }
}

/// The bundled model as an image.
fn image() -> &'static str {
    static IMAGE: OnceLock<String> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let image = scratch("image").join("tiny.fby");
        let image = image.to_str().unwrap();
        stdout(&["convert", concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny-lfm2moe"), "-o", image]);
        image.to_owned()
    })
}

fn bytes(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

/// A card of its own: no board's row is needed to test the layout.
const CARD: Medium = Medium {
    kind: MediumKind::Card,
    device: "SD card",
    len: None,
    block: 512,
    mapped: false,
    bandwidth: Bandwidth { bytes_per_second: 1, basis: Basis::Typical },
};

#[test]
fn boards_are_listed_for_people_and_programs() {
    let (text, json) = (stdout(&["boards"]), stdout(&["boards", "--json"]));
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json.as_array().unwrap().len(), BOARDS.len());
    for (board, row) in BOARDS.iter().zip(json.as_array().unwrap()) {
        assert!(text.contains(&format!("{}: {}, {}\n", board.name, board.machine, board.target)), "{text}");
        assert_eq!((row["name"].as_str(), row["arena"].as_u64()), (Some(board.name), Some(board.arena)));
        assert_eq!(row["media"].as_array().unwrap().len(), board.media.len());
    }
    assert!(text.contains("emulated"), "{text}");
}

/// Each board's table row is what its source says, and every board has a row.
#[test]
fn the_table_is_what_the_boards_are() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../board-support/boards");
    let mut boards = 0;
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let Ok(main) = std::fs::read_to_string(path.join("src/main.rs")) else { continue };
        boards += 1;
        let name = path.file_name().unwrap().to_str().unwrap();
        let board = Board::by_name(name).unwrap_or_else(|| panic!("{name} has no row in BOARDS"));
        // A board without the constant takes what the machine has.
        if let Some(arena) = main.lines().find_map(|line| line.strip_prefix("const ARENA: usize = ")?.strip_suffix(';'))
        {
            let (number, shift) = arena.split_once(" << ").unwrap();
            let arena = number.parse::<u64>().unwrap() << shift.parse::<u32>().unwrap();
            assert_eq!(board.arena, arena, "{name}: the arena of main.rs and of the table");
        }
        let readme = std::fs::read_to_string(path.join("README.md")).unwrap();
        // READMEs part thousands by spaces.
        let digits: String = readme.chars().filter(|c| !c.is_whitespace() && *c != ',').collect();
        for (what, bytes) in [("arena", board.arena), ("stack", board.stack)] {
            let said = digits.contains(&bytes.to_string()) || digits.contains(&format!("{}MiB", bytes >> 20));
            assert!(said, "{name}: README.md does not say the {what}'s {bytes} bytes");
        }
    }
    assert_eq!(boards, BOARDS.len(), "a row without a board");
}

#[test]
fn flash_is_the_image_and_then_erased() {
    let image_bytes = bytes(Path::new(image()));
    let folder = scratch("flash");
    for board in BOARDS {
        let Some(medium) = board.medium(MediumKind::Flash) else { continue };
        let path = folder.join(board.name);
        if (medium.len.unwrap() as usize) < image_bytes.len() {
            failure(
                1,
                &["image", "--board", board.name, "--medium", "flash", image(), "-o", path.to_str().unwrap()],
                &["holds", "another medium"],
            );
            continue;
        }
        let text =
            stdout(&["image", "--board", board.name, "--medium", "flash", image(), "-o", path.to_str().unwrap()]);
        assert!(text.contains("the pool holds") != medium.mapped && text.contains("a token uses"), "{text}");
        assert_eq!(text.contains("where they lie in flash"), medium.mapped, "{text}");
        let got = bytes(&path);
        assert_eq!(got.len() as u64, medium.len.unwrap());
        assert!(got[..image_bytes.len()] == image_bytes, "{}", board.name);
        assert!(got[image_bytes.len()..].iter().all(|byte| *byte == 0xff), "{}", board.name);
    }
}

/// A disk is the image, and the plan is the one that the board prints (tests/tests/boards.rs boots it).
#[test]
fn a_disk_is_the_image() {
    let path = scratch("disk").join("disk");
    let args =
        ["image", "--board", "aarch64-virt", "--medium", "disk", image(), "-o", path.to_str().unwrap(), "--json"];
    let json: Value = serde_json::from_str(&stdout(&args)).unwrap();
    assert!(bytes(&path) == bytes(Path::new(image())));
    let plan = &json["plan"];
    assert_eq!(plan["arena"].as_u64(), Some(Board::by_name("aarch64-virt").unwrap().arena));
    assert!(plan["slots"].as_u64().unwrap() >= 2 && plan["slots"].as_u64() < plan["units"].as_u64(), "{plan}");
    assert!(plan["least"].as_u64() <= plan["arena"].as_u64());
}

#[test]
fn a_card_has_a_boot_partition_and_the_image() {
    let folder = scratch("card");
    let (kernel, firmware) = (folder.join("kernel"), folder.join("firmware"));
    let kernel_bytes: Vec<u8> = (0..700_001u32).map(|i| (i * 7 % 251) as u8).collect();
    std::fs::write(&kernel, &kernel_bytes).unwrap();
    std::fs::create_dir_all(firmware.join("overlays")).unwrap();
    std::fs::write(firmware.join("start4.elf"), b"firmware").unwrap();
    std::fs::write(firmware.join("overlays/disable-bt.dtbo"), b"overlay").unwrap();
    let boot = BootFiles { kernel: Some(&kernel), words: Some("generate=2 text=A word"), firmware: Some(&firmware) };
    let card = folder.join("card.img");
    let written = write_medium(&CARD, Path::new(image()), &card, &boot, &mut Silent).unwrap();
    let len = std::fs::metadata(&card).unwrap().len();
    assert!(len.is_power_of_two() && len == written.len && written.start == MODEL_START);

    let file = File::open(&card).unwrap();
    let mut record = [0; 512];
    file.read_exact_at(&mut record, 0).unwrap();
    assert_eq!(record[510..], [0x55, 0xaa]);
    let entry = |i: usize| {
        let at = &record[446 + 16 * i..][..16];
        let number = |range: std::ops::Range<usize>| u64::from(u32::from_le_bytes(at[range].try_into().unwrap())) * 512;
        (at[4], number(8..12), number(12..16))
    };
    assert_eq!(entry(0), (0x0c, BOOT_START, MODEL_START - BOOT_START));
    let (kind, start, model_len) = entry(1);
    assert_eq!((kind, start, start % (1 << 20)), (MODEL_TYPE, MODEL_START, 0));
    assert_eq!((entry(2), entry(3)), ((0, 0, 0), (0, 0, 0)));
    assert!(start + model_len <= len);

    let image_bytes = bytes(Path::new(image()));
    let mut model = vec![0; image_bytes.len()];
    file.read_exact_at(&mut model, start).unwrap();
    assert!(model == image_bytes && image_bytes.len() as u64 <= model_len);

    let volume = StreamSlice::new(File::options().read(true).write(true).open(&card).unwrap(), BOOT_START, MODEL_START);
    let volume = FileSystem::new(volume.unwrap(), FsOptions::new()).unwrap();
    assert_eq!((volume.fat_type(), volume.volume_label().as_str()), (FatType::Fat32, "FOREBAY"));
    let read = |name: &str| {
        let mut bytes = Vec::new();
        volume.root_dir().open_file(name).unwrap().read_to_end(&mut bytes).unwrap();
        bytes
    };
    assert!(read("kernel8.img") == kernel_bytes);
    assert!(String::from_utf8(read("config.txt")).unwrap().contains("arm_64bit=1\n"));
    assert_eq!(read("cmdline.txt"), b" -- generate=2 text=A word\n");
    assert_eq!(
        (read("start4.elf").as_slice(), read("overlays/disable-bt.dtbo").as_slice()),
        (&b"firmware"[..], &b"overlay"[..])
    );

    // The firmware's folder has the last word on what the firmware is told.
    std::fs::write(firmware.join("config.txt"), b"own").unwrap();
    write_medium(&CARD, Path::new(image()), &card, &boot, &mut Silent).unwrap();
    let volume = StreamSlice::new(File::options().read(true).write(true).open(&card).unwrap(), BOOT_START, MODEL_START);
    let volume = FileSystem::new(volume.unwrap(), FsOptions::new()).unwrap();
    let mut config = String::new();
    volume.root_dir().open_file("config.txt").unwrap().read_to_string(&mut config).unwrap();
    assert_eq!(config, "own");
}

#[test]
fn cards_sizes_are_powers_of_two() {
    for (image, len) in [(0, 128 << 20), (1, 128 << 20), (64 << 20, 128 << 20), ((64 << 20) + 1, 256 << 20)] {
        assert_eq!(Card::of(image).len, len, "{image}");
    }
    let large = Card::of(5 << 30);
    assert_eq!((large.model, large.len), (5 << 30, 8 << 30));
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_is_written() {
    let folder = scratch("refused");
    let path = folder.join("out");
    let path = path.to_str().unwrap();
    failure(2, &["image", "--board", "toaster", image(), "-o", path], &["toaster", "aarch64-virt"]);
    failure(2, &["image", image(), "-o", path], &["--board"]);
    failure(
        2,
        &["image", "--board", "aarch64-virt", "--medium", "tape", image(), "-o", path],
        &["disk, flash or card"],
    );
    failure(1, &["image", "--board", "aarch64-virt", "--medium", "card", image(), "-o", path], &["flash, disk"]);
    failure(1, &["image", "--board", "aarch64-virt", "--kernel", image(), image(), "-o", path], &["--kernel", "cards"]);
    failure(1, &["image", "--board", "aarch64-virt", "--words", "a", image(), "-o", path], &["--words", "cards"]);
    failure(1, &["image", "--board", "aarch64-virt", image(), "-o", path, "--arena", "64K"], &["needs", "ARENA"]);
    failure(1, &["image", "--board", "aarch64-virt", image(), "-o", path, "--arena", "1G"], &["bytes of RAM"]);
    failure(1, &["image", "--board", "aarch64-virt", "/no/such/image", "-o", path], &["/no/such/image"]);
    failure(1, &["image", "--board", "aarch64-virt", image(), "-o", "/dev/null"], &["/dev/null", "dd"]);
    failure(1, &["image", "--board", "aarch64-virt", image(), "-o", "/no/such/folder/x"], &["/no/such/folder"]);

    let small = Medium { kind: MediumKind::Flash, len: Some(1 << 20), ..CARD };
    let error = write_medium(&small, Path::new(image()), Path::new(path), &BootFiles::default(), &mut Silent);
    assert!(format!("{:#}", error.unwrap_err()).contains("does not fit"));
    let coarse = Medium { block: 8192, ..CARD };
    let error = write_medium(&coarse, Path::new(image()), Path::new(path), &BootFiles::default(), &mut Silent);
    assert!(format!("{:#}", error.unwrap_err()).contains("--page 8192"));
    let missing = BootFiles { kernel: Some(Path::new("/no/kernel")), ..BootFiles::default() };
    let error = write_medium(&CARD, Path::new(image()), Path::new(path), &missing, &mut Silent);
    assert!(format!("{:#}", error.unwrap_err()).contains("/no/kernel"));
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0, "something was left behind");
}
