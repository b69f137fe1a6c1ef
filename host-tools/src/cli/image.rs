//! `forebay image`

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, ensure};
use clap::Args;
use forebay::boards::{BOARDS, Board, BootFiles, Medium, MediumKind, Written, write_medium};
use forebay_kernels::attention::KvFormat;
use forebay_runtime::arena::table_bytes;
use forebay_runtime::open::Image;
use forebay_runtime::plan::{Limits, Plan, PlanError};
use forebay_runtime::tokenizer::Tokenizer;
use serde_json::json;

use super::inspect::{plan_json, print_plan};
use super::{ModelArgs, check_output};
use crate::host::models::{Bar, Found};
use crate::host::size::{Size, bytes_text};

/// Bytes of the longest line that a board's prompt is planned for.
const PROMPT_BYTES: usize = 256;

#[derive(Args)]
pub struct ImageArgs {
    /// The board; `forebay boards` lists them
    #[arg(long, value_name = "NAME", value_parser = board)]
    board: &'static Board,
    #[command(flatten)]
    model: ModelArgs,
    /// The file to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// What to make, where the board reads several: disk, flash or card [default: the first that `forebay boards`
    /// names]
    #[arg(long, value_name = "KIND", value_parser = medium)]
    medium: Option<MediumKind>,
    /// The program that a card boots: the board's kernel8.img
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Words for the program that a card boots, such as "generate=64 text=Once upon a time"
    #[arg(long, value_name = "TEXT")]
    words: Option<String>,
    /// A folder that is copied onto a card's boot partition: the firmware's files
    #[arg(long, value_name = "FOLDER")]
    firmware: Option<PathBuf>,
    /// Tokens of the longest sequence, for the board's plan
    #[arg(short, long, value_name = "TOKENS", default_value = "128", value_parser = super::positive)]
    context: usize,
    /// Most tokens of a prompt that the board computes together
    #[arg(short, long, value_name = "N", default_value = "16", value_parser = super::positive)]
    batch: usize,
    /// Arena of the board's program, if it was built with another one
    #[arg(long, value_name = "SIZE")]
    arena: Option<Size>,
    /// Report as JSON
    #[arg(long)]
    json: bool,
}

fn board(name: &str) -> Result<&'static Board, String> {
    Board::by_name(name).ok_or_else(|| {
        let names: Vec<_> = BOARDS.iter().map(|board| board.name).collect();
        format!("no such board; there are {}", names.join(", "))
    })
}

fn medium(name: &str) -> Result<MediumKind, String> {
    let kinds = [MediumKind::Disk, MediumKind::Flash, MediumKind::Card];
    kinds.into_iter().find(|kind| kind.name() == name).ok_or_else(|| "expected disk, flash or card".into())
}

pub fn main(args: &ImageArgs) -> Result<()> {
    let board = args.board;
    let medium = match args.medium {
        None => board.media.first(),
        Some(kind) => board.medium(kind),
    };
    let medium = medium.with_context(|| {
        let kinds: Vec<_> = board.media.iter().map(|medium| medium.kind.name()).collect();
        format!("{} does not read such a medium; it reads {}", board.name, kinds.join(", "))
    })?;
    let for_cards = [
        ("--kernel", args.kernel.is_some()),
        ("--words", args.words.is_some()),
        ("--firmware", args.firmware.is_some()),
    ];
    for (option, given) in for_cards {
        ensure!(
            !given || medium.kind == MediumKind::Card,
            "{option} is for cards; {} boots otherwise, and its {} holds the image alone",
            board.name,
            medium.kind.name()
        );
    }
    check_output(&args.output)?;
    let found = args.model.find()?;
    check_fit(&found, medium)?;
    // The plan comes before the work of writing.
    let look = |image: &Image<'_>| -> Result<(Plan, usize, u64)> {
        let plan = plan(&found, image, args)?;
        let model = image.model();
        let layers = (0..model.layer_count()).filter_map(|layer| model.layer(layer));
        let token_len: u64 = layers.map(|l| l.top_k as u64 * l.unit.prefix_len(l.unit.levels(), model.page())).sum();
        Ok((plan, model.unit_count(), token_len))
    };
    let (plan, units, token_len) =
        if medium.mapped { found.file.probe_mapped(look)? } else { found.file.probe(|image, _| look(image))? };
    let mut bar = Bar::new("writing");
    let boot =
        BootFiles { kernel: args.kernel.as_deref(), words: args.words.as_deref(), firmware: args.firmware.as_deref() };
    let written = write_medium(medium, &found.file.path, &args.output, &boot, &mut bar);
    bar.finish();
    let written = written?;
    let mut out = std::io::stdout().lock();
    if args.json {
        let json = json!({
            "board": board,
            "medium": medium,
            "file": written,
            "plan": plan_json(&plan, units),
            "token_bytes": token_len,
        });
        writeln!(out, "{}", serde_json::to_string_pretty(&json)?)?;
        return Ok(());
    }
    print(&mut out, args, medium, &written)?;
    writeln!(out)?;
    print_plan(&mut out, &plan, units)?;
    let rate = medium.bandwidth;
    writeln!(
        out,
        "\na token uses {} of units: {:.2} s to read them all at {} ({}){}",
        bytes_text(token_len),
        token_len as f64 / rate.bytes_per_second as f64,
        rate_text(rate.bytes_per_second),
        rate.basis.name(),
        if medium.mapped { "" } else { ", less what the pool holds" }
    )?;
    Ok(())
}

