//! SD cards: a master boot record, a FAT32 boot partition, and a partition that is the image itself.
//!
//! A board reads the image by sectors, without a file system: big reads, nothing fragmented, no allocation table to
//! walk. The boot partition is for what the firmware wants to find.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use fatfs::{FatType, FileSystem, FormatVolumeOptions, FsOptions};
use fscommon::{BufStream, StreamSlice};
use zerocopy::{Immutable, IntoBytes, little_endian::U32};

/// Bytes of a sector.
const SECTOR: u64 = 512;
/// First byte of the boot partition.
pub const BOOT_START: u64 = 1 << 20;
/// First byte of the model's partition, which ends the boot partition. FAT32 needs at least 65525 clusters, 33 MiB.
pub const MODEL_START: u64 = 64 << 20;
/// Type of the model's partition: data without a file system.
pub const MODEL_TYPE: u8 = 0xda;
/// Type of the boot partition: FAT32, addressed by sectors.
const BOOT_TYPE: u8 = 0x0c;
/// Partitions start and end on multiples of this.
const ALIGN: u64 = 1 << 20;

/// What the Raspberry Pi's firmware is told.
const CONFIG: &str = "arm_64bit=1\nkernel=kernel8.img\nenable_uart=1\n";

/// What goes onto the boot partition.
#[derive(Clone, Copy, Debug, Default)]
pub struct BootFiles<'a> {
    /// The program: `kernel8.img`.
    pub kernel: Option<&'a Path>,
    /// Words for the program: the end of `cmdline.txt`, whose beginning is the firmware's.
    pub words: Option<&'a str>,
    /// A folder whose files are copied, the firmware's for example. A `config.txt` or `cmdline.txt` in it replaces
    /// the one made here.
    pub firmware: Option<&'a Path>,
}

/// Sizes of a card.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Card {
    /// Bytes of the model's partition.
    pub model: u64,
    /// Bytes of the card: a power of two, which is what QEMU takes.
    pub len: u64,
}

/// An entry of the partition table.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Entry {
    active: u8,
    /// Cylinder, head and sector: the highest, which says that the numbers of sectors count.
    first_chs: [u8; 3],
    kind: u8,
    last_chs: [u8; 3],
    first: U32,
    sectors: U32,
}

impl Entry {
    fn new(kind: u8, start: u64, end: u64) -> Result<Self> {
        let sectors = |bytes: u64| u32::try_from(bytes / SECTOR).ok().map(U32::new);
        let (first, sectors) = sectors(start)
            .zip(sectors(end - start))
            .context("the image is too large for a card with a master boot record, which ends at 2 TiB")?;
        Ok(Self { active: 0, first_chs: [0xfe, 0xff, 0xff], kind, last_chs: [0xfe, 0xff, 0xff], first, sectors })
    }
}

impl Card {
    /// The card for an image of `image_len` bytes.
    #[must_use]
    pub fn of(image_len: u64) -> Self {
        let model = image_len.next_multiple_of(ALIGN).max(ALIGN);
        Self { model, len: (MODEL_START + model).next_power_of_two() }
    }

    /// Writes the master boot record and the boot partition. `id` tells cards apart.
    pub(super) fn write(&self, file: &File, id: u32, boot: &BootFiles<'_>) -> Result<()> {
        file.set_len(self.len).context("giving the card its size")?;
        let mut record = [0; SECTOR as usize];
        record[440..444].copy_from_slice(&id.to_le_bytes());
        let entries = [
            Entry::new(BOOT_TYPE, BOOT_START, MODEL_START)?,
            Entry::new(MODEL_TYPE, MODEL_START, MODEL_START + self.model)?,
        ];
        record[446..446 + 32].copy_from_slice(entries.as_bytes());
        record[510..].copy_from_slice(&[0x55, 0xaa]);
        let mut disk = file;
        disk.seek(SeekFrom::Start(0))?;
        disk.write_all(&record).context("writing the partition table")?;

        let mut volume = BufStream::new(StreamSlice::new(disk, BOOT_START, MODEL_START)?);
        let options = FormatVolumeOptions::new()
            .fat_type(FatType::Fat32)
            .bytes_per_cluster(512)
            .volume_id(id)
            .volume_label(*b"FOREBAY    ");
        fatfs::format_volume(&mut volume, options).context("making the boot partition")?;
        volume.seek(SeekFrom::Start(0))?;
        let volume = FileSystem::new(volume, FsOptions::new()).context("opening the boot partition")?;
        volume.root_dir().create_file("config.txt")?.write_all(CONFIG.as_bytes())?;
        if let Some(words) = boot.words {
            volume.root_dir().create_file("cmdline.txt")?.write_all(format!(" -- {words}\n").as_bytes())?;
        }
        if let Some(folder) = boot.firmware {
            copy_folder(folder, &volume.root_dir())?;
        }
        if let Some(kernel) = boot.kernel {
            copy_file(kernel, &volume.root_dir(), "kernel8.img")?;
        }
        volume.unmount().context("finishing the boot partition")?;
        Ok(())
    }
}

/// Copies what is in `folder`, in order of names.
fn copy_folder<T: Read + Write + Seek>(folder: &Path, to: &fatfs::Dir<'_, T>) -> Result<()> {
    let what = || format!("reading {}", folder.display());
    let mut paths = std::fs::read_dir(folder)
        .with_context(what)?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<Vec<PathBuf>>>()
        .with_context(what)?;
    paths.sort();
    for path in paths {
        let name = path.file_name().and_then(|name| name.to_str());
        let name = name.with_context(|| format!("{}: its name is not text", path.display()))?;
        if path.is_dir() {
            copy_folder(&path, &to.create_dir(name).with_context(|| format!("making {name} on the boot partition"))?)?;
        } else {
            copy_file(&path, to, name)?;
        }
    }
    Ok(())
}

fn copy_file<T: Read + Write + Seek>(path: &Path, to: &fatfs::Dir<'_, T>, name: &str) -> Result<()> {
    let mut from = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let room = MODEL_START - BOOT_START;
    let len = from.metadata()?.len();
    ensure!(len < room, "{} has {len} bytes; the boot partition has {room}", path.display());
    let what = || format!("copying {} to the boot partition", path.display());
    let mut file = to.create_file(name).with_context(what)?;
    file.truncate().with_context(what)?;
    std::io::copy(&mut from, &mut file).with_context(what)?;
    Ok(())
}
