//! The command line.

mod attach;
mod bench;
mod boards;
mod calibrate;
mod chat;
mod convert;
mod flash_profile;
mod image;
mod inspect;
mod kernels;
mod logits;
mod perplexity;
mod plan;
mod policy;
mod run;
mod synth;
mod tokenize;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Parser, Subcommand, ValueEnum};
use forebay::convert::{ConvertOptions, WeightChoice};
use forebay::settings::Settings;
use forebay_kernels::attention::KvFormat;
use forebay_kernels::exec::Backend;
use forebay_kernels::weights::{Fields, Group, MAX_FIELDS};
use forebay_runtime::model::Model;
use forebay_runtime::model::record::{ModelRecord, Router};
use forebay_runtime::open::Image;
use forebay_runtime::plan::Plan;
use forebay_runtime::sample::SamplerParams;
use forebay_storage::layers::DeviceProfile;

use crate::host::models::{self, Found};
use crate::host::session::{self, Extra, Ram, Request, Setup};
use crate::host::size::Size;
use crate::host::store::{StoreKind, StoreOptions};

/// Run language models that are bigger than memory.
///
/// Without a subcommand the bundled model tells a story.
#[derive(Parser)]
#[command(name = "forebay", version)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Convert a Hugging Face folder or a GGUF file into an image.
    Convert(convert::ConvertArgs),
    /// Find out which neurons of a model lie together best, and what predicts the ones that a token needs.
    Calibrate(calibrate::CalibrateArgs),
    /// Generate text.
    Run(run::RunArgs),
    /// Measure tokens a second of prompt and of generation, or the kernels alone.
    Bench(bench::BenchArgs),
    /// Talk with a model, line by line.
    Chat(chat::ChatArgs),
    /// Write the logits of given tokens as a NumPy array.
    Logits(logits::LogitsArgs),
    /// Measure how well a model predicts a text.
    Perplexity(perplexity::PerplexityArgs),
    /// Show what is in an image, and how the arena would be split.
    Inspect(inspect::InspectArgs),
    /// Choose how experts are loaded and kept for a memory and a device, and write that into the image.
    Plan(plan::PlanArgs),
    /// Measure how fast a device reads.
    FlashProfile(flash_profile::FlashProfileArgs),
    /// Make a model of random weights with the shapes of a known one.
    Synth(synth::SynthArgs),
    /// Show the tokens of a text.
    Tokenize(tokenize::TokenizeArgs),
    /// Make the file that a board boots from or reads, and show its plan of RAM.
    Image(image::ImageArgs),
    /// List the boards.
    Boards(boards::BoardsArgs),
    /// Talk with a board that serves, over its serial line.
    Attach(attach::AttachArgs),
}

/// Longest context that is planned for unless it is said.
const LONG_CONTEXT: usize = 4096;

/// What `forebay` alone does: the seed makes it the same story every time.
const STORY: [&str; 6] = ["forebay", "run", "--prompt", "Once upon a time", "--seed", "1"];

/// Runs the command that the process was given.
pub fn main() -> Result<()> {
    let command = match Cli::parse().command {
        Some(command) => command,
        None => Cli::parse_from(STORY).command.context("the story is a run")?,
    };
    match command {
        Command::Convert(args) => convert::main(&args),
        Command::Calibrate(args) => calibrate::main(&args),
        Command::Run(args) => run::main(&args),
        Command::Bench(args) => bench::main(&args),
        Command::Chat(args) => chat::main(&args),
        Command::Logits(args) => logits::main(&args),
        Command::Perplexity(args) => perplexity::main(&args),
        Command::Inspect(args) => inspect::main(&args),
        Command::Plan(args) => plan::main(&args),
        Command::FlashProfile(args) => flash_profile::main(&args),
        Command::Synth(args) => synth::main(&args),
        Command::Tokenize(args) => tokenize::main(&args),
        Command::Image(args) => image::main(&args),
        Command::Boards(args) => boards::main(&args),
        Command::Attach(args) => attach::main(&args),
    }
}

/// The model, and how it is converted if it must be.
#[derive(Args)]
struct ModelArgs {
    /// An image, or a GGUF file or Hugging Face folder, which is converted once into the cache ($FOREBAY_CACHE, else
    /// $XDG_CACHE_HOME/forebay, else ~/.cache/forebay) [default: the bundled model]
    #[arg(value_name = "IMAGE|MODEL")]
    model: Option<PathBuf>,
    #[command(flatten)]
    weights: WeightArgs,
}

