//! The application that every board runs: open an image, then generate greedily once and report, or [serve].
//!
//! Everything that a single run prints is meant for people and for tests alike: tokens and the hash of all logits' bits
//! are equal to a host's for the same image, prompt and key/value format.
//!
//! [serve]: crate::serve

use core::fmt::{self, Debug, Display};

use embedded_io::Write;
use forebay_kernels::exec::{Backend, Exec, Workers};
use forebay_kernels::ops;
use forebay_runtime::arena::{Arena, OutOfArena, table_bytes};
use forebay_runtime::chat::TurnsError;
use forebay_runtime::drive::{Reached, Unobserved, advance, prefill};
use forebay_runtime::engine::{Engine, EngineError, Output};
use forebay_runtime::open::{Image, OpenError};
use forebay_runtime::plan::{Plan, PlanError};
use forebay_runtime::tokenizer::{Decoder, EncodeOptions, Tokenizer, TokenizerError};
use forebay_storage::store::BlockStore;

use crate::console::Console;
use crate::meter::Meter;
use crate::options::{Mode, Options, Prompt};
use crate::serve::serve;
use crate::stack::Stack;

/// Tokens that a single run generates unless it is said.
const GENERATE: usize = 32;
/// Tokens of prompt and answer of a single run unless it is said.
const CONTEXT: usize = 128;

/// A clock that counts up.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// Ticks since some moment.
    pub now: fn() -> u64,
    /// Ticks a second.
    pub hertz: u64,
}

impl Clock {
    pub(crate) fn microseconds_since(&self, start: u64) -> u64 {
        let ticks = u128::from((self.now)().wrapping_sub(start));
        (ticks * 1_000_000 / u128::from(self.hertz.max(1))) as u64
    }
}

