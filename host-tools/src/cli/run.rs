//! `forebay run`

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use forebay::template::Message;
use forebay_runtime::open::Image;
use forebay_runtime::sample::{Sampler, SamplerParams};
use forebay_runtime::tokenizer::{EncodeOptions, Tokenizer};
use serde::Serialize;

use super::{MachineArgs, ModelArgs, SampleArgs, Wanted, check_ids, check_output, label};
use crate::host::accounting::{Accounting, Counts, PolicyReport};
use crate::host::generate::{Generated, Until, generate, rate};
use crate::host::models::Found;
use crate::host::session::{self, Extra, Session, Setup};
use crate::host::size::bytes_text;

/// Tokens that are generated unless it is said.
const DEFAULT_COUNT: usize = 200;

#[derive(Args)]
pub struct RunArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The text to go on from [default, for the bundled model: "Once upon a time"]
    #[arg(short, long, value_name = "TEXT")]
    prompt: Option<String>,
    /// Ids to go on from, instead of a text
    #[arg(long, value_name = "ID,ID,…", value_delimiter = ',', conflicts_with_all = ["prompt", "chat", "system"])]
    token_ids: Option<Vec<u32>>,
    /// Most tokens to generate [default: 200, or what the context leaves]
    #[arg(short, long, value_name = "N", value_parser = super::positive)]
    n: Option<usize>,
    /// Tokens of prompt and answer together [default: as many as are wanted]
    #[arg(short, long, value_name = "TOKENS", value_parser = super::positive)]
    context: Option<usize>,
    /// Put the prompt to the model as a question, by its chat template
    #[arg(long)]
    chat: bool,
    /// Begin the conversation with this system text (implies --chat)
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    sample: SampleArgs,
    #[command(flatten)]
    machine: MachineArgs,
    /// Write down which experts every token chooses, for `forebay plan` (docs/trace.md has the format)
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Print only what is generated, not the prompt before it
    #[arg(long)]
    no_display_prompt: bool,
    /// Print a line of JSON after the text
    #[arg(long)]
    json: bool,
}

/// The prompt as the model gets it.
enum Prompt {
    Ids(Vec<u32>),
    Text { text: String, options: EncodeOptions },
}

/// What is known before the arena is taken.
struct Prepared {
    prompt: Prompt,
    setup: Setup,
    count: usize,
    params: SamplerParams,
    name: String,
    policy: PolicyReport,
}

/// The line of JSON.
#[derive(Serialize)]
struct Report<'r> {
    text: &'r str,
    tokens: &'r [u32],
    prompt_tokens: usize,
    prompt_tok_s: f64,
    gen_tokens: usize,
    gen_tok_s: f64,
    arena_bytes: u64,
    pool_bytes: u64,
    streamed_bytes_total: u64,
    policy: PolicyReport,
    cache: Accounting,
    /// From the beginning of the run, before anything was read.
    first_token_s: f64,
    /// Tokens that took longer than the deadline.
    late_tokens: Option<u64>,
    stall_s: f64,
    image_bytes: u64,
    stop: &'static str,
    backend: &'static str,
    threads: usize,
    store: &'r str,
    seed: u64,
    retries: u64,
    peak_rss_bytes: Option<u64>,
}

