//! Keys and values of 8 bits. A row holds a signed code an element, then a binary16 scale for every 32 of them; an
//! element is code times scale, which binary32 holds exactly, so that all sums are those of [`super::float`].

use super::float::{PARTIALS, f16_to_f32, fold};
use super::math::round;

/// Elements per scale.
pub(crate) const GROUP: usize = 32;

/// Bytes of a row of `dim` elements.
pub(crate) const fn row_bytes(dim: usize) -> usize {
    dim + 2 * dim.div_ceil(GROUP)
}

/// The codes and the scales of a row of `dim` elements.
#[inline(always)]
pub(crate) fn parts(row: &[u8], dim: usize) -> (&[u8], &[[u8; 2]]) {
    let (codes, scales) = row.split_at(dim);
    (codes, scales.as_chunks().0)
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

/// Element `i` of a row.
#[inline(always)]
fn load(codes: &[u8], scales: &[[u8; 2]], i: usize) -> f32 {
    f32::from(codes[i] as i8) * f16_to_f32(u16::from_le_bytes(scales[i / GROUP]))
}

/// `out[i]` = inner product of stored row `i` with `x`.
pub(crate) fn dot_rows(rows: &[u8], x: &[f32], out: &mut [f32]) {
    for (row, out) in rows.chunks_exact(row_bytes(x.len())).zip(out) {
        let (codes, scales) = parts(row, x.len());
        let mut p = [0.0; PARTIALS];
        for (i, x) in x.iter().enumerate() {
            p[i % PARTIALS] += x * load(codes, scales, i);
        }
        *out = fold(p);
    }
}

/// `out` = sum over rows, in increasing order, of `weights[row] * row`.
pub(crate) fn weighted_sum(rows: &[u8], weights: &[f32], out: &mut [f32]) {
    out.fill(0.0);
    for (row, w) in rows.chunks_exact(row_bytes(out.len())).zip(weights) {
        let (codes, scales) = parts(row, out.len());
        for (i, o) in out.iter_mut().enumerate() {
            *o += w * load(codes, scales, i);
        }
    }
}
