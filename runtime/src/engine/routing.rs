//! The router: which experts a token uses, with what weight, and what that needs of the pool.

use forebay_kernels::exec::Exec;
use forebay_kernels::ops::{self, sigmoid};

use super::compute::{MISSING, project};
use super::{Engine, EngineError, Phase, Predicted, UnitNeed};
use crate::model::record::{Role, Router};
use crate::model::{LayerShape, MAX_TOP_K};
use crate::policy::{Allowance, Choice, Held, Policy, Source, plan_token};

/// Turns the router's `scores`, one per expert, into probabilities.
fn probabilities(exec: &Exec<'_>, router: Router, scores: &mut [f32]) {
    match router {
        Router::All => (),
        Router::Sigmoid => scores.iter_mut().for_each(|s| *s = sigmoid(*s)),
        Router::Softmax => ops::softmax(exec, scores),
    }
}

/// The `choices.len()` experts with the greatest `key`, in descending order, equal ones in order of their index.
fn select(experts: usize, key: impl Fn(usize) -> f32, choices: &mut [Choice]) {
    let mut keys = [f32::NEG_INFINITY; MAX_TOP_K];
    let mut filled = 0;
    for unit in 0..experts {
        let key = key(unit);
        // Insertion from the back; a later unit moves up only past smaller keys. NaN never moves up, and a slot
        // is always filled, so damaged weights choose something and show in the logits.
        let mut at = filled;
        while at > 0 && key > keys[at - 1] {
            at -= 1;
        }
        if at >= choices.len() {
            continue;
        }
        filled = (filled + 1).min(choices.len());
        keys.copy_within(at..filled - 1, at + 1);
        choices.copy_within(at..filled - 1, at + 1);
        keys[at] = key;
        choices[at] = Choice { unit: unit as u16, ..Choice::default() };
    }
}

/// Gives the choices their weights.
fn weigh(shape: &LayerShape, probabilities: &[f32], choices: &mut [Choice]) {
    choices.iter_mut().for_each(|c| c.weight = probabilities[usize::from(c.unit)]);
    let divisor = match shape.normalise {
        true => choices.iter().fold(0.0, |sum, c| sum + c.weight) + shape.router_norm_eps,
        false => 1.0,
    };
    for choice in choices {
        choice.weight = choice.weight / divisor * shape.router_scale;
    }
}

/// Chooses `choices.len()` experts from the router's `scores`, one per expert, which are overwritten with
/// probabilities. Choices come in descending order of selection score, equal scores in order of their index.
///
/// LFM2-MoE (`Lfm2MoeSparseMoeBlock`): `p = sigmoid(score)`; the bias acts on the selection only; the weights
/// are `p`, divided by `sum + eps` if the layer normalises, times the layer's factor. Mixtral, OLMoE and Qwen3-MoE
/// (`MixtralSparseMoeBlock`, `OlmoeSparseMoeBlock`, `Qwen3MoeSparseMoeBlock`): the same with `p = softmax(scores)`
/// over all experts.
fn choose(exec: &Exec<'_>, shape: &LayerShape, scores: &mut [f32], bias: Option<&[f32]>, choices: &mut [Choice]) {
    probabilities(exec, shape.router, scores);
    select(scores.len(), |unit| scores[unit] + bias.map_or(0.0, |b| b[unit]), choices);
    weigh(shape, scores, choices);
}

/// Cache-aware routing (2412.00099): after [`choose`], experts that are `held` gain `lift`, and all but the first
/// `keep` choices are made again. Weights come from the probabilities as they were. Returns how many choices changed.
fn prefer_held(
    shape: &LayerShape,
    probabilities: &[f32],
    bias: Option<&[f32]>,
    lift: f32,
    keep: usize,
    held: impl Fn(u16) -> bool,
    choices: &mut [Choice],
) -> u64 {
    let mut before = [Choice::default(); MAX_TOP_K];
    let before = &mut before[..choices.len()];
    before.copy_from_slice(choices);
    let kept = &before[..keep.min(choices.len())];
    let key = |unit: usize| {
        let key = probabilities[unit] + bias.map_or(0.0, |b| b[unit]);
        match kept.iter().any(|c| usize::from(c.unit) == unit) {
            // Above everything, in the order they had.
            true => f32::MAX,
            false => key + if held(unit as u16) { lift } else { 0.0 },
        }
    };
    select(probabilities.len(), key, choices);
    // Kept choices share one key and came out by index.
    choices[..kept.len()].copy_from_slice(kept);
    weigh(shape, probabilities, choices);
    choices.iter().filter(|c| before.iter().all(|b| b.unit != c.unit)).count() as u64
}

