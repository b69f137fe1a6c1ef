//! `forebay plan`

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use forebay::planner::{Candidate, Question, Room, Scores, fastest, layout, profile};
use forebay::profile::Device;
use forebay::settings::{PlannedPolicy, Profiled, Settings, VERSION};
use forebay::simulate::{Behaviour, MeasuredCosts, behaviour};
use forebay::trace::{Head, Trace};
use forebay_runtime::open::Image;
use forebay_runtime::plan::Plan;
use forebay_runtime::policy::{Loading, Policy, Thresholds};
use forebay_runtime::tokenizer::EncodeOptions;
use forebay_storage::layers::DeviceProfile;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::{ComputeArgs, LONG_CONTEXT, ModelArgs, with_batch};
use crate::host::models::Found;
use crate::host::rehearse::{self, Rehearsal, Score, rehearse};
use crate::host::score::{LOGIT_ROWS, score_chunk};
use crate::host::session::{self, Extra, Ram, Request, Setup};
use crate::host::size::{Size, bytes_text};
use crate::host::store::StoreOptions;

/// Fewest tokens that say anything.
const LEAST: usize = 64;
/// Tokens of a chunk whose perplexity is measured, at most.
const CHUNK: usize = 256;
/// Tokens that are computed to find out what computing takes.
const COSTED: usize = 128;
/// Tokens of a run that tries a depth of prefetch, and the seconds that it may take.
const TRIAL: (usize, f64) = (128, 6.0);
/// Layers ahead that are tried.
const DEPTHS: u8 = 2;
/// A depth must be faster than none by this share to be kept.
const GAIN: f64 = 0.03;

/// Choose how experts are loaded and kept for a memory and a device, and write that into the image.
///
/// A trace of what the model's routers choose is replayed with every policy that is allowed; computing is measured here,
/// reading is reckoned with the device. The fastest becomes the image's plan, which `run`, `bench`, `chat`, `perplexity`
/// and `logits` then use wherever their options do not say otherwise. Planning again replaces the plan; the rest of the
/// image is left as it is.
#[derive(Args)]
pub struct PlanArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The whole memory of a run: bytes, or with a unit such as 64M, 2G, 512KiB
    #[arg(long, value_name = "SIZE")]
    ram: Size,
    /// The device: a name such as pi4-sd, bw=400MB/s,lat=120us,iops=20k,qd=8, or a file that `forebay flash-profile -o`
    /// wrote (its name ends in .json)
    #[arg(long, value_name = "NAME|LIST|FILE", value_parser = super::device)]
    device: DeviceProfile,
    /// Tokens of the longest sequence [default: the model's, at most 4096]
    #[arg(short, long, value_name = "TOKENS", value_parser = super::positive)]
    context: Option<usize>,
    /// What `forebay run --trace` wrote, to be replayed [default: the text is computed, and traced]
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// The calibration text [default: what the model itself writes]
    #[arg(short, long, value_name = "TEXT")]
    file: Option<PathBuf>,
    /// Tokens of it that are used
    #[arg(long, value_name = "N", default_value = "4096", value_parser = super::positive)]
    tokens: usize,
    /// How much worse the perplexity of the calibration text may become, two standard errors of that included: a share, or
    /// a percentage such as 1%. With it `scored` and `miss` are tried too, with thresholds that keep within it; the longer
    /// the text, the surer and the lower they are; 0 is full precision only
    #[arg(long, value_name = "SHARE", default_value = "0", value_parser = share)]
    max_loss: f64,
    /// Do not try prefetch by short runs on the throttled device; none is planned then
    #[arg(long)]
    no_trials: bool,
    /// Show the plan, but leave the image as it is
    #[arg(long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    compute: ComputeArgs,
}

fn share(text: &str) -> Result<f64, String> {
    let (number, unit) = text.strip_suffix('%').map_or((text, 1.0), |number| (number, 0.01));
    let value = number.trim().parse().ok().map(|x: f64| x * unit);
    value.filter(|x| (0.0..=1.0).contains(x)).ok_or_else(|| "expected a share such as 0.01, or 1%".into())
}

/// What stays the same while candidates are tried.
struct Planner<'p> {
    args: &'p PlanArgs,
    found: &'p Found,
    context: usize,
    backend: forebay_kernels::exec::Backend,
    bar: ProgressBar,
}

