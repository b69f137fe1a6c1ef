//! Neuron clusters: another order of neurons is the same model, and leaving clusters out depends on nothing but the
//! image, the tokens and the share.

use std::collections::BTreeMap;
use std::sync::Arc;

use forebay::convert::{ConvertOptions, WeightChoice};
use forebay::neurons::{Calibration, NeuronPlan, Scoring, Settings};
use forebay_conformance::hostile::{parts, reseal};
use forebay_conformance::reference::{argmax, difference};
use forebay_conformance::{Run, Setup, arena_memory, arena_of, fixtures, image_of, plan, run};
use forebay_kernels::exec::{Backend, Exec, Serial};
use forebay_runtime::cache::Eviction;
use forebay_runtime::drive::prefill;
use forebay_runtime::engine::{Engine, Output};
use forebay_runtime::model::record::Router;
use forebay_runtime::open::Image;
use forebay_runtime::plan::{MIN_UNITS, Plan};
use forebay_runtime::policy::Policy;
use forebay_storage::MemoryStore;
use proptest::prelude::*;

const TOKENS: [u32; 21] = [1, 201, 233, 49, 178, 216, 241, 223, 138, 7, 179, 61, 43, 46, 29, 47, 112, 265, 87, 89, 112];
/// Dense layers alone, with biases, beside experts, beside short convolutions, and with ReLU.
const CASES: [&str; 5] = ["llama-gqa-untied", "llama-bias-llama3rope-tied", "lfm2moe", "lfm2", "llama-relu"];

fn options(weights: WeightChoice) -> ConvertOptions {
    ConvertOptions { weights: Some(weights), unit_width: Some(32), page: 512, ..ConvertOptions::default() }
}

/// What calibrating an image of the case over a few made-up tokens gives.
fn neurons(case: &str, width: u32) -> NeuronPlan {
    let image = image_of(&fixtures().join(case), &options(WeightChoice::F32)).unwrap();
    let setup = Setup { batch: 32, ..Setup::default() };
    let arena = plan(&image, &setup).unwrap().total().next_multiple_of(4096) + (1 << 20);
    let mut memory = arena_memory(arena);
    let arena = arena_of(&mut memory, arena);
    let mut store = MemoryStore::new(&image);
    let opened = Image::open(&mut store, &arena, false).unwrap();
    let mut dense = BTreeMap::new();
    for l in 0..opened.model().layer_count() {
        let layer = opened.model().layer(l).unwrap();
        if layer.router == Router::All {
            // Whole units: the image has no neurons that do not exist.
            dense.insert(l as u16, vec![1.0; layer.units * layer.unit_width]);
        }
    }
    let settings = Settings { width, step: 1, scoring: Scoring::Linear };
    let mut calibration = Calibration::new(settings, opened.model().hidden(), dense);
    let limits = setup.limits(arena.len() as u64);
    let mut engine = Engine::new(&opened, Plan::new(&opened, limits).unwrap(), &arena, 4).unwrap();
    let exec = Exec { backend: Backend::detect(), workers: &Serial };
    for second in [false, true] {
        if second {
            calibration.begin_second();
        }
        for sequence in 0..8u32 {
            let tokens: Vec<u32> = (0..32).map(|t| (t * 37 + sequence * 11 + t * t * sequence) % 256).collect();
            engine.reset().unwrap();
            calibration.begin_sequence(tokens.len());
            prefill(&mut engine, &mut store, &exec, &tokens, Output::None, &mut calibration, |_, _| ()).unwrap();
        }
    }
    let (plan, reports) = calibration.finish().unwrap();
    for report in reports {
        for (oracle, other) in report.oracle.iter().zip(report.predictor).chain(report.oracle.iter().zip(report.mean)) {
            assert!(other <= oracle + 1e-9 && other > 0.0, "{report:?}");
        }
    }
    plan
}

fn clustered(case: &str, weights: WeightChoice) -> Vec<u8> {
    clustered_by(case, weights, 32)
}

fn clustered_by(case: &str, weights: WeightChoice, width: u32) -> Vec<u8> {
    let neurons = Some(Arc::new(neurons(case, width)));
    let options = ConvertOptions { neurons, unit_width: None, ..options(weights) };
    image_of(&fixtures().join(case), &options).unwrap()
}

fn keeping(share: f32) -> Setup {
    Setup { policy: Policy { neurons_kept: share, ..Policy::default() }, ..Setup::default() }
}

fn bits(run: &Run) -> Vec<u32> {
    run.logits.iter().map(|x| x.to_bits()).collect()
}

/// In f32 only the order of sums differs.
#[test]
fn neurons_in_another_order_are_the_same_model() {
    for case in CASES {
        let plain = image_of(&fixtures().join(case), &options(WeightChoice::F32)).unwrap();
        let plain = run(&plain, &Setup::default(), &TOKENS).unwrap();
        // Their 160 neurons fill clusters of 32, but not of 64.
        for width in [32, 64] {
            let permuted = run(&clustered_by(case, WeightChoice::F32, width), &Setup::default(), &TOKENS).unwrap();
            let vocab = plain.logits.len() / TOKENS.len();
            let worst = plain.logits.iter().zip(&permuted.logits).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst > 0.0 && worst < 1e-4, "{case}: {worst}");
            for (a, b) in plain.logits.chunks_exact(vocab).zip(permuted.logits.chunks_exact(vocab)) {
                assert_eq!(argmax(a), argmax(b), "{case}");
            }
        }
    }
}