impl ModelArgs {
    fn find(&self) -> Result<Found> {
        let WeightArgs { weights, unit_weights, head_weights, unit_fields, group } = self.weights;
        let given = weights.or(unit_weights).or(head_weights).is_some() || unit_fields.is_some() || group.is_some();
        models::check_options(self.model.as_deref(), given)?;
        models::find(self.model.as_deref(), &self.weights.options())
    }
}

/// How weights are encoded.
#[derive(Args)]
struct WeightArgs {
    /// Encoding of the weights: q4, q3, q2, q1, ternary, q8, f16 or f32 [default: q4; a GGUF file's own]
    #[arg(long, value_name = "ENCODING")]
    weights: Option<WeightChoice>,
    /// Encoding of what is streamed, the experts or neuron clusters [default: as --weights]
    #[arg(long, value_name = "ENCODING")]
    unit_weights: Option<WeightChoice>,
    /// Encoding of the embedding and the output head [default: q8 with --weights of fewer bits; a GGUF file's own]
    #[arg(long, value_name = "ENCODING")]
    head_weights: Option<WeightChoice>,
    /// How the bits of streamed weights are cut into levels, most significant first: widths of 1, 2 or 4 such as
    /// 1,1,1,1 [default: 2,2 for 4 bits, 2,1 for 3]
    #[arg(long, value_name = "LIST", value_parser = fields)]
    unit_fields: Option<Fields>,
    /// Weights that share a scale: 32, 64 or 128 [default: 32]
    #[arg(long, value_name = "N", value_parser = group)]
    group: Option<Group>,
}

impl WeightArgs {
    fn options(&self) -> ConvertOptions {
        let Self { weights, unit_weights, head_weights, unit_fields, group } = *self;
        ConvertOptions { weights, unit_weights, head_weights, unit_fields, group, ..ConvertOptions::default() }
    }
}

fn fields(text: &str) -> Result<Fields, String> {
    let wrong = || "expected up to four widths from 1, 2 and 4, with a sum of at most 4, such as 2,1,1".to_owned();
    let mut widths = [0; MAX_FIELDS];
    for (i, part) in text.split(',').enumerate() {
        *widths.get_mut(i).ok_or_else(wrong)? = part.trim().parse().map_err(|_| wrong())?;
    }
    Fields::new(widths).filter(|fields| fields.bits() <= 4).ok_or_else(wrong)
}

fn group(text: &str) -> Result<Group, String> {
    text.parse().ok().and_then(Group::from_len).ok_or_else(|| "expected 32, 64 or 128".into())
}

/// How keys and values are kept.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kv {
    /// f32 where the weights are f32, else f16.
    Auto,
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// 8-bit integers with a scale for every 32.
    Q8,
}

/// With what a model is computed and read.
#[derive(Args)]
struct ComputeArgs {
    /// Threads that compute [default: the machine's cores]
    #[arg(short, long, value_name = "N", value_parser = positive)]
    threads: Option<usize>,
    /// Most tokens of a prompt that are computed together; fewer are where memory is scarce [default: the plan's, else up
    /// to 512, but above 64 only as long as they leave the pool 31 parts of 32]
    #[arg(short, long, value_name = "N", value_parser = positive)]
    batch: Option<usize>,
    /// How keys and values are kept
    #[arg(long, value_enum, default_value = "auto")]
    kv: Kv,
    /// Instruction set: scalar, avx2, … [default: the fastest of this machine]
    #[arg(long, value_name = "NAME")]
    backend: Option<String>,
    /// Where the image is read from
    #[arg(long, value_enum, default_value = "auto")]
    store: StoreKind,
}

/// Where and with what a model runs. None of it changes a bit of the result, but for `--kv` and a policy that is not
/// exact.
#[derive(Args)]
struct MachineArgs {
    /// The whole memory of the run: bytes, or with a unit such as 64M, 2G, 512KiB [default: the plan's; without one what
    /// everything takes, at most half of the machine's; for the bundled model a pool of a third of what is streamed]
    #[arg(long, value_name = "SIZE")]
    ram: Option<Size>,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Read no faster than this device: a name such as pi4-sd, bw=400MB/s,lat=120us,iops=20k,qd=8, or a file that
    /// `forebay flash-profile -o` wrote (its name ends in .json)
    #[arg(long, value_name = "NAME|LIST|FILE", value_parser = device)]
    device: Option<DeviceProfile>,
    #[command(flatten)]
    policy: policy::PolicyArgs,
    /// Take nothing from the plan that `forebay plan` wrote into the image
    #[arg(long)]
    no_plan: bool,
}