fn print(out: &mut impl Write, args: &ImageArgs, medium: &Medium, written: &Written) -> Result<()> {
    writeln!(out, "{}: {}", args.board.name, args.board.machine)?;
    writeln!(out, "{}: {} bytes for its {}", args.output.display(), written.len, medium.device)?;
    writeln!(out, "  the image of {} bytes starts at {}", written.image, written.start)?;
    if medium.kind == MediumKind::Card {
        writeln!(out, "  what follows the first {} bytes is empty and need not be copied to a card", written.used)?;
        if args.kernel.is_none() {
            writeln!(out, "  there is no kernel8.img on it: give --kernel, or start the program otherwise")?;
        }
    }
    Ok(())
}

/// Refuses what the device cannot hold, before anything is planned.
fn check_fit(found: &Found, medium: &Medium) -> Result<()> {
    let (len, path) = (found.file.superblock.image_len(), found.file.path.display());
    if let Some(room) = medium.len {
        ensure!(
            len <= room,
            "{path} has {len} bytes ({}) and the {} holds {room} ({}): convert the model with fewer bits, or use \
             another medium or board",
            bytes_text(len),
            medium.device,
            bytes_text(room)
        );
    }
    Ok(())
}

/// The plan that the board's program makes.
fn plan(found: &Found, image: &Image<'_>, args: &ImageArgs) -> Result<Plan> {
    let arena = args.arena.as_ref().map_or(args.board.arena, |size| size.bytes);
    let board = args.board;
    ensure!(
        arena + board.stack <= board.ram,
        "an arena of {arena} bytes and a stack of {} are more than the {} bytes of RAM of {}",
        board.stack,
        board.ram,
        board.name
    );
    let context = args.context.min(image.model().context());
    let limits = Limits {
        arena,
        context,
        batch: args.batch,
        logit_rows: 1,
        kv: KvFormat::F16,
        workers: 1,
        reserved: table_bytes::<u32>(context) + table_bytes::<u32>(Tokenizer::encode_scratch(PROMPT_BYTES)),
        policy: forebay_runtime::policy::Policy::default(),
    };
    Plan::new(image, limits).map_err(|error| match error {
        PlanError::TooSmall { need, have, context } => anyhow!(
            "{} does not fit {}: its arena has {have} bytes, and a context of {context} tokens needs {need}; build \
             the board with a larger ARENA and say so with --arena, or give a shorter --context",
            found.file.path.display(),
            board.name
        ),
        other => anyhow!(other).context(format!("planning {} for {}", found.file.path.display(), board.name)),
    })
}

/// A rate in the decimal unit that suits it.
pub(super) fn rate_text(bytes_per_second: u64) -> String {
    match bytes_per_second as f64 {
        rate if rate < 1e6 => format!("{:.0} kB/s", rate / 1e3),
        rate if rate < 1e7 => format!("{:.1} MB/s", rate / 1e6),
        rate => format!("{:.0} MB/s", rate / 1e6),
    }
}