/// Why a run ends without its tokens.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AppError<E: Debug + Display> {
    /// The image cannot be opened.
    #[error("cannot open the image: {0}")]
    Open(#[from] OpenError<E>),
    /// The arena does not do.
    #[error("{0}")]
    Plan(#[from] PlanError),
    /// The engine stopped.
    #[error("{0}")]
    Engine(#[from] EngineError),
    /// The tokenizer's tables are damaged.
    #[error("{0}")]
    Tokenizer(#[from] TokenizerError),
    /// The image's chat turns are damaged.
    #[error("{0}")]
    Turns(#[from] TurnsError),
    /// The plan forgot something.
    #[error("{0}")]
    Arena(#[from] OutOfArena),
    /// A text was given and the image has no tokenizer.
    #[error("the image has no tokenizer: give the prompt as tokens=1,2,3")]
    NoTokenizer,
    /// The prompt has no token.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// Prompt and answer do not fit.
    #[error("{prompt} prompt tokens and {generate} to generate do not fit a context of {context}")]
    Context {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens asked for.
        generate: usize,
        /// Tokens that fit.
        context: usize,
    },
    /// This processor has no such back-end.
    #[error("this processor has no such back-end")]
    Backend,
    /// Fewer cores than were asked for.
    #[error("{wanted} cores were asked for, {have} can compute")]
    Cores {
        /// Cores asked for.
        wanted: usize,
        /// Cores that came up, the first among them.
        have: usize,
    },
}

/// FNV-1a over rows of logits.
struct LogitHash {
    hash: u64,
    rows: usize,
}

impl LogitHash {
    fn new() -> Self {
        Self { hash: 0xcbf2_9ce4_8422_2325, rows: 0 }
    }

    /// Adds rows of `vocab` logits and gives the best token of the last one.
    fn add(&mut self, rows: &[f32], vocab: usize) -> u32 {
        let bytes = rows.iter().flat_map(|x| x.to_bits().to_le_bytes());
        self.hash = bytes.fold(self.hash, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        self.rows += rows.len() / vocab;
        ops::argmax(&rows[rows.len() - vocab..]) as u32
    }
}

/// Prints a line; a console that fails has nobody to tell it to.
macro_rules! say {
    ($console:expr, $($arg:tt)*) => {{
        let _ = writeln!($console, $($arg)*);
    }};
}
pub(crate) use say;

/// Bytes, in the largest unit that leaves at least three digits.
struct Size(u64);

impl Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bytes if bytes < 10 << 10 => write!(f, "{bytes} B"),
            bytes if bytes < 10 << 20 => write!(f, "{} KiB", bytes.div_ceil(1 << 10)),
            bytes => write!(f, "{} MiB", bytes.div_ceil(1 << 20)),
        }
    }
}

/// An image whose tables were read, and what it runs on.
pub(crate) struct Opened<'o, 'a, S> {
    pub store: &'o mut Meter<S>,
    pub image: Image<'a>,
    pub arena: &'o Arena<'a>,
    pub exec: Exec<'o>,
    pub clock: &'o Clock,
    /// When opening began, in the clock's ticks.
    start: u64,
}

/// Runs `options` on the image in `store`, over `console`. `workers` compute; `stack` is reported.
#[allow(clippy::too_many_arguments)]
pub fn run<'a, S, C>(
    console: &mut C,
    store: S,
    arena: &Arena<'a>,
    options: &Options<'_>,
    clock: &Clock,
    workers: &dyn Workers,
    stack: &Stack,
) -> Result<(), AppError<S::Error>>
where
    S: BlockStore<'a>,
    C: Console,
{
    let start = (clock.now)();
    let mut store = Meter::new(store);
    let backend = match options.backend {
        Some(name) => Backend::by_name(name).ok_or(AppError::Backend)?,
        None => Backend::detect(),
    };
    let count = workers.count();
    if count != options.cores {
        return Err(AppError::Cores { wanted: options.cores, have: count });
    }
    let exec = Exec { backend, workers };
    let image = Image::open(&mut store, arena, true)?;
    let model = image.model();
    say!(
        console,
        "image: {}, {} layers, vocabulary {}, {} streamed in {} units; kernels {} on {count} core{}",
        Size(image.superblock().image_len()),
        model.layer_count(),
        model.vocab(),
        Size(model.streamed_len()),
        model.unit_count(),
        backend.name(),
        if count == 1 { "" } else { "s" }
    );
    let opened = Opened { store: &mut store, image, arena, exec, clock, start };
    match options.mode {
        Mode::Once => once(console, opened, options),
        Mode::Serve => serve(console, opened, options, stack),
    }
}

/// Prints what becomes of an arena of `len` bytes.
pub(crate) fn say_plan(console: &mut impl Write, plan: &Plan, len: usize) {
    let reserved = plan.limits.reserved;
    say!(
        console,
        "plan: arena {len} = tables {} + resident {} + state {} + working {} + bookkeeping {} + prompt {reserved} + \
         pool {} ({} units of {}), {} unused; batch {}; least {}",
        plan.tables,
        plan.resident,
        plan.state,
        plan.working,
        plan.bookkeeping,
        plan.pool,
        plan.slots,
        plan.slot_len,
        (len as u64).saturating_sub(plan.total()),
        plan.batch,
        plan.least
    );
}

/// Generates from one prompt. Not inlined, so that the stack holds one engine.
#[inline(never)]
fn once<'a, S, W>(console: &mut W, opened: Opened<'_, 'a, S>, options: &Options<'_>) -> Result<(), AppError<S::Error>>
where
    S: BlockStore<'a>,
    W: Write,
{
    let Opened { store, image, arena, exec, clock, start } = opened;
    let tokenizer = image.tokenizer().map(Tokenizer::parse).transpose()?;
    let generate = options.generate.unwrap_or(GENERATE);
    let context = options.context.unwrap_or(CONTEXT).min(image.model().context());
    let scratch_len = match options.prompt {
        Prompt::Text(text) => Tokenizer::encode_scratch(text.len()),
        Prompt::Tokens(_) => 0,
    };
    let reserved = table_bytes::<u32>(context) + table_bytes::<u32>(scratch_len);
    let plan = options.plan(&image, arena.len(), &exec, context, reserved)?;
    say_plan(console, &plan, arena.len());
    let depth = options.depth.min(usize::from(store.geometry().queue_depth));
    let mut engine = Engine::new(&image, plan, arena, depth)?;
    let sequence = arena.table(context, || 0u32)?;
    let scratch = arena.table(scratch_len, || 0u32)?;

    let prompt_len = match options.prompt {
        Prompt::Tokens(ids) => {
            sequence.iter_mut().zip(ids.iter()).for_each(|(place, id)| *place = id);
            ids.iter().count()
        }
        Prompt::Text(text) => {
            let tokenizer = tokenizer.as_ref().ok_or(AppError::NoTokenizer)?;
            let encode = EncodeOptions { add_bos: tokenizer.add_bos(), parse_special: false };
            match tokenizer.encode(text, encode, scratch, sequence) {
                Err(TokenizerError::OutputTooSmall { needed, .. }) => needed,
                ids => ids?,
            }
        }
    };
    // The last token generated is not fed back.
    let fits = (prompt_len + generate).checked_sub(1).is_some_and(|len| len <= context);
    if prompt_len == 0 || !fits {
        let prompt = prompt_len;
        return Err(if prompt == 0 { AppError::EmptyPrompt } else { AppError::Context { prompt, generate, context } });
    }
    let opened = clock.microseconds_since(start);
    let (prompt, answer) = sequence.split_at_mut(prompt_len);
    say!(console, "prompt: {prompt:?}");

    let vocab = engine.vocab();
    let mut hash = LogitHash::new();
    let mut next = 0;
    let start = (clock.now)();
    prefill(&mut engine, store, &exec, prompt, Output::All, &mut Unobserved, |_, rows| {
        next = hash.add(rows, vocab);
    })?;
    let prompt_time = clock.microseconds_since(start);
    let after_prompt = (engine.stats(), store.reads());

    let start = (clock.now)();
    let mut text = tokenizer.as_ref().map(Tokenizer::decoder);
    if let (Some(_), Prompt::Text(prompt)) = (&text, options.prompt) {
        let _ = write!(console, "{prompt}");
    }
    let mut generated = 0;
    let mut last = [next];
    loop {
        emit(console, text.as_mut(), last[0]);
        // The context holds all but the last token, which is kept apart.
        if let Some(place) = answer.get_mut(generated) {
            *place = last[0];
        }
        generated += 1;
        if generated == generate || tokenizer.as_ref().is_some_and(|t| t.is_eos(last[0])) {
            break;
        }
        engine.feed(&last, Output::Last)?;
        while let Reached::Logits { .. } = advance(&mut engine, store, &exec, &mut Unobserved)? {
            last = [hash.add(&engine.logits()[..vocab], vocab)];
        }
    }
    let answer_time = clock.microseconds_since(start);
    if let Some(text) = &mut text {
        text.finish(&mut |part| drop(write!(console, "{part}")));
        say!(console, "");
    }

    let _ = write!(console, "tokens: [");
    for (i, id) in answer.iter().take(generated - 1).chain(&last).enumerate() {
        let _ = write!(console, "{}{id}", if i == 0 { "" } else { ", " });
    }
    say!(console, "]");
    say!(console, "logits: {:#018x} over {} rows of {vocab}", hash.hash, hash.rows);
    let (stats, reads) = (engine.stats(), store.reads());
    say!(
        console,
        "reads: {} of {} bytes in all, at most {} in flight, {} waited for; {} tried again",
        reads.finished,
        reads.bytes,
        reads.most_in_flight,
        reads.waited,
        stats.retries
    );
    say!(console, "pool: {} hits, {} misses, {} read ahead", stats.hits, stats.misses, stats.prefetched);
    let steps = (generated as u64 - 1).max(1);
    let per_token = answer_time / steps;
    say!(
        console,
        "decode: {} tokens/s, {} bytes read a token; open {} ms, {prompt_len} prompt tokens {} ms, answer {} ms",
        Tenths(10_000_000 / per_token.max(1)),
        (reads.bytes - after_prompt.1.bytes) / steps,
        opened / 1000,
        prompt_time / 1000,
        answer_time / 1000
    );
    Ok(())
}

/// A number of tenths.
pub(crate) struct Tenths(pub u64);

impl Display for Tenths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0 / 10, self.0 % 10)
    }
}

