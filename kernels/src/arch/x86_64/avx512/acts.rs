//! Quantisation of activations and the tables of subset sums.

use super::load;
use crate::activations::{ActSpec, TokenMut};
use crate::reference::quant;
use core::arch::x86_64::*;

#[target_feature(enable = "avx512bw,avx512vl")]
pub(super) fn quantise(spec: ActSpec, x: &[f32], out: TokenMut<'_>) {
    let len = spec.group as usize;
    let TokenMut { codes, scales, sums, lows, tables } = out;
    let scales = scales.as_chunks_mut::<4>().0.iter_mut();
    let sums = sums.as_chunks_mut::<4>().0.iter_mut();
    for (((x, codes), s), sum) in x.chunks(len).zip(codes.chunks_exact_mut(len)).zip(scales).zip(sums) {
        let (scale, total) = match len {
            _ if x.len() < len => quant::quantise_group(spec.limit(), x, codes),
            32 => group::<2>(spec.limit(), x, codes),
            64 => group::<4>(spec.limit(), x, codes),
            _ => group::<8>(spec.limit(), x, codes),
        };
        (*s, *sum) = (scale.to_ne_bytes(), total.to_ne_bytes());
    }
    let lows = lows.as_chunks_mut::<4>().0.iter_mut();
    for ((codes, tables), low) in codes.chunks_exact(len).zip(tables.chunks_exact_mut(4 * len)).zip(lows) {
        let mut negative = _mm512_setzero_si512();
        for (q, tables) in codes.as_chunks::<32>().0.iter().zip(tables.as_chunks_mut::<128>().0) {
            negative = _mm512_add_epi64(negative, subset_sums(q, tables));
        }
        *low = (-_mm512_mask_reduce_add_epi64(0b1010_1010, negative) as i32).to_ne_bytes();
    }
}

/// Quantises a whole group of `16 * V` elements and returns its scale and the sum of its codes.
#[inline]
#[target_feature(enable = "avx512bw")]
fn group<const V: usize>(limit: i32, x: &[f32], codes: &mut [u8]) -> (f32, i32) {
    let (x, codes) = (x.as_chunks::<16>().0, codes.as_chunks_mut::<16>().0);
    assert!(x.len() == V && codes.len() == V);
    let magnitude = _mm512_set1_epi32(0x7fff_ffff);
    let mut max = _mm512_setzero_si512();
    for x in x {
        // SAFETY: `x` has 16 elements of 4 bytes.
        let x = unsafe { load(x.as_ptr().cast()) };
        max = _mm512_max_epu32(max, _mm512_and_si512(x, magnitude));
    }
    let max = _mm512_reduce_max_epu32(max);
    let Some((scale, inverse)) = quant::scale_and_inverse(limit, max) else {
        codes.as_flattened_mut().fill(0);
        return (quant::scale_without_codes(max), 0);
    };
    let inverse = _mm512_set1_ps(inverse);
    let mut sum = _mm512_setzero_si512();
    for (x, codes) in x.iter().zip(codes) {
        // The conversion rounds half to even. No product exceeds the limit by half, so there is nothing to clamp.
        // SAFETY: `x` has 16 elements, `codes` 16 bytes.
        unsafe {
            let q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x.as_ptr()), inverse));
            sum = _mm512_add_epi32(sum, q);
            _mm_storeu_si128(codes.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(q));
        }
    }
    (scale, _mm512_reduce_add_epi32(sum))
}

/// Writes the eight tables of 32 activations and returns the magnitudes of the negative ones, summed up in the odd
/// 64-bit lanes. An entry is the sum over its four activations q of max(q, 0) if the subset has it, else of max(-q, 0).
#[inline]
#[target_feature(enable = "avx512bw,avx512vl")]
fn subset_sums(q: &[u8; 32], tables: &mut [u8; 128]) -> __m512i {
    /// Byte e of choice i, in every 128-bit lane: i if bit i of e is set, else 8 + i.
    const CHOICES: [[u8; 16]; 4] = {
        let mut choices = [[0; 16]; 4];
        let mut i = 0;
        while i < 64 {
            choices[i / 16][i % 16] = (i / 16 + if (i % 16) >> (i / 16) & 1 == 1 { 0 } else { 8 }) as u8;
            i += 1;
        }
        choices
    };
    let zero = _mm512_setzero_si512();
    // SAFETY: `q` has 32 bytes.
    let q = _mm512_castsi256_si512(unsafe { _mm256_loadu_si256(q.as_ptr().cast()) });
    // Eight activations twice in every 128-bit lane, the second time negated.
    let q = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3), q);
    let q = _mm512_mask_sub_epi8(q, 0xff00_ff00_ff00_ff00, zero, q);
    let parts = _mm512_max_epi8(q, zero);
    let four = _mm512_set1_epi8(4);
    let (mut even, mut odd) = (zero, zero);
    for choice in &CHOICES {
        // SAFETY: a choice has 16 bytes.
        let first = _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(choice.as_ptr().cast()) });
        even = _mm512_add_epi8(even, _mm512_shuffle_epi8(parts, first));
        odd = _mm512_add_epi8(odd, _mm512_shuffle_epi8(parts, _mm512_or_si512(first, four)));
    }
    // SAFETY: `tables` has 128 bytes.
    unsafe {
        _mm512_storeu_si512(tables.as_mut_ptr().cast(), even);
        _mm512_storeu_si512(tables.as_mut_ptr().add(64).cast(), odd);
    }
    _mm512_sad_epu8(parts, zero)
}
