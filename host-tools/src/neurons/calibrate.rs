//! Calibration: what a run of the engine over a text says about the neurons of dense layers.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use forebay_runtime::drive::Observer;
use half::f16;
use serde::Serialize;

use super::predict::{Predictor, Rows, fit};
use super::{Activity, LayerNeurons, NeuronPlan, cluster, clusters};

/// Steps of the tables of thresholds.
const STEPS: usize = 64;
/// First tokens of a sequence that do not count where layers are weighed: their residual streams are out of all
/// proportion.
const WARM_UP: usize = 4;
/// Shares at which selections are compared.
pub const SHARES: [f64; 3] = [0.3, 0.5, 0.7];

/// What predicts a cluster's importance.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scoring {
    /// A linear map of the feed-forward's input.
    Linear,
    /// The cluster's mean over the calibration text, whatever the token: always the same clusters are left out.
    Mean,
    /// Chance, to compare with.
    Random,
}

/// How to calibrate.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Neurons of a cluster.
    pub width: u32,
    /// Neurons that stay together, those whose weights share a scale in the source; 1 is none. Divides the width.
    pub step: u32,
    /// What predicts a cluster's importance.
    pub scoring: Scoring,
}

/// Share of the energy of a layer's clusters that a selection keeps, at each of [`SHARES`]; on tokens that the
/// predictor was not fitted to.
#[derive(Clone, Debug, Serialize)]
pub struct LayerReport {
    /// The layer.
    pub layer: u16,
    /// Neurons.
    pub neurons: usize,
    /// Clusters.
    pub clusters: usize,
    /// The clusters with most energy, token by token: the bound for this clustering.
    pub oracle: [f64; 3],
    /// Those of the highest scores, token by token.
    pub predictor: [f64; 3],
    /// The clusters with most energy on average.
    pub mean: [f64; 3],
    /// Neurons with most energy, token by token: the bound for clusters of one neuron.
    pub neuron_oracle: [f64; 3],
    /// Shares of the clusters, and of the neurons, that add anything at all to a token: what ReLU leaves, on average.
    pub live_clusters: f64,
    /// See `live_clusters`.
    pub live_neurons: f64,
}

/// A layer being calibrated.
struct Layer {
    neurons: usize,
    activity: Activity,
    order: Vec<u32>,
    rows: Rows,
    /// Squared length of the residual stream before the feed-forward, one a token.
    residual: Vec<f32>,
    /// Sum over tokens of the share of energy that the best neurons hold, at each of [`SHARES`].
    best_neurons: [f64; 3],
    /// Neurons that were not zero, summed over tokens.
    live: u64,
}

/// Watches two runs over the same tokens: the first says which neurons are active together, the second what each
/// cluster of them adds, for which input.
pub struct Calibration {
    settings: Settings,
    hidden: usize,
    layers: BTreeMap<u16, Layer>,
    second: bool,
    /// The dense layer whose units are being computed, its tokens and their activations, `[tokens][neurons]`.
    present: Option<(u16, usize)>,
    activations: Vec<f32>,
    /// Position of each token of the second run in its sequence.
    positions: Vec<usize>,
    sequence: Vec<usize>,
}

impl Calibration {
    /// For dense layers whose columns of the down projection have these lengths.
    #[must_use]
    pub fn new(settings: Settings, hidden: usize, lengths: BTreeMap<u16, Vec<f32>>) -> Self {
        let layer = |(l, lengths): (u16, Vec<f32>)| {
            let layer = Layer {
                neurons: lengths.len(),
                activity: Activity::new(lengths, settings.step as usize),
                order: Vec::new(),
                rows: Rows::default(),
                residual: Vec::new(),
                best_neurons: [0.0; 3],
                live: 0,
            };
            (l, layer)
        };
        Self {
            settings,
            hidden,
            layers: lengths.into_iter().map(layer).collect(),
            second: false,
            present: None,
            activations: Vec::new(),
            positions: Vec::new(),
            sequence: Vec::new(),
        }
    }

    /// A sequence of so many tokens is about to be run.
    pub fn begin_sequence(&mut self, tokens: usize) {
        self.sequence = (0..tokens).collect();
    }

    /// The first run is over: clusters are made.
    pub fn begin_second(&mut self) {
        self.flush();
        let width = self.settings.width as usize;
        in_parallel(self.layers.values_mut(), |layer| layer.order = cluster(&layer.activity, width));
        self.second = true;
    }

