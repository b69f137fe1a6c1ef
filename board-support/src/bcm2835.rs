//! What the Raspberry Pi's chips from BCM2835 to BCM2711 have in common: the mailbox to the firmware on their video
//! core, and the pins. Addresses are offsets from where the peripherals begin: 0x3f00_0000 on BCM2837 (Pi 3),
//! 0xfe00_0000 on BCM2711 (Pi 4).
//!
//! Sources: Broadcom's "BCM2835 ARM Peripherals" and "BCM2711 ARM Peripherals"; the firmware's wiki on the mailbox
//! property interface.

use core::fmt;
use core::ptr::NonNull;

use safe_mmio::UniqueMmioPointer;
use safe_mmio::fields::{ReadPureWrite, ReadWrite};

use crate::app::Clock;

/// Milliseconds that the firmware may take for an answer.
const LIMIT: u64 = 500;

/// Clocks that the firmware knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum ClockId {
    /// Of the Arasan SD controller.
    Emmc = 1,
    /// Of the PL011.
    Uart = 2,
    /// Of the second SD controller (BCM2711).
    Emmc2 = 12,
}

/// Bytes of the mailboxes' registers.
const MAILBOX_LEN: usize = 0x40;
const MAILBOX_READ: usize = 0;
const MAILBOX_READ_STATUS: usize = 0x18;
const MAILBOX_WRITE: usize = 0x20;
const MAILBOX_WRITE_STATUS: usize = 0x38;
const FULL: u32 = 1 << 31;
const EMPTY: u32 = 1 << 30;
/// The channel for properties.
const PROPERTIES: u32 = 8;
/// Where the video core sees memory, uncached.
const BUS: u32 = 0xc000_0000;
const ANSWERED: u32 = 1 << 31;

/// A message: its length, 0, a tag with two words of values, the end. Has its cache lines to itself.
#[repr(C, align(128))]
struct Message([u32; 32]);

/// The mailbox to the firmware.
pub struct Mailbox {
    registers: UniqueMmioPointer<'static, [ReadWrite<u32>; MAILBOX_LEN / 4]>,
    clock: Clock,
    flush: fn(NonNull<[u8]>),
}

impl fmt::Debug for Mailbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Mailbox").field(&self.registers.ptr()).finish()
    }
}

impl Mailbox {
    /// The mailbox of the peripherals at `base`. `flush` writes cached bytes back to memory and forgets them.
    ///
    /// # Safety
    /// `base` is where the peripherals are mapped, as device memory; nothing else uses the mailbox.
    pub unsafe fn new(base: usize, clock: Clock, flush: fn(NonNull<[u8]>)) -> Self {
        let registers = core::ptr::with_exposed_provenance_mut(base + 0xb880);
        // SAFETY: the caller's promise; the address is not 0.
        Self { registers: unsafe { UniqueMmioPointer::new(NonNull::new_unchecked(registers)) }, clock, flush }
    }

    fn read(&mut self, offset: usize) -> u32 {
        self.registers.get(offset / 4).map_or(0, |mut word| word.read())
    }

    fn wait_for(&mut self, mut done: impl FnMut(&mut Self) -> bool) -> Option<()> {
        let start = (self.clock.now)();
        while !done(self) {
            if (self.clock.now)().wrapping_sub(start) > self.clock.hertz / 1000 * LIMIT {
                return None;
            }
            core::hint::spin_loop();
        }
        Some(())
    }

