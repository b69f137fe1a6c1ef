//! The product of a row block with up to three tokens, straight from the fields.

use super::{AHEAD, broadcast, load, loads};
use crate::activations::{Acts, TokenActs};
use crate::reference::quant::{self, QuantBlock};
use crate::weights::ROW_BLOCK;
use core::arch::x86_64::*;

#[target_feature(enable = "avx2,f16c")]
pub(super) fn quant_tile(block: &QuantBlock<'_>, acts: &Acts<'_>, first: usize, out: &mut [[f32; ROW_BLOCK]]) {
    match out {
        [out] => {
            let acts = [acts.token(first)];
            // What converters write.
            match block.quant.fields.widths()[..block.levels] {
                [8] => tile::<1, 4, 8>(block, acts, [out]),
                [4] => tile::<1, 4, 4>(block, acts, [out]),
                [2, 2] => tile::<1, 4, PAIR>(block, acts, [out]),
                [2] => tile::<1, 4, 2>(block, acts, [out]),
                [1] => tile::<1, 4, 1>(block, acts, [out]),
                _ => tile::<1, 4, ANY>(block, acts, [out]),
            }
        }
        [a, b] => tile::<2, 4, ANY>(block, [acts.token(first), acts.token(first + 1)], [a, b]),
        [a, b, c] => {
            let acts = [acts.token(first), acts.token(first + 1), acts.token(first + 2)];
            tile::<3, 2, ANY>(block, acts, [a, b, c]);
        }
        // More tokens are a product of their own kind.
        _ => quant::quant_tile(block, acts, first, out),
    }
}

/// Fields of any number and width.
const ANY: u8 = 0;
/// Two fields of 2 bits.
const PAIR: u8 = 22;

/// Asks for the 128 bytes that are [`AHEAD`] of `p`.
#[inline]
#[target_feature(enable = "avx2")]
fn prefetch<const T: usize>(p: *const u8) {
    if T == 1 {
        _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(AHEAD).cast());
        _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(AHEAD + 64).cast());
    }
}

/// Integer sums of 8 rows a vector: `V` vectors of rows for each of `T` tokens.
type Sums<const T: usize, const V: usize> = [[__m256i; V]; T];