impl ComputeArgs {
    fn threads(&self) -> usize {
        self.threads.unwrap_or_else(session::cores)
    }

    fn backend(&self) -> Result<Backend> {
        let Some(name) = self.backend.as_deref() else { return Ok(Backend::detect()) };
        Backend::by_name(name).with_context(|| {
            let names: Vec<_> = Backend::all().map(|b| b.name()).collect();
            format!("this machine has no back-end {name:?}; it has {}", names.join(", "))
        })
    }

    fn kv(&self, model: &Model<'_>) -> KvFormat {
        match self.kv {
            Kv::Auto => session::default_kv(model),
            Kv::F32 => KvFormat::F32,
            Kv::F16 => KvFormat::F16,
            Kv::Q8 => KvFormat::Q8,
        }
    }
}

/// The plan for the `given` number of tokens computed together or, unless it is said, for the most that hardly cost
/// the pool anything: a prompt reads each expert that it needs once a batch.
fn with_batch(given: Option<usize>, plan: impl Fn(usize) -> Result<Plan>) -> Result<Plan> {
    const LEAST: usize = 64;
    if let Some(given) = given {
        return plan(given);
    }
    for most in [512, 256, 128] {
        let plan = plan(most)?;
        if plan.batch <= LEAST || plan.holds_all_units() || plan.working <= (plan.working + plan.pool) / 32 {
            return Ok(plan);
        }
    }
    plan(LEAST)
}

/// What a command needs of a session, besides the machine.
struct Wanted {
    /// Tokens of the longest sequence.
    context: usize,
    /// Most tokens that it ever gives at once.
    batch: usize,
    /// Rows of logits kept at once.
    logit_rows: usize,
    /// What else lies in the arena.
    extra: Extra,
    /// Whether the tokenizer's tables are read.
    with_tokenizer: bool,
}

impl MachineArgs {
    fn threads(&self) -> usize {
        self.compute.threads()
    }

    fn backend(&self) -> Result<Backend> {
        self.compute.backend()
    }

    /// How the arena is split for `context` tokens, at most `batch` of them at once, with `logit_rows` rows of logits and
    /// `extra` beside the engine; and what of that comes from the image's plan.
    fn plan(
        &self,
        found: &Found,
        image: &Image<'_>,
        wanted: &Wanted,
    ) -> Result<(Plan, Option<f64>, Vec<&'static str>)> {
        let Wanted { context, batch, logit_rows, extra, .. } = *wanted;
        let stored = if self.no_plan { None } else { Settings::load(&found.file.path)? };
        let (policy, deadline_ms, mut planned) = self.policy.policy(stored.as_ref())?;
        ensure!(
            policy.neurons_kept >= 1.0 || (0..image.model().layer_count() as u16).any(|l| image.model().predicts(l)),
            "--neurons-kept {}: {} cannot tell which neurons a token needs; make a neuron plan with `forebay calibrate` \
             and convert the model with --neurons",
            policy.neurons_kept,
            found.file.path.display()
        );
        ensure!(
            policy.pinned == 0.0
                || (0..image.model().layer_count())
                    .filter_map(|l| image.model().layer(l))
                    .any(|l| l.router == Router::All),
            "--pinned {}: {} has no dense layers, and experts are not pinned",
            policy.pinned,
            found.file.path.display()
        );
        let ram = match (&self.ram, &stored) {
            (Some(size), _) => Ram::Given(size.clone()),
            (None, Some(stored)) => {
                planned.insert(0, "ram");
                Ram::Planned(stored.ram)
            }
            (None, None) if found.bundled => Ram::Streaming,
            (None, None) => Ram::Ample,
        };
        let given = self.compute.batch.or(stored.map(|stored| stored.batch));
        let (kv, threads) = (self.compute.kv(image.model()), self.threads());
        let plan = with_batch(given, |most| {
            let request = Request { context, batch: batch.min(most), logit_rows, kv, threads, policy, extra };
            session::plan(&found.file, image, &request, &ram)
        })?;
        Ok((plan, deadline_ms, planned))
    }

