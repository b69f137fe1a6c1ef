//! Choosing the next token from logits.
//!
//! The chain is llama.cpp's default order: repetition penalty, top-k, top-p, min-p, temperature, draw. The filters
//! see the probabilities before the temperature. The same logits, history and seed give the same token on every
//! machine: the exponential is the kernels' own and sums run in descending order of probability.

use forebay_kernels::ops;
use rand_core::{RngCore, SeedableRng};
use rand_pcg::Pcg32;

use crate::model::record::ModelRecord;

/// Tokens that the repetition penalty looks back on, everywhere.
pub const PENALTY_WINDOW: usize = 64;

/// How to sample.
#[derive(Clone, Copy, PartialEq, Debug)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct SamplerParams {
    /// Divides the logits before the draw; 0 takes the most probable token.
    pub temperature: f32,
    /// Keeps the most probable k tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the most probable tokens whose probabilities reach this sum; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens of at least this probability relative to the most probable one; 0 keeps all.
    pub min_p: f32,
    /// Divides positive logits, and multiplies negative ones, of tokens in the history; 1 leaves them.
    pub repetition_penalty: f32,
    /// Seed of the draws.
    pub seed: u64,
}

impl SamplerParams {
    /// Always the most probable token.
    pub const GREEDY: Self =
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 };
    /// llama.cpp's defaults, for models that suggest nothing.
    pub const DEFAULT: Self =
        Self { temperature: 0.8, top_k: 40, top_p: 0.95, min_p: 0.05, repetition_penalty: 1.0, seed: 0 };

    /// What a model suggests, else [`Self::DEFAULT`].
    pub fn of_model(model: &ModelRecord) -> Self {
        // A model that suggests nothing has a temperature of 0.
        if model.temperature.get() <= 0.0 {
            return Self::DEFAULT;
        }
        Self {
            temperature: model.temperature.get(),
            top_k: model.top_k.get() as usize,
            top_p: model.top_p.get(),
            min_p: model.min_p.get(),
            repetition_penalty: model.repetition_penalty.get(),
            seed: 0,
        }
    }
}

/// A token that may be drawn.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Candidate {
    id: u32,
    logit: f32,
}

impl Candidate {
    /// Descending by logit, equal ones ascending by id: a total order for finite logits.
    fn before(&self, other: &Self) -> bool {
        self.logit > other.logit || (self.logit == other.logit && self.id < other.id)
    }
}

/// A seeded sampler.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplerParams,
    rng: Pcg32,
}

impl Sampler {
    /// A sampler at the start of its sequence of draws.
    pub fn new(params: SamplerParams) -> Self {
        Self { params, rng: Pcg32::seed_from_u64(params.seed) }
    }

    /// How it samples.
    pub fn params(&self) -> &SamplerParams {
        &self.params
    }

    /// Changes how it samples. Its draws go on; a seed that differs counts for the next sampler.
    pub fn set_params(&mut self, params: SamplerParams) {
        self.params = params;
    }

    /// Candidates that [`Self::sample`] needs room for.
    pub fn candidates(params: &SamplerParams, vocab: usize) -> usize {
        match params {
            p if p.temperature <= 0.0 => 0,
            p if p.top_k > 0 => p.top_k.min(vocab),
            _ => vocab,
        }
    }

    /// Chooses a token. `logits` are changed by the repetition penalty over `history`; `scratch` has at least
    /// [`Self::candidates`] elements (with fewer, only so many of the most probable tokens are considered).
    pub fn sample(&mut self, logits: &mut [f32], history: &[u32], scratch: &mut [Candidate]) -> u32 {
        self.penalise(logits, history);
        let room = Self::candidates(&self.params, logits.len()).min(scratch.len());
        if room == 0 {
            return ops::argmax(logits) as u32;
        }
        let kept = most_probable(logits, &mut scratch[..room]);
        self.draw(kept)
    }

    fn penalise(&self, logits: &mut [f32], history: &[u32]) {
        let penalty = self.params.repetition_penalty;
        if penalty == 1.0 || penalty <= 0.0 {
            return;
        }
        for (at, &id) in history.iter().enumerate() {
            let first = !history[..at].contains(&id);
            if let Some(logit) = logits.get_mut(id as usize).filter(|_| first) {
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
    }

    /// Filters candidates in descending order and draws one.
    fn draw(&mut self, kept: &[Candidate]) -> u32 {
        let top = kept[0].logit;
        let weight = |c: &Candidate| ops::exp(c.logit - top);
        let mut count = kept.len();
        if self.params.top_p < 1.0 {
            let total: f32 = kept.iter().map(weight).sum();
            let mut sum = 0.0;
            let reached = kept.iter().position(|c| {
                sum += weight(c);
                sum >= self.params.top_p * total
            });
            count = reached.map_or(count, |last| last + 1);
        }
        if self.params.min_p > 0.0 {
            let fits = kept[..count].iter().take_while(|c| weight(c) >= self.params.min_p).count();
            count = fits.max(1);
        }
        let kept = &kept[..count];
        let tempered = |c: &Candidate| ops::exp((c.logit - top) / self.params.temperature);
        let total: f32 = kept.iter().map(tempered).sum();
        // 24 random bits are exactly an f32 in [0, 1).
        let uniform = (self.rng.next_u32() >> 8) as f32 * (1.0 / (1 << 24) as f32);
        let mut left = uniform * total;
        for candidate in kept {
            left -= tempered(candidate);
            if left < 0.0 {
                return candidate.id;
            }
        }
        kept[count - 1].id
    }
}

/// The most probable tokens in descending order, as many as `out` has room for.
fn most_probable<'c>(logits: &[f32], out: &'c mut [Candidate]) -> &'c [Candidate] {
    let count = out.len().min(logits.len());
    let out = &mut out[..count];
    let candidate = |(id, logit): (usize, &f32)| Candidate { id: id as u32, logit: *logit };
    for (slot, item) in out.iter_mut().zip(logits.iter().enumerate()) {
        *slot = candidate(item);
    }
    if count < logits.len() {
        // A heap whose root is the least probable of those kept.
        for root in (0..count / 2).rev() {
            sift(out, root);
        }
        for item in logits.iter().enumerate().skip(count) {
            let next = candidate(item);
            if next.before(&out[0]) {
                out[0] = next;
                sift(out, 0);
            }
        }
    }
    out.sort_unstable_by(|a, b| if a.before(b) { core::cmp::Ordering::Less } else { core::cmp::Ordering::Greater });
    out
}