pub fn main(args: &RunArgs) -> Result<()> {
    args.trace.as_deref().map_or(Ok(()), check_output)?;
    let backend = args.machine.backend()?;
    let found = args.model.find()?;
    let prepared = found.file.probe(|image, tokenizer| prepare(args, &found, backend, image, tokenizer))?;
    let Prepared { prompt, setup, count, params, name, policy } = prepared;
    let threads = setup.threads;
    session::run(&found.file, setup, |session| {
        let to = match &prompt {
            Prompt::Ids(ids) => {
                session.history[..ids.len()].copy_from_slice(ids);
                ids.len()
            }
            Prompt::Text { text, options } => session.encode(text, *options, 0)?,
        };
        let mut out = std::io::stdout().lock();
        if let (Some(text), false) = (&args.prompt, args.no_display_prompt || args.json || args.chats()) {
            write!(out, "{text}")?;
        } else if args.prompt.is_none() && args.token_ids.is_none() && !args.json && !args.no_display_prompt {
            write!(out, "{DEFAULT_PROMPT}")?;
        }
        out.flush()?;
        args.trace.as_deref().map_or(Ok(()), |path| session.begin_trace(path))?;
        let until = Until { count, ignore_eos: args.sample.ignore_eos };
        let mut show = |part: &str| Ok(out.write_all(part.as_bytes()).and_then(|()| out.flush())?);
        let made = generate(session, 0, to, until, &mut Sampler::new(params), &mut show)?;
        session.end_trace()?;
        writeln!(out)?;
        let used = Counts::of(&session.engine).since(&Counts::default());
        summary(session, &made, to, threads, &params, &name, (&policy, &used));
        if args.json {
            let report = report(session, &made, to, threads, &params, (policy, used));
            writeln!(out, "{}", serde_json::to_string(&report)?)?;
        }
        Ok(())
    })
}

/// The bundled model's prompt.
const DEFAULT_PROMPT: &str = "Once upon a time";

impl RunArgs {
    fn chats(&self) -> bool {
        self.chat || self.system.is_some()
    }

    /// The prompt, and its ids.
    fn prompt(&self, found: &Found, vocab: usize, tokenizer: Option<Tokenizer<'_>>) -> Result<(Prompt, usize, usize)> {
        if let Some(ids) = &self.token_ids {
            check_ids(ids, vocab)?;
            return Ok((Prompt::Ids(ids.clone()), ids.len(), 0));
        }
        let text = match &self.prompt {
            Some(text) => text.as_str(),
            None if found.bundled => DEFAULT_PROMPT,
            None => bail!("there is no prompt; give one with -p TEXT or --token-ids"),
        };
        ensure!(!text.is_empty(), "the prompt is empty; give a text with -p or ids with --token-ids");
        let path = found.file.path.display();
        let tokenizer = tokenizer.with_context(|| format!("{path} has no tokenizer; give --token-ids"))?;
        let (text, add_bos) = if self.chats() {
            let template = found.file.chat_template(&tokenizer)?;
            let system = self.system.as_ref().map(|system| Message::new("system", system));
            let messages: Vec<Message> = system.into_iter().chain([Message::new("user", text)]).collect();
            let text = template.render(&messages, true)?;
            let add_bos = tokenizer.add_bos() && !template.has_bos(&text);
            (text, add_bos)
        } else {
            (text.to_owned(), tokenizer.add_bos())
        };
        let options = EncodeOptions { add_bos, parse_special: true };
        let (ids, scratch) = session::encode(&tokenizer, &text, options)?;
        ensure!(!ids.is_empty(), "the prompt has no tokens; give a longer one with -p, or --token-ids");
        Ok((Prompt::Text { text, options }, ids.len(), scratch))
    }
}

fn prepare(
    args: &RunArgs,
    found: &Found,
    backend: forebay_kernels::exec::Backend,
    image: &Image<'_>,
    tokenizer: Option<Tokenizer<'_>>,
) -> Result<Prepared> {
    let model = image.model();
    let (prompt, ids, scratch) = args.prompt(found, model.vocab(), tokenizer)?;
    let wanted = ids.saturating_add(args.n.unwrap_or(DEFAULT_COUNT));
    let context = args.context.unwrap_or(wanted.min(model.context()).max(1));
    ensure!(
        ids <= context,
        "the prompt has {ids} tokens but the context only {context}; give a shorter prompt{}",
        if context < model.context() { ", or a longer context with -c" } else { "" }
    );
    let params = args.sample.choice.params(model.record());
    let extra = Extra { candidates: Sampler::candidates(&params, model.vocab()), scratch };
    let wanted = Wanted { context, batch: ids, logit_rows: 1, extra, with_tokenizer: tokenizer.is_some() };
    let setup = args.machine.setup(found, image, backend, wanted)?;
    let record = model.record();
    let name = format!("{} ({}, {})", label(&record.name), label(&record.family), label(&record.weights_label));
    let policy = PolicyReport::new(&setup);
    Ok(Prepared { prompt, setup, count: args.n.unwrap_or(DEFAULT_COUNT), params, name, policy })
}