    /// Takes in the activations of the layer that was computed last.
    fn flush(&mut self) {
        let Some((l, tokens)) = self.present.take() else { return };
        let Some(layer) = self.layers.get_mut(&l) else { return };
        let rows = self.activations.chunks_exact(layer.neurons).take(tokens);
        if !self.second {
            rows.for_each(|row| layer.activity.add(row));
            return;
        }
        let width = self.settings.width as usize;
        for row in rows {
            let mut energy: Vec<f32> = layer.activity.energies(row).collect();
            let part = |part: &[u32]| part.iter().map(|n| energy[*n as usize]).sum::<f32>().sqrt();
            layer.rows.targets.extend(layer.order.chunks(width).map(part));
            let total: f64 = energy.iter().map(|e| f64::from(*e)).sum();
            layer.live += energy.iter().filter(|e| **e > 0.0).count() as u64;
            energy.sort_unstable_by(|a, b| b.total_cmp(a));
            for (sum, share) in layer.best_neurons.iter_mut().zip(SHARES) {
                let kept = (share * energy.len() as f64).round() as usize;
                let best: f64 = energy[..kept].iter().map(|e| f64::from(*e)).sum();
                *sum += if total > 0.0 { best / total } else { 1.0 };
            }
        }
    }

    /// The second run is over: fits the predictors, finds the thresholds.
    ///
    /// # Errors
    /// There are too few tokens, or activations were not finite.
    pub fn finish(mut self) -> Result<(NeuronPlan, Vec<LayerReport>)> {
        self.flush();
        let tokens = self.positions.len();
        ensure!(tokens >= 2, "{tokens} tokens are too few to calibrate");
        let (hidden, settings, positions) = (self.hidden, self.settings, &self.positions);
        let fitted = Mutex::new(BTreeMap::new());
        in_parallel(self.layers.iter_mut(), |(l, layer)| {
            let result = layer.fit(*l, &settings, hidden, positions);
            fitted.lock().expect("no thread has panicked").insert(*l, result);
        });
        let fitted = fitted.into_inner().expect("no thread has panicked");
        let (mut reports, mut scored) = (Vec::new(), BTreeMap::new());
        for (l, result) in fitted {
            let (report, predictor, losses) = result.with_context(|| format!("layer {l}"))?;
            reports.push(report);
            scored.insert(l, (predictor, losses));
        }
        let mut kept = vec![Vec::new(); STEPS + 1];
        let losses: Vec<&[f64]> = scored.values().map(|(_, losses)| losses.as_slice()).collect();
        for (step, kept) in kept.iter_mut().enumerate() {
            *kept = allocate(&losses, step as f64 / STEPS as f64);
        }
        let mut layers = BTreeMap::new();
        for (index, (l, (predictor, _))) in scored.into_iter().enumerate() {
            let layer = self.layers.remove(&l).context("a layer is missing")?;
            let scores: Vec<f32> =
                layer.rows.inputs.chunks_exact(hidden).flat_map(|x| predictor.scores(x).collect::<Vec<_>>()).collect();
            let mut sorted = scores.clone();
            sorted.sort_unstable_by(|a, b| b.total_cmp(a));
            let thresholds: Vec<f32> = kept.iter().map(|kept| quantile(&sorted, kept[index])).collect();
            let uses = uses(&scores, predictor.bias.len(), &thresholds);
            let Predictor { gate, bias } = predictor;
            let neurons = LayerNeurons { order: layer.order, gate, bias, thresholds, uses };
            layers.insert(l, hottest_first(neurons, settings.width as usize, hidden));
        }
        Ok((NeuronPlan { width: settings.width, hidden: hidden as u32, layers }, reports))
    }
}

impl Observer for Calibration {
    fn feed_forward(&mut self, layer: usize, input: &[f32], residual: &[f32]) {
        self.flush();
        let (l, tokens) = (layer as u16, input.len() / self.hidden);
        let first = self.layers.first_key_value().is_some_and(|(first, _)| *first == l);
        if first && self.second {
            self.positions.extend(self.sequence.drain(..tokens.min(self.sequence.len())));
        }
        let Some(layer) = self.layers.get_mut(&l) else { return };
        self.present = Some((l, tokens));
        self.activations.clear();
        self.activations.resize(tokens * layer.neurons, 0.0);
        if self.second {
            layer.rows.inputs.extend(input.iter().map(|x| f16::from_f32(*x)));
            layer.residual.extend(residual.chunks_exact(self.hidden).map(|row| row.iter().map(|x| x * x).sum::<f32>()));
        }
    }

    fn unit(&mut self, _layer: usize, unit: usize, activations: &[f32]) {
        let Some((l, tokens)) = self.present else { return };
        let Some(layer) = self.layers.get(&l) else { return };
        let width = activations.len() / tokens.max(1);
        let first = unit * width;
        // The last unit may have neurons that do not exist.
        let real = width.min(layer.neurons.saturating_sub(first));
        let rows = self.activations.chunks_exact_mut(layer.neurons).zip(activations.chunks_exact(width.max(1)));
        rows.for_each(|(row, values)| row[first..first + real].copy_from_slice(&values[..real]));
    }
}

