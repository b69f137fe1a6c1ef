//! Attention's two sums, over keys and values of a few positions that have been converted to binary32.

use super::float::{PARTIALS, add_scaled};

/// Positions of a block of keys.
pub(crate) const POSITIONS: usize = 16;

/// `scores[h * stride + j]` = inner product of query `h` with the key of position `j`, times `scale`. `keys` is
/// `[dim][POSITIONS]`, `q` `[heads][dim]`.
#[inline(always)]
pub(crate) fn scores(keys: &[f32], q: &[f32], scale: f32, scores: &mut [f32], stride: usize) {
    let (keys, _) = keys.as_chunks::<POSITIONS>();
    for (q, scores) in q.chunks_exact(keys.len()).zip(scores.chunks_mut(stride)) {
        let mut p = [[0.0; POSITIONS]; PARTIALS];
        for (i, p) in p.iter_mut().enumerate() {
            for (key, q) in keys.iter().zip(q).skip(i).step_by(PARTIALS) {
                for (p, key) in p.iter_mut().zip(key) {
                    *p += q * key;
                }
            }
        }
        let mut n = PARTIALS / 2;
        while n > 0 {
            let (low, high) = p.split_at_mut(n);
            for (low, high) in low.as_flattened_mut().iter_mut().zip(high.as_flattened()) {
                *low += high;
            }
            n /= 2;
        }
        for (score, p) in scores.iter_mut().zip(&p[0]) {
            *score = p * scale;
        }
    }
}

/// `out[h] += weights[h * stride + j] * values[j]` for every position `j`, in their order. `values` is
/// `[positions][dim]`, `out` `[heads][dim]`.
#[inline(always)]
pub(crate) fn mix(values: &[f32], dim: usize, weights: &[f32], stride: usize, out: &mut [f32]) {
    mix_from(0, values, dim, weights, stride, out);
}

/// As [`mix`], of the elements from `first` on: what fills no vector of a back-end.
#[inline(always)]
pub(crate) fn mix_from(first: usize, values: &[f32], dim: usize, weights: &[f32], stride: usize, out: &mut [f32]) {
    if first == dim {
        return;
    }
    for (out, weights) in out.chunks_exact_mut(dim).zip(weights.chunks(stride)) {
        for (value, w) in values.chunks_exact(dim).zip(weights) {
            add_scaled(&mut out[first..], &value[first..], *w);
        }
    }
}
