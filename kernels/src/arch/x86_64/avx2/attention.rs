//! Attention's sums. A vector holds half of a block's positions of one element of their keys, or 8 elements of a
//! position's values.

use super::AHEAD;
use super::float::{BF16, F16, F32, load8};
use crate::arch::Float;
use crate::reference::attention::{POSITIONS, mix_from};
use crate::reference::float::PARTIALS;
use crate::reference::kv8;
use core::arch::x86_64::*;

#[target_feature(enable = "avx2,f16c")]
pub(super) fn widen(format: Float, stored: &[u8], out: &mut [f32]) {
    match format {
        Float::F32 => widen_of::<F32>(format, stored, out),
        Float::F16 => widen_of::<F16>(format, stored, out),
        Float::Bf16 => widen_of::<BF16>(format, stored, out),
    }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn widen_of<const FORMAT: u8>(format: Float, stored: &[u8], out: &mut [f32]) {
    let (eights, rest) = out.as_chunks_mut::<8>();
    let (stored, stored_rest) = stored.split_at(8 * format.bytes() * eights.len());
    for (stored, out) in stored.chunks_exact(8 * format.bytes()).zip(eights) {
        _mm_prefetch::<_MM_HINT_T0>(stored.as_ptr().wrapping_add(AHEAD).cast());
        // SAFETY: `stored` and `out` have 8 elements.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), load8::<FORMAT>(stored.as_ptr())) };
    }
    format.to_f32(stored_rest, rest);
}

#[target_feature(enable = "avx2")]
pub(super) fn widen_keys_q8(block: &[u8], out: &mut [f32]) {
    kv8::widen_keys(block, out);
}
#[target_feature(enable = "avx2")]
pub(super) fn widen_values_q8(rows: &[u8], dim: usize, out: &mut [f32]) {
    kv8::widen_values(rows, dim, out);
}

#[target_feature(enable = "avx2,f16c")]
pub(super) fn scores(keys: &[f32], q: &[f32], scale: f32, scores: &mut [f32], stride: usize) {
    const { assert!(POSITIONS == 16 && PARTIALS == 16) };
    let dim = keys.len() / POSITIONS;
    for (q, scores) in q.chunks_exact(dim).zip(scores.chunks_mut(stride)) {
        let scores = &mut scores[..POSITIONS];
        // SAFETY: `keys` are `dim` times 16 elements, and `q` has `dim`.
        let sums = unsafe {
            match dim {
                64 => all::<64>(keys.as_ptr(), dim, q.as_ptr(), 0),
                128 => all::<128>(keys.as_ptr(), dim, q.as_ptr(), 0),
                _ => all::<0>(keys.as_ptr(), dim, q.as_ptr(), 0),
            }
        };
        for (scores, sum) in scores.as_chunks_mut::<8>().0.iter_mut().zip(sums) {
            // Partial sums here begin with a product instead of 0, and can be -0 where the definition's are +0; this is
            // where that would be seen.
            let sum = _mm256_mul_ps(_mm256_add_ps(sum, _mm256_setzero_ps()), _mm256_set1_ps(scale));
            // SAFETY: `scores` has 8 elements.
            unsafe { _mm256_storeu_ps(scores.as_mut_ptr(), sum) };
        }
    }
}

/// Partial sum `i` of every position. Both halves of a block take an element of the query as soon as it is loaded; a
/// second head would need more registers than there are.
///
/// # Safety
/// `keys` heads `[dim][16]` elements, `q` `dim`; `DIM` is 0 or `dim`.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn partial<const DIM: usize>(keys: *const f32, dim: usize, q: *const f32, i: usize) -> [__m256; 2] {
    let dim = if DIM > 0 { DIM } else { dim };
    let mut sums = [_mm256_setzero_ps(); 2];
    let mut d = i;
    while d < dim {
        // SAFETY: `d < dim`.
        let q = _mm256_set1_ps(unsafe { *q.add(d) });
        for (half, sum) in sums.iter_mut().enumerate() {
            // SAFETY: as above.
            let product = _mm256_mul_ps(q, unsafe { _mm256_loadu_ps(keys.add(16 * d + 8 * half)) });
            *sum = if d == i { product } else { _mm256_add_ps(*sum, product) };
        }
        d += PARTIALS;
    }
    sums
}

