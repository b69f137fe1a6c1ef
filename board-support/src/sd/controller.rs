//! The controller: registers, commands, bus clock.

use core::fmt;
use core::ptr::NonNull;

use safe_mmio::UniqueMmioPointer;
use safe_mmio::fields::ReadWrite;
use sdio_host::common_cmd::{Cmd, R1, R2, R3, Resp, Rz};
use sdio_host::sd_cmd::{R6, R7};

use super::SdError;
use crate::app::Clock;

/// Offsets of the registers, taken as words: some controllers know no narrower accesses.
pub(super) mod reg {
    pub const BLOCKS: usize = 0x04;
    pub const ARGUMENT: usize = 0x08;
    pub const COMMAND: usize = 0x0c;
    pub const RESPONSE: usize = 0x10;
    pub const DATA: usize = 0x20;
    pub const PRESENT: usize = 0x24;
    pub const HOST_CONTROL: usize = 0x28;
    pub const CLOCK: usize = 0x2c;
    pub const INTERRUPT: usize = 0x30;
    pub const INTERRUPT_ENABLE: usize = 0x34;
    pub const INTERRUPT_SIGNAL: usize = 0x38;
    pub const CAPABILITIES: usize = 0x40;
    pub const ADMA_ADDRESS: usize = 0x58;
}

/// Bits of [`reg::COMMAND`]: transfer mode below, command above.
pub(super) mod command {
    pub const DMA: u32 = 1;
    pub const BLOCK_COUNT: u32 = 1 << 1;
    pub const AUTO_STOP: u32 = 1 << 2;
    pub const READ: u32 = 1 << 4;
    pub const MULTIPLE: u32 = 1 << 5;
    pub const RESPONSE_136: u32 = 1 << 16;
    pub const RESPONSE_48: u32 = 2 << 16;
    pub const RESPONSE_48_BUSY: u32 = 3 << 16;
    pub const CHECK_CRC: u32 = 1 << 19;
    pub const CHECK_INDEX: u32 = 1 << 20;
    pub const DATA: u32 = 1 << 21;
    pub const ABORT: u32 = 3 << 22;
}

/// Bits of [`reg::PRESENT`].
pub(super) mod present {
    pub const COMMAND_BUSY: u32 = 1;
    pub const DATA_BUSY: u32 = 1 << 1;
}

/// Bits of [`reg::INTERRUPT`].
pub(super) mod interrupt {
    pub const COMMAND: u32 = 1;
    pub const TRANSFER: u32 = 1 << 1;
    pub const READ_READY: u32 = 1 << 5;
    pub const ERROR: u32 = 1 << 15;
    pub const COMMAND_TIMEOUT: u16 = 1;
}

/// Bits of [`reg::CLOCK`].
mod clock {
    pub const INTERNAL: u32 = 1;
    pub const STABLE: u32 = 1 << 1;
    pub const TO_CARD: u32 = 1 << 2;
    /// The longest time that the controller waits for data: 2^27 cycles.
    pub const DATA_TIMEOUT: u32 = 0xe << 16;
    pub const RESET_ALL: u32 = 1 << 24;
    pub const RESET_LINES: u32 = 3 << 25;
}

/// Bits of [`reg::HOST_CONTROL`].
mod host {
    pub const FOUR_BITS: u32 = 1 << 1;
    pub const ADMA2: u32 = 2 << 3;
    /// 3.3 V, on.
    pub const POWER: u32 = 0xf << 8;
}

/// Bit of [`reg::CAPABILITIES`].
const CAN_ADMA2: u32 = 1 << 19;

/// The command that ends a transfer, for which the controller stops what it is doing.
const STOP: u8 = 12;

/// Milliseconds that a command or a reset may take.
const LIMIT: u64 = 1000;

/// The words of a controller's registers.
pub trait Registers {
    /// Reads the word at a byte offset.
    fn read(&mut self, offset: usize) -> u32;
    /// Writes it.
    fn write(&mut self, offset: usize, value: u32);
}

/// Bytes of a controller's registers.
const REGISTERS_LEN: usize = 0x100;

/// Memory-mapped registers.
pub struct MmioRegisters(UniqueMmioPointer<'static, [ReadWrite<u32>; REGISTERS_LEN / 4]>);

impl fmt::Debug for MmioRegisters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MmioRegisters").field(&self.0.ptr()).finish()
    }
}

impl MmioRegisters {
    /// The registers at `base`.
    ///
    /// # Safety
    /// `base` is not 0; the 256 bytes there are a controller's registers, mapped as device memory and used by nothing
    /// else.
    pub unsafe fn new(base: usize) -> Self {
        let registers = core::ptr::with_exposed_provenance_mut(base);
        // SAFETY: the caller's promise.
        Self(unsafe { UniqueMmioPointer::new(NonNull::new_unchecked(registers)) })
    }
}