/// A candidate for the table and for programs.
#[derive(Serialize)]
struct Row {
    policy: PlannedPolicy,
    /// Perplexity lost on the calibration text, for policies that may lose some.
    loss: Option<f64>,
    /// Share of all units' uses for which nothing was read on demand.
    hit_rate: f64,
    predicted: forebay::simulate::Prediction,
    slots: usize,
    pieces: usize,
}

/// A run that tried a depth of prefetch on the throttled device.
#[derive(Clone, Copy, Serialize)]
struct Trial {
    prefetch: u8,
    tok_s: f64,
}

#[derive(Serialize)]
struct Report<'r> {
    plan: &'r Settings,
    candidates: Vec<Row>,
    trials: Vec<Trial>,
    profiled: Vec<Profiled>,
    /// Hit rates of all units in full precision, those of dense layers included.
    lru_hit_rate_all: f64,
    belady_hit_rate_all: f64,
    routing: Behaviour,
    written: bool,
}

impl Planner<'_> {
    fn request(&self, image: &Image<'_>, policy: Policy, batch: usize, logit_rows: usize) -> Request {
        let (kv, threads) = (self.args.compute.kv(image.model()), self.args.compute.threads());
        let extra = Extra::default();
        Request { context: self.context, batch, logit_rows, kv, threads, policy, extra }
    }

    /// How a run would split the arena that is planned for.
    fn arena(&self, image: &Image<'_>, policy: Policy) -> Result<Plan> {
        let ram = Ram::Given(self.args.ram.clone());
        with_batch(self.args.compute.batch, |batch| {
            session::plan(&self.found.file, image, &self.request(image, policy, batch, 1), &ram)
        })
    }

    fn setup(&self, plan: Plan, device: Option<DeviceProfile>) -> Setup {
        Setup {
            plan,
            extra: Extra::default(),
            backend: self.backend,
            threads: self.args.compute.threads(),
            store: StoreOptions { kind: self.args.compute.store, device },
            with_tokenizer: true,
            deadline_ms: None,
            planned: Vec::new(),
        }
    }

    /// Everything resident, if half of the machine's memory has room for it.
    fn ample(&self, policy: Policy, batch: usize, logit_rows: usize) -> Result<Setup> {
        let plan = self.found.file.probe(|image, _| {
            session::plan(&self.found.file, image, &self.request(image, policy, batch, logit_rows), &Ram::Ample)
        })?;
        Ok(self.setup(plan, None))
    }

    fn rehearse(&self, setup: Setup, score: Score<'_>, what: &str) -> Result<Rehearsal> {
        self.bar.set_message(what.to_owned());
        session::run(&self.found.file, setup, |session| rehearse(session, score))
    }

    /// The negative logarithms of `tokens`' probabilities under `scored`.
    fn scored(&self, thresholds: Thresholds, tokens: &[u32], bos: Option<u32>) -> Result<Vec<f64>> {
        let Thresholds { full, low, low_levels } = thresholds;
        self.bar.set_message(format!("perplexity with thresholds {full} and {low}, {low_levels} levels"));
        let chunk = CHUNK.min(self.context).min(tokens.len());
        let policy = Policy { loading: Loading::Scored(thresholds), ..Policy::default() };
        let mut nlls = Vec::new();
        session::run(&self.found.file, self.ample(policy, chunk, LOGIT_ROWS)?, |session| {
            for chunk in tokens.to_vec().chunks_exact_mut(chunk) {
                score_chunk(session, chunk, bos, |nll| nlls.push(nll))?;
            }
            Ok(())
        })?;
        Ok(nlls)
    }

    /// Runs of the model's own text on the throttled device with `winner` and more and more prefetch.
    fn trials(&self, winner: &Candidate) -> Result<Vec<Trial>> {
        let (most, seconds) = TRIAL;
        let count = ((winner.prediction.tok_s * seconds) as usize).min(most);
        if self.args.no_trials || count < most / 8 || winner.prediction.bytes_per_token == 0.0 {
            return Ok(Vec::new());
        }
        let mut trials: Vec<Trial> = Vec::new();
        // Every depth twice, by turns; the better time counts.
        for prefetch in (0..=DEPTHS).chain(0..=DEPTHS) {
            let plan = self.found.file.probe(|image, _| self.arena(image, Policy { prefetch, ..winner.policy }))?;
            let setup = self.setup(plan, Some(self.args.device));
            let made = self.rehearse(setup, Score::Own(count), &format!("trying prefetch {prefetch}"))?;
            let tok_s = count as f64 / made.elapsed.as_secs_f64().max(1e-9);
            match trials.iter_mut().find(|trial| trial.prefetch == prefetch) {
                Some(known) => known.tok_s = known.tok_s.max(tok_s),
                None => trials.push(Trial { prefetch, tok_s }),
            }
        }
        Ok(trials)
    }
}

