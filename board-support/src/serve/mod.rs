//! Serving: lines come over the console, answers go back token by token. `docs/console.md` has the protocol.

mod command;
mod reply;

use core::fmt::Arguments;

use forebay_kernels::exec::Exec;
use forebay_runtime::arena::table_bytes;
use forebay_runtime::chat::Turns;
use forebay_runtime::drive::{Observer, prefill};
use forebay_runtime::engine::{Choice, Engine, EngineError, Output, Stats};
use forebay_runtime::open::Image;
use forebay_runtime::plan::Plan;
use forebay_runtime::sample::{Candidate, PENALTY_WINDOW, Sampler, SamplerParams};
use forebay_runtime::tokenizer::{Decoder, EncodeOptions, Tokenizer, TokenizerError};
use forebay_storage::image::SectionKind;
use forebay_storage::store::BlockStore;

use crate::app::{AppError, Clock, Opened, Tenths, say, say_plan};
use crate::console::{Console, Input, LineError, Overheard};
use crate::meter::{Meter, Reads};
use crate::options::{Ids, Options};
use crate::stack::Stack;
use command::{Command, HELP, Setting, Unescaped};
use reply::{OrNull, Reply};

/// Tokens of a conversation, unless it is said: at least, and at most.
const CONTEXT: (usize, usize) = (128, 2048);
/// Share of the arena that keys and values may take for a context longer than the least.
const STATE_SHARE: u64 = 16;
/// Most tokens of an answer, unless it is said.
const LENGTH: usize = 200;
/// Most candidates of a draw.
const CANDIDATES: usize = 256;

/// What lies in the arena beside the engine.
#[derive(Clone, Copy)]
struct Sizes {
    context: usize,
    /// Bytes of a line.
    line: usize,
    /// Bytes of a turn: a line, a system text, and what stands around them.
    turn: usize,
    /// Words of the tokenizer's scratch.
    scratch: usize,
    candidates: usize,
}

impl Sizes {
    fn new(context: usize, vocab: usize, turns: Option<&Turns<'_>>) -> Self {
        // A token is about four bytes of text: longer lines would not fit the context either.
        let line = (4 * context).clamp(256, 4096);
        let around = turns.map_or(0, |turns| turns.longest(line));
        let scratch = Tokenizer::encode_scratch(line);
        Self { context, line, turn: line + around, scratch, candidates: CANDIDATES.min(vocab) }
    }

    fn bytes(&self) -> u64 {
        table_bytes::<u32>(self.context)
            + table_bytes::<u32>(self.scratch)
            + table_bytes::<Candidate>(self.candidates)
            + 2 * table_bytes::<u8>(self.line)
            + table_bytes::<u8>(self.turn)
    }
}

/// Serves until somebody says `/quit`, or the engine fails.
#[inline(never)]
pub(crate) fn serve<'a, S, C>(
    console: &mut C,
    opened: Opened<'_, 'a, S>,
    options: &Options<'_>,
    stack: &Stack,
) -> Result<(), AppError<S::Error>>
where
    S: BlockStore<'a>,
    C: Console,
{
    let Opened { store, mut image, arena, exec, clock, .. } = opened;
    let tokenizer = image.tokenizer().map(Tokenizer::parse).transpose()?;
    let turns = match &tokenizer {
        Some(_) => image.load(store, arena, SectionKind::ChatTurns)?.map(Turns::parse).transpose()?,
        None => None,
    };
    let vocab = image.model().vocab();
    let sizes = |context| Sizes::new(context, vocab, turns.as_ref());
    let plan = |context| options.plan(&image, arena.len(), &exec, context, sizes(context).bytes());
    let context = context(&image, options, plan);
    let sizes = sizes(context);
    let plan = plan(context)?;
    say_plan(console, &plan, arena.len());
    let depth = options.depth.min(usize::from(store.geometry().queue_depth));
    let mut engine = Engine::new(&image, plan, arena, depth)?;
    let params = SamplerParams::of_model(image.model().record());
    let mut input = Input::new(arena.table(sizes.line, || 0u8)?);
    let params = SamplerParams {
        // The filters that follow leave nothing of the others in practice.
        top_k: if params.top_k == 0 { sizes.candidates } else { params.top_k.min(sizes.candidates) },
        ..params
    };
    let mut server = Server {
        reply: Reply { console, json: false },
        chat: turns.is_some(),
        context,
        tokenizer,
        turns,
        stack,
        history: arena.table(sizes.context, || 0)?,
        scratch: arena.table(sizes.scratch, || 0)?,
        candidates: arena.table(sizes.candidates, Candidate::default)?,
        turn: arena.table(sizes.turn, || 0)?,
        system: arena.table(sizes.line, || 0)?,
        system_len: 0,
        len: 0,
        sampler: Sampler::new(params),
        seed: None,
        length: options.generate.unwrap_or(LENGTH),
        show_ids: false,
        lines: 0,
        last: None,
        machine: Machine { engine: &mut engine, store, exec, clock },
    };
    server.reply.info(format_args!("serving lines of up to {} bytes; /help lists the commands", sizes.line));
    server.settings();
    let served = server.run(&mut input);
    if let Err(error) = &served {
        server.reply.fatal(format_args!("{error}"));
    }
    Ok(served?)
}

