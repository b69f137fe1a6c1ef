//! What a run read and used, for reports: one line of JSON or a few of a table.

use forebay::settings::eviction_text;
use forebay_runtime::engine::{Engine, LayerStats, Stats};
use forebay_runtime::policy::Loading;
use serde::Serialize;

use crate::host::session::Setup;
use crate::host::size::bytes_text;

/// The policy of a run, as it was.
#[derive(Clone, Debug, Serialize)]
pub struct PolicyReport {
    loading: &'static str,
    /// T1 and T2, where the policy has them.
    thresholds: Option<(f32, f32)>,
    low_levels: Option<u8>,
    deadline_ms: Option<f64>,
    eviction: String,
    prefetch: u8,
    cache_bias: f32,
    cache_keep: u8,
    /// The most levels used, where that is not all.
    max_levels: Option<u8>,
    /// Share of the dense layers' neurons that was asked for, where that is not all.
    neurons_kept: Option<f32>,
    /// Share of the pool whose units never give way, where there is such a region.
    pinned: Option<f32>,
    /// What of a run's settings came from the image's plan.
    from_plan: Vec<&'static str>,
}

impl PolicyReport {
    /// Of a session.
    pub fn new(setup: &Setup) -> Self {
        let (policy, deadline_ms) = (&setup.plan.limits.policy, setup.deadline_ms);
        let (thresholds, low_levels) = match policy.loading {
            Loading::Exact => (None, None),
            Loading::Scored(t) | Loading::Miss(t) => (Some((t.full, t.low)), Some(t.low_levels)),
            Loading::Deadline { low_levels } => (None, Some(low_levels)),
        };
        Self {
            loading: policy.loading.name(),
            thresholds,
            low_levels,
            deadline_ms,
            eviction: eviction_text(&policy.eviction),
            prefetch: policy.prefetch,
            cache_bias: policy.cache_bias,
            cache_keep: policy.cache_keep,
            max_levels: (policy.max_levels != u8::MAX).then_some(policy.max_levels),
            neurons_kept: (policy.neurons_kept < 1.0).then_some(policy.neurons_kept),
            pinned: (policy.pinned > 0.0).then_some(policy.pinned),
            from_plan: setup.planned.clone(),
        }
    }

    /// In words.
    pub fn text(&self) -> String {
        let mut text = self.loading.to_owned();
        if let Some((full, low)) = self.thresholds {
            text += &format!(" (thresholds {full} and {low})");
        }
        if let Some(ms) = self.deadline_ms {
            text += &format!(" ({ms} ms a token)");
        }
        text += &format!(", eviction {}", self.eviction);
        if let Some(share) = self.pinned {
            text += &format!(" in what pinned units leave, a share of {share} of the pool being theirs");
        }
        if self.prefetch > 0 {
            text += &format!(", prefetch {}", self.prefetch);
        }
        if self.cache_bias > 0.0 {
            text += &format!(", cache bias {} after the first {}", self.cache_bias, self.cache_keep);
        }
        if let Some(levels) = self.max_levels {
            text += &format!(", at most {levels} levels");
        }
        if let Some(share) = self.neurons_kept {
            text += &format!(", a share of {share} of the dense neurons");
        }
        if !self.from_plan.is_empty() {
            text += &format!("; {} from the image's plan", self.from_plan.join(", "));
        }
        text
    }
}

/// What was read and used from one moment to another.
#[derive(Clone, Debug, Serialize)]
pub struct Accounting {
    tokens: u64,
    hits: u64,
    misses: u64,
    hit_rate: f64,
    hit_rate_by_layer: Vec<f64>,
    bytes_read: u64,
    bytes_per_token: f64,
    reads_per_token: f64,
    /// Pieces read ahead, and those of them that gave way unused.
    prefetched: u64,
    prefetch_wasted: u64,
    /// Share of the experts chosen that had been predicted one layer before, where there was a prediction.
    prediction_accuracy: Option<f64>,
    /// Shares of the experts chosen, by the levels they were used with; the first are those left out.
    precision_shares: Vec<f64>,
    /// Share of the routing weight that was left out.
    skipped_weight: f64,
    /// Share of the neurons of dense layers with predictors that was used, where some could be left out.
    neurons_used: Option<f64>,
    /// Shares of what ReLU layers computed that was not zero: of the neurons, and of the units (with any such neuron).
    relu_live_neurons: Option<f64>,
    relu_live_units: Option<f64>,
    rerouted: u64,
    replaced: u64,
    retries: u64,
}

fn share(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

/// The engine's counts at a moment.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    all: Stats,
    layers: Vec<LayerStats>,
}

impl Counts {
    /// The counts now.
    pub fn of(engine: &Engine<'_>) -> Self {
        Self { all: engine.stats(), layers: (0..).map_while(|layer| engine.layer_stats(layer)).collect() }
    }

