//! How experts are loaded and kept: the options that every command which runs a model has.

use anyhow::{Result, ensure};
use clap::{Args, ValueEnum};
use forebay_runtime::cache::{Eviction, Weights};
use forebay_runtime::policy::{Loading, Policy, Thresholds};

/// Thresholds of `scored` and `miss` that nobody has profiled for the model: Mixtral's, as HOBBIT gives them.
const DEFAULT_THRESHOLDS: (f32, f32) = (0.6, 0.9);

/// `--policy`
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum LoadingName {
    /// Full precision always: the same bits as with everything in memory.
    Exact,
    /// Precision by the router's scores alone: the same bits whatever fits the pool.
    Scored,
    /// What is in the pool is used as it is; the scores decide what is read of the rest.
    Miss,
}

/// How experts are loaded and kept.
#[derive(Args)]
pub struct PolicyArgs {
    /// How much of a chosen expert is loaded [default: exact]
    #[arg(long, value_enum, value_name = "NAME")]
    policy: Option<LoadingName>,
    /// Read only as much for a token as a token may take; the most important experts come first
    #[arg(long, value_name = "MS", value_parser = milliseconds, conflicts_with = "policy")]
    deadline: Option<f64>,
    /// HOBBIT's T1 and T2 for scored and miss: experts whose score (share of the routing weight that goes to more
    /// important ones) is at most T1 get full precision, those up to T2 low precision, the others none
    /// [default: 0.6,0.9]
    #[arg(long, value_name = "T1,T2", value_parser = thresholds)]
    thresholds: Option<(f32, f32)>,
    /// Levels of low precision
    #[arg(long, value_name = "N", default_value = "1", value_parser = super::positive)]
    low_levels: usize,
    /// Use at most N levels of every streamed unit: a lower precision for the whole run [default: all]
    #[arg(long, value_name = "N", value_parser = super::positive)]
    levels: Option<usize>,
    /// What gives way among experts, and among clusters where --neurons-kept leaves some out: lru, lfu, hobbit,
    /// hobbit=LRU,LFU,LHU,FLD (its weights), apex or s3fifo [default: lru; lfu with --neurons-kept]
    #[arg(long, value_name = "NAME", value_parser = eviction)]
    eviction: Option<Eviction>,
    /// Predict experts up to N layers ahead and read them early; 0 reads none
    #[arg(long, value_name = "N", default_value = "0")]
    prefetch: u8,
    /// Prefer experts in the pool by X times the spread of the router's scores (changes the result); 0 does not
    #[arg(long, value_name = "X", default_value = "0", value_parser = bias)]
    cache_bias: f32,
    /// Choices of a token that --cache-bias leaves as they are
    #[arg(long, value_name = "N", default_value = "1")]
    cache_keep: u8,
    /// Read and compute only about this share of the neurons of dense layers, those that a predictor expects to matter
    /// to the token (changes the result); for images converted with --neurons
    #[arg(long, value_name = "SHARE", default_value = "1", value_parser = super::fraction)]
    neurons_kept: f32,
}

impl PolicyArgs {
    /// The policy, and the milliseconds a token may take.
    pub fn policy(&self) -> Result<(Policy, Option<f64>)> {
        let low_levels = self.low_levels.min(usize::from(u8::MAX)) as u8;
        let (full, low) = self.thresholds.unwrap_or(DEFAULT_THRESHOLDS);
        let thresholds = Thresholds { full, low, low_levels };
        let loading = match (self.policy.unwrap_or(LoadingName::Exact), self.deadline) {
            (_, Some(_)) => Loading::Deadline { low_levels },
            (LoadingName::Exact, None) => Loading::Exact,
            (LoadingName::Scored, None) => Loading::Scored(thresholds),
            (LoadingName::Miss, None) => Loading::Miss(thresholds),
        };
        let by_score = matches!(loading, Loading::Scored(_) | Loading::Miss(_));
        ensure!(
            by_score || self.thresholds.is_none(),
            "--thresholds means something to --policy scored and miss only; give one of them"
        );
        // Layers come round in turn, so the least recently used cluster is the one that is needed next.
        let default_eviction = if self.neurons_kept < 1.0 { Eviction::Lfu } else { Eviction::Lru };
        let policy = Policy {
            loading,
            eviction: self.eviction.unwrap_or(default_eviction),
            prefetch: self.prefetch,
            cache_bias: self.cache_bias,
            cache_keep: self.cache_keep,
            neurons_kept: self.neurons_kept,
            max_levels: self.levels.map_or(u8::MAX, |n| n.min(usize::from(u8::MAX)) as u8),
        };
        Ok((policy, self.deadline))
    }
}

fn milliseconds(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|ms: &f64| ms.is_finite() && *ms > 0.0)
        .ok_or_else(|| "expected milliseconds above 0".into())
}

fn bias(text: &str) -> Result<f32, String> {
    super::number(text, |x| x >= 0.0, "a number of at least 0")
}

fn thresholds(text: &str) -> Result<(f32, f32), String> {
    let pair = text.split_once(',').and_then(|(a, b)| Some((a.trim().parse().ok()?, b.trim().parse().ok()?)));
    pair.filter(|(full, low)| (0.0..=1.0).contains(full) && (*full..=1.0).contains(low))
        .ok_or_else(|| "expected T1,T2 with 0 <= T1 <= T2 <= 1, such as 0.6,0.9".into())
}

fn eviction(text: &str) -> Result<Eviction, String> {
    if let Some(weights) = text.strip_prefix("hobbit=") {
        let weights: Option<Vec<f32>> = weights.split(',').map(|w| w.trim().parse().ok()).collect();
        return match weights.as_deref() {
            Some(&[lru, lfu, lhu, fld]) if [lru, lfu, lhu, fld].iter().all(|w| w.is_finite() && *w >= 0.0) => {
                Ok(Eviction::Hobbit(Weights { lru, lfu, lhu, fld }))
            }
            _ => Err("expected four weights, such as hobbit=0.25,0.25,0.25,0.25".into()),
        };
    }
    Eviction::by_name(text).ok_or_else(|| {
        let names: Vec<_> = Eviction::ALL.iter().map(|policy| policy.name()).collect();
        format!("expected one of {}", names.join(", "))
    })
}