impl Registers for MmioRegisters {
    fn read(&mut self, offset: usize) -> u32 {
        self.0.get(offset / 4).map_or(0, |mut word| word.read())
    }
    fn write(&mut self, offset: usize, value: u32) {
        if let Some(mut word) = self.0.get(offset / 4) {
            word.write(value);
        }
    }
}

/// How a controller reads and writes memory.
#[derive(Clone, Copy, Debug)]
pub struct Dma {
    /// What the controller adds to a physical address: its address for physical address 0.
    pub offset: u32,
    /// Cleans and invalidates the data caches for these bytes, down to the memory that the controller sees.
    pub flush: fn(NonNull<[u8]>),
}

/// What a board knows about a controller.
#[derive(Clone, Copy, Debug)]
pub struct Wiring {
    /// Clock that comes in, in Hz; 0 if the controller's capabilities tell.
    pub base_clock: u32,
    /// DMA, if the controller can have it; its capabilities decide.
    pub dma: Option<Dma>,
    /// Arasan's controllers lose a write that comes within two cycles of the card's clock after another one.
    pub slow_writes: bool,
}

/// A controller.
#[derive(Debug)]
pub struct Controller<R> {
    registers: R,
    wiring: Wiring,
    clock: Clock,
    /// Ticks to let pass after a write.
    write_gap: u64,
}

/// What the controller is to check in a response.
pub trait Checked: Resp {
    /// Bits for the command register.
    const FLAGS: u32;
}
impl Checked for Rz {
    const FLAGS: u32 = 0;
}
impl Checked for R1 {
    const FLAGS: u32 = command::RESPONSE_48 | command::CHECK_CRC | command::CHECK_INDEX;
}
impl Checked for R2 {
    const FLAGS: u32 = command::RESPONSE_136 | command::CHECK_CRC;
}
impl Checked for R3 {
    const FLAGS: u32 = command::RESPONSE_48;
}
impl Checked for R6 {
    const FLAGS: u32 = R1::FLAGS;
}
impl Checked for R7 {
    const FLAGS: u32 = R1::FLAGS;
}

impl<R: Registers> Controller<R> {
    /// A controller that has not been touched yet.
    pub fn new(registers: R, wiring: Wiring, clock: Clock) -> Self {
        Self { registers, wiring, clock, write_gap: 0 }
    }

    #[cfg(test)]
    pub(super) fn registers_mut(&mut self) -> &mut R {
        &mut self.registers
    }

    pub(super) fn now(&self) -> u64 {
        (self.clock.now)()
    }

    pub(super) fn read(&mut self, offset: usize) -> u32 {
        self.registers.read(offset)
    }

    pub(super) fn write(&mut self, offset: usize, value: u32) {
        self.registers.write(offset, value);
        let start = self.now();
        while self.now().wrapping_sub(start) < self.write_gap {
            core::hint::spin_loop();
        }
    }

    /// Waits a number of milliseconds.
    pub(super) fn pause(&self, milliseconds: u64) {
        let start = self.now();
        while self.now().wrapping_sub(start) < self.ticks(milliseconds) {
            core::hint::spin_loop();
        }
    }

    fn ticks(&self, milliseconds: u64) -> u64 {
        self.clock.hertz.saturating_mul(milliseconds) / 1000
    }

    /// Polls until `done`, for as long as the standard's slowest answer takes.
    fn wait_until(&mut self, what: &'static str, mut done: impl FnMut(&mut Self) -> bool) -> Result<(), SdError> {
        let start = self.now();
        while !done(self) {
            if self.now().wrapping_sub(start) > self.ticks(LIMIT) {
                return Err(SdError::Controller(what));
            }
            core::hint::spin_loop();
        }
        Ok(())
    }

    /// Resets everything, switches the card's power on and shows it the clock for identification.
    pub fn reset(&mut self) -> Result<(), SdError> {
        self.write_gap = 0;
        self.write(reg::CLOCK, clock::RESET_ALL);
        self.wait_until("reset", |c| c.read(reg::CLOCK) & clock::RESET_ALL == 0)?;
        let adma = if self.dma().is_some() { host::ADMA2 } else { 0 };
        self.write(reg::HOST_CONTROL, host::POWER | adma);
        self.set_clock(400_000)?;
        // Everything is seen in the status register; nothing interrupts.
        self.write(reg::INTERRUPT_ENABLE, !0);
        self.write(reg::INTERRUPT_SIGNAL, 0);
        // The supply settles, and the card gets the 74 cycles that it needs.
        self.pause(2);
        Ok(())
    }

