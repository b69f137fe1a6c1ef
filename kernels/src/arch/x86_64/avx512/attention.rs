//! Attention's sums. A vector holds a block's 16 positions of one element of their keys, or 16 elements of a position's
//! values; a tile of heads shares what is loaded.

use super::AHEAD;
use super::float::{BF16, F16, F32, load16};
use crate::arch::Float;
use crate::reference::attention::{POSITIONS, mix_from};
use crate::reference::float::PARTIALS;
use crate::reference::kv8;
use core::arch::x86_64::*;

#[target_feature(enable = "avx512f")]
pub(super) fn widen(format: Float, stored: &[u8], out: &mut [f32]) {
    match format {
        Float::F32 => widen_of::<F32>(format, stored, out),
        Float::F16 => widen_of::<F16>(format, stored, out),
        Float::Bf16 => widen_of::<BF16>(format, stored, out),
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn widen_of<const FORMAT: u8>(format: Float, stored: &[u8], out: &mut [f32]) {
    let (sixteens, rest) = out.as_chunks_mut::<16>();
    let (stored, stored_rest) = stored.split_at(16 * format.bytes() * sixteens.len());
    for (stored, out) in stored.chunks_exact(16 * format.bytes()).zip(sixteens) {
        _mm_prefetch::<_MM_HINT_T0>(stored.as_ptr().wrapping_add(AHEAD).cast());
        // SAFETY: `stored` and `out` have 16 elements.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), load16::<FORMAT>(stored.as_ptr())) };
    }
    format.to_f32(stored_rest, rest);
}

#[target_feature(enable = "avx512dq,avx512vl")]
pub(super) fn widen_keys_q8(block: &[u8], out: &mut [f32]) {
    kv8::widen_keys(block, out);
}
#[target_feature(enable = "avx512dq,avx512vl")]
pub(super) fn widen_values_q8(rows: &[u8], dim: usize, out: &mut [f32]) {
    kv8::widen_values(rows, dim, out);
}

#[target_feature(enable = "avx512f")]
pub(super) fn scores(keys: &[f32], q: &[f32], scale: f32, scores: &mut [f32], stride: usize) {
    let dim = keys.len() / POSITIONS;
    let heads = q.len() / dim;
    assert!(heads == 0 || scores.len() >= (heads - 1) * stride + POSITIONS);
    let mut head = 0;
    while head < heads {
        let (q, scores) = (&q[head * dim..], &mut scores[head * stride..]);
        head += match heads - head {
            1 => scores_of::<1>(keys, dim, q, scale, scores, stride),
            2 => scores_of::<2>(keys, dim, q, scale, scores, stride),
            3 => scores_of::<3>(keys, dim, q, scale, scores, stride),
            _ => scores_of::<4>(keys, dim, q, scale, scores, stride),
        };
    }
}

/// The scores of `H` heads; returns how many they are.
#[inline]
#[target_feature(enable = "avx512f")]
fn scores_of<const H: usize>(
    keys: &[f32],
    dim: usize,
    q: &[f32],
    scale: f32,
    scores: &mut [f32],
    stride: usize,
) -> usize {
    const { assert!(POSITIONS == 16 && PARTIALS == 16) };
    assert!(keys.len() >= POSITIONS * dim && q.len() >= H * dim && scores.len() >= (H - 1) * stride + POSITIONS);
    // SAFETY: checked above.
    let sums = unsafe {
        match dim {
            64 => all::<H, 64>(keys.as_ptr(), dim, q.as_ptr(), 0),
            128 => all::<H, 128>(keys.as_ptr(), dim, q.as_ptr(), 0),
            _ => all::<H, 0>(keys.as_ptr(), dim, q.as_ptr(), 0),
        }
    };
    for (h, sum) in sums.into_iter().enumerate() {
        // Partial sums here begin with a product instead of 0, and can be -0 where the definition's are +0; this is
        // where that would be seen.
        let sum = _mm512_add_ps(sum, _mm512_setzero_ps());
        // SAFETY: checked above.
        unsafe { _mm512_storeu_ps(scores.as_mut_ptr().add(h * stride), _mm512_mul_ps(sum, _mm512_set1_ps(scale))) };
    }
    H
}

/// Partial sum `i` of every position, for `H` heads.
///
/// # Safety
/// `keys` heads `[dim][16]` elements, `q` `[H][dim]`; `DIM` is 0 or `dim`.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn partial<const H: usize, const DIM: usize>(
    keys: *const f32,
    dim: usize,
    q: *const f32,
    i: usize,
) -> [__m512; H] {
    let dim = if DIM > 0 { DIM } else { dim };
    let mut sums = [_mm512_setzero_ps(); H];
    let mut d = i;
    while d < dim {
        // SAFETY: `d < dim`.
        let key = unsafe { _mm512_loadu_ps(keys.add(16 * d)) };
        for (h, sum) in sums.iter_mut().enumerate() {
            // SAFETY: as above.
            let product = _mm512_mul_ps(key, _mm512_set1_ps(unsafe { *q.add(h * dim + d) }));
            *sum = if d == i { product } else { _mm512_add_ps(*sum, product) };
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
        #[target_feature(enable = "avx512f")]
        unsafe fn $name<const H: usize, const DIM: usize>(
            keys: *const f32,
            dim: usize,
            q: *const f32,
            i: usize,
        ) -> [__m512; H] {
            // SAFETY: the caller's promise.
            unsafe {
                let mut low = $below::<H, DIM>(keys, dim, q, i);
                let high = $below::<H, DIM>(keys, dim, q, i + $distance);
                for (low, high) in low.iter_mut().zip(high) {
                    *low = _mm512_add_ps(*low, high);
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

#[target_feature(enable = "avx512f")]
pub(super) fn mix(values: &[f32], dim: usize, weights: &[f32], stride: usize, out: &mut [f32]) {
    let (heads, positions) = (out.len() / dim, values.len() / dim);
    assert!(heads == 0 || positions == 0 || weights.len() >= (heads - 1) * stride + positions);
    let mut head = 0;
    while head < heads {
        let (weights, out) = (&weights[head * stride..], &mut out[head * dim..]);
        head += match heads - head {
            1 => mix_of::<1>(values, dim, weights, stride, out),
            2 => mix_of::<2>(values, dim, weights, stride, out),
            3 => mix_of::<3>(values, dim, weights, stride, out),
            _ => mix_of::<4>(values, dim, weights, stride, out),
        };
    }
}

/// The values of `H` heads; returns how many they are.
#[inline]
#[target_feature(enable = "avx512f")]
fn mix_of<const H: usize>(values: &[f32], dim: usize, weights: &[f32], stride: usize, out: &mut [f32]) -> usize {
    let positions = values.len() / dim;
    assert!(out.len() >= H * dim && (positions == 0 || weights.len() >= (H - 1) * stride + positions));
    let (whole, mut at) = (dim / 16 * 16, 0);
    // SAFETY: columns `at` and following are inside `dim`, and all else is checked above.
    unsafe {
        while at + 64 <= whole {
            columns::<H, 4>(values, dim, positions, weights, stride, out, at);
            at += 64;
        }
        while at < whole {
            columns::<H, 1>(values, dim, positions, weights, stride, out, at);
            at += 16;
        }
    }
    mix_from(whole, values, dim, weights, stride, &mut out[..H * dim]);
    H
}

/// `16 * V` columns from `at` on.
///
/// # Safety
/// `values` heads `[positions][dim]` elements, `weights` `positions` and, `stride` on, as many for each of `H` heads,
/// `out` `[H][dim]`; the columns are inside `dim`.
#[inline]
#[target_feature(enable = "avx512f")]
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
    let mut sums = [[_mm512_setzero_ps(); V]; H];
    // SAFETY: the caller's promise.
    unsafe {
        for (h, sums) in sums.iter_mut().enumerate() {
            for (v, sum) in sums.iter_mut().enumerate() {
                *sum = _mm512_loadu_ps(out.add(h * dim + at + 16 * v));
            }
        }
        for j in 0..positions {
            let mut value = [_mm512_setzero_ps(); V];
            for (v, value) in value.iter_mut().enumerate() {
                *value = _mm512_loadu_ps(values.add(j * dim + at + 16 * v));
            }
            for (h, sums) in sums.iter_mut().enumerate() {
                let w = _mm512_set1_ps(*weights.add(h * stride + j));
                for (sum, value) in sums.iter_mut().zip(value) {
                    *sum = _mm512_add_ps(*sum, _mm512_mul_ps(w, value));
                }
            }
        }
        for (h, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                _mm512_storeu_ps(out.add(h * dim + at + 16 * v), *sum);
            }
        }
    }
}
