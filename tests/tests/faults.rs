//! A device that fails: the run gives the right logits or a clear error, never wrong ones.

use forebay::convert::{ConvertOptions, WeightChoice};
use forebay_conformance::{Setup, arena_memory, arena_of, fixtures, image_of, plan, run, run_on};
use forebay_runtime::policy::{Loading, Policy, Thresholds};
use forebay_storage::MemoryStore;
use forebay_storage::layers::{FaultPlan, Faulty};

const TOKENS: [u32; 6] = [1, 201, 233, 49, 178, 216];
const RUNS: u64 = 10_000;

/// What became of a policy's runs.
#[derive(Debug, Default)]
struct Tally {
    right: u64,
    replaced: u64,
    failed: u64,
    retries: u64,
}

#[test]
fn seeded_fault_campaign() {
    let options = ConvertOptions { weights: Some(WeightChoice::Q4), page: 512, ..ConvertOptions::default() };
    let image = image_of(&fixtures().join("lfm2moe"), &options).unwrap();
    // With these thresholds `miss` reads all that `exact` does: its logits differ only where an expert was replaced.
    let everything = Thresholds { full: 1.0, low: 1.0, low_levels: 1 };
    let half = Thresholds { full: 0.2, low: 0.8, low_levels: 1 };
    for loading in [Loading::Exact, Loading::Scored(half), Loading::Miss(everything)] {
        let setup = |seed: u64| Setup {
            // One token after another, or all at once; one read at a time, or several.
            batch: [1, 16][(seed / 3 % 2) as usize],
            queue_depth: [1, 4, 8][(seed / 6 % 3) as usize],
            policy: Policy { loading, prefetch: (seed / 18 % 2) as u8, ..Policy::default() },
            ..Setup::default()
        };
        let want = run(&image, &setup(0), &TOKENS).unwrap();
        let mut tally = Tally::default();
        for seed in 0..RUNS {
            let setup = setup(seed);
            // The least pool, or one that holds about half of the units.
            let whole = plan(&image, &setup).unwrap();
            let bytes = [whole.least, (whole.least + whole.total()) / 2][(seed / 36 % 2) as usize];
            let bytes = bytes.next_multiple_of(4096);
            let mut memory = arena_memory(bytes);
            let arena = arena_of(&mut memory, bytes);
            // From rare faults that retries mend to a device that dies.
            let rate = [500, 5_000, 50_000][(seed % 3) as usize];
            let faults = FaultPlan {
                seed,
                device_error_ppm: rate,
                short_ppm: rate,
                flip_ppm: rate,
                stuck_ppm: rate,
                stuck_polls: 20,
                power_off_after: (seed % 7 == 0).then_some(seed * 997 % (2 * image.len() as u64)),
            };
            let mut store = Faulty::new(MemoryStore::new(&image), faults);
            let what = || format!("{}, seed {seed}", loading.name());
            match run_on(&mut store, &arena, &setup, &TOKENS) {
                Ok(got) => {
                    let same = got.logits.iter().zip(&want.logits).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert_eq!(got.logits.len(), want.logits.len(), "{}", what());
                    assert!(got.logits.iter().all(|x| x.is_finite()), "{}", what());
                    assert!(same || got.stats.replaced > 0, "{}: wrong logits, and nothing says so", what());
                    assert!(got.stats.replaced == 0 || matches!(loading, Loading::Miss(_)), "{}", what());
                    tally.right += u64::from(same);
                    tally.replaced += u64::from(got.stats.replaced > 0);
                    tally.retries += got.stats.retries;
                }
                Err(error) => {
                    let message = error.to_string();
                    assert!(!message.contains("internal error"), "{}: {message}", what());
                    tally.failed += 1;
                }
            }
        }
        println!("{}: {tally:?}", loading.name());
        assert!(tally.right > RUNS / 10 && tally.failed > RUNS / 10 && tally.retries > RUNS / 20, "{tally:?}");
        assert!(tally.replaced > RUNS / 100 || !matches!(loading, Loading::Miss(_)), "{tally:?}");
    }
}