/// The products of a row block with `T` tokens, in passes of `V` vectors of 8 rows, so that the sums of a pass stay
/// in registers. The block has one field of `WIDTH` bits unless that is
/// [`ANY`] or [`PAIR`].
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn tile<const T: usize, const V: usize, const WIDTH: u8>(
    block: &QuantBlock<'_>,
    acts: [TokenActs<'_>; T],
    out: [&mut [f32; ROW_BLOCK]; T],
) {
    let len = block.quant.group.len();
    let groups = block.groups;
    let vectors = if block.quant.affine { 2 } else { 1 };
    let levels = match WIDTH {
        ANY => block.levels,
        PAIR => 2,
        _ => 1,
    };
    let (double, offset) = block.doubled_and_offset();
    let double = double.trailing_zeros();
    // The lengths that the pointers below rely on.
    assert!(block.levels == levels && block.scales.len() == groups * vectors * 2 * ROW_BLOCK);
    for level in 0..levels {
        let (width, _) = block.field(level);
        assert!(WIDTH == ANY || width == if WIDTH == PAIR { 2 } else { WIDTH });
        assert_eq!(block.fields[level].len(), groups * len * ROW_BLOCK * usize::from(width) / 8);
        assert!(width != 1 || acts.iter().all(|acts| acts.tables.len() == 4 * groups * len));
    }
    assert!(acts.iter().all(|acts| acts.codes.len() == groups * len));

    let mut total = [[_mm256_setzero_ps(); 4]; T];
    for group in 0..groups {
        let codes: [*const u8; T] = core::array::from_fn(|t| acts[t].codes[group * len..].as_ptr());
        let scale: [f32; T] = core::array::from_fn(|t| acts[t].scale(group));
        let sum: [i32; T] = core::array::from_fn(|t| acts[t].sum(group));
        prefetch::<T>(block.scales[2 * group * vectors * ROW_BLOCK..].as_ptr());
        for pass in 0..4 / V {
            let mut sums: Sums<T, V> = [[_mm256_setzero_si256(); V]; T];
            if WIDTH == PAIR {
                let at = group * len * 8 + pass * V * 32;
                let (high, low) = (block.fields[0][at..].as_ptr(), block.fields[1][at..].as_ptr());
                // SAFETY: both head this pass's part of `len` K of a field of 2 bits, `codes` head `len` codes.
                unsafe { pair(high, low, codes, len, double, &mut sums) };
            }
            for level in 0..if WIDTH == PAIR { 0 } else { levels } {
                let (width, below) = if WIDTH == ANY { block.field(level) } else { (WIDTH, 0) };
                let shift = double + below;
                let bytes = len * ROW_BLOCK * usize::from(width) / 8;
                let field = &block.fields[level][group * bytes..(group + 1) * bytes];
                let field = field[pass * V * 32..].as_ptr();
                // SAFETY: `field` heads this pass's part of `len` K of a field of this width, `codes` head `len`
                // codes, and the tables (checked above to be there if a field is 1 bit wide) head 4 * `len` bytes.
                unsafe {
                    match width {
                        8 => field8(field, codes, len, shift, &mut sums),
                        4 => field4(field, codes, len, shift, &mut sums),
                        2 => field2(field, codes, len, shift, &mut sums),
                        _ => {
                            let tables = core::array::from_fn(|t| acts[t].tables[group * len * 4..].as_ptr());
                            let low = core::array::from_fn(|t| acts[t].low(group));
                            field1(field, tables, low, len, shift, &mut sums);
                        }
                    }
                }
            }
            for v in 0..V {
                let row = (pass * V + v) * 8;
                let stored = &block.scales[2 * (group * vectors * ROW_BLOCK + row)..];
                // SAFETY: 8 scales follow (checked above: 64 bytes per group and vector).
                let scales = _mm256_cvtph_ps(unsafe { _mm_loadu_si128(stored.as_ptr().cast()) });
                for t in 0..T {
                    let j = _mm256_add_epi32(sums[t][v], _mm256_set1_epi32(offset * sum[t]));
                    let factor = _mm256_mul_ps(scales, _mm256_set1_ps(0.5 * scale[t]));
                    let product = _mm256_mul_ps(_mm256_cvtepi32_ps(j), factor);
                    total[t][pass * V + v] = _mm256_add_ps(total[t][pass * V + v], product);
                }
                if block.quant.affine {
                    let stored = &stored[2 * ROW_BLOCK..];
                    // SAFETY: 8 minima follow, as above.
                    let minima = _mm256_cvtph_ps(unsafe { _mm_loadu_si128(stored.as_ptr().cast()) });
                    for t in 0..T {
                        let product = _mm256_mul_ps(minima, _mm256_set1_ps(scale[t] * sum[t] as f32));
                        total[t][pass * V + v] = _mm256_add_ps(total[t][pass * V + v], product);
                    }
                }
            }
        }
    }
    for (out, total) in out.into_iter().zip(total) {
        for (out, total) in out.as_chunks_mut::<8>().0.iter_mut().zip(total) {
            // SAFETY: `out` has 8 elements.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), total) };
        }
    }
}

/// Adds pairs of 16-bit sums, shifted left, to the 32-bit weight.
#[inline]
#[target_feature(enable = "avx2")]
fn widen<const T: usize, const V: usize>(partial: &Sums<T, V>, shift: u32, sums: &mut Sums<T, V>) {
    let weight = _mm256_set1_epi16(1 << shift);
    for (sums, partial) in sums.as_flattened_mut().iter_mut().zip(partial.as_flattened()) {
        *sums = _mm256_add_epi32(*sums, _mm256_madd_epi16(*partial, weight));
    }
}

/// Adds the products of `k` weights a row in a field of 4 bits.
///
/// # Safety
/// `w` heads `V` vectors in every 128 bytes of `k / 8` of them; `q` head `k` bytes; `k` is a multiple of 8.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn field4<const T: usize, const V: usize>(
    mut w: *const u8,
    q: [*const u8; T],
    k: usize,
    shift: u32,
    sums: &mut Sums<T, V>,
) {
    /// A step adds at most 4 * 15 * 127 to a 16-bit lane, so that 4 steps of 8 K fit.
    const SAFE_K: usize = 32;
    let mask = _mm256_set1_epi8(15);
    let mut at = 0;
    while at < k {
        let end = k.min(at + SAFE_K);
        let mut partial: Sums<T, V> = [[_mm256_setzero_si256(); V]; T];
        while at < end {
            prefetch::<T>(w);
            for v in 0..V {
                // SAFETY: the caller's promise.
                let codes = unsafe { load(w.add(32 * v)) };
                let low = _mm256_and_si256(codes, mask);
                let high = _mm256_and_si256(_mm256_srli_epi16::<4>(codes), mask);
                for t in 0..T {
                    // SAFETY: the caller's promise: `at + 8 <= k`.
                    let (a, b) = unsafe { (broadcast(q[t].add(at)), broadcast(q[t].add(at + 4))) };
                    let products = _mm256_add_epi16(_mm256_maddubs_epi16(low, a), _mm256_maddubs_epi16(high, b));
                    partial[t][v] = _mm256_add_epi16(partial[t][v], products);
                }
            }
            w = w.wrapping_add(128);
            at += 8;
        }
        widen(&partial, shift, sums);
    }
}

