//! What the engine counts.

use crate::policy::PRECISIONS;

/// What was read and used since the engine was made.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Stats {
    /// Units that were in the pool, or on their way to it, with every level wanted when their layer came to need them.
    pub hits: u64,
    /// Units of which something had to be read when their layer came to need them.
    pub misses: u64,
    /// Reads of pieces before they were needed.
    pub prefetched: u64,
    /// Of those, the pieces that gave way unused.
    pub wasted: u64,
    /// Reads of pieces that were good.
    pub unit_reads: u64,
    /// Bytes of units read.
    pub unit_bytes: u64,
    /// Bytes of resident tensors read.
    pub resident_bytes: u64,
    /// Reads that failed or had a wrong checksum, and were tried again.
    pub retries: u64,
    /// Experts whose read failed for good and that were used with what was resident, or left out
    /// ([`crate::policy::Loading::Miss`] only).
    pub replaced: u64,
    /// Tokens computed.
    pub tokens: u64,
    /// Experts used, by the levels they were used with; the first are those left out.
    pub precisions: [u64; PRECISIONS],
    /// Share of the routing weight that was left out, summed over tokens and layers with experts.
    pub skipped: f64,
    /// Tokens times layers with experts.
    pub routings: u64,
    /// Experts that were predicted for the next layer, and were chosen by it.
    pub foreseen: u64,
    /// Experts chosen by layers for which there was a prediction.
    pub foreseeable: u64,
    /// Uses of neuron clusters by tokens, in layers with predictors.
    pub cluster_uses: u64,
    /// Uses that there would have been if none had been left out.
    pub cluster_all: u64,
    /// Neurons of ReLU layers that were computed, a token each, those that fill up a layer's last cluster included.
    pub relu_neurons: u64,
    /// Of those, the ones that were not zero.
    pub relu_live: u64,
    /// Units of ReLU layers that were computed, a token each.
    pub relu_units: u64,
    /// Of those, the ones with a neuron that was not zero.
    pub relu_live_units: u64,
    /// Experts that cache-aware routing chose instead of the router's own choice.
    pub rerouted: u64,
}

impl Stats {
    /// Counts what a unit of a ReLU layer computed, `[tokens][width]`.
    pub(super) fn count_live(&mut self, activations: &[f32], width: usize) {
        for token in activations.chunks_exact(width.max(1)) {
            // NaN is not zero.
            let live = token.iter().filter(|x| **x != 0.0).count() as u64;
            self.relu_neurons += width as u64;
            self.relu_live += live;
            self.relu_units += 1;
            self.relu_live_units += u64::from(live > 0);
        }
    }
}

/// Uses of one layer's units.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct LayerStats {
    /// As [`Stats::hits`].
    pub hits: u64,
    /// As [`Stats::misses`].
    pub misses: u64,
    /// Bytes of units read.
    pub bytes: u64,
}
