//! Neuron clusters: which of a dense layer's units a token uses, and a look at what they compute.
//!
//! PowerInfer-2 (2406.06282, section 4) reads only the neurons that a predictor expects to be active. Here a unit is a
//! cluster of neurons, and the predictor is one product with the feed-forward's input: a cluster is kept where its score
//! is above its layer's threshold. The threshold comes from a table that was calibrated to the share of all clusters that
//! are kept, so that layers which can spare more give up more. With a share of 1 nothing is predicted, and
//! every cluster is used: the exact result. The result for another share depends on image and tokens alone.

use forebay_kernels::exec::Exec;

use super::compute::{add_bias, project};
use super::{Engine, EngineError, Phase, UnitNeed};
use crate::model::record::Role;

/// Whether a cluster with this score is kept. A score that is no number keeps it: a damaged predictor leaves nothing
/// out.
pub(super) fn keeps(score: f32, threshold: f32) -> bool {
    score > threshold || score.is_nan() || threshold.is_nan()
}

/// The threshold that keeps a share from 0 to 1 of the clusters, between the two nearest in `table`, whose entry `i` of
/// `0..=n` keeps `i / n`.
fn threshold(table: &[f32], share: f32) -> f32 {
    let steps = table.len().saturating_sub(1);
    let at = share.clamp(0.0, 1.0) * steps as f32;
    let below = (at as usize).min(steps.saturating_sub(1));
    match table.get(below..below + 2) {
        Some(&[low, high]) => low + (high - low) * (at - below as f32),
        // No table keeps everything.
        _ => f32::NAN,
    }
}

impl Engine<'_> {
    /// Scores the layer's clusters for every token and lists those that any token keeps.
    pub(super) fn choose_clusters(&mut self, exec: &Exec<'_>, index: usize) -> Result<(), EngineError> {
        let (units, levels) = (self.layer(index)?.shape.units, self.layer(index)?.levels);
        let tensors = self.layer_tensors(index)?;
        let (gate, bias) = (tensors.matrix(Role::ClusterGate)?, tensors.vector(Role::ClusterBias)?);
        self.threshold = threshold(tensors.vector(Role::ClusterThresholds)?, self.plan.limits.policy.neurons_kept);
        let (n, b) = (self.count, &mut self.buffers);
        let scores = &mut b.scores[..n * units];
        project(exec, &b.normed[..n * self.model.hidden()], n, b.acts, &mut [(gate, &mut *scores)]);
        add_bias(exec, scores, Some(bias));
        self.need_count = 0;
        for unit in 0..units {
            let users = scores.iter().skip(unit).step_by(units).filter(|s| keeps(**s, self.threshold)).count();
            self.stats.cluster_uses += users as u64;
            if users > 0 {
                b.needs[self.need_count] = UnitNeed { unit: unit as u16, levels, done: false };
                self.need_count += 1;
            }
        }
        self.stats.cluster_all += (n * units) as u64;
        Ok(())
    }

    /// The units that the last step computed: layer, unit, and what its down projection was applied to,
    /// `[tokens that use the unit][unit width]`.
    pub fn activations(&self) -> impl Iterator<Item = (usize, usize, &[f32])> {
        let (first, count, tokens) = self.computed;
        let (layer, len) = match self.phase {
            Phase::Units(layer) => (layer, tokens * self.layer(layer).map_or(0, |layer| layer.shape.unit_width)),
            _ => (0, 0),
        };
        let units = self.buffers.needs.iter().skip(first).take(count).map(|need| usize::from(need.unit));
        units
            .zip(self.buffers.gate.chunks_exact(len.max(1)))
            .filter(move |_| len > 0)
            .map(move |(unit, x)| (layer, unit, x))
    }

    /// The present layer's feed-forward input and the residual stream that it was normed from, both `[tokens][hidden]`;
    /// empty unless the layer has been routed and is not finished.
    pub fn feed_forward(&self) -> (&[f32], &[f32]) {
        match self.phase {
            Phase::Units(_) => {
                let len = self.count * self.model.hidden();
                (&self.buffers.normed[..len], &self.buffers.residual[..len])
            }
            _ => (&[], &[]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_between_two_entries_are_interpolated() {
        let table = [8.0, 4.0, 2.0];
        for (share, want) in [(0.0, 8.0), (0.25, 6.0), (0.5, 4.0), (0.75, 3.0), (1.0, 2.0)] {
            assert_eq!(threshold(&table, share), want);
        }
        assert!(threshold(&[], 0.5).is_nan() && threshold(&[1.0], 0.5).is_nan());
    }

    #[test]
    fn damaged_predictors_leave_nothing_out() {
        assert!(keeps(1.0, 0.5) && !keeps(0.5, 0.5));
        assert!(keeps(f32::NAN, 0.5) && keeps(0.0, f32::NAN));
    }
}
