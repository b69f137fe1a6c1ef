//! Loading policies: at which precision a token's experts are used, and whether they are read for it.
//!
//! [`plan_token`] is a pure function of the router's output, what is resident and the policy; the engine executes what
//! it says, a trace records it, and a simulator repeats it.

use crate::cache::Eviction;

/// Levels of precision of any unit, and one more for leaving it out.
pub const PRECISIONS: usize = crate::model::unit::MAX_LEVELS + 1;

/// HOBBIT's thresholds (2411.01433, section 4.2) on an expert's score: the share of the routing weight that goes to the
/// token's more important experts, 0 for the first.
#[derive(Clone, Copy, PartialEq, Debug)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Thresholds {
    /// T1: scores up to this are worth full precision.
    pub full: f32,
    /// T2: scores up to this are worth low precision; the others are left out.
    pub low: f32,
    /// Levels that low precision has.
    pub low_levels: u8,
}

/// How much of a chosen expert is loaded.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Loading {
    /// Always full precision: the same bits as with everything resident.
    #[default]
    Exact,
    /// By the score alone, whatever is resident: the same bits with any pool.
    Scored(Thresholds),
    /// HOBBIT: what is resident is used as it is; the score decides what is read of what is not.
    Miss(Thresholds),
    /// As much as may still be read for this token ([`crate::engine::Engine::allow`]), the most important first.
    Deadline {
        /// Levels that the most important expert gets even if nothing may be read.
        low_levels: u8,
    },
}

impl Loading {
    /// The name that options and reports use.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Scored(_) => "scored",
            Self::Miss(_) => "miss",
            Self::Deadline { .. } => "deadline",
        }
    }
}

/// Everything that a run is free to choose.
#[derive(Clone, Copy, PartialEq, Debug)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Policy {
    /// How much of a chosen expert is loaded.
    pub loading: Loading,
    /// What gives way in the pool.
    pub eviction: Eviction,
    /// How many layers ahead experts are predicted and read; 0 for none.
    pub prefetch: u8,
    /// Strength of cache-aware routing (2412.00099); 0 for none.
    pub cache_bias: f32,
    /// Experts of the router's own ranking that cache-aware routing must not replace.
    pub cache_keep: u8,
    /// Most levels that any unit is used with; more than a unit has is all of them.
    pub max_levels: u8,
    /// Share of the neuron clusters that dense layers with predictors use, those that matter most to a token; 1 or more is
    /// all of them, whatever is predicted.
    pub neurons_kept: f32,
    /// Share of the pool that is a fixed region for the first units of dense layers ([`crate::cache::pinned_units`]).
    pub pinned: f32,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            loading: Loading::Exact,
            eviction: Eviction::Lru,
            prefetch: 0,
            cache_bias: 0.0,
            cache_keep: 1,
            max_levels: u8::MAX,
            neurons_kept: 1.0,
            pinned: 0.0,
        }
    }
}

impl Policy {
    /// Whether the pool keeps a unit's levels apart: only then is low precision worth less room.
    #[must_use]
    pub const fn by_level(&self) -> bool {
        !matches!(self.loading, Loading::Exact)
    }
}

/// Where a chosen expert comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Source {
    /// It is in the pool.
    Resident,
    /// Its read is under way.
    InFlight,
    /// All or the rest of it is read.
    Read,
    /// It is left out.
    #[default]
    Skip,
}

/// An expert chosen for a token, and what is done about it.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Choice {
    /// The unit.
    pub unit: u16,
    /// Levels that it is used with; 0 if it is left out.
    pub levels: u8,
    /// Where they come from.
    pub source: Source,
    /// Factor on its output.
    pub weight: f32,
    /// Share of the token's routing weight that goes to more important experts.
    pub score: f32,
}

/// What the pool has of a unit.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Held {
    /// Levels that are resident.
    pub ready: u8,
    /// Levels that are resident or on their way.
    pub coming: u8,
}

/// What may still be read, for [`Loading::Deadline`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Allowance {
    /// Bytes for the present layer.
    pub bytes: u64,
    /// Bytes of each level.
    pub level_bytes: [u64; crate::model::unit::MAX_LEVELS],
}

impl Allowance {
    fn cost(&self, have: u8, want: u8) -> u64 {
        self.level_bytes.iter().take(want.into()).skip(have.into()).sum()
    }
}

