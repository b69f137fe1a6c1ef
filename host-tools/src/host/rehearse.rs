//! Rehearsals: tokens computed one at a time, to see what they choose and how long they take.

use std::time::{Duration, Instant};

use anyhow::Result;
use forebay::simulate::{Costs, MeasuredCosts};
use forebay::trace::{Event, Head};
use forebay_runtime::drive::Observer;
use forebay_runtime::engine::Output;
use forebay_runtime::model::Model;
use forebay_runtime::model::record::NO_LAYER;
use forebay_runtime::policy::Choice;
use forebay_runtime::sample::{Candidate, Sampler, SamplerParams};
use forebay_storage::layers::{Clock, StdClock};

use crate::host::session::Session;

/// How the model writes its own text: as `forebay run` does where nothing else is said, but for a temperature of 1.
const WRITING: SamplerParams =
    SamplerParams { temperature: 1.0, top_k: 40, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 1 };
/// Waits that tell how late a thread wakes.
const WAITS: usize = 64;
/// Length of each, ns.
const WAIT_NS: u64 = 300_000;

/// What is computed.
#[derive(Clone, Copy, Debug)]
pub enum Score<'t> {
    /// These tokens.
    Text(&'t [u32]),
    /// So many tokens that the model writes itself.
    Own(usize),
}

/// What one token took.
#[derive(Clone, Copy, Debug)]
pub struct Took {
    /// Seconds of computing: waiting for reads is not counted.
    pub computing_s: f64,
    /// Bytes of units that were read.
    pub bytes: u64,
}

/// A rehearsal.
#[derive(Debug, Default)]
pub struct Rehearsal {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// What each chose, layer by layer.
    pub passes: Vec<Vec<Event>>,
    /// What each took.
    pub took: Vec<Took>,
    /// Of all of them together.
    pub elapsed: Duration,
    /// Reads that the store lets be in flight.
    pub depth: usize,
}

/// Notes choices and waits.
#[derive(Default)]
struct Notes {
    events: Vec<Event>,
    since: Option<Instant>,
    waited: Duration,
}

impl Observer for Notes {
    fn routed(&mut self, layer: usize, choices: &[Choice]) {
        if !choices.is_empty() {
            self.events.push(Event { layer, choices: choices.to_vec() });
        }
    }
    fn wait_begins(&mut self) {
        self.since = Some(Instant::now());
    }
    fn wait_ends(&mut self) {
        self.waited += self.since.take().map_or(Duration::ZERO, |since| since.elapsed());
    }
}

/// Computes `score` token by token, in sequences as long as the session's context.
pub fn rehearse(session: &mut Session<'_, '_>, score: Score<'_>) -> Result<Rehearsal> {
    let context = session.history.len();
    let bos = session.tokenizer.and_then(|t| t.bos().filter(|_| t.add_bos()));
    let count = match score {
        Score::Text(tokens) => tokens.len(),
        Score::Own(count) => count,
    };
    let mut sampler = Sampler::new(WRITING);
    let mut candidates = vec![Candidate::default(); Sampler::candidates(&WRITING, session.engine.vocab())];
    let mut made = Rehearsal { depth: session.depth(), ..Rehearsal::default() };
    let (mut position, mut written) = (context, 0);
    let start = Instant::now();
    for at in 0..count {
        let ended = matches!(score, Score::Own(_)) && session.tokenizer.is_some_and(|t| t.is_eos(written));
        let begins = position >= context || ended;
        if begins {
            session.reset()?;
            position = 0;
        }
        let token = match (score, begins, bos) {
            (_, true, Some(bos)) => bos,
            (Score::Text(tokens), ..) => tokens[at],
            (Score::Own(_), ..) => written,
        };
        let mut notes = Notes::default();
        let (begun, read) = (Instant::now(), session.engine.stats().unit_bytes);
        session.watch(&[token], Output::Last, &mut notes, |_, logits| {
            written = sampler.sample(logits, &[], &mut candidates);
        })?;
        made.took.push(Took {
            computing_s: (begun.elapsed() - notes.waited).as_secs_f64(),
            bytes: session.engine.stats().unit_bytes - read,
        });
        made.tokens.push(token);
        made.passes.push(notes.events);
        position += 1;
    }
    made.elapsed = start.elapsed();
    Ok(made)
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// What computing takes, from tokens for which little was read, and others for which much was.
///
/// Without the first ones, which warm everything up, a token's time is that of the tokens which read nothing, or of all if
/// none did; what the others took more is put down to the bytes they read.
pub fn costs(resident: &[Took], streamed: &[Took]) -> MeasuredCosts {
    let late = |took: &[Took]| took[took.len() / 4..].to_vec();
    let computing = |took: &[Took]| median(took.iter().map(|t| t.computing_s).collect()).unwrap_or(0.0);
    let resident = late(resident);
    let quiet: Vec<Took> = resident.iter().filter(|t| t.bytes == 0).copied().collect();
    let token_s = computing(if quiet.len() * 4 > resident.len() { &quiet } else { &resident });
    let streamed = late(streamed);
    let bytes = median(streamed.iter().map(|t| t.bytes as f64).collect()).unwrap_or(0.0);
    let more = (computing(&streamed) - token_s).max(0.0);
    MeasuredCosts { token_s, read_byte_s: if bytes > 0.0 { more / bytes } else { 0.0 }, wake_s: wake_s() }
}

/// How much later than a read ends a thread that waits for it goes on, by the clock that the throttled store waits with.
fn wake_s() -> f64 {
    let clock = StdClock::new();
    let late = |_| {
        let due = clock.now_ns() + WAIT_NS;
        clock.wait_until_ns(due);
        (clock.now_ns() - due) as f64 * 1e-9
    };
    median((0..WAITS).map(late).collect()).unwrap_or(0.0)
}

/// The costs of each part of `model`.
pub fn shared(model: &Model<'_>, head: &Head, costs: &MeasuredCosts) -> Costs {
    let resident: Vec<u64> = (0..model.layer_count() as u16).map(|layer| model.group(layer).1).collect();
    let shared = Costs::share(head, &resident, model.group(NO_LAYER).1, costs.token_s);
    Costs { read_byte_s: costs.read_byte_s, wake_s: costs.wake_s, ..shared }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_are_those_of_the_tokens() {
        let took = |computing_s, bytes| Took { computing_s, bytes };
        // The first tokens are slow and read everything.
        let resident: Vec<Took> = (0..40).map(|i| if i < 10 { took(9.0, 500) } else { took(0.5, 0) }).collect();
        let streamed: Vec<Took> = (0..40).map(|i| if i < 10 { took(9.0, 900) } else { took(0.75, 100) }).collect();
        let got = costs(&resident, &streamed);
        assert!((got.token_s - 0.5).abs() < 1e-12 && (got.read_byte_s - 0.0025).abs() < 1e-12, "{got:?}");
        assert!(got.wake_s >= 0.0);
        // Nothing is read, so reading costs nothing.
        assert_eq!(costs(&resident, &resident).read_byte_s, 0.0);
        assert_eq!(costs(&[], &[]).token_s, 0.0);
    }
}
