//! Replaying a trace against a pool: what would have been hit, missed and read, with any policy and size.
//!
//! [`replay`] uses the engine's own bookkeeping ([`Directory`]) and its own expert plan ([`plan_token`]), and claims
//! slots in the order in which the engine does when reads finish before they are computed with. So what it counts is
//! what a run counts. [`belady`] is the bound: the least misses that any policy could have had.

mod belady;
mod timing;

use anyhow::{Result, ensure};
pub use belady::belady;
use forebay_runtime::cache::{Claim, Directory, Entry, Residency, UnitUse, pinned_units};
use forebay_runtime::policy::{Allowance, Choice, Held, Loading, Policy, plan_token};
pub use timing::{Costs, MeasuredCosts, Prediction, predict};

use crate::trace::{Event, Head, Trace};

/// A pool.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Pool {
    /// Slots.
    pub slots: usize,
    /// Pieces that a unit is kept in: 1, or its levels apart.
    pub pieces: usize,
    /// How experts are loaded and kept.
    pub policy: Policy,
}

/// What was used and read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Units of which nothing had to be read.
    pub hits: u64,
    /// Units of which something had to be.
    pub misses: u64,
    /// Reads.
    pub reads: u64,
    /// Bytes of them.
    pub bytes: u64,
}

impl Counts {
    /// Share of uses that were hits; 1 if there were none.
    #[must_use]
    pub fn hit_rate(&self) -> f64 {
        let uses = self.hits + self.misses;
        if uses == 0 { 1.0 } else { self.hits as f64 / uses as f64 }
    }

    fn add(&mut self, other: &Self) {
        self.hits += other.hits;
        self.misses += other.misses;
        self.reads += other.reads;
        self.bytes += other.bytes;
    }
}

/// What one layer did in one pass.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Work {
    /// Units computed, and their bytes at the precision used.
    pub units: u32,
    /// Bytes of the units computed.
    pub used_bytes: u64,
    /// What of it was read on demand.
    pub counts: Counts,
    /// Bytes read ahead for it.
    pub ahead_bytes: u64,
}

/// A replayed trace.
#[derive(Clone, PartialEq, Debug)]
pub struct Replay {
    /// By pass and layer.
    pub passes: Vec<Vec<Work>>,
    /// Tokens of each pass.
    pub tokens: Vec<usize>,
}

impl Replay {
    /// The counts of layer `layer` from pass `from` on, reads ahead included.
    #[must_use]
    pub fn layer(&self, layer: usize, from: usize) -> Counts {
        let mut sum = Counts::default();
        for work in self.passes.iter().skip(from).filter_map(|pass| pass.get(layer)) {
            sum.add(&work.counts);
            sum.bytes += work.ahead_bytes;
        }
        sum
    }

    /// The counts of layers for which `which` is true, from pass `from` on.
    #[must_use]
    pub fn total(&self, from: usize, which: impl Fn(usize) -> bool) -> Counts {
        let layers = self.passes.first().map_or(0, Vec::len);
        let mut sum = Counts::default();
        (0..layers).filter(|layer| which(*layer)).for_each(|layer| sum.add(&self.layer(layer, from)));
        sum
    }

    /// Tokens from pass `from` on.
    #[must_use]
    pub fn tokens_from(&self, from: usize) -> usize {
        self.tokens.iter().skip(from).sum()
    }
}

/// A unit that a layer needs.
struct Need {
    unit: u32,
    levels: u8,
    done: bool,
}

/// The pool and where its units are numbered from.
struct Replayer<'d, 't> {
    directory: Directory<'d>,
    head: &'t Head,
    /// Number of each layer's first unit.
    bases: Vec<u32>,
    /// The first units of each layer, as many, never give way.
    pinned: Vec<usize>,
    policy: Policy,
}

/// In how many layers the units of a dense layer are used again, `now` being the layer whose units are being used.
fn next_use(head: &Head, now: usize, layer: u16) -> Option<usize> {
    let layers = head.layers.len();
    let layer = usize::from(layer);
    (!head.layers[layer].experts).then_some((layer + layers - now - 1) % layers)
}

