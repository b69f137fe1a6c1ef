//! Matrix products: `out[t][r] = sum over k of w[r][k] * x[t][k]`.
//!
//! Workers own output rows, in contiguous ranges fixed by their number. Inside a worker a block of weights is
//! multiplied with all tokens before the next block is touched, so that the weights stream once.

use crate::activations::Input;
use crate::arch::Float;
use crate::arch::split::{Columns, split_columns};
use crate::exec::Exec;
use crate::reference::quant::QuantBlock;
use crate::weights::{Encoding, MatrixRef, MatrixShape, ROW_BLOCK};

/// Below this many multiplications waking the other workers costs more than it saves.
const SERIAL_WORK: usize = 32 * 1024;
/// Rows of a float matrix multiplied with all tokens before the next ones.
const FLOAT_ROWS: usize = 16;

impl Encoding {
    fn float(self) -> Option<Float> {
        match self {
            Self::F32 => Some(Float::F32),
            Self::F16 => Some(Float::F16),
            Self::Bf16 => Some(Float::Bf16),
            Self::Quant(_) => None,
        }
    }
}

/// Number of workers worth using for `work` multiplications in `units` pieces.
pub(crate) fn parts(exec: &Exec<'_>, work: usize, units: usize) -> usize {
    if work < SERIAL_WORK { 1 } else { exec.workers.count().min(units).max(1) }
}

/// Multiplies `w` with `tokens` vectors; `out` is `[tokens][rows]` and is overwritten.
///
/// # Panics
/// If `out` or the input has not the shape's length, or the input's kind or specification is not the one
/// that [`MatrixShape::act_spec`] asks for.
pub fn matmul(exec: &Exec<'_>, w: &MatrixRef<'_>, x: Input<'_>, tokens: usize, out: &mut [f32]) {
    let shape = w.shape();
    let (rows, cols) = (shape.rows as usize, shape.cols as usize);
    assert_eq!(out.len(), tokens * rows, "out is [tokens][rows]");
    if out.is_empty() {
        return;
    }
    let kernels = exec.backend.kernels();
    let work = tokens * rows * cols;
    match (shape.encoding.float(), x) {
        (Some(format), Input::F32(x)) => {
            assert_eq!(x.len(), tokens * cols, "x is [tokens][cols]");
            if cols == 0 {
                out.fill(0.0);
                return;
            }
            let stride = cols * format.bytes();
            let data = &w.fields()[0][..rows * stride];
            let parts = parts(exec, work, rows);
            split_columns(exec, parts, out, rows, 1, &mut [], &|range, columns: &mut Columns<'_>, _| {
                let data = &data[range.start * stride..range.end * stride];
                for (block, rows) in data.chunks(FLOAT_ROWS * stride).enumerate() {
                    let at = block * FLOAT_ROWS;
                    let n = rows.len() / stride;
                    for (token, x) in x.chunks_exact(cols).enumerate() {
                        let out = &mut columns.row(token)[at..at + n];
                        kernels.dot_rows(format, rows, x, out);
                        apply_gain(w, out);
                    }
                }
            });
        }
        (None, Input::Quant(acts)) => {
            assert!(shape.act_spec().is_some_and(|spec| acts.fits(spec)), "input quantised for another matrix");
            assert!(acts.tokens() == tokens && acts.cols() == cols, "input of another shape");
            let parts = parts(exec, work, shape.row_blocks());
            split_columns(exec, parts, out, rows, ROW_BLOCK, &mut [], &|range, columns: &mut Columns<'_>, _| {
                for first_row in range.clone().step_by(ROW_BLOCK) {
                    let Some(block) = QuantBlock::new(w, first_row / ROW_BLOCK) else { return };
                    let at = first_row - range.start;
                    let n = ROW_BLOCK.min(range.end - first_row);
                    kernels.quant_block(&block, &acts, &mut |token, products| {
                        let out = &mut columns.row(token)[at..at + n];
                        out.copy_from_slice(&products[..n]);
                        apply_gain(w, out);
                    });
                }
            });
        }
        _ => panic!("float matrices take f32 inputs, quantised matrices quantised ones"),
    }
}

/// Multiplies finished values by the matrix's gain.
fn apply_gain(w: &MatrixRef<'_>, out: &mut [f32]) {
    let gain = w.gain();
    if gain != 1.0 {
        out.iter_mut().for_each(|x| *x *= gain);
    }
}

/// Writes the values of row `row` (an embedding) to `out`, which has `cols` elements.
///
/// # Panics
/// If there is no such row or `out` has another length.
pub fn row_to_f32(w: &MatrixRef<'_>, row: usize, out: &mut [f32]) {
    let MatrixShape { rows, cols, encoding } = w.shape();
    let cols = cols as usize;
    assert!(row < rows as usize, "row out of range");
    assert_eq!(out.len(), cols, "out is [cols]");
    match encoding.float() {
        Some(format) => {
            let stride = cols * format.bytes();
            format.to_f32(&w.fields()[0][row * stride..(row + 1) * stride], out);
            apply_gain(w, out);
        }
        None => {
            if let Some(block) = QuantBlock::new(w, row / ROW_BLOCK) {
                block.row_to_f32(row % ROW_BLOCK, out);
                apply_gain(w, out);
            }
        }
    }
}
