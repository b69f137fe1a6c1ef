//! From rows of a source tensor to the regions of a stored matrix.

use core::ops::Range;
use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use forebay_kernels::pack::pack_row_block;
use forebay_kernels::weights::{Encoding, Group, MatrixShape, Quant, ROW_BLOCK};
use half::{bf16, f16};
use serde::Serialize;

use crate::quantize::{Feedback, Grid, Prefix, Row, quantise_nested, quantise_row};
use crate::source::{DType, Source, SourceTensor, half_at};

/// A matrix inside a source tensor.
#[derive(Clone, Debug)]
pub(super) struct View<'a> {
    /// The tensor.
    pub tensor: &'a SourceTensor,
    /// First row.
    pub first_row: u64,
    /// Rows there are; the stored matrix may have more, which are zero.
    pub rows: u32,
    /// First column.
    pub first_col: u64,
    /// Columns there are; the stored matrix may have more, which are zero.
    pub cols: u32,
    /// Width of a head whose rows are in the order of interleaved rotation, to be put in the order of halves.
    pub interleaved: Option<u32>,
    /// Rows or columns that are taken one by one, instead of those from the first on.
    pub picked: Option<Picked<'a>>,
}

/// Neurons in an order of their own.
#[derive(Clone, Copy, Debug)]
pub(super) enum Picked<'a> {
    /// These rows.
    Rows(&'a [u32]),
    /// These columns.
    Cols(&'a [u32]),
}

impl View<'_> {
    /// The source row of row `row`.
    fn row(&self, row: u32) -> u64 {
        if let Some(Picked::Rows(rows)) = self.picked {
            return rows[row as usize].into();
        }
        let row = match self.interleaved {
            None => row,
            Some(dim) => deinterleave(row, dim),
        };
        self.first_row + u64::from(row)
    }

    /// Whether columns are taken in whole groups of 32, which share scales in a GGUF file.
    fn whole_groups(&self) -> bool {
        let Some(Picked::Cols(cols)) = self.picked else { return true };
        let whole = |group: &[u32]| group[0].is_multiple_of(32) && (group[0]..).zip(group).all(|(a, b)| a == *b);
        cols.chunks(32).all(whole)
    }
}

/// Where row `row` of a projection with heads of `dim` rows lies when each pair (i, i + dim/2) is (2i, 2i + 1).
pub(super) fn deinterleave(row: u32, dim: u32) -> u32 {
    let (head, at) = (row / dim, row % dim);
    head * dim + at % (dim / 2) * 2 + at / (dim / 2)
}

/// Name of an encoding for people.
pub fn encoding_name(encoding: Encoding) -> String {
    match encoding {
        Encoding::F32 => "f32".into(),
        Encoding::F16 => "f16".into(),
        Encoding::Bf16 => "bf16".into(),
        Encoding::Quant(q) if grid(q) == Grid::TERNARY => format!("ternary group {}", q.group.len()),
        Encoding::Quant(q) => {
            let affine = if q.affine { " affine" } else { "" };
            format!("q{} group {}{affine}", q.fields.bits(), q.group.len())
        }
    }
}

/// What the encoding of weights cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Tally {
    /// Weights.
    pub weights: u64,
    /// Bytes stored, padding to whole rows and groups included.
    pub bytes: u64,
    /// Sum of squared differences from the source's values.
    pub squared_error: f64,
    /// Sum of the source's squared values.
    pub squared_value: f64,
}

impl Tally {
    /// Adds `other`.
    pub fn add(&mut self, other: &Self) {
        self.weights += other.weights;
        self.bytes += other.bytes;
        self.squared_error += other.squared_error;
        self.squared_value += other.squared_value;
    }

    fn compare(&mut self, x: f32, stored: f32) {
        let (x, stored) = (f64::from(x), f64::from(stored));
        self.squared_error += (x - stored) * (x - stored);
        self.squared_value += x * x;
    }

    /// Root of the mean squared difference.
    pub fn rmse(&self) -> f64 {
        if self.weights == 0 { 0.0 } else { (self.squared_error / self.weights as f64).sqrt() }
    }

    /// The same, relative to the root of the mean squared value.
    pub fn relative_rmse(&self) -> f64 {
        if self.squared_value == 0.0 { 0.0 } else { (self.squared_error / self.squared_value).sqrt() }
    }
}

/// Tallies by name of encoding.
pub(super) type Tallies = BTreeMap<String, Tally>;

