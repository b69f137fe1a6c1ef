//! Clusters of neurons that are active together.

/// One in so many neurons counts as active for a token: those whose outputs are largest.
const ACTIVE: usize = 4;
/// Bands of like energy that clusters do not cross, so that often needed and seldom needed neurons lie apart.
const BANDS: usize = 4;
/// Rounds of assignment at most.
const ROUNDS: usize = 6;

/// What is known about the activity of a layer's neurons.
#[derive(Clone, Debug)]
pub struct Activity {
    neurons: usize,
    /// Neurons that stay together, from a multiple of their number on; 1 moves each by itself.
    step: usize,
    /// Factor on each neuron's activation: the length of its column of the down projection.
    lengths: Vec<f32>,
    /// Sum over the tokens of the squared length of what the neurons of each step add to the layer's output.
    energy: Vec<f64>,
    /// Tokens seen.
    tokens: usize,
    /// `[steps][words]` bits, bit `t` of which says whether the step was active for token `t`.
    active: Vec<Vec<u64>>,
    /// Scratch.
    sizes: Vec<f32>,
}

impl Activity {
    /// For neurons whose columns of the down projection have these lengths, and which are moved `step` at a time.
    #[must_use]
    pub fn new(lengths: Vec<f32>, step: usize) -> Self {
        let (neurons, step) = (lengths.len(), step.max(1));
        let steps = neurons.div_ceil(step);
        Self {
            neurons,
            step,
            lengths,
            energy: vec![0.0; steps],
            tokens: 0,
            active: vec![Vec::new(); steps],
            sizes: Vec::new(),
        }
    }

    /// Adds a token: the activation of every neuron.
    pub fn add(&mut self, activations: &[f32]) {
        let (word, bit) = (self.tokens / 64, self.tokens % 64);
        self.sizes.clear();
        let steps = activations.chunks(self.step).zip(self.lengths.chunks(self.step));
        let square = |(a, length): (&f32, &f32)| (a * length) * (a * length);
        self.sizes.extend(steps.map(|(a, lengths)| a.iter().zip(lengths).map(square).sum::<f32>().sqrt()));
        let mut sorted = self.sizes.clone();
        let at = sorted.len() - (sorted.len() / ACTIVE).max(1);
        let (_, least, _) = sorted.select_nth_unstable_by(at, f32::total_cmp);
        for ((size, energy), active) in self.sizes.iter().zip(&mut self.energy).zip(&mut self.active) {
            *energy += f64::from(*size).powi(2);
            active.resize(word + 1, 0);
            active[word] |= u64::from(size >= least) << bit;
        }
        self.tokens += 1;
    }

    /// Energy of each neuron for one token: the squared length of what it adds to the layer's output.
    pub fn energies<'a>(&'a self, activations: &'a [f32]) -> impl Iterator<Item = f32> + 'a {
        activations.iter().zip(&self.lengths).map(|(a, length)| (a * length).powi(2))
    }

    /// Energy of each step's neurons, summed over the tokens.
    #[must_use]
    pub fn energy(&self) -> &[f64] {
        &self.energy
    }
}

/// How alike a neuron and a cluster's profile are: the correlation of being active.
struct Profile {
    /// Share of the cluster's neurons that are active, a token each, less its mean, at length 1.
    shares: Vec<f32>,
}

impl Profile {
    fn of<'a>(members: impl Iterator<Item = &'a [u64]>, tokens: usize) -> Self {
        let mut shares = vec![0.0f32; tokens];
        for active in members {
            for (word, chunk) in active.iter().zip(shares.chunks_mut(64)) {
                let mut bits = *word;
                while bits != 0 {
                    chunk[bits.trailing_zeros() as usize] += 1.0;
                    bits &= bits - 1;
                }
            }
        }
        let mean = shares.iter().sum::<f32>() / tokens.max(1) as f32;
        shares.iter_mut().for_each(|x| *x -= mean);
        let length = shares.iter().map(|x| x * x).sum::<f32>().sqrt();
        if length > 0.0 {
            shares.iter_mut().for_each(|x| *x /= length);
        }
        Self { shares }
    }

    fn likeness(&self, active: &[u64]) -> f32 {
        let (mut sum, mut count) = (0.0, 0u32);
        for (word, chunk) in active.iter().zip(self.shares.chunks(64)) {
            let mut bits = *word;
            count += bits.count_ones();
            while bits != 0 {
                sum += chunk[bits.trailing_zeros() as usize];
                bits &= bits - 1;
            }
        }
        // The profile has mean 0, so the neuron's own mean adds nothing; its length does.
        let p = count as f32 / self.shares.len().max(1) as f32;
        let length = (self.shares.len() as f32 * p * (1.0 - p)).sqrt();
        if length > 0.0 { sum / length } else { 0.0 }
    }
}

