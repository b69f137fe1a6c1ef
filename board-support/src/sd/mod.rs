//! SD cards behind a controller of the SD Host Controller standard (SDHCI), read-only.
//!
//! | module | |
//! |---|---|
//! | [`controller`] | the controller: registers, commands, bus clock (SD Host Controller Simplified Specification 3.00) |
//! | [`card`] | from a card in a slot to one that can be read (SD Physical Layer Simplified Specification, 4.2) |
//! | [`partition`] | where on the card the image is |
//! | [`store`] | the block store: multi-block reads, by DMA or by hand |
//!
//! Reads are driven by polling, and every wait has an end. What the card's registers mean, [`sdio_host`] knows.

pub mod card;
pub mod controller;
pub mod partition;
#[cfg(test)]
mod simulated;
pub mod store;

use core::fmt;

use heapless::Vec;

use crate::app::Clock;
use crate::board::Disk;
use crate::status::{HasStatus, Status};
use controller::{Controller, MmioRegisters, Wiring};
use store::SdStore;

/// Bytes of a block.
pub const BLOCK: usize = 512;

/// What went wrong with a card or its controller.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum SdError {
    /// Nothing answers in any slot.
    NoCard,
    /// The controller does not do what it must within the standard's time; what it was to do.
    Controller(&'static str),
    /// A command or a transfer failed: number of the command, and the upper half of the controller's interrupt status.
    Command {
        /// The command.
        index: u8,
        /// Error bits, the command's time-out first.
        errors: u16,
    },
    /// The card refused a command: its number, and the error bits of the card's status.
    Refused {
        /// The command.
        index: u8,
        /// Card status (R1).
        status: u32,
    },
    /// The card does not become ready.
    NotReady,
    /// The card answered with a pattern or a voltage that was not offered.
    Voltage,
    /// The card's first block has no partition for an image.
    NoPartition,
    /// The partition ends behind the card's end.
    PastEnd {
        /// Bytes to the partition's end.
        partition: u64,
        /// Bytes of the card.
        card: u64,
    },
    /// The card has not answered for as long as the store is patient.
    NoAnswer,
}

impl fmt::Display for SdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NoCard => f.write_str("there is no SD card, or it does not answer"),
            Self::Controller(what) => write!(f, "SD controller: no end of {what}"),
            Self::Command { index, errors } => {
                write!(f, "SD card: command {index}: {} (errors {errors:#06x})", first_error(errors))
            }
            Self::Refused { index, status } => {
                write!(f, "SD card: command {index} refused, card status {status:#010x}")
            }
            Self::NotReady => f.write_str("SD card: busy for more than a second after power-up"),
            Self::Voltage => f.write_str("SD card: does not work with 3.3 V"),
            Self::NoPartition => {
                let kind = partition::IMAGE_KIND;
                write!(f, "SD card: no partition of type {kind:#04x}; write one with `forebay image`")
            }
            Self::PastEnd { partition, card } => {
                write!(f, "SD card: the image's partition ends at byte {partition}, the card at byte {card}")
            }
            Self::NoAnswer => f.write_str("SD card: the card stopped answering"),
        }
    }
}

/// What the lowest error bit means.
fn first_error(errors: u16) -> &'static str {
    const MEANINGS: [&str; 10] = [
        "no response",
        "response with a wrong CRC",
        "response without an end bit",
        "response to another command",
        "no data in time",
        "data with a wrong CRC",
        "data without an end bit",
        "too much current",
        "the stop command failed",
        "DMA failed",
    ];
    MEANINGS.get(errors.trailing_zeros() as usize).unwrap_or(&"unknown error")
}

impl HasStatus for SdError {
    fn status(&self) -> Status {
        match self {
            Self::NoCard | Self::NoPartition => Status::NoDisk,
            Self::PastEnd { .. } => Status::Short,
            Self::NoAnswer | Self::NotReady | Self::Controller(_) => Status::NoAnswer,
            Self::Command { .. } | Self::Refused { .. } | Self::Voltage => Status::Device,
        }
    }
}

/// Most slots that a board has.
pub const SLOTS: usize = 2;

/// Controllers whose slots may hold the card; the first that does is taken.
#[derive(Debug)]
pub struct Slots(pub Vec<(MmioRegisters, Wiring), SLOTS>);

impl Disk for Slots {
    type Store = SdStore<MmioRegisters>;
    type Error = SdError;
    const KIND: &'static str = "SD card";

    fn bring_up(self, clock: &Clock, patience: u64) -> Result<Self::Store, SdError> {
        let mut failure = SdError::NoCard;
        for (registers, wiring) in self.0 {
            match card::Card::identify(Controller::new(registers, wiring, *clock)) {
                Ok(card) => return SdStore::new(card, patience),
                // What a slot with a card says is better than what an empty one says.
                Err(error) if failure == SdError::NoCard => failure = error,
                Err(_) => {}
            }
        }
        Err(failure)
    }
}
