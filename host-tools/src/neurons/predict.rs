//! Predictors of the energy of clusters: one linear map a layer, fitted by ridge regression.

use anyhow::{Context, Result};
use half::f16;
use nalgebra::{DMatrix, DVector};

/// Weight of the penalty, relative to the mean square of an input.
const RIDGE: f64 = 0.03;

/// What was recorded of a layer, a row each token.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    /// The feed-forward's input, `[tokens][hidden]`.
    pub inputs: Vec<f16>,
    /// Length of what each cluster adds to the layer's output, `[tokens][clusters]`: the root of the summed energy of
    /// its neurons, which leaves out that neurons of a cluster may add up or cancel.
    pub targets: Vec<f32>,
}

impl Rows {
    /// Clusters that there are targets of.
    fn clusters(&self, hidden: usize) -> usize {
        self.targets.len() / (self.inputs.len() / hidden).max(1)
    }
}

/// `score = gate x + bias`, one a cluster.
#[derive(Clone, Debug, PartialEq)]
pub struct Predictor {
    /// `[clusters][hidden]`, each exactly a binary16.
    pub gate: Vec<f32>,
    /// One a cluster.
    pub bias: Vec<f32>,
}

impl Predictor {
    /// Predicts the same for every token: the mean of each cluster's target over the first `tokens` rows.
    #[must_use]
    pub fn mean(rows: &Rows, tokens: usize, hidden: usize) -> Self {
        let clusters = rows.clusters(hidden);
        let mut bias = vec![0.0; clusters];
        for row in rows.targets.chunks_exact(clusters.max(1)).take(tokens) {
            bias.iter_mut().zip(row).for_each(|(b, y)| *b += y / tokens as f32);
        }
        Self { gate: vec![0.0; clusters * hidden], bias }
    }

    /// The scores for one token.
    pub fn scores<'a>(&'a self, input: &'a [f16]) -> impl Iterator<Item = f32> + 'a {
        let rows = self.gate.chunks_exact(input.len()).zip(&self.bias);
        rows.map(move |(row, bias)| row.iter().zip(input).map(|(w, x)| w * x.to_f32()).sum::<f32>() + bias)
    }
}

/// Fits a predictor to the first `tokens` rows.
///
/// # Errors
/// The recorded inputs are not finite.
pub fn fit(rows: &Rows, tokens: usize, hidden: usize) -> Result<Predictor> {
    let mean = Predictor::mean(rows, tokens, hidden);
    let clusters = mean.bias.len();
    // Inputs less their means, so that the bias is the mean target.
    let mut x = DMatrix::from_fn(tokens, hidden, |t, i| rows.inputs[t * hidden + i].to_f64());
    let means = DVector::from_fn(hidden, |i, _| x.column(i).mean());
    for (i, mut column) in x.column_iter_mut().enumerate() {
        column.add_scalar_mut(-means[i]);
    }
    let y = DMatrix::from_fn(tokens, clusters, |t, c| f64::from(rows.targets[t * clusters + c] - mean.bias[c]));
    let mut gram = x.tr_mul(&x);
    let penalty = RIDGE * gram.trace() / hidden as f64 + f64::MIN_POSITIVE.sqrt();
    for i in 0..hidden {
        gram[(i, i)] += penalty;
    }
    let solved = gram.cholesky().context("the recorded inputs are not finite")?.solve(&x.tr_mul(&y));
    let gate: Vec<f32> =
        solved.column_iter().flat_map(|c| c.iter().map(|w| f16::from_f64(*w).to_f32()).collect::<Vec<_>>()).collect();
    let shifts =
        gate.chunks_exact(hidden).map(|row| row.iter().zip(&means).map(|(w, m)| f64::from(*w) * m).sum::<f64>());
    let bias = mean.bias.iter().zip(shifts).map(|(b, shift)| (f64::from(*b) - shift) as f32).collect();
    Ok(Predictor { gate, bias })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_linear_map_is_found_again() {
        let (tokens, hidden, clusters) = (400, 12, 3);
        let mut state = 1u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        let gate: Vec<f32> = (0..hidden * clusters).map(|_| random()).collect();
        let inputs: Vec<f16> = (0..tokens * hidden).map(|_| f16::from_f32(random() + 0.5)).collect();
        let true_map = Predictor { gate, bias: vec![3.0, -1.0, 0.5] };
        let targets = inputs.chunks_exact(hidden).flat_map(|x| true_map.scores(x).collect::<Vec<_>>()).collect();
        let rows = Rows { inputs, targets };
        let found = fit(&rows, tokens * 3 / 4, hidden).unwrap();
        let error = |p: &Predictor| -> f32 {
            let want = rows.targets.chunks_exact(clusters);
            let rows = rows.inputs.chunks_exact(hidden).zip(want);
            rows.flat_map(|(x, y)| p.scores(x).zip(y).map(|(s, y)| (s - y).powi(2)).collect::<Vec<_>>()).sum()
        };
        assert!(error(&found) < 0.01 * error(&Predictor::mean(&rows, tokens, hidden)));
    }

    #[test]
    fn inputs_that_never_change_predict_the_mean() {
        let rows = Rows { inputs: vec![f16::ONE; 8], targets: vec![1.0, 2.0, 3.0, 4.0] };
        let found = fit(&rows, 4, 2).unwrap();
        assert!(found.scores(&[f16::ONE; 2]).all(|s| (s - 2.5).abs() < 1e-6));
    }
}
