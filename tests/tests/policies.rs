//! Loading, eviction and prefetch: what each may change, and what none may.

use forebay::convert::{ConvertOptions, WeightChoice};
use forebay_conformance::{Run, Setup, arena_memory, arena_of, fixtures, image_of, plan, run};
use forebay_kernels::exec::{Backend, Exec, Serial};
use forebay_runtime::cache::Eviction;
use forebay_runtime::drive::{Reached, Unobserved, advance};
use forebay_runtime::engine::{Engine, Output, Step};
use forebay_runtime::model::MAX_TOP_K;
use forebay_runtime::open::Image;
use forebay_runtime::policy::{Choice, Loading, Policy, Source, Thresholds};
use forebay_storage::MemoryStore;
use forebay_storage::store::BlockStore;

const TOKENS: [u32; 21] = [1, 201, 233, 49, 178, 216, 241, 223, 138, 7, 179, 61, 43, 46, 29, 47, 112, 265, 87, 89, 112];

/// Models with units of two levels.
fn images() -> Vec<(&'static str, Vec<u8>)> {
    ["lfm2moe", "lfm2-convbias-L4-untied", "llama-gqa-untied"]
        .map(|case| {
            let weights = Some(WeightChoice::Q4);
            let options = ConvertOptions { weights, unit_width: Some(32), page: 512, ..ConvertOptions::default() };
            (case, image_of(&fixtures().join(case), &options).unwrap())
        })
        .into()
}

fn thresholds(full: f32, low: f32) -> Thresholds {
    Thresholds { full, low, low_levels: 1 }
}

fn bits(run: &Run) -> Vec<u32> {
    run.logits.iter().map(|x| x.to_bits()).collect()
}

/// Arenas from the least to enough for everything.
fn arenas(image: &[u8], setup: &Setup) -> Vec<u64> {
    let whole = plan(image, setup).unwrap();
    (0..=3).map(|part| whole.least + (whole.total().max(whole.least) - whole.least) / 3 * part + 4096).collect()
}

#[test]
fn exact_has_the_same_bits_under_every_eviction_prefetch_and_pool() {
    for (name, image) in images() {
        let want = bits(&run(&image, &Setup::default(), &TOKENS).unwrap());
        for eviction in Eviction::ALL {
            for prefetch in [0, 1, 3] {
                for batch in [1, 16] {
                    let policy = Policy { eviction, prefetch, ..Policy::default() };
                    let setup = Setup { policy, batch, ..Setup::default() };
                    for arena in arenas(&image, &setup) {
                        let got = run(&image, &Setup { arena: Some(arena), ..setup.clone() }, &TOKENS).unwrap();
                        assert_eq!(bits(&got), want, "{name}, {eviction:?}, prefetch {prefetch}, arena {arena}");
                    }
                }
            }
        }
    }
}

#[test]
fn scored_depends_on_the_scores_alone() {
    let exact: Vec<_> = images().iter().map(|(_, image)| run(image, &Setup::default(), &TOKENS).unwrap()).collect();
    for ((name, image), exact) in images().iter().zip(&exact) {
        for (full, low) in [(1.0, 1.0), (0.3, 0.8), (0.0, 1.0), (0.0, 0.3)] {
            let policy = Policy { loading: Loading::Scored(thresholds(full, low)), ..Policy::default() };
            let setup = Setup { policy, ..Setup::default() };
            let want = run(image, &setup, &TOKENS).unwrap();
            let experts = want.choices.iter().any(|(_, choices)| !choices.is_empty());
            assert_eq!(bits(&want) == bits(exact), full == 1.0 || !experts, "{name}, thresholds {full} and {low}");
            for (eviction, prefetch, batch, workers) in
                [(Eviction::Lru, 0, 1, 1), (Eviction::S3Fifo, 2, 5, 2), (Eviction::HOBBIT, 1, 16, 1)]
            {
                let policy = Policy { eviction, prefetch, ..policy };
                let setup = Setup { policy, batch, workers, ..setup.clone() };
                for arena in arenas(image, &setup) {
                    let setup = Setup { arena: Some(arena), ..setup.clone() };
                    let got = run(image, &setup, &TOKENS).unwrap();
                    assert_eq!(bits(&got), bits(&want), "{name}, {full}, {low}, {eviction:?}, arena {arena}");
                    let scalar = Setup { backend: Some("scalar"), ..setup };
                    assert_eq!(bits(&run(image, &scalar, &TOKENS).unwrap()), bits(&want), "{name}, scalar");
                }
            }
        }
    }
}