    /// Plans the arena and says everything that a session is told.
    fn setup(&self, found: &Found, image: &Image<'_>, backend: Backend, wanted: Wanted) -> Result<Setup> {
        let (plan, deadline_ms, planned) = self.plan(found, image, &wanted)?;
        let Wanted { extra, with_tokenizer, .. } = wanted;
        let store = StoreOptions { kind: self.compute.store, device: self.device };
        Ok(Setup { plan, extra, backend, threads: self.threads(), store, with_tokenizer, deadline_ms, planned })
    }
}

fn positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| "expected a whole number of at least 1".into())
}

fn device(text: &str) -> Result<DeviceProfile, String> {
    if text.ends_with(".json") {
        let measured = forebay::profile::Measured::load(Path::new(text)).map_err(|error| format!("{error:#}"))?;
        return measured.device.profile().map_err(|error| format!("{error:#}"));
    }
    text.parse().map_err(|error| {
        let names: Vec<_> = DeviceProfile::names().collect();
        format!("{error}; devices: {}", names.join(", "))
    })
}

/// How tokens are chosen, and when to stop.
#[derive(Args)]
struct SampleArgs {
    #[command(flatten)]
    choice: ChoiceArgs,
    /// Go on after the model has ended its text
    #[arg(long)]
    ignore_eos: bool,
}

/// How tokens are chosen.
#[derive(Args)]
struct ChoiceArgs {
    /// Temperature; 0 always takes the most probable token [default: the model's, else 0.8]
    #[arg(long, value_name = "T", value_parser = temperature)]
    temp: Option<f32>,
    /// Choose among the K most probable tokens; 0 is all [default: the model's, else 40]
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Choose among the most probable tokens that together have this probability; 1 is all [default: the model's,
    /// else 0.95]
    #[arg(long, value_name = "P", value_parser = fraction)]
    top_p: Option<f32>,
    /// Leave out tokens less probable than P times the most probable one; 0 is none [default: the model's, else 0.05]
    #[arg(long, value_name = "P", value_parser = fraction)]
    min_p: Option<f32>,
    /// Make tokens of the last 64 less probable by this factor; 1 is none [default: the model's, else 1]
    #[arg(long, value_name = "R", value_parser = factor)]
    repeat_penalty: Option<f32>,
    /// Seed of the choices [default: another every time]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

impl ChoiceArgs {
    /// What the command line says, else the model, else llama.cpp's defaults.
    fn params(&self, model: &ModelRecord) -> SamplerParams {
        let default = SamplerParams::of_model(model);
        SamplerParams {
            temperature: self.temp.unwrap_or(default.temperature),
            top_k: self.top_k.unwrap_or(default.top_k),
            top_p: self.top_p.unwrap_or(default.top_p),
            min_p: self.min_p.unwrap_or(default.min_p),
            repetition_penalty: self.repeat_penalty.unwrap_or(default.repetition_penalty),
            seed: self.seed.unwrap_or_else(random),
        }
    }
}

/// A number that differs from run to run; short enough to be typed again.
fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::hash::RandomState::new().build_hasher().finish() % 1_000_000_000
}

fn number(text: &str, fits: impl Fn(f32) -> bool, expected: &str) -> Result<f32, String> {
    text.parse().ok().filter(|x: &f32| x.is_finite() && fits(*x)).ok_or_else(|| format!("expected {expected}"))
}

fn temperature(text: &str) -> Result<f32, String> {
    number(text, |x| x >= 0.0, "a number of at least 0")
}

fn fraction(text: &str) -> Result<f32, String> {
    number(text, |x| (0.0..=1.0).contains(&x), "a number from 0 to 1")
}

fn factor(text: &str) -> Result<f32, String> {
    number(text, |x| x > 0.0, "a number above 0")
}

/// Refuses ids that the vocabulary does not have.
fn check_ids(ids: &[u32], vocab: usize) -> Result<()> {
    match ids.iter().find(|id| **id as usize >= vocab) {
        Some(id) => bail!("--token-ids: {id} is not in the vocabulary, whose ids are 0 to {}", vocab - 1),
        None => Ok(()),
    }
}

/// Refuses an output that could not be written once the work is done.
fn check_output(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    ensure!(folder.is_dir(), "writing {}: there is no folder {}", path.display(), folder.display());
    ensure!(!path.is_dir(), "writing {}: it is a folder; give the name of a file", path.display());
    Ok(())
}

/// Text of a zero-padded field.
fn label(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned()
}