/// Greatest less least selection score.
fn range(probabilities: &[f32], bias: Option<&[f32]>) -> f32 {
    let keys = || probabilities.iter().enumerate().map(|(unit, p)| p + bias.map_or(0.0, |b| b[unit]));
    keys().fold(f32::NEG_INFINITY, f32::max) - keys().fold(f32::INFINITY, f32::min)
}

impl Engine<'_> {
    /// The gate of `layer` applied to the present feed-forward input: `[tokens][units]` into the scores' buffer.
    fn gate_scores(&mut self, exec: &Exec<'_>, layer: usize) -> Result<(), EngineError> {
        let gate = self.layer_tensors(layer)?.matrix(Role::RouterGate)?;
        let (n, hidden) = (self.count, self.model.hidden());
        let units = self.layer(layer)?.shape.units;
        let b = &mut self.buffers;
        project(exec, &b.normed[..n * hidden], n, b.acts, &mut [(gate, &mut b.scores[..n * units])]);
        Ok(())
    }

    /// Chooses each token's units and lists what the layer needs, in the order in which it lies in the image.
    pub(super) fn route(&mut self, exec: &Exec<'_>, index: usize) -> Result<(), EngineError> {
        let (shape, levels) = {
            let layer = self.layer(index)?;
            (layer.shape, layer.levels)
        };
        self.need_count = 0;
        if shape.router == Router::All {
            let n = self.count * self.model.hidden();
            self.buffers.output[..n].fill(0.0);
            if self.layer(index)?.sparse {
                self.choose_clusters(exec, index)?;
            } else {
                for unit in 0..shape.units {
                    self.buffers.needs[unit] = UnitNeed { unit: unit as u16, levels, done: false };
                }
                self.need_count = shape.units;
            }
        } else {
            self.gate_scores(exec, index)?;
            self.choose_experts(exec, index)?;
            self.list_needs(index)?;
        }
        self.count_uses(index)?;
        if shape.router != Router::All {
            self.predict(exec, index)?;
        }
        Ok(())
    }

    /// From scores to planned choices.
    fn choose_experts(&mut self, exec: &Exec<'_>, index: usize) -> Result<(), EngineError> {
        let policy: Policy = self.plan.limits.policy;
        let bias = self.layer_tensors(index)?.optional(Role::RouterBias);
        let mut allowance = self.layer_allowance(index)?;
        let layer = self.layers[index].as_mut().ok_or(MISSING)?;
        let (shape, full, base) = (layer.shape, layer.levels, layer.unit_base);
        let directory = &self.pool.directory;
        let by_piece = directory.pieces() == 1;
        let mapped = self.mapped.is_some();
        let held = |unit: u16| {
            if mapped {
                return Held { ready: full, coming: full };
            }
            let (ready, coming) = directory.held(base + u32::from(unit));
            match by_piece {
                true => Held { ready: ready * full, coming: coming * full },
                false => Held { ready, coming },
            }
        };
        let b = &mut self.buffers;
        let scores = b.scores[..self.count * shape.units].chunks_exact_mut(shape.units);
        for (scores, choices) in scores.zip(b.choices.chunks_exact_mut(shape.top_k)) {
            choose(exec, &shape, scores, bias, choices);
            if policy.cache_bias > 0.0 {
                let (mean, seen) = &mut layer.range;
                *seen = seen.saturating_add(1);
                *mean += (range(scores, bias) - *mean) / *seen as f32;
                let (lift, keep) = (policy.cache_bias * *mean, usize::from(policy.cache_keep));
                let resident = |unit| held(unit).coming > 0;
                self.stats.rerouted += prefer_held(&shape, scores, bias, lift, keep, resident, choices);
            }
            plan_token(choices, &policy.loading, full, held, &mut allowance);
        }
        Ok(())
    }

    /// What the present layer may read under a deadline: an equal share, with the layers still to come, of what is left.
    fn layer_allowance(&self, index: usize) -> Result<Allowance, EngineError> {
        let routed = |layer: &usize| self.layer(*layer).is_ok_and(|l| l.shape.router != Router::All);
        let left = (index..self.layers.len()).filter(routed).count().max(1) as u64;
        let unit = self.layer(index)?.shape.unit;
        let mut allowance = Allowance { bytes: self.allowance / left, ..Allowance::default() };
        for (level, bytes) in allowance.level_bytes.iter_mut().enumerate().take(unit.levels()) {
            *bytes = unit.level_len(level, self.model.page());
        }
        Ok(allowance)
    }

    /// What the planned choices need, each unit once, with the most levels that any token wants of it.
    fn list_needs(&mut self, index: usize) -> Result<(), EngineError> {
        let shape = self.layer(index)?.shape;
        let b = &mut self.buffers;
        let choices = &b.choices[..self.count * shape.top_k];
        for unit in 0..shape.units as u16 {
            let levels = choices.iter().filter(|c| c.unit == unit).map(|c| c.levels).max().unwrap_or(0);
            if levels > 0 {
                b.needs[self.need_count] = UnitNeed { unit, levels, done: false };
                self.need_count += 1;
            }
        }
        Ok(())
    }

    fn count_uses(&mut self, index: usize) -> Result<(), EngineError> {
        let layer = self.layer(index)?;
        let (shape, base) = (layer.shape, layer.unit_base);
        let (mut hits, mut misses, mut bytes) = (0, 0, 0);
        for need in &self.buffers.needs[..self.need_count] {
            let coming = self.levels_held(index, base + u32::from(need.unit)).1;
            if coming >= need.levels {
                hits += 1;
            } else {
                misses += 1;
                let levels = usize::from(coming)..usize::from(need.levels);
                bytes += levels.map(|level| shape.unit.level_len(level, self.model.page())).sum::<u64>();
            }
        }
        self.allowance = self.allowance.saturating_sub(bytes);
        self.stats.hits += hits;
        self.stats.misses += misses;
        let layer = self.layer_mut(index)?;
        layer.stats.hits += hits;
        layer.stats.misses += misses;
        if shape.router == Router::All {
            return Ok(());
        }
        self.stats.routings += self.count as u64;
        for token in self.buffers.choices[..self.count * shape.top_k].chunks_exact(shape.top_k) {
            let total: f32 = token.iter().map(|c| c.weight).sum();
            let skipped: f32 = token.iter().filter(|c| c.source == Source::Skip).map(|c| c.weight).sum();
            if total > 0.0 {
                self.stats.skipped += f64::from(skipped / total);
            }
            for choice in token {
                self.stats.precisions[usize::from(choice.levels)] += 1;
            }
        }
        Ok(())
    }

    /// HOBBIT's layer-level prefetch (2411.01433, section 4.3): the present gate input put through the gates of the next
    /// layers, up to the first that would have to read something, or the policy's depth.
    fn predict(&mut self, exec: &Exec<'_>, index: usize) -> Result<(), EngineError> {
        let depth = usize::from(self.plan.limits.policy.prefetch);
        if depth == 0 {
            return Ok(());
        }
        let predicted = &self.buffers.predicted[..self.predicted_count];
        if predicted.iter().any(|p| usize::from(p.layer) == index) {
            let choices = &self.buffers.choices[..self.count * self.layer(index)?.shape.top_k];
            let foreseen = |c: &&Choice| predicted.iter().any(|p| usize::from(p.layer) == index && p.unit == c.unit);
            self.stats.foreseeable += choices.len() as u64;
            self.stats.foreseen += choices.iter().filter(foreseen).count() as u64;
        }
        self.predicted_count = 0;
        let last = (index + depth).min(self.layers.len().saturating_sub(1));
        for layer in index + 1..=last {
            let state = self.layer(layer)?;
            if state.shape.router == Router::All || state.group.ready().is_none() {
                continue;
            }
            if self.predict_layer(exec, layer)? {
                break;
            }
        }
        Ok(())
    }

    /// Adds what a layer will probably need to the predictions; whether any of it would have to be read.
    fn predict_layer(&mut self, exec: &Exec<'_>, layer: usize) -> Result<bool, EngineError> {
        self.gate_scores(exec, layer)?;
        let bias = self.layer_tensors(layer)?.optional(Role::RouterBias);
        let state = self.layer(layer)?;
        let (shape, full, base) = (state.shape, state.levels, state.unit_base);
        let loading = self.plan.limits.policy.loading;
        let first = self.predicted_count;
        let b = &mut self.buffers;
        for scores in b.scores[..self.count * shape.units].chunks_exact_mut(shape.units) {
            let mut choices = [Choice::default(); MAX_TOP_K];
            let choices = &mut choices[..shape.top_k];
            choose(exec, &shape, scores, bias, choices);
            let mut unlimited = Allowance { bytes: u64::MAX, ..Allowance::default() };
            plan_token(choices, &loading, full, |_| Held::default(), &mut unlimited);
            for Choice { unit, levels, .. } in choices.iter().filter(|c| c.levels > 0) {
                let known = &mut b.predicted[first..self.predicted_count];
                if let Some(known) = known.iter_mut().find(|p| p.unit == *unit) {
                    known.levels = known.levels.max(*levels);
                } else if let Some(free) = b.predicted.get_mut(self.predicted_count) {
                    *free = Predicted { layer: layer as u16, unit: *unit, levels: *levels };
                    self.predicted_count += 1;
                }
            }
        }
        if self.count > 1 {
            // A prompt's predictions are read in file order.
            b.predicted[first..self.predicted_count].sort_unstable_by_key(|p| p.unit);
        }
        let predicted = &self.buffers.predicted[first..self.predicted_count];
        Ok(predicted.iter().any(|p| self.levels_held(layer, base + u32::from(p.unit)).1 < p.levels))
    }

    /// What the present layer's feed-forward input makes the gate of `layer` choose for the batch's token `token`,
    /// into `choices`, as many as the layer's top k; how many those are. To be called once the present layer is routed
    /// ([`super::Step::Routed`]); for the present layer it repeats the router's own choice.
    ///
    /// # Errors
    /// [`EngineError::LogicBug`] if no layer has just been routed, or `layer` has no experts or is not resident yet.
    pub fn foresee(
        &mut self,
        exec: &Exec<'_>,
        layer: usize,
        token: usize,
        choices: &mut [Choice],
    ) -> Result<usize, EngineError> {
        let misuse = EngineError::LogicBug("a prediction that cannot be made now");
        let shape = self.layer(layer)?.shape;
        let choices = choices.get_mut(..shape.top_k).ok_or(misuse)?;
        // A layer that leaves clusters out still needs their scores.
        let routed = matches!(self.phase, Phase::Units(present) if !self.layer(present)?.sparse);
        if !routed || shape.router == Router::All || token >= self.count {
            return Err(misuse);
        }
        self.gate_scores(exec, layer)?;
        let bias = self.layer_tensors(layer)?.optional(Role::RouterBias);
        let scores = &mut self.buffers.scores[token * shape.units..][..shape.units];
        choose(exec, &shape, scores, bias, choices);
        Ok(shape.top_k)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::record::HOT_STEPS;
    use crate::model::unit::UnitShape;
    use forebay_kernels::exec::{Backend, Serial};
    use forebay_kernels::weights::{Encoding, MatrixShape};

    fn shape(router: Router, units: usize, top_k: usize, normalise: bool) -> LayerShape {
        let matrix = MatrixShape { rows: 1, cols: 1, encoding: Encoding::F32 };
        LayerShape {
            operator: crate::model::record::Operator::Attention,
            router,
            normalise,
            activation: ops::Activation::Silu,
            rope: false,
            heads: 1,
            kv_heads: 1,
            head_dim: 2,
            taps: 0,
            window: 0,
            attention_scale: 1.0,
            rope_mscale: 1.0,
            units,
            top_k,
            unit_width: 1,
            router_norm_eps: 0.0,
            router_scale: 1.0,
            first_extent: 0,
            hot: [0; HOT_STEPS],
            unit: UnitShape { gate: matrix, up: matrix, down: matrix },
        }
    }

    /// `softmax`, `topk` and the division as the reference implementations write them, in binary64.
    #[test]
    fn softmax_routers_choose_as_the_references() {
        let logits = [0.3f32, -1.2, 2.5, 0.0, 2.4, -0.7, 1.1, 1.1];
        let total: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
        let exec = &Exec { backend: Backend::detect(), workers: &Serial };
        let p = |unit: usize| f64::from(logits[unit]).exp() / total;
        for normalise in [false, true] {
            let mut choices = [Choice::default(); 4];
            choose(exec, &shape(Router::Softmax, 8, 4, normalise), &mut logits.clone(), None, &mut choices);
            // Of the equal scores of 6 and 7 the first is chosen first.
            assert_eq!(choices.map(|c| c.unit), [2, 4, 6, 7]);
            let sum: f64 = if normalise { [2, 4, 6, 7].map(p).iter().sum() } else { 1.0 };
            for choice in choices {
                let expected = p(choice.unit.into()) / sum;
                assert!((f64::from(choice.weight) - expected).abs() < 1e-6, "{choice:?}, expected {expected}");
            }
        }
    }
}