/// Gives each of a token's choices its score, precision and source. `full` is the precision of the layer's units;
/// `held` says what the pool has of a unit; `allowance` is used up by [`Loading::Deadline`] only.
pub fn plan_token(
    choices: &mut [Choice],
    loading: &Loading,
    full: u8,
    held: impl Fn(u16) -> Held,
    allowance: &mut Allowance,
) {
    let total: f32 = choices.iter().map(|c| c.weight).sum();
    for i in 0..choices.len() {
        let weight = choices[i].weight;
        let before = |(j, other): (usize, &Choice)| {
            let first = other.weight > weight || (other.weight == weight && j < i);
            if first { other.weight } else { 0.0 }
        };
        let above: f32 = choices.iter().enumerate().map(before).sum();
        // Weights that are not numbers show in the logits; here they count as most important.
        choices[i].score = if total > 0.0 { above / total } else { 0.0 };
    }
    let mut order = [0usize; crate::model::MAX_TOP_K];
    let order = &mut order[..choices.len()];
    order.iter_mut().enumerate().for_each(|(i, o)| *o = i);
    order.sort_unstable_by(|&a, &b| choices[a].score.total_cmp(&choices[b].score).then(a.cmp(&b)));
    for (rank, &at) in order.iter().enumerate() {
        let choice = &mut choices[at];
        let held = held(choice.unit);
        let by_score = |t: &Thresholds| match choice.score {
            s if s <= t.full => full,
            s if s <= t.low => t.low_levels.min(full),
            _ => 0,
        };
        choice.levels = match loading {
            Loading::Exact => full,
            Loading::Scored(t) => by_score(t),
            Loading::Miss(t) => by_score(t).max(held.coming.min(full)),
            Loading::Deadline { low_levels } => {
                let least = if rank == 0 { (*low_levels).clamp(1, full) } else { 0 }.max(held.coming.min(full));
                let afford = |levels: &u8| allowance.cost(held.coming, *levels) <= allowance.bytes;
                (least..=full).rev().find(afford).unwrap_or(least)
            }
        };
        allowance.bytes = allowance.bytes.saturating_sub(allowance.cost(held.coming, choice.levels));
        choice.source = match choice.levels {
            0 => Source::Skip,
            levels if levels <= held.ready => Source::Resident,
            levels if levels <= held.coming => Source::InFlight,
            _ => Source::Read,
        };
    }
}

#[cfg(test)]
mod tests {
    use heapless::Vec;

    use super::*;

    fn choices(weights: &[f32]) -> Vec<Choice, 4> {
        let choice = |(unit, &weight): (usize, &f32)| Choice { unit: unit as u16, weight, ..Choice::default() };
        weights.iter().enumerate().map(choice).collect()
    }

    fn plan(weights: &[f32], loading: Loading, held: impl Fn(u16) -> Held, bytes: u64) -> Vec<(u8, Source), 4> {
        let mut choices = choices(weights);
        let mut allowance = Allowance { bytes, level_bytes: [100, 50, 0, 0] };
        plan_token(&mut choices, &loading, 2, held, &mut allowance);
        choices.iter().map(|c| (c.levels, c.source)).collect()
    }

    const T: Thresholds = Thresholds { full: 0.5, low: 0.8, low_levels: 1 };

    fn nothing(_: u16) -> Held {
        Held::default()
    }

    #[test]
    fn scores_are_the_weight_of_the_more_important() {
        let mut choices = choices(&[0.1, 0.4, 0.2, 0.1]);
        plan_token(&mut choices, &Loading::Exact, 2, nothing, &mut Allowance::default());
        let scores: Vec<f32, 4> = choices.iter().map(|c| c.score).collect();
        for (score, want) in scores.iter().zip([0.75, 0.0, 0.5, 0.875]) {
            assert!((score - want).abs() < 1e-6, "{scores:?}");
        }
        assert!(choices.iter().all(|c| c.levels == 2 && c.source == Source::Read));
    }

    #[test]
    fn scored_does_not_look_at_what_is_resident() {
        use Source::*;
        let all = |_| Held { ready: 2, coming: 2 };
        let weights = [0.4, 0.3, 0.2, 0.1];
        let precisions = |held: &dyn Fn(u16) -> Held| {
            plan(&weights, Loading::Scored(T), held, 0).into_iter().map(|(l, _)| l).collect::<Vec<_, 4>>()
        };
        assert_eq!(precisions(&nothing), [2, 2, 1, 0]);
        assert_eq!(precisions(&all), [2, 2, 1, 0]);
        assert_eq!(plan(&weights, Loading::Scored(T), all, 0)[2], (1, Resident));
        assert_eq!(plan(&weights, Loading::Scored(T), nothing, 0)[3], (0, Skip));
    }

    #[test]
    fn miss_uses_what_is_there_and_reads_by_the_score() {
        use Source::*;
        let held = |unit| match unit {
            1 => Held { ready: 1, coming: 1 },
            2 => Held { ready: 1, coming: 2 },
            3 => Held { ready: 2, coming: 2 },
            _ => Held::default(),
        };
        // Unit 1 is important and only there in low precision: the rest is read. Units 2 and 3 cost nothing.
        let got = plan(&[0.4, 0.3, 0.2, 0.1], Loading::Miss(T), held, 0);
        assert_eq!(got, [(2, Read), (2, Read), (2, InFlight), (2, Resident)]);
        assert_eq!(plan(&[0.4, 0.3, 0.2, 0.1], Loading::Miss(T), nothing, 0)[3], (0, Skip));
    }

    #[test]
    fn a_deadline_spends_its_bytes_on_the_most_important() {
        use Source::*;
        let loading = Loading::Deadline { low_levels: 1 };
        assert_eq!(plan(&[0.2, 0.5, 0.3], loading, nothing, 250), [(0, Skip), (2, Read), (1, Read)]);
        assert_eq!(plan(&[0.2, 0.5, 0.3], loading, nothing, 0), [(0, Skip), (1, Read), (0, Skip)]);
        let held = |unit| if unit == 0 { Held { ready: 1, coming: 1 } } else { Held::default() };
        assert_eq!(plan(&[0.2, 0.5, 0.3], loading, held, 200), [(2, Read), (2, Read), (0, Skip)]);
    }
}
