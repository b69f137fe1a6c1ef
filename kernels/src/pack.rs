//! Writing codes in the packed layouts of [`crate::weights`], one block of rows at a time.
//!
//! Row blocks follow one another in every region, so a converter can stream a matrix: read 32 rows, quantise
//! them, pack them, append the bytes to each region.

use crate::weights::{Encoding, MatrixShape, Quant, ROW_BLOCK};
pub use half::f16;

impl MatrixShape {
    /// Bytes of one row block in the scale region; 0 for floats.
    pub const fn block_scale_bytes(&self) -> usize {
        match self.row_blocks() {
            0 => 0,
            n => (self.scale_bytes() / n as u64) as usize,
        }
    }
    /// Bytes of one row block in field region `level`; 0 for floats.
    pub const fn block_field_bytes(&self, level: usize) -> usize {
        match self.row_blocks() {
            0 => 0,
            n => (self.field_bytes(level) / n as u64) as usize,
        }
    }
}

/// Byte and lowest bit, inside one row block of a field region of `width` bits, of row `row`'s weight `k`.
pub const fn field_position(width: u8, row: usize, k: usize) -> (usize, u32) {
    let (half, r) = (row / 16, row % 16);
    if width == 1 {
        return ((k / 32 * 2 + half) * 64 + k % 32 / 8 * 16 + r, (k % 8) as u32);
    }
    let step = 32 / width as usize;
    ((k / step * 2 + half) * 64 + 4 * r + k % 4, (k % step / 4) as u32 * width as u32)
}

/// Packs one block of up to [`ROW_BLOCK`] rows of a quantised matrix.
///
/// `codes` is `[rows][cols]`: unsigned codes, or two's complement for 8-bit weights. `scales` and, for affine
/// encodings, `minima` are `[rows][groups]`; `minima` is ignored otherwise. Rows beyond those given (in the
/// last block) and K beyond `cols` become padding. `scales_out` and each of `fields_out` are this block's
/// slices of the regions ([`MatrixShape::block_scale_bytes`], [`MatrixShape::block_field_bytes`]) and are
/// overwritten.
///
/// # Panics
/// If the encoding is a float one, a slice has another length, or a code has more bits than the encoding.
pub fn pack_row_block(
    shape: &MatrixShape,
    codes: &[u8],
    scales: &[f16],
    minima: &[f16],
    scales_out: &mut [u8],
    fields_out: &mut [&mut [u8]],
) {
    let Encoding::Quant(quant) = shape.encoding else {
        panic!("float matrices are not packed");
    };
    let (cols, groups) = (shape.cols as usize, shape.groups());
    let rows = scales.len().checked_div(groups).unwrap_or(0);
    assert!(rows <= ROW_BLOCK && scales.len() == rows * groups, "scales are [rows][groups]");
    assert_eq!(codes.len(), rows * cols, "codes are [rows][cols]");
    assert_eq!(scales_out.len(), shape.block_scale_bytes(), "scale bytes of one row block");
    assert_eq!(fields_out.len(), quant.fields.count(), "one slice per field");
    pack_scales(&quant, groups, scales, minima, scales_out);
    if cols == 0 {
        return;
    }
    let bits = u32::from(quant.fields.bits());
    assert!(bits == 8 || codes.iter().all(|&code| code >> bits == 0), "a code has too many bits");
    let mut shift = bits;
    for (level, out) in fields_out.iter_mut().enumerate() {
        assert_eq!(out.len(), shape.block_field_bytes(level), "bytes of one row block");
        let width = quant.fields.widths()[level];
        shift -= u32::from(width);
        let mask = (0xffu16 >> (8 - width)) as u8;
        out.fill(0);
        for (row, codes) in codes.chunks_exact(cols).enumerate() {
            for (k, code) in codes.iter().enumerate() {
                let (byte, bit) = field_position(width, row, k);
                out[byte] |= (code >> shift & mask) << bit;
            }
        }
    }
}

fn pack_scales(quant: &Quant, groups: usize, scales: &[f16], minima: &[f16], out: &mut [u8]) {
    out.fill(0);
    let values = if quant.affine { 2 } else { 1 };
    let mut put = |value: usize, from: &[f16]| {
        for (i, v) in from.iter().enumerate() {
            let (row, group) = (i / groups, i % groups);
            let at = 2 * ((group * values + value) * ROW_BLOCK + row);
            out[at..at + 2].copy_from_slice(&v.to_le_bytes());
        }
    };
    put(0, scales);
    if quant.affine {
        assert_eq!(minima.len(), scales.len(), "minima are [rows][groups]");
        put(1, minima);
    }
}

/// Reads the codes of row `row` of a row block back from its field slices, most significant first. With fewer
/// fields than the encoding has, the missing low bits are left out, not zeroed.
pub fn unpack_row(quant: &Quant, fields: &[&[u8]], row: usize, codes: &mut [u8]) {
    for (k, code) in codes.iter_mut().enumerate() {
        *code = fields.iter().enumerate().fold(0, |code, (level, field)| {
            let width = quant.fields.widths()[level];
            let (byte, bit) = field_position(width, row, k);
            let value = u16::from(field[byte] >> bit) & (0xff >> (8 - width));
            (code << width | value) & 0xff
        }) as u8;
    }
}
