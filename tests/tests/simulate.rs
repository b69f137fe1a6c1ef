//! The simulator counts what the engine counts, for every policy, and nothing beats Belady.

use forebay::convert::{ConvertOptions, WeightChoice};
use forebay::simulate::{Pool, belady, replay};
use forebay::trace::{Event, Head, Trace, Writer};
use forebay_conformance::{Run, Setup, arena_memory, arena_of, fixtures, image_of, plan, run};
use forebay_runtime::cache::Eviction;
use forebay_runtime::open::Image;
use forebay_runtime::policy::{Loading, Policy, Thresholds};
use forebay_storage::MemoryStore;

const TOKENS: u32 = 48;

fn head(image: &[u8]) -> Head {
    let mut memory = arena_memory(1 << 24);
    let arena = arena_of(&mut memory, 1 << 24);
    let opened = Image::open(&mut MemoryStore::new(image), &arena, false).unwrap();
    Head::new([0; 16], opened.model())
}

/// The trace of a run that computed token by token.
fn trace(head: &Head, run: &Run) -> Trace {
    let event = |layer: usize, choices: &[_], token: usize| {
        let top_k = usize::from(head.layers[layer].top_k);
        Event { layer, choices: choices[token * top_k..][..top_k].to_vec() }
    };
    let passes = (0..TOKENS as usize).map(|t| run.choices.iter().map(|(layer, all)| event(*layer, all, t)).collect());
    let trace = Trace { head: head.clone(), passes: passes.collect() };
    // By way of a file, as the planner gets it.
    let mut writer = Writer::new(Vec::new(), head.clone()).unwrap();
    for event in trace.passes.iter().flatten() {
        writer.event(event.layer, &event.choices).unwrap();
    }
    Trace::parse(&writer.finish().unwrap()).unwrap()
}

#[test]
fn the_simulator_counts_what_a_run_counts() {
    let options = ConvertOptions { weights: Some(WeightChoice::Q4), ..ConvertOptions::default() };
    let image = image_of(&fixtures().join("lfm2moe"), &options).unwrap();
    let head = head(&image);
    let tokens: Vec<u32> = (0..TOKENS).map(|t| (t * 37 + 5) % 288).collect();
    let thresholds = Thresholds { full: 0.3, low: 0.8, low_levels: 1 };
    for loading in [Loading::Exact, Loading::Scored(thresholds), Loading::Miss(thresholds)] {
        for share in [0.6, 0.8] {
            let mut best = 0;
            let mut bound = None;
            let unpinned = Eviction::ALL.map(|eviction| (eviction, 0.0));
            for (eviction, pinned) in unpinned.into_iter().chain([(Eviction::Lru, 0.3), (Eviction::DENSITY, 1.0)]) {
                let policy = Policy { loading, eviction, pinned, ..Policy::default() };
                let setup = Setup { batch: 1, logit_rows: 1, queue_depth: 64, policy, ..Setup::default() };
                let whole = plan(&image, &setup).unwrap();
                let pool = (whole.slots as f64 * share) as u64 * (whole.slot_len + 128);
                let arena = (whole.total() - whole.pool + pool).max(whole.least).next_multiple_of(4096);
                let run = run(&image, &Setup { arena: Some(arena), ..setup }, &tokens).unwrap();
                let slots = run.plan.slots;
                assert!(slots < whole.slots);
                let trace = trace(&head, &run);
                let replayed = replay(&trace, &Pool { slots, pieces: run.plan.pieces, policy }).unwrap();
                let counts = replayed.total(0, |_| true);
                let what = format!("{}, {}, {slots} slots, {pinned} pinned", loading.name(), eviction.name());
                assert_eq!((counts.hits, counts.misses), (run.stats.hits, run.stats.misses), "{what}");
                best = best.max(counts.hits);
                if loading == Loading::Exact {
                    let optimum = belady(&trace, slots as u64 * run.plan.slot_len);
                    bound = Some(optimum.total(0, |layer| head.layers[layer].experts).hits);
                    let experts = replayed.total(0, |layer| head.layers[layer].experts).hits;
                    assert!(bound.unwrap() >= experts, "{what}: {experts} hits, more than Belady's {bound:?}");
                }
            }
            assert!(best > 0);
            assert_eq!(bound.is_some(), loading == Loading::Exact);
        }
    }
}
