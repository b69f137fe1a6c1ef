//! Random weights that can be made row by row, in any order, twice the same.
//!
//! The residual stream has three parts. The first [`COMMON`] dimensions are 1 in every embedding and no layer writes to
//! them, so that a router's weights there are a bias: they make experts unequally popular, whatever kind of router it
//! is. The next dimensions are the token's *topic*, shared by one token in [`TOPICS`]; the rest is its own. A sequence
//! that stays with its topic therefore keeps that share of the router's input, and with it some of its experts.
//! All of it is plain weights, so every program that runs the model routes alike.

use std::collections::HashMap;

use half::f16;
use rand_core::{RngCore, SeedableRng};
use rand_pcg::Pcg64Mcg;

use super::shape::{Shape, Spec};
use super::{Options, TOPIC_TOKENS, TOPICS};
use crate::source::Maker;

/// Dimensions that are the same in every embedding: one block of every quantised format.
pub const COMMON: usize = 32;
/// Standard deviation of codes drawn evenly from -7 to 7, with 0 twice as often.
const Q4_STD: f64 = 4.183;
/// Standard deviation of codes drawn evenly from -127 to 127.
const Q8_STD: f64 = 73.32;
/// Standard deviation of the logits.
const LOGIT_STD: f64 = 3.0;
/// Most often that an expert is chosen, of all tokens.
const MOST_POPULAR: f64 = 0.95;

/// How a tensor's values are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Law {
    /// All 1.
    Ones,
    /// All 0.
    Zero,
    /// Normal.
    Normal { std: f64 },
    /// Even codes of mean zero; if `quiet`, the rows that would write to the common dimensions are zero.
    Codes { std: f64, quiet: bool },
    /// The rows of the embedding, or of the output head.
    Tokens { head: bool },
    /// The final norm: it hides a token's own part, so that the likeliest token is not the last one again.
    FinalNorm,
    /// A router.
    Gate { layer: usize },
}

/// Makes the tensors of a synthetic model.
#[derive(Debug)]
pub(super) struct Weights {
    shape: Shape,
    seed: u64,
    specs: HashMap<String, (u64, Spec)>,
    /// End of the topic's dimensions.
    topic_end: usize,
    /// What is added to the routers' scores, by layer.
    offsets: Vec<Vec<f64>>,
    router_std: f64,
}

/// Mixes numbers into a seed (the finaliser of SplitMix64 after each).
fn mix(parts: &[u64]) -> u64 {
    parts.iter().fold(0x9e37_79b9_7f4a_7c15, |h, part| {
        let mut z = (h ^ part).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    })
}

fn generator(parts: &[u64]) -> Pcg64Mcg {
    Pcg64Mcg::seed_from_u64(mix(parts))
}

/// A number in [0, 1).
fn uniform(rng: &mut impl RngCore) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// A normal number (Box and Muller).
fn normal(rng: &mut impl RngCore) -> f64 {
    let (a, b) = (1.0 - uniform(rng), uniform(rng));
    (-2.0 * a.ln()).sqrt() * (core::f64::consts::TAU * b).cos()
}

/// The number that a standard normal one is below with probability `p`.
fn quantile(p: f64) -> f64 {
    let (mut low, mut high) = (-10.0f64, 10.0f64);
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        if 0.5 * libm::erfc(-middle / core::f64::consts::SQRT_2) < p { low = middle } else { high = middle }
    }
    (low + high) / 2.0
}

/// How often each of `experts` experts is chosen if `top_k` are and popularity falls as `rank^-skew`, by rank.
pub(super) fn popularity(experts: u64, top_k: u64, skew: f64) -> Vec<f64> {
    let shares: Vec<f64> = (1..=experts).map(|rank| (rank as f64).powf(-skew)).collect();
    // Nobody is chosen more often than always; what the first cannot take goes to the others.
    let (mut low, mut high) = (0.0, top_k as f64 * (experts as f64).powf(skew.abs()) * experts as f64);
    for _ in 0..200 {
        let middle = (low + high) / 2.0;
        let sum: f64 = shares.iter().map(|share| (share * middle).min(MOST_POPULAR)).sum();
        if sum < top_k as f64 { low = middle } else { high = middle }
    }
    shares.iter().map(|share| (share * low).min(MOST_POPULAR)).collect()
}