/// With all clusters the bits are those of everything in memory, whatever the pool; a share of 1 is all of them.
#[test]
fn all_clusters_are_exact() {
    for case in CASES {
        for weights in [WeightChoice::F32, WeightChoice::Q4] {
            let image = clustered(case, weights);
            let whole = run(&image, &Setup::default(), &TOKENS).unwrap();
            assert_eq!(whole.stats.cluster_all, 0, "{case}: something was predicted");
            let plan = plan(&image, &Setup::default()).unwrap();
            for arena in [plan.least, plan.least + 8192, (plan.least + plan.total()) / 2 / 4096 * 4096] {
                for batch in [1, 16] {
                    let got = run(&image, &Setup { arena: Some(arena), batch, ..Setup::default() }, &TOKENS);
                    assert_eq!(bits(&got.unwrap()), bits(&whole), "{case}, arena {arena}, batch {batch}");
                }
            }
        }
    }
}

/// What is left out depends on image, tokens and share alone.
#[test]
fn a_share_has_the_same_bits_everywhere() {
    for case in CASES {
        let image = clustered(case, WeightChoice::Q4);
        let exact = bits(&run(&image, &Setup::default(), &TOKENS).unwrap());
        let want = run(&image, &Setup { backend: Some("scalar"), batch: 1, ..keeping(0.5) }, &TOKENS).unwrap();
        assert_ne!(bits(&want), exact, "{case}: nothing was left out");
        let used = want.stats.cluster_uses as f64 / want.stats.cluster_all as f64;
        assert!((0.2..0.8).contains(&used), "{case}: {used}");
        let least = plan(&image, &keeping(0.5)).unwrap().least;
        for backend in Backend::all() {
            for (workers, batch, arena) in [(1, 1, Some(least)), (2, 16, None), (3, 5, Some(least + 16384))] {
                let setup = Setup { backend: Some(backend.name()), workers, batch, ..keeping(0.5) };
                let arena = arena.map(|arena| arena.max(plan(&image, &setup).unwrap().least));
                let got = run(&image, &Setup { arena, ..setup }, &TOKENS).unwrap();
                assert_eq!(bits(&got), bits(&want), "{case}, {}, {workers} workers, batch {batch}", backend.name());
                assert_eq!(got.stats.cluster_uses, want.stats.cluster_uses, "{case}");
            }
        }
    }
}

/// A ReLU model's neurons are zero or not: calibration finds those that are above zero together, and the predictor leaves
/// out clusters of zeros before others.
#[test]
fn relu_models_leave_out_what_is_zero() {
    // The fixture's neurons are in five groups of 32 that are active together, scattered over the layer.
    let scattered = image_of(&fixtures().join("llama-relu"), &options(WeightChoice::F32)).unwrap();
    let scattered = run(&scattered, &Setup::default(), &TOKENS).unwrap();
    let live = |run: &Run| run.stats.relu_live_units as f64 / run.stats.relu_units as f64;
    let neurons = scattered.stats.relu_live as f64 / scattered.stats.relu_neurons as f64;
    assert!(live(&scattered) > 0.95 && neurons < 0.65, "{:?}", scattered.stats);
    let image = clustered("llama-relu", WeightChoice::F32);
    let whole = run(&image, &Setup::default(), &TOKENS).unwrap();
    let share = live(&whole);
    assert!(share < 0.9, "{share} of the clusters have a neuron above zero: the groups were not found");
    let near = run(&image, &keeping(0.8), &TOKENS).unwrap();
    let half = run(&image, &keeping(0.5), &TOKENS).unwrap();
    assert!(near.stats.cluster_uses < near.stats.cluster_all * 9 / 10);
    // What is zero is left out before what is not.
    assert!(live(&near) > share + 0.05 && live(&half) > share + 0.1, "{} and {}", live(&near), live(&half));
    let error = |run: &Run| difference(&run.logits, &whole.logits).0;
    assert!(error(&near) * 2.0 < error(&half), "{} against {}", error(&near), error(&half));
    // Models with SiLU have no such zeros, and are not counted.
    assert_eq!(run(&clustered("lfm2", WeightChoice::F32), &Setup::default(), &TOKENS).unwrap().stats.relu_units, 0);
}

