//! Inverse frequencies of rotary position embeddings, with the scalings that stretch them.
//!
//! Computed in binary64 after transformers' `modeling_rope_utils.py`; the YaRN paper is arXiv:2309.00071.

use anyhow::{Result, bail, ensure};

use crate::source::{Fields, Key};

/// A model's rotary positions.
#[derive(Clone, PartialEq, Debug)]
pub struct Rope {
    /// Inverse frequency of each pair (i, i + n) of a head, n their number.
    pub inv_freq: Vec<f32>,
    /// Factor on cos and sin.
    pub mscale: f32,
}

/// How frequencies are stretched beyond the trained context.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Scaling {
    /// They are not.
    None,
    /// All divided by `factor`.
    Linear {
        /// Factor on the context.
        factor: f64,
    },
    /// Llama 3: long waves divided by `factor`, short ones kept, those between blended.
    Llama3 {
        /// Factor on the context.
        factor: f64,
        /// Waves longer than `original / low` are long.
        low: f64,
        /// Waves shorter than `original / high` are short.
        high: f64,
        /// Trained context.
        original: f64,
    },
    /// YaRN: blended by the number of turns within the trained context.
    Yarn {
        /// Factor on the context.
        factor: f64,
        /// Trained context.
        original: f64,
        /// More turns than this: kept.
        beta_fast: f64,
        /// Fewer turns than this: divided by `factor`.
        beta_slow: f64,
        /// Whether the ends of the blend are rounded to whole dimensions.
        truncate: bool,
        /// Factor on cos and sin.
        attention_factor: f64,
    },
}

const THETA: Key = Key { hf: &["rope_parameters.rope_theta", "rope_theta"], gguf: ".rope.freq_base" };
const TYPE: Key = Key {
    hf: &["rope_parameters.rope_type", "rope_parameters.type", "rope_scaling.rope_type", "rope_scaling.type"],
    gguf: ".rope.scaling.type",
};
const FACTOR: Key = Key { hf: &["rope_parameters.factor", "rope_scaling.factor"], gguf: ".rope.scaling.factor" };
const SCALE_LINEAR: Key = Key { hf: &[], gguf: ".rope.scale_linear" };
const LOW: Key = Key { hf: &["rope_parameters.low_freq_factor", "rope_scaling.low_freq_factor"], gguf: "" };
const HIGH: Key = Key { hf: &["rope_parameters.high_freq_factor", "rope_scaling.high_freq_factor"], gguf: "" };
const ORIGINAL: Key = Key {
    hf: &[
        "rope_parameters.original_max_position_embeddings",
        "rope_scaling.original_max_position_embeddings",
        "original_max_position_embeddings",
    ],
    gguf: ".rope.scaling.original_context_length",
};
const BETA_FAST: Key =
    Key { hf: &["rope_parameters.beta_fast", "rope_scaling.beta_fast"], gguf: ".rope.scaling.yarn_beta_fast" };
const BETA_SLOW: Key =
    Key { hf: &["rope_parameters.beta_slow", "rope_scaling.beta_slow"], gguf: ".rope.scaling.yarn_beta_slow" };
const TRUNCATE: Key = Key { hf: &["rope_parameters.truncate", "rope_scaling.truncate"], gguf: "" };
const ATTENTION_FACTOR: Key = Key {
    hf: &["rope_parameters.attention_factor", "rope_scaling.attention_factor"],
    gguf: ".rope.scaling.attn_factor",
};
const MSCALE: Key = Key { hf: &["rope_parameters.mscale", "rope_scaling.mscale"], gguf: "" };
const MSCALE_ALL: Key = Key { hf: &["rope_parameters.mscale_all_dim", "rope_scaling.mscale_all_dim"], gguf: "" };

/// YaRN's attention factor for a stretch of `factor`, `mscale` being 1 but for models that say otherwise.
fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

/// Reads theta and scaling, and computes the table of a head of `head_dim`. `divisors` are GGUF's.
///
/// # Errors
/// Names the parameter that is missing, wrong or not supported.
pub fn read(f: &Fields, head_dim: u32, context: u32, default_theta: f64, divisors: Option<&[f32]>) -> Result<Rope> {
    let theta = f.maybe_number(THETA)?.unwrap_or(default_theta);
    ensure!(theta > 1.0, "{}", f.wrong(THETA, "a number above 1"));
    let scaling = scaling(f, context)?;
    let mut rope = table(head_dim, theta, &scaling);
    if let Some(divisors) = divisors {
        for (x, d) in rope.inv_freq.iter_mut().zip(divisors) {
            *x = (f64::from(*x) / f64::from(*d)) as f32;
        }
    }
    Ok(rope)
}

