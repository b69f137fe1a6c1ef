//! Attention's sums in NEON. A vector holds 4 positions of one element of their keys, or 4 elements of a position's
//! values; two heads share what is loaded.

use super::neon::{BF16, F16, F32, load4};
use crate::arch::Float;
use crate::reference::attention::{POSITIONS, mix_from};
use crate::reference::float::PARTIALS;
use core::arch::aarch64::*;

pub(super) fn widen(format: Float, stored: &[u8], out: &mut [f32]) {
    match format {
        Float::F32 => widen_of::<F32>(format, stored, out),
        Float::F16 => widen_of::<F16>(format, stored, out),
        Float::Bf16 => widen_of::<BF16>(format, stored, out),
    }
}

#[inline(always)]
fn widen_of<const FORMAT: u8>(format: Float, stored: &[u8], out: &mut [f32]) {
    let (fours, rest) = out.as_chunks_mut::<4>();
    let (stored, stored_rest) = stored.split_at(4 * format.bytes() * fours.len());
    for (stored, out) in stored.chunks_exact(4 * format.bytes()).zip(fours) {
        // SAFETY: NEON is there; `stored` and `out` have 4 elements.
        unsafe { vst1q_f32(out.as_mut_ptr(), load4::<FORMAT>(stored.as_ptr())) };
    }
    format.to_f32(stored_rest, rest);
}

pub(super) fn scores(keys: &[f32], q: &[f32], scale: f32, scores: &mut [f32], stride: usize) {
    let dim = keys.len() / POSITIONS;
    let heads = q.len() / dim;
    assert!(heads == 0 || scores.len() >= (heads - 1) * stride + POSITIONS);
    for head in (0..heads).step_by(2) {
        let (q, scores) = (&q[head * dim..], &mut scores[head * stride..]);
        match heads - head {
            1 => scores_of::<1>(keys, dim, q, scale, scores, stride),
            _ => scores_of::<2>(keys, dim, q, scale, scores, stride),
        }
    }
}

/// The scores of `H` heads.
#[inline(always)]
fn scores_of<const H: usize>(keys: &[f32], dim: usize, q: &[f32], scale: f32, scores: &mut [f32], stride: usize) {
    const { assert!(POSITIONS == 16 && PARTIALS == 16) };
    assert!(keys.len() >= POSITIONS * dim && q.len() >= H * dim && scores.len() >= (H - 1) * stride + POSITIONS);
    for half in [0, POSITIONS / 2] {
        // SAFETY: NEON is there. What is read and written is checked above: keys and queries of `dim` elements, 8
        // positions of an element 16 apart, and 8 scores.
        unsafe {
            let sums = all::<H>(keys.as_ptr().add(half), dim, q.as_ptr(), 0);
            for (h, sums) in sums.into_iter().enumerate() {
                for (v, sum) in sums.into_iter().enumerate() {
                    // Partial sums here begin with a product instead of 0, and can be -0 where the definition's are +0;
                    // this is where that would be seen.
                    let sum = vaddq_f32(sum, vdupq_n_f32(0.0));
                    vst1q_f32(scores.as_mut_ptr().add(h * stride + half + 4 * v), vmulq_n_f32(sum, scale));
                }
            }
        }
    }
}

/// 8 positions of some heads.
type Eight<const H: usize> = [[float32x4_t; 2]; H];

/// Partial sum `i` of 8 positions, for `H` heads.
///
/// # Safety
/// `keys` heads 8 elements, and as many every 16 elements on, `dim` times; `q` heads `[H][dim]`.
#[inline(always)]
unsafe fn partial<const H: usize>(keys: *const f32, dim: usize, q: *const f32, i: usize) -> Eight<H> {
    // SAFETY: NEON is there; the caller's promise, as `d < dim`.
    unsafe {
        let mut sums = [[vdupq_n_f32(0.0); 2]; H];
        let mut d = i;
        while d < dim {
            let key = [vld1q_f32(keys.add(16 * d)), vld1q_f32(keys.add(16 * d + 4))];
            for (h, sums) in sums.iter_mut().enumerate() {
                let q = *q.add(h * dim + d);
                for (sum, key) in sums.iter_mut().zip(key) {
                    let product = vmulq_n_f32(key, q);
                    *sum = if d == i { product } else { vaddq_f32(*sum, product) };
                }
            }
            d += PARTIALS;
        }
        sums
    }
}

