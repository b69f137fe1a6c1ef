//! Quantisation of activations and the product of quantised weights with them.

use super::float::f16_to_f32;
use super::math::round;
use crate::activations::{ActSpec, Acts, TokenMut};
use crate::pack::unpack_row;
use crate::weights::{Encoding, MAX_FIELDS, MatrixRef, Quant, ROW_BLOCK};

/// Groups whose largest magnitude is below this (2^-120) are all zero, so that `limit / amax` stays finite.
const TINY: u32 = 7 << 23;
/// Bits of infinity.
const INFINITY: u32 = 0x7f80_0000;

/// Scale and inverse scale of a group whose largest magnitude has these bits; `None` if its codes are all 0.
#[inline(always)]
pub(crate) fn scale_and_inverse(limit: i32, amax: u32) -> Option<(f32, f32)> {
    let limit = limit as f32;
    let magnitude = f32::from_bits(amax);
    (TINY..INFINITY).contains(&amax).then(|| (magnitude / limit, limit / magnitude))
}

/// Scale of a group whose codes are all 0.
#[inline(always)]
pub(crate) fn scale_without_codes(amax: u32) -> f32 {
    if amax < TINY { 0.0 } else { f32::NAN }
}

/// Quantises one group (`x` may be shorter: the rest is zero) and returns its scale and the sum of its codes.
#[inline(always)]
pub(crate) fn quantise_group(limit: i32, x: &[f32], codes: &mut [u8]) -> (f32, i32) {
    let amax = x.iter().fold(0, |max, v| max.max(v.to_bits() & 0x7fff_ffff));
    let Some((scale, inverse)) = scale_and_inverse(limit, amax) else {
        codes.fill(0);
        return (scale_without_codes(amax), 0);
    };
    let mut sum = 0;
    for (x, code) in x.iter().zip(codes.iter_mut()) {
        let q = round(x * inverse).clamp(-limit, limit);
        *code = q as u8;
        sum += q;
    }
    codes[x.len()..].fill(0);
    (scale, sum)
}

/// Subset sums of four activations, less the sum of the negative ones, which is returned.
#[inline(always)]
fn subset_sums(q: &[u8; 4], table: &mut [u8]) -> i32 {
    let q = q.map(|q| i32::from(q as i8));
    let low: i32 = q.iter().map(|q| q.min(&0)).sum();
    for (subset, entry) in table.iter_mut().enumerate() {
        let sum: i32 = (0..4).map(|i| if subset >> i & 1 == 1 { q[i] } else { 0 }).sum();
        *entry = (sum - low) as u8;
    }
    low
}

/// Position of table `j` (of the eight of 32 activations) among the eight: even ones first, so that one load
/// brings the tables that consecutive 16-byte lanes of a 1-bit field look up with their low nibbles, another
/// those of the high nibbles.
pub(crate) const fn table_slot(j: usize) -> usize {
    j / 2 + j % 2 * 4
}

/// The eight tables of 32 activations; returns the sum of the negative ones.
#[inline(always)]
pub(crate) fn tables_of(q: &[u8; 32], tables: &mut [u8; 128]) -> i32 {
    let mut total = 0;
    for (j, q) in q.as_chunks::<4>().0.iter().enumerate() {
        let slot = table_slot(j) * 16;
        total += subset_sums(q, &mut tables[slot..slot + 16]);
    }
    total
}

/// Quantises one token.
#[inline(always)]
pub(crate) fn quantise(spec: ActSpec, x: &[f32], out: TokenMut<'_>) {
    quantise_with(spec, x, out, quantise_group, tables_of);
}

/// Quantises one token by a back-end's [`quantise_group`] and [`tables_of`].
#[inline(always)]
pub(crate) fn quantise_with(
    spec: ActSpec,
    x: &[f32],
    out: TokenMut<'_>,
    quantise_group: impl Fn(i32, &[f32], &mut [u8]) -> (f32, i32),
    tables_of: impl Fn(&[u8; 32], &mut [u8; 128]) -> i32,
) {
    let len = spec.group as usize;
    let scales = out.scales.as_chunks_mut::<4>().0.iter_mut();
    let sums = out.sums.as_chunks_mut::<4>().0.iter_mut();
    for (((x, codes), s), sum) in x.chunks(len).zip(out.codes.chunks_exact_mut(len)).zip(scales).zip(sums) {
        let (scale, total) = quantise_group(spec.limit(), x, codes);
        *s = scale.to_ne_bytes();
        *sum = total.to_ne_bytes();
    }
    let lows = out.lows.as_chunks_mut::<4>().0.iter_mut();
    for ((codes, tables), low) in out.codes.chunks_exact(len).zip(out.tables.chunks_exact_mut(4 * len)).zip(lows) {
        let pieces = codes.as_chunks::<32>().0.iter().zip(tables.as_chunks_mut::<128>().0);
        *low = pieces.map(|(q, tables)| tables_of(q, tables)).sum::<i32>().to_ne_bytes();
    }
}

