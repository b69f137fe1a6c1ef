//! `forebay calibrate`

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use forebay::moments::Recorder;
use forebay::neurons::{Calibration, LayerReport, SHARES, Scoring, Settings};
use forebay_kernels::matmul::row_to_f32;
use forebay_runtime::drive::Observer;
use forebay_runtime::engine::Output;
use forebay_runtime::model::record::Router;
use forebay_runtime::model::{MAX_UNITS, Model};
use forebay_runtime::tokenizer::EncodeOptions;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::{MachineArgs, ModelArgs, Wanted, check_output};
use crate::host::session::{self, Extra, ImageFile, Session};

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
    /// The neuron plan to write, for `forebay convert --neurons`
    #[arg(short, long, value_name = "NEURONS", required_unless_present = "moments")]
    output: Option<PathBuf>,
    /// The second moments to write of what the streamed matrices are applied to, for `forebay convert --moments`
    #[arg(long, value_name = "MOMENTS")]
    moments: Option<PathBuf>,
    /// Neurons of a cluster: a multiple of 32, and of the group that a conversion is given
    #[arg(long, value_name = "N", default_value = "32", value_parser = width)]
    cluster_neurons: u32,
    /// Move neurons 32 at a time, as they share scales in a GGUF file: its codes are then kept exactly, at the price of
    /// clusters that follow less what is active together
    #[arg(long)]
    keep_groups: bool,
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

/// The text, to be computed once or more.
struct Pass<'s, 'a, 'f, 't> {
    session: &'s mut Session<'a, 'f>,
    tokens: &'t mut [u32],
    context: usize,
    bos: Option<u32>,
    bar: &'t ProgressBar,
}

impl Pass<'_, '_, '_, '_> {
    /// Computes the text with `observer` watching; `begin` tells it of a sequence and its length.
    fn run<O: Observer>(&mut self, observer: &mut O, begin: impl Fn(&mut O, usize)) -> Result<()> {
        for chunk in self.tokens.chunks_mut(self.context) {
            self.session.reset()?;
            if let Some(bos) = self.bos {
                chunk[0] = bos;
            }
            begin(observer, chunk.len());
            self.session.watch(chunk, Output::None, observer, |_, _| ())?;
            self.bar.inc(chunk.len() as u64);
        }
        Ok(())
    }
}

pub fn main(args: &CalibrateArgs) -> Result<()> {
    let backend = args.machine.backend()?;
    args.output.iter().chain(&args.moments).try_for_each(|path| check_output(path))?;
    let what = || format!("reading {}", args.file.display());
    let bytes = std::fs::read(&args.file).with_context(what)?;
    let text = String::from_utf8(bytes).context("it is not UTF-8 text").with_context(what)?;
    let found = args.model.find()?;
    let path = found.file.path.display();
    let (setup, mut tokens, bos, recorder, hidden, lengths) = found.file.probe(|image, tokenizer| {
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
        let units = (0..model.layer_count()).filter_map(|l| model.layer(l)).map(|l| (l.units, l.unit_width));
        let recorder = args.moments.as_ref().map(|_| Recorder::new(model.hidden(), units));
        let lengths = match &args.output {
            Some(_) => lengths(&found.file, model).with_context(|| format!("reading {path}"))?,
            None => BTreeMap::new(),
        };
        ensure!(
            args.output.is_none() || !lengths.is_empty(),
            "{path} has no dense layers, so there are no neurons to put in order"
        );
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
        Ok((setup, tokens, bos, recorder, model.hidden(), lengths))
    })?;
    let context = setup.plan.limits.context;
    let runs = if args.output.is_some() { 2 } else { 0 } + u64::from(args.moments.is_some());
    let bar = ProgressBar::new(runs * tokens.len() as u64);
    if let Ok(style) = ProgressStyle::with_template("[{bar:30}] {pos}/{len} tokens {eta} {msg}") {
        bar.set_style(style.progress_chars("=> "));
    }
    let scoring = match args.scoring {
        ScoringArg::Linear => Scoring::Linear,
        ScoringArg::Mean => Scoring::Mean,
        ScoringArg::Random => Scoring::Random,
    };
    let step = if args.keep_groups { STEP as u32 } else { 1 };
    let settings = Settings { width: args.cluster_neurons, step, scoring };
    let mut calibration = Calibration::new(settings, hidden, lengths);
    let mut recorder = recorder;
    session::run(&found.file, setup, |session| {
        let mut pass = Pass { session, tokens: &mut tokens, context, bos, bar: &bar };
        if let Some(recorder) = &mut recorder {
            pass.run(recorder, |_, _| ())?;
        }
        if args.output.is_some() {
            pass.run(&mut calibration, Calibration::begin_sequence)?;
            bar.set_message("clustering");
            calibration.begin_second();
            bar.set_message("");
            pass.run(&mut calibration, Calibration::begin_sequence)?;
        }
        Ok(())
    })?;
    bar.finish_and_clear();
    if let (Some(recorder), Some(path)) = (recorder, &args.moments) {
        recorder.write(path)?;
    }
    let Some(output) = &args.output else { return Ok(()) };
    let (plan, layers) = calibration.finish()?;
    plan.write(output)?;
    let report = Report { tokens: tokens.len(), cluster_neurons: args.cluster_neurons, shares: SHARES, layers };
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&report)?)?;
        return Ok(());
    }
    writeln!(out, "{} tokens; energy that is kept with 30, 50 and 70 % of the clusters", report.tokens)?;
    writeln!(out, "live: what is not exactly zero, of the clusters and of the neurons")?;
    writeln!(
        out,
        "layer  neurons  clusters      predictor          mean        oracle  oracle, single neurons      live"
    )?;
    let percent = |shares: &[f64; 3]| shares.map(|s| format!("{:3.0}", 100.0 * s)).join(" ");
    for l in &report.layers {
        let (predictor, mean, oracle) = (percent(&l.predictor), percent(&l.mean), percent(&l.oracle));
        let single = percent(&l.neuron_oracle);
        writeln!(
            out,
            "{:>5}  {:>7}  {:>8}    {predictor}   {mean}   {oracle}             {single}   {:3.0} {:3.0} %",
            l.layer,
            l.neurons,
            l.clusters,
            100.0 * l.live_clusters,
            100.0 * l.live_neurons
        )?;
    }
    Ok(())
}
