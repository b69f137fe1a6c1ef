//! `forebay bench`: tokens a second of prompt and of generation, or the kernels alone.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Args;
use forebay_runtime::engine::Output;
use serde::Serialize;

use super::kernels::{self, KernelArgs, NOT_KERNELS};
use super::{MachineArgs, ModelArgs, Wanted, label, positive};
use crate::host::accounting::{Accounting, Counts, PolicyReport};
use crate::host::session::{self, Extra, Session};
use crate::host::size::bytes_text;

#[derive(Args)]
pub struct BenchArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens of the prompt test; 0 leaves it out
    #[arg(short = 'p', long = "prompt", value_name = "N", default_value = "512")]
    prompt: usize,
    /// Tokens of the generation test; 0 leaves it out
    #[arg(short = 'n', long = "gen", value_name = "N", default_value = "128")]
    generation: usize,
    /// Tokens that stand in the context before each test, which are not counted
    #[arg(short = 'd', long, value_name = "N", default_value = "0")]
    depth: usize,
    /// Times that each test is run, after one run that is not counted
    #[arg(short, long, value_name = "N", default_value = "5", value_parser = positive)]
    repetitions: usize,
    /// One JSON object a test instead of the table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    machine: MachineArgs,
    /// Measure matrix products of random weights instead of a model, beside a loop that only reads them
    #[arg(long, conflicts_with_all = NOT_KERNELS)]
    kernels: bool,
    #[command(flatten)]
    kernel: KernelArgs,
}

/// One test's result.
#[derive(Serialize)]
struct Row {
    model: String,
    image_bytes: u64,
    arena_bytes: u64,
    pool_bytes: u64,
    backend: &'static str,
    threads: usize,
    store: String,
    /// `pp` or `tg` and the number of tokens, and the depth if there is one, as llama-bench has it.
    test: String,
    tok_s_median: f64,
    tok_s_min: f64,
    tok_s_max: f64,
    bytes_read_per_token: f64,
    stall_share: f64,
    policy: PolicyReport,
    /// Of the runs that are counted, with what stands before them.
    cache: Accounting,
}

/// A sequence of ids that repeats late and means nothing; experts are used as random text would.
fn ids(count: usize, vocab: usize) -> Vec<u32> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % vocab as u64) as u32
    };
    (0..count).map(|_| next()).collect()
}

/// What one run of a test took.
struct Pass {
    time: Duration,
    stalled: Duration,
    /// Bytes of units read.
    bytes: u64,
}

/// Feeds `before` as a new sequence, then `tokens`, `step` at a time, which are what is measured.
fn pass(session: &mut Session<'_, '_>, before: &[u32], tokens: &[u32], step: usize) -> Result<Pass> {
    session.reset()?;
    if !before.is_empty() {
        session.feed(before, Output::None, |_, _| ())?;
    }
    let (stalled, bytes) = (session.stalled(), session.engine.stats().unit_bytes);
    let start = Instant::now();
    for chunk in tokens.chunks(step) {
        session.feed(chunk, Output::Last, |_, _| ())?;
    }
    let time = start.elapsed();
    Ok(Pass { time, stalled: session.stalled() - stalled, bytes: session.engine.stats().unit_bytes - bytes })
}

pub fn main(args: &BenchArgs) -> Result<()> {
    let backend = args.machine.backend()?;
    if args.kernels {
        let group = args.model.weights.group;
        return kernels::main(&args.kernel, backend, args.machine.threads(), group, args.json);
    }
    ensure!(args.prompt + args.generation > 0, "there is nothing to do: -p and -n are both 0");
    let found = args.model.find()?;
    let threads = args.machine.threads();
    let (setup, vocab, name) = found.file.probe(|image, _| {
        let model = image.model();
        let context = args.depth + args.prompt.max(args.generation);
        ensure!(
            context <= model.context(),
            "{context} tokens are longer than the model's context of {}; give fewer with -p, -n and -d",
            model.context()
        );
        let record = model.record();
        let name = format!("{} {}", label(&record.name), label(&record.weights_label));
        let extra = Extra::default();
        let batch = args.prompt.max(args.depth).max(1);
        let wanted = Wanted { context, batch, logit_rows: 1, extra, with_tokenizer: false };
        let setup = args.machine.setup(&found, image, backend, wanted)?;
        Ok((setup, model.vocab(), name))
    })?;
    let tests = [("pp", args.prompt, args.prompt.max(1)), ("tg", args.generation, 1)];
    if !args.json {
        println!(
            "| model | image | arena | backend | threads | test | tok/s, median (min to max) | read a token | hits | stalled |"
        );
        println!("|---|---:|---:|---|---:|---|---:|---:|---:|---:|");
    }
    let policy = PolicyReport::new(&setup);
    session::run(&found.file, setup, |session| {
        for (kind, count, step) in tests.into_iter().filter(|(_, count, _)| *count > 0) {
            let tokens = ids(args.depth + count, vocab);
            let (before, tokens) = tokens.split_at(args.depth);
            pass(session, before, tokens, step)?;
            let counts = Counts::of(&session.engine);
            let passes =
                (0..args.repetitions).map(|_| pass(session, before, tokens, step)).collect::<Result<Vec<_>>>()?;
            let seconds = |of: fn(&Pass) -> Duration| passes.iter().map(of).sum::<Duration>().as_secs_f64();
            let bytes: u64 = passes.iter().map(|pass| pass.bytes).sum();
            let mut rates: Vec<f64> = passes.iter().map(|pass| count as f64 / pass.time.as_secs_f64()).collect();
            rates.sort_by(f64::total_cmp);
            let depth = if args.depth > 0 { format!(" @ d{}", args.depth) } else { String::new() };
            let cache = Counts::of(&session.engine).since(&counts);
            let row = Row {
                model: name.clone(),
                image_bytes: session.file.len,
                arena_bytes: session.engine.plan().limits.arena,
                pool_bytes: session.engine.plan().pool,
                backend: session.backend(),
                threads,
                store: session.store_name.clone(),
                test: format!("{kind}{count}{depth}"),
                tok_s_median: rates[rates.len() / 2],
                tok_s_min: rates[0],
                tok_s_max: rates[rates.len() - 1],
                bytes_read_per_token: bytes as f64 / (count * args.repetitions) as f64,
                stall_share: seconds(|pass| pass.stalled) / seconds(|pass| pass.time),
                policy: policy.clone(),
                cache,
            };
            print(&row, args.json)?;
        }
        Ok(())
    })
}

fn print(row: &Row, json: bool) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string(row)?);
        return Ok(());
    }
    println!(
        "| {} | {} | {} | {} | {} | {} | {:.1} ({:.1} to {:.1}) | {} | {:.1} % | {:.0} % |",
        row.model,
        bytes_text(row.image_bytes),
        bytes_text(row.arena_bytes),
        row.backend,
        row.threads,
        row.test,
        row.tok_s_median,
        row.tok_s_min,
        row.tok_s_max,
        bytes_text(row.bytes_read_per_token as u64),
        100.0 * row.cache.hit_rate(),
        100.0 * row.stall_share
    );
    Ok(())
}
