//! `forebay calibrate`

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use forebay::neurons::{Calibration, LayerReport, SHARES, Scoring, Settings};
use forebay_kernels::matmul::row_to_f32;
use forebay_runtime::engine::Output;
use forebay_runtime::model::record::Router;
use forebay_runtime::model::{MAX_UNITS, Model};
use forebay_runtime::tokenizer::EncodeOptions;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::{MachineArgs, ModelArgs, Wanted, check_output};
use crate::host::session::{self, Extra, ImageFile};

/// Neurons of a cluster are a multiple of this: of the rows that kernels take together, and of a group of weights.
const STEP: usize = 32;
/// Fewest tokens that say anything.
const LEAST: usize = 64;

/// Find out which neurons of a model's dense feed-forwards lie together best, and what predicts the ones that a token
/// needs.
///
/// The model computes a text twice. The first pass says which neurons are active together: they become clusters, often
/// needed ones first. The second pass says how much each cluster adds to a layer's output, for which input: a linear map of
/// the input is fitted to it. The result is a file for `forebay convert --neurons`.
///
/// Recorded rows are kept in memory: two bytes for every token, layer and channel, and four for every cluster.
#[derive(Args)]
pub struct CalibrateArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The text
    #[arg(short, long, value_name = "TEXT")]
    file: PathBuf,
    /// The file to write
    #[arg(short, long, value_name = "NEURONS")]
    output: PathBuf,
    /// Neurons of a cluster: a multiple of 32, and of the group that a conversion is given
    #[arg(long, value_name = "N", default_value = "32", value_parser = width)]
    cluster_neurons: u32,
    /// Tokens of the text that are used
    #[arg(long, value_name = "N", default_value = "4096", value_parser = super::positive)]
    tokens: usize,
    /// Tokens of a sequence [default: 512, or the model's context]
    #[arg(short, long, value_name = "TOKENS", value_parser = super::positive)]
    context: Option<usize>,
    /// What predicts a cluster's importance
    #[arg(long, value_enum, default_value = "linear")]
    scoring: ScoringArg,
    #[command(flatten)]
    machine: MachineArgs,
    /// Report as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum ScoringArg {
    /// A linear map of the layer's input.
    Linear,
    /// The cluster's mean over the text, whatever the token.
    Mean,
    /// Chance, to compare with.
    Random,
}

fn width(text: &str) -> Result<u32, String> {
    let fits = |n: &usize| *n > 0 && n.is_multiple_of(STEP) && *n <= 1 << 16;
    text.parse().ok().filter(fits).map(|n| n as u32).ok_or_else(|| format!("expected a multiple of {STEP}"))
}

#[derive(Serialize)]
struct Report {
    tokens: usize,
    cluster_neurons: u32,
    shares: [f64; 3],
    layers: Vec<LayerReport>,
}

/// Length of each neuron's column of the down projection, for every dense layer.
fn lengths(file: &ImageFile, model: &Model<'_>) -> Result<BTreeMap<u16, Vec<f32>>> {
    let source = File::open(&file.path)?;
    let mut all = BTreeMap::new();
    for l in 0..model.layer_count() as u16 {
        let Some(layer) = model.layer(l.into()).filter(|layer| layer.router == Router::All) else { continue };
        let mut squares = Vec::with_capacity(layer.units * layer.unit_width);
        let (mut bytes, mut row) = (Vec::new(), vec![0.0; layer.unit_width]);
        for unit in 0..layer.units {
            let record = model.extents().get(layer.first_extent as usize + unit).context("a unit is missing")?;
            bytes.resize(usize::try_from(record.total_len())?, 0);
            source.read_exact_at(&mut bytes, record.offset())?;
            let checked = record.verify(0, &bytes).is_ok_and(|levels| levels == record.levels());
            ensure!(checked, "unit {unit} of layer {l} has a wrong checksum; convert the model again");
            let levels = layer.unit.levels();
            let pieces = layer.unit.split(levels, model.page(), &bytes).context("a unit is cut off")?;
            let view = layer.unit.view(levels, model.page(), &pieces).context("a unit is cut off")?;
            let mut sums = vec![0.0f32; layer.unit_width];
            for r in 0..model.hidden() {
                row_to_f32(&view.down, r, &mut row);
                sums.iter_mut().zip(&row).for_each(|(sum, x)| *sum += x * x);
            }
            squares.extend(sums);
        }
        // What fills up the last cluster is no neuron: it adds nothing.
        let real = squares.iter().rposition(|x| *x > 0.0).map_or(1, |last| last + 1);
        all.insert(l, squares[..real].iter().map(|x| x.sqrt()).collect());
    }
    Ok(all)
}