/// Adds the products of `k` weights a row in a field of 2 bits. A 16-bit lane gets at most `k * 3 * 127 / 2`, which
/// fits for k = 128.
///
/// # Safety
/// `w` heads `V` vectors in every 128 bytes of `k / 16` of them; `q` head `k` bytes; `k` is a multiple of 16.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn field2<const T: usize, const V: usize>(
    mut w: *const u8,
    q: [*const u8; T],
    k: usize,
    shift: u32,
    sums: &mut Sums<T, V>,
) {
    let mask = _mm256_set1_epi8(3);
    let mut partial: Sums<T, V> = [[_mm256_setzero_si256(); V]; T];
    for at in (0..k).step_by(16) {
        prefetch::<T>(w);
        // SAFETY: the caller's promise.
        let mut codes: [__m256i; V] = unsafe { loads(w) };
        for i in 0..4 {
            let mut fields = codes;
            for v in 0..V {
                fields[v] = _mm256_and_si256(codes[v], mask);
                codes[v] = _mm256_srli_epi16::<2>(codes[v]);
            }
            for t in 0..T {
                // SAFETY: the caller's promise: `at + 16 <= k`.
                let a = unsafe { broadcast(q[t].add(at + 4 * i)) };
                for v in 0..V {
                    partial[t][v] = _mm256_add_epi16(partial[t][v], _mm256_maddubs_epi16(fields[v], a));
                }
            }
        }
        w = w.wrapping_add(128);
    }
    widen(&partial, shift, sums);
}

/// Adds the products of `k` weights a row in two fields of 2 bits, brought together first: one product instead of two.
///
/// # Safety
/// `high` and `low` head `V` vectors in every 128 bytes of `k / 16` of them; `q` head `k` bytes; `k` is a multiple of
/// 32.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn pair<const T: usize, const V: usize>(
    mut high: *const u8,
    mut low: *const u8,
    q: [*const u8; T],
    k: usize,
    shift: u32,
    sums: &mut Sums<T, V>,
) {
    let (mask, even, odd) = (_mm256_set1_epi8(15), _mm256_set1_epi8(0x33), _mm256_set1_epi8(0x33 << 2));
    for first in (0..k).step_by(32) {
        // A 16-bit lane gets at most 16 * 15 * 127.
        let mut partial: Sums<T, V> = [[_mm256_setzero_si256(); V]; T];
        for at in [first, first + 16] {
            prefetch::<T>(high);
            prefetch::<T>(low);
            for v in 0..V {
                // SAFETY: the caller's promise.
                let (h, l) = unsafe { (load(high.add(32 * v)), load(low.add(32 * v))) };
                // Codes of K = 0 and 8 in the nibbles of one vector, of 4 and 12 in the other's.
                let nibbles = [
                    _mm256_or_si256(_mm256_slli_epi16::<2>(_mm256_and_si256(h, even)), _mm256_and_si256(l, even)),
                    _mm256_or_si256(_mm256_and_si256(h, odd), _mm256_srli_epi16::<2>(_mm256_and_si256(l, odd))),
                ];
                for (i, nibbles) in nibbles.into_iter().enumerate() {
                    let codes = _mm256_and_si256(nibbles, mask);
                    let next = _mm256_and_si256(_mm256_srli_epi16::<4>(nibbles), mask);
                    for t in 0..T {
                        // SAFETY: the caller's promise: `at + 16 <= k`.
                        let (a, b) = unsafe { (broadcast(q[t].add(at + 4 * i)), broadcast(q[t].add(at + 4 * i + 8))) };
                        let products = _mm256_add_epi16(_mm256_maddubs_epi16(codes, a), _mm256_maddubs_epi16(next, b));
                        partial[t][v] = _mm256_add_epi16(partial[t][v], products);
                    }
                }
            }
            (high, low) = (high.wrapping_add(128), low.wrapping_add(128));
        }
        widen(&partial, shift, sums);
    }
}

