//! Float operators. The 16 partial sums of the definition are one vector.

use super::{AHEAD, load};
use crate::arch::Float;
use crate::reference::{float, math};
use core::arch::x86_64::*;

#[target_feature(enable = "avx512f")]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    // SAFETY: any four bytes of an f32 are bytes.
    let bytes = unsafe { core::slice::from_raw_parts(b.as_ptr().cast::<u8>(), size_of_val(b)) };
    let [sum] = dots::<F32, 1>(4, [bytes], a);
    sum
}
#[target_feature(enable = "avx512f")]
pub(super) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    math::rms_norm(dot(x, x), x, weight, eps, out);
}
#[target_feature(enable = "avx512dq,avx512vl")]
pub(super) fn softmax(x: &mut [f32]) {
    math::softmax(x);
}
#[target_feature(enable = "avx512dq,avx512vl")]
pub(super) fn silu_mul(gate: &mut [f32], up: &[f32]) {
    math::silu_mul(gate, up);
}
#[target_feature(enable = "avx512f")]
pub(super) fn add(acc: &mut [f32], x: &[f32]) {
    float::add(acc, x);
}
#[target_feature(enable = "avx512f")]
pub(super) fn add_scaled(acc: &mut [f32], x: &[f32], w: f32) {
    float::add_scaled(acc, x, w);
}
#[target_feature(enable = "avx512f")]
pub(super) fn scale(x: &mut [f32], s: f32) {
    float::scale(x, s);
}
#[target_feature(enable = "avx512f")]
pub(super) fn store_f16(x: &[f32], out: &mut [u8]) {
    let (sixteens, rest) = x.as_chunks::<16>();
    let (out, rest_out) = out.split_at_mut(32 * sixteens.len());
    for (x, out) in sixteens.iter().zip(out.as_chunks_mut::<32>().0) {
        // SAFETY: `x` has 16 elements, `out` 32 bytes.
        unsafe {
            let halves = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm512_loadu_ps(x.as_ptr()));
            _mm256_storeu_si256(out.as_mut_ptr().cast(), halves);
        }
    }
    float::store_f16(rest, rest_out);
}
#[target_feature(enable = "avx512f")]
pub(super) fn read_only(bytes: &[u8]) -> u64 {
    let (lines, rest) = bytes.as_chunks::<256>();
    let mut parities = [_mm512_setzero_si512(); 4];
    for line in lines {
        for (v, parity) in parities.iter_mut().enumerate() {
            _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().wrapping_add(AHEAD + 64 * v).cast());
            // SAFETY: `line` has four times 64 bytes.
            *parity = _mm512_xor_si512(*parity, unsafe { load(line.as_ptr().add(64 * v)) });
        }
    }
    let [a, b, c, d] = parities;
    let both = _mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d));
    let mut words = [0u64; 8];
    // SAFETY: 64 bytes.
    unsafe { _mm512_storeu_si512(words.as_mut_ptr().cast(), both) };
    words.iter().fold(crate::arch::read_only(rest), |parity, word| parity ^ word)
}

/// Loads 16 elements of a stored format.
///
/// # Safety
/// `p` heads 16 readable elements.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn load16<const FORMAT: u8>(p: *const u8) -> __m512 {
    // SAFETY: the caller's promise: 64 or 32 bytes.
    unsafe {
        match FORMAT {
            F32 => _mm512_loadu_ps(p.cast()),
            F16 => _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())),
            _ => {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
            }
        }
    }
}

pub(super) const F32: u8 = Float::F32 as u8;
pub(super) const F16: u8 = Float::F16 as u8;
pub(super) const BF16: u8 = Float::Bf16 as u8;

#[target_feature(enable = "avx512f")]
pub(super) fn dot_rows(format: Float, rows: &[u8], x: &[f32], out: &mut [f32]) {
    match format {
        Float::F32 => dot_rows_of::<F32>(4, rows, x, out),
        Float::F16 => dot_rows_of::<F16>(2, rows, x, out),
        Float::Bf16 => dot_rows_of::<BF16>(2, rows, x, out),
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn dot_rows_of<const FORMAT: u8>(bytes: usize, rows: &[u8], x: &[f32], out: &mut [f32]) {
    let stride = bytes * x.len();
    let (eights, rest) = out.as_chunks_mut::<8>();
    let (eight_rows, rest_rows) = rows.split_at(eights.len() * 8 * stride);
    for (rows, out) in eight_rows.chunks_exact(8 * stride).zip(eights) {
        // Eight rows at once: as many independent sums hide the latency of the additions.
        *out = dots::<FORMAT, 8>(bytes, core::array::from_fn(|r| &rows[r * stride..(r + 1) * stride]), x);
    }
    for (row, out) in rest_rows.chunks_exact(stride).zip(rest) {
        [*out] = dots::<FORMAT, 1>(bytes, [row], x);
    }
}

/// Inner products of `R` stored rows with `x`.
#[inline]
#[target_feature(enable = "avx512f")]
fn dots<const FORMAT: u8, const R: usize>(bytes: usize, rows: [&[u8]; R], x: &[f32]) -> [f32; R] {
    assert!(rows.iter().all(|row| row.len() == bytes * x.len()));
    let mut sums = [_mm512_setzero_ps(); R];
    let (sixteens, rest) = x.as_chunks::<16>();
    for (i, x) in sixteens.iter().enumerate() {
        // SAFETY: `x` has 16 elements.
        let x = unsafe { _mm512_loadu_ps(x.as_ptr()) };
        for (sum, row) in sums.iter_mut().zip(rows) {
            // SAFETY: every row has as many elements as `x`.
            let w = unsafe { load16::<FORMAT>(row.as_ptr().add(bytes * 16 * i)) };
            *sum = _mm512_add_ps(*sum, _mm512_mul_ps(x, w));
        }
    }
    if !rest.is_empty() {
        // Zeros in the missing places add +0 to sums that are never -0.
        let mut last = [0.0f32; 16];
        last[..rest.len()].copy_from_slice(rest);
        for (sum, row) in sums.iter_mut().zip(rows) {
            let mut last_row = [0u8; 64];
            last_row[..bytes * rest.len()].copy_from_slice(&row[bytes * 16 * sixteens.len()..]);
            // SAFETY: both buffers hold 16 elements.
            let (x, w) = unsafe { (_mm512_loadu_ps(last.as_ptr()), load16::<FORMAT>(last_row.as_ptr())) };
            *sum = _mm512_add_ps(*sum, _mm512_mul_ps(x, w));
        }
    }
    let mut folded = [0.0; R];
    for (folded, sum) in folded.iter_mut().zip(sums) {
        *folded = fold(sum);
    }
    folded
}

/// The sum of 16 partial sums, in the definition's order.
#[inline]
#[target_feature(enable = "avx512f")]
fn fold(sixteen: __m512) -> f32 {
    let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(sixteen)));
    let eight = _mm256_add_ps(_mm512_castps512_ps256(sixteen), high);
    let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
}