/// What `scored` says is what is done: counts of precisions, and bytes that low precision does not read.
#[test]
fn low_precision_reads_less() {
    let (_, image) = images().remove(0);
    let run_with = |loading| {
        let policy = Policy { loading, ..Policy::default() };
        let setup = Setup { policy, batch: 1, ..Setup::default() };
        let least = plan(&image, &setup).unwrap().least;
        run(&image, &Setup { arena: Some(least), ..setup }, &TOKENS).unwrap()
    };
    let full = run_with(Loading::Scored(thresholds(1.0, 1.0)));
    let low = run_with(Loading::Scored(thresholds(0.0, 1.0)));
    let skip = run_with(Loading::Scored(thresholds(0.0, 0.0)));
    let count = |run: &Run| -> Vec<u64> { run.stats.precisions.to_vec() };
    let chosen: u64 = count(&full).iter().sum();
    let tokens_by_layers = full.stats.routings;
    assert_eq!(count(&full), [0, 0, chosen, 0, 0]);
    assert_eq!(count(&low), [0, chosen - tokens_by_layers, tokens_by_layers, 0, 0]);
    assert_eq!(count(&skip), [chosen - tokens_by_layers, 0, tokens_by_layers, 0, 0]);
    assert!(skip.stats.skipped > 0.0 && full.stats.skipped == 0.0);
    let bytes = [&full, &low, &skip].map(|run| run.stats.unit_bytes);
    assert!(bytes.is_sorted_by(|a, b| a > b), "{bytes:?}");
    for run in [&full, &low, &skip] {
        let levels =
            |run: &Run| run.choices.iter().flat_map(|(_, c)| c).all(|c| (c.source == Source::Skip) == (c.levels == 0));
        assert!(levels(run));
    }
}

/// HOBBIT's policy uses all precisions while the pool fills; with thresholds that always want everything it is exact.
#[test]
fn miss_reads_by_the_score() {
    let (_, image) = images().remove(0);
    let setup = Setup { batch: 1, ..Setup::default() };
    let exact = run(&image, &setup, &TOKENS).unwrap();
    // Only the first expert of a token is read in full; the others in low precision, or not at all.
    for (low, left_out) in [(1.0, false), (0.0, true)] {
        let policy = Policy { loading: Loading::Miss(thresholds(0.0, low)), ..Policy::default() };
        let cold = run(&image, &Setup { policy, ..setup.clone() }, &TOKENS).unwrap();
        assert_ne!(bits(&cold), bits(&exact), "nothing was resident, and yet all was exact");
        let used = cold.stats.precisions;
        assert_eq!((used[0] > 0, used[1] > 0, used[2] > 0), (left_out, !left_out, true), "{used:?}");
        assert!(cold.stats.unit_bytes <= exact.stats.unit_bytes);
    }
    // Every unit in full, by full thresholds: the same as exact.
    let policy = Policy { loading: Loading::Miss(thresholds(1.0, 1.0)), ..Policy::default() };
    let full = run(&image, &Setup { policy, ..setup }, &TOKENS).unwrap();
    assert_eq!(bits(&full), bits(&exact));
}

/// Drives an engine by hand, `watch` seeing it at every routed layer.
fn drive(
    image: &[u8],
    policy: Policy,
    mut watch: impl FnMut(&mut Engine<'_>, &Exec<'_>, usize),
    allow: Option<u64>,
) -> Run {
    let setup = Setup { policy, batch: 1, logit_rows: 1, ..Setup::default() };
    let bytes = plan(image, &setup).unwrap().total().next_multiple_of(4096) + (1 << 20);
    let mut memory = arena_memory(bytes);
    let arena = arena_of(&mut memory, bytes);
    let mut store = MemoryStore::new(image);
    let image = Image::open(&mut store, &arena, false).unwrap();
    let plan = forebay_runtime::plan::Plan::new(&image, setup.limits(arena.len() as u64)).unwrap();
    let mut engine = Engine::new(&image, plan, &arena, 4).unwrap();
    let exec = Exec { backend: Backend::detect(), workers: &Serial };
    let mut logits = Vec::new();
    for token in TOKENS {
        if let Some(bytes) = allow {
            engine.allow(bytes);
        }
        engine.feed(&[token], Output::Last).unwrap();
        loop {
            while let Some(done) = store.poll() {
                engine.complete(done).unwrap();
            }
            match engine.step(&exec).unwrap() {
                Step::Read(request) => assert!(store.submit(request).is_ok()),
                Step::Wait => engine.complete(store.wait().unwrap()).unwrap(),
                Step::Routed { layer } => watch(&mut engine, &exec, layer),
                Step::Logits { .. } => logits.extend_from_slice(engine.logits()),
                Step::Computed => {}
                Step::Idle => break,
            }
        }
    }
    assert_eq!(advance(&mut engine, &mut store, &exec, &mut Unobserved).unwrap(), Reached::Idle);
    Run { logits, choices: Vec::new(), stats: engine.stats(), plan }
}

