//! Float operators.

use super::{AHEAD, loads};
use crate::arch::Float;
use crate::reference::{float, math};
use core::arch::x86_64::*;

#[target_feature(enable = "avx2,f16c")]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    // SAFETY: any four bytes of an f32 are bytes.
    let bytes = unsafe { core::slice::from_raw_parts(b.as_ptr().cast::<u8>(), size_of_val(b)) };
    let [sum] = dots::<F32, 1>(4, [bytes], a);
    sum
}
#[target_feature(enable = "avx2,f16c")]
pub(super) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    math::rms_norm(dot(x, x), x, weight, eps, out);
}
#[target_feature(enable = "avx2")]
pub(super) fn softmax(x: &mut [f32]) {
    math::softmax(x);
}
#[target_feature(enable = "avx2")]
pub(super) fn silu_mul(gate: &mut [f32], up: &[f32]) {
    math::silu_mul(gate, up);
}
#[target_feature(enable = "avx2")]
pub(super) fn add(acc: &mut [f32], x: &[f32]) {
    float::add(acc, x);
}
#[target_feature(enable = "avx2")]
pub(super) fn add_scaled(acc: &mut [f32], x: &[f32], w: f32) {
    float::add_scaled(acc, x, w);
}
#[target_feature(enable = "avx2")]
pub(super) fn scale(x: &mut [f32], s: f32) {
    float::scale(x, s);
}
#[target_feature(enable = "avx2,f16c")]
pub(super) fn store_f16(x: &[f32], out: &mut [u8]) {
    let (eights, rest) = x.as_chunks::<8>();
    let (out, rest_out) = out.split_at_mut(16 * eights.len());
    for (x, out) in eights.iter().zip(out.as_chunks_mut::<16>().0) {
        // SAFETY: `x` has 8 elements, `out` 16 bytes.
        unsafe {
            let halves = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm256_loadu_ps(x.as_ptr()));
            _mm_storeu_si128(out.as_mut_ptr().cast(), halves);
        }
    }
    float::store_f16(rest, rest_out);
}
#[target_feature(enable = "avx2")]
pub(super) fn read_only(bytes: &[u8]) -> u64 {
    let (lines, rest) = bytes.as_chunks::<128>();
    let mut parities = [_mm256_setzero_si256(); 4];
    for line in lines {
        // SAFETY: `line` has four times 32 bytes.
        let vectors: [__m256i; 4] = unsafe { loads(line.as_ptr()) };
        for at in [AHEAD, AHEAD + 64] {
            _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().wrapping_add(at).cast());
        }
        for (parity, vector) in parities.iter_mut().zip(vectors) {
            *parity = _mm256_xor_si256(*parity, vector);
        }
    }
    let [a, b, c, d] = parities;
    let both = _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_xor_si256(c, d));
    let mut words = [0u64; 4];
    // SAFETY: 32 bytes.
    unsafe { _mm256_storeu_si256(words.as_mut_ptr().cast(), both) };
    words.iter().fold(crate::arch::read_only(rest), |parity, word| parity ^ word)
}

/// Loads 8 elements of a stored format.
///
/// # Safety
/// `p` heads 8 readable elements.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) unsafe fn load8<const FORMAT: u8>(p: *const u8) -> __m256 {
    // SAFETY: the caller's promise: 32 or 16 bytes.
    unsafe {
        match FORMAT {
            F32 => _mm256_loadu_ps(p.cast()),
            F16 => _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
            _ => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())))),
        }
    }
}

pub(super) const F32: u8 = Float::F32 as u8;
pub(super) const F16: u8 = Float::F16 as u8;
pub(super) const BF16: u8 = Float::Bf16 as u8;

#[target_feature(enable = "avx2,f16c")]
pub(super) fn dot_rows(format: Float, rows: &[u8], x: &[f32], out: &mut [f32]) {
    match format {
        Float::F32 => dot_rows_of::<F32>(4, rows, x, out),
        Float::F16 => dot_rows_of::<F16>(2, rows, x, out),
        Float::Bf16 => dot_rows_of::<BF16>(2, rows, x, out),
    }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn dot_rows_of<const FORMAT: u8>(bytes: usize, rows: &[u8], x: &[f32], out: &mut [f32]) {
    let stride = bytes * x.len();
    let (fours, rest) = out.as_chunks_mut::<4>();
    let (four_rows, rest_rows) = rows.split_at(fours.len() * 4 * stride);
    for (rows, out) in four_rows.chunks_exact(4 * stride).zip(fours) {
        // Four rows at once: eight independent sums hide the latency of the additions.
        *out = dots::<FORMAT, 4>(bytes, core::array::from_fn(|r| &rows[r * stride..(r + 1) * stride]), x);
    }
    for (row, out) in rest_rows.chunks_exact(stride).zip(rest) {
        [*out] = dots::<FORMAT, 1>(bytes, [row], x);
    }
}

/// Inner products of `R` stored rows with `x`.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn dots<const FORMAT: u8, const R: usize>(bytes: usize, rows: [&[u8]; R], x: &[f32]) -> [f32; R] {
    assert!(rows.iter().all(|row| row.len() == bytes * x.len()));
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    let whole = x.len() / 16 * 16;
    for at in (0..whole).step_by(16) {
        for half in 0..2 {
            let at = at + 8 * half;
            // SAFETY: `at + 8 <= x.len()`, and every row has as many elements as `x`.
            let x = unsafe { _mm256_loadu_ps(x.as_ptr().add(at)) };
            for (sum, row) in sums.iter_mut().zip(rows) {
                // SAFETY: as above.
                let w = unsafe { load8::<FORMAT>(row.as_ptr().add(bytes * at)) };
                sum[half] = _mm256_add_ps(sum[half], _mm256_mul_ps(x, w));
            }
        }
    }
    if whole < x.len() {
        // Zeros in the missing places add +0 to sums that are never -0.
        let mut last = [0.0f32; 16];
        last[..x.len() - whole].copy_from_slice(&x[whole..]);
        for (sum, row) in sums.iter_mut().zip(rows) {
            let mut last_row = [0u8; 64];
            last_row[..row.len() - bytes * whole].copy_from_slice(&row[bytes * whole..]);
            for half in 0..2 {
                // SAFETY: both buffers hold 16 elements.
                let (x, w) = unsafe {
                    (
                        _mm256_loadu_ps(last.as_ptr().add(8 * half)),
                        load8::<FORMAT>(last_row.as_ptr().add(bytes * 8 * half)),
                    )
                };
                sum[half] = _mm256_add_ps(sum[half], _mm256_mul_ps(x, w));
            }
        }
    }
    let mut folded = [0.0; R];
    for (folded, sums) in folded.iter_mut().zip(sums) {
        *folded = fold(sums);
    }
    folded
}

/// The sum of 16 partial sums, in the definition's order.
#[inline]
#[target_feature(enable = "avx2")]
fn fold([low, high]: [__m256; 2]) -> f32 {
    let eight = _mm256_add_ps(low, high);
    let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
}