/// The neurons in an order in which every `width` of them make a cluster: bands of falling energy, and in each band
/// clusters of neurons that are active together (k-means with clusters of equal size, by correlation of activity),
/// those of most energy first. A permutation of whole steps, a short one being the last, that depends on the activity
/// alone. `width` is a multiple of the step.
#[must_use]
pub fn cluster(activity: &Activity, width: usize) -> Vec<u32> {
    let steps = (activity.neurons / activity.step) as u32;
    let mut order: Vec<u32> = (0..steps).collect();
    let energy = |n: u32| activity.energy[n as usize];
    order.sort_by(|a, b| energy(*b).total_cmp(&energy(*a)).then(a.cmp(b)));
    // Bands are whole clusters; what does not fill one is last of all.
    let width = (width / activity.step).max(1);
    let clusters = order.len().div_ceil(width);
    let band = clusters.div_ceil(BANDS).max(1) * width;
    let mut result = Vec::with_capacity(order.len());
    for band in order.chunks(band) {
        let whole = band.len() / width * width;
        let mut parts = match width {
            1 => band.iter().map(|n| vec![*n]).collect(),
            _ => balanced(activity, &band[..whole], width),
        };
        let total = |part: &Vec<u32>| part.iter().map(|n| energy(*n)).sum::<f64>();
        parts.sort_by(|a, b| total(b).total_cmp(&total(a)).then(a[0].cmp(&b[0])));
        result.extend(parts.into_iter().flatten());
        result.extend(&band[whole..]);
    }
    let neurons = |step: u32| step * activity.step as u32..(step + 1) * activity.step as u32;
    let rest = steps * activity.step as u32..activity.neurons as u32;
    result.into_iter().flat_map(neurons).chain(rest).collect()
}

/// Cuts `neurons`, steps that is, into clusters of exactly `width`.
fn balanced(activity: &Activity, neurons: &[u32], width: usize) -> Vec<Vec<u32>> {
    let count = neurons.len() / width;
    let active = |n: u32| activity.active[n as usize].as_slice();
    // The first centres: neurons at even distances of energy.
    let mut profiles: Vec<Profile> =
        neurons.chunks(width).map(|chunk| Profile::of(core::iter::once(active(chunk[0])), activity.tokens)).collect();
    let mut owner = vec![usize::MAX; neurons.len()];
    for _ in 0..ROUNDS {
        let mut pairs: Vec<(f32, u32, u32)> = Vec::with_capacity(neurons.len() * count);
        for (i, n) in neurons.iter().enumerate() {
            pairs.extend((0..count).map(|c| (profiles[c].likeness(active(*n)), i as u32, c as u32)));
        }
        // The most alike first; a neuron goes where there is room.
        pairs.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        let mut next = vec![usize::MAX; neurons.len()];
        let mut room = vec![width; count];
        for (_, i, c) in pairs {
            let (i, c) = (i as usize, c as usize);
            if next[i] == usize::MAX && room[c] > 0 {
                next[i] = c;
                room[c] -= 1;
            }
        }
        let settled = next == owner;
        owner = next;
        if settled {
            break;
        }
        profiles = (0..count)
            .map(|c| {
                let members = neurons.iter().zip(&owner).filter(|(_, o)| **o == c).map(|(n, _)| active(*n));
                Profile::of(members, activity.tokens)
            })
            .collect();
    }
    let mut parts = vec![Vec::with_capacity(width); count];
    for (n, owner) in neurons.iter().zip(owner) {
        parts[owner].push(*n);
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Neurons in groups that are active together, scattered over the layer.
    fn grouped(neurons: usize, group: usize, tokens: usize) -> Activity {
        let groups = neurons / group;
        let mut activity = Activity::new(vec![1.0; neurons], 1);
        for t in 0..tokens {
            let on = |n: usize| (n % groups + t * 7) % groups < groups / 4;
            let activations: Vec<f32> =
                (0..neurons).map(|n| if on(n) { 1.0 + n as f32 * 1e-6 } else { 0.01 }).collect();
            activity.add(&activations);
        }
        activity
    }

    #[test]
    fn neurons_that_are_active_together_lie_together() {
        let (neurons, width) = (512, 32);
        let activity = grouped(neurons, width, 200);
        let order = cluster(&activity, width);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert!(sorted.iter().copied().eq(0..neurons as u32), "not a permutation");
        let groups = neurons / width;
        // Four neighbouring groups are active at a time, so seven have something to do with one another; in a random
        // order a cluster would see nearly all 16.
        for part in order.chunks(width) {
            let mut seen: Vec<u32> = part.iter().map(|n| n % groups as u32).collect();
            seen.sort_unstable();
            seen.dedup();
            assert!(seen.len() <= 7, "a cluster of {} groups", seen.len());
        }
        assert_eq!(order, cluster(&activity, width));
    }

    #[test]
    fn what_does_not_fill_a_cluster_is_last() {
        let activity = grouped(100, 10, 20);
        let order = cluster(&activity, 32);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..100));
        let energy = |n: &u32| activity.energy()[*n as usize];
        let least = order[..96].iter().map(energy).fold(f64::INFINITY, f64::min);
        assert!(order[96..].iter().all(|n| energy(n) <= least));
    }

    #[test]
    fn steps_stay_together() {
        for (neurons, step, width) in [(512, 32, 32), (512, 32, 128), (500, 32, 64), (20, 32, 32)] {
            let mut activity = Activity::new(vec![1.0; neurons], step);
            for t in 0..100 {
                let activations: Vec<f32> = (0..neurons).map(|n| ((n * 7 + t * 13) % 29) as f32 - 14.0).collect();
                activity.add(&activations);
            }
            let order = cluster(&activity, width);
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert!(sorted.into_iter().eq(0..neurons as u32));
            for part in order.chunks(step) {
                assert!(part[0].is_multiple_of(step as u32), "{part:?}");
                assert!(part.windows(2).all(|pair| pair[1] == pair[0] + 1), "{part:?}");
            }
        }
    }
}