/// The regions of one block of [`ROW_BLOCK`] rows.
#[derive(Clone, Copy)]
pub(crate) struct QuantBlock<'a> {
    pub quant: Quant,
    pub groups: usize,
    pub scales: &'a [u8],
    /// The fields present.
    pub fields: [&'a [u8]; MAX_FIELDS],
    pub levels: usize,
    /// Low bits of the code that are not present.
    pub dropped: u32,
}

impl<'a> QuantBlock<'a> {
    /// Block `index` of `w`; `None` if `w` is a float matrix.
    pub fn new(w: &MatrixRef<'a>, index: usize) -> Option<Self> {
        let shape = w.shape();
        let Encoding::Quant(quant) = shape.encoding else {
            return None;
        };
        let mut fields: [&[u8]; MAX_FIELDS] = [&[]; MAX_FIELDS];
        let mut dropped = u32::from(quant.fields.bits());
        for (level, region) in w.fields().iter().enumerate() {
            let bytes = shape.block_field_bytes(level);
            fields[level] = &region[index * bytes..(index + 1) * bytes];
            dropped -= u32::from(quant.fields.widths()[level]);
        }
        let bytes = shape.block_scale_bytes();
        let scales = &w.scales()[index * bytes..(index + 1) * bytes];
        Some(Self { quant, groups: shape.groups(), scales, fields, levels: w.fields().len(), dropped })
    }
    /// Width of field `level` and the number of present bits below it.
    #[inline(always)]
    pub fn field(&self, level: usize) -> (u8, u32) {
        let widths = self.quant.fields.widths();
        let below = widths[level + 1..self.levels].iter().map(|&w| u32::from(w)).sum();
        (widths[level], below)
    }
    /// Scale of a row in a group.
    #[inline(always)]
    pub fn scale(&self, group: usize, row: usize) -> f32 {
        self.stored(if self.quant.affine { 2 * group } else { group }, row)
    }
    /// Minimum of a row in a group; 0 unless affine.
    #[inline(always)]
    pub fn minimum(&self, group: usize, row: usize) -> f32 {
        if self.quant.affine { self.stored(2 * group + 1, row) } else { 0.0 }
    }
    #[inline(always)]
    fn stored(&self, vector: usize, row: usize) -> f32 {
        let at = 2 * (vector * ROW_BLOCK + row);
        f16_to_f32(u16::from_le_bytes([self.scales[at], self.scales[at + 1]]))
    }
    /// Twice a weight, before its scale, is `doubled * code + offset`: the dropped bits stand at the middle of
    /// their range. The code of an 8-bit weight is signed.
    #[inline(always)]
    pub fn doubled_and_offset(&self) -> (i32, i32) {
        (2 << self.dropped, (1 << self.dropped) - 1 - i32::from(self.quant.zero_x2))
    }
    /// The values of one row.
    pub fn row_to_f32(&self, row: usize, out: &mut [f32]) {
        let (double, offset) = self.doubled_and_offset();
        let len = self.quant.group.len();
        let mut codes = [0; 128];
        for (group, out) in out.chunks_mut(len).enumerate() {
            let mut fields = self.fields;
            for (level, field) in fields.iter_mut().enumerate().take(self.levels) {
                let bytes = len * ROW_BLOCK * usize::from(self.field(level).0) / 8;
                *field = &field[group * bytes..(group + 1) * bytes];
            }
            let codes = &mut codes[..out.len()];
            unpack_row(&self.quant, &fields[..self.levels], row, codes);
            let (scale, minimum) = (0.5 * self.scale(group, row), self.minimum(group, row));
            for (out, &code) in out.iter_mut().zip(codes.iter()) {
                let code = if self.quant.fields.bits() == 8 { i32::from(code as i8) } else { i32::from(code) };
                *out = (double * code + offset) as f32 * scale + minimum;
            }
        }
    }
}

