//! The product of a row block with a few tokens, straight from the fields.

use super::{AHEAD, broadcast, halves, indices, load};
use crate::activations::{Acts, TokenActs};
use crate::reference::quant::{self, QuantBlock};
use crate::weights::ROW_BLOCK;
use core::arch::x86_64::*;

#[target_feature(enable = "avx512vnni,avx512vbmi")]
pub(super) fn quant_tile(block: &QuantBlock<'_>, acts: &Acts<'_>, first: usize, out: &mut [[f32; ROW_BLOCK]]) {
    match out {
        [out] => {
            let acts = [acts.token(first)];
            // What converters write.
            match block.quant.fields.widths()[..block.levels] {
                [8] => tile::<1, 8>(block, acts, [out]),
                [4] => tile::<1, 4>(block, acts, [out]),
                [2, 2] => tile::<1, PAIR>(block, acts, [out]),
                [2] => tile::<1, 2>(block, acts, [out]),
                [1] => tile::<1, 1>(block, acts, [out]),
                _ => tile::<1, ANY>(block, acts, [out]),
            }
        }
        [a, b] => tile::<2, ANY>(block, [acts.token(first), acts.token(first + 1)], [a, b]),
        [a, b, c] => {
            let acts = [acts.token(first), acts.token(first + 1), acts.token(first + 2)];
            tile::<3, ANY>(block, acts, [a, b, c]);
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
#[target_feature(enable = "avx512f")]
fn prefetch<const T: usize>(p: *const u8) {
    if T == 1 {
        _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(AHEAD).cast());
        _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(AHEAD + 64).cast());
    }
}

/// Groups whose numbers are prepared at a time.
const GROUPS: usize = 32;

/// What the groups of a token put into their products, the same for all rows.
#[derive(Clone, Copy)]
struct Numbers {
    /// What completes the integer sums.
    seeds: [i32; GROUPS],
    /// Half of the scales.
    halves: [f32; GROUPS],
    /// Scale times sum of the codes.
    products: [f32; GROUPS],
}

/// How the sums of a block are completed: `offset` for each unit of an activation, `low` for each that the tables'
/// entries are short of.
#[derive(Clone, Copy)]
struct Completion {
    offset: i32,
    low: i32,
}

impl Numbers {
    #[inline(always)]
    fn fill(&mut self, acts: &TokenActs<'_>, first: usize, count: usize, completion: Completion) {
        for (i, group) in (first..first + count).enumerate() {
            let (scale, sum) = (acts.scale(group), acts.sum(group));
            self.seeds[i] = completion.offset * sum;
            self.halves[i] = 0.5 * scale;
            self.products[i] = scale * sum as f32;
        }
        if completion.low != 0 {
            for (i, group) in (first..first + count).enumerate() {
                self.seeds[i] += completion.low * acts.low(group);
            }
        }
    }
}

/// Integer sums of 16 rows a vector, for each of `T` tokens.
type Sums<const T: usize> = [[__m512i; 2]; T];

/// The products of a row block with `T` tokens. The block has one field of `WIDTH` bits unless that is [`ANY`] or
/// [`PAIR`].
#[inline]
#[target_feature(enable = "avx512vnni,avx512vbmi")]
fn tile<const T: usize, const WIDTH: u8>(
    block: &QuantBlock<'_>,
    acts: [TokenActs<'_>; T],
    out: [&mut [f32; ROW_BLOCK]; T],
) {
    let len = block.quant.group.len();
    let groups = block.groups;
    let affine = block.quant.affine;
    let scale_bytes = 2 * ROW_BLOCK * if affine { 2 } else { 1 };
    let levels = match WIDTH {
        ANY => block.levels,
        PAIR => 2,
        _ => 1,
    };
    let (double, offset) = block.doubled_and_offset();
    let double = double.trailing_zeros();
    let mut completion = Completion { offset, low: 0 };
    // The lengths that the pointers below rely on.
    assert!(block.levels == levels && block.scales.len() == groups * scale_bytes);
    for level in 0..levels {
        let (width, below) = block.field(level);
        assert!(WIDTH == ANY || width == if WIDTH == PAIR { 2 } else { WIDTH });
        assert_eq!(block.fields[level].len(), groups * len * ROW_BLOCK * usize::from(width) / 8);
        assert!(width != 1 || acts.iter().all(|acts| acts.tables.len() == 4 * groups * len));
        match width {
            1 => completion.low += 1 << (double + below),
            // Signed bytes are multiplied as unsigned ones, 128 more.
            8 => completion.offset -= 128 << double,
            _ => {}
        }
    }
    assert!(acts.iter().all(|acts| acts.codes.len() == groups * len));

    let mut total = [[_mm512_setzero_ps(); 2]; T];
    let mut numbers = [Numbers { seeds: [0; GROUPS], halves: [0.0; GROUPS], products: [0.0; GROUPS] }; T];
    for first in (0..groups).step_by(GROUPS) {
        let count = GROUPS.min(groups - first);
        for t in 0..T {
            numbers[t].fill(&acts[t], first, count, completion);
        }
        for i in 0..count {
            let group = first + i;
            let mut sums: Sums<T> = [[_mm512_setzero_si512(); 2]; T];
            let mut codes = [core::ptr::null(); T];
            for t in 0..T {
                codes[t] = acts[t].codes[group * len..].as_ptr();
                sums[t] = [_mm512_set1_epi32(numbers[t].seeds[i]); 2];
            }
            // SAFETY: the fields' parts of this group are `len` K of their width, `codes` head `len` codes, and the
            // tables (checked above to be there if a field is 1 bit wide) head 4 * `len` bytes.
            unsafe {
                if WIDTH == PAIR {
                    let at = group * len * 8;
                    pair(block.fields[0][at..].as_ptr(), block.fields[1][at..].as_ptr(), codes, len, double, &mut sums);
                }
                for level in 0..if WIDTH == PAIR { 0 } else { levels } {
                    let (width, below) = if WIDTH == ANY { block.field(level) } else { (WIDTH, 0) };
                    let shift = double + below;
                    let field = block.fields[level][group * len * 4 * usize::from(width)..].as_ptr();
                    match width {
                        8 => field8(field, codes, len, &mut sums),
                        4 => field4(field, codes, len, &mut sums),
                        2 => field2(field, codes, len, shift, &mut sums),
                        _ => {
                            let mut tables = [core::ptr::null(); T];
                            for t in 0..T {
                                tables[t] = acts[t].tables[group * len * 4..].as_ptr();
                            }
                            field1(field, tables, len, shift, &mut sums);
                        }
                    }
                }
            }
            let stored = block.scales[group * scale_bytes..].as_ptr();
            prefetch::<T>(stored);
            // SAFETY: 64 bytes of scales follow and, if affine, 64 of minima (checked above).
            let scales = unsafe { halves(stored) };
            for t in 0..T {
                let half = _mm512_set1_ps(numbers[t].halves[i]);
                for v in 0..2 {
                    let product = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[t][v]), _mm512_mul_ps(scales[v], half));
                    total[t][v] = _mm512_add_ps(total[t][v], product);
                }
            }
            if affine {
                // SAFETY: as above.
                let minima = unsafe { halves(stored.add(64)) };
                for t in 0..T {
                    let product = _mm512_set1_ps(numbers[t].products[i]);
                    for v in 0..2 {
                        total[t][v] = _mm512_add_ps(total[t][v], _mm512_mul_ps(minima[v], product));
                    }
                }
            }
        }
    }
    for (out, total) in out.into_iter().zip(total) {
        for (out, total) in out.as_chunks_mut::<16>().0.iter_mut().zip(total) {
            // SAFETY: `out` has 16 elements.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), total) };
        }
    }
}