/// `list` in a random order.
fn shuffle<T>(list: &mut [T], rng: &mut impl RngCore) {
    for i in (1..list.len()).rev() {
        list.swap(i, (uniform(rng) * (i + 1) as f64) as usize);
    }
}

impl Weights {
    pub fn new(shape: &Shape, specs: &[Spec], options: &Options) -> Self {
        let blocks = shape.hidden as usize / COMMON - 1;
        let topic = (options.locality * blocks as f64).round() as usize;
        let mut by_rank = popularity(shape.experts, shape.top_k, options.skew);
        let offsets = (0..shape.layers)
            .map(|layer| {
                shuffle(&mut by_rank, &mut generator(&[options.seed, 1, layer as u64]));
                // An expert is chosen when its score is above a threshold that all share, here 0.
                by_rank.iter().map(|p| options.router_std * quantile(*p)).collect()
            })
            .collect();
        Self {
            shape: shape.clone(),
            seed: options.seed,
            specs: (0u64..).zip(specs).map(|(i, spec)| (spec.name.clone(), (i, spec.clone()))).collect(),
            topic_end: COMMON * (1 + topic),
            offsets,
            router_std: options.router_std,
        }
    }

    /// The final norm's weights: large where the topic is, so that most of the probability stays with it; of random
    /// sign on the token's own part; nothing of what all tokens have in common.
    fn final_norm(&self, dim: usize) -> f64 {
        let hidden = self.shape.hidden as usize;
        let (own, topic) = (hidden - self.topic_end, self.topic_end - COMMON);
        if dim < COMMON {
            return 0.0;
        }
        if dim >= self.topic_end {
            let sign = if mix(&[self.seed, 2, dim as u64]) & 1 == 0 { 1.0 } else { -1.0 };
            return sign * LOGIT_STD / (own as f64).sqrt();
        }
        // The odds of the topic's tokens against all others are those of staying with it.
        let mates = self.shape.vocab as f64 / TOPICS as f64;
        let odds = (TOPIC_TOKENS - 1.0) * (self.shape.vocab as f64 - mates) / mates;
        odds.ln() / topic as f64
    }

    fn floats(&self, number: u64, law: Law, row: u64, cols: usize) -> Vec<f64> {
        let rng = &mut generator(&[self.seed, 3, number, row]);
        match law {
            Law::Ones => vec![1.0; cols],
            Law::Normal { std } => (0..cols).map(|_| std * normal(rng)).collect(),
            Law::FinalNorm => (0..cols).map(|dim| self.final_norm(dim)).collect(),
            Law::Gate { layer } => {
                // After the norm the common dimensions are 1 over the root of the stream's mean square.
                let common = self.shape.power(layer).sqrt() / COMMON as f64;
                let offset = self.offsets[layer][row as usize] * common;
                let std = self.router_std / ((cols - COMMON) as f64).sqrt();
                (0..cols).map(|dim| if dim < COMMON { offset } else { std * normal(rng) }).collect()
            }
            Law::Zero | Law::Codes { .. } | Law::Tokens { .. } => vec![0.0; cols],
        }
    }

    /// The row of token `token`: `Q8_0` blocks of root mean square 1.
    fn token(&self, head: bool, token: u64, out: &mut [u8]) {
        let topic = &mut generator(&[self.seed, 4, token % TOPICS]);
        let own = &mut generator(&[self.seed, 5, head.into(), token]);
        for (block, out) in out.chunks_exact_mut(34).enumerate() {
            if block == 0 {
                out[..2].copy_from_slice(&f16::from_f64(1.0 / 127.0).to_le_bytes());
                out[2..].fill(127);
            } else {
                let rng = if block * COMMON < self.topic_end { &mut *topic } else { &mut *own };
                q8(out, 1.0, rng);
            }
        }
    }
}