    /// Gives the card a clock of at most `hertz`.
    pub fn set_clock(&mut self, hertz: u32) -> Result<(), SdError> {
        let base = match self.wiring.base_clock {
            0 => (self.read(reg::CAPABILITIES) >> 8 & 0xff) * 1_000_000,
            base => base,
        };
        // The clock is base / (2 * divider), or base for 0; the divider has 10 bits, the upper two apart.
        let divider = if base <= hertz { 0 } else { base.div_ceil(2 * hertz).min(1023) };
        let bits = (divider & 0xff) << 8 | divider >> 8 << 6;
        self.write(reg::CLOCK, clock::DATA_TIMEOUT | bits | clock::INTERNAL);
        self.wait_until("starting the clock", |c| c.read(reg::CLOCK) & clock::STABLE != 0)?;
        self.write(reg::CLOCK, clock::DATA_TIMEOUT | bits | clock::INTERNAL | clock::TO_CARD);
        if self.wiring.slow_writes {
            self.write_gap = self.clock.hertz * 4 / u64::from(base.div_ceil(2 * divider.max(1)).max(1)) + 1;
        }
        Ok(())
    }

    /// Uses four data lines from now on.
    pub fn use_four_lines(&mut self) {
        let control = self.read(reg::HOST_CONTROL);
        self.write(reg::HOST_CONTROL, control | host::FOUR_BITS);
    }

    /// How to have DMA, if board and controller offer it.
    pub fn dma(&mut self) -> Option<Dma> {
        let dma = self.wiring.dma?;
        (self.read(reg::CAPABILITIES) & CAN_ADMA2 != 0).then_some(dma)
    }

    /// Sends a command without data and gives the first word of its response.
    pub fn command<T: Checked>(&mut self, cmd: Cmd<T>) -> Result<u32, SdError> {
        self.send(cmd.cmd, cmd.arg, T::FLAGS)?;
        Ok(self.read(reg::RESPONSE))
    }

    /// Sends a command after which the card may keep data line 0 low while it is busy.
    pub fn command_busy(&mut self, cmd: Cmd<R1>) -> Result<u32, SdError> {
        let kind = if cmd.cmd == STOP { command::ABORT } else { 0 };
        let flags = command::RESPONSE_48_BUSY | command::CHECK_CRC | command::CHECK_INDEX;
        self.send(cmd.cmd, cmd.arg, flags | kind)?;
        self.wait_until("the card's being busy", |c| c.read(reg::PRESENT) & present::DATA_BUSY == 0)?;
        self.write(reg::INTERRUPT, interrupt::TRANSFER);
        Ok(self.read(reg::RESPONSE))
    }

    /// The response of a command with a long one: bits 127 to 0 of the card's register, the CRC taken as 0.
    pub fn long_response(&mut self) -> [u32; 4] {
        let words: [u32; 4] = core::array::from_fn(|i| self.read(reg::RESPONSE + 4 * i));
        core::array::from_fn(|i| words[i] << 8 | if i == 0 { 0 } else { words[i - 1] >> 24 })
    }

    fn send(&mut self, index: u8, argument: u32, flags: u32) -> Result<(), SdError> {
        self.wait_until("the last command", |c| c.read(reg::PRESENT) & present::COMMAND_BUSY == 0)?;
        self.start(index, argument, flags);
        let mut seen = 0;
        let waited = self.wait_until("a command", |c| {
            seen = c.read(reg::INTERRUPT);
            seen & (interrupt::COMMAND | interrupt::ERROR) != 0
        });
        if seen & interrupt::ERROR != 0 {
            let errors = (seen >> 16) as u16;
            self.reset_lines()?;
            return Err(SdError::Command { index, errors });
        }
        waited?;
        self.write(reg::INTERRUPT, interrupt::COMMAND);
        Ok(())
    }

    /// Starts a command and returns at once.
    pub(super) fn start(&mut self, index: u8, argument: u32, flags: u32) {
        self.write(reg::INTERRUPT, !0);
        self.write(reg::ARGUMENT, argument);
        self.write(reg::COMMAND, u32::from(index) << 24 | flags);
    }

    /// Ends whatever command or transfer is under way. No DMA goes on afterwards.
    pub(super) fn reset_lines(&mut self) -> Result<(), SdError> {
        let clock = self.read(reg::CLOCK);
        self.write(reg::CLOCK, clock | clock::RESET_LINES);
        let reset = self.wait_until("reset", |c| c.read(reg::CLOCK) & clock::RESET_LINES == 0);
        self.write(reg::INTERRUPT, !0);
        reset
    }
}