    /// What was read and used since `before`.
    pub fn since(&self, before: &Self) -> Accounting {
        let (now, then) = (&self.all, &before.all);
        let tokens = now.tokens - then.tokens;
        let (hits, misses) = (now.hits - then.hits, now.misses - then.misses);
        let bytes = now.unit_bytes - then.unit_bytes;
        let precisions: Vec<u64> = now.precisions.iter().zip(then.precisions).map(|(a, b)| a - b).collect();
        let used: u64 = precisions.iter().sum();
        let levels = precisions.iter().rposition(|n| *n > 0).map_or(0, |last| last + 1);
        let by_layer = |(index, layer): (usize, &LayerStats)| {
            let then = before.layers.get(index).copied().unwrap_or_default();
            let (hits, misses) = (layer.hits - then.hits, layer.misses - then.misses);
            share(hits as f64, (hits + misses) as f64)
        };
        let live = |(part, part_then): (u64, u64), (all, all_then): (u64, u64)| {
            (all > all_then).then(|| share((part - part_then) as f64, (all - all_then) as f64))
        };
        let foreseeable = now.foreseeable - then.foreseeable;
        let per_token = |n: u64| share(n as f64, tokens as f64);
        Accounting {
            tokens,
            hits,
            misses,
            hit_rate: share(hits as f64, (hits + misses) as f64),
            hit_rate_by_layer: self.layers.iter().enumerate().map(by_layer).collect(),
            bytes_read: bytes,
            bytes_per_token: per_token(bytes),
            reads_per_token: per_token(now.unit_reads - then.unit_reads),
            prefetched: now.prefetched - then.prefetched,
            prefetch_wasted: now.wasted - then.wasted,
            prediction_accuracy: (foreseeable > 0)
                .then(|| share((now.foreseen - then.foreseen) as f64, foreseeable as f64)),
            precision_shares: precisions[..levels].iter().map(|n| share(*n as f64, used as f64)).collect(),
            skipped_weight: share(now.skipped - then.skipped, (now.routings - then.routings) as f64),
            neurons_used: (now.cluster_all > then.cluster_all).then(|| {
                share((now.cluster_uses - then.cluster_uses) as f64, (now.cluster_all - then.cluster_all) as f64)
            }),
            relu_live_neurons: live((now.relu_live, then.relu_live), (now.relu_neurons, then.relu_neurons)),
            relu_live_units: live((now.relu_live_units, then.relu_live_units), (now.relu_units, then.relu_units)),
            rerouted: now.rerouted - then.rerouted,
            replaced: now.replaced - then.replaced,
            retries: now.retries - then.retries,
        }
    }
}

impl Accounting {
    /// Share of uses that found everything in the pool.
    pub fn hit_rate(&self) -> f64 {
        self.hit_rate
    }

    /// Rows of a table: what, and how much.
    pub fn rows(&self) -> Vec<(&'static str, String)> {
        let mut rows = vec![(
            "units",
            format!(
                "{} hits ({:.1} %), {} misses; {} read, {} a token in {:.1} reads; {} reads repeated",
                self.hits,
                100.0 * self.hit_rate,
                self.misses,
                bytes_text(self.bytes_read),
                bytes_text(self.bytes_per_token as u64),
                self.reads_per_token,
                self.retries
            ),
        )];
        if self.misses > 0 && self.hit_rate_by_layer.len() > 1 {
            let layers: Vec<_> = self.hit_rate_by_layer.iter().map(|rate| format!("{:.0}", 100.0 * rate)).collect();
            rows.push(("by layer", format!("{} % hits", layers.join(" "))));
        }
        if self.prefetched > 0 {
            let accuracy = self
                .prediction_accuracy
                .map_or(String::new(), |share| format!("; {:.1} % of the experts were predicted", 100.0 * share));
            rows.push((
                "read ahead",
                format!("{} pieces, {} of them for nothing{accuracy}", self.prefetched, self.prefetch_wasted),
            ));
        }
        if let Some(used) = self.neurons_used {
            rows.push(("neurons", format!("{:.1} % of the dense layers' used", 100.0 * used)));
        }
        if let (Some(neurons), Some(units)) = (self.relu_live_neurons, self.relu_live_units) {
            let (neurons, units) = (100.0 * neurons, 100.0 * units);
            rows.push((
                "ReLU",
                format!("{neurons:.1} % of the neurons computed were above zero, in {units:.1} % of the units"),
            ));
        }
        if self.precision_shares.len() > 1 {
            let name = |levels: usize| match levels {
                0 => "left out".to_owned(),
                n => format!("{n} levels"),
            };
            let shares = self.precision_shares.iter().enumerate().filter(|(_, share)| **share > 0.0);
            let mut text: Vec<_> =
                shares.map(|(levels, share)| format!("{:.1} % {}", 100.0 * share, name(levels))).collect();
            if self.skipped_weight > 0.0 {
                text.push(format!("{:.2} % of the routing weight left out", 100.0 * self.skipped_weight));
            }
            rows.push(("experts", text.join(", ")));
        }
        if self.rerouted > 0 {
            rows.push(("rerouted", format!("{} choices went to experts in the pool", self.rerouted)));
        }
        if self.replaced > 0 {
            rows.push(("replaced", format!("{} experts could not be read", self.replaced)));
        }
        rows
    }
}
