//! Boards: what is known about each, and the file that it boots from or reads.
//!
//! [`BOARDS`] is the one table of facts. `forebay boards` prints it, `forebay image` plans by it, and a test holds the
//! boards' sources and their READMEs to it.

mod card;
mod medium;

pub use card::{BOOT_START, BootFiles, Card, MODEL_START, MODEL_TYPE};
pub use medium::{Written, write_medium};

use serde::Serialize;

/// A board, or an emulated machine.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Board {
    /// Its name, which is that of its folder in `board-support/boards`.
    pub name: &'static str,
    /// The machine.
    pub machine: &'static str,
    /// Compiler's name of the target.
    pub target: &'static str,
    /// Bytes of RAM in the board's memory map.
    pub ram: u64,
    /// Bytes of the static arena that the model lives in.
    pub arena: u64,
    /// Bytes of the stack.
    pub stack: u64,
    /// Where an image can be; the first is what `forebay image` makes unless told.
    pub media: &'static [Medium],
}

/// What an image lies on.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Medium {
    /// Kind of device.
    pub kind: MediumKind,
    /// The device.
    pub device: &'static str,
    /// Bytes, where the device has one size.
    pub len: Option<u64>,
    /// Smallest read in bytes: an image's page must be a multiple.
    pub block: u32,
    /// Whether the processor reads it as memory: then weights are used where they lie.
    pub mapped: bool,
    /// How fast large reads are.
    pub bandwidth: Bandwidth,
}

/// Kinds of devices.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum MediumKind {
    /// A block device that holds the image from its first byte on.
    Disk,
    /// Flash that holds the image from its first byte on and is erased behind it.
    Flash,
    /// An SD card with a boot partition and a partition that is the image.
    Card,
}

impl MediumKind {
    /// Its name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Flash => "flash",
            Self::Card => "card",
        }
    }
}

/// Bytes a second of large reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Bandwidth {
    /// Bytes a second.
    pub bytes_per_second: u64,
    /// How that is known.
    pub basis: Basis,
}

/// How a figure is known.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Basis {
    /// Seen under QEMU on one PC. It says nothing about a real board.
    Emulated,
    /// Usual for devices of this class, from their interface's standard; not measured here.
    Typical,
}

impl Basis {
    /// The word for tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Emulated => "emulated",
            Self::Typical => "typical",
        }
    }
}

const MB: u64 = 1_000_000;

/// A virtio disk of an emulated machine. Bandwidth: [`Basis::Emulated`], read while the model computes.
const fn virtio(bytes_per_second: u64) -> Medium {
    let bandwidth = Bandwidth { bytes_per_second, basis: Basis::Emulated };
    Medium { kind: MediumKind::Disk, device: "virtio-blk", len: None, block: 512, mapped: false, bandwidth }
}

/// Memory-mapped flash of an emulated machine.
const fn pflash(len: u64, bytes_per_second: u64) -> Medium {
    let bandwidth = Bandwidth { bytes_per_second, basis: Basis::Emulated };
    Medium {
        kind: MediumKind::Flash,
        device: "CFI flash, memory-mapped",
        len: Some(len),
        block: 1,
        mapped: true,
        bandwidth,
    }
}

/// Flash that a microcontroller reads as memory; the emulated machine has RAM in its place.
const fn mapped_flash(len: u64, bytes_per_second: u64) -> Medium {
    let bandwidth = Bandwidth { bytes_per_second, basis: Basis::Emulated };
    Medium { kind: MediumKind::Flash, device: "memory-mapped flash", len: Some(len), block: 1, mapped: true, bandwidth }
}

/// A SPI NOR chip, read a byte at a time through a FIFO.
const fn spi_nor(len: u64, bytes_per_second: u64) -> Medium {
    let bandwidth = Bandwidth { bytes_per_second, basis: Basis::Emulated };
    Medium { kind: MediumKind::Flash, device: "SPI NOR flash", len: Some(len), block: 1, mapped: false, bandwidth }
}

/// An SD card. Bandwidth: [`Basis::Emulated`], without DMA.
const fn sd_card(bytes_per_second: u64) -> Medium {
    let bandwidth = Bandwidth { bytes_per_second, basis: Basis::Emulated };
    Medium { kind: MediumKind::Card, device: "SD card", len: None, block: 512, mapped: false, bandwidth }
}

/// All boards.
pub const BOARDS: &[Board] = &[
    Board {
        name: "aarch64-virt",
        machine: "QEMU virt, Cortex-A53, A72 or A76",
        target: "aarch64-unknown-none",
        ram: 14 << 20,
        arena: 2640 << 10,
        stack: 56 << 10,
        media: &[pflash(64 << 20, 20 * MB), virtio(20 * MB)],
    },
    Board {
        name: "mps2-an386",
        machine: "Arm MPS2 with AN386, Cortex-M4F, run in QEMU only",
        target: "thumbv7em-none-eabihf",
        ram: 4 << 20,
        arena: 384 << 10,
        stack: 40 << 10,
        media: &[mapped_flash(16 << 20, 10 * MB)],
    },
    Board {
        name: "raspi",
        machine: "Raspberry Pi 3 and 4, booted in QEMU only",
        target: "aarch64-unknown-none",
        ram: 940 << 20,
        arena: 936 << 20,
        stack: 64 << 10,
        media: &[sd_card(2 * MB)],
    },
    Board {
        name: "riscv64-virt",
        machine: "QEMU virt, RV64GC, machine mode",
        target: "riscv64gc-unknown-none-elf",
        ram: 14 << 20,
        arena: 2648 << 10,
        stack: 48 << 10,
        media: &[pflash(32 << 20, 15 * MB), virtio(15 * MB)],
    },
    Board {
        name: "riscv64-sbi",
        machine: "QEMU virt, RV64GC, supervisor mode under OpenSBI",
        target: "riscv64gc-unknown-none-elf",
        ram: 14 << 20,
        arena: 2648 << 10,
        stack: 48 << 10,
        media: &[pflash(32 << 20, 15 * MB), virtio(15 * MB)],
    },
    Board {
        name: "sifive-u",
        machine: "SiFive HiFive Unleashed, booted in QEMU only",
        target: "riscv64gc-unknown-none-elf",
        ram: 13 << 20,
        arena: 2648 << 10,
        stack: 48 << 10,
        media: &[spi_nor(32 << 20, MB * 7 / 10)],
    },
];

impl Board {
    /// The board of this name.
    #[must_use]
    pub fn by_name(name: &str) -> Option<&'static Self> {
        BOARDS.iter().find(|board| board.name == name)
    }

    /// Its medium of this kind.
    #[must_use]
    pub fn medium(&self, kind: MediumKind) -> Option<&'static Medium> {
        self.media.iter().find(|medium| medium.kind == kind)
    }
}