/// Adds to `sums` the products of one group of a field of `8 / PER` bits (2 or 4 weights a byte) with the
/// activations `q`. Lane `4r + t` of a half holds row r's sum over K = t modulo 4; in 16 bits, which is enough for
/// 64 K: 16 * 15 * 127 < 2^15.
#[inline(always)]
fn narrow_field<const PER: usize>(field: &[u8], q: &[u8], shift: u32, sums: &mut [i32; ROW_BLOCK]) {
    for (field, q) in field.chunks(64 * ROW_BLOCK / PER).zip(q.chunks(64)) {
        let mut lanes = [[0i16; 16]; 8];
        for (block, q) in field.as_chunks::<128>().0.iter().zip(q.chunks_exact(4 * PER)) {
            for (i, q) in q.as_chunks::<4>().0.iter().enumerate() {
                let q: [i16; 16] = core::array::from_fn(|l| i16::from(q[l % 4] as i8));
                for (lanes, bytes) in lanes.iter_mut().zip(block.as_chunks::<16>().0) {
                    for l in 0..16 {
                        let code = bytes[l] >> (8 / PER * i) & (0xff >> (8 - 8 / PER));
                        lanes[l] += i16::from(code) * q[l];
                    }
                }
            }
        }
        for (sum, lanes) in sums.iter_mut().zip(lanes.as_flattened().as_chunks::<4>().0) {
            *sum += lanes.iter().map(|&lane| i32::from(lane)).sum::<i32>() << shift;
        }
    }
}

/// The same for signed bytes.
#[inline(always)]
fn byte_field(field: &[u8], q: &[u8], sums: &mut [i32; ROW_BLOCK]) {
    for (block, q) in field.as_chunks::<128>().0.iter().zip(q.as_chunks::<4>().0) {
        let q = q.map(|q| i16::from(q as i8));
        for (sum, bytes) in sums.iter_mut().zip(block.as_chunks::<4>().0) {
            let products = |i: usize| i32::from(i16::from(bytes[i] as i8) * q[i]);
            *sum += products(0) + products(1) + products(2) + products(3);
        }
    }
}

/// The same for a field of 1 bit, by looking subset sums of four activations up: byte `16t + r` of a half holds row
/// r's K = 8t..8t + 8. `low` is what the entries are short of.
#[inline(always)]
fn bit_field(field: &[u8], tables: &[u8], low: i32, shift: u32, sums: &mut [i32; ROW_BLOCK]) {
    let mut rows = [[low; 16]; 2];
    for (block, tables) in field.as_chunks::<128>().0.iter().zip(tables.as_chunks::<128>().0) {
        let tables = tables.as_chunks::<16>().0;
        for (rows, bytes) in rows.iter_mut().zip(block.as_chunks::<64>().0) {
            for (t, bytes) in bytes.as_chunks::<16>().0.iter().enumerate() {
                let (first, second) = (&tables[table_slot(2 * t)], &tables[table_slot(2 * t + 1)]);
                for (row, byte) in rows.iter_mut().zip(bytes) {
                    *row += i32::from(first[usize::from(byte & 15)]) + i32::from(second[usize::from(byte >> 4)]);
                }
            }
        }
    }
    for (sum, row) in sums.iter_mut().zip(rows.as_flattened()) {
        *sum += row << shift;
    }
}

/// The products of a row block with the tokens from `first` on, one per element of `out`.
#[inline(always)]
pub(crate) fn quant_tile(block: &QuantBlock<'_>, acts: &Acts<'_>, first: usize, out: &mut [[f32; ROW_BLOCK]]) {
    let len = block.quant.group.len();
    let (double, offset) = block.doubled_and_offset();
    for (t, out) in out.iter_mut().enumerate() {
        let acts = acts.token(first + t);
        *out = [0.0; ROW_BLOCK];
        for (group, q) in acts.codes.chunks_exact(len).enumerate().take(block.groups) {
            let mut sums = [0; ROW_BLOCK];
            for level in 0..block.levels {
                let (width, shift) = block.field(level);
                let bytes = len * ROW_BLOCK * usize::from(width) / 8;
                let field = &block.fields[level][group * bytes..(group + 1) * bytes];
                match width {
                    8 => byte_field(field, q, &mut sums),
                    4 => narrow_field::<2>(field, q, shift, &mut sums),
                    2 => narrow_field::<4>(field, q, shift, &mut sums),
                    _ => {
                        let tables = &acts.tables[4 * group * len..4 * (group + 1) * len];
                        bit_field(field, tables, acts.low(group), shift, &mut sums);
                    }
                }
            }
            let (s, a) = (acts.scale(group), acts.sum(group));
            let (half_s, s_a) = (0.5 * s, s * a as f32);
            for (row, (out, sum)) in out.iter_mut().zip(sums).enumerate() {
                *out += (double * sum + offset * a) as f32 * (block.scale(group, row) * half_s);
                if block.quant.affine {
                    *out += block.minimum(group, row) * s_a;
                }
            }
        }
    }
}