/// Replays `trace` with `pool`.
///
/// # Errors
/// The policy depends on what a trace does not have: cache-aware routing on the scores of experts that were not chosen,
/// prefetch on predictions, a deadline on the clock.
pub fn replay(trace: &Trace, pool: &Pool) -> Result<Replay> {
    let policy = pool.policy;
    ensure!(policy.cache_bias == 0.0, "cache-aware routing cannot be replayed: a trace has the chosen experts only");
    ensure!(policy.prefetch == 0, "prefetch cannot be replayed: a trace has no predictions");
    ensure!(!matches!(policy.loading, Loading::Deadline { .. }), "a deadline cannot be replayed: a trace has no clock");
    let head = &trace.head;
    let mut units = 0u32;
    let mut bases = Vec::with_capacity(head.layers.len());
    for layer in &head.layers {
        bases.push(units);
        units += u32::from(layer.units);
    }
    let mut entries = vec![Entry::default(); pool.slots];
    let mut of_piece = vec![0; units as usize * pool.pieces.max(1)];
    let mut uses = vec![UnitUse::default(); units as usize];
    let layers = head.layers.len();
    let directory = Directory::new(&mut entries, &mut of_piece, &mut uses, pool.pieces, layers, policy.eviction);
    let dense = head.layers.iter().filter(|layer| !layer.experts).map(|layer| usize::from(layer.units)).sum();
    let pinned = head.layers.iter().map(|layer| match layer.experts {
        false => pinned_units(layer.units.into(), dense, pool.slots, pool.pieces, policy.pinned, &[]),
        true => 0,
    });
    let mut replayer = Replayer { directory, head, bases, pinned: pinned.collect(), policy };
    let mut passes = Vec::with_capacity(trace.passes.len());
    for pass in &trace.passes {
        replayer.directory.begin_token();
        let mut events = pass.iter();
        passes.push((0..layers).map(|layer| replayer.layer(layer, &mut events)).collect());
    }
    let tokens = (0..trace.passes.len()).map(|pass| trace.tokens(pass)).collect();
    Ok(Replay { passes, tokens })
}

impl Replayer<'_, '_> {
    /// Levels that a layer's units are used with.
    fn full(&self, layer: usize) -> u8 {
        self.head.layers[layer].levels.min(self.policy.max_levels.max(1))
    }

    /// Levels of a unit that are in the pool. A read is over as soon as it has begun here.
    fn held(&self, layer: usize, unit: u32) -> u8 {
        let held = self.directory.held(unit).0;
        if self.directory.pieces() == 1 { held * self.full(layer) } else { held }
    }

    fn missing_piece(&self, unit: u32, levels: u8) -> Option<u32> {
        let pieces = self.directory.pieces();
        let wanted = if pieces == 1 { 1 } else { u32::from(levels) };
        let mut all = unit * pieces..unit * pieces + wanted.min(pieces);
        all.find(|piece| self.directory.residency(*piece) == Residency::Absent)
    }

    /// Bytes that reading `piece` of a unit of `layer` takes.
    fn piece_bytes(&self, layer: usize, piece: u32) -> u64 {
        let pieces = self.directory.pieces();
        if pieces == 1 {
            return self.head.layers[layer].bytes(0, self.full(layer));
        }
        let level = (piece % pieces) as u8;
        self.head.layers[layer].bytes(level, level + 1)
    }