/// The predictor put to the layer whose input it has repeats the router, choice for choice; asking does not change
/// anything.
#[test]
fn prediction_for_the_same_layer_is_always_right() {
    let (_, image) = images().remove(0);
    let (mut asked, mut right) = (0, 0);
    let got = drive(
        &image,
        Policy::default(),
        |engine, exec, layer| {
            let chosen: Vec<Choice> = engine.choices().to_vec();
            if chosen.is_empty() {
                return;
            }
            let mut again = [Choice::default(); MAX_TOP_K];
            let count = engine.foresee(exec, layer, 0, &mut again).unwrap();
            asked += count;
            right +=
                again[..count].iter().zip(&chosen).filter(|(a, b)| a.unit == b.unit && a.weight == b.weight).count();
        },
        None,
    );
    assert!(asked > 0 && asked == right, "{right} of {asked} were right");
    let want = run(&image, &Setup { batch: 1, ..Setup::default() }, &TOKENS).unwrap();
    assert_eq!(bits(&got), bits(&want));
}

#[test]
fn prefetch_foresees_and_reads_ahead() {
    let (_, image) = images().remove(0);
    let policy = Policy { prefetch: 1, ..Policy::default() };
    let setup = Setup { policy, batch: 1, queue_depth: 8, ..Setup::default() };
    let got = run(&image, &setup, &TOKENS).unwrap();
    let stats = got.stats;
    assert!(stats.foreseeable > 0 && stats.foreseen > 0 && stats.foreseen <= stats.foreseeable, "{stats:?}");
    // Reading ahead turns misses into hits.
    let without = run(&image, &Setup { policy: Policy::default(), ..setup }, &TOKENS).unwrap();
    assert!(stats.prefetched > without.stats.prefetched);
    assert!(stats.misses < without.stats.misses, "{} and {}", stats.misses, without.stats.misses);
}

/// A deadline that leaves nothing to read uses what is there and the least of the most important expert; one that
/// leaves everything is exact.
#[test]
fn a_deadline_reads_what_it_may() {
    let (_, image) = images().remove(0);
    let policy = Policy { loading: Loading::Deadline { low_levels: 1 }, ..Policy::default() };
    let exact = run(&image, &Setup { batch: 1, ..Setup::default() }, &TOKENS).unwrap();
    let free = drive(&image, policy, |_, _, _| (), None);
    assert_eq!(bits(&free), bits(&exact));
    let mut last = free.stats.unit_bytes;
    for allowed in [200_000, 20_000, 0] {
        let got = drive(&image, policy, |_, _, _| (), Some(allowed));
        assert!(got.stats.unit_bytes <= last, "{allowed}: {} after {last}", got.stats.unit_bytes);
        last = got.stats.unit_bytes;
    }
    assert!(last < free.stats.unit_bytes);
    let none = drive(
        &image,
        policy,
        |engine, _, _| {
            for token in engine.choices().chunks_exact(4) {
                let top = token.iter().min_by(|a, b| a.score.total_cmp(&b.score)).unwrap();
                assert!(top.levels >= 1);
            }
        },
        Some(0),
    );
    assert!(none.stats.precisions[0] > 0);
}

/// Cache-aware routing prefers what is in the pool, says how often, and never touches the choices that it must keep.
#[test]
fn cache_aware_routing_misses_less_and_says_what_it_changed() {
    let (_, image) = images().remove(0);
    let with = |cache_bias, cache_keep| {
        let policy = Policy { cache_bias, cache_keep, ..Policy::default() };
        let setup = Setup { policy, batch: 1, ..Setup::default() };
        let plan = plan(&image, &setup).unwrap();
        let arena = (plan.least + plan.total()) / 2 / 4096 * 4096;
        run(&image, &Setup { arena: Some(arena), ..setup }, &TOKENS).unwrap()
    };
    let (none, some, all) = (with(0.0, 1), with(0.5, 1), with(5.0, 1));
    assert_eq!(none.stats.rerouted, 0);
    assert!(some.stats.rerouted > 0 && all.stats.rerouted >= some.stats.rerouted);
    assert!(all.stats.misses < none.stats.misses, "{} and {}", all.stats.misses, none.stats.misses);
    let kept = with(5.0, 255);
    assert_eq!(kept.stats.rerouted, 0);
    assert_eq!(bits(&kept), bits(&none));
}

/// At most one level: the same bits as units that have no other, with any pool.
#[test]
fn at_most_one_level_is_a_lower_precision_for_everything() {
    for (name, image) in images() {
        let policy = Policy { max_levels: 1, ..Policy::default() };
        let setup = Setup { policy, ..Setup::default() };
        let want = run(&image, &setup, &TOKENS).unwrap();
        let whole = run(&image, &Setup::default(), &TOKENS).unwrap();
        assert_ne!(bits(&want), bits(&whole), "{name}");
        assert!(want.stats.unit_bytes < whole.stats.unit_bytes, "{name}");
        let least = plan(&image, &setup).unwrap().least;
        let got = run(&image, &Setup { arena: Some(least), ..setup }, &TOKENS).unwrap();
        assert_eq!(bits(&got), bits(&want), "{name}");
    }
}