    /// Asks for a property of two words. `None` if the firmware does not answer or does not know it.
    fn property(&mut self, tag: u32, value: [u32; 2]) -> Option<[u32; 2]> {
        let mut message = Message([0; 32]);
        message.0[..7].copy_from_slice(&[8 * 4, 0, tag, 8, 0, value[0], value[1]]);
        let words = NonNull::from(&mut message.0).cast::<u32>();
        let bytes = NonNull::slice_from_raw_parts(words.cast::<u8>(), size_of::<Message>());
        let letter = words.as_ptr().expose_provenance() as u32 & !BUS | BUS | PROPERTIES;
        (self.flush)(bytes);
        self.wait_for(|m| m.read(MAILBOX_WRITE_STATUS) & FULL == 0)?;
        self.registers.get(MAILBOX_WRITE / 4)?.write(letter);
        self.wait_for(|m| m.read(MAILBOX_READ_STATUS) & EMPTY == 0 && m.read(MAILBOX_READ) == letter)?;
        (self.flush)(bytes);
        // SAFETY: inside of the message, which the firmware has finished with.
        let word = |i| unsafe { words.add(i).read_volatile() };
        (word(1) == ANSWERED && word(4) & ANSWERED != 0).then(|| [word(5), word(6)])
    }

    /// Hertz of a clock.
    pub fn clock_rate(&mut self, clock: ClockId) -> Option<u32> {
        let [_, hertz] = self.property(0x0003_0002, [clock as u32, 0])?;
        (hertz > 0).then_some(hertz)
    }

    /// The end of the memory that the firmware leaves to this processor; it starts at 0.
    pub fn memory_end(&mut self) -> Option<usize> {
        let [start, len] = self.property(0x0001_0005, [0; 2])?;
        (len > 0).then_some(start as usize + len as usize)
    }
}

/// What a pin does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Function {
    /// An input.
    Input = 0,
    /// The pin's first alternative function.
    Alt0 = 4,
    /// Its fourth.
    Alt3 = 7,
}

/// Bytes of the pins' registers.
const GPIO_LEN: usize = 0xf4;

/// The pins.
pub struct Gpio(UniqueMmioPointer<'static, [ReadPureWrite<u32>; GPIO_LEN / 4]>);

impl fmt::Debug for Gpio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Gpio").field(&self.0.ptr()).finish()
    }
}

impl Gpio {
    /// The pins of the peripherals at `base`.
    ///
    /// # Safety
    /// `base` is where the peripherals are mapped, as device memory; nothing else uses the pins.
    pub unsafe fn new(base: usize) -> Self {
        let registers = core::ptr::with_exposed_provenance_mut(base + 0x20_0000);
        // SAFETY: the caller's promise; the address is not 0.
        Self(unsafe { UniqueMmioPointer::new(NonNull::new_unchecked(registers)) })
    }

    fn change(&mut self, offset: usize, mask: u32, bits: u32) {
        if let Some(mut word) = self.0.get(offset / 4) {
            let old = word.read();
            word.write(old & !mask | bits);
        }
    }

    /// Gives pins a function.
    pub fn select(&mut self, pins: core::ops::RangeInclusive<usize>, function: Function) {
        for pin in pins {
            // Ten pins a word, three bits each.
            let shift = pin % 10 * 3;
            self.change(pin / 10 * 4, 7 << shift, (function as u32) << shift);
        }
    }

    /// Switches the pull resistors of the pins 0 to 31 in `mask` off, as BCM2837 wants it: the setting is taken over
    /// by a pulse on the pins' clocks, with 150 cycles before and after.
    pub fn no_pulls_bcm2837(&mut self, mask: u32, clock: &Clock) {
        const PULL: usize = 0x94;
        const PULL_CLOCK: usize = 0x98;
        let pause = || {
            let start = (clock.now)();
            while (clock.now)().wrapping_sub(start) < clock.hertz / 200_000 + 1 {
                core::hint::spin_loop();
            }
        };
        self.change(PULL, !0, 0);
        pause();
        self.change(PULL_CLOCK, !0, mask);
        pause();
        self.change(PULL_CLOCK, !0, 0);
    }

    /// Switches the pull resistors of the pins 0 to 15 in `mask` off, as BCM2711 wants it: two bits a pin.
    pub fn no_pulls_bcm2711(&mut self, mask: u16) {
        for pin in (0..16).filter(|pin| mask >> pin & 1 != 0) {
            self.change(0xe4, 3 << (2 * pin), 0);
        }
    }
}
