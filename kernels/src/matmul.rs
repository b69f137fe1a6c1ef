//! Matrix products: `out[t][r] = sum over k of w[r][k] * x[t][k]`.
//!
//! Workers own output rows, in contiguous ranges fixed by their number. Inside a worker a block of weights is
//! multiplied with all tokens before the next block is touched, so that the weights stream once.

use core::ops::Range;

use crate::activations::Input;
use crate::arch::split::{Columns, Split, run_parts};
use crate::arch::{Float, Kernels};
use crate::exec::Exec;
use crate::ops::{Activation, gate_mul};
use crate::reference::quant::QuantBlock;
use crate::weights::{Encoding, MatrixRef, MatrixShape, ROW_BLOCK};

/// Below this many multiplications waking the other workers costs more than it saves.
const SERIAL_WORK: usize = 32 * 1024;
/// Rows of a float matrix multiplied with all tokens before the next ones.
const FLOAT_ROWS: usize = 16;
/// Most products that one round of the workers takes.
const MAX_PRODUCTS: usize = 3;

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
    match work {
        0..SERIAL_WORK => 1,
        _ => exec.workers.count().min(units).clamp(1, usize::BITS as usize),
    }
}

/// Rows that one worker multiplies, or a multiple of them.
fn row_unit(x: Input<'_>) -> usize {
    match x {
        Input::F32(_) => 1,
        Input::Quant(_) => ROW_BLOCK,
    }
}

/// Checks the operands of a product.
fn check(w: &MatrixRef<'_>, x: Input<'_>, tokens: usize, out: &[f32]) {
    let shape = w.shape();
    let (rows, cols) = (shape.rows as usize, shape.cols as usize);
    assert_eq!(out.len(), tokens * rows, "out is [tokens][rows]");
    match (shape.act_spec(), x) {
        (None, Input::F32(x)) => assert_eq!(x.len(), tokens * cols, "x is [tokens][cols]"),
        (Some(spec), Input::Quant(acts)) => {
            assert!(acts.fits(spec), "input quantised for another matrix");
            assert!(acts.tokens() == tokens && acts.cols() == cols, "input of another shape");
        }
        _ => panic!("float matrices take f32 inputs, quantised matrices quantised ones"),
    }
}

/// Multiplies `rows` of `w`, whose first row is column `base` of the output; `columns` are at least theirs.
fn multiply(
    kernels: &dyn Kernels,
    w: &MatrixRef<'_>,
    x: Input<'_>,
    rows: Range<usize>,
    base: usize,
    columns: &mut Columns<'_, f32>,
) {
    let shape = w.shape();
    let first_column = columns.range().start;
    match (shape.encoding.float(), x) {
        (Some(format), Input::F32(x)) => {
            let cols = shape.cols as usize;
            let stride = cols * format.bytes();
            if cols == 0 {
                return;
            }
            let data = &w.fields()[0][rows.start * stride..rows.end * stride];
            for (block, data) in data.chunks(FLOAT_ROWS * stride).enumerate() {
                let at = base + rows.start + block * FLOAT_ROWS - first_column;
                let n = data.len() / stride;
                for (token, x) in x.chunks_exact(cols).enumerate() {
                    let out = &mut columns.row(token)[at..at + n];
                    kernels.dot_rows(format, data, x, out);
                    apply_gain(w, out);
                }
            }
        }
        (None, Input::Quant(acts)) => {
            for first_row in rows.clone().step_by(ROW_BLOCK) {
                let Some(block) = QuantBlock::new(w, first_row / ROW_BLOCK) else { return };
                let at = base + first_row - first_column;
                let n = ROW_BLOCK.min(rows.end - first_row);
                let mut put = |token: usize, products: &[f32; ROW_BLOCK]| {
                    let out = &mut columns.row(token)[at..at + n];
                    match out.first_chunk_mut() {
                        Some(out) => *out = *products,
                        None => out.copy_from_slice(&products[..n]),
                    }
                    apply_gain(w, out);
                };
                if acts.tokens() == 1 {
                    let mut products = [[0.0; ROW_BLOCK]];
                    kernels.quant_tile(&block, &acts, 0, &mut products);
                    put(0, &products[0]);
                } else {
                    kernels.quant_block(&block, &acts, &mut put);
                }
            }
        }
        _ => (),
    }
}

