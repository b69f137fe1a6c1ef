//! `forebay perplexity`

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Args;
use forebay_runtime::tokenizer::EncodeOptions;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::{MachineArgs, ModelArgs, Wanted};
use crate::host::accounting::{Accounting, Counts, PolicyReport};
use crate::host::generate::rate;
use crate::host::score::{LOGIT_ROWS, score_chunk};
use crate::host::session::{self, Extra};

/// Measure how well a model predicts a text, by the method of llama.cpp's llama-perplexity.
///
/// The text is tokenised once, with the begin-of-text token if the model expects one, and cut into chunks of as many
/// tokens as the context; what is left over is not used, and there must be at least two chunks. Each chunk is computed
/// by itself, its first token replaced by begin-of-text if the model expects one. Tokens of a chunk's second half are
/// scored, each by the logits after those before it. The perplexity is exp of the mean negative log-likelihood, its
/// error the standard error of that mean times the perplexity.
#[derive(Args)]
pub struct PerplexityArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The text
    #[arg(short, long, value_name = "TEXT")]
    file: PathBuf,
    /// Tokens of a chunk [default: 512, or the model's context]
    #[arg(short, long, value_name = "TOKENS", value_parser = super::positive)]
    context: Option<usize>,
    /// Chunks that are computed [default: all]
    #[arg(long, value_name = "N", value_parser = super::positive)]
    chunks: Option<usize>,
    #[command(flatten)]
    machine: MachineArgs,
    /// Print a line of JSON
    #[arg(long)]
    json: bool,
}

/// Sums over the tokens scored.
#[derive(Clone, Copy, Debug, Default)]
struct Score {
    count: u64,
    nll: f64,
    nll_squared: f64,
}

impl Score {
    /// Adds a token's negative logarithm of its probability.
    fn add(&mut self, nll: f64) {
        self.count += 1;
        self.nll += nll;
        self.nll_squared += nll * nll;
    }

    fn perplexity(&self) -> f64 {
        (self.nll / self.count as f64).exp()
    }

    /// Standard error of the perplexity.
    fn error(&self) -> f64 {
        if self.count < 2 {
            return 0.0;
        }
        let (n, mean) = (self.count as f64, self.nll / self.count as f64);
        let variance = (self.nll_squared / n - mean * mean).max(0.0);
        (variance / (n - 1.0)).sqrt() * self.perplexity()
    }
}

#[derive(Serialize)]
struct Report {
    perplexity: f64,
    error: f64,
    mean_nll: f64,
    tokens_scored: u64,
    chunks: usize,
    context: usize,
    tokens: usize,
    seconds: f64,
    tok_s: f64,
    arena_bytes: u64,
    pool_bytes: u64,
    backend: &'static str,
    threads: usize,
    policy: PolicyReport,
    cache: Accounting,
}

pub fn main(args: &PerplexityArgs) -> Result<()> {
    let backend = args.machine.backend()?;
    let what = || format!("reading {}", args.file.display());
    let bytes = std::fs::read(&args.file).with_context(what)?;
    let text = String::from_utf8(bytes).context("it is not UTF-8 text").with_context(what)?;
    let found = args.model.find()?;
    let threads = args.machine.threads();
    let (setup, mut tokens, bos) = found.file.probe(|image, tokenizer| {
        let model = image.model();
        let tokenizer = tokenizer.with_context(|| format!("{} has no tokenizer", found.file.path.display()))?;
        let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
        let options = EncodeOptions { add_bos: bos.is_some(), parse_special: false };
        let (tokens, _) = session::encode(&tokenizer, &text, options)?;
        let context = args.context.unwrap_or(model.context().min(512));
        ensure!(context >= 2, "a chunk of {context} token has nothing to score; give at least 2 with -c");
        ensure!(
            tokens.len() >= 2 * context,
            "{} has {} tokens, but two chunks of {context} need {}; give a longer text, or shorter chunks with -c",
            args.file.display(),
            tokens.len(),
            2 * context
        );
        let extra = Extra::default();
        let wanted = Wanted { context, batch: context, logit_rows: LOGIT_ROWS, extra, with_tokenizer: false };
        let setup = args.machine.setup(&found, image, backend, wanted)?;
        Ok((setup, tokens, bos))
    })?;
    drop(text);
    let context = setup.plan.limits.context;
    let chunks = (tokens.len() / context).min(args.chunks.unwrap_or(usize::MAX));
    let (arena_bytes, pool_bytes) = (setup.plan.limits.arena, setup.plan.pool);
    let bar = ProgressBar::new(chunks as u64);
    if let Ok(style) = ProgressStyle::with_template("[{bar:30}] {pos}/{len} {eta} {msg}") {
        bar.set_style(style.progress_chars("=> "));
    }
    let mut score = Score::default();
    let policy = PolicyReport::new(&setup);
    let start = Instant::now();
    let cache = session::run(&found.file, setup, |session| {
        for chunk in tokens.chunks_exact_mut(context).take(chunks) {
            score_chunk(session, chunk, bos, |nll| score.add(nll))?;
            bar.set_message(format!("perplexity {:.4}", score.perplexity()));
            bar.inc(1);
        }
        Ok(Counts::of(&session.engine).since(&Counts::default()))
    })?;
    let time = start.elapsed();
    bar.finish_and_clear();
    let mut out = std::io::stdout().lock();
    if args.json {
        let report = Report {
            perplexity: score.perplexity(),
            error: score.error(),
            mean_nll: score.nll / score.count as f64,
            tokens_scored: score.count,
            chunks,
            context,
            tokens: tokens.len(),
            seconds: time.as_secs_f64(),
            tok_s: rate(chunks * context, time),
            arena_bytes,
            pool_bytes,
            backend: backend.name(),
            threads,
            policy,
            cache,
        };
        writeln!(out, "{}", serde_json::to_string(&report)?)?;
    } else {
        writeln!(out, "perplexity {:.4} +/- {:.4}", score.perplexity(), score.error())?;
        let rate = rate(chunks * context, time);
        writeln!(out, "{chunks} chunks of {context} tokens, {} tokens scored, {rate:.1} tok/s", score.count)?;
        writeln!(out, "policy {}", policy.text())?;
        for (what, text) in cache.rows() {
            writeln!(out, "{what} {text}")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::score::nll;

    #[test]
    fn a_uniform_guess_has_the_perplexity_of_its_choices() {
        let mut score = Score::default();
        for token in 0..8 {
            score.add(nll(&[3.0; 8], token));
        }
        assert!((score.perplexity() - 8.0).abs() < 1e-12);
        assert!(score.error() < 1e-6);
    }

    #[test]
    fn the_error_is_that_of_the_mean() {
        let mut score = Score::default();
        // Probabilities 3/4 and 1/4.
        score.add(nll(&[3f32.ln(), 0.0], 0));
        score.add(nll(&[3f32.ln(), 0.0], 1));
        let (a, b) = (-(0.75f64.ln()), -(0.25f64.ln()));
        let perplexity = ((a + b) / 2.0).exp();
        assert!((score.perplexity() - perplexity).abs() < 1e-6);
        // Of two values the standard error of the mean is half their distance.
        assert!((score.error() - (b - a) / 2.0 * perplexity).abs() < 1e-6);
    }
}
