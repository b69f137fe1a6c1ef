//! Devices of SiFive's FU540 and its relatives: UART, SPI controller, timer.
//!
//! Registers are those of the FU540-C000 manual, chapters 9 (CLINT), 13 (UART) and 19 (SPI).

use core::convert::Infallible;
use core::ptr::NonNull;

use embedded_io::{ErrorType, Read, ReadReady, Write};

use crate::spi_nor::Port;

/// The registers of one device, 32 bits each.
#[derive(Debug)]
struct Registers(NonNull<u32>);

impl Registers {
    /// # Safety
    /// At `base` are the registers of a device, which nobody else uses; all offsets given later are among them.
    unsafe fn new(base: usize) -> Self {
        let base = core::ptr::with_exposed_provenance_mut(base);
        Self(NonNull::new(base).expect("no device is at address 0"))
    }
    fn read(&self, offset: usize) -> u32 {
        // SAFETY: the promise to `new`.
        unsafe { self.0.byte_add(offset).read_volatile() }
    }
    fn write(&mut self, offset: usize, value: u32) {
        // SAFETY: the promise to `new`.
        unsafe { self.0.byte_add(offset).write_volatile(value) }
    }
}

/// Set in a data register when the FIFO is empty (reading) or full (writing).
const NOT_NOW: u32 = 1 << 31;

/// A UART as a console.
#[derive(Debug)]
pub struct Uart {
    registers: Registers,
    /// A byte that was taken from the FIFO by looking whether there is one.
    ahead: Option<u8>,
}

impl Uart {
    const TX_DATA: usize = 0x00;
    const RX_DATA: usize = 0x04;
    const TX_CONTROL: usize = 0x08;
    const RX_CONTROL: usize = 0x0c;
    const DIVISOR: usize = 0x18;

    /// Switches the UART at `base` on. `clock_hertz` is its input clock; 0 leaves the speed as firmware has set it.
    ///
    /// # Safety
    /// At `base` is such a UART, which nobody else uses while this value lives.
    pub unsafe fn new(base: usize, clock_hertz: u32, baud: u32) -> Self {
        // SAFETY: the caller's promise.
        let mut registers = unsafe { Registers::new(base) };
        if clock_hertz > 0 {
            registers.write(Self::DIVISOR, (clock_hertz / baud.max(1)).saturating_sub(1));
        }
        registers.write(Self::TX_CONTROL, 1);
        registers.write(Self::RX_CONTROL, 1);
        Self { registers, ahead: None }
    }

    fn take(&mut self) -> Option<u8> {
        self.ahead.take().or_else(|| {
            let data = self.registers.read(Self::RX_DATA);
            (data & NOT_NOW == 0).then_some(data as u8)
        })
    }
}

impl ErrorType for Uart {
    type Error = Infallible;
}

impl Write for Uart {
    fn write(&mut self, buf: &[u8]) -> Result<usize, Infallible> {
        let Some(&byte) = buf.first() else { return Ok(0) };
        while self.registers.read(Self::TX_DATA) & NOT_NOW != 0 {
            core::hint::spin_loop();
        }
        self.registers.write(Self::TX_DATA, byte.into());
        Ok(1)
    }

    fn flush(&mut self) -> Result<(), Infallible> {
        Ok(())
    }
}

impl Read for Uart {
    fn read(&mut self, buf: &mut [u8]) -> Result<usize, Infallible> {
        let Some(place) = buf.first_mut() else { return Ok(0) };
        *place = loop {
            if let Some(byte) = self.take() {
                break byte;
            }
            core::hint::spin_loop();
        };
        Ok(1)
    }
}

impl ReadReady for Uart {
    fn read_ready(&mut self) -> Result<bool, Infallible> {
        self.ahead = self.take();
        Ok(self.ahead.is_some())
    }
}

/// A SPI controller, on one data line each way.
#[derive(Debug)]
pub struct Spi(Registers);

impl Spi {
    const DIVISOR: usize = 0x00;
    const MODE: usize = 0x04;
    const CHIP: usize = 0x10;
    const CHIP_IDLE: usize = 0x14;
    const CHIP_MODE: usize = 0x18;
    const FORMAT: usize = 0x40;
    const TX_DATA: usize = 0x48;
    const RX_DATA: usize = 0x4c;
    const FLASH: usize = 0x60;
    /// Chip select is released after every byte.
    const AUTO: u32 = 0;
    /// Chip select is held from the next byte on.
    const HOLD: u32 = 2;

    /// Takes the controller at `base` out of its memory-mapped mode. The clock is the controller's input clock over
    /// `2 * (divisor + 1)`.
    ///
    /// # Safety
    /// At `base` is such a controller, which nobody else uses, and no code runs from its flash.
    pub unsafe fn new(base: usize, chip: u32, divisor: u32) -> Self {
        // SAFETY: the caller's promise.
        let mut registers = unsafe { Registers::new(base) };
        registers.write(Self::FLASH, 0);
        registers.write(Self::DIVISOR, divisor);
        registers.write(Self::MODE, 0);
        registers.write(Self::CHIP, chip);
        // All chip selects are high when nothing is selected.
        registers.write(Self::CHIP_IDLE, u32::MAX);
        registers.write(Self::FORMAT, 8 << 16);
        registers.write(Self::CHIP_MODE, Self::AUTO);
        // What is left of whoever used it before.
        while registers.read(Self::RX_DATA) & NOT_NOW == 0 {}
        Self(registers)
    }
}

impl Port for Spi {
    const DEPTH: usize = 8;

    fn select(&mut self, on: bool) {
        self.0.write(Self::CHIP_MODE, if on { Self::HOLD } else { Self::AUTO });
        while !on && self.0.read(Self::RX_DATA) & NOT_NOW == 0 {}
    }

    fn send(&mut self, byte: u8) {
        self.0.write(Self::TX_DATA, byte.into());
    }

    fn receive(&mut self) -> Option<u8> {
        let data = self.0.read(Self::RX_DATA);
        (data & NOT_NOW == 0).then_some(data as u8)
    }
}

/// `mtime` of the CLINT at 0x0200_0000, for machine mode on harts that have no `time` counter.
pub fn clint_time() -> u64 {
    // SAFETY: every board that uses this module has its CLINT there; the register is only read.
    unsafe { core::ptr::with_exposed_provenance::<u64>(0x0200_bff8).read_volatile() }
}
