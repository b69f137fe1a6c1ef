//! `forebay synth`

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use forebay::convert::{ConvertOptions, convert_source};
use forebay::simulate::{Behaviour, behaviour};
use forebay::synth::{Options, SHAPES, Shape, Synthetic};
use forebay::trace::{Head, Trace};
use forebay_kernels::exec::Backend;
use forebay_runtime::policy::Policy;

use super::check_output;
use crate::host::models::Bar;
use crate::host::rehearse::{Score, rehearse};
use crate::host::session::{self, Extra, ImageFile, Ram, Request, Setup};
use crate::host::size::{Size, bytes_text};
use crate::host::store::{StoreKind, StoreOptions};

/// Make a model of random weights with the exact shapes of a known one.
///
/// What streaming it costs is what streaming the real one would cost, as far as its router behaves alike: --skew makes
/// some experts more popular than others, --locality makes tokens of one topic choose alike. What it says is noise.
#[derive(Args)]
pub struct SynthArgs {
    /// The model whose shapes are taken
    #[arg(long, value_name = "NAME", value_parser = shape)]
    shape: &'static Shape,
    /// Only its first N layers
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Bits of the matrices
    #[arg(long, value_enum, default_value = "q4")]
    weights: Bits,
    /// Popularity of experts falls as rank^-S (Zipf's law); 0 makes them equal
    #[arg(long, value_name = "S", default_value = "0")]
    skew: f64,
    /// Share of the router's input that tokens of one topic have in common, 0 to 0.95
    #[arg(long, value_name = "L", default_value = "0")]
    locality: f64,
    /// Standard deviation of the router's scores from token to token: the larger, the less alike are the weights of
    /// the chosen experts
    #[arg(long, value_name = "STD", default_value = "1")]
    router_std: f64,
    /// Seed: the same options and seed make the same bytes
    #[arg(long, value_name = "N", default_value = "1")]
    seed: u64,
    /// The image to write
    #[arg(short, long, value_name = "IMAGE")]
    output: PathBuf,
    /// Alignment of everything that is read: a power of two from 512 to 1M, at least the device's block
    #[arg(long, value_name = "SIZE", default_value = "4096")]
    page: Size,
    /// Write the same model, the same codes and scales, as a GGUF file too
    #[arg(long, value_name = "FILE")]
    gguf: Option<PathBuf>,
    /// Write 4096 token ids that stay with their topics for about 32 tokens each, as --token-ids takes them
    #[arg(long, value_name = "FILE")]
    ids: Option<PathBuf>,
    /// Compute as many of those ids as is said here, and say how the routers as made behave: how unequally experts are
    /// used, and how soon again
    #[arg(long, value_name = "TOKENS", value_parser = super::positive, num_args = 0..=1, default_missing_value = "512")]
    stats: Option<usize>,
    /// Report as JSON
    #[arg(long)]
    json: bool,
}

/// Bits of the matrices; the embedding and the output head have 8, norms and routers are floats.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Bits {
    /// GGML's Q4_0.
    Q4,
    /// GGML's Q8_0.
    Q8,
}

/// Token ids that `--ids` writes.
const IDS: usize = 4096;

fn shape(text: &str) -> Result<&'static Shape, String> {
    Shape::by_name(text).ok_or_else(|| {
        let names: Vec<_> = SHAPES.iter().map(|shape| shape.name).collect();
        format!("expected one of {}", names.join(", "))
    })
}

pub fn main(args: &SynthArgs) -> Result<()> {
    let outputs = [Some(&args.output), args.gguf.as_ref(), args.ids.as_ref()];
    outputs.into_iter().flatten().try_for_each(|path| check_output(path))?;
    let shape = args.layers.map_or_else(|| Ok(args.shape.clone()), |layers| args.shape.cut(layers))?;
    let options = Options {
        eight_bits: args.weights == Bits::Q8,
        skew: args.skew,
        locality: args.locality,
        router_std: args.router_std,
        seed: args.seed,
    };
    let model = Synthetic::new(&shape, &options)?;
    let mut bar = Bar::new("writing the image");
    let convert_options = ConvertOptions {
        page: u32::try_from(args.page.bytes).unwrap_or(u32::MAX),
        name: Some(format!("synthetic {}", shape.name)),
        ..ConvertOptions::default()
    };
    let report = convert_source(&model.source()?, &args.output, &convert_options, &mut bar);
    bar.finish();
    let report = report?;
    if let Some(path) = &args.gguf {
        let mut bar = Bar::new("writing the GGUF file");
        let written = model.write_gguf(path, &mut bar);
        bar.finish();
        written?;
    }
    if let Some(path) = &args.ids {
        let ids: Vec<String> = model.tokens(IDS).iter().map(u32::to_string).collect();
        std::fs::write(path, ids.join(",") + "\n").with_context(|| format!("writing {}", path.display()))?;
    }
    let stats = args.stats.map(|count| stats(&args.output, &model.tokens(count))).transpose()?;
    let mut out = std::io::stdout().lock();
    if args.json {
        let mut json = serde_json::to_value(&report)?;
        json["routing"] = serde_json::to_value(stats)?;
        writeln!(out, "{json}")?;
        return Ok(());
    }
    write!(out, "{report}")?;
    if let Some(stats) = stats {
        writeln!(out, "routing: {stats}")?;
    }
    if let Some(path) = &args.gguf {
        writeln!(out, "the same as GGUF: {} ({})", path.display(), bytes_text(model.gguf_len()))?;
    }
    Ok(())
}

/// How the routers of the image at `path` behave on `tokens`.
fn stats(path: &std::path::Path, tokens: &[u32]) -> Result<Behaviour> {
    let file = ImageFile::open(path)?;
    let threads = session::cores();
    let (plan, head) = file.probe(|image, _| {
        let model = image.model();
        let request = Request {
            context: tokens.len().min(model.context()),
            batch: 1,
            logit_rows: 1,
            kv: session::default_kv(model),
            threads,
            policy: Policy::default(),
            extra: Extra::default(),
        };
        Ok((session::plan(&file, image, &request, &Ram::Ample)?, Head::new(file.superblock.id(), model)))
    })?;
    let setup = Setup {
        plan,
        extra: Extra::default(),
        backend: Backend::detect(),
        threads,
        store: StoreOptions { kind: StoreKind::Auto, device: None },
        with_tokenizer: false,
        deadline_ms: None,
        planned: Vec::new(),
    };
    let made = session::run(&file, setup, |session| rehearse(session, Score::Text(tokens)))?;
    Ok(behaviour(&Trace { head, passes: made.passes }))
}