impl Layer {
    /// The report on a predictor fitted to three quarters of the tokens; the predictor fitted to all of them; and the
    /// mean energy that is lost, in shares of the residual stream's, if only the 0, 1, … best scored clusters are kept.
    fn fit(
        &self,
        layer: u16,
        settings: &Settings,
        hidden: usize,
        positions: &[usize],
    ) -> Result<(LayerReport, Predictor, Vec<f64>)> {
        let (tokens, count) = (positions.len(), clusters(self.neurons, settings.width));
        let make = |tokens: usize| match settings.scoring {
            Scoring::Linear => fit(&self.rows, tokens, hidden),
            Scoring::Mean => Ok(Predictor::mean(&self.rows, tokens, hidden)),
            Scoring::Random => Ok(chance(count, hidden, layer)),
        };
        let seen = (tokens * 3 / 4).max(1);
        let part = make(seen)?;
        let mean = Predictor::mean(&self.rows, seen, hidden);
        let mut report = LayerReport {
            layer,
            neurons: self.neurons,
            clusters: count,
            oracle: [0.0; 3],
            predictor: [0.0; 3],
            mean: [0.0; 3],
            neuron_oracle: self.best_neurons.map(|sum| sum / tokens as f64),
            live_clusters: self.rows.targets.iter().filter(|t| **t > 0.0).count() as f64 / (tokens * count) as f64,
            live_neurons: self.live as f64 / (tokens * self.neurons) as f64,
        };
        let rows = || self.rows.inputs.chunks_exact(hidden).zip(self.rows.targets.chunks_exact(count));
        let unseen = (tokens - seen) as f64;
        for (x, lengths) in rows().skip(seen) {
            let add = |sums: &mut [f64; 3], scores: &[f32]| {
                let energies = by_score(scores, lengths);
                let total: f64 = energies.iter().sum();
                for (sum, share) in sums.iter_mut().zip(SHARES) {
                    let kept: f64 = energies[..(share * count as f64).round() as usize].iter().sum();
                    let share = if total > 0.0 { kept / total } else { 1.0 };
                    *sum += share / unseen;
                }
            };
            add(&mut report.oracle, lengths);
            add(&mut report.predictor, &part.scores(x).collect::<Vec<_>>());
            add(&mut report.mean, &mean.bias);
        }
        let whole = make(tokens)?;
        let mut losses = vec![0.0; count + 1];
        let mut weighed = 0.0;
        for (((x, lengths), residual), _) in
            rows().zip(&self.residual).zip(positions).filter(|(_, position)| **position >= WARM_UP)
        {
            let energies = by_score(&whole.scores(x).collect::<Vec<_>>(), lengths);
            let mut lost = 0.0;
            for (loss, energy) in losses[..count].iter_mut().zip(&energies).rev() {
                lost += energy / f64::from(*residual).max(f64::MIN_POSITIVE);
                *loss += lost;
            }
            weighed += 1.0;
        }
        losses.iter_mut().for_each(|loss| *loss /= f64::max(weighed, 1.0));
        Ok((report, whole, losses))
    }
}

/// The clusters' energies, the best scored first.
fn by_score(scores: &[f32], lengths: &[f32]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    order.into_iter().map(|c| f64::from(lengths[c]).powi(2)).collect()
}

/// A predictor that knows nothing, though other tokens get other scores.
fn chance(clusters: usize, hidden: usize, layer: u16) -> Predictor {
    let mut state = u64::from(layer) + 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        f16::from_f32((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0).to_f32()
    };
    Predictor { gate: (0..clusters * hidden).map(|_| next()).collect(), bias: vec![0.0; clusters] }
}

/// How many clusters each layer keeps, as a share of its own, so that all together keep `share`: clusters are kept in
/// order of what they save, a layer's best scored first. `losses` as [`Layer::fit`] gives them.
fn allocate(losses: &[&[f64]], share: f64) -> Vec<f64> {
    let mut savings = Vec::new();
    for (layer, losses) in losses.iter().enumerate() {
        // A layer's savings are made to fall, as those of a good order do.
        let mut least = f64::INFINITY;
        for (rank, pair) in losses.windows(2).enumerate() {
            least = least.min(pair[0] - pair[1]);
            savings.push((least, rank, layer));
        }
    }
    savings.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let mut kept = vec![0usize; losses.len()];
    for (_, _, layer) in &savings[..(share * savings.len() as f64).round() as usize] {
        kept[*layer] += 1;
    }
    kept.iter().zip(losses).map(|(kept, losses)| *kept as f64 / (losses.len() - 1) as f64).collect()
}