/// A fixed region changes what is read, and no bit of the result: with all clusters, whatever the share, the pool, the
/// policy of the rest and the batch; with some of them left out as well.
#[test]
fn pinned_clusters_are_exact() {
    for case in ["llama-gqa-untied", "lfm2moe"] {
        let image = clustered(case, WeightChoice::Q4);
        for kept in [1.0, 0.5] {
            let want = run(&image, &keeping(kept), &TOKENS).unwrap();
            for pinned in [0.1, 0.5, 0.9, 1.0] {
                for (eviction, batch) in [(Eviction::Lru, 1), (Eviction::Lfu, 1), (Eviction::S3Fifo, 5)] {
                    let policy = Policy { neurons_kept: kept, pinned, eviction, ..Policy::default() };
                    let setup = Setup { policy, batch, ..Setup::default() };
                    let whole = plan(&image, &setup).unwrap();
                    for arena in [whole.least, (whole.least + whole.total()) / 2 / 4096 * 4096] {
                        let got = run(&image, &Setup { arena: Some(arena), ..setup.clone() }, &TOKENS).unwrap();
                        let what = format!("{case}, {kept} kept, {pinned} pinned, {eviction:?}, arena {arena}");
                        assert_eq!(bits(&got), bits(&want), "{what}");
                        let rest = got.plan.slots - got.plan.pinned_slots;
                        assert!(rest >= got.plan.slots.min(MIN_UNITS), "{what}: {rest} slots are left");
                    }
                }
            }
        }
    }
}

/// Where the least recently used unit is always the one that is needed next, a fixed region is read once and then hit.
#[test]
fn what_is_pinned_is_read_once() {
    let image = clustered("llama-gqa-untied", WeightChoice::Q4);
    let policy = |pinned| Policy { neurons_kept: 0.99, pinned, ..Policy::default() };
    let setup = |pinned| Setup { batch: 1, logit_rows: 1, policy: policy(pinned), ..Setup::default() };
    let whole = plan(&image, &setup(0.0)).unwrap();
    let arena = Some((whole.least + 6 * (whole.slot_len + 128)).next_multiple_of(4096));
    let counts = |pinned| run(&image, &Setup { arena, ..setup(pinned) }, &TOKENS).unwrap();
    let (none, most) = (counts(0.0), counts(1.0));
    let pinned = most.plan.pinned_slots as u64;
    assert!(pinned >= 3 && (most.plan.slots as u64) < whole.slots as u64, "{pinned} pinned");
    assert_eq!(none.plan.pinned_slots, 0);
    // Nearly every token uses every cluster: each of the pinned ones is a hit from the second use on.
    assert!(none.stats.hits < TOKENS.len() as u64, "{:?}", none.stats);
    assert!(most.stats.hits > pinned * (TOKENS.len() as u64 - 1) * 9 / 10, "{:?}", most.stats);
    assert!(most.stats.unit_bytes < none.stats.unit_bytes);
}

/// Token by token with a small pool, less is read the less is kept.
#[test]
fn what_is_left_out_is_not_read() {
    let image = clustered("llama-gqa-untied", WeightChoice::Q4);
    let arena = Some(plan(&image, &Setup { batch: 1, ..Setup::default() }).unwrap().least);
    let read = |share| run(&image, &Setup { batch: 1, arena, ..keeping(share) }, &TOKENS).unwrap().stats;
    let (all, half, none) = (read(1.0), read(0.5), read(0.0));
    assert!(half.unit_bytes * 4 < all.unit_bytes * 3, "{} of {} bytes", half.unit_bytes, all.unit_bytes);
    assert!(none.cluster_uses * 20 < none.cluster_all, "{none:?}");
}

/// A plan of another model is refused with what differs.
#[test]
fn a_plan_belongs_to_its_model() {
    let plan = neurons("llama-gqa-untied", 32);
    let convert = |plan: &NeuronPlan| {
        let neurons = Some(Arc::new(plan.clone()));
        let options = ConvertOptions { neurons, ..options(WeightChoice::Q4) };
        format!("{:#}", image_of(&fixtures().join("llama-gqa-untied"), &options).unwrap_err())
    };
    let mut other = plan.clone();
    other.hidden += 1;
    assert!(convert(&other).contains("of width"), "{}", convert(&other));
    let mut other = plan.clone();
    other.layers.pop_first();
    assert!(convert(&other).contains("layer 0"), "{}", convert(&other));
    let mut other = plan.clone();
    other.layers.insert(99, plan.layers[&0].clone());
    assert!(convert(&other).contains("layer 99"), "{}", convert(&other));
    let mut other = plan;
    other.width = 64;
    assert!(convert(&other).contains("64"), "{}", convert(&other));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, max_shrink_iters: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Tables of an image with predictors that have wrong numbers and right checksums.
    #[test]
    fn lying_predictors(
        edits in proptest::collection::vec((1usize..4, any::<proptest::sample::Index>(), any::<u8>()), 1..4),
    ) {
        static IMAGE: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
        let mut image = IMAGE.get_or_init(|| clustered("llama-gqa-untied", WeightChoice::Q4)).clone();
        let parts = parts(&image);
        for (part, index, value) in edits {
            let range = parts[part.min(parts.len() - 1)].1.clone();
            image[range.start + index.index(range.len())] ^= value | 1;
        }
        reseal(&mut image);
        const ARENA: u64 = 16 << 20;
        let setup = Setup { arena: Some(ARENA), ..keeping(0.5) };
        if let Err(error) = run(&image, &setup, &TOKENS[..5]) {
            prop_assert!(!error.to_string().contains("internal error"), "{error}");
        }
    }
}
