//! The planner: which policy suits a trace of routing, a pool and a device.
//!
//! Candidates are replayed with the engine's own bookkeeping ([`crate::simulate`]) and timed with measured costs of
//! computing and a model of the device. What wins is kept in the image ([`crate::settings`]).

mod layout;
mod thresholds;

use anyhow::Result;
use forebay_runtime::cache::{Density, Eviction, Weights};
use forebay_runtime::policy::{Loading, Policy};
use forebay_storage::layers::DeviceProfile;
pub use layout::layout;
pub use thresholds::{Scores, profile};

use crate::simulate::{Costs, Pool, Prediction, belady, predict, replay};
use crate::trace::Trace;

/// Share of a trace's passes during which the pool fills and nothing is counted.
const WARM_UP: usize = 5;
/// Most passes that parameters are tuned on.
const TUNED_PASSES: usize = 4096;
/// A candidate must be better than a simpler one by this share to be preferred.
const WORTH: f64 = 0.001;

/// What a pool has room for under a loading policy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Room {
    /// Slots.
    pub slots: usize,
    /// Bytes of a slot.
    pub slot_len: u64,
    /// Pieces of a unit.
    pub pieces: usize,
}

/// What is planned for.
#[derive(Clone, Copy, Debug)]
pub struct Question<'q> {
    /// What was routed.
    pub trace: &'q Trace,
    /// What computing takes.
    pub costs: &'q Costs,
    /// What reads take.
    pub device: &'q DeviceProfile,
    /// Most reads in flight at once.
    pub depth: usize,
}

/// A policy, and what it is foreseen to reach.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Candidate {
    /// The policy.
    pub policy: Policy,
    /// The pool it has.
    pub room: Room,
    /// Share of all units' uses, those of dense layers included, for which nothing was read on demand.
    pub hit_rate: f64,
    /// What is foreseen.
    pub prediction: Prediction,
}

impl Question<'_> {
    fn warm_up(&self) -> usize {
        self.trace.passes.len() / WARM_UP
    }

    /// What `policy` reaches.
    ///
    /// # Errors
    /// A policy that cannot be replayed.
    pub fn evaluate(&self, policy: Policy, room: Room) -> Result<Candidate> {
        let replayed = replay(self.trace, &Pool { slots: room.slots, pieces: room.pieces, policy })?;
        let from = self.warm_up();
        let prediction = predict(&self.trace.head, &replayed, from, self.costs, self.device, self.depth);
        Ok(Candidate { policy, room, hit_rate: replayed.total(from, |_| true).hit_rate(), prediction })
    }

    /// The hit rates of Belady's optimum in full precision: of all units, of experts alone.
    #[must_use]
    pub fn belady(&self, room: Room) -> (f64, f64) {
        let best = belady(self.trace, room.slots as u64 * room.slot_len);
        let experts = |layer: usize| self.trace.head.layers[layer].experts;
        let from = self.warm_up();
        (best.total(from, |_| true).hit_rate(), best.total(from, experts).hit_rate())
    }

    /// Every eviction policy with `loading`, simple ones first; those that have parameters with the usual and with tuned
    /// ones.
    ///
    /// # Errors
    /// A loading policy that cannot be replayed.
    pub fn evictions(&self, loading: Loading, room: Room) -> Result<Vec<Candidate>> {
        let tuned = Trace {
            head: self.trace.head.clone(),
            passes: self.trace.passes.iter().take(TUNED_PASSES).cloned().collect(),
        };
        let tuner = Tuner { trace: &tuned, loading, room };
        let mut evictions = Eviction::ALL.to_vec();
        evictions.push(tuner.hobbit()?);
        evictions.push(tuner.density()?);
        let mut candidates: Vec<Candidate> = Vec::new();
        for eviction in evictions {
            if candidates.iter().all(|known| known.policy.eviction != eviction) {
                candidates.push(self.evaluate(Policy { loading, eviction, ..Policy::default() }, room)?);
            }
        }
        Ok(candidates)
    }
}

/// The fastest of `candidates`; of two that are as good as equally fast the first.
#[must_use]
pub fn fastest(candidates: &[Candidate]) -> Option<&Candidate> {
    let mut best = candidates.first()?;
    for candidate in candidates {
        if candidate.prediction.tok_s > best.prediction.tok_s * (1.0 + WORTH) {
            best = candidate;
        }
    }
    Some(best)
}

/// Finds parameters that read the fewest bytes: HOBBIT's miss penalty, in which a miss in low precision counts as much
/// less as it has fewer bytes (2411.01433, section 4.4).
struct Tuner<'t> {
    trace: &'t Trace,
    loading: Loading,
    room: Room,
}

impl Tuner<'_> {
    fn penalty(&self, eviction: Eviction) -> Result<u64> {
        let policy = Policy { loading: self.loading, eviction, ..Policy::default() };
        let pool = Pool { slots: self.room.slots, pieces: self.room.pieces, policy };
        Ok(replay(self.trace, &pool)?.total(self.trace.passes.len() / WARM_UP, |_| true).bytes)
    }

    fn least(
        &self,
        evictions: impl IntoIterator<Item = Eviction>,
        known: Option<(u64, Eviction)>,
    ) -> Result<(u64, Eviction)> {
        let mut best = known.unwrap_or((u64::MAX, Eviction::Lru));
        for eviction in evictions {
            let penalty = self.penalty(eviction)?;
            if penalty < best.0 {
                best = (penalty, eviction);
            }
        }
        Ok(best)
    }

    /// HOBBIT's weights: all mixtures of quarters, then eighths moved between each two from the best of them.
    fn hobbit(&self) -> Result<Eviction> {
        let weights = |parts: [u8; 4]| {
            let [lru, lfu, lhu, fld] = parts.map(|part| f32::from(part) / 8.0);
            Eviction::Hobbit(Weights { lru, lfu, lhu, fld })
        };
        let mut mixtures = Vec::new();
        for lru in (0..=8u8).step_by(2) {
            for lfu in (0..=8 - lru).step_by(2) {
                for lhu in (0..=8 - lru - lfu).step_by(2) {
                    mixtures.push([lru, lfu, lhu, 8 - lru - lfu - lhu]);
                }
            }
        }
        let first = self.least(mixtures.iter().copied().map(weights), None)?;
        let best = mixtures.into_iter().find(|parts| weights(*parts) == first.1).unwrap_or([2; 4]);
        let moved = (0..16usize).filter(|pair| pair / 4 != pair % 4).filter_map(|pair| {
            let mut parts = best;
            parts[pair / 4] = parts[pair / 4].checked_sub(1)?;
            parts[pair % 4] += 1;
            Some(weights(parts))
        });
        Ok(self.least(moved, Some(first))?.1)
    }

    /// Hit density's weight of the latest token, and how little distances matter, in parts of the model's depth.
    fn density(&self) -> Result<Eviction> {
        let layers = self.trace.head.layers.len() as f32;
        let all = [0.02f32, 0.1, 0.25, 0.5].into_iter().flat_map(|recent| {
            [0.0f32, 0.25, 1.0, 4.0]
                .map(|depths| Eviction::Density(Density { recent, offset: (depths * layers).round() }))
        });
        Ok(self.least(all, None)?.1)
    }
}
