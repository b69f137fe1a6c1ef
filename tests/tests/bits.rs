//! The same bits, whatever the arena, batch, threads, back-end, store and order of completion.

use forebay::convert::{ConvertOptions, WeightChoice};
use forebay_conformance::{Run, Setup, arena_memory, arena_of, fixtures, image_of, plan, run, run_mapped, run_on};
use forebay_kernels::attention::KvFormat;
use forebay_kernels::exec::Backend;
use forebay_runtime::policy::Choice;
use forebay_storage::layers::{DeviceProfile, Reordered, StdClock, Throttled};
use forebay_storage::{FileStore, MemoryStore};
use proptest::prelude::*;

const TOKENS: [u32; 21] = [1, 201, 233, 49, 178, 216, 241, 223, 138, 7, 179, 61, 43, 46, 29, 47, 112, 265, 87, 89, 112];

fn image(case: &str, weights: WeightChoice) -> Vec<u8> {
    // Narrow clusters and small pages, so that even these models have many units to stream.
    let options =
        ConvertOptions { weights: Some(weights), unit_width: Some(32), page: 512, ..ConvertOptions::default() };
    image_of(&fixtures().join(case), &options).unwrap()
}

fn images() -> Vec<(String, Vec<u8>)> {
    let mut list = Vec::new();
    for case in ["lfm2moe", "lfm2-convbias-L4-untied", "llama-gqa-untied"] {
        for weights in [
            WeightChoice::F32,
            WeightChoice::F16,
            WeightChoice::Q8,
            WeightChoice::Q4,
            WeightChoice::Q3,
            WeightChoice::Q2,
            WeightChoice::Q1,
        ] {
            list.push((format!("{case} {weights:?}"), image(case, weights)));
        }
    }
    list
}

fn assert_same(what: &str, a: &Run, b: &Run) {
    assert_eq!(a.logits.len(), b.logits.len(), "{what}");
    let differ = a.logits.iter().zip(&b.logits).filter(|(x, y)| x.to_bits() != y.to_bits()).count();
    assert_eq!(differ, 0, "{what}: {differ} of {} logits differ", a.logits.len());
    let routes = |run: &Run| -> Vec<_> {
        let choices = |c: &[Choice]| c.iter().map(|c| (c.unit, c.levels, c.weight.to_bits())).collect::<Vec<_>>();
        run.choices.iter().map(|(layer, c)| (*layer, choices(c))).collect()
    };
    assert_eq!(routes(a), routes(b), "{what}: routing");
}

/// The smallest arena that is accepted really works, one page less is refused with its exact number, and the
/// bits are those of the whole model in memory.
#[test]
fn every_arena_from_the_least_on() {
    for (name, image) in images() {
        let whole = run(&image, &Setup::default(), &TOKENS).unwrap();
        let plan = plan(&image, &Setup::default()).unwrap();
        let units = plan.slots;
        assert!(whole.stats.misses + whole.stats.prefetched <= units as u64, "{name}: a unit was read twice");
        let refused = run(&image, &Setup { arena: Some(plan.least - 4096), ..Setup::default() }, &TOKENS);
        let message = refused.unwrap_err().to_string();
        assert!(message.contains(&plan.least.to_string()), "{name}: {message}");
        for arena in [plan.least, plan.least + 8192, (plan.least + plan.total()) / 2 / 4096 * 4096] {
            let small = run(&image, &Setup { arena: Some(arena), ..Setup::default() }, &TOKENS).unwrap();
            assert_same(&format!("{name}, arena {arena}"), &whole, &small);
            assert!(small.plan.total() <= arena);
        }
        let least = run(&image, &Setup { arena: Some(plan.least), ..Setup::default() }, &TOKENS).unwrap();
        assert!(least.stats.unit_bytes > whole.stats.unit_bytes, "{name}: nothing was streamed twice");
    }
}

/// Every back-end of this machine, alone and in company, with keys and values of every format.
#[test]
fn every_back_end_and_thread_count() {
    for (name, image) in images() {
        for kv in [KvFormat::F32, KvFormat::F16, KvFormat::Q8] {
            let scalar = Setup { backend: Some("scalar"), batch: 1, kv, ..Setup::default() };
            let want = run(&image, &scalar, &TOKENS).unwrap();
            for backend in Backend::all() {
                for (workers, batch) in [(1, 1), (2, 16), (3, 5)] {
                    let setup = Setup { backend: Some(backend.name()), workers, batch, kv, ..Setup::default() };
                    let got = run(&image, &setup, &TOKENS).unwrap();
                    assert_same(&format!("{name}, {}, {workers} workers, batch {batch}", backend.name()), &want, &got);
                }
            }
        }
    }
}