pub fn main(args: &CalibrateArgs) -> Result<()> {
    let backend = args.machine.backend()?;
    check_output(&args.output)?;
    let what = || format!("reading {}", args.file.display());
    let bytes = std::fs::read(&args.file).with_context(what)?;
    let text = String::from_utf8(bytes).context("it is not UTF-8 text").with_context(what)?;
    let found = args.model.find()?;
    let path = found.file.path.display();
    let (setup, mut tokens, bos, hidden, lengths) = found.file.probe(|image, tokenizer| {
        let model = image.model();
        ensure!(
            (0..model.layer_count() as u16).all(|l| !model.predicts(l)),
            "{path} has neurons in an order of their own; calibrate an image that was converted without --neurons"
        );
        let tokenizer = tokenizer.with_context(|| format!("{path} has no tokenizer"))?;
        let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
        let (mut tokens, _) =
            session::encode(&tokenizer, &text, EncodeOptions { add_bos: bos.is_some(), parse_special: false })?;
        ensure!(
            tokens.len() >= LEAST,
            "{} has {} tokens; give a text of at least {LEAST}, better of thousands",
            args.file.display(),
            tokens.len()
        );
        tokens.truncate(args.tokens.max(LEAST));
        let context = args.context.unwrap_or(512).min(model.context());
        let lengths = lengths(&found.file, model).with_context(|| format!("reading {path}"))?;
        ensure!(!lengths.is_empty(), "{path} has no dense layers, so there are no neurons to put in order");
        let width = args.cluster_neurons as usize;
        if let Some((l, neurons)) = lengths.iter().find(|(_, n)| n.len().div_ceil(width) > MAX_UNITS) {
            anyhow::bail!(
                "layer {l} has {} neurons, more than {MAX_UNITS} clusters of {width}; give a larger --cluster-neurons",
                neurons.len()
            );
        }
        let extra = Extra::default();
        let wanted = Wanted { context, batch: context, logit_rows: 1, extra, with_tokenizer: false };
        let setup = args.machine.setup(&found, image, backend, wanted)?;
        Ok((setup, tokens, bos, model.hidden(), lengths))
    })?;
    let context = setup.plan.limits.context;
    let bar = ProgressBar::new(2 * tokens.len() as u64);
    if let Ok(style) = ProgressStyle::with_template("[{bar:30}] {pos}/{len} tokens {eta} {msg}") {
        bar.set_style(style.progress_chars("=> "));
    }
    let scoring = match args.scoring {
        ScoringArg::Linear => Scoring::Linear,
        ScoringArg::Mean => Scoring::Mean,
        ScoringArg::Random => Scoring::Random,
    };
    let settings = Settings { width: args.cluster_neurons, scoring };
    let mut calibration = Calibration::new(settings, hidden, lengths);
    session::run(&found.file, setup, |session| {
        for second in [false, true] {
            if second {
                bar.set_message("clustering");
                calibration.begin_second();
                bar.set_message("");
            }
            for chunk in tokens.chunks_mut(context) {
                session.reset()?;
                if let Some(bos) = bos {
                    chunk[0] = bos;
                }
                calibration.begin_sequence(chunk.len());
                session.watch(chunk, Output::None, &mut calibration)?;
                bar.inc(chunk.len() as u64);
            }
        }
        Ok(())
    })?;
    bar.finish_and_clear();
    let (plan, layers) = calibration.finish()?;
    plan.write(&args.output)?;
    let report = Report { tokens: tokens.len(), cluster_neurons: args.cluster_neurons, shares: SHARES, layers };
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&report)?)?;
        return Ok(());
    }
    writeln!(out, "{} tokens; energy that is kept with 30, 50 and 70 % of the clusters", report.tokens)?;
    writeln!(out, "layer  neurons  clusters      predictor          mean        oracle  oracle, single neurons")?;
    let percent = |shares: &[f64; 3]| shares.map(|s| format!("{:3.0}", 100.0 * s)).join(" ");
    for l in &report.layers {
        let (predictor, mean, oracle) = (percent(&l.predictor), percent(&l.mean), percent(&l.oracle));
        let single = percent(&l.neuron_oracle);
        writeln!(
            out,
            "{:>5}  {:>7}  {:>8}    {predictor}   {mean}   {oracle}             {single}",
            l.layer, l.neurons, l.clusters
        )?;
    }
    Ok(())
}