/// Adds the products of `k` signed 8-bit weights a row: |w| * (q with w's sign), a pair being at most 2 * 128 * 127.
///
/// # Safety
/// `w` heads `V` vectors in every 128 bytes of `k / 4` of them; `q` head `k` bytes; `k` is a multiple of 4.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn field8<const T: usize, const V: usize>(
    mut w: *const u8,
    q: [*const u8; T],
    k: usize,
    shift: u32,
    sums: &mut Sums<T, V>,
) {
    let weight = _mm256_set1_epi16(1 << shift);
    for at in (0..k).step_by(4) {
        prefetch::<T>(w);
        for v in 0..V {
            // SAFETY: the caller's promise.
            let weights = unsafe { load(w.add(32 * v)) };
            let magnitude = _mm256_abs_epi8(weights);
            for t in 0..T {
                // SAFETY: the caller's promise: `at + 4 <= k`.
                let a = _mm256_sign_epi8(unsafe { broadcast(q[t].add(at)) }, weights);
                let products = _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, a), weight);
                sums[t][v] = _mm256_add_epi32(sums[t][v], products);
            }
        }
        w = w.wrapping_add(128);
    }
}

/// Adds the products of `k` weights a row in a field of 1 bit, by looking subset sums of four activations up. `low`
/// is what the entries of the `k` activations are short of.
///
/// # Safety
/// `w` heads `V` vectors, `V` being even, in every 128 bytes of `k / 32` of them; `tables` head `4 * k` bytes; `k` is
/// a multiple of 32.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn field1<const T: usize, const V: usize>(
    mut w: *const u8,
    tables: [*const u8; T],
    low: [i32; T],
    k: usize,
    shift: u32,
    sums: &mut Sums<T, V>,
) {
    let mask = _mm256_set1_epi8(15);
    let zero = _mm256_setzero_si256();
    // Bytes are 16 rows in each 128-bit lane. `both` sums them as 16-bit words, even row + 256 * odd row, wrapping;
    // `odd` sums the odd rows alone. A row's sum over 128 K is at most 32 * 252. Element `2 * half` of a token's
    // vectors is `both`, the next one `odd`.
    let mut partial: Sums<T, V> = [[zero; V]; T];
    for at in (0..k).step_by(32) {
        prefetch::<T>(w);
        for half in 0..V / 2 {
            for pair in 0..2 {
                // SAFETY: the caller's promise.
                let codes = unsafe { load(w.add(64 * half + 32 * pair)) };
                let first = _mm256_and_si256(codes, mask);
                let second = _mm256_and_si256(_mm256_srli_epi16::<4>(codes), mask);
                for t in 0..T {
                    // SAFETY: the caller's promise: 128 bytes of tables for every 32 K.
                    let (even_tables, odd_tables) = unsafe {
                        let tables = tables[t].add(4 * at + 32 * pair);
                        (load(tables), load(tables.add(64)))
                    };
                    let a = _mm256_shuffle_epi8(even_tables, first);
                    let b = _mm256_shuffle_epi8(odd_tables, second);
                    let [both, odd] = [partial[t][2 * half], partial[t][2 * half + 1]];
                    partial[t][2 * half] = _mm256_add_epi16(both, _mm256_add_epi16(a, b));
                    let shifted = _mm256_add_epi16(_mm256_srli_epi16::<8>(a), _mm256_srli_epi16::<8>(b));
                    partial[t][2 * half + 1] = _mm256_add_epi16(odd, shifted);
                }
            }
        }
        w = w.wrapping_add(128);
    }
    let shift = _mm_cvtsi32_si128(shift as i32);
    for t in 0..T {
        let low = _mm256_set1_epi32(low[t]);
        for half in 0..V / 2 {
            let [both, odd] = [partial[t][2 * half], partial[t][2 * half + 1]];
            let even = _mm256_sub_epi16(both, _mm256_slli_epi16::<8>(odd));
            let even = _mm_add_epi16(_mm256_castsi256_si128(even), _mm256_extracti128_si256::<1>(even));
            let odd = _mm_add_epi16(_mm256_castsi256_si128(odd), _mm256_extracti128_si256::<1>(odd));
            let rows = [_mm_unpacklo_epi16(even, odd), _mm_unpackhi_epi16(even, odd)];
            for (v, rows) in rows.into_iter().enumerate() {
                let sum = _mm256_add_epi32(_mm256_cvtepu16_epi32(rows), low);
                let sum = _mm256_sll_epi32(sum, shift);
                sums[t][2 * half + v] = _mm256_add_epi32(sums[t][2 * half + v], sum);
            }
        }
    }
}