/// A file read directly, through the page cache, and through a throttled device.
#[test]
fn every_store() {
    let image = image_of(
        &fixtures().join("lfm2moe"),
        &ConvertOptions { weights: Some(WeightChoice::Q4), ..ConvertOptions::default() },
    )
    .unwrap();
    let want = run(&image, &Setup::default(), &TOKENS).unwrap();
    let least = plan(&image, &Setup::default()).unwrap().least;
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("model.fby");
    std::fs::write(&path, &image).unwrap();
    for arena in [least, least + (1 << 20)] {
        let mut memory = arena_memory(arena);
        std::thread::scope(|scope| {
            let arena = arena_of(&mut memory, arena);
            let mut store = FileStore::open_in(scope, &path, 4).unwrap();
            let got = run_on(&mut store, &arena, &Setup::default(), &TOKENS).unwrap();
            assert_same("file store", &want, &got);
        });
        std::thread::scope(|scope| {
            let arena = arena_of(&mut memory, arena);
            let store = FileStore::open_in(scope, &path, 4).unwrap();
            let profile: DeviceProfile = "bw=200MB/s,lat=50us,qd=4".parse().unwrap();
            let mut store = Throttled::new(store, profile, StdClock::new());
            let got = run_on(&mut store, &arena, &Setup::default(), &TOKENS).unwrap();
            assert_same("throttled file store", &want, &got);
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    /// Reads that complete in any order, with any depth, batch and arena.
    #[test]
    fn any_order_of_completion(
        seed: u64,
        case in 0usize..3,
        extra in 0u64..40,
        batch in 1usize..22,
        depth in 1usize..9,
        logit_rows in 1usize..5,
        count in 1usize..22,
    ) {
        static IMAGES: std::sync::OnceLock<Vec<(Vec<u8>, Run)>> = std::sync::OnceLock::new();
        let images = IMAGES.get_or_init(|| {
            ["lfm2moe", "lfm2-convbias-L4-untied", "llama-gqa-untied"].map(|case| {
                let image = image(case, WeightChoice::Q4);
                let want = run(&image, &Setup::default(), &TOKENS).unwrap();
                (image, want)
            }).into()
        });
        let (image, want) = &images[case];
        let setup = Setup { batch, queue_depth: depth, logit_rows, ..Setup::default() };
        let least = plan(image, &setup).unwrap().least;
        let bytes = least + extra * 4096;
        let mut memory = arena_memory(bytes);
        let arena = arena_of(&mut memory, bytes);
        let mut store = Reordered::new(MemoryStore::with_depth(image, depth as u16), seed);
        let got = run_on(&mut store, &arena, &setup, &TOKENS[..count]).unwrap();
        let same = got.logits.iter().zip(&want.logits).all(|(a, b)| a.to_bits() == b.to_bits());
        prop_assert!(same && got.logits.len() * TOKENS.len() == want.logits.len() * count);
    }
}

/// An image in memory that can be read where it is takes no memory for weights, reads nothing, and has the same bits;
/// the least arena is exact here too.
#[test]
fn a_mapped_image_is_used_where_it_is() {
    for (name, image) in images() {
        let want = run(&image, &Setup::default(), &TOKENS).unwrap();
        let got = run_mapped(&image, &Setup::default(), &TOKENS).unwrap();
        assert_same(&name, &got, &want);
        assert_eq!((got.plan.tables, got.plan.resident, got.plan.pool), (0, 0, 0), "{name}");
        assert_eq!((got.stats.unit_bytes, got.stats.resident_bytes, got.stats.misses), (0, 0, 0), "{name}");
        let least = Setup { arena: Some(got.plan.least), ..Setup::default() };
        assert_same(&name, &run_mapped(&image, &least, &TOKENS).unwrap(), &want);
        let less = Setup { arena: Some(got.plan.least - 4096), ..Setup::default() };
        let refused = run_mapped(&image, &less, &TOKENS).unwrap_err().to_string();
        assert!(refused.contains(&got.plan.least.to_string()), "{name}: {refused}");
    }
}