/// Buffers that are used again for every row.
#[derive(Default)]
pub(super) struct Scratch {
    raw: Vec<u8>,
    row: Vec<f32>,
    whole: Vec<f32>,
    codes: Vec<u8>,
    scales: Vec<f16>,
    minima: Vec<f16>,
    wanted: Vec<f32>,
    gathered: Vec<u8>,
}

/// The grid of a quantised encoding.
pub(super) fn grid(q: Quant) -> Grid {
    Grid { bits: q.fields.bits(), affine: q.affine, zero_x2: q.zero_x2 }
}

/// Whether blocks of `dtype` can be stored as `q` code by code.
pub(super) fn imports(dtype: DType, q: Quant) -> bool {
    let same = match dtype {
        DType::Q4_0 => Grid::with_zero(4),
        DType::Q4_1 => Grid::affine(4),
        DType::Q8_0 => Grid::Q8,
        _ => return false,
    };
    q.group == Group::G32 && grid(q) == same
}

/// What the codes of a matrix are chosen for, and the sums over its weights that give the gains of the precisions below
/// its own.
#[derive(Default)]
pub(super) struct Aims {
    /// Which errors matter; for prefixes that are better by it codes of the source are given up. `None`: all the same.
    feedback: Option<Arc<Feedback>>,
    /// The precisions below: 1 level, 2 levels, ...
    prefixes: Vec<Prefix>,
    /// For each of them the sums of weight x value and of value squared.
    sums: Vec<(f64, f64)>,
}

impl Aims {
    /// For a matrix of `shape` in a unit; it has no precisions below if it has one level.
    /// With feedback, the squared error of a prefix counts `prefix_weight`.
    pub fn new(shape: &MatrixShape, feedback: Option<Arc<Feedback>>, prefix_weight: f32) -> Self {
        let Encoding::Quant(q) = shape.encoding else { return Self::default() };
        let feedback = feedback.filter(|_| q.fields.bits() <= 4);
        let mut dropped = q.fields.bits();
        let mut prefixes = Vec::new();
        for width in &q.fields.widths()[..q.fields.count() - 1] {
            dropped -= width;
            prefixes.push(match feedback {
                Some(_) => Prefix::with_feedback(dropped, prefix_weight),
                None => Prefix::new(dropped),
            });
        }
        Self { feedback, sums: vec![(0.0, 0.0); prefixes.len()], prefixes }
    }

    /// The gain of each precision, by least squares; that for which codes were chosen, if they were with feedback.
    pub fn gains(&self) -> impl Iterator<Item = f32> {
        let fitted = |&(xv, vv): &(f64, f64)| if vv > 0.0 { (xv / vv) as f32 } else { 1.0 };
        let chosen = self.feedback.is_some();
        self.prefixes.iter().zip(&self.sums).map(move |(p, sums)| if chosen { p.gain } else { fitted(sums) })
    }

    /// Adds a group: its weights, and what they are stored as.
    fn add(&mut self, grid: Grid, x: impl Iterator<Item = f32> + Clone, codes: &[u8], scale: f16, minimum: f16) {
        for (prefix, (xv, vv)) in self.prefixes.iter().zip(&mut self.sums) {
            for (x, code) in x.clone().zip(codes) {
                let value = f64::from(grid.prefix_weight(*code, prefix.dropped, scale, minimum));
                *xv += f64::from(x) * value;
                *vv += value * value;
            }
        }
    }
}