fn report<'r>(
    session: &'r Session<'_, '_>,
    made: &'r Generated,
    prompt: usize,
    threads: usize,
    params: &SamplerParams,
    (policy, cache): (PolicyReport, Accounting),
) -> Report<'r> {
    let stats = session.engine.stats();
    let plan = session.engine.plan();
    Report {
        text: &made.text,
        tokens: &made.tokens,
        prompt_tokens: prompt,
        prompt_tok_s: rate(prompt, made.prompt_time),
        gen_tokens: made.tokens.len(),
        gen_tok_s: made.decode_rate(),
        arena_bytes: plan.limits.arena,
        pool_bytes: plan.pool,
        streamed_bytes_total: session.streamed_len,
        policy,
        cache,
        first_token_s: made.first_token.as_secs_f64(),
        late_tokens: session.late().map(|(late, _)| late),
        stall_s: session.stalled().as_secs_f64(),
        image_bytes: session.file.len,
        stop: made.stop.name(),
        backend: session.backend(),
        threads,
        store: &session.store_name,
        seed: params.seed,
        retries: stats.retries,
        peak_rss_bytes: session::peak_rss(),
    }
}

/// The table on standard error.
fn summary(
    session: &Session<'_, '_>,
    made: &Generated,
    prompt: usize,
    threads: usize,
    params: &SamplerParams,
    name: &str,
    (policy, used): (&PolicyReport, &Accounting),
) {
    let total = made.prompt_time + made.decode_time;
    eprintln!();
    let line = |what: &str, text: String| eprintln!("{what:<11} {text}");
    line("model", format!("{name}, image of {}", bytes_text(session.file.len)));
    line("prompt", format!("{prompt} tokens, {:.1} tok/s", rate(prompt, made.prompt_time)));
    line(
        "generation",
        format!("{} tokens, {:.1} tok/s, ended by {}", made.tokens.len(), made.decode_rate(), made.stop.name()),
    );
    line("first token", format!("after {:.3} s", made.first_token.as_secs_f64()));
    memory_lines(session, &line);
    used.rows().into_iter().for_each(|(what, text)| line(what, text));
    let late = session.late().map_or(String::new(), |(late, all)| format!("; {late} of {all} tokens were late"));
    line("policy", policy.text() + &late);
    line("stalled", format!("{:.3} s of {:.3} s", session.stalled().as_secs_f64(), total.as_secs_f64()));
    line("machine", format!("{}, {threads} threads; {}", session.backend(), session.store_name));
    let sampling = match params.temperature > 0.0 {
        true => format!(
            "temperature {}, top-k {}, top-p {}, min-p {}, seed {}",
            params.temperature, params.top_k, params.top_p, params.min_p, params.seed
        ),
        false => "greedy".to_owned(),
    };
    line("sampling", sampling);
}

/// The arena and its pool.
pub fn memory_lines(session: &Session<'_, '_>, line: &dyn Fn(&str, String)) {
    let plan = session.engine.plan();
    let own = plan.bookkeeping + plan.limits.reserved;
    line(
        "arena",
        format!(
            "{}: tables {}, resident {}, state {}, working {}, own {}, pool {}",
            bytes_text(plan.limits.arena),
            bytes_text(plan.tables),
            bytes_text(plan.resident),
            bytes_text(plan.state),
            bytes_text(plan.working),
            bytes_text(own),
            bytes_text(plan.pool)
        ),
    );
    let share = 100.0 * plan.pool as f64 / (session.streamed_len as f64).max(1.0);
    let what = if plan.pieces > 1 { "levels of units" } else { "units" };
    let pinned = match plan.pinned_slots {
        0 => String::new(),
        pinned => format!(", {pinned} of them pinned"),
    };
    line(
        "pool",
        format!(
            "{} {what}{pinned}, {share:.1} % of the {} that are streamed",
            plan.slots,
            bytes_text(session.streamed_len)
        ),
    );
}