/// Adds twice the products of `k` weights a row in a field of 4 bits, which is always a whole code.
///
/// # Safety
/// `w` heads `16 * k` bytes; `q` head `k` bytes; `k` is a multiple of 8.
#[inline]
#[target_feature(enable = "avx512vnni")]
unsafe fn field4<const T: usize>(mut w: *const u8, q: [*const u8; T], k: usize, sums: &mut Sums<T>) {
    let (low_mask, high_mask) = (_mm512_set1_epi8(0x0f), _mm512_set1_epi8(0xf0u8 as i8));
    let mut low: Sums<T> = [[_mm512_setzero_si512(); 2]; T];
    // The codes of the high halves of the bytes stay there, 16 times too large.
    let mut high = low;
    for at in (0..k).step_by(8) {
        prefetch::<T>(w);
        for v in 0..2 {
            // SAFETY: the caller's promise.
            let codes = unsafe { load(w.add(64 * v)) };
            let (first, second) = (_mm512_and_si512(codes, low_mask), _mm512_and_si512(codes, high_mask));
            for t in 0..T {
                // SAFETY: the caller's promise: `at + 8 <= k`.
                let (a, b) = unsafe { (broadcast(q[t].add(at)), broadcast(q[t].add(at + 4))) };
                low[t][v] = _mm512_dpbusd_epi32(low[t][v], first, a);
                high[t][v] = _mm512_dpbusd_epi32(high[t][v], second, b);
            }
        }
        w = w.wrapping_add(128);
    }
    for t in 0..T {
        for v in 0..2 {
            let both = _mm512_add_epi32(_mm512_slli_epi32::<1>(low[t][v]), _mm512_srai_epi32::<3>(high[t][v]));
            sums[t][v] = _mm512_add_epi32(sums[t][v], both);
        }
    }
}