/// The sums of a half: partial sums `i`, `i + N`, ... folded as the definition folds all 16.
macro_rules! half {
    ($name:ident, $below:ident, $distance:literal) => {
        /// # Safety
        /// As [`partial`].
        #[inline]
        #[target_feature(enable = "avx2,f16c")]
        unsafe fn $name<const DIM: usize>(keys: *const f32, dim: usize, q: *const f32, i: usize) -> [__m256; 2] {
            // SAFETY: the caller's promise.
            unsafe {
                let mut low = $below::<DIM>(keys, dim, q, i);
                let high = $below::<DIM>(keys, dim, q, i + $distance);
                for (low, high) in low.iter_mut().zip(high) {
                    *low = _mm256_add_ps(*low, high);
                }
                low
            }
        }
    };
}
half!(eighth, partial, 8);
half!(quarter, eighth, 4);
half!(second, quarter, 2);
half!(all, second, 1);

#[target_feature(enable = "avx2,f16c")]
pub(super) fn mix(values: &[f32], dim: usize, weights: &[f32], stride: usize, out: &mut [f32]) {
    let (heads, positions) = (out.len() / dim, values.len() / dim);
    assert!(heads == 0 || positions == 0 || weights.len() >= (heads - 1) * stride + positions);
    let mut head = 0;
    while head < heads {
        let (weights, out) = (&weights[head * stride..], &mut out[head * dim..]);
        head += match heads - head {
            1 => mix_of::<1>(values, dim, weights, stride, out),
            _ => mix_of::<2>(values, dim, weights, stride, out),
        };
    }
}

/// The values of `H` heads; returns how many they are.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn mix_of<const H: usize>(values: &[f32], dim: usize, weights: &[f32], stride: usize, out: &mut [f32]) -> usize {
    let positions = values.len() / dim;
    assert!(out.len() >= H * dim && (positions == 0 || weights.len() >= (H - 1) * stride + positions));
    let (whole, mut at) = (dim / 8 * 8, 0);
    // SAFETY: columns `at` and following are inside `dim`, and all else is checked above.
    unsafe {
        while at + 32 <= whole {
            columns::<H, 4>(values, dim, positions, weights, stride, out, at);
            at += 32;
        }
        while at < whole {
            columns::<H, 1>(values, dim, positions, weights, stride, out, at);
            at += 8;
        }
    }
    mix_from(whole, values, dim, weights, stride, &mut out[..H * dim]);
    H
}

/// `8 * V` columns from `at` on.
///
/// # Safety
/// `values` heads `[positions][dim]` elements, `weights` `positions` and, `stride` on, as many for each of `H` heads,
/// `out` `[H][dim]`; the columns are inside `dim`.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn columns<const H: usize, const V: usize>(
    values: &[f32],
    dim: usize,
    positions: usize,
    weights: &[f32],
    stride: usize,
    out: &mut [f32],
    at: usize,
) {
    let (values, weights, out) = (values.as_ptr(), weights.as_ptr(), out.as_mut_ptr());
    let mut sums = [[_mm256_setzero_ps(); V]; H];
    // SAFETY: the caller's promise.
    unsafe {
        for (h, sums) in sums.iter_mut().enumerate() {
            for (v, sum) in sums.iter_mut().enumerate() {
                *sum = _mm256_loadu_ps(out.add(h * dim + at + 8 * v));
            }
        }
        for j in 0..positions {
            let mut value = [_mm256_setzero_ps(); V];
            for (v, value) in value.iter_mut().enumerate() {
                *value = _mm256_loadu_ps(values.add(j * dim + at + 8 * v));
            }
            for (h, sums) in sums.iter_mut().enumerate() {
                let w = _mm256_set1_ps(*weights.add(h * stride + j));
                for (sum, value) in sums.iter_mut().zip(value) {
                    *sum = _mm256_add_ps(*sum, _mm256_mul_ps(w, value));
                }
            }
        }
        for (h, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                _mm256_storeu_ps(out.add(h * dim + at + 8 * v), *sum);
            }
        }
    }
}
