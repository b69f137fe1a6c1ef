//! SIMD within a register, for 64-bit cores without vectors: one multiplication makes several products.
//!
//! Codes of 2 and 4 bits are spread over 16-bit lanes, `a0 + a1 x + b0 x^2 + b1 x^3` with x = 2^16, a and b being two
//! rows' codes for the same two K. Times `q1 + q0 x` that is a polynomial whose coefficient of x is `a0 q0 + a1 q1` and
//! of x^3 `b0 q0 + b1 q1`: four products and two of their sums. The other two coefficients are waste. Integers wrap, so
//! the signs of activations need no care until coefficients, all smaller than 2^15 in magnitude, are taken out.
//!
//! Bits are multiplied by magnitudes in 8-bit lanes, a lane a row, and flipped beforehand where the activation is
//! negative: `q b = |q| (1 - b) - |q|`.
//!
//! No table has to be built, or kept in a small cache.

use crate::activations::{Acts, TokenActs};
use crate::arch::{Kernels, TILE};
use crate::reference::quant::{self, QuantBlock};
use crate::weights::{MAX_FIELDS, ROW_BLOCK};

/// The back-end.
pub(crate) struct Swar;

impl Kernels for Swar {
    fn name(&self) -> &'static str {
        "swar"
    }
    fn quant_tile(&self, block: &QuantBlock<'_>, acts: &Acts<'_>, first: usize, out: &mut [[f32; ROW_BLOCK]]) {
        quant_tile(block, acts, first, out);
    }
}

type Sums = [i32; ROW_BLOCK];

/// A field as words, which not every core reads at any address; `None` if it is not aligned.
fn words(field: &[u8]) -> Option<&[u64]> {
    // SAFETY: any eight bytes are a word.
    let (before, words, after) = unsafe { field.align_to::<u64>() };
    (before.is_empty() && after.is_empty()).then_some(words)
}

/// The products of a row block with the tokens from `first` on.
fn quant_tile(block: &QuantBlock<'_>, acts: &Acts<'_>, first: usize, out: &mut [[f32; ROW_BLOCK]]) {
    let len = block.quant.group.len();
    let (double, offset) = block.doubled_and_offset();
    let mut fields: [&[u64]; MAX_FIELDS] = [&[]; MAX_FIELDS];
    for (words_of, field) in fields.iter_mut().zip(&block.fields[..block.levels]) {
        let Some(words) = words(field) else { return quant::quant_tile(block, acts, first, out) };
        *words_of = words;
    }
    let mut scales = [0.0; ROW_BLOCK];
    out.as_flattened_mut().fill(0.0);
    for group in 0..block.groups {
        let mut sums = [[0; ROW_BLOCK]; TILE];
        for (level, all) in fields.iter().enumerate().take(block.levels) {
            let (width, shift) = block.field(level);
            let words = len * ROW_BLOCK * usize::from(width) / 64;
            let field = &all[group * words..(group + 1) * words];
            for (t, sums) in sums.iter_mut().enumerate().take(out.len()) {
                let acts = acts.token(first + t);
                let q = &acts.codes[group * len..(group + 1) * len];
                match width {
                    8 => byte_field(field, q, acts.sum(group), sums),
                    4 => nibble_field(field, q, shift, sums),
                    2 => pair_field(field, q, shift, sums),
                    _ => bit_field(field, q, acts.low(group), shift, sums),
                }
            }
        }
        for (row, scale) in scales.iter_mut().enumerate() {
            *scale = block.scale(group, row);
        }
        let tokens = |t: usize| -> TokenActs<'_> { acts.token(first + t) };
        for (t, (out, sums)) in out.iter_mut().zip(&sums).enumerate() {
            let (s, a) = (tokens(t).scale(group), tokens(t).sum(group));
            let (half_s, offset) = (0.5 * s, offset * a);
            for ((out, sum), scale) in out.iter_mut().zip(sums).zip(&scales) {
                *out += (double * sum + offset) as f32 * (scale * half_s);
            }
        }
        if block.quant.affine {
            for (row, scale) in scales.iter_mut().enumerate() {
                *scale = block.minimum(group, row);
            }
            for (t, out) in out.iter_mut().enumerate() {
                let s_a = tokens(t).scale(group) * tokens(t).sum(group) as f32;
                for (out, minimum) in out.iter_mut().zip(&scales) {
                    *out += minimum * s_a;
                }
            }
        }
    }
}