/// Multiplies `w` with `tokens` vectors; `out` is `[tokens][rows]` and is overwritten.
///
/// # Panics
/// If `out` or the input has not the shape's length, or the input's kind or specification is not the one
/// that [`MatrixShape::act_spec`] asks for.
pub fn matmul(exec: &Exec<'_>, w: &MatrixRef<'_>, x: Input<'_>, tokens: usize, out: &mut [f32]) {
    matmul_all(exec, x, tokens, &mut [(*w, out)]);
}

/// As [`matmul`], of several matrices with the same input, in one round of the workers.
///
/// # Panics
/// As [`matmul`].
pub fn matmul_all(exec: &Exec<'_>, x: Input<'_>, tokens: usize, products: &mut [(MatrixRef<'_>, &mut [f32])]) {
    for products in products.chunks_mut(MAX_PRODUCTS) {
        round(exec, x, tokens, products, None, &|_, _| ());
    }
}

/// A gated unit's first half: `gate = activation(gate x + bias) * (up x + bias)`. `out`, `gate` then `up`, are both
/// `[tokens][rows]`; both are overwritten.
///
/// # Panics
/// As [`matmul`], or if the matrices or biases have not the same number of rows.
pub fn matmul_gated(
    exec: &Exec<'_>,
    activation: Activation,
    matrices: [MatrixRef<'_>; 2],
    biases: [Option<&[f32]>; 2],
    x: Input<'_>,
    tokens: usize,
    out: [&mut [f32]; 2],
) {
    let rows = matrices[0].shape().rows as usize;
    assert!(matrices[1].shape().rows as usize == rows, "gate and up differ in rows");
    assert!(biases.iter().flatten().all(|bias| bias.len() == rows), "a bias is [rows]");
    let kernels = exec.backend.kernels();
    let [gate, up] = out;
    let products = &mut [(matrices[0], gate), (matrices[1], up)];
    round(exec, x, tokens, products, None, &|columns, _| {
        let [Some(gate), Some(up), _] = columns else { return };
        let range = gate.range();
        for token in 0..tokens {
            let (gate, up) = (gate.row(token), up.row(token));
            for (out, bias) in [(&mut *gate, biases[0]), (&mut *up, biases[1])] {
                if let Some(bias) = bias {
                    kernels.add(out, &bias[range.clone()]);
                }
            }
            gate_mul(exec, activation, gate, up);
        }
    });
}

/// `acc += w x`, both `acc` and `out`, which holds the product, being `[tokens][rows]`.
///
/// # Panics
/// As [`matmul`], or if `acc` and `out` differ in length.
pub fn matmul_add(exec: &Exec<'_>, w: &MatrixRef<'_>, x: Input<'_>, tokens: usize, out: &mut [f32], acc: &mut [f32]) {
    assert_eq!(acc.len(), out.len(), "acc is [tokens][rows]");
    let kernels = exec.backend.kernels();
    round(exec, x, tokens, &mut [(*w, out)], Some(acc), &|columns, acc| {
        let ([Some(out), ..], Some(acc)) = (columns, acc) else { return };
        (0..tokens).for_each(|token| kernels.add(acc.row(token), out.row(token)));
    });
}

/// Whether units with a gate of this shape can be multiplied together by [`matmul_gated_units`]: whole row blocks.
pub const fn units_fit(shape: &MatrixShape) -> bool {
    shape.act_spec().is_none() || (shape.rows as usize).is_multiple_of(ROW_BLOCK)
}

/// As [`matmul_gated`], of several units with the same input of one token and without biases, in one round of the
/// workers. The outputs are both `[units][rows]`.
///
/// # Panics
/// As [`matmul`], or if the matrices differ in rows or do not fit ([`units_fit`]).
pub fn matmul_gated_units(
    exec: &Exec<'_>,
    activation: Activation,
    units: &[[MatrixRef<'_>; 2]],
    x: Input<'_>,
    out: [&mut [f32]; 2],
) {
    let [gate, up] = out;
    assert!(gate.len() == up.len(), "gate and up are both [units][rows]");
    if gate.is_empty() || units.is_empty() {
        return;
    }
    let (width, rows) = (gate.len(), gate.len() / units.len());
    assert!(units.as_flattened().iter().all(|w| units_fit(&w.shape())), "units are whole row blocks");
    let mut work = 0;
    for (w, index) in units.as_flattened().iter().zip(0..) {
        let out = if index % 2 == 0 { &mut *gate } else { &mut *up };
        let out = &mut out[index / 2 * rows..][..rows];
        check(w, x, 1, out);
        work += rows * w.shape().cols as usize;
        if w.shape().cols == 0 {
            out.fill(0.0);
        }
    }
    let unit = row_unit(x);
    let parts = parts(exec, work, width / unit);
    let (gates, ups) = (Split::new(gate, width, unit, parts), Split::new(up, width, unit, parts));
    let kernels = exec.backend.kernels();
    run_parts(exec, parts, &|part| {
        let (Some(mut gate), Some(mut up)) = (gates.take(part), ups.take(part)) else { return };
        let range = gate.range();
        for (base, [gate_of, up_of]) in (0..).step_by(rows).zip(units) {
            let its = range.start.max(base)..range.end.min(base + rows);
            if !its.is_empty() {
                multiply(kernels, gate_of, x, its.start - base..its.end - base, base, &mut gate);
                multiply(kernels, up_of, x, its.start - base..its.end - base, base, &mut up);
            }
        }
        gate_mul(exec, activation, gate.row(0), up.row(0));
    });
}

/// `acc += w x` for one matrix after the other, in one round of the workers. `x` has a token for each of them; `acc`
/// and `out`, which holds the last product, are `[rows]`.
///
/// # Panics
/// As [`matmul`], or if `acc` and `out` differ in length.
pub fn matmul_add_units(exec: &Exec<'_>, units: &[MatrixRef<'_>], x: Input<'_>, out: &mut [f32], acc: &mut [f32]) {
    assert_eq!(acc.len(), out.len(), "acc is [rows]");
    if out.is_empty() {
        return;
    }
    let mut work = 0;
    for (index, w) in units.iter().enumerate() {
        check(w, x.token(index, units.len()), 1, out);
        work += out.len() * w.shape().cols as usize;
    }
    out.fill(0.0);
    let (rows, unit) = (out.len(), row_unit(x));
    let parts = parts(exec, work, rows.div_ceil(unit));
    let (outs, accs) = (Split::new(out, rows, unit, parts), Split::new(acc, rows, unit, parts));
    let kernels = exec.backend.kernels();
    run_parts(exec, parts, &|part| {
        let (Some(mut out), Some(mut acc)) = (outs.take(part), accs.take(part)) else { return };
        for (index, w) in units.iter().enumerate() {
            multiply(kernels, w, x.token(index, units.len()), out.range(), 0, &mut out);
            kernels.add(acc.row(0), out.row(0));
        }
    });
}

/// The columns of one part: of every product, and of what they are added to.
type After<'f> = dyn Fn(&mut [Option<Columns<'_, f32>>; MAX_PRODUCTS], Option<&mut Columns<'_, f32>>) + Sync + 'f;

/// One round of the workers: every part of every product, at most [`MAX_PRODUCTS`], then `after` on the same columns.
fn round(
    exec: &Exec<'_>,
    x: Input<'_>,
    tokens: usize,
    products: &mut [(MatrixRef<'_>, &mut [f32])],
    acc: Option<&mut [f32]>,
    after: &After<'_>,
) {
    let unit = row_unit(x);
    let (mut work, mut units) = (0, 0);
    for (w, out) in products.iter() {
        check(w, x, tokens, out);
        let (rows, cols) = (w.shape().rows as usize, w.shape().cols as usize);
        work += tokens * rows * cols;
        units = units.max(rows.div_ceil(unit));
    }
    let parts = parts(exec, work, units);
    let mut splits = [const { None }; MAX_PRODUCTS];
    let mut acc_width = 0;
    for (split, (w, out)) in splits.iter_mut().zip(products) {
        let rows = w.shape().rows as usize;
        if !out.is_empty() {
            if w.shape().cols == 0 {
                out.fill(0.0);
            }
            acc_width = rows;
            *split = Some((*w, Split::new(out, rows, unit, parts)));
        }
    }
    let acc = acc.filter(|acc| !acc.is_empty()).map(|acc| Split::new(acc, acc_width, unit, parts));
    let kernels = exec.backend.kernels();
    run_parts(exec, parts, &|part| {
        let mut columns = [const { None }; MAX_PRODUCTS];
        for (columns, split) in columns.iter_mut().zip(&splits) {
            let Some((w, split)) = split else { continue };
            *columns = split.take(part);
            if let Some(columns) = columns {
                multiply(kernels, w, x, columns.range(), 0, columns);
            }
        }
        after(&mut columns, acc.as_ref().and_then(|acc| acc.take(part)).as_mut());
    });
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
