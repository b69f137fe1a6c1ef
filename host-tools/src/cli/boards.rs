//! `forebay boards`

use std::io::Write;

use anyhow::Result;
use clap::Args;
use forebay::boards::BOARDS;

use super::image::rate_text;
use crate::host::size::bytes_text;

#[derive(Args)]
pub struct BoardsArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn main(args: &BoardsArgs) -> Result<()> {
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(BOARDS)?)?;
        return Ok(());
    }
    for board in BOARDS {
        writeln!(out, "{}: {}, {}", board.name, board.machine, board.target)?;
        writeln!(
            out,
            "  RAM     {:>10}  arena {}, stack {}",
            bytes_text(board.ram),
            bytes_text(board.arena),
            bytes_text(board.stack)
        )?;
        for medium in board.media {
            let len = medium.len.map_or_else(|| "any size".into(), bytes_text);
            writeln!(
                out,
                "  {:<6} {len:>11}  {}, blocks of {} B, {} ({})",
                medium.kind.name(),
                medium.device,
                medium.block,
                rate_text(medium.bandwidth.bytes_per_second),
                medium.bandwidth.basis.name()
            )?;
        }
    }
    writeln!(
        out,
        "\nemulated: seen in QEMU on a PC, says nothing about a real board; typical: usual for such devices, not \
         measured here"
    )?;
    Ok(())
}