/// `q[0] x + q[2]`.
#[inline(always)]
fn multiplier(q: &[u8], at: usize) -> u64 {
    (i64::from(q[at] as i8) << 16).wrapping_add(i64::from(q[at + 2] as i8)) as u64
}

/// Adds the coefficients of x and x^3, shifted, to the sums of a pair of rows.
#[inline(always)]
fn add_coefficients(polynomial: u64, shift: u32, sums: &mut [i32; 2]) {
    // Half of the next place is added, so that shifting rounds what is below to nothing.
    let first = (polynomial.wrapping_add(1 << 15) >> 16) as i16;
    let third = polynomial.wrapping_add(1 << 47) as i64 >> 48;
    sums[0] += i32::from(first) << shift;
    sums[1] += (third as i32) << shift;
}

/// Adds to `sums` the products of one group of a field of 4 bits with the activations `q`, in steps of 16 K:
/// coefficients are at most 8 * 2 * 15 * 127 < 2^15.
fn nibble_field(field: &[u64], q: &[u8], shift: u32, sums: &mut Sums) {
    const MASK: u64 = 0x000f_000f_000f_000f;
    let (pairs, _) = sums.as_chunks_mut::<2>();
    for (block, q) in field.as_chunks::<32>().0.iter().zip(q.as_chunks::<16>().0) {
        let m: [u64; 8] = core::array::from_fn(|i| multiplier(q, i / 2 * 4 + i % 2));
        let (first, second) = block.split_at(16);
        for ((sums, a), b) in pairs.iter_mut().zip(first).zip(second) {
            let (a, b) = (u64::from_le(*a), u64::from_le(*b));
            let mut p = (a & MASK).wrapping_mul(m[0]);
            p = p.wrapping_add((a >> 8 & MASK).wrapping_mul(m[1]));
            p = p.wrapping_add((a >> 4 & MASK).wrapping_mul(m[2]));
            p = p.wrapping_add((a >> 12 & MASK).wrapping_mul(m[3]));
            p = p.wrapping_add((b & MASK).wrapping_mul(m[4]));
            p = p.wrapping_add((b >> 8 & MASK).wrapping_mul(m[5]));
            p = p.wrapping_add((b >> 4 & MASK).wrapping_mul(m[6]));
            p = p.wrapping_add((b >> 12 & MASK).wrapping_mul(m[7]));
            add_coefficients(p, shift, sums);
        }
    }
}

/// The same for a field of 2 bits: coefficients are at most 8 * 2 * 3 * 127.
fn pair_field(field: &[u64], q: &[u8], shift: u32, sums: &mut Sums) {
    const MASK: u64 = 0x0003_0003_0003_0003;
    let (pairs, _) = sums.as_chunks_mut::<2>();
    for (block, q) in field.as_chunks::<16>().0.iter().zip(q.as_chunks::<16>().0) {
        let m: [u64; 8] = core::array::from_fn(|i| multiplier(q, i / 2 * 4 + i % 2));
        for (sums, word) in pairs.iter_mut().zip(block) {
            let word = u64::from_le(*word);
            let mut p = (word & MASK).wrapping_mul(m[0]);
            p = p.wrapping_add((word >> 8 & MASK).wrapping_mul(m[1]));
            p = p.wrapping_add((word >> 2 & MASK).wrapping_mul(m[2]));
            p = p.wrapping_add((word >> 10 & MASK).wrapping_mul(m[3]));
            p = p.wrapping_add((word >> 4 & MASK).wrapping_mul(m[4]));
            p = p.wrapping_add((word >> 12 & MASK).wrapping_mul(m[5]));
            p = p.wrapping_add((word >> 6 & MASK).wrapping_mul(m[6]));
            p = p.wrapping_add((word >> 14 & MASK).wrapping_mul(m[7]));
            add_coefficients(p, shift, sums);
        }
    }
}

