//! AVX2 and F16C: lanes own output rows.
//!
//! Fields of 4 and 2 bits multiply by `vpmaddubsw` with 16-bit sums inside a group, fields of 8 bits the same way
//! after moving the weight's sign to the activation, fields of 1 bit look subset sums up with `vpshufb`. Operators
//! without a kernel of their own are the definition, compiled for this instruction set.
#![allow(clippy::needless_range_loop, reason = "row vectors and tokens index several arrays at once")]

use crate::activations::{ActSpec, Acts, TokenActs, TokenMut};
use crate::arch::{Float, Kernels, TILE};
use crate::reference::quant::QuantBlock;
use crate::reference::{float, math, quant};
use crate::weights::ROW_BLOCK;
use core::arch::x86_64::*;

/// Proof that the CPU has AVX2 and F16C.
pub(crate) struct Avx2(());

/// The back-end, if this CPU (with `std`) or this build (without) has the features.
pub(crate) fn get() -> Option<&'static dyn Kernels> {
    #[cfg(any(test, feature = "std"))]
    let available = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c");
    #[cfg(not(any(test, feature = "std")))]
    let available = cfg!(all(target_feature = "avx2", target_feature = "f16c"));
    if available { Some(&Avx2(())) } else { None }
}

impl Kernels for Avx2 {
    fn name(&self) -> &'static str {
        "avx2"
    }
    fn quantise(&self, spec: ActSpec, x: &[f32], out: TokenMut<'_>) {
        // SAFETY: `self` proves the features, here and below.
        unsafe { quantise(spec, x, out) }
    }
    fn quant_tile(&self, block: &QuantBlock<'_>, acts: &Acts<'_>, first: usize, out: &mut [[f32; ROW_BLOCK]]) {
        // SAFETY: as above.
        unsafe { quant_tile(block, acts, first, out) }
    }
    fn dot_rows(&self, format: Float, rows: &[u8], x: &[f32], out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { dot_rows(format, rows, x, out) }
    }
    fn weighted_sum(&self, format: Float, rows: &[u8], weights: &[f32], out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { weighted_sum(format, rows, weights, out) }
    }
    fn dot(&self, a: &[f32], b: &[f32]) -> f32 {
        // SAFETY: as above.
        unsafe { dot(a, b) }
    }
    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { rms_norm(x, weight, eps, out) }
    }
    fn softmax(&self, x: &mut [f32]) {
        // SAFETY: as above.
        unsafe { softmax(x) }
    }
    fn silu_mul(&self, gate: &mut [f32], up: &[f32]) {
        // SAFETY: as above.
        unsafe { silu_mul(gate, up) }
    }
    fn add(&self, acc: &mut [f32], x: &[f32]) {
        // SAFETY: as above.
        unsafe { add(acc, x) }
    }
    fn add_scaled(&self, acc: &mut [f32], x: &[f32], w: f32) {
        // SAFETY: as above.
        unsafe { add_scaled(acc, x, w) }
    }
    fn scale(&self, x: &mut [f32], s: f32) {
        // SAFETY: as above.
        unsafe { scale(x, s) }
    }
    fn read_only(&self, bytes: &[u8]) -> u64 {
        // SAFETY: as above.
        unsafe { read_only(bytes) }
    }
}

#[target_feature(enable = "avx2,f16c")]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    // SAFETY: any four bytes of an f32 are bytes.
    let bytes = unsafe { core::slice::from_raw_parts(b.as_ptr().cast::<u8>(), size_of_val(b)) };
    let [sum] = dots::<F32, 1>(4, [bytes], a);
    sum
}
#[target_feature(enable = "avx2,f16c")]
fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    math::rms_norm(dot(x, x), x, weight, eps, out);
}
#[target_feature(enable = "avx2")]
fn softmax(x: &mut [f32]) {
    math::softmax(x);
}
#[target_feature(enable = "avx2")]
fn silu_mul(gate: &mut [f32], up: &[f32]) {
    math::silu_mul(gate, up);
}
#[target_feature(enable = "avx2")]
fn add(acc: &mut [f32], x: &[f32]) {
    float::add(acc, x);
}
#[target_feature(enable = "avx2")]
fn add_scaled(acc: &mut [f32], x: &[f32], w: f32) {
    float::add_scaled(acc, x, w);
}
#[target_feature(enable = "avx2")]
fn scale(x: &mut [f32], s: f32) {
    float::scale(x, s);
}

#[target_feature(enable = "avx2")]
fn read_only(bytes: &[u8]) -> u64 {
    crate::arch::read_only(bytes)
}

/// Loads 32 bytes.
///
/// # Safety
/// `p` heads 32 readable bytes.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load(p: *const u8) -> __m256i {
    // SAFETY: the caller's promise; the load is unaligned.
    unsafe { _mm256_loadu_si256(p.cast()) }
}

