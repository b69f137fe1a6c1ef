//! What the pool is worth: how much is read again for every token.

use forebay::convert::{ConvertOptions, WeightChoice};
use forebay_conformance::{Run, Setup, fixtures, image_of, plan, run};

const TOKENS: u32 = 30;

/// Token by token, with a pool of about `share` of the units.
fn decode(case: &str, share: f64) -> (Run, u64) {
    let options = ConvertOptions { weights: Some(WeightChoice::Q4), unit_width: Some(32), ..ConvertOptions::default() };
    let image = image_of(&fixtures().join(case), &options).unwrap();
    let setup = Setup { batch: 1, logit_rows: 1, queue_depth: 2, ..Setup::default() };
    let whole = plan(&image, &setup).unwrap();
    let pool = (whole.slots as f64 * share) as u64 * (whole.slot_len + 64);
    let arena = (whole.total() - whole.pool + pool).max(whole.least).next_multiple_of(4096);
    let tokens: Vec<u32> = (0..TOKENS).map(|t| (t * 37 + 5) % 288).collect();
    (run(&image, &Setup { arena: Some(arena), ..setup }, &tokens).unwrap(), whole.slots as u64)
}

/// A dense layer's units are used in a known order: what fits the pool is read once, and only the rest for every
/// token. (Least recently used would read everything every time.)
#[test]
fn dense_models_read_only_what_does_not_fit() {
    for share in [0.25, 0.5, 0.75] {
        let (run, units) = decode("llama-gqa-untied", share);
        let slots = run.plan.slots as u64;
        assert!(slots > 2 && slots < units, "the pool holds {slots} of {units} units");
        let reads = run.stats.misses + run.stats.prefetched;
        // A layer's five units are wanted together, so up to as many slots change hands all the time.
        let least = units + u64::from(TOKENS - 1) * (units - slots);
        // After the last token the next one's first units are read ahead.
        let most = units + u64::from(TOKENS - 1) * (units - slots + 5).min(units) + 3;
        assert!((least..=most).contains(&reads), "{slots} of {units}: {reads} reads, expected {least} to {most}");
        assert_eq!(run.stats.unit_bytes, reads * run.plan.slot_len);
    }
}

/// Experts: a larger pool reads less, a pool that holds all of them reads each at most once, and the dense layers in
/// front of them, which every token needs, stay.
#[test]
fn experts_are_read_less_with_a_larger_pool() {
    let reads = |share| {
        let (run, units) = decode("lfm2moe", share);
        assert_eq!(
            run.stats.hits + run.stats.misses,
            run.choices.iter().map(|c| c.1.len() as u64).sum::<u64>() + u64::from(TOKENS) * (units - 24)
        );
        run.stats.misses + run.stats.prefetched
    };
    let counts = [0.5, 0.7, 0.9, 1.0].map(reads);
    assert!(counts.is_sorted_by(|a, b| a >= b) && counts[0] > 2 * counts[3], "{counts:?}");
    assert!(counts[3] <= 34, "{counts:?}");
}
