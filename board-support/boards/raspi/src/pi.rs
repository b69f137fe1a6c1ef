//! Which Raspberry Pi this is.

use core::ptr::NonNull;

use aarch64_cpu::registers::{MIDR_EL1, Readable};
use arm_pl011_uart::{PL011Registers, Uart, UniqueMmioPointer};

/// The boards that this program knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pi {
    /// BCM2837: 3 B, 3 B+, 3 A+, CM3, Zero 2 W, and a 2 B of revision 1.2.
    Three,
    /// BCM2711: 4 B, 400, CM4.
    Four,
}

impl Pi {
    /// The processor's part number tells.
    pub fn identify() -> Option<Self> {
        match MIDR_EL1.read(MIDR_EL1::PartNum) {
            0xd03 => Some(Self::Three),
            0xd08 => Some(Self::Four),
            _ => None,
        }
    }

    /// Name of the board.
    pub fn name(self) -> &'static str {
        match self {
            Self::Three => "raspi3",
            Self::Four => "raspi4",
        }
    }

    /// Where the peripherals begin.
    pub fn peripherals(self) -> usize {
        match self {
            Self::Three => 0x3f00_0000,
            Self::Four => 0xfe00_0000,
        }
    }

    /// The PL011.
    pub fn console(self) -> Uart<'static> {
        let registers = core::ptr::with_exposed_provenance_mut::<PL011Registers>(self.peripherals() + 0x20_1000);
        let registers = NonNull::new(registers).expect("not null");
        // SAFETY: this board's PL011, mapped as device memory; one console at a time writes to it: main's, or that of
        // the panic that ended main.
        Uart::new(unsafe { UniqueMmioPointer::new(registers) })
    }
}