/// Four bytes in every 32-bit lane.
///
/// # Safety
/// `p` heads 4 readable bytes.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn broadcast(p: *const u8) -> __m256i {
    // SAFETY: the caller's promise.
    _mm256_set1_epi32(unsafe { p.cast::<i32>().read_unaligned() })
}

#[target_feature(enable = "avx2")]
fn quantise(spec: ActSpec, x: &[f32], out: TokenMut<'_>) {
    let len = spec.group as usize;
    let TokenMut { codes, scales, sums, lows, tables } = out;
    let no_tables = TokenMut { codes, scales, sums, lows: &mut [], tables: &mut [] };
    quant::quantise(spec, x, no_tables);
    let lows = lows.as_chunks_mut::<4>().0.iter_mut();
    for ((codes, tables), low) in codes.chunks_exact(len).zip(tables.chunks_exact_mut(4 * len)).zip(lows) {
        let pieces = codes.as_chunks::<32>().0.iter().zip(tables.as_chunks_mut::<128>().0);
        *low = pieces.map(|(q, tables)| subset_sums(q, tables)).sum::<i32>().to_ne_bytes();
    }
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

#[target_feature(enable = "avx2,f16c")]
fn quant_tile(block: &QuantBlock<'_>, acts: &Acts<'_>, first: usize, out: &mut [[f32; ROW_BLOCK]]) {
    const { assert!(TILE == 4) };
    match out {
        [a] => tile::<1, 4>(block, [acts.token(first)], [a]),
        [a, b] => tile::<2, 4>(block, [acts.token(first), acts.token(first + 1)], [a, b]),
        [a, b, c] => tile::<3, 2>(block, core::array::from_fn(|t| acts.token(first + t)), [a, b, c]),
        [a, b, c, d] => tile::<4, 2>(block, core::array::from_fn(|t| acts.token(first + t)), [a, b, c, d]),
        _ => quant::quant_tile(block, acts, first, out),
    }
}

/// Integer sums of 8 rows a vector: `V` vectors of rows for each of `T` tokens.
type Sums<const T: usize, const V: usize> = [[__m256i; V]; T];

/// The products of a row block with `T` tokens, in passes of `V` vectors of 8 rows, so that the sums of a pass stay
/// in registers.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn tile<const T: usize, const V: usize>(
    block: &QuantBlock<'_>,
    acts: [TokenActs<'_>; T],
    out: [&mut [f32; ROW_BLOCK]; T],
) {
    let len = block.quant.group.len();
    let groups = block.groups;
    let vectors = if block.quant.affine { 2 } else { 1 };
    let (double, offset) = block.doubled_and_offset();
    let double = _mm_cvtsi32_si128(double.trailing_zeros() as i32);
    // The lengths that the pointers below rely on.
    assert_eq!(block.scales.len(), groups * vectors * 2 * ROW_BLOCK);
    for level in 0..block.levels {
        let (width, _) = block.field(level);
        assert_eq!(block.fields[level].len(), groups * len * ROW_BLOCK * usize::from(width) / 8);
        assert!(width != 1 || acts.iter().all(|acts| acts.tables.len() == 4 * groups * len));
    }
    assert!(acts.iter().all(|acts| acts.codes.len() == groups * len));

    let mut total = [[_mm256_setzero_ps(); 4]; T];
    for group in 0..groups {
        let codes: [*const u8; T] = core::array::from_fn(|t| acts[t].codes[group * len..].as_ptr());
        let scale: [f32; T] = core::array::from_fn(|t| acts[t].scale(group));
        let sum: [i32; T] = core::array::from_fn(|t| acts[t].sum(group));
        for pass in 0..4 / V {
            let mut sums: Sums<T, V> = [[_mm256_setzero_si256(); V]; T];
            for level in 0..block.levels {
                let (width, shift) = block.field(level);
                let bytes = len * ROW_BLOCK * usize::from(width) / 8;
                let field = &block.fields[level][group * bytes..(group + 1) * bytes];
                let field = field[pass * V * 32..].as_ptr();
                // SAFETY: `field` heads this pass's part of `len` K of a field of this width, `codes` head `len`
                // codes, and the tables (checked above to be there if a field is 1 bit wide) head 4 * `len` bytes.
                unsafe {
                    match width {
                        8 => field8(field, codes, len, &mut sums),
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
                    let doubled = _mm256_sll_epi32(sums[t][v], double);
                    let j = _mm256_add_epi32(doubled, _mm256_set1_epi32(offset * sum[t]));
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

/// Adds pairs of 16-bit sums, shifted left, to the 32-bit ones.
#[inline]
#[target_feature(enable = "avx2")]
fn widen<const T: usize, const V: usize>(partial: &Sums<T, V>, shift: u32, sums: &mut Sums<T, V>) {
    let ones = _mm256_set1_epi16(1);
    let shift = _mm_cvtsi32_si128(shift as i32);
    for (sums, partial) in sums.as_flattened_mut().iter_mut().zip(partial.as_flattened()) {
        *sums = _mm256_add_epi32(*sums, _mm256_sll_epi32(_mm256_madd_epi16(*partial, ones), shift));
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
        // SAFETY: the caller's promise.
        let mut codes: [__m256i; V] = core::array::from_fn(|v| unsafe { load(w.add(32 * v)) });
        for i in 0..4 {
            let fields = codes.map(|codes| _mm256_and_si256(codes, mask));
            codes = codes.map(|codes| _mm256_srli_epi16::<2>(codes));
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

/// Adds the products of `k` signed 8-bit weights a row: |w| * (q with w's sign), a pair being at most 2 * 128 * 127.
///
/// # Safety
/// `w` heads `V` vectors in every 128 bytes of `k / 4` of them; `q` head `k` bytes; `k` is a multiple of 4.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn field8<const T: usize, const V: usize>(mut w: *const u8, q: [*const u8; T], k: usize, sums: &mut Sums<T, V>) {
    let ones = _mm256_set1_epi16(1);
    for at in (0..k).step_by(4) {
        for v in 0..V {
            // SAFETY: the caller's promise.
            let weights = unsafe { load(w.add(32 * v)) };
            let magnitude = _mm256_abs_epi8(weights);
            for t in 0..T {
                // SAFETY: the caller's promise: `at + 4 <= k`.
                let a = _mm256_sign_epi8(unsafe { broadcast(q[t].add(at)) }, weights);
                let products = _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, a), ones);
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

/// Loads 8 elements of a stored format.
///
/// # Safety
/// `p` heads 8 readable elements.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn load8<const FORMAT: u8>(p: *const u8) -> __m256 {
    // SAFETY: the caller's promise: 32 or 16 bytes.
    unsafe {
        match FORMAT {
            F32 => _mm256_loadu_ps(p.cast()),
            F16 => _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
            _ => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())))),
        }
    }
}

const F32: u8 = Float::F32 as u8;
const F16: u8 = Float::F16 as u8;
const BF16: u8 = Float::Bf16 as u8;

#[target_feature(enable = "avx2,f16c")]
fn dot_rows(format: Float, rows: &[u8], x: &[f32], out: &mut [f32]) {
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
    sums.map(|[low, high]| {
        let eight = _mm256_add_ps(low, high);
        let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
    })
}

#[target_feature(enable = "avx2,f16c")]
fn weighted_sum(format: Float, rows: &[u8], weights: &[f32], out: &mut [f32]) {
    match format {
        Float::F32 => weighted_sum_of::<F32>(4, rows, weights, out),
        Float::F16 => weighted_sum_of::<F16>(2, rows, weights, out),
        Float::Bf16 => weighted_sum_of::<BF16>(2, rows, weights, out),
    }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn weighted_sum_of<const FORMAT: u8>(bytes: usize, rows: &[u8], weights: &[f32], out: &mut [f32]) {
    let stride = bytes * out.len();
    assert!(rows.len() >= stride * weights.len());
    let mut at = 0;
    while at + 64 <= out.len() {
        columns::<FORMAT, 8>(&rows[bytes * at..], bytes, stride, weights, &mut out[at..at + 64]);
        at += 64;
    }
    while at + 8 <= out.len() {
        columns::<FORMAT, 1>(&rows[bytes * at..], bytes, stride, weights, &mut out[at..at + 8]);
        at += 8;
    }
    for (i, out) in out.iter_mut().enumerate().skip(at) {
        let mut one = [0.0];
        *out = 0.0;
        for (row, w) in rows.chunks_exact(stride).zip(weights) {
            format_of::<FORMAT>().to_f32(&row[bytes * i..bytes * (i + 1)], &mut one);
            *out += w * one[0];
        }
    }
}

const fn format_of<const FORMAT: u8>() -> Float {
    match FORMAT {
        F32 => Float::F32,
        F16 => Float::F16,
        _ => Float::Bf16,
    }
}

/// `8 * V` columns of a weighted sum; `rows` starts at the first of them.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn columns<const FORMAT: u8, const V: usize>(
    rows: &[u8],
    bytes: usize,
    stride: usize,
    weights: &[f32],
    out: &mut [f32],
) {
    assert!(out.len() == 8 * V);
    let last = weights.len().saturating_sub(1);
    assert!(weights.is_empty() || rows.len() >= last * stride + 8 * V * bytes);
    let mut sums = [_mm256_setzero_ps(); V];
    for (j, w) in weights.iter().enumerate() {
        let w = _mm256_set1_ps(*w);
        for (v, sum) in sums.iter_mut().enumerate() {
            // SAFETY: checked above for the last row, so it holds for all.
            let row = unsafe { load8::<FORMAT>(rows.as_ptr().add(j * stride + 8 * v * bytes)) };
            *sum = _mm256_add_ps(*sum, _mm256_mul_ps(w, row));
        }
    }
    for (out, sum) in out.as_chunks_mut::<8>().0.iter_mut().zip(sums) {
        // SAFETY: `out` has 8 elements.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), sum) };
    }
}