/// The context that is asked for; else the longest that leaves the pool nearly all of the arena.
fn context<E>(image: &Image<'_>, options: &Options<'_>, plan: impl Fn(usize) -> Result<Plan, E>) -> usize {
    let longest = image.model().context();
    let (least, most) = CONTEXT;
    let modest =
        |context: usize| plan(context).is_ok_and(|plan| plan.state.saturating_mul(STATE_SHARE) <= plan.limits.arena);
    options.context.map_or_else(
        || {
            let mut context = most;
            while context > least && !(context <= longest && modest(context)) {
                context /= 2;
            }
            context.min(longest)
        },
        |context| context.min(longest),
    )
}

/// Why an answer ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stop {
    Eos,
    Length,
    Context,
    Interrupted,
}

impl Stop {
    fn name(self) -> &'static str {
        match self {
            Self::Eos => "eos",
            Self::Length => "length",
            Self::Context => "context",
            Self::Interrupted => "interrupted",
        }
    }
}

/// What an answer took.
#[derive(Clone, Copy)]
struct Answer {
    stop: Stop,
    prompt: usize,
    tokens: usize,
    /// Microseconds to the first token, and from there to the last.
    prompt_time: u64,
    time: u64,
    /// Bytes read for the tokens after the first.
    bytes: u64,
    hits: u64,
    misses: u64,
}

impl Answer {
    /// Passes of the model after the prompt's.
    fn steps(&self) -> u64 {
        self.tokens.saturating_sub(1) as u64
    }
    fn bytes_per_token(&self) -> u64 {
        self.bytes.checked_div(self.steps()).unwrap_or(0)
    }
}

/// Tenths of things a second.
fn rate(count: u64, microseconds: u64) -> Tenths {
    Tenths((count * 10_000_000).checked_div(microseconds.max(1)).unwrap_or(0))
}

/// The engine and what it runs on.
struct Machine<'m, 'a, S> {
    engine: &'m mut Engine<'a>,
    store: &'m mut Meter<S>,
    exec: Exec<'m>,
    clock: &'m Clock,
}

/// Listens to the console between pieces of computing.
struct Ear<'c, C> {
    console: &'c mut C,
    heard: &'c mut Overheard,
}

impl<C: Console> Observer for Ear<'_, C> {
    fn wait_ends(&mut self) {
        self.heard.listen(self.console);
    }
    fn routed(&mut self, _: usize, _: &[Choice]) {
        self.heard.listen(self.console);
    }
    fn unit(&mut self, _: usize, _: usize, _: &[f32]) {
        self.heard.listen(self.console);
    }
}

/// Whoever is at the other end, and what was said so far.
struct Server<'m, 'a, S, C> {
    reply: Reply<'m, C>,
    machine: Machine<'m, 'a, S>,
    tokenizer: Option<Tokenizer<'a>>,
    turns: Option<Turns<'a>>,
    stack: &'m Stack,
    /// The sequence: `len` tokens, of which the engine has been fed the first [`Engine::position`].
    history: &'a mut [u32],
    len: usize,
    context: usize,
    scratch: &'a mut [u32],
    candidates: &'a mut [Candidate],
    /// Where a turn is put together.
    turn: &'a mut [u8],
    system: &'a mut [u8],
    system_len: usize,
    sampler: Sampler,
    /// Seed of every conversation; without one each has another.
    seed: Option<u64>,
    length: usize,
    chat: bool,
    show_ids: bool,
    /// Lines that were done.
    lines: u64,
    last: Option<Answer>,
}