fn scaling(f: &Fields, context: u32) -> Result<Scaling> {
    let positive = |key: Key, default: Option<f64>| match (f.maybe_number(key)?, default) {
        (Some(x), _) if x > 0.0 => Ok(x),
        (None, Some(x)) => Ok(x),
        _ => Err(f.wrong(key, "a number above 0")),
    };
    Ok(match f.maybe_text(TYPE)? {
        None | Some("default" | "none" | "") => match f.maybe_number(SCALE_LINEAR)? {
            Some(_) => Scaling::Linear { factor: positive(SCALE_LINEAR, None)? },
            None => Scaling::None,
        },
        Some("linear") => Scaling::Linear { factor: positive(FACTOR, None)? },
        Some("llama3") => {
            let (low, high) = (positive(LOW, None)?, positive(HIGH, None)?);
            ensure!(high > low, "{}", f.wrong(HIGH, &format!("more than low_freq_factor {low}")));
            Scaling::Llama3 {
                factor: positive(FACTOR, None)?,
                low,
                high,
                original: positive(ORIGINAL, Some(context.into()))?,
            }
        }
        Some("yarn") => {
            let factor = positive(FACTOR, None)?;
            // GGUF's factor multiplies the default, config.json's replaces it.
            let attention_factor = match (f.maybe_number(ATTENTION_FACTOR)?, f.is_gguf()) {
                (Some(x), true) => x * yarn_mscale(factor, 1.0),
                (Some(x), false) => x,
                (None, _) => match (f.maybe_number(MSCALE)?, f.maybe_number(MSCALE_ALL)?) {
                    (Some(a), Some(b)) if a != 0.0 && b != 0.0 => yarn_mscale(factor, a) / yarn_mscale(factor, b),
                    _ => yarn_mscale(factor, 1.0),
                },
            };
            Scaling::Yarn {
                factor,
                original: positive(ORIGINAL, Some(context.into()))?,
                beta_fast: positive(BETA_FAST, Some(32.0))?,
                beta_slow: positive(BETA_SLOW, Some(1.0))?,
                truncate: f.flag(TRUNCATE, true)?,
                attention_factor,
            }
        }
        Some(_) => bail!("{}", f.wrong(TYPE, "default, linear, llama3 or yarn")),
    })
}

/// The table of a head of `head_dim` dimensions.
pub fn table(head_dim: u32, theta: f64, scaling: &Scaling) -> Rope {
    let dim = f64::from(head_dim);
    let half = head_dim / 2;
    let base = (0..half).map(|i| theta.powf(-2.0 * f64::from(i) / dim));
    let (inv_freq, mscale): (Vec<f64>, f64) = match *scaling {
        Scaling::None => (base.collect(), 1.0),
        Scaling::Linear { factor } => (base.map(|x| x / factor).collect(), 1.0),
        Scaling::Llama3 { factor, low, high, original } => {
            let scaled = base.map(|x| {
                let turns = original * x / core::f64::consts::TAU;
                if turns < low {
                    x / factor
                } else if turns > high {
                    x
                } else {
                    let smooth = (turns - low) / (high - low);
                    (1.0 - smooth) * x / factor + smooth * x
                }
            });
            (scaled.collect(), 1.0)
        }
        Scaling::Yarn { factor, original, beta_fast, beta_slow, truncate, attention_factor } => {
            // The dimension at which a wave makes `turns` turns in the trained context.
            let at = |turns: f64| dim * (original / (turns * core::f64::consts::TAU)).ln() / (2.0 * theta.ln());
            let (mut from, mut to) = (at(beta_fast), at(beta_slow));
            if truncate {
                (from, to) = (from.floor(), to.ceil());
            }
            (from, to) = (from.max(0.0), to.min(dim - 1.0));
            if from == to {
                to += 0.001;
            }
            let scaled = base.enumerate().map(|(i, x)| {
                let stretched = ((i as f64 - from) / (to - from)).clamp(0.0, 1.0);
                x / factor * stretched + x * (1.0 - stretched)
            });
            (scaled.collect(), attention_factor)
        }
    };
    Rope { inv_freq: inv_freq.into_iter().map(|x| x as f32).collect(), mscale: mscale as f32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(found: &[f32], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!((f64::from(*found) / expected - 1.0).abs() < 1e-6, "{found}, expected {expected}");
        }
    }

    #[test]
    fn plain_and_linear() {
        near(&table(8, 10_000.0, &Scaling::None).inv_freq, &[1.0, 0.1, 0.01, 0.001]);
        let linear = table(8, 10_000.0, &Scaling::Linear { factor: 4.0 });
        near(&linear.inv_freq, &[0.25, 0.025, 0.0025, 0.000_25]);
        assert_eq!(linear.mscale, 1.0);
    }

    #[test]
    fn llama3_divides_as_llama_cpp_s_converter() {
        // `rope_freqs.weight` that convert_hf_to_gguf.py wrote for the same parameters.
        let divisors = [1.0, 2.442_259_550_094_604_5, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0];
        let scaling = Scaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 64.0 };
        let found = table(16, 500_000.0, &scaling);
        let expected: Vec<f64> = (0..8).map(|i| 500_000f64.powf(-f64::from(i) / 8.0) / divisors[i as usize]).collect();
        near(&found.inv_freq, &expected);
    }

    #[test]
    fn yarn_blends_as_transformers() {
        // From `_compute_yarn_parameters`, evaluated apart.
        let yarn = |original| Scaling::Yarn {
            factor: 4.0,
            original,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            attention_factor: yarn_mscale(4.0, 1.0),
        };
        let small = table(16, 10_000.0, &yarn(32.0));
        let expected = [
            1.0,
            0.197_642_353_760_523_72,
            0.025,
            0.007_905_694_150_420_948,
            0.002_5,
            0.000_790_569_415_042_094_7,
            0.000_25,
            7.905_694_150_420_948e-5,
        ];
        near(&small.inv_freq, &expected);
        assert!((small.mscale - 1.138_629_4).abs() < 1e-6);
        let large = table(64, 10_000.0, &yarn(2048.0));
        let every_fourth: Vec<f32> = large.inv_freq.iter().step_by(4).copied().collect();
        let expected = [
            1.0,
            0.316_227_766_016_837_94,
            0.1,
            0.024_325_212_770_525_993,
            0.005_384_615_384_615_384,
            0.000_973_008_510_821_039_6,
            0.000_25,
            7.905_694_150_420_948e-5,
        ];
        near(&every_fourth, &expected);
    }
}
