//! Quantisation of activations and the tables of subset sums.

use super::load;
use crate::activations::{ActSpec, TokenMut};
use crate::reference::quant;
use core::arch::x86_64::*;

#[target_feature(enable = "avx2")]
pub(super) fn quantise(spec: ActSpec, x: &[f32], out: TokenMut<'_>) {
    let len = spec.group as usize;
    let TokenMut { codes, scales, sums, lows, tables } = out;
    let scales = scales.as_chunks_mut::<4>().0.iter_mut();
    let sums = sums.as_chunks_mut::<4>().0.iter_mut();
    for (((x, codes), s), sum) in x.chunks(len).zip(codes.chunks_exact_mut(len)).zip(scales).zip(sums) {
        let (scale, total) = match len {
            _ if x.len() < len => quant::quantise_group(spec.limit(), x, codes),
            32 => group::<4>(spec.limit(), x, codes),
            64 => group::<8>(spec.limit(), x, codes),
            _ => group::<16>(spec.limit(), x, codes),
        };
        (*s, *sum) = (scale.to_ne_bytes(), total.to_ne_bytes());
    }
    let lows = lows.as_chunks_mut::<4>().0.iter_mut();
    for ((codes, tables), low) in codes.chunks_exact(len).zip(tables.chunks_exact_mut(4 * len)).zip(lows) {
        let pieces = codes.as_chunks::<32>().0.iter().zip(tables.as_chunks_mut::<128>().0);
        *low = pieces.map(|(q, tables)| subset_sums(q, tables)).sum::<i32>().to_ne_bytes();
    }
}

/// Quantises a whole group of `8 * V` elements and returns its scale and the sum of its codes.
#[inline]
#[target_feature(enable = "avx2")]
fn group<const V: usize>(limit: i32, x: &[f32], codes: &mut [u8]) -> (f32, i32) {
    assert!(x.len() == 8 * V && codes.len() == 8 * V);
    let magnitude = _mm256_set1_epi32(0x7fff_ffff);
    let mut max = _mm256_setzero_si256();
    for v in 0..V {
        // SAFETY: `x` has `V` times 8 elements.
        let x = unsafe { load(x.as_ptr().add(8 * v).cast()) };
        max = _mm256_max_epu32(max, _mm256_and_si256(x, magnitude));
    }
    let max = _mm_max_epu32(_mm256_castsi256_si128(max), _mm256_extracti128_si256::<1>(max));
    let max = _mm_max_epu32(max, _mm_shuffle_epi32::<0b00_00_11_10>(max));
    let max = _mm_max_epu32(max, _mm_shuffle_epi32::<0b00_00_00_01>(max));
    let Some((scale, inverse)) = quant::scale_and_inverse(limit, _mm_cvtsi128_si32(max) as u32) else {
        codes.fill(0);
        return (quant::scale_without_codes(_mm_cvtsi128_si32(max) as u32), 0);
    };
    let inverse = _mm256_set1_ps(inverse);
    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    let mut sum = _mm256_setzero_si256();
    for (x, codes) in x.as_chunks::<32>().0.iter().zip(codes.as_chunks_mut::<32>().0) {
        let mut q = [_mm256_setzero_si256(); 4];
        for (q, x) in q.iter_mut().zip(x.as_chunks::<8>().0) {
            // The conversion rounds half to even. No product exceeds the limit by half, so there is nothing to clamp.
            // SAFETY: `x` has 8 elements.
            *q = _mm256_cvtps_epi32(_mm256_mul_ps(unsafe { _mm256_loadu_ps(x.as_ptr()) }, inverse));
            sum = _mm256_add_epi32(sum, *q);
        }
        let bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
        // SAFETY: `codes` has 32 bytes.
        unsafe { _mm256_storeu_si256(codes.as_mut_ptr().cast(), _mm256_permutevar8x32_epi32(bytes, order)) };
    }
    let sum = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum));
    let sum = _mm_add_epi32(sum, _mm_shuffle_epi32::<0b00_00_11_10>(sum));
    let sum = _mm_add_epi32(sum, _mm_shuffle_epi32::<0b00_00_00_01>(sum));
    (scale, _mm_cvtsi128_si32(sum))
}

/// Writes the eight tables of 32 activations and returns the sum of the negative ones. An entry is the sum over its
/// four activations q of max(q, 0) if the subset has it, else of max(-q, 0).
#[inline]
#[target_feature(enable = "avx2")]
fn subset_sums(q: &[u8; 32], tables: &mut [u8; 128]) -> i32 {
    let zero = _mm256_setzero_si256();
    // SAFETY: `q` has 32 bytes.
    let q = unsafe { load(q.as_ptr()) };
    let positive = _mm256_max_epi8(q, zero);
    let negative = _mm256_max_epi8(_mm256_sub_epi8(zero, q), zero);
    // Per lane: four positive parts, the same four's negative parts, then the next four's.
    let low = _mm256_unpacklo_epi32(positive, negative);
    let high = _mm256_unpackhi_epi32(positive, negative);
    // Byte e of choice i: i if bit i of e is set, else 4 + i.
    const CHOICES: [[u8; 16]; 4] = {
        let mut choices = [[0; 16]; 4];
        let mut i = 0;
        while i < 64 {
            choices[i / 16][i % 16] = (i / 16 + if (i % 16) >> (i / 16) & 1 == 1 { 0 } else { 4 }) as u8;
            i += 1;
        }
        choices
    };
    let eight = _mm256_set1_epi8(8);
    let mut sums = [zero; 4];
    for choice in &CHOICES {
        // SAFETY: a choice has 16 bytes.
        let first = _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(choice.as_ptr().cast()) });
        let second = _mm256_or_si256(first, eight);
        for (sum, (parts, choice)) in sums.iter_mut().zip([(low, first), (low, second), (high, first), (high, second)])
        {
            *sum = _mm256_add_epi8(*sum, _mm256_shuffle_epi8(parts, choice));
        }
    }
    // `sums` holds tables 0|4, 1|5, 2|6 and 3|7; the order stored is 0, 2, 4, 6, 1, 3, 5, 7.
    let [t04, t15, t26, t37] = sums;
    let ordered = [
        _mm256_permute2x128_si256::<0x20>(t04, t26),
        _mm256_permute2x128_si256::<0x31>(t04, t26),
        _mm256_permute2x128_si256::<0x20>(t15, t37),
        _mm256_permute2x128_si256::<0x31>(t15, t37),
    ];
    for (out, v) in tables.as_chunks_mut::<32>().0.iter_mut().zip(ordered) {
        // SAFETY: `out` has 32 bytes.
        unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), v) };
    }
    let parts = _mm256_sad_epu8(negative, zero);
    let parts = _mm_add_epi64(_mm256_castsi256_si128(parts), _mm256_extracti128_si256::<1>(parts));
    -(_mm_cvtsi128_si32(parts) + _mm_extract_epi32::<2>(parts))
}