/// The trace in `path`, which must be of this image.
fn load(path: &std::path::Path, head: &Head, found: &Found) -> Result<Trace> {
    let trace = Trace::load(path)?;
    ensure!(
        trace.head.image == head.image && trace.head.layers == head.layers,
        "{} is of another image than {}; record one with `forebay run {} --trace`",
        path.display(),
        found.file.path.display(),
        found.file.path.display()
    );
    let single = (0..trace.passes.len()).filter(|pass| trace.tokens(*pass) == 1).count();
    ensure!(
        single >= LEAST,
        "{} has {single} tokens that were computed one at a time; record at least {LEAST}, better thousands",
        path.display()
    );
    Ok(trace)
}

pub fn main(args: &PlanArgs) -> Result<()> {
    let backend = args.compute.backend()?;
    ensure!(args.tokens >= LEAST, "--tokens {}: expected at least {LEAST}", args.tokens);
    let text = args.file.as_ref().map(|path| {
        let what = || format!("reading {}", path.display());
        let bytes = std::fs::read(path).with_context(what)?;
        String::from_utf8(bytes).context("it is not UTF-8 text").with_context(what)
    });
    let text = text.transpose()?;
    let found = args.model.find()?;
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed} {msg}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(std::time::Duration::from_millis(200));
    let report = plan(args, &found, backend, text.as_deref(), &bar);
    bar.finish_and_clear();
    report
}

fn plan(
    args: &PlanArgs,
    found: &Found,
    backend: forebay_kernels::exec::Backend,
    text: Option<&str>,
    bar: &ProgressBar,
) -> Result<()> {
    let path = &found.file.path;
    // Whatever is wrong with the arguments shows before anything is computed.
    let (head, context, tokens, bos) = found.file.probe(|image, tokenizer| {
        let model = image.model();
        let context = args.context.unwrap_or(model.context().min(LONG_CONTEXT));
        let head = Head::new(found.file.superblock.id(), model);
        let bos = tokenizer.as_ref().and_then(|t| t.bos().filter(|_| t.add_bos()));
        let Some(text) = text else { return Ok((head, context, None, bos)) };
        let tokenizer = tokenizer.with_context(|| format!("{} has no tokenizer for a text", path.display()))?;
        let options = EncodeOptions { add_bos: bos.is_some(), parse_special: false };
        let (mut tokens, _) = session::encode(&tokenizer, text, options)?;
        ensure!(tokens.len() >= LEAST, "the text has {} tokens; give one of at least {LEAST}", tokens.len());
        tokens.truncate(args.tokens);
        Ok((head, context, Some(tokens), bos))
    })?;
    let planner = Planner { args, found, context, backend, bar: bar.clone() };
    let exact = found.file.probe(|image, _| planner.arena(image, Policy::default()))?;
    let batch = exact.batch;
    let loaded = args.trace.as_deref().map(|path| load(path, &head, found)).transpose()?;

    // What computing takes, what is chosen, and a text.
    let resident = || planner.ample(Policy::default(), 1, 1);
    let score = match (&loaded, &tokens) {
        (Some(_), _) if args.max_loss == 0.0 || tokens.is_some() => Score::Own(COSTED),
        (_, Some(tokens)) => Score::Text(tokens),
        (_, None) => Score::Own(args.tokens),
    };
    let recorded = planner.rehearse(resident()?, score, "computing the calibration text")?;
    let streamed = planner.rehearse(planner.setup(exact, None), Score::Own(COSTED), "measuring what reading costs")?;
    let measured = rehearse::costs(&recorded.took, &streamed.took);
    let costs = found.file.probe(|image, _| Ok(rehearse::shared(image.model(), &head, &measured)))?;
    let tokens = tokens.unwrap_or(recorded.tokens);
    let trace = match loaded {
        Some(trace) => trace,
        None => Trace { head: head.clone(), passes: recorded.passes },
    };
    let question = Question { trace: &trace, costs: &costs, device: &args.device, depth: recorded.depth };

    let profiled = thresholds(&planner, &trace, &tokens, bos)?;
    let (rows, winner) = compare(&planner, &question, &profiled)?;
    let loading = |loading: Loading| rows.iter().map(|(c, _)| c).filter(move |c| c.policy.loading == loading);
    let lru = loading(winner.policy.loading).next().context("LRU is always tried")?;
    let exact_room = loading(Loading::Exact).next().context("exact is always tried")?.room;
    let (belady_all, belady) = question.belady(exact_room);

    let trials = planner.trials(&winner)?;
    let none = trials.iter().find(|trial| trial.prefetch == 0).map_or(f64::MAX, |trial| trial.tok_s);
    let faster = trials.iter().max_by(|a, b| a.tok_s.total_cmp(&b.tok_s)).filter(|t| t.tok_s > none * (1.0 + GAIN));
    let (prefetch, gain) = faster.map_or((0, 1.0), |trial| (trial.prefetch, trial.tok_s / none));
    let policy = Policy { prefetch, ..winner.policy };
    let mut predicted = winner.prediction;
    predicted.tok_s *= gain;
    let settings = Settings {
        version: VERSION,
        ram: args.ram.bytes,
        context,
        batch,
        device: Device::from(args.device),
        policy: PlannedPolicy::new(&policy),
        profiled: best_profiled(&profiled, &rows, &winner),
        predicted,
        lru_hit_rate: lru.prediction.hit_rate,
        belady_hit_rate: belady,
        costs: measured,
        layout: layout(&head, &winner, &args.device),
        trace_tokens: (0..trace.passes.len()).map(|pass| trace.tokens(pass)).sum(),
    };
    if !args.dry_run {
        settings.store(path)?;
    }
    let report = Report {
        plan: &settings,
        candidates: rows.iter().map(|(candidate, loss)| row(candidate, *loss)).collect(),
        trials,
        profiled,
        lru_hit_rate_all: lru.hit_rate,
        belady_hit_rate_all: belady_all,
        routing: behaviour(&trace),
        written: !args.dry_run,
    };
    bar.finish_and_clear();
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&report)?)?;
        return Ok(());
    }
    table(&mut out, &report, &measured, found)
}

