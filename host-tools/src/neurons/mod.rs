//! Neuron clusters of dense feed-forwards: which neurons lie together, and which clusters a token needs.
//!
//! PowerInfer-2 (2406.06282, sections 4 and 5) profiles a model's activations offline, bundles neurons that are active
//! together, and predicts at run time which of them a token needs. `calibrate` does the first two for activations that a
//! run of the engine recorded; [`NeuronPlan`] is its result, which a conversion applies.

mod calibrate;
mod cluster;
mod file;
mod predict;

pub use calibrate::{Calibration, LayerReport, SHARES, Scoring, Settings};
pub use cluster::{Activity, cluster};
pub use predict::{Predictor, Rows, fit};

use std::collections::BTreeMap;

use forebay_runtime::model::record::HOT_STEPS;

/// How the neurons of a dense layer are put in order, and what predicts the clusters that they are cut into.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerNeurons {
    /// The neurons in their new order: `order[new] = old`, a permutation.
    pub order: Vec<u32>,
    /// Weights of the predictor, `[clusters][hidden]`.
    pub gate: Vec<f32>,
    /// Its bias, one a cluster.
    pub bias: Vec<f32>,
    /// Thresholds on its scores; entry `i` of `0..=n` is for a share of `i / n` of all clusters.
    pub thresholds: Vec<f32>,
    /// Share of the calibration's tokens that used each cluster, the mean over the thresholds: how hot it is.
    pub uses: Vec<f32>,
}

/// What a conversion needs to know about the neurons of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct NeuronPlan {
    /// Neurons of a cluster.
    pub width: u32,
    /// Width of the residual stream.
    pub hidden: u32,
    /// By layer; layers without a dense feed-forward are not there.
    pub layers: BTreeMap<u16, LayerNeurons>,
}

impl NeuronPlan {
    /// Of each layer, how many of its clusters are among the most often used 1/16, 2/16, … of all layers' clusters
    /// ([`forebay_runtime::model::record::LayerRecord::hot`]).
    #[must_use]
    pub fn hot(&self) -> BTreeMap<u16, [u16; HOT_STEPS]> {
        let each = |(l, layer): (&u16, &LayerNeurons)| {
            layer.uses.iter().enumerate().map(|(c, uses)| (*uses, c, *l)).collect::<Vec<_>>()
        };
        let mut all: Vec<(f32, usize, u16)> = self.layers.iter().flat_map(each).collect();
        all.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        let mut hot: BTreeMap<u16, [u16; HOT_STEPS]> = self.layers.keys().map(|l| (*l, [0; HOT_STEPS])).collect();
        for (rank, (.., l)) in all.iter().enumerate() {
            for (step, count) in hot.entry(*l).or_default().iter_mut().enumerate() {
                *count += u16::from(rank < (step + 1) * all.len() / HOT_STEPS);
            }
        }
        hot
    }
}

/// Clusters of `neurons` neurons.
pub(crate) fn clusters(neurons: usize, width: u32) -> usize {
    neurons.div_ceil(width as usize)
}