fn emit<W: Write>(console: &mut W, text: Option<&mut Decoder<'_>>, token: u32) {
    if let Some(text) = text {
        text.push(token, &mut |part| drop(write!(console, "{part}")));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against a published vector: FNV-1a of "chongo was here!\n" is 0x46810940eff5f915; its first 16 bytes, four
    /// floats here, give a state from which the last byte leads there.
    #[test]
    fn hash_is_fnv_1a() {
        let mut hash = LogitHash::new();
        let row = *b"chongo was here!";
        let floats: [f32; 4] = core::array::from_fn(|i| f32::from_le_bytes(core::array::from_fn(|b| row[4 * i + b])));
        let best = hash.add(&floats, 4);
        assert_eq!(best as usize, ops::argmax(&floats));
        assert_eq!((hash.hash ^ u64::from(b'\n')).wrapping_mul(0x0100_0000_01b3), 0x46810940eff5f915);
    }

    #[test]
    fn best_is_of_the_last_row() {
        let mut hash = LogitHash::new();
        assert_eq!(hash.add(&[9.0, 1.0, 2.0, 1.0, 5.0, 2.0], 3), 1);
        assert_eq!(hash.rows, 2);
    }

    #[test]
    fn sizes_and_tenths() {
        extern crate std;
        use std::format;
        assert_eq!(format!("{} {} {}", Size(10_239), Size(10_240), Size(11 << 20)), "10239 B 10 KiB 11 MiB");
        assert_eq!(format!("{}", Tenths(109)), "10.9");
    }
}
