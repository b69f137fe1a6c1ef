//! Inner products and weighted sums of rows of 8-bit keys and values, whose heads are whole groups long.

use super::float::fold;
use crate::reference::kv8::{self, GROUP, parts, row_bytes};
use core::arch::x86_64::*;

/// Scale of a group.
#[inline]
#[target_feature(enable = "avx512f")]
fn scale(stored: [u8; 2]) -> __m512 {
    let bits = i32::from(u16::from_le_bytes(stored));
    _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)))
}

/// Half of a group's elements.
#[inline]
#[target_feature(enable = "avx512f")]
fn sixteen(codes: &[u8; 16], scale: __m512) -> __m512 {
    // SAFETY: `codes` has 16 bytes.
    let codes = unsafe { _mm_loadu_si128(codes.as_ptr().cast()) };
    _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)), scale)
}

#[target_feature(enable = "avx512f")]
pub(super) fn dot_rows(rows: &[u8], x: &[f32], out: &mut [f32]) {
    if !x.len().is_multiple_of(GROUP) {
        return kv8::dot_rows(rows, x, out);
    }
    for (row, out) in rows.chunks_exact(row_bytes(x.len())).zip(out) {
        let (codes, scales) = parts(row, x.len());
        let mut sum = _mm512_setzero_ps();
        for ((codes, stored), x) in codes.as_chunks::<GROUP>().0.iter().zip(scales).zip(x.as_chunks::<GROUP>().0) {
            let scale = scale(*stored);
            for (codes, x) in codes.as_chunks::<16>().0.iter().zip(x.as_chunks::<16>().0) {
                // SAFETY: `x` has 16 elements.
                let x = unsafe { _mm512_loadu_ps(x.as_ptr()) };
                sum = _mm512_add_ps(sum, _mm512_mul_ps(x, sixteen(codes, scale)));
            }
        }
        *out = fold(sum);
    }
}

#[target_feature(enable = "avx512f")]
pub(super) fn weighted_sum(rows: &[u8], weights: &[f32], out: &mut [f32]) {
    let dim = out.len();
    if !dim.is_multiple_of(GROUP) {
        return kv8::weighted_sum(rows, weights, out);
    }
    for (group, out) in out.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
        let mut sums = [_mm512_setzero_ps(); 2];
        for (row, w) in rows.chunks_exact(row_bytes(dim)).zip(weights) {
            let (codes, scales) = parts(row, dim);
            let (codes, scale, w) = (&codes.as_chunks::<GROUP>().0[group], scale(scales[group]), _mm512_set1_ps(*w));
            for (sum, codes) in sums.iter_mut().zip(codes.as_chunks::<16>().0) {
                *sum = _mm512_add_ps(*sum, _mm512_mul_ps(w, sixteen(codes, scale)));
            }
        }
        for (out, sum) in out.as_chunks_mut::<16>().0.iter_mut().zip(sums) {
            // SAFETY: `out` has 16 elements.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sum) };
        }
    }
}