    fn layer<'e>(&mut self, layer: usize, events: &mut impl Iterator<Item = &'e Event>) -> Work {
        let base = self.bases[layer];
        let full = self.full(layer);
        let mut work = Work::default();
        let mut needs: Vec<Need> = Vec::new();
        if self.head.layers[layer].experts {
            let top_k = usize::from(self.head.layers[layer].top_k);
            let mut choices = events.next().map_or_else(Vec::new, |event| event.choices.clone());
            for token in choices.chunks_exact_mut(top_k) {
                let held = |unit: u16| {
                    let held = self.held(layer, base + u32::from(unit));
                    Held { ready: held, coming: held }
                };
                plan_token(token, &self.policy.loading, full, held, &mut Allowance::default());
            }
            for unit in 0..self.head.layers[layer].units {
                let levels = choices.iter().filter(|c| c.unit == unit).map(|c: &Choice| c.levels).max().unwrap_or(0);
                if levels > 0 {
                    needs.push(Need { unit: base + u32::from(unit), levels, done: false });
                }
            }
        } else {
            self.read_ahead(layer, &mut work);
            let units = base..base + u32::from(self.head.layers[layer].units);
            needs.extend(units.map(|unit| Need { unit, levels: full, done: false }));
        }
        for need in &needs {
            match self.held(layer, need.unit) >= need.levels {
                true => work.counts.hits += 1,
                false => work.counts.misses += 1,
            }
            work.units += 1;
            work.used_bytes += self.head.layers[layer].bytes(0, need.levels);
        }
        for at in 0..needs.len() {
            while let Some(piece) = self.missing_piece(needs[at].unit, needs[at].levels) {
                if needs[at].done || !self.read(layer, piece, &mut needs) {
                    break;
                }
                work.counts.reads += 1;
                work.counts.bytes += self.piece_bytes(layer, piece);
            }
        }
        for need in &mut needs {
            self.compute(layer, need);
        }
        work
    }

    /// Units of a dense layer are read while the layer before it computes, as far as that displaces nothing that is
    /// needed sooner.
    fn read_ahead(&mut self, layer: usize, work: &mut Work) {
        let (base, full, head) = (self.bases[layer], self.full(layer), self.head);
        let layers = head.layers.len();
        let now = layer.checked_sub(1).unwrap_or(layers - 1);
        for unit in base..base + u32::from(head.layers[layer].units) {
            while let Some(piece) = self.missing_piece(unit, full) {
                let pinned = ((unit - base) as usize) < self.pinned[layer];
                let claim = Claim { piece, layer: layer as u16, present: layer as u16, ahead: true, pinned };
                let soon = |at: u16| next_use(head, now, at).is_some_and(|n| 2 * n < layers);
                let keep = |at: u16, _| soon(at) || usize::from(at) == layer;
                if self.directory.claim(claim, keep, |at| next_use(head, now, at)).is_none() {
                    return;
                }
                self.directory.settle(piece, true);
                work.ahead_bytes += self.piece_bytes(layer, piece);
            }
        }
    }

    /// Makes room for `piece` and reads it. Where all slots hold what the layer needs, that is computed first.
    fn read(&mut self, layer: usize, piece: u32, needs: &mut [Need]) -> bool {
        let head = self.head;
        let unit = piece / self.directory.pieces();
        let pinned = ((unit - self.bases[layer]) as usize) < self.pinned[layer];
        let claim = Claim { piece, layer: layer as u16, present: layer as u16, ahead: false, pinned };
        loop {
            let keep = |at: u16, unit: u32| {
                usize::from(at) == layer && needs.iter().any(|need| !need.done && need.unit == unit)
            };
            if self.directory.claim(claim, keep, |at| next_use(head, layer, at)).is_some() {
                self.directory.settle(piece, true);
                return true;
            }
            let computable =
                |need: &Need| !need.done && need.unit != unit && self.held(layer, need.unit) >= need.levels;
            let Some(at) = needs.iter().position(computable) else { return false };
            self.compute(layer, &mut needs[at]);
        }
    }

    fn compute(&mut self, layer: usize, need: &mut Need) {
        if !need.done {
            let used = if self.directory.pieces() == 1 { 1 } else { u32::from(need.levels) };
            self.directory.touch(need.unit, used, need.levels == self.full(layer));
            need.done = true;
        }
    }
}

/// How unequal and how steady the use of experts is.
#[derive(Clone, Copy, PartialEq, Debug, Default, serde::Serialize)]
pub struct Behaviour {
    /// Share of a token's experts that the token before had chosen too, mean over layers. By chance it is the number
    /// chosen over the number there are.
    pub repeated: f64,
    /// The same by chance.
    pub repeated_by_chance: f64,
    /// Exponent `s` of Zipf's law, `rank^-s`, that fits the experts' popularity best, mean over layers.
    pub skew: f64,
    /// Share of all uses that the more popular half of the experts has, mean over layers.
    pub upper_half: f64,
    /// Share of all uses that the most popular experts have, as many as a token uses, mean over layers.
    pub top_share: f64,
    /// Shares of uses of an expert that its layer had used within the last 1, 2, 4, 8, 16, 32 and 64 tokens, mean over
    /// layers: how far apart uses are.
    pub reused_within: [f64; REUSE],
}

/// Distances of [`Behaviour::reused_within`]: the powers of two from 1.
const REUSE: usize = 7;

impl std::fmt::Display for Behaviour {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let percent = |share: f64| format!("{:.1}", 100.0 * share);
        let within: Vec<String> = self.reused_within.iter().map(|share| percent(*share)).collect();
        write!(
            f,
            "{} % of a token's experts are those of the token before ({} % by chance); the most popular, as many as a token \
             uses, have {} % of the uses, the popular half {} % (Zipf's exponent {:.2}); used again within 1, 2, 4, … 64 \
             tokens: {} %",
            percent(self.repeated),
            percent(self.repeated_by_chance),
            percent(self.top_share),
            percent(self.upper_half),
            self.skew,
            within.join(", ")
        )
    }
}

