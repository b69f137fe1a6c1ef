//! From a card in a slot to one that can be read.

use sdio_host::common_cmd;
use sdio_host::sd::{CSD, OCR, RCA, SD};
use sdio_host::sd_cmd;

use super::controller::{Controller, Registers, interrupt};
use super::{BLOCK, SdError};

/// Bits of a card's status (R1) that mean that the command was not done. Not among them: those that tell of the
/// command before, and that the card is locked.
pub(super) const STATUS_ERRORS: u32 = 0xfd39_0008;

/// Pattern that a card of version 2 or later sends back.
const PATTERN: u8 = 0xaa;
/// 2.7 to 3.6 V, as CMD8 and ACMD41 have it.
const VOLTAGE: u8 = 1;
const VOLTAGE_WINDOW: u16 = 0x1ff;
/// The default speed of every card.
const SPEED: u32 = 25_000_000;
/// Milliseconds that a card may take to power up.
const POWER_UP: u64 = 1000;

/// A card that is ready for reading.
#[derive(Debug)]
pub struct Card<R> {
    /// The controller of its slot.
    pub(super) controller: Controller<R>,
    /// Whether addresses are blocks (SDHC and later) rather than bytes.
    by_block: bool,
    blocks: u64,
}

impl<R: Registers> Card<R> {
    /// Resets the controller and identifies the card in its slot.
    ///
    /// # Errors
    /// [`SdError::NoCard`] if nothing answers.
    pub fn identify(mut controller: Controller<R>) -> Result<Self, SdError> {
        controller.reset()?;
        controller.command(common_cmd::idle())?;
        // Cards before version 2 do not know this command and are silent, as an empty slot is.
        let version_2 = match controller.command(sd_cmd::send_if_cond(VOLTAGE, PATTERN)) {
            Ok(echo) if echo & 0xfff == u32::from(VOLTAGE) << 8 | u32::from(PATTERN) => true,
            Ok(_) => return Err(SdError::Voltage),
            Err(SdError::Command { errors, .. }) if errors & interrupt::COMMAND_TIMEOUT != 0 => false,
            Err(error) => return Err(error),
        };
        let mut waited = 0;
        let by_block = loop {
            match controller.command(common_cmd::app_cmd(0)) {
                Err(SdError::Command { errors, .. }) if errors & interrupt::COMMAND_TIMEOUT != 0 => {
                    return Err(SdError::NoCard);
                }
                sent => sent?,
            };
            let answer = controller.command(sd_cmd::sd_send_op_cond(version_2, false, false, VOLTAGE_WINDOW))?;
            let conditions = OCR::<SD>::from(answer);
            if !conditions.is_busy() {
                break conditions.high_capacity();
            }
            if waited == POWER_UP {
                return Err(SdError::NotReady);
            }
            controller.pause(1);
            waited += 1;
        };
        controller.command(common_cmd::all_send_cid())?;
        let card = RCA::<SD>::from(controller.command(sd_cmd::send_relative_address())?).address();
        controller.command(common_cmd::send_csd(card))?;
        let description = CSD::<SD>::from(controller.long_response());
        controller.command_busy(common_cmd::select_card(card))?;
        controller.set_clock(SPEED)?;
        controller.command(common_cmd::set_block_length(BLOCK as u32))?;
        controller.command(common_cmd::app_cmd(card))?;
        let status = controller.command(sd_cmd::set_bus_width(true))?;
        if status & STATUS_ERRORS != 0 {
            return Err(SdError::Refused { index: 6, status });
        }
        controller.use_four_lines();
        let blocks = description.card_size() / BLOCK as u64;
        Ok(Self { controller, by_block, blocks })
    }

    /// Blocks of the card.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// How a command names a block.
    pub(super) fn argument(&self, block: u64) -> u32 {
        // Cards whose addresses are bytes hold at most 2 GiB, the others at most 2^32 blocks.
        (if self.by_block { block } else { block * BLOCK as u64 }) as u32
    }
}