impl<'a, S: BlockStore<'a>, C: Console> Server<'_, 'a, S, C> {
    fn run(&mut self, input: &mut Input<'_>) -> Result<(), EngineError> {
        loop {
            self.prompt(input.room());
            let json = self.reply.json;
            let line = match input.line(self.reply.console, !json) {
                Ok(line) => &*line,
                Err(LineError::Interrupted) => continue,
                Err(error) => {
                    self.lines += 1;
                    self.reply.error(format_args!("{error}"));
                    continue;
                }
            };
            let more = match line {
                "" => true,
                quoted if json && quoted.starts_with('"') => match Unescaped::of(quoted) {
                    Ok(text) => self.say(text.flatten())?,
                    Err(error) => self.refuse(format_args!("{error}")),
                },
                line => match Command::parse(line) {
                    Ok(command) => self.obey(command)?,
                    Err(error) => self.refuse(format_args!("{error}")),
                },
            };
            self.lines += 1;
            if !more {
                return Ok(());
            }
        }
    }

    /// Says that a line can be sent.
    fn prompt(&mut self, room: usize) {
        if self.reply.json {
            let (lines, len, context, chat) = (self.lines, self.len, self.context, self.chat);
            self.reply.object(
                "ready",
                format_args!(
                    "\"lines\":{lines},\"line_bytes\":{room},\"position\":{len},\"context\":{context},\"chat\":{chat}"
                ),
            );
        } else {
            let _ = self.reply.console.write_all(b"> ");
        }
        let _ = self.reply.console.flush();
    }

    fn refuse(&mut self, why: Arguments<'_>) -> bool {
        self.reply.error(why);
        true
    }

    /// Does what a line asks for; `false` if it is to end.
    fn obey(&mut self, command: Command<'_>) -> Result<bool, EngineError> {
        match command {
            Command::Text(text) => return self.say(text.chars()),
            Command::Ids(ids) => return self.go_on_from(ids),
            Command::More if self.len == self.machine.engine.position() => {
                return Ok(self.refuse(format_args!("/more: there is no answer that was cut short")));
            }
            Command::More => {
                self.answer()?;
                return Ok(true);
            }
            Command::Set(setting) => {
                let room = self.candidates.len();
                let mut params = *self.sampler.params();
                match setting {
                    Setting::Temperature(value) => params.temperature = value,
                    Setting::TopK(value) if value > room => {
                        return Ok(self.refuse(format_args!("/top-k {value}: there is room for {room} tokens")));
                    }
                    Setting::TopK(value) => params.top_k = value,
                    Setting::TopP(value) => params.top_p = value,
                    Setting::MinP(value) => params.min_p = value,
                    Setting::RepeatPenalty(value) => params.repetition_penalty = value,
                }
                self.sampler.set_params(params);
            }
            Command::Seed(seed) => {
                self.seed = seed;
                self.draw_anew();
            }
            Command::Length(length) => self.length = length,
            Command::Chat(true) if self.turns.is_none() => {
                let why = "/chat: the image has no chat turns; its model was not made for conversations";
                return Ok(self.refuse(format_args!("{why}")));
            }
            Command::Chat(chat) => {
                self.chat = chat;
                self.forget()?;
            }
            Command::System(text) => {
                if self.turns.is_none_or(|turns| turns.after_system.is_empty()) {
                    return Ok(self.refuse(format_args!("/system: the image's chat turns take no system text")));
                }
                self.system.iter_mut().zip(text.bytes()).for_each(|(place, byte)| *place = byte);
                self.system_len = text.len();
                self.forget()?;
            }
            Command::Reset => {
                self.forget()?;
                return Ok(true);
            }
            Command::Settings => {}
            Command::Stats => {
                self.stats();
                return Ok(true);
            }
            Command::Tokens(on) => self.show_ids = on,
            Command::Json(on) => self.reply.json = on,
            Command::Help => {
                HELP.iter().for_each(|line| self.reply.info(format_args!("{line}")));
                return Ok(true);
            }
            Command::Quit => return Ok(false),
        }
        self.settings();
        Ok(true)
    }

    /// Starts a new sequence.
    fn forget(&mut self) -> Result<(), EngineError> {
        self.len = 0;
        self.machine.engine.reset()?;
        self.draw_anew();
        Ok(())
    }