/// Thresholds that keep within the loss allowed, for every number of levels that low precision can have.
fn thresholds(planner: &Planner<'_>, trace: &Trace, tokens: &[u32], bos: Option<u32>) -> Result<Vec<Profiled>> {
    let experts = trace.head.layers.iter().filter(|layer| layer.experts);
    let levels = experts.map(|layer| layer.levels).max().unwrap_or(1);
    let mut all = Vec::new();
    if planner.args.max_loss > 0.0 {
        let scores = Scores::of(trace);
        for low_levels in 1..levels.max(2) {
            let mut measure = |thresholds: Thresholds| planner.scored(thresholds, tokens, bos);
            all.extend(profile(&scores, low_levels, planner.args.max_loss, &mut measure)?);
        }
    }
    Ok(all)
}

/// A candidate and the loss of perplexity that its thresholds had; `None` for those that give up no precision.
type Rated = (Candidate, Option<f64>);

/// Every candidate with the loss that it may have, and the fastest of them.
fn compare(planner: &Planner<'_>, question: &Question<'_>, profiled: &[Profiled]) -> Result<(Vec<Rated>, Candidate)> {
    let mut loadings = vec![(Loading::Exact, None)];
    for p in profiled {
        let thresholds = Thresholds { full: p.full, low: p.low, low_levels: p.low_levels };
        loadings.push((Loading::Scored(thresholds), Some(p.loss)));
        // It uses at least the precision that `scored` does.
        loadings.push((Loading::Miss(thresholds), Some(p.loss)));
    }
    let mut rows = Vec::new();
    let mut best = Vec::new();
    for (loading, loss) in loadings {
        planner.bar.set_message(format!("replaying with {}", loading.name()));
        let policy = Policy { loading, ..Policy::default() };
        let plan = planner.found.file.probe(|image, _| planner.arena(image, policy))?;
        let room = Room { slots: plan.slots, slot_len: plan.slot_len, pieces: plan.pieces };
        let candidates = question.evictions(loading, room)?;
        best.push(*fastest(&candidates).context("there is always LRU")?);
        rows.extend(candidates.into_iter().map(|candidate| (candidate, loss)));
    }
    let winner = *fastest(&best).context("exact is always tried")?;
    Ok((rows, winner))
}