/// Blocks of `Q4_0`.
fn q4(out: &mut [u8], std: f64, rng: &mut impl RngCore) {
    let scale = f16::from_f64(std / Q4_STD).to_le_bytes();
    for block in out.chunks_exact_mut(18) {
        block[..2].copy_from_slice(&scale);
        rng.fill_bytes(&mut block[2..]);
        // The code -8 has no opposite: it becomes 0, so that the mean is 0.
        for byte in &mut block[2..] {
            *byte |= u8::from(*byte & 0x0f == 0) << 3 | u8::from(*byte & 0xf0 == 0) << 7;
        }
    }
}

/// Blocks of `Q8_0`.
fn q8(out: &mut [u8], std: f64, rng: &mut impl RngCore) {
    let scale = f16::from_f64(std / Q8_STD).to_le_bytes();
    for block in out.chunks_exact_mut(34) {
        block[..2].copy_from_slice(&scale);
        rng.fill_bytes(&mut block[2..]);
        for byte in &mut block[2..] {
            *byte = if *byte == 0x80 { 0 } else { *byte };
        }
    }
}

impl Maker for Weights {
    fn row(&self, name: &str, row: u64, out: &mut [u8]) {
        let Some((number, spec)) = self.specs.get(name) else { return out.fill(0) };
        match spec.law {
            Law::Tokens { head } => self.token(head, row, out),
            Law::Codes { std, quiet } => {
                let silent = quiet && row % self.shape.hidden < COMMON as u64;
                let rng = &mut generator(&[self.seed, 6, *number, row]);
                // A zero scale makes the row zero.
                let std = if silent { 0.0 } else { std };
                if spec.kind.name == "Q4_0" { q4(out, std, rng) } else { q8(out, std, rng) }
            }
            law => {
                let cols = out.len() / size_of::<f32>();
                for (out, x) in out.chunks_exact_mut(4).zip(self.floats(*number, law, row, cols)) {
                    out.copy_from_slice(&(x as f32).to_le_bytes());
                }
            }
        }
    }
}

/// `count` tokens of a vocabulary: the topic changes about every [`TOPIC_TOKENS`] tokens, the token always.
pub(super) fn tokens(vocab: u64, seed: u64, count: usize) -> Vec<u32> {
    let rng = &mut generator(&[seed, 7]);
    let mut topic = 0;
    (0..count)
        .map(|i| {
            if i == 0 || uniform(rng) * TOPIC_TOKENS < 1.0 {
                topic = (uniform(rng) * TOPICS as f64) as u64;
            }
            let mates = (vocab - topic).div_ceil(TOPICS);
            (topic + (uniform(rng) * mates as f64) as u64 * TOPICS) as u32
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_the_normal_ones() {
        for (p, x) in [(0.5, 0.0), (0.975, 1.959_964), (0.125, -1.150_349)] {
            assert!((quantile(p) - x).abs() < 1e-5, "{p}");
        }
    }

    #[test]
    fn popularity_sums_to_what_is_chosen() {
        for skew in [0.0, 0.5, 1.0, 2.0] {
            let shares = popularity(32, 4, skew);
            assert!((shares.iter().sum::<f64>() - 4.0).abs() < 1e-6, "{skew}");
            assert!(shares.windows(2).all(|w| w[0] >= w[1]));
        }
        assert!(popularity(32, 4, 0.0).iter().all(|p| (p - 0.125).abs() < 1e-9));
    }

    #[test]
    fn codes_have_the_deviation_that_was_asked_for_and_no_mean() {
        use crate::source::{DType, dequantise};
        let rng = &mut generator(&[1]);
        for dtype in [DType::Q4_0, DType::Q8_0] {
            let mut raw = vec![0; 4096 * dtype.bytes()];
            if dtype == DType::Q4_0 {
                q4(&mut raw, 0.02, rng)
            } else {
                q8(&mut raw, 0.02, rng)
            }
            let mut values = vec![0.0; 4096 * 32];
            dequantise(dtype, &raw, &mut values);
            let n = values.len() as f64;
            let mean = values.iter().map(|x| f64::from(*x)).sum::<f64>() / n;
            let power = values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / n;
            assert!(mean.abs() < 0.02 * 0.02, "{dtype:?}: mean {mean}");
            assert!((power.sqrt() / 0.02 - 1.0).abs() < 0.02, "{dtype:?}: {}", power.sqrt());
        }
    }
}
