//! Inner products and weighted sums of rows of 8-bit keys and values, whose heads are whole groups long.

use super::float::fold;
use crate::reference::kv8::{self, GROUP, parts, row_bytes};
use core::arch::x86_64::*;

/// Scale of a group.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn scale(stored: [u8; 2]) -> __m256 {
    let bits = i32::from(u16::from_le_bytes(stored));
    _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)))
}

/// Eight elements from a group's `at`-th on.
#[inline]
#[target_feature(enable = "avx2")]
fn eight(codes: &[u8; GROUP], at: usize, scale: __m256) -> __m256 {
    let codes = &codes[at..at + 8];
    // SAFETY: `codes` has 8 bytes.
    let codes = unsafe { _mm_loadl_epi64(codes.as_ptr().cast()) };
    _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)), scale)
}

#[target_feature(enable = "avx2,f16c")]
pub(super) fn dot_rows(rows: &[u8], x: &[f32], out: &mut [f32]) {
    if !x.len().is_multiple_of(GROUP) {
        return kv8::dot_rows(rows, x, out);
    }
    for (row, out) in rows.chunks_exact(row_bytes(x.len())).zip(out) {
        let (codes, scales) = parts(row, x.len());
        let mut sums = [_mm256_setzero_ps(); 2];
        for ((codes, stored), x) in codes.as_chunks::<GROUP>().0.iter().zip(scales).zip(x.as_chunks::<GROUP>().0) {
            let scale = scale(*stored);
            for (i, x) in x.as_chunks::<8>().0.iter().enumerate() {
                // SAFETY: `x` has 8 elements.
                let x = unsafe { _mm256_loadu_ps(x.as_ptr()) };
                sums[i % 2] = _mm256_add_ps(sums[i % 2], _mm256_mul_ps(x, eight(codes, 8 * i, scale)));
            }
        }
        *out = fold(sums);
    }
}

#[target_feature(enable = "avx2,f16c")]
pub(super) fn weighted_sum(rows: &[u8], weights: &[f32], out: &mut [f32]) {
    let dim = out.len();
    if !dim.is_multiple_of(GROUP) {
        return kv8::weighted_sum(rows, weights, out);
    }
    for (group, out) in out.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
        let mut sums = [_mm256_setzero_ps(); 4];
        for (row, w) in rows.chunks_exact(row_bytes(dim)).zip(weights) {
            let (codes, scales) = parts(row, dim);
            let (codes, scale, w) = (&codes.as_chunks::<GROUP>().0[group], scale(scales[group]), _mm256_set1_ps(*w));
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = _mm256_add_ps(*sum, _mm256_mul_ps(w, eight(codes, 8 * i, scale)));
            }
        }
        for (out, sum) in out.as_chunks_mut::<8>().0.iter_mut().zip(sums) {
            // SAFETY: `out` has 8 elements.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), sum) };
        }
    }
}