    /// Starts the draws at the seed, or at another one.
    fn draw_anew(&mut self) {
        let params = *self.sampler.params();
        // Nobody can tell when the line came to the tick.
        let seed = self.seed.unwrap_or_else(|| (self.machine.clock.now)() % 1_000_000_000);
        self.sampler = Sampler::new(SamplerParams { seed, ..params });
    }

    /// Puts a text to the model: as the next turn of the conversation, or alone.
    fn say(&mut self, text: impl Iterator<Item = char>) -> Result<bool, EngineError> {
        let Some(tokenizer) = self.tokenizer else {
            return Ok(self.refuse(format_args!("the image has no tokenizer: give ids, /ids 1,2,3")));
        };
        if self.len == 0 || !self.chat {
            self.forget()?;
        }
        let first = self.len == 0;
        let system = self.system.get(..self.system_len).and_then(|bytes| core::str::from_utf8(bytes).ok());
        let system = system.filter(|text| !text.is_empty());
        let (before, after) = match self.turns.as_ref().filter(|_| self.chat) {
            Some(turns) => turns.around(first, system),
            None => (["", "", ""], ""),
        };
        let mut turn = Cut { buf: self.turn, len: 0 };
        before.iter().for_each(|part| turn.push(part));
        text.for_each(|character| turn.push(character.encode_utf8(&mut [0; 4])));
        turn.push(after);
        let len = turn.len;
        let turn = self.turn.get(..len).and_then(|bytes| core::str::from_utf8(bytes).ok()).unwrap_or_default();
        // A template that writes the token itself must not get another one.
        let bos = tokenizer.bos().and_then(|id| tokenizer.token_bytes(id)).unwrap_or_default();
        let has_bos = self.chat && !bos.is_empty() && turn.as_bytes().starts_with(bos);
        let options = EncodeOptions { add_bos: first && tokenizer.add_bos() && !has_bos, parse_special: true };
        let room = self.history.get_mut(self.len..).unwrap_or_default();
        match tokenizer.encode(turn, options, self.scratch, room) {
            Ok(count) => self.len += count,
            Err(TokenizerError::OutputTooSmall { needed, given }) => return Ok(self.refuse_long(needed, given)),
            Err(error) => return Ok(self.refuse(format_args!("{error}"))),
        }
        if self.len == self.machine.engine.position() {
            return Ok(self.refuse(format_args!("the text has no tokens")));
        }
        self.answer()?;
        Ok(true)
    }

    /// Goes on from ids, alone.
    fn go_on_from(&mut self, ids: Ids<'_>) -> Result<bool, EngineError> {
        let vocab = self.machine.engine.vocab();
        if let Some(id) = ids.iter().find(|id| *id as usize >= vocab) {
            return Ok(self.refuse(format_args!("/ids: {id} is outside of the vocabulary of {vocab}")));
        }
        let count = ids.iter().count();
        self.forget()?;
        if count > self.history.len() {
            return Ok(self.refuse_long(count, self.history.len()));
        }
        self.history.iter_mut().zip(ids.iter()).for_each(|(place, id)| *place = id);
        self.len = count;
        self.answer()?;
        Ok(true)
    }

    /// The conversation stays as it was.
    fn refuse_long(&mut self, needed: usize, given: usize) -> bool {
        let context = self.context;
        self.refuse(format_args!(
            "the text has {needed} tokens but only {given} of the context's {context} are left; send a shorter one, or \
             /reset to forget the conversation"
        ))
    }

    /// Feeds what has not been fed, but for its last piece, which gives logits; `false` if it was interrupted before.
    fn feed(&mut self, heard: &mut Overheard) -> Result<bool, EngineError> {
        let Machine { engine, store, exec, .. } = &mut self.machine;
        let batch = engine.plan().batch;
        loop {
            let from = engine.position();
            let to = self.len.min(from + batch);
            let chunk = self.history.get(from..to).unwrap_or_default();
            let output = if to == self.len { Output::Last } else { Output::None };
            let mut ear = Ear { console: &mut *self.reply.console, heard };
            prefill(engine, *store, exec, chunk, output, &mut ear, |_, _| ())?;
            if to == self.len {
                return Ok(true);
            }
            if heard.interrupted {
                return Ok(false);
            }
        }
    }