/// The sums of a half: partial sums `i`, `i + N`, ... folded as the definition folds all 16.
macro_rules! half {
    ($name:ident, $below:ident, $distance:literal) => {
        /// # Safety
        /// As [`partial`].
        #[inline(always)]
        unsafe fn $name<const H: usize>(keys: *const f32, dim: usize, q: *const f32, i: usize) -> Eight<H> {
            // SAFETY: NEON is there; the caller's promise.
            unsafe {
                let mut low = $below::<H>(keys, dim, q, i);
                let high = $below::<H>(keys, dim, q, i + $distance);
                for (low, high) in low.iter_mut().flatten().zip(high.into_iter().flatten()) {
                    *low = vaddq_f32(*low, high);
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

pub(super) fn mix(values: &[f32], dim: usize, weights: &[f32], stride: usize, out: &mut [f32]) {
    let heads = out.len() / dim;
    for head in (0..heads).step_by(2) {
        let (weights, out) = (&weights[head * stride..], &mut out[head * dim..]);
        match heads - head {
            1 => mix_of::<1>(values, dim, weights, stride, out),
            _ => mix_of::<2>(values, dim, weights, stride, out),
        }
    }
}

/// The values of `H` heads.
#[inline(always)]
fn mix_of<const H: usize>(values: &[f32], dim: usize, weights: &[f32], stride: usize, out: &mut [f32]) {
    let positions = values.len() / dim;
    assert!(out.len() >= H * dim && (positions == 0 || weights.len() >= (H - 1) * stride + positions));
    let (whole, mut at) = (dim / 4 * 4, 0);
    while at < whole {
        // SAFETY: the columns are inside `dim`, and all else is checked above.
        at += unsafe {
            match whole - at {
                32.. => columns::<H, 8>(values, dim, positions, weights, stride, out, at),
                _ => columns::<H, 1>(values, dim, positions, weights, stride, out, at),
            }
        };
    }
    mix_from(whole, values, dim, weights, stride, &mut out[..H * dim]);
}

/// `4 * V` columns from `at` on; returns how many they are.
///
/// # Safety
/// `values` heads `[positions][dim]` elements, `weights` `positions` and, `stride` on, as many for each of `H` heads,
/// `out` `[H][dim]`; the columns are inside `dim`.
#[inline(always)]
unsafe fn columns<const H: usize, const V: usize>(
    values: &[f32],
    dim: usize,
    positions: usize,
    weights: &[f32],
    stride: usize,
    out: &mut [f32],
    at: usize,
) -> usize {
    let (values, weights, out) = (values.as_ptr(), weights.as_ptr(), out.as_mut_ptr());
    // SAFETY: NEON is there; the caller's promise.
    unsafe {
        let mut sums = [[vdupq_n_f32(0.0); V]; H];
        for (h, sums) in sums.iter_mut().enumerate() {
            for (v, sum) in sums.iter_mut().enumerate() {
                *sum = vld1q_f32(out.add(h * dim + at + 4 * v));
            }
        }
        for j in 0..positions {
            let mut w = [0.0; H];
            for (h, w) in w.iter_mut().enumerate() {
                *w = *weights.add(h * stride + j);
            }
            for v in 0..V {
                let value = vld1q_f32(values.add(j * dim + at + 4 * v));
                for (sums, w) in sums.iter_mut().zip(w) {
                    sums[v] = vaddq_f32(sums[v], vmulq_n_f32(value, w));
                }
            }
        }
        for (h, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                vst1q_f32(out.add(h * dim + at + 4 * v), *sum);
            }
        }
    }
    4 * V
}
