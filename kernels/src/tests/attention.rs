//! Attention against binary64, and every back-end against the definition.

use super::{Backwards, Rng, assert_same, executions, nmse};
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

impl Case {
    fn new(rng: &mut Rng, shape: KvShape, format: KvFormat, group: usize, tokens: usize, window: usize) -> Self {
        let heads = shape.kv_heads * group;
        let pos0 = rng.below(shape.capacity - tokens + 1);
        // Positions that no token attends to hold NaN.
        let poison = vec![0xff; shape.bytes(format)];
        let (mut keys, mut values) = (poison.clone(), poison);
        let mut stored = [Vec::new(), Vec::new()];
        for pos in 0..pos0 + tokens {
            for (cache, stored) in [&mut keys, &mut values].into_iter().zip(&mut stored) {
                let x = rng.normals(shape.kv_heads * shape.head_dim);
                kv_store(format, &shape, cache, pos, &x);
                let kept = |x: &f32| if format == KvFormat::F16 { f16::from_f32(*x).to_f32() } else { *x };
                stored.extend(x.iter().map(kept));
            }
        }
        let q = rng.normals(tokens * heads * shape.head_dim);
        Self { shape, format, heads, tokens, pos0, window, keys, values, stored, q }
    }
    fn run(&self, exec: &Exec<'_>) -> Vec<f32> {
        let mut scratch = vec![f32::NAN; attention_scratch(&self.shape, self.heads, exec.workers.count())];
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
        tokens in 1usize..7, more in 0usize..80, window in 0usize..40, half: bool,
    ) {
        let mut rng = Rng::new(seed);
        let shape = KvShape { kv_heads, head_dim, capacity: tokens + more };
        let format = if half { KvFormat::F16 } else { KvFormat::F32 };
        Case::new(&mut rng, shape, format, group, tokens, window).check();
    }
}

#[test]
fn long_contexts_split_over_workers() {
    let mut rng = Rng::new(30);
    let shape = KvShape { kv_heads: 4, head_dim: 64, capacity: 400 };
    for format in [KvFormat::F16, KvFormat::F32] {
        let mut case = Case::new(&mut rng, shape, format, 2, 3, 0);
        case.check();
        case.window = 100;
        case.check();
    }
}

#[test]
#[should_panic(expected = "outside the cache")]
fn a_position_outside_the_cache_is_refused() {
    let shape = KvShape { kv_heads: 1, head_dim: 2, capacity: 3 };
    kv_store(KvFormat::F16, &shape, &mut [0; 12], 3, &[0.0; 2]);
}
