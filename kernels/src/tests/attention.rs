//! Attention against binary64, and every back-end against the definition.

use super::{Backwards, Rng, assert_same, executions, fastest, nmse};
use crate::attention::*;
use crate::exec::{Backend, Exec};
use crate::pack::f16;
use proptest::prelude::*;

struct Case {
    shape: KvShape,
    format: KvFormat,
    heads: usize,
    tokens: usize,
    pos0: usize,
    window: usize,
    keys: Vec<u8>,
    values: Vec<u8>,
    /// What the caches hold: `[position][kv_heads][head_dim]`.
    stored: [Vec<f32>; 2],
    q: Vec<f32>,
}

const SCALE: f32 = 0.23;

/// What a cache keeps of a head.
fn kept(format: KvFormat, x: &[f32]) -> Vec<f32> {
    match format {
        KvFormat::F32 => x.to_vec(),
        KvFormat::F16 => x.iter().map(|x| f16::from_f32(*x).to_f32()).collect(),
        KvFormat::Q8 => {
            let group = |x: &[f32]| {
                let scale = f16::from_f32(x.iter().fold(0.0, |max: f32, x| max.max(x.abs())) / 127.0).to_f32();
                let code = |x: &f32| (x * (1.0 / scale)).round_ties_even().clamp(-127.0, 127.0);
                x.iter().map(|x| if scale == 0.0 { 0.0 } else { code(x) * scale }).collect::<Vec<_>>()
            };
            x.chunks(32).flat_map(group).collect()
        }
    }
}

const FORMATS: [KvFormat; 3] = [KvFormat::F32, KvFormat::F16, KvFormat::Q8];