/// The threshold above which a share of `scores` lies, which fall.
fn quantile(scores: &[f32], share: f64) -> f32 {
    let (first, last) = (scores[0], scores[scores.len() - 1]);
    let at = (share * scores.len() as f64).round() as usize;
    match scores.get(at) {
        Some(score) => *score,
        // All of them, and what is a little below.
        None => last - (first - last).abs() * 0.01,
    }
}

/// Share of the tokens of `scores`, `[tokens][clusters]`, that use each cluster, the mean over the thresholds.
fn uses(scores: &[f32], clusters: usize, thresholds: &[f32]) -> Vec<f32> {
    let mut counts = vec![0u64; clusters];
    for row in scores.chunks_exact(clusters.max(1)) {
        for (count, score) in counts.iter_mut().zip(row) {
            *count += thresholds.iter().filter(|threshold| score > threshold).count() as u64;
        }
    }
    let all = (scores.len() / clusters.max(1) * thresholds.len()).max(1) as f64;
    counts.into_iter().map(|count| (count as f64 / all) as f32).collect()
}

/// The same clusters in the order of how often they are used; one that is not full stays the last.
fn hottest_first(neurons: LayerNeurons, width: usize, hidden: usize) -> LayerNeurons {
    let LayerNeurons { order, gate, bias, thresholds, uses } = neurons;
    let mut ranks: Vec<usize> = (0..order.len() / width).collect();
    ranks.sort_by(|a, b| uses[*b].total_cmp(&uses[*a]).then(a.cmp(b)));
    ranks.extend(order.len() / width..uses.len());
    let rows = |all: &[f32], len: usize| ranks.iter().flat_map(|c| all[c * len..][..len].to_vec()).collect::<Vec<_>>();
    let neurons = |c: &usize| order[c * width..((c + 1) * width).min(order.len())].to_vec();
    LayerNeurons {
        order: ranks.iter().flat_map(neurons).collect(),
        gate: rows(&gate, hidden),
        bias: rows(&bias, 1),
        uses: rows(&uses, 1),
        thresholds,
    }
}

/// Does `work` on every item, on all processors.
fn in_parallel<T: Send>(items: impl Iterator<Item = T>, work: impl Fn(T) + Sync) {
    let items: Vec<Mutex<Option<T>>> = items.map(|item| Mutex::new(Some(item))).collect();
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(items.len());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Some(item) = item.lock().expect("no thread has panicked").take() {
                        work(item);
                    }
                }
            });
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_go_where_they_save_most() {
        let flat: &[f64] = &[4.0, 3.0, 2.0, 1.0, 0.0];
        let steep: &[f64] = &[40.0, 20.0, 10.0, 5.0, 0.0];
        assert_eq!(allocate(&[flat, steep], 0.0), [0.0, 0.0]);
        assert_eq!(allocate(&[flat, steep], 0.5), [0.0, 1.0]);
        assert_eq!(allocate(&[flat, steep], 0.75), [0.5, 1.0]);
        assert_eq!(allocate(&[flat, steep], 1.0), [1.0, 1.0]);
    }

    #[test]
    fn clusters_are_used_as_often_as_they_score() {
        // Two tokens, three clusters; nothing is above the first threshold, everything above the last.
        let scores = [1.0, 3.0, 2.0, 0.0, 3.0, 4.0];
        assert_eq!(uses(&scores, 3, &[9.0, 2.5, 0.5, -1.0]), [3.0 / 8.0, 6.0 / 8.0, 5.0 / 8.0]);
        let neurons = LayerNeurons {
            order: (0..7).collect(),
            gate: vec![0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5],
            bias: vec![0.0, 1.0, 2.0, 3.0],
            thresholds: vec![1.0, 0.0],
            uses: vec![0.25, 0.75, 0.5, 1.0],
        };
        let sorted = hottest_first(neurons, 2, 2);
        assert_eq!(sorted.order, [2, 3, 4, 5, 0, 1, 6]);
        assert_eq!(sorted.gate, [1.0, 1.5, 2.0, 2.5, 0.0, 0.5, 3.0, 3.5]);
        assert_eq!((sorted.bias, sorted.uses), (vec![1.0, 2.0, 0.0, 3.0], vec![0.75, 0.5, 0.25, 1.0]));
    }

    #[test]
    fn thresholds_keep_their_share() {
        let scores: Vec<f32> = (0..100).rev().map(|i| i as f32).collect();
        for share in [0.0, 0.1, 0.5, 0.99, 1.0] {
            let threshold = quantile(&scores, share);
            let kept = scores.iter().filter(|s| **s > threshold).count();
            assert_eq!(kept, (share * 100.0).round() as usize);
        }
    }
}