/// The thresholds to keep: the winner's, else those with which `scored` is fastest.
fn best_profiled(profiled: &[Profiled], rows: &[Rated], winner: &Candidate) -> Option<Profiled> {
    let of = |loading: Loading| match loading {
        Loading::Scored(t) | Loading::Miss(t) => {
            profiled.iter().find(|p| (p.full, p.low, p.low_levels) == (t.full, t.low, t.low_levels)).copied()
        }
        _ => None,
    };
    let scored = rows.iter().map(|(candidate, _)| candidate).filter(|c| matches!(c.policy.loading, Loading::Scored(_)));
    let fastest = scored.max_by(|a, b| a.prediction.tok_s.total_cmp(&b.prediction.tok_s));
    of(winner.policy.loading).or_else(|| of(fastest?.policy.loading))
}

fn row(candidate: &Candidate, loss: Option<f64>) -> Row {
    Row {
        policy: PlannedPolicy::new(&candidate.policy),
        loss,
        hit_rate: candidate.hit_rate,
        predicted: candidate.prediction,
        slots: candidate.room.slots,
        pieces: candidate.room.pieces,
    }
}

fn table(out: &mut impl Write, report: &Report<'_>, costs: &MeasuredCosts, found: &Found) -> Result<()> {
    let plan = report.plan;
    let mut line = |what: &str, text: String| writeln!(out, "{what:<10} {text}");
    let d = plan.device;
    line("image", found.file.path.display().to_string())?;
    line("memory", format!("{}, context of {} tokens", bytes_text(plan.ram), plan.context))?;
    line(
        "device",
        format!("{:.1} MB/s, {:.0} us, {} at once", d.bandwidth as f64 / 1e6, d.latency_ns as f64 / 1e3, d.queue_depth),
    )?;
    line(
        "computing",
        format!(
            "{:.3} ms a token, {:.3} ms a MiB read, {:.0} us to wake",
            1e3 * costs.token_s,
            1e3 * costs.read_byte_s * f64::from(1 << 20),
            1e6 * costs.wake_s
        ),
    )?;
    line("trace", format!("{} tokens; {}", plan.trace_tokens, report.routing))?;
    writeln!(
        out,
        "\n{:<26} {:<32} {:>8} {:>12} {:>7} {:>8} {:>9} {:>6}",
        "loading", "eviction", "tok/s", "read a token", "hits", "stalled", "worst", "loss"
    )?;
    for rows in report.candidates.chunk_by(|a, b| a.policy.loading_text() == b.policy.loading_text()) {
        // LRU, which comes first, and the fastest; programs get all of them.
        let fastest = rows.iter().max_by(|a, b| a.predicted.tok_s.total_cmp(&b.predicted.tok_s));
        let better = fastest.filter(|fastest| fastest.predicted.tok_s > rows[0].predicted.tok_s);
        for row in rows.first().into_iter().chain(better) {
            let p = &row.predicted;
            writeln!(
                out,
                "{:<26} {:<32} {:>8.2} {:>12} {:>6.1}% {:>7.0}% {:>7.1}ms {:>6}",
                row.policy.loading_text(),
                row.policy.eviction,
                p.tok_s,
                bytes_text(p.bytes_per_token as u64),
                100.0 * p.hit_rate,
                100.0 * p.stall_share,
                1e3 * p.worst_token_s,
                row.loss.map_or("-".into(), |loss| format!("{:.2}%", 100.0 * loss))
            )?;
        }
    }
    writeln!(
        out,
        "{:<26} {:<32} {:>8} {:>12} {:>6.1}%",
        "exact",
        "Belady's optimum",
        "",
        "",
        100.0 * plan.belady_hit_rate
    )?;
    writeln!(out)?;
    for trial in &report.trials {
        writeln!(out, "tried on the throttled device: prefetch {}, {:.2} tok/s", trial.prefetch, trial.tok_s)?;
    }
    plan.layout.advice.iter().try_for_each(|advice| writeln!(out, "note: {advice}"))?;
    write!(out, "{plan}")?;
    let what = if report.written { "written into the image" } else { "not written" };
    Ok(writeln!(out, "{what}")?)
}