/// Encodes the row blocks `blocks` of `view` as a matrix of `shape`. `scales` and `fields` are these blocks'
/// parts of the regions; for floats `fields[0]` has `ROW_BLOCK` rows a block, but for the last. Codes are chosen
/// as `aims` say, and sums for gains go there.
#[expect(clippy::too_many_arguments, reason = "what is read, how it is stored, and where to")]
pub(super) fn encode(
    source: &Source,
    view: &View<'_>,
    shape: &MatrixShape,
    blocks: Range<usize>,
    scales: &mut [u8],
    fields: &mut [&mut [u8]],
    aims: &mut Aims,
    scratch: &mut Scratch,
) -> Result<Tally> {
    let mut tally = Tally::default();
    let Encoding::Quant(q) = shape.encoding else {
        let rows = (blocks.start * ROW_BLOCK) as u32..((blocks.end * ROW_BLOCK) as u32).min(shape.rows);
        encode_floats(source, view, shape, rows, fields[0], scratch, &mut tally)?;
        tally.bytes += fields[0].len() as u64;
        return Ok(tally);
    };
    let (groups, cols) = (shape.groups(), shape.cols as usize);
    let import =
        imports(source.dtype(view.tensor)?, q) && view.first_col.is_multiple_of(32) && view.cols.is_multiple_of(32);
    // Codes that serve no precision but their own cannot be chosen better than they are.
    let import = import && (aims.feedback.is_none() || aims.prefixes.is_empty()) && view.whole_groups();
    let mut rest: Vec<&mut [u8]> = fields.iter_mut().map(|f| &mut **f).collect();
    let mut scales_rest = scales;
    for block in blocks {
        let first = (block * ROW_BLOCK) as u32;
        let rows = (shape.rows - first).min(ROW_BLOCK as u32) as usize;
        scratch.codes.clear();
        scratch.codes.resize(rows * cols, 0);
        scratch.scales.clear();
        scratch.scales.resize(rows * groups, f16::ZERO);
        scratch.minima.clear();
        scratch.minima.resize(rows * groups, f16::ZERO);
        for r in 0..rows.min(view.rows.saturating_sub(first) as usize) {
            let row = view.row(first + r as u32);
            if !import {
                read_row(source, view, row, scratch)?;
            }
            let target = Target {
                codes: &mut scratch.codes[r * cols..][..cols],
                scales: &mut scratch.scales[r * groups..][..groups],
                minima: &mut scratch.minima[r * groups..][..groups],
            };
            if import {
                import_row(source, view, row, q, &mut scratch.raw, &mut scratch.gathered, target, aims, &mut tally)?;
            } else {
                requantise_row(source, view, row, q, &scratch.row, &mut scratch.wanted, target, aims, &mut tally)?;
            }
        }
        let (block_scales, after) = scales_rest.split_at_mut(shape.block_scale_bytes());
        scales_rest = after;
        let mut block_fields = Vec::with_capacity(rest.len());
        for (level, field) in rest.iter_mut().enumerate() {
            let (head, tail) = core::mem::take(field).split_at_mut(shape.block_field_bytes(level));
            block_fields.push(head);
            *field = tail;
        }
        tally.bytes += (block_scales.len() + block_fields.iter().map(|f| f.len()).sum::<usize>()) as u64;
        pack_row_block(shape, &scratch.codes, &scratch.scales, &scratch.minima, block_scales, &mut block_fields);
    }
    Ok(tally)
}

/// Where the codes, scales and minima of one row go.
struct Target<'a> {
    codes: &'a mut [u8],
    scales: &'a mut [f16],
    minima: &'a mut [f16],
}

fn columns(view: &View<'_>) -> Range<u64> {
    view.first_col..view.first_col + u64::from(view.cols)
}

/// Reads the view's columns of source row `row` into `scratch.row`.
fn read_row(source: &Source, view: &View<'_>, row: u64, scratch: &mut Scratch) -> Result<()> {
    let Scratch { raw, row: values, whole, .. } = scratch;
    values.resize(view.cols as usize, 0.0);
    let Some(Picked::Cols(cols)) = view.picked else {
        return source.read_f32(view.tensor, row, columns(view), raw, values);
    };
    whole.resize(usize::try_from(view.tensor.cols())?, 0.0);
    source.read_f32(view.tensor, row, 0..view.tensor.cols(), raw, whole)?;
    values.iter_mut().zip(cols).for_each(|(value, col)| *value = whole[*col as usize]);
    Ok(())
}

#[expect(clippy::too_many_arguments, reason = "what is read, how it is stored, and where to")]
fn import_row(
    source: &Source,
    view: &View<'_>,
    row: u64,
    q: Quant,
    raw: &mut Vec<u8>,
    gathered: &mut Vec<u8>,
    target: Target<'_>,
    aims: &mut Aims,
    tally: &mut Tally,
) -> Result<()> {
    let dtype = source.dtype(view.tensor)?;
    match view.picked {
        Some(Picked::Cols(cols)) => {
            gathered.clear();
            for group in cols.chunks(32) {
                let first = u64::from(group[0]);
                source.read_raw(view.tensor, row, first..first + 32, raw)?;
                gathered.extend_from_slice(raw);
            }
            core::mem::swap(raw, gathered);
        }
        _ => source.read_raw(view.tensor, row, columns(view), raw)?,
    }
    let codes = target.codes.chunks_exact_mut(32);
    for (g, (block, codes)) in raw.chunks_exact(dtype.bytes()).zip(codes).enumerate() {
        let scale = half_at(block, 0);
        let minimum = if q.affine { half_at(block, 2) } else { f16::ZERO };
        for found in [scale, minimum] {
            if !found.is_finite() {
                return Err(source.not_finite(view.tensor, row, view.first_col + g as u64 * 32, found.to_f32()));
            }
        }
        if dtype == DType::Q8_0 {
            codes.copy_from_slice(&block[2..34]);
        } else {
            let nibbles = &block[block.len() - 16..];
            for (j, byte) in nibbles.iter().enumerate() {
                codes[j] = byte & 15;
                codes[j + 16] = byte >> 4;
            }
        }
        target.scales[g] = scale;
        target.minima[g] = minimum;
        aims.add(grid(q), codes.iter().map(|&c| grid(q).weight(c, scale, minimum)), codes, scale, minimum);
        tally.squared_value += codes.iter().map(|&c| f64::from(grid(q).weight(c, scale, minimum)).powi(2)).sum::<f64>();
    }
    tally.weights += u64::from(view.cols);
    Ok(())
}