/// How `trace` uses experts.
#[must_use]
pub fn behaviour(trace: &Trace) -> Behaviour {
    let mut sum = Behaviour::default();
    let mut layers = 0.0f64;
    for (index, layer) in trace.head.layers.iter().enumerate().filter(|(_, layer)| layer.experts) {
        let top_k = usize::from(layer.top_k);
        let events = trace.passes.iter().flatten().filter(|event| event.layer == index);
        let tokens: Vec<Vec<u16>> = events
            .flat_map(|event| event.choices.chunks_exact(top_k))
            .map(|token| token.iter().map(|choice| choice.unit).collect())
            .collect();
        if tokens.len() < 2 {
            continue;
        }
        let again = |w: &[Vec<u16>]| w[1].iter().filter(|unit| w[0].contains(unit)).count();
        let repeated: usize = tokens.windows(2).map(again).sum();
        let mut counts = vec![0u64; layer.units.into()];
        tokens.iter().flatten().for_each(|unit| counts[usize::from(*unit)] += 1);
        counts.sort_by(|a, b| b.cmp(a));
        let all: u64 = counts.iter().sum();
        sum.repeated += repeated as f64 / ((tokens.len() - 1) * top_k) as f64;
        sum.repeated_by_chance += top_k as f64 / f64::from(layer.units);
        sum.top_share += counts[..top_k].iter().sum::<u64>() as f64 / all as f64;
        reuse(&tokens, layer.units).into_iter().zip(&mut sum.reused_within).for_each(|(share, sum)| *sum += share);
        sum.upper_half += counts[..counts.len().div_ceil(2)].iter().sum::<u64>() as f64 / all as f64;
        sum.skew += zipf(&counts);
        layers += 1.0;
    }
    let layers = layers.max(1.0);
    Behaviour {
        repeated: sum.repeated / layers,
        repeated_by_chance: sum.repeated_by_chance / layers,
        skew: sum.skew / layers,
        upper_half: sum.upper_half / layers,
        top_share: sum.top_share / layers,
        reused_within: sum.reused_within.map(|share| share / layers),
    }
}

/// Shares of all uses but the first of each expert that come at most 1, 2, 4, … tokens after the one before.
fn reuse(tokens: &[Vec<u16>], units: u16) -> [f64; REUSE] {
    let mut last = vec![None; units.into()];
    let mut within = [0u64; REUSE];
    let mut all = 0u64;
    for (at, token) in tokens.iter().enumerate() {
        for unit in token {
            if let Some(before) = last[usize::from(*unit)].replace(at) {
                all += 1;
                within.iter_mut().enumerate().filter(|(i, _)| at - before <= 1 << i).for_each(|(_, n)| *n += 1);
            }
        }
    }
    within.map(|n| n as f64 / all.max(1) as f64)
}

/// Slope of log count over log rank, by least squares; experts that were never chosen count half a use.
fn zipf(counts: &[u64]) -> f64 {
    let points = counts.iter().enumerate().map(|(i, n)| (((i + 1) as f64).ln(), (*n as f64).max(0.5).ln()));
    let n = counts.len() as f64;
    let (mut sx, mut sy, mut sxx, mut sxy) = (0.0, 0.0, 0.0, 0.0);
    for (x, y) in points {
        sx += x;
        sy += y;
        sxx += x * x;
        sxy += x * y;
    }
    let spread = n * sxx - sx * sx;
    if spread > 0.0 { -(n * sxy - sx * sy) / spread } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::Layer;
    use forebay_runtime::policy::Source;

    #[test]
    fn behaviour_is_counted() {
        let layer = Layer { experts: true, units: 4, top_k: 1, levels: 1, level_bytes: [4096, 0, 0, 0] };
        let choose = |unit| Choice { unit, levels: 1, source: Source::Read, weight: 1.0, score: 0.0 };
        let pass = |unit: &u16| vec![Event { layer: 0, choices: vec![choose(*unit)] }];
        let passes = [0u16, 0, 1, 0, 2, 2, 0, 0].iter().map(pass).collect();
        let got = behaviour(&Trace { head: Head { image: [0; 16], layers: vec![layer] }, passes });
        assert_eq!((got.repeated, got.repeated_by_chance), (3.0 / 7.0, 0.25));
        assert_eq!((got.top_share, got.upper_half), (5.0 / 8.0, 7.0 / 8.0));
        // Uses again after 1, 2, 1 (of 2), 3 and 1 tokens.
        assert_eq!(got.reused_within, [0.6, 0.8, 1.0, 1.0, 1.0, 1.0, 1.0]);
    }
}
