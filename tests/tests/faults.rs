//! A device that fails: the run gives the right logits or a clear error, never wrong ones.

use forebay::convert::{ConvertOptions, WeightChoice};
use forebay_conformance::{Setup, arena_memory, arena_of, fixtures, image_of, plan, run, run_on};
use forebay_storage::MemoryStore;
use forebay_storage::layers::{FaultPlan, Faulty};

const TOKENS: [u32; 6] = [1, 201, 233, 49, 178, 216];

#[test]
fn seeded_fault_campaign() {
    let options = ConvertOptions { weights: Some(WeightChoice::Q4), page: 512, ..ConvertOptions::default() };
    let image = image_of(&fixtures().join("lfm2moe"), &options).unwrap();
    let setup = Setup::default();
    let want = run(&image, &setup, &TOKENS).unwrap();
    let bytes = plan(&image, &setup).unwrap().least;
    let (mut right, mut failed, mut retried) = (0, 0, 0);
    for seed in 0..2000u64 {
        let mut memory = arena_memory(bytes);
        let arena = arena_of(&mut memory, bytes);
        // From rare faults that retries mend to a device that dies.
        let rate = [500, 5_000, 50_000][(seed % 3) as usize];
        let plan = FaultPlan {
            seed,
            device_error_ppm: rate,
            short_ppm: rate,
            flip_ppm: rate,
            stuck_ppm: rate,
            stuck_polls: 20,
            power_off_after: (seed % 7 == 0).then_some(seed * 997 % (2 * image.len() as u64)),
        };
        let mut store = Faulty::new(MemoryStore::new(&image), plan);
        match run_on(&mut store, &arena, &setup, &TOKENS) {
            Ok(got) => {
                let same = got.logits.iter().zip(&want.logits).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same && got.logits.len() == want.logits.len(), "seed {seed}: wrong logits");
                right += 1;
                retried += got.stats.retries;
            }
            Err(error) => {
                let message = error.to_string();
                assert!(!message.contains("internal error"), "seed {seed}: {message}");
                failed += 1;
            }
        }
    }
    println!("{right} right, {failed} refused, {retried} reads tried again");
    assert!(right > 200 && failed > 200 && retried > 100, "{right} right, {failed} refused, {retried} retried");
}