/// Adds `2^shift` times the products of `k` weights a row in a field of 2 bits.
///
/// # Safety
/// `w` heads `8 * k` bytes; `q` head `k` bytes; `k` is a multiple of 16.
#[inline]
#[target_feature(enable = "avx512vnni,avx512bw")]
unsafe fn field2<const T: usize>(mut w: *const u8, q: [*const u8; T], k: usize, shift: u32, sums: &mut Sums<T>) {
    let (low_mask, high_mask) = (_mm512_set1_epi8(3), _mm512_set1_epi8(12));
    let mut low: Sums<T> = [[_mm512_setzero_si512(); 2]; T];
    // Four times too large.
    let mut high = low;
    for at in (0..k).step_by(16) {
        prefetch::<T>(w);
        for v in 0..2 {
            // SAFETY: the caller's promise.
            let codes = unsafe { load(w.add(64 * v)) };
            let upper = _mm512_srli_epi16::<4>(codes);
            for (i, codes) in [codes, upper].into_iter().enumerate() {
                let (first, second) = (_mm512_and_si512(codes, low_mask), _mm512_and_si512(codes, high_mask));
                for t in 0..T {
                    // SAFETY: the caller's promise: `at + 16 <= k`.
                    let (a, b) = unsafe { (broadcast(q[t].add(at + 8 * i)), broadcast(q[t].add(at + 8 * i + 4))) };
                    low[t][v] = _mm512_dpbusd_epi32(low[t][v], first, a);
                    high[t][v] = _mm512_dpbusd_epi32(high[t][v], second, b);
                }
            }
        }
        w = w.wrapping_add(128);
    }
    add_shifted::<T, 2>(&low, &high, shift, sums);
}

/// Adds `2^shift` times the low sums and those high ones that are `2^OVER` too large.
#[inline]
#[target_feature(enable = "avx512f")]
fn add_shifted<const T: usize, const OVER: u32>(low: &Sums<T>, high: &Sums<T>, shift: u32, sums: &mut Sums<T>) {
    let shift = _mm_cvtsi32_si128(shift as i32);
    for t in 0..T {
        for v in 0..2 {
            let both = _mm512_add_epi32(low[t][v], _mm512_srai_epi32::<OVER>(high[t][v]));
            sums[t][v] = _mm512_add_epi32(sums[t][v], _mm512_sll_epi32(both, shift));
        }
    }
}