/// The same for signed bytes, two rows a word. Codes are offset to 0..=255, which adds 128 times the activations' sum
/// `a`; a 32-bit lane holds a whole group: 128 * 255 * 127 < 2^31.
fn byte_field(field: &[u64], q: &[u8], a: i32, sums: &mut Sums) {
    const MASK: u64 = 0x0000_00ff_0000_00ff;
    let mut words = [0u64; ROW_BLOCK / 2];
    for (block, q) in field.as_chunks::<16>().0.iter().zip(q.as_chunks::<4>().0) {
        let q = q.map(|q| i64::from(q as i8) as u64);
        for (sum, word) in words.iter_mut().zip(block) {
            let codes = u64::from_le(*word) ^ 0x8080_8080_8080_8080;
            let mut p = (codes & MASK).wrapping_mul(q[0]);
            p = p.wrapping_add((codes >> 8 & MASK).wrapping_mul(q[1]));
            p = p.wrapping_add((codes >> 16 & MASK).wrapping_mul(q[2]));
            p = p.wrapping_add((codes >> 24 & MASK).wrapping_mul(q[3]));
            *sum = sum.wrapping_add(p);
        }
    }
    for (sums, word) in sums.as_chunks_mut::<2>().0.iter_mut().zip(words) {
        let low = word as i32;
        // The low lane's sign was borrowed from the high one.
        let high = (word.wrapping_sub(i64::from(low) as u64) >> 32) as i32;
        sums[0] += low - 128 * a;
        sums[1] += high - 128 * a;
    }
}

/// The same for a field of 1 bit with activations of 7 bits, whose negative ones sum to `low`. Four products of at most
/// 63 fit a byte, a group's sum of 128 fits 16 bits.
fn bit_field(field: &[u64], q: &[u8], low: i32, shift: u32, sums: &mut Sums) {
    const BITS: u64 = 0x0101_0101_0101_0101;
    const EVEN: u64 = 0x00ff_00ff_00ff_00ff;
    // Sums of the even and the odd rows of every eight.
    let mut words = [[0u64; 2]; ROW_BLOCK / 8];
    for (block, q) in field.as_chunks::<16>().0.iter().zip(q.as_chunks::<32>().0) {
        for (t, q) in q.as_chunks::<8>().0.iter().enumerate() {
            let negative = q.iter().enumerate().fold(0, |bits, (i, q)| bits | u64::from(q >> 7) << i);
            let flip = negative.wrapping_mul(BITS);
            let m = q.map(|q| u64::from((q as i8).unsigned_abs()));
            for (i, [even, odd]) in words.iter_mut().enumerate() {
                let codes = u64::from_le(block[i / 2 * 8 + 2 * t + i % 2]) ^ flip;
                let four = |at: usize| {
                    let product = |i: usize| (codes >> i & BITS).wrapping_mul(m[i]);
                    product(at) + product(at + 1) + product(at + 2) + product(at + 3)
                };
                let (a, b) = (four(0), four(4));
                *even += (a & EVEN) + (b & EVEN);
                *odd += (a >> 8 & EVEN) + (b >> 8 & EVEN);
            }
        }
    }
    for (sums, [even, odd]) in sums.as_chunks_mut::<8>().0.iter_mut().zip(words) {
        for (i, sums) in sums.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            let lane = |word: u64| i32::from((word >> (16 * i)) as u16);
            sums[0] += (lane(even) + low) << shift;
            sums[1] += (lane(odd) + low) << shift;
        }
    }
}
