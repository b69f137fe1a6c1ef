//! A controller with a card for tests: registers that behave, time that passes when it is looked at, and faults.

extern crate std;

use std::cell::Cell;
use std::vec::Vec;

use super::BLOCK;
use super::controller::{Registers, Wiring, command, interrupt, reg};
use crate::app::Clock;

std::thread_local! {
    static TIME: Cell<u64> = const { Cell::new(0) };
}

fn now() -> u64 {
    TIME.set(TIME.get() + 1);
    TIME.get()
}

/// A clock of one tick a look, which stands for ten microseconds.
pub const CLOCK: Clock = Clock { now, hertz: 100_000 };

pub const WIRING: Wiring = Wiring { base_clock: 0, dma: None, slow_writes: true };

/// What the simulated card does wrong.
#[derive(Clone, Copy, Default, PartialEq, Debug)]
pub struct Faults {
    /// There is no card.
    pub absent: bool,
    /// The card never becomes ready.
    pub busy: bool,
    /// From this block of a transfer on, no data comes.
    pub silent_from: Option<usize>,
    /// Times that a transfer's first block comes with a wrong CRC.
    pub bad_crcs: usize,
    /// Read commands are answered with this status.
    pub status: u32,
    /// The lines cannot be reset any more.
    pub no_reset: bool,
    /// Looks at the interrupt status between two blocks.
    pub latency: usize,
}

/// A controller and its card.
pub struct Simulated {
    words: [u32; 64],
    pub content: Vec<u8>,
    pub faults: Faults,
    /// The card's addresses are blocks.
    pub high_capacity: bool,
    /// Bytes that are still to be sent, and how many of the transfer were.
    sending: Option<(usize, usize, usize)>,
    looks: usize,
    word: usize,
    app: bool,
    /// Numbers of the commands seen.
    pub commands: Vec<u8>,
}

impl Simulated {
    pub fn new(content: Vec<u8>, faults: Faults) -> Self {
        assert!(content.len().is_multiple_of(1024 * BLOCK), "the card's description counts in 512 KiB");
        let mut words = [0; 64];
        words[reg::CAPABILITIES / 4] = 52 << 8;
        let (sending, looks, word, app) = (None, 0, 0, false);
        Self { words, content, faults, high_capacity: true, sending, looks, word, app, commands: Vec::new() }
    }

    fn fail(&mut self, bit: u16) {
        self.words[reg::INTERRUPT / 4] |= u32::from(bit) << 16 | interrupt::ERROR;
    }

    fn run(&mut self, value: u32) {
        let (index, argument) = ((value >> 24) as u8, self.words[reg::ARGUMENT / 4]);
        self.commands.push(index);
        let app = core::mem::take(&mut self.app);
        if self.faults.absent && index != 0 {
            return self.fail(interrupt::COMMAND_TIMEOUT);
        }
        let blocks = if index == 17 { 1 } else { (self.words[reg::BLOCKS / 4] >> 16) as usize };
        let response = &mut self.words[reg::RESPONSE / 4..][..4];
        match index {
            8 if !self.high_capacity => return self.fail(interrupt::COMMAND_TIMEOUT),
            8 => response[0] = argument,
            55 => self.app = true,
            41 if app => {
                let ready = if self.faults.busy { 0 } else { 1 << 31 };
                response[0] = ready | u32::from(self.high_capacity) << 30 | argument & 0xff_8000;
            }
            3 => response[0] = 0x1234 << 16,
            9 => {
                assert_eq!(argument, 0x1234 << 16);
                let blocks = (self.content.len() / BLOCK) as u128;
                let description: u128 = if self.high_capacity {
                    1 << 126 | 9 << 80 | (blocks / 1024 - 1) << 48
                } else {
                    // Blocks of 1024 bytes, multiplier 512.
                    10 << 80 | (blocks / 1024 - 1) << 62 | 7 << 47
                };
                for (i, word) in response.iter_mut().enumerate() {
                    *word = (description >> (8 + 32 * i)) as u32;
                }
            }
            17 | 18 => {
                assert_eq!(value & command::MULTIPLE != 0, index == 18);
                let from = if self.high_capacity { argument as usize * BLOCK } else { argument as usize };
                response[0] = self.faults.status;
                if self.faults.bad_crcs > 0 {
                    self.faults.bad_crcs -= 1;
                    self.sending = None;
                    return self.fail(1 << 5);
                }
                self.sending = Some((from, blocks * BLOCK, 0));
                (self.looks, self.word) = (0, 0);
            }
            _ => response[0] = 0x900,
        }
        self.words[reg::INTERRUPT / 4] |= interrupt::COMMAND;
        if index == 12 {
            self.sending = None;
        }
    }
}

impl Registers for Simulated {
    fn read(&mut self, offset: usize) -> u32 {
        match offset {
            reg::INTERRUPT => {
                self.looks += 1;
                if let Some((_, len, sent)) = self.sending
                    && sent < len
                    && self.word == 0
                    && self.looks > self.faults.latency
                    && self.faults.silent_from.is_none_or(|from| sent / BLOCK < from)
                {
                    self.words[offset / 4] |= interrupt::READ_READY;
                }
            }
            reg::DATA => {
                let (from, len, sent) = self.sending.expect("data is being sent");
                let bytes = &self.content[from + sent + 4 * self.word..][..4];
                let value = u32::from_le_bytes(bytes.try_into().unwrap());
                self.word += 1;
                if self.word == BLOCK / 4 {
                    self.sending = Some((from, len, sent + BLOCK));
                    (self.word, self.looks) = (0, 0);
                    if sent + BLOCK == len {
                        self.words[reg::INTERRUPT / 4] |= interrupt::TRANSFER;
                        self.sending = None;
                    }
                }
                return value;
            }
            _ => {}
        }
        self.words[offset / 4]
    }

    fn write(&mut self, offset: usize, value: u32) {
        match offset {
            reg::INTERRUPT => self.words[offset / 4] &= !value,
            reg::CLOCK => {
                let lines = value >> 25 & 3;
                if lines != 0 {
                    self.sending = None;
                }
                // Resets end at once, and the clock is stable.
                let keep = if self.faults.no_reset { lines << 25 } else { 0 };
                self.words[offset / 4] = value & 0xff_ffff | keep | 2;
            }
            reg::COMMAND => self.run(value),
            _ => self.words[offset / 4] = value,
        }
    }
}
