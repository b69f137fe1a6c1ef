//! Keys and values of 8 bits. A row holds a signed code an element, then a binary16 scale for every 32 of them; an
//! element is code times scale, which binary32 holds exactly, so that all sums are those of [`super::attention`].

use super::attention::POSITIONS;
use super::float::f16_to_f32;
use super::math::round;

/// Elements per scale.
pub(crate) const GROUP: usize = 32;

/// Bytes of a row of `dim` elements.
pub(crate) const fn row_bytes(dim: usize) -> usize {
    dim + 2 * dim.div_ceil(GROUP)
}

/// Stores a row.
pub(crate) fn store(x: &[f32], row: &mut [u8]) {
    let (codes, scales) = row.split_at_mut(x.len());
    let groups = x.chunks(GROUP).zip(codes.chunks_mut(GROUP));
    for ((x, codes), stored) in groups.zip(scales.as_chunks_mut::<2>().0) {
        let amax = x.iter().fold(0, |max, v| max.max(v.to_bits() & 0x7fff_ffff));
        let scale = half::f16::from_f32(f32::from_bits(amax) / 127.0);
        *stored = scale.to_le_bytes();
        let scale = f16_to_f32(scale.to_bits());
        // Codes are 0 where the scale is 0, infinite or NaN; the latter two make every element NaN.
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        for (x, code) in x.iter().zip(codes) {
            let scaled = x * inverse;
            let limited = if scaled.is_nan() { 0.0 } else { scaled.clamp(-127.0, 127.0) };
            *code = round(limited) as u8;
        }
    }
}

/// Converts a block of keys: codes `[dim][POSITIONS]`, then scales `[groups][POSITIONS]`.
#[inline(always)]
pub(crate) fn widen_keys(block: &[u8], out: &mut [f32]) {
    let (codes, scales) = block.split_at(out.len());
    let groups = codes.chunks(GROUP * POSITIONS).zip(out.chunks_mut(GROUP * POSITIONS));
    for ((codes, out), stored) in groups.zip(scales.as_chunks::<{ 2 * POSITIONS }>().0) {
        let mut scales = [0.0; POSITIONS];
        for (scale, stored) in scales.iter_mut().zip(stored.as_chunks().0) {
            *scale = f16_to_f32(u16::from_le_bytes(*stored));
        }
        for (codes, out) in codes.as_chunks::<POSITIONS>().0.iter().zip(out.as_chunks_mut::<POSITIONS>().0) {
            for ((out, code), scale) in out.iter_mut().zip(codes).zip(&scales) {
                *out = f32::from(*code as i8) * scale;
            }
        }
    }
}

/// Converts the rows of values of some positions, `dim` elements each.
#[inline(always)]
pub(crate) fn widen_values(rows: &[u8], dim: usize, out: &mut [f32]) {
    for (row, out) in rows.chunks_exact(row_bytes(dim)).zip(out.chunks_exact_mut(dim)) {
        let (codes, scales) = row.split_at(dim);
        let groups = codes.chunks(GROUP).zip(out.chunks_mut(GROUP));
        for ((codes, out), stored) in groups.zip(scales.as_chunks().0) {
            let scale = f16_to_f32(u16::from_le_bytes(*stored));
            for (out, code) in out.iter_mut().zip(codes) {
                *out = f32::from(*code as i8) * scale;
            }
        }
    }
}