    /// Feeds what has not been fed, and goes on from there.
    fn answer(&mut self) -> Result<(), EngineError> {
        let counts =
            |machine: &Machine<'_, 'a, S>| -> (Stats, Reads) { (machine.engine.stats(), machine.store.reads()) };
        let (vocab, start) = (self.machine.engine.vocab(), (self.machine.clock.now)());
        let from = self.machine.engine.position();
        let before = counts(&self.machine);
        let mut after_prompt = before;
        let mut heard = Overheard::default();
        let mut decoder: Option<Decoder<'_>> = self.tokenizer.as_ref().map(|t| t.decoder().skip_special(true));
        let (mut tokens, mut prompt_time, mut time) = (0, 0, 0);
        let (prompt, begin) = (self.len - from, self.len);
        let mut last = None;
        let stop = loop {
            if !self.feed(&mut heard)? {
                break Stop::Interrupted;
            }
            let recent = self.history.get(self.len.saturating_sub(PENALTY_WINDOW)..self.len).unwrap_or_default();
            let logits = self.machine.engine.logits_mut().get_mut(..vocab).unwrap_or_default();
            let token = self.sampler.sample(logits, recent, self.candidates);
            tokens += 1;
            last = Some(token);
            let elapsed = self.machine.clock.microseconds_since(start);
            if tokens == 1 {
                (prompt_time, after_prompt) = (elapsed, counts(&self.machine));
            }
            time = elapsed - prompt_time;
            if self.tokenizer.as_ref().is_some_and(|t| t.is_eos(token)) {
                if self.reply.json {
                    self.reply.token(token, |_| ());
                }
                break Stop::Eos;
            }
            match &mut decoder {
                Some(decoder) => self.reply.token(token, |emit| decoder.push(token, &mut |part: &str| emit(part))),
                None if self.reply.json => self.reply.token(token, |_| ()),
                None => drop(write!(self.reply.console, "{token} ")),
            }
            let place = self.history.get_mut(self.len);
            let full = place.is_none();
            if let Some(place) = place {
                *place = token;
                self.len += 1;
            }
            match () {
                () if tokens >= self.length => break Stop::Length,
                () if full => break Stop::Context,
                () if heard.interrupted => break Stop::Interrupted,
                () => {}
            }
        };
        if let Some(decoder) = &mut decoder {
            decoder.finish(&mut |part: &str| self.reply.rest(part));
        }
        let (stats, reads) = counts(&self.machine);
        let answer = Answer {
            stop,
            prompt,
            tokens,
            prompt_time,
            time,
            bytes: reads.bytes - after_prompt.1.bytes,
            hits: stats.hits - before.0.hits,
            misses: stats.misses - before.0.misses,
        };
        self.last = Some(answer);
        self.ended(&answer, (from, begin), last, heard.dropped);
        Ok(())
    }

    /// Says how an answer ended.
    fn ended(&mut self, answer: &Answer, (from, begin): (usize, usize), last: Option<u32>, dropped: usize) {
        let seed = self.sampler.params().seed;
        if self.reply.json {
            let Answer { stop, prompt, tokens, prompt_time, time, hits, misses, .. } = *answer;
            self.reply.object(
                "end",
                format_args!(
                    "\"stop\":\"{}\",\"prompt_tokens\":{prompt},\"tokens\":{tokens},\"prompt_us\":{prompt_time},\
                     \"answer_us\":{time},\"bytes_per_token\":{},\"hits\":{hits},\"misses\":{misses},\"position\":{},\
                     \"context\":{},\"seed\":{seed}",
                    stop.name(),
                    answer.bytes_per_token(),
                    self.len,
                    self.context
                ),
            );
        } else {
            say!(self.reply.console, "");
            if self.show_ids {
                self.ids("prompt", from..begin, None);
                // The token that ended the text, and one that the context has no room for, are not in the history.
                let kept = self.len - begin == answer.tokens;
                self.ids("tokens", begin..self.len, last.filter(|_| !kept));
            }
            match answer.stop {
                Stop::Context => say!(
                    self.reply.console,
                    "(the context of {} tokens is full: /reset forgets the conversation)",
                    self.context
                ),
                Stop::Interrupted => say!(self.reply.console, "(interrupted; /more goes on)"),
                Stop::Eos | Stop::Length => {}
            }
        }
        if dropped > 0 {
            self.reply.info(format_args!("{dropped} bytes came while computing and were dropped: wait for the prompt"));
        }
    }

