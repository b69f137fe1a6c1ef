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

/// Clusters of `neurons` neurons.
pub(crate) fn clusters(neurons: usize, width: u32) -> usize {
    neurons.div_ceil(width as usize)
}
