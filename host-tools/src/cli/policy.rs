//! How experts are loaded and kept: the options that every command which runs a model has.

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use forebay::settings::{Settings, parse_eviction};
use forebay_runtime::cache::Eviction;
use forebay_runtime::policy::{Loading, Policy, Thresholds};

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
    /// How much of a chosen expert is loaded [default: the plan's, else exact]
    #[arg(long, value_enum, value_name = "NAME")]
    policy: Option<LoadingName>,
    /// Read only as much for a token as a token may take; the most important experts come first
    #[arg(long, value_name = "MS", value_parser = milliseconds, conflicts_with = "policy")]
    deadline: Option<f64>,
    /// HOBBIT's T1 and T2 for scored and miss: experts whose score (share of the routing weight that goes to more
    /// important ones) is at most T1 get full precision, those up to T2 low precision, the others none [default: those that
    /// `forebay plan` found for the model]
    #[arg(long, value_name = "T1,T2", value_parser = thresholds)]
    thresholds: Option<(f32, f32)>,
    /// Levels of low precision [default: the plan's, else 1]
    #[arg(long, value_name = "N", value_parser = super::positive)]
    low_levels: Option<usize>,
    /// Use at most N levels of every streamed unit: a lower precision for the whole run [default: all]
    #[arg(long, value_name = "N", value_parser = super::positive)]
    levels: Option<usize>,
    /// What gives way among experts, and among clusters where --neurons-kept leaves some out: lru, lfu, hobbit,
    /// hobbit=LRU,LFU,LHU,FLD (its weights), apex, s3fifo, density or density=RECENT,OFFSET (its parameters) [default: the
    /// plan's, else lru; density with --neurons-kept]
    #[arg(long, value_name = "NAME", value_parser = parse_eviction)]
    eviction: Option<Eviction>,
    /// Predict experts up to N layers ahead and read them early; 0 reads none [default: the plan's, else 0]
    #[arg(long, value_name = "N")]
    prefetch: Option<u8>,
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
    /// Give this share of the pool to the first units of dense layers for good: in images converted with --neurons those
    /// are the clusters that matter most often. Only what is left of the pool is for --eviction
    #[arg(long, value_name = "SHARE", default_value = "0", value_parser = super::fraction)]
    pinned: f32,
}

impl PolicyArgs {
    /// The policy, the milliseconds a token may take, and what of it comes from the image's plan.
    pub fn policy(&self, plan: Option<&Settings>) -> Result<(Policy, Option<f64>, Vec<&'static str>)> {
        let stored = plan.map(|plan| plan.policy.policy()).transpose().context("the plan in the image")?;
        let profiled = plan.and_then(|plan| plan.profiled);
        let mut planned = Vec::new();
        let given = self.low_levels.map(|n| n.min(usize::from(u8::MAX)) as u8);
        let thresholds = || match (self.thresholds, profiled) {
            (Some((full, low)), _) => {
                Ok(Thresholds { full, low, low_levels: given.or(profiled.map(|p| p.low_levels)).unwrap_or(1) })
            }
            (None, Some(found)) => {
                Ok(Thresholds { full: found.full, low: found.low, low_levels: given.unwrap_or(found.low_levels) })
            }
            (None, None) => Err(anyhow::anyhow!(
                "no thresholds are known for this model: give them with --thresholds T1,T2, or let `forebay plan \
                 --max-loss 1%` find some and keep them in the image"
            )),
        };
        let loading = match (self.policy, self.deadline, stored) {
            (_, Some(_), _) => Loading::Deadline { low_levels: given.unwrap_or(1) },
            (Some(LoadingName::Exact), ..) | (None, None, None) => Loading::Exact,
            (Some(LoadingName::Scored), ..) => Loading::Scored(thresholds()?),
            (Some(LoadingName::Miss), ..) => Loading::Miss(thresholds()?),
            (None, None, Some(stored)) => {
                planned.push("loading");
                match stored.loading {
                    Loading::Scored(_) if self.thresholds.is_some() || given.is_some() => {
                        Loading::Scored(thresholds()?)
                    }
                    Loading::Miss(_) if self.thresholds.is_some() || given.is_some() => Loading::Miss(thresholds()?),
                    other => other,
                }
            }
        };
        let by_score = matches!(loading, Loading::Scored(_) | Loading::Miss(_));
        if by_score && self.policy.is_some() && self.thresholds.is_none() {
            planned.push("thresholds");
        }
        ensure!(
            by_score || self.thresholds.is_none(),
            "--thresholds means something to --policy scored and miss only; give one of them"
        );
        let clusters = self.neurons_kept < 1.0;
        if stored.is_some() && self.eviction.is_none() && !clusters {
            planned.push("eviction");
        }
        if stored.is_some() && self.prefetch.is_none() {
            planned.push("prefetch");
        }
        let stored = stored.unwrap_or_default();
        // Layers come round in turn, so the least recently used cluster is the one that is needed next. A plan knows of
        // experts only.
        let default_eviction = if clusters { Eviction::DENSITY } else { stored.eviction };
        let policy = Policy {
            loading,
            eviction: self.eviction.unwrap_or(default_eviction),
            prefetch: self.prefetch.unwrap_or(stored.prefetch),
            cache_bias: self.cache_bias,
            cache_keep: self.cache_keep,
            neurons_kept: self.neurons_kept,
            pinned: self.pinned,
            max_levels: self.levels.map_or(u8::MAX, |n| n.min(usize::from(u8::MAX)) as u8),
        };
        Ok((policy, self.deadline, planned))
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