#[expect(clippy::too_many_arguments, reason = "what is read, how it is stored, and where to")]
fn requantise_row(
    source: &Source,
    view: &View<'_>,
    row: u64,
    q: Quant,
    values: &[f32],
    wanted: &mut Vec<f32>,
    target: Target<'_>,
    aims: &mut Aims,
    tally: &mut Tally,
) -> Result<()> {
    let (len, grid) = (q.group.len(), grid(q));
    let too_large = |x: &[f32]| {
        format!(
            "{}: tensor {}, row {row}: weights up to {:e} are too large to quantise; convert with --weights f32",
            source.file_name(view.tensor),
            view.tensor.name,
            x.iter().fold(0.0f32, |a, x| a.max(x.abs()))
        )
    };
    if let Some(feedback) = &aims.feedback {
        let codes = &mut target.codes[..values.len()];
        let mut row = Row { codes, scales: &mut *target.scales, minima: &mut *target.minima };
        quantise_row(values, feedback, grid, &aims.prefixes, len, wanted, &mut row)
            .with_context(|| too_large(values))?;
    } else {
        for (g, (x, codes)) in values.chunks(len).zip(target.codes.chunks_mut(len)).enumerate() {
            let own = &mut codes[..x.len()];
            let (scale, minimum) = quantise_nested(x, grid, &aims.prefixes, own).with_context(|| too_large(x))?;
            aims.add(grid, x.iter().copied(), own, scale, minimum);
            (target.scales[g], target.minima[g]) = (scale, minimum);
        }
    }
    for (g, (x, codes)) in values.chunks(len).zip(target.codes.chunks_mut(len)).enumerate() {
        let (scale, minimum) = (target.scales[g], target.minima[g]);
        let (own, padding) = codes.split_at_mut(x.len());
        // Columns of neurons that do not exist, in a group of some that do.
        padding.fill(grid.zero_code(scale, minimum));
        for (x, code) in x.iter().zip(own) {
            tally.compare(*x, grid.weight(*code, scale, minimum));
        }
    }
    tally.weights += u64::from(view.cols);
    Ok(())
}

fn encode_floats(
    source: &Source,
    view: &View<'_>,
    shape: &MatrixShape,
    rows: Range<u32>,
    out: &mut [u8],
    scratch: &mut Scratch,
    tally: &mut Tally,
) -> Result<()> {
    let bytes = if shape.encoding == Encoding::F32 { 4 } else { 2 };
    let row_bytes = shape.cols as usize * bytes;
    out.fill(0);
    for (row, out) in rows.zip(out.chunks_mut(row_bytes)) {
        if row >= view.rows {
            break;
        }
        let from = view.row(row);
        read_row(source, view, from, scratch)?;
        for (x, out) in scratch.row.iter().zip(out.chunks_exact_mut(bytes)) {
            let stored = match shape.encoding {
                Encoding::F32 => {
                    out.copy_from_slice(&x.to_le_bytes());
                    *x
                }
                Encoding::F16 => {
                    out.copy_from_slice(&f16::from_f32(*x).to_le_bytes());
                    f16::from_f32(*x).to_f32()
                }
                Encoding::Bf16 => {
                    out.copy_from_slice(&bf16::from_f32(*x).to_le_bytes());
                    bf16::from_f32(*x).to_f32()
                }
                Encoding::Quant(_) => bail!("tensor {}: not a float encoding", view.tensor.name),
            };
            ensure!(
                stored.is_finite(),
                "{}: tensor {}, row {from}: {x:e} is too large for {}; convert with --weights f32",
                source.file_name(view.tensor),
                view.tensor.name,
                encoding_name(shape.encoding)
            );
            tally.compare(*x, stored);
        }
        tally.weights += u64::from(view.cols);
    }
    Ok(())
}
