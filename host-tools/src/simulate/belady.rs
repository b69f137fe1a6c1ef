//! Belady's optimum: the misses of a pool that knows the future.

use std::collections::{BTreeSet, HashMap};

use super::{Counts, Replay, Work};
use crate::trace::Trace;

/// Never again.
const NEVER: usize = usize::MAX;

/// Replays `trace` with a pool of `capacity` bytes that always gives up what is needed latest (L. A. Belady, 1966).
/// Units are used in full precision and must be loaded to be used.
///
/// For units of one size that is the optimum; for several sizes, where the optimum is not known how to be found
/// quickly, it is what evicting by the next use alone achieves.
#[must_use]
pub fn belady(trace: &Trace, capacity: u64) -> Replay {
    let layers = &trace.head.layers;
    // Every use, in order: unit by (layer, unit); and the uses of each layer of each pass.
    let mut uses: Vec<(usize, u16)> = Vec::new();
    let mut groups: Vec<std::ops::Range<usize>> = Vec::new();
    for pass in &trace.passes {
        let mut events = pass.iter();
        for (index, layer) in layers.iter().enumerate() {
            let first = uses.len();
            if layer.experts {
                let event = events.next();
                let chosen = |unit: &u16| event.is_some_and(|e| e.choices.iter().any(|c| c.unit == *unit));
                uses.extend((0..layer.units).filter(chosen).map(|unit| (index, unit)));
            } else {
                uses.extend((0..layer.units).map(|unit| (index, unit)));
            }
            groups.push(first..uses.len());
        }
    }
    let mut next = vec![NEVER; uses.len()];
    let mut seen: HashMap<(usize, u16), usize> = HashMap::new();
    for (at, unit) in uses.iter().enumerate().rev() {
        next[at] = seen.insert(*unit, at).unwrap_or(NEVER);
    }
    // What is in the pool, by next use; everything but the group being computed may give way.
    let mut pool: BTreeSet<(usize, (usize, u16))> = BTreeSet::new();
    let size = |(layer, _): (usize, u16)| layers[layer].bytes(0, layers[layer].levels);
    let mut held = 0;
    let mut passes = vec![Vec::with_capacity(layers.len()); trace.passes.len()];
    for (number, group) in groups.into_iter().enumerate() {
        let mut work = Work::default();
        let mut kept = Vec::new();
        for at in group.clone() {
            let unit = uses[at];
            work.units += 1;
            work.used_bytes += size(unit);
            if pool.remove(&(at, unit)) {
                work.counts.hits += 1;
                kept.push((next[at], unit));
                continue;
            }
            work.counts.add(&Counts { misses: 1, reads: 1, bytes: size(unit), ..Counts::default() });
            while held + size(unit) > capacity {
                // What the layer is about to use stays.
                let latest = pool.iter().rfind(|(next_use, _)| !group.contains(next_use)).copied();
                let Some(gone) = latest else { break };
                pool.remove(&gone);
                held -= size(gone.1);
            }
            if held + size(unit) <= capacity {
                held += size(unit);
                kept.push((next[at], unit));
            }
        }
        pool.extend(kept);
        passes[number / layers.len()].push(work);
    }
    Replay { passes, tokens: (0..trace.passes.len()).map(|pass| trace.tokens(pass)).collect() }
}
