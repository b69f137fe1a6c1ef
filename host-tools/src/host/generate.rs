//! Generation: tokens one after another until something ends it.

use std::time::{Duration, Instant};

use anyhow::Result;
use forebay_runtime::sample::Sampler;
use forebay_runtime::tokenizer::Decoder;

use crate::host::session::Session;

/// Why generation ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    /// The model said so.
    Eos,
    /// As many tokens as were asked for.
    Length,
    /// The context is full.
    Context,
}

impl Stop {
    /// For reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Eos => "eos",
            Self::Length => "length",
            Self::Context => "context",
        }
    }
}

/// What was generated.
#[derive(Debug)]
pub struct Generated {
    /// Ids, the one that ended the text included.
    pub tokens: Vec<u32>,
    /// The text, without control symbols.
    pub text: String,
    /// From the first token fed to the first one chosen.
    pub prompt_time: Duration,
    /// From the beginning of the run, before anything was read, to the first token chosen.
    pub first_token: Duration,
    /// From the first token chosen to the last.
    pub decode_time: Duration,
    /// Why it ended.
    pub stop: Stop,
}

impl Generated {
    /// Passes of the model a second after the prompt: one for each token but the first, which the prompt's gave.
    pub fn decode_rate(&self) -> f64 {
        rate(self.tokens.len().saturating_sub(1), self.decode_time)
    }
}

/// Things a second; 0 for none.
pub fn rate(count: usize, time: Duration) -> f64 {
    if count == 0 { 0.0 } else { count as f64 / time.as_secs_f64().max(1e-9) }
}

/// How long to go on.
#[derive(Clone, Copy, Debug)]
pub struct Until {
    /// Most tokens.
    pub count: usize,
    /// Goes on after the end of a text.
    pub ignore_eos: bool,
}

/// Feeds `history[from..to]`, then generates; `show` gets the text as it comes.
///
/// Tokens generated are in the history from `to` on; those fed to the engine are [`Engine::position`] many.
///
/// [`Engine::position`]: forebay_runtime::engine::Engine::position
pub fn generate(
    session: &mut Session<'_, '_>,
    from: usize,
    to: usize,
    until: Until,
    sampler: &mut Sampler,
    show: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<Generated> {
    let mut decoder: Option<Decoder<'_>> = session.tokenizer.map(|t| t.decoder().skip_special(true));
    let mut text = String::new();
    let mut tokens = Vec::new();
    let start = Instant::now();
    let mut token = session.next(from, to, sampler)?;
    let prompt_time = start.elapsed();
    let first_token = session.elapsed();
    let decode_start = Instant::now();
    let mut decode_time = Duration::ZERO;
    let mut at = to;
    let stop = loop {
        tokens.push(token);
        if !until.ignore_eos && session.tokenizer.is_some_and(|t| t.is_eos(token)) {
            break Stop::Eos;
        }
        let shown = text.len();
        match &mut decoder {
            Some(decoder) => decoder.push(token, &mut |part| text.push_str(part)),
            None => text += &format!("{token} "),
        }
        show(&text[shown..])?;
        if tokens.len() >= until.count {
            break Stop::Length;
        }
        let Some(slot) = session.history.get_mut(at) else { break Stop::Context };
        *slot = token;
        at += 1;
        token = session.next(at - 1, at, sampler)?;
        decode_time = decode_start.elapsed();
    };
    if let Some(decoder) = &mut decoder {
        let shown = text.len();
        decoder.finish(&mut |part| text.push_str(part));
        show(&text[shown..])?;
    }
    Ok(Generated { tokens, text, prompt_time, first_token, decode_time, stop })
}