    fn ids(&mut self, what: &str, range: core::ops::Range<usize>, more: Option<u32>) {
        let _ = write!(self.reply.console, "{what}: [");
        let ids = self.history.get(range).unwrap_or_default();
        for (i, id) in ids.iter().copied().chain(more).enumerate() {
            let _ = write!(self.reply.console, "{}{id}", if i == 0 { "" } else { ", " });
        }
        say!(self.reply.console, "]");
    }

    fn settings(&mut self) {
        let SamplerParams { temperature, top_k, top_p, min_p, repetition_penalty, seed } = *self.sampler.params();
        let (length, chat, fixed) = (self.length, self.chat, self.seed.is_some());
        if self.reply.json {
            let seed = OrNull(self.seed);
            self.reply.object(
                "settings",
                format_args!(
                    "\"temperature\":{temperature},\"top_k\":{top_k},\"top_p\":{top_p},\"min_p\":{min_p},\
                     \"repeat_penalty\":{repetition_penalty},\"seed\":{seed},\"length\":{length},\"chat\":{chat}"
                ),
            );
            return;
        }
        let (mode, seed) = (if chat { "chat" } else { "raw" }, OrNull(fixed.then_some(seed)));
        let _ = write!(self.reply.console, "{mode}: ");
        if temperature > 0.0 {
            let _ =
                write!(self.reply.console, "temperature {temperature}, top-k {top_k}, top-p {top_p}, min-p {min_p}, ");
            let _ = match seed.0 {
                Some(seed) => write!(self.reply.console, "seed {seed}, "),
                None => write!(self.reply.console, "seed random, "),
            };
        } else {
            let _ = write!(self.reply.console, "greedy, ");
        }
        if repetition_penalty != 1.0 {
            let _ = write!(self.reply.console, "repeat-penalty {repetition_penalty}, ");
        }
        say!(self.reply.console, "length {length}");
    }

    fn stats(&mut self) {
        let (stats, reads) = (self.machine.engine.stats(), self.machine.store.reads());
        let (len, context) = (self.len, self.context);
        let plan = *self.machine.engine.plan();
        let (stack_used, stack_len) = (self.stack.high_water(), self.stack.len());
        let arena = plan.limits.arena;
        if self.reply.json {
            self.reply.object(
                "stats",
                format_args!(
                    "\"position\":{len},\"context\":{context},\"hits\":{},\"misses\":{},\"reads\":{},\"bytes_read\":{},\
                     \"retries\":{},\"arena_bytes\":{arena},\"pool_bytes\":{},\"pool_units\":{},\"stack_used\":{stack_used},\
                     \"stack_bytes\":{stack_len}",
                    stats.hits, stats.misses, reads.finished, reads.bytes, stats.retries, plan.pool, plan.slots
                ),
            );
            return;
        }
        let console = &mut *self.reply.console;
        say!(console, "context  {len} of {context} tokens");
        if let Some(answer) = &self.last {
            say!(
                console,
                "last     prompt of {} tokens, {} tokens/s; {} tokens, {} tokens/s, {} bytes read a token, ended by {}",
                answer.prompt,
                rate(answer.prompt as u64, answer.prompt_time),
                answer.tokens,
                rate(answer.steps(), answer.time),
                answer.bytes_per_token(),
                answer.stop.name()
            );
        }
        let used = (stats.hits + stats.misses).max(1);
        say!(
            console,
            "pool     {} hits ({} %), {} misses; {} units of {} bytes",
            stats.hits,
            Tenths(stats.hits * 1000 / used),
            stats.misses,
            plan.slots,
            plan.slot_len
        );
        say!(console, "reads    {} of {} bytes in all, {} tried again", reads.finished, reads.bytes, stats.retries);
        say!(
            console,
            "memory   arena {arena} bytes, {} of them pool; stack {stack_used} of {stack_len} bytes used",
            plan.pool
        );
    }
}

/// Text put together in a buffer; what does not fit is left out.
struct Cut<'b> {
    buf: &'b mut [u8],
    len: usize,
}

impl Cut<'_> {
    fn push(&mut self, text: &str) {
        let end = self.len + text.len();
        if let Some(place) = self.buf.get_mut(self.len..end) {
            place.copy_from_slice(text.as_bytes());
            self.len = end;
        }
    }
}