/// Restores the heap below `root`: a parent comes after its children in [`Candidate::before`]'s order.
fn sift(heap: &mut [Candidate], mut root: usize) {
    loop {
        let mut last = root;
        for child in [2 * root + 1, 2 * root + 2] {
            if child < heap.len() && heap[last].before(&heap[child]) {
                last = child;
            }
        }
        if last == root {
            return;
        }
        heap.swap(root, last);
        root = last;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits() -> [f32; 6] {
        [1.0, 3.0, -2.0, 3.0, 0.5, 2.0]
    }

    fn drawn(params: SamplerParams) -> [usize; 6] {
        let mut counts = [0; 6];
        let mut sampler = Sampler::new(params);
        let mut scratch = [Candidate::default(); 6];
        for _ in 0..20_000 {
            counts[sampler.sample(&mut logits(), &[], &mut scratch) as usize] += 1;
        }
        counts
    }

    const SOFT: SamplerParams = SamplerParams { temperature: 1.0, seed: 7, ..SamplerParams::GREEDY };

    #[test]
    fn greedy_takes_the_first_of_equals() {
        assert_eq!(Sampler::new(SamplerParams::GREEDY).sample(&mut logits(), &[], &mut []), 1);
    }

    #[test]
    fn draws_follow_the_softmax() {
        let total: f64 = logits().iter().map(|l| f64::from(*l).exp()).sum();
        for (count, logit) in drawn(SOFT).iter().zip(logits()) {
            let expected = f64::from(logit).exp() / total * 20_000.0;
            let sigma = expected.sqrt().max(1.0);
            assert!((*count as f64 - expected).abs() < 5.0 * sigma, "{count} drawn, {expected} expected");
        }
    }

    #[test]
    fn temperature_sharpens() {
        let sharp = drawn(SamplerParams { temperature: 0.25, ..SOFT });
        assert!(sharp[5] * 4 < drawn(SOFT)[5], "{sharp:?}");
    }

    #[test]
    fn filters_keep_what_they_say() {
        let kept = |params| drawn(params).map(|n| n > 0);
        assert_eq!(kept(SamplerParams { top_k: 3, ..SOFT }), [false, true, false, true, false, true]);
        // The two best have about 0.75 of the mass.
        assert_eq!(kept(SamplerParams { top_p: 0.5, ..SOFT }), [false, true, false, true, false, false]);
        assert_eq!(kept(SamplerParams { min_p: 0.3, ..SOFT }), [false, true, false, true, false, true]);
        assert_eq!(kept(SamplerParams { min_p: 1.0, ..SOFT }), [false, true, false, true, false, false]);
    }

    #[test]
    fn the_heap_agrees_with_a_sort() {
        let logits: [f32; 257] = core::array::from_fn(|i| ((i * 7919) % 101) as f32);
        let mut sorted: [Candidate; 257] = core::array::from_fn(|i| Candidate { id: i as u32, logit: logits[i] });
        sorted.sort_by(|a, b| b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id)));
        for room in [1, 2, 40, 256, 257] {
            let mut out = [Candidate::default(); 257];
            assert_eq!(most_probable(&logits, &mut out[..room]), &sorted[..room]);
        }
    }

    #[test]
    fn penalty_counts_a_token_once() {
        let mut sampler = Sampler::new(SamplerParams { repetition_penalty: 2.0, ..SamplerParams::GREEDY });
        let mut l = logits();
        assert_eq!(sampler.sample(&mut l, &[1, 1, 2, 3, 99], &mut []), 5);
        assert_eq!(l, [1.0, 1.5, -4.0, 1.5, 0.5, 2.0]);
    }

    #[test]
    fn draws_go_on_under_other_parameters() {
        let draws = |change: bool| -> [u32; 40] {
            let mut sampler = Sampler::new(SOFT);
            let mut scratch = [Candidate::default(); 6];
            core::array::from_fn(|i| {
                if change && i == 7 {
                    sampler.set_params(SamplerParams { temperature: 0.0, ..SOFT });
                } else if change && i == 9 {
                    sampler.set_params(SOFT);
                }
                sampler.sample(&mut logits(), &[], &mut scratch)
            })
        };
        let (same, changed) = (draws(false), draws(true));
        // Greedy choices draw nothing.
        assert_eq!((&same[..7], &same[7..38]), (&changed[..7], &changed[9..]));
    }

    #[test]
    fn the_same_seed_draws_the_same() {
        assert_eq!(drawn(SOFT), drawn(SOFT));
        assert_ne!(drawn(SOFT), drawn(SamplerParams { seed: 8, ..SOFT }));
    }
}
