//! `forebay chat`

use std::io::{BufRead, IsTerminal, Write};

use anyhow::{Context, Result};
use clap::Args;
use forebay::template::{Message, Template};
use forebay_runtime::sample::Sampler;
use forebay_runtime::tokenizer::{EncodeOptions, Tokenizer};

use super::{MachineArgs, ModelArgs, SampleArgs, Wanted};
use crate::host::generate::{Generated, Until, generate, rate};
use crate::host::session::{self, Extra, Session};

/// Longest piece of text that the tokenizer has room for, in bytes: a word, or, for tokenizers that do not cut at
/// spaces, a whole line.
const LONGEST_PIECE: usize = 4096;

/// Talk with a model, line by line.
///
/// Each line of standard input is put to the model by its chat template; the answer is streamed. What was said stays
/// in the engine, so only the new turn is computed. Lines that begin with a slash are commands: /reset forgets the
/// conversation, /stats shows speeds and memory, /quit ends.
#[derive(Args)]
pub struct ChatArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Begin the conversation with this system text
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Most tokens of an answer
    #[arg(short, long, value_name = "N", default_value = "512", value_parser = super::positive)]
    n: usize,
    /// Tokens of the whole conversation [default: the model's context, at most 4096]
    #[arg(short, long, value_name = "TOKENS", value_parser = super::positive)]
    context: Option<usize>,
    #[command(flatten)]
    sample: SampleArgs,
    #[command(flatten)]
    machine: MachineArgs,
}

pub fn main(args: &ChatArgs) -> Result<()> {
    let backend = args.machine.backend()?;
    let found = args.model.find()?;
    let (setup, template, params) = found.file.probe(|image, tokenizer| {
        let model = image.model();
        let tokenizer = tokenizer.with_context(|| format!("{} has no tokenizer", found.file.path.display()))?;
        let template = found.file.chat_template(&tokenizer)?;
        let params = args.sample.choice.params(model.record());
        let extra = Extra {
            candidates: Sampler::candidates(&params, model.vocab()),
            scratch: Tokenizer::encode_scratch(LONGEST_PIECE),
        };
        let context = args.context.unwrap_or(model.context().min(super::LONG_CONTEXT));
        let wanted = Wanted { context, batch: usize::MAX, logit_rows: 1, extra, with_tokenizer: true };
        let setup = args.machine.setup(&found, image, backend, wanted)?;
        Ok((setup, template, params))
    })?;
    session::run(&found.file, setup, |session| {
        let mut chat = Chat {
            template,
            messages: Vec::new(),
            system: args.system.clone(),
            fed: String::new(),
            sampler: Sampler::new(params),
            until: Until { count: args.n, ignore_eos: args.sample.ignore_eos },
            last: None,
        };
        chat.reset(session)?;
        converse(&mut chat, session)
    })
}

/// Reads lines until there are no more.
fn converse(chat: &mut Chat, session: &mut Session<'_, '_>) -> Result<()> {
    let stdin = std::io::stdin();
    let prompt = stdin.is_terminal();
    if prompt {
        eprintln!("/reset forgets the conversation, /stats shows speeds and memory, /quit ends");
    }
    let mut line = String::new();
    loop {
        if prompt {
            eprint!("> ");
        }
        line.clear();
        if stdin.lock().read_line(&mut line).context("reading standard input")? == 0 {
            return Ok(());
        }
        match line.trim() {
            "" => {}
            "/quit" => return Ok(()),
            "/reset" => chat.reset(session)?,
            "/stats" => chat.stats(session),
            command if command.starts_with('/') => {
                eprintln!("there is no command {command}; there are /reset, /stats and /quit");
            }
            text => {
                // A turn that does not fit ends the conversation, not the chat.
                if let Err(error) = chat.turn(session, text) {
                    if error.is::<std::io::Error>() || chat.reset(session).is_err() {
                        return Err(error);
                    }
                    eprintln!("error: {error:#}; the conversation was forgotten");
                }
            }
        }
    }
}

/// A conversation.
struct Chat {
    template: Template,
    messages: Vec<Message>,
    system: Option<String>,
    /// The text that the engine's state stands for.
    fed: String,
    sampler: Sampler,
    until: Until,
    last: Option<(Generated, usize)>,
}

impl Chat {
    fn reset(&mut self, session: &mut Session<'_, '_>) -> Result<()> {
        self.fed.clear();
        self.messages = self.system.iter().map(|text| Message::new("system", text.as_str())).collect();
        session.reset()
    }

    /// Puts `text` to the model and prints its answer.
    fn turn(&mut self, session: &mut Session<'_, '_>, text: &str) -> Result<()> {
        self.messages.push(Message::new("user", text));
        let conversation = self.template.render(&self.messages, true)?;
        // Where the template puts the former turns as they were, only the rest is new. Some templates rewrite them.
        if !conversation.starts_with(&self.fed) {
            self.fed.clear();
            session.reset()?;
        }
        let from = session.engine.position();
        let rest = &conversation[self.fed.len()..];
        let add_bos =
            from == 0 && session.tokenizer.is_some_and(|t| t.add_bos()) && !self.template.has_bos(&conversation);
        let to = session.encode(rest, EncodeOptions { add_bos, parse_special: true }, from)?;
        let mut out = std::io::stdout().lock();
        let mut show = |part: &str| Ok(out.write_all(part.as_bytes()).and_then(|()| out.flush())?);
        let made = generate(session, from, to, self.until, &mut self.sampler, &mut show)?;
        writeln!(out)?;
        self.fed = conversation;
        self.fed += &spoken(session, to);
        self.messages.push(Message::new("assistant", made.text.clone()));
        self.last = Some((made, to - from));
        Ok(())
    }

    fn stats(&self, session: &Session<'_, '_>) {
        let line = |what: &str, text: String| eprintln!("{what:<11} {text}");
        let context = session.history.len();
        line("context", format!("{} of {context} tokens", session.engine.position()));
        if let Some((made, prompt)) = &self.last {
            line("last turn", format!("{prompt} tokens, {:.1} tok/s", rate(*prompt, made.prompt_time)));
            line("answer", format!("{} tokens, {:.1} tok/s", made.tokens.len(), made.decode_rate()));
        }
        super::run::memory_lines(session, &line);
        let stats = session.engine.stats();
        line("units", format!("{} hits, {} misses", stats.hits, stats.misses));
        line("stalled", format!("{:.3} s", session.stalled().as_secs_f64()));
    }
}

/// Text of the answer's tokens that the engine was fed, control symbols included.
fn spoken(session: &Session<'_, '_>, from: usize) -> String {
    let mut text = String::new();
    if let Some(tokenizer) = &session.tokenizer {
        let mut decoder = tokenizer.decoder();
        for token in &session.history[from..session.engine.position()] {
            decoder.push(*token, &mut |part| text.push_str(part));
        }
        decoder.finish(&mut |part| text.push_str(part));
    }
    text
}