/// Adds `2^shift` times the products of `k` weights a row in two fields of 2 bits, brought together first: one product
/// instead of two.
///
/// # Safety
/// `high` and `low` head `8 * k` bytes; `q` head `k` bytes; `k` is a multiple of 16.
#[inline]
#[target_feature(enable = "avx512vnni,avx512bw")]
unsafe fn pair<const T: usize>(
    mut high: *const u8,
    mut low: *const u8,
    q: [*const u8; T],
    k: usize,
    shift: u32,
    sums: &mut Sums<T>,
) {
    const SECOND_IF_FIRST_ELSE_THIRD: i32 = 0xca;
    let (low_mask, high_mask) = (_mm512_set1_epi8(0x0f), _mm512_set1_epi8(0xf0u8 as i8));
    let even = _mm512_set1_epi8(0x33);
    let mut first: Sums<T> = [[_mm512_setzero_si512(); 2]; T];
    // 16 times too large.
    let mut second = first;
    for at in (0..k).step_by(16) {
        prefetch::<T>(high);
        prefetch::<T>(low);
        for v in 0..2 {
            // SAFETY: the caller's promise.
            let (h, l) = unsafe { (load(high.add(64 * v)), load(low.add(64 * v))) };
            // Codes of K = 0 and 8 in the nibbles of one vector, of 4 and 12 in the other's.
            let nibbles = [
                _mm512_ternarylogic_epi32::<SECOND_IF_FIRST_ELSE_THIRD>(even, l, _mm512_slli_epi16::<2>(h)),
                _mm512_ternarylogic_epi32::<SECOND_IF_FIRST_ELSE_THIRD>(even, _mm512_srli_epi16::<2>(l), h),
            ];
            for (i, nibbles) in nibbles.into_iter().enumerate() {
                let (codes, next) = (_mm512_and_si512(nibbles, low_mask), _mm512_and_si512(nibbles, high_mask));
                for t in 0..T {
                    // SAFETY: the caller's promise: `at + 16 <= k`.
                    let (a, b) = unsafe { (broadcast(q[t].add(at + 4 * i)), broadcast(q[t].add(at + 4 * i + 8))) };
                    first[t][v] = _mm512_dpbusd_epi32(first[t][v], codes, a);
                    second[t][v] = _mm512_dpbusd_epi32(second[t][v], next, b);
                }
            }
        }
        (high, low) = (high.wrapping_add(128), low.wrapping_add(128));
    }
    add_shifted::<T, 4>(&first, &second, shift, sums);
}

/// Adds twice the products of `k` signed 8-bit weights a row, each taken as 128 more than it is.
///
/// # Safety
/// `w` heads `32 * k` bytes; `q` head `k` bytes; `k` is a multiple of 4.
#[inline]
#[target_feature(enable = "avx512vnni")]
unsafe fn field8<const T: usize>(mut w: *const u8, q: [*const u8; T], k: usize, sums: &mut Sums<T>) {
    let sign = _mm512_set1_epi8(i8::MIN);
    let mut single: Sums<T> = [[_mm512_setzero_si512(); 2]; T];
    for at in (0..k).step_by(4) {
        prefetch::<T>(w);
        for v in 0..2 {
            // SAFETY: the caller's promise.
            let weights = _mm512_xor_si512(unsafe { load(w.add(64 * v)) }, sign);
            for t in 0..T {
                // SAFETY: the caller's promise: `at + 4 <= k`.
                single[t][v] = _mm512_dpbusd_epi32(single[t][v], weights, unsafe { broadcast(q[t].add(at)) });
            }
        }
        w = w.wrapping_add(128);
    }
    for t in 0..T {
        for v in 0..2 {
            sums[t][v] = _mm512_add_epi32(sums[t][v], _mm512_slli_epi32::<1>(single[t][v]));
        }
    }
}

/// Adds `2^shift` times the products of `k` weights a row in a field of 1 bit, less what the tables' entries are short
/// of, by looking subset sums of four activations up.
///
/// # Safety
/// `w` heads `4 * k` bytes; `tables` head `4 * k` bytes; `k` is a multiple of 32.
#[inline]
#[target_feature(enable = "avx512vnni,avx512vbmi")]
unsafe fn field1<const T: usize>(mut w: *const u8, tables: [*const u8; T], k: usize, shift: u32, sums: &mut Sums<T>) {
    let weight = _mm512_set1_epi8(1 << shift);
    let mut others: Sums<T> = [[_mm512_setzero_si512(); 2]; T];
    for at in (0..k).step_by(32) {
        prefetch::<T>(w);
        for v in 0..2 {
            // SAFETY: the caller's promise.
            let [first, second] = indices(unsafe { load(w.add(64 * v)) });
            for t in 0..T {
                // SAFETY: the caller's promise: 128 bytes of tables for every 32 K.
                let (even, odd) = unsafe { (load(tables[t].add(4 * at)), load(tables[t].add(4 * at + 64))) };
                sums[t][v] = _mm512_dpbusd_epi32(sums[t][v], _mm512_permutexvar_epi8(first, even), weight);
                others[t][v] = _mm512_dpbusd_epi32(others[t][v], _mm512_permutexvar_epi8(second, odd), weight);
            }
        }
        w = w.wrapping_add(128);
    }
    for t in 0..T {
        for v in 0..2 {
            sums[t][v] = _mm512_add_epi32(sums[t][v], others[t][v]);
        }
    }
}