impl Case {
    fn new(rng: &mut Rng, shape: KvShape, format: KvFormat, group: usize, tokens: usize, window: usize) -> Self {
        let heads = shape.kv_heads * group;
        let pos0 = rng.below(shape.capacity - tokens + 1);
        // Positions that no token attends to hold NaN.
        let poison = vec![0xff; shape.bytes(format)];
        let (mut keys, mut values) = (poison.clone(), poison);
        let mut stored = [Vec::new(), Vec::new()];
        for pos in 0..pos0 + tokens {
            let [k, v] = [(); 2].map(|()| rng.normals(shape.kv_heads * shape.head_dim));
            store_keys(&fastest(), format, &shape, &mut keys, pos, &k);
            store_values(&fastest(), format, &shape, &mut values, pos, &v);
            for (x, stored) in [k, v].iter().zip(&mut stored) {
                x.chunks(shape.head_dim).for_each(|x| stored.extend(kept(format, x)));
            }
        }
        let q = rng.normals(tokens * heads * shape.head_dim);
        Self { shape, format, heads, tokens, pos0, window, keys, values, stored, q }
    }
    fn run(&self, exec: &Exec<'_>) -> Vec<f32> {
        let mut scratch = vec![f32::NAN; attention_scratch(&self.shape, self.heads, self.tokens, exec.workers.count())];
        let mut out = vec![f32::NAN; self.q.len()];
        attention(
            exec,
            self.format,
            &self.shape,
            &self.keys,
            &self.values,
            &self.q,
            self.heads,
            self.tokens,
            self.pos0,
            self.window,
            SCALE,
            &mut scratch,
            &mut out,
        );
        out
    }
    fn naive(&self) -> Vec<f64> {
        let dim = self.shape.head_dim;
        let mut out = Vec::new();
        for t in 0..self.tokens {
            for head in 0..self.heads {
                let q = &self.q[(t * self.heads + head) * dim..][..dim];
                let row = |which: usize, pos: usize| {
                    let kv_head = head * self.shape.kv_heads / self.heads;
                    &self.stored[which][(pos * self.shape.kv_heads + kv_head) * dim..][..dim]
                };
                let end = self.pos0 + t + 1;
                let start = if self.window == 0 { 0 } else { end.saturating_sub(self.window) };
                let score = |pos| q.iter().zip(row(0, pos)).map(|(a, b)| f64::from(a * b)).sum::<f64>();
                let e: Vec<f64> = (start..end).map(|pos| (score(pos) * f64::from(SCALE)).exp()).collect();
                let sum: f64 = e.iter().sum();
                out.extend(
                    (0..dim)
                        .map(|d| (start..end).map(|pos| e[pos - start] / sum * f64::from(row(1, pos)[d])).sum::<f64>()),
                );
            }
        }
        out
    }
    fn check(&self) {
        let want = self.run(&Exec { backend: Backend::scalar(), workers: &Backwards(1) });
        let error = nmse(&want, &self.naive());
        assert!(error < 1e-10, "{error:e}");
        executions(|exec| assert_same(&self.run(exec), &want, (exec, self.shape, self.heads, self.tokens)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn attention_is_right_and_the_same_everywhere(
        seed: u64, kv_heads in 1usize..4, group in 1usize..4, head_dim in 1usize..150,
        tokens in 1usize..7, more in 0usize..80, window in 0usize..40, format in 0usize..3, whole: bool,
    ) {
        let mut rng = Rng::new(seed);
        let head_dim = if whole { head_dim.next_multiple_of(32) } else { head_dim };
        let shape = KvShape { kv_heads, head_dim, capacity: tokens + more };
        Case::new(&mut rng, shape, FORMATS[format], group, tokens, window).check();
    }
}

#[test]
fn long_contexts_split_over_workers() {
    let mut rng = Rng::new(30);
    let shape = KvShape { kv_heads: 4, head_dim: 64, capacity: 400 };
    for format in FORMATS {
        let mut case = Case::new(&mut rng, shape, format, 2, 3, 0);
        case.check();
        case.window = 100;
        case.check();
    }
}

#[test]
fn long_prompts_are_split_by_tokens() {
    let mut rng = Rng::new(31);
    for (kv_heads, group, tokens, window) in [(1, 3, 67, 0), (2, 1, 131, 0), (2, 20, 9, 0), (3, 4, 50, 21)] {
        let shape = KvShape { kv_heads, head_dim: 32, capacity: tokens + 30 };
        for format in FORMATS {
            Case::new(&mut rng, shape, format, group, tokens, window).check();
        }
    }
}

/// Zeros of both signs, and values that overflow, in queries, keys and values.
#[test]
fn what_is_not_finite_stays_with_the_tokens_that_see_it() {
    let mut rng = Rng::new(32);
    let shape = KvShape { kv_heads: 2, head_dim: 64, capacity: 45 };
    for format in FORMATS {
        let mut case = Case::new(&mut rng, shape, format, 3, 6, 0);
        for (i, q) in case.q.iter_mut().enumerate() {
            *q = if i % 3 == 0 { -0.0 } else { 0.0 };
        }
        let zero = vec![0.0; 2 * 64];
        let nasty: Vec<f32> = (0..2 * 64).map(|_| rng.nasty()).collect();
        for pos in 0..case.pos0 + 6 {
            store_keys(&fastest(), format, &shape, &mut case.keys, pos, &zero);
        }
        let last = case.pos0 + 5;
        store_values(&fastest(), format, &shape, &mut case.values, last, &nasty);
        let want = case.run(&Exec { backend: Backend::scalar(), workers: &Backwards(1) });
        assert!(want[..5 * 6 * 64].iter().all(|x| x.is_finite()) && want[5 * 6 * 64..].iter().any(|x| !x.is_finite()));
        executions(|exec| assert_same(&case.run(exec), &want, (exec, format)));
        store_keys(&fastest(), format, &shape, &mut case.keys, last, &nasty);
        case.q.fill_with(|| rng.nasty());
        let want = case.run(&Exec { backend: Backend::scalar(), workers: &Backwards(1) });
        executions(|exec| assert_same(&case.run(exec), &want, (exec, format)));
    }
}

#[test]
fn eight_bits_keep_a_head_or_say_that_it_is_not_finite() {
    let shape = KvShape { kv_heads: 1, head_dim: 40, capacity: 1 };
    let keep = |x: &[f32]| {
        let mut cache = vec![0x5a; shape.bytes(KvFormat::Q8)];
        store_values(&fastest(), KvFormat::Q8, &shape, &mut cache, 0, x);
        let mut scratch = vec![0.0; attention_scratch(&shape, 1, 1, 1)];
        let mut out = vec![7.0; 40];
        let exec = Exec { backend: Backend::scalar(), workers: &Backwards(1) };
        let q = [0.0; 40];
        let keys = vec![0; cache.len()];
        attention(&exec, KvFormat::Q8, &shape, &keys, &cache, &q, 1, 1, 0, 0, 1.0, &mut scratch, &mut out);
        out
    };
    let x: Vec<f32> = (0..40).map(|i| (i as f32 - 11.0) * 0.37).collect();
    for (got, want) in keep(&x).iter().zip(&x) {
        assert!((got - want).abs() <= 0.5 * 28.0 * 0.37 / 127.0 * 1.001, "{got} {want}");
    }
    assert!(keep(&[0.0; 40]).iter().all(|x| *x == 0.0));
    assert!(keep(&[1e-9; 40]).iter().all(|x| *x == 0.0));
    for bad in [f32::NAN, f32::INFINITY, 1e30] {
        let mut x = x.clone();
        x[35] = bad;
        let kept = keep(&x);
        assert!(kept[..32].iter().all(|x| x.is_finite()) && kept[32..].iter().all(|x| x.is_nan()));
    }
}

#[test]
#[should_panic(expected = "outside the cache")]
fn a_position_outside_the_cache_is_refused() {
    let shape = KvShape { kv_heads: 1, head_dim: 2, capacity: 3 };
    store_keys(&fastest(), KvFormat::F16, &shape, &mut vec![0; shape.bytes(KvFormat::F16)], 3, &[0.0; 2]);
}
