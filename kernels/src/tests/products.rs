//! Matrix products of every encoding against integers and the fixed float order.

use super::{Rng, assert_same, executions, fastest, nmse};
use crate::activations::{Input, quantise};
use crate::exec::{Backend, Exec, Serial};
use crate::matmul::{
    matmul, matmul_add, matmul_add_units, matmul_all, matmul_gated, matmul_gated_units, row_to_f32, units_fit,
};
use crate::ops::{self, Activation};
use crate::pack::{f16, pack_row_block, unpack_row};
use crate::weights::*;
use proptest::prelude::*;

/// Every valid way to cut a code.
fn splits() -> Vec<Fields> {
    let mut all = Vec::new();
    for code in 0..5usize.pow(4) {
        let widths = [code / 125, code / 25 % 5, code / 5 % 5, code % 5].map(|i| [0, 1, 2, 4, 8][i]);
        all.extend(Fields::new(widths));
    }
    all
}

struct Case {
    shape: MatrixShape,
    quant: Quant,
    codes: Vec<u8>,
    scales: Vec<f16>,
    minima: Vec<f16>,
    bytes: Vec<u8>,
}

impl Case {
    fn new(rng: &mut Rng, quant: Quant, rows: usize, cols: usize) -> Self {
        let shape = MatrixShape { rows: rows as u32, cols: cols as u32, encoding: Encoding::Quant(quant) };
        let bits = quant.fields.bits();
        let extreme = rng.below(4) == 0;
        let mut code = || {
            let code = rng.next() as u8;
            let code = if extreme { if code & 1 == 0 { 0x80 } else { 0x7f } } else { code };
            if bits == 8 { code } else { code & ((1 << bits) - 1) }
        };
        let codes: Vec<u8> = (0..rows * cols).map(|_| code()).collect();
        let groups = shape.groups();
        let mut half = || match rng.below(16) {
            0 => f16::ZERO,
            1 => f16::MIN_POSITIVE_SUBNORMAL,
            2 => f16::MAX,
            3 => -f16::MIN_POSITIVE,
            _ => f16::from_f32(rng.normal() * 0.05),
        };
        let scales: Vec<f16> = (0..rows * groups).map(|_| half()).collect();
        let minima: Vec<f16> = (0..if quant.affine { rows * groups } else { 0 }).map(|_| half()).collect();
        let mut case = Self { shape, quant, codes, scales, minima, bytes: Vec::new() };
        case.pack();
        case
    }
    fn pack(&mut self) {
        let shape = self.shape;
        let (rows, cols, groups) = (shape.rows as usize, shape.cols as usize, shape.groups());
        // Old bytes must not show through the padding.
        self.bytes = vec![0xa5; shape.bytes() as usize];
        let (mut scales, mut rest) = self.bytes.split_at_mut(shape.scale_bytes() as usize);
        let mut fields = Vec::new();
        for level in 0..shape.levels() {
            let field;
            (field, rest) = rest.split_at_mut(shape.field_bytes(level) as usize);
            fields.push(field);
        }
        for first in (0..rows).step_by(ROW_BLOCK) {
            let last = rows.min(first + ROW_BLOCK);
            let mut these = Vec::new();
            let these_scales;
            (these_scales, scales) = scales.split_at_mut(shape.block_scale_bytes());
            for (level, field) in fields.iter_mut().enumerate() {
                let (this, later) = std::mem::take(field).split_at_mut(shape.block_field_bytes(level));
                these.push(this);
                *field = later;
            }
            let minima = if self.quant.affine { &self.minima[first * groups..last * groups] } else { &[] };
            pack_row_block(
                &shape,
                &self.codes[first * cols..last * cols],
                &self.scales[first * groups..last * groups],
                minima,
                these_scales,
                &mut these,
            );
        }
    }
    fn matrix(&self, levels: usize) -> MatrixRef<'_> {
        let all = MatrixRef::from_contiguous(self.shape, &self.bytes).unwrap();
        MatrixRef::new(self.shape, all.scales(), &all.fields()[..levels]).unwrap()
    }
    /// Bits not among the first `levels` fields.
    fn dropped(&self, levels: usize) -> u32 {
        self.quant.fields.widths()[levels..].iter().map(|&w| u32::from(w)).sum()
    }
    fn code(&self, row: usize, k: usize, dropped: u32) -> i64 {
        let code = self.codes[row * self.shape.cols as usize + k];
        if self.quant.fields.bits() == 8 { i64::from(code as i8) } else { i64::from(code >> dropped) }
    }
    /// The product by the formula of docs/arithmetic.md, from the codes, with sums of 64 bits.
    fn expected(&self, levels: usize, x: &[f32]) -> Vec<f32> {
        let (rows, cols) = (self.shape.rows as usize, self.shape.cols as usize);
        let (len, groups) = (self.quant.group.len(), self.shape.groups());
        let d = self.dropped(levels);
        let limit = if self.quant.fields.widths().contains(&1) { 63.0f32 } else { 127.0 };
        let mut out = Vec::new();
        for x in x.chunks(cols) {
            let quantised: Vec<(f32, Vec<i64>)> = x
                .chunks(len)
                .map(|x| {
                    if x.iter().any(|x| !x.is_finite()) {
                        return (f32::NAN, vec![0; x.len()]);
                    }
                    let amax = x.iter().fold(0.0, |max: f32, x| max.max(x.abs()));
                    if amax < 2.0f32.powi(-120) {
                        return (0.0, vec![0; x.len()]);
                    }
                    let q = |x: &f32| (x * (limit / amax)).round_ties_even().clamp(-limit, limit) as i64;
                    (amax / limit, x.iter().map(q).collect())
                })
                .collect();
            for row in 0..rows {
                let mut acc = 0.0;
                for (g, (s, q)) in quantised.iter().enumerate() {
                    let a: i64 = q.iter().sum();
                    let i: i64 = q.iter().enumerate().map(|(k, q)| q * self.code(row, g * len + k, d)).sum();
                    let j = (i << (d + 1)) + ((1 << d) - 1 - i64::from(self.quant.zero_x2)) * a;
                    assert!(j.abs() < 1 << 24);
                    acc += j as f32 * (self.scales[row * groups + g].to_f32() * (0.5 * s));
                    if self.quant.affine {
                        acc += self.minima[row * groups + g].to_f32() * (s * a as f32);
                    }
                }
                out.push(acc);
            }
        }
        out
    }
    fn check(&self, x: &[f32], tokens: usize) {
        let (rows, cols) = (self.shape.rows as usize, self.shape.cols as usize);
        let spec = self.shape.act_spec().unwrap();
        let mut scratch = vec![0x5a; spec.bytes(cols, tokens)];
        for levels in 1..=self.shape.levels() {
            let want = self.expected(levels, x);
            executions(|exec| {
                scratch.fill(0x5a);
                let acts = quantise(exec, spec, x, tokens, cols, &mut scratch);
                let mut out = vec![f32::NAN; tokens * rows];
                matmul(exec, &self.matrix(levels), Input::Quant(acts), tokens, &mut out);
                assert_same(&out, &want, (exec, self.shape, levels, tokens));
            });
        }
    }
}

fn inputs(rng: &mut Rng, n: usize) -> Vec<f32> {
    match rng.below(6) {
        0 => vec![0.0; n],
        1 => (0..n).map(|_| 1e-38 * rng.normal()).collect(),
        2 => (0..n).map(|_| 1e30 * rng.normal()).collect(),
        3 => (0..n).map(|_| rng.nasty()).collect(),
        // Ties: halves of the rounding step.
        4 => (0..n).map(|_| rng.below(127) as f32 * 0.5 - 31.5).collect(),
        _ => rng.normals(n),
    }
}

const GROUPS: [Group; 3] = [Group::G32, Group::G64, Group::G128];

#[test]
fn there_are_as_many_splits_as_compositions() {
    // Compositions of 1, 2, 3 and 4 into parts of 1, 2 and 4, and the 8-bit field.
    assert_eq!(splits().len(), 1 + 2 + 3 + 6 + 1);
}

#[test]
fn every_split_prefix_and_group_matches_the_formula() {
    let mut rng = Rng::new(1);
    for (i, fields) in splits().into_iter().enumerate() {
        for group in GROUPS {
            for affine in [false, true] {
                let zeros = if affine { [0, 0, 0] } else { [0, 1 << fields.bits().min(4), 1] };
                for zero_x2 in zeros {
                    let quant = Quant { fields, group, affine, zero_x2 };
                    let (rows, cols) = [(33, 200), (1, 1), (70, 129), (32, 256), (5, 640)][rng.below(5)];
                    let tokens = 1 + (i + zero_x2 as usize) % 9;
                    let case = Case::new(&mut rng, quant, rows, cols);
                    let x = inputs(&mut rng, tokens * cols);
                    case.check(&x, tokens);
                }
            }
        }
    }
}

#[test]
fn largest_sums_do_not_wrap() {
    for fields in splits() {
        for code in [0xff, 0x80, 0x7f] {
            for sign in [1.0, -1.0] {
                let quant = Quant { fields, group: Group::G128, affine: false, zero_x2: 0 };
                let mut rng = Rng::new(2);
                let mut case = Case::new(&mut rng, quant, 64, 384);
                let bits = fields.bits();
                case.codes.fill(if bits == 8 { code } else { code & ((1 << bits) - 1) });
                case.pack();
                case.check(&vec![sign * 3.0; 5 * 384], 5);
            }
        }
    }
}

#[test]
fn enough_work_to_split_matches_too() {
    let mut rng = Rng::new(3);
    for fields in [Fields::NIBBLE, Fields::Q8, Fields::new([2, 1, 1, 0]).unwrap()] {
        let quant = Quant { fields, group: Group::G32, affine: true, zero_x2: 0 };
        for rows in [33, 257] {
            let case = Case::new(&mut rng, quant, rows, 1000);
            let x = rng.normals(6 * 1000);
            case.check(&x[..1000], 1);
            case.check(&x, 6);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn odd_sizes_match_the_formula(
        seed: u64, split in 0usize..13, group in 0usize..3, affine: bool,
        rows in 1usize..100, cols in 1usize..700, tokens in 1usize..10,
    ) {
        let mut rng = Rng::new(seed);
        let fields = splits()[split];
        let zero_x2 = if affine { 0 } else { rng.below(17) as u8 };
        let case = Case::new(&mut rng, Quant { fields, group: GROUPS[group], affine, zero_x2 }, rows, cols);
        let x = inputs(&mut rng, tokens * cols);
        case.check(&x, tokens);
    }

    #[test]
    fn float_matrices_match_the_fixed_order(
        seed: u64, format in 0usize..3, rows in 1usize..200, cols in 1usize..700, tokens in 1usize..10, nasty: bool,
    ) {
        let mut rng = Rng::new(seed);
        let value = |rng: &mut Rng| if nasty { rng.nasty() } else { rng.normal() };
        let stored: Vec<f32> = (0..rows * cols).map(|_| value(&mut rng)).collect();
        let x: Vec<f32> = (0..tokens * cols).map(|_| value(&mut rng)).collect();
        let (encoding, weights, mut bytes): (_, Vec<f32>, Vec<u8>) = match format {
            0 => (Encoding::F32, stored.clone(), stored.iter().flat_map(|w| w.to_le_bytes()).collect()),
            1 => {
                let halves: Vec<f16> = stored.iter().map(|&w| f16::from_f32(w)).collect();
                let bytes = halves.iter().flat_map(|h| h.to_le_bytes()).collect();
                (Encoding::F16, halves.iter().map(|h| h.to_f32()).collect(), bytes)
            }
            _ => {
                let cut: Vec<f32> = stored.iter().map(|w| f32::from_bits(w.to_bits() & 0xffff_0000)).collect();
                let bytes = cut.iter().flat_map(|w| ((w.to_bits() >> 16) as u16).to_le_bytes()).collect();
                (Encoding::Bf16, cut, bytes)
            }
        };
        let shape = MatrixShape { rows: rows as u32, cols: cols as u32, encoding };
        bytes.resize(shape.bytes() as usize, 0);
        let matrix = MatrixRef::from_contiguous(shape, &bytes).unwrap();
        let mut want = Vec::new();
        for x in x.chunks(cols) {
            for w in weights.chunks(cols) {
                let mut p = [0.0f32; 16];
                for (i, (x, w)) in x.iter().zip(w).enumerate() {
                    p[i % 16] += x * w;
                }
                for n in [8, 4, 2, 1] {
                    for i in 0..n {
                        p[i] += p[i + n];
                    }
                }
                want.push(p[0]);
            }
        }
        executions(|exec| {
            let mut out = vec![f32::NAN; tokens * rows];
            matmul(exec, &matrix, Input::F32(&x), tokens, &mut out);
            assert_same(&out, &want, (exec, shape));
        });
        let row = rng.below(rows);
        let mut out = vec![f32::NAN; cols];
        row_to_f32(&matrix, row, &mut out);
        assert_same(&out, &weights[row * cols..(row + 1) * cols], "row");
    }
}

/// With codes in pairs of opposite values, the first bits of a code are a code of fewer bits whose step is larger.
#[test]
fn a_prefix_is_the_matrix_of_its_bits() {
    let mut rng = Rng::new(6);
    let fields = |widths| Fields::new(widths).unwrap();
    for (whole, levels, prefix) in [
        ([2, 2, 0, 0], 1, [2, 0, 0, 0]),
        ([1, 1, 1, 1], 1, [1, 0, 0, 0]),
        ([1, 1, 1, 1], 2, [1, 1, 0, 0]),
        ([1, 1, 1, 1], 3, [1, 1, 1, 0]),
        ([2, 1, 1, 0], 2, [2, 1, 0, 0]),
    ] {
        let (whole, prefix) = (fields(whole), fields(prefix));
        let d = whole.bits() - prefix.bits();
        let (rows, cols, group) = (70, 150, Group::G32);
        let quant = Quant { fields: whole, group, affine: false, zero_x2: (1 << whole.bits()) - 1 };
        let mut nested = Case::new(&mut rng, quant, rows, cols);
        nested.scales.iter_mut().for_each(|s| *s = f16::from_f32(rng.normal() * 0.05));
        nested.pack();
        let quant = Quant { fields: prefix, zero_x2: (1 << prefix.bits()) - 1, ..quant };
        let mut alone = Case::new(&mut rng, quant, rows, cols);
        alone.codes = nested.codes.iter().map(|code| code >> d).collect();
        alone.scales = nested.scales.iter().map(|s| f16::from_f32(s.to_f32() * f32::from(1u8 << d))).collect();
        alone.pack();
        let x = inputs(&mut rng, 3 * cols);
        assert_eq!(nested.shape.act_spec(), alone.shape.act_spec());
        alone.check(&x, 3);
        let want = alone.expected(prefix.count(), &x);
        let spec = nested.shape.act_spec().unwrap();
        let mut scratch = vec![0; spec.bytes(cols, 3)];
        for gain in [1.0, 0.9375, -3.7, f32::NAN] {
            let matrix = nested.matrix(levels).with_gain(gain);
            let scaled: Vec<f32> = want.iter().map(|x| x * gain).collect();
            executions(|exec| {
                let acts = quantise(exec, spec, &x, 3, cols, &mut scratch);
                let mut out = vec![f32::NAN; 3 * rows];
                matmul(exec, &matrix, Input::Quant(acts), 3, &mut out);
                assert_same(&out, &scaled, (exec, whole, levels, gain));
            });
            let (mut of_prefix, mut of_alone) = (vec![0.0; cols], vec![0.0; cols]);
            row_to_f32(&matrix, 41, &mut of_prefix);
            row_to_f32(&alone.matrix(prefix.count()), 41, &mut of_alone);
            of_alone.iter_mut().for_each(|x| *x *= gain);
            assert_same(&of_prefix, &of_alone, (whole, levels, gain));
        }
    }
}

#[test]
fn a_float_matrix_has_a_gain_too() {
    let mut rng = Rng::new(8);
    let shape = MatrixShape { rows: 5, cols: 33, encoding: Encoding::F32 };
    let mut bytes: Vec<u8> = (0..5 * 33).flat_map(|_| rng.normal().to_le_bytes()).collect();
    bytes.resize(shape.bytes() as usize, 0);
    let x: Vec<f32> = (0..2 * 33).map(|_| rng.normal()).collect();
    let plain = MatrixRef::from_contiguous(shape, &bytes).unwrap();
    executions(|exec| {
        let (mut want, mut got) = (vec![0.0; 10], vec![0.0; 10]);
        matmul(exec, &plain, Input::F32(&x), 2, &mut want);
        matmul(exec, &plain.with_gain(0.7), Input::F32(&x), 2, &mut got);
        want.iter_mut().for_each(|x| *x *= 0.7);
        assert_same(&got, &want, exec);
    });
}

#[test]
fn rows_dequantise_and_codes_unpack() {
    let mut rng = Rng::new(4);
    for fields in splits() {
        for affine in [false, true] {
            let zero_x2 = if affine || fields.bits() == 8 { 0 } else { (1 << fields.bits()) - 1 };
            let quant = Quant { fields, group: Group::G64, affine, zero_x2 };
            let case = Case::new(&mut rng, quant, 45, 150);
            let groups = case.shape.groups();
            for levels in 1..=case.shape.levels() {
                let d = case.dropped(levels);
                let matrix = case.matrix(levels);
                for row in [0, 17, 31, 32, 44] {
                    let mut out = vec![0.0; 150];
                    row_to_f32(&matrix, row, &mut out);
                    for (k, got) in out.iter().enumerate() {
                        let at = row * groups + k / 64;
                        let code = case.code(row, k, d) as f64 * f64::from(1 << d) + (f64::from(1 << d) - 1.0) / 2.0;
                        let scale = case.scales[at].to_f64();
                        let minimum = if affine { case.minima[at].to_f64() } else { 0.0 };
                        let want = scale * (code - f64::from(zero_x2) / 2.0) + minimum;
                        let bound = 1e-6 * (want.abs() + minimum.abs()) + 1e-9;
                        assert!((f64::from(*got) - want).abs() <= bound, "{got} {want}");
                    }
                }
            }
            let matrix = case.matrix(case.shape.levels());
            let fields: Vec<&[u8]> = matrix.fields().to_vec();
            let mut codes = vec![0; 150];
            unpack_row(&quant, &fields, 17, &mut codes);
            assert_eq!(codes, case.codes[17 * 150..18 * 150]);
        }
    }
}

#[test]
fn the_definition_is_close_to_binary64() {
    for (fields, group, bound) in [
        (Fields::NIBBLE, Group::G32, 1.2e-4),
        (Fields::NIBBLE, Group::G128, 2e-4),
        (Fields::new([2, 0, 0, 0]).unwrap(), Group::G64, 2e-4),
        (Fields::new([1, 0, 0, 0]).unwrap(), Group::G128, 2e-4),
        (Fields::Q8, Group::G32, 4e-5),
    ] {
        let mut rng = Rng::new(5);
        let bits = fields.bits();
        let zero_x2 = if bits == 8 { 0 } else { (1 << bits) - 1 };
        let quant = Quant { fields, group, affine: false, zero_x2 };
        let (rows, cols) = (64, 1024);
        let mut case = Case::new(&mut rng, quant, rows, cols);
        case.codes.iter_mut().for_each(|c| *c = rng.next() as u8 & (0xffu16 >> (8 - bits)) as u8);
        case.scales.iter_mut().for_each(|s| *s = f16::from_f32(0.05 + 0.01 * rng.uniform()));
        case.pack();
        let x = rng.normals(cols);
        let groups = case.shape.groups();
        let want: Vec<f64> = (0..rows)
            .map(|row| {
                let weight = |k: usize| {
                    let code = case.code(row, k, 0) as f64 - f64::from(zero_x2) / 2.0;
                    code * case.scales[row * groups + k / group.len()].to_f64()
                };
                (0..cols).map(|k| weight(k) * f64::from(x[k])).sum()
            })
            .collect();
        let exec = Exec { backend: Backend::scalar(), workers: &Serial };
        let spec = case.shape.act_spec().unwrap();
        let mut scratch = vec![0; spec.bytes(cols, 1)];
        let acts = quantise(&exec, spec, &x, 1, cols, &mut scratch);
        let mut out = vec![0.0; rows];
        matmul(&exec, &case.matrix(case.shape.levels()), Input::Quant(acts), 1, &mut out);
        let error = nmse(&out, &want);
        assert!(error < bound, "{error:e}: {quant:?}");
    }
}

#[test]
fn empty_shapes_give_zeros() {
    let exec = Exec { backend: Backend::detect(), workers: &Serial };
    let encodings =
        [Encoding::F32, Encoding::Quant(Quant { fields: Fields::NIBBLE, group: Group::G32, affine: true, zero_x2: 0 })];
    for encoding in encodings {
        for (rows, cols) in [(0, 5), (5, 0), (0, 0)] {
            let shape = MatrixShape { rows, cols, encoding };
            let bytes = vec![0; shape.bytes() as usize];
            let matrix = MatrixRef::from_contiguous(shape, &bytes).unwrap();
            let x = vec![1.0; 2 * cols as usize];
            let mut scratch = vec![0; shape.act_spec().map_or(0, |spec| spec.bytes(cols as usize, 2))];
            let input = match shape.act_spec() {
                None => Input::F32(&x),
                Some(spec) => Input::Quant(quantise(&exec, spec, &x, 2, cols as usize, &mut scratch)),
            };
            let mut out = vec![7.0; 2 * rows as usize];
            matmul(&exec, &matrix, input, 2, &mut out);
            assert!(out.iter().all(|&v| v == 0.0));
        }
    }
}

#[test]
fn one_input_serves_matrices_of_other_widths() {
    let mut rng = Rng::new(6);
    let quant = |widths| Quant { fields: Fields::new(widths).unwrap(), group: Group::G32, affine: false, zero_x2: 15 };
    let pairs = Case::new(&mut rng, quant([2, 2, 0, 0]), 40, 96);
    let nibbles = Case::new(&mut rng, quant([4, 0, 0, 0]), 40, 96);
    let x = rng.normals(96);
    executions(|exec| {
        let spec = pairs.shape.act_spec().unwrap();
        let mut scratch = vec![0; spec.bytes(96, 1)];
        let acts = quantise(exec, spec, &x, 1, 96, &mut scratch);
        for case in [&pairs, &nibbles] {
            let mut out = vec![0.0; 40];
            matmul(exec, &case.matrix(case.shape.levels()), Input::Quant(acts), 1, &mut out);
            assert_same(&out, &case.expected(case.shape.levels(), &x), exec);
        }
    });
}

#[test]
#[should_panic(expected = "another matrix")]
fn an_input_of_other_bits_is_refused() {
    let mut rng = Rng::new(7);
    let quant = |fields| Quant { fields, group: Group::G32, affine: false, zero_x2: 0 };
    let case = Case::new(&mut rng, quant(Fields::new([1, 1, 0, 0]).unwrap()), 32, 32);
    let eight = Case::new(&mut rng, quant(Fields::Q8), 32, 32);
    let exec = Exec { backend: Backend::detect(), workers: &Serial };
    let spec = eight.shape.act_spec().unwrap();
    let mut scratch = vec![0; spec.bytes(32, 1)];
    let acts = quantise(&exec, spec, &[1.0; 32], 1, 32, &mut scratch);
    matmul(&exec, &case.matrix(1), Input::Quant(acts), 1, &mut [0.0; 32]);
}

/// What runs in one round of the workers gives the bits of the same steps one after another.
#[test]
fn fused_products_give_the_bits_of_their_steps() {
    let mut rng = Rng::new(31);
    let one = fastest();
    let quant = |fields| Quant { fields: Fields::new(fields).unwrap(), group: Group::G32, affine: false, zero_x2: 15 };
    for (rows, cols, tokens) in [(7, 40, 1), (200, 288, 1), (200, 288, 3), (96, 352, 13), (0, 32, 2), (33, 0, 2)] {
        let cases = [[4, 0, 0, 0], [2, 2, 0, 0], [4, 0, 0, 0]].map(|f| Case::new(&mut rng, quant(f), rows, cols));
        let shape = MatrixShape { rows: rows as u32, cols: cols as u32, encoding: Encoding::F32 };
        let floats = [1.0, 0.5, 0.25].map(|scale| {
            let mut bytes = Vec::new();
            (0..rows * cols).for_each(|_| bytes.extend((scale * rng.normal()).to_le_bytes()));
            bytes.resize(shape.bytes() as usize, 0);
            bytes
        });
        let x = rng.normals(tokens * cols);
        let biases = [rng.normals(rows), rng.normals(rows)];
        let start = rng.normals(tokens * rows);
        let spec = cases[0].shape.act_spec().unwrap();
        for quantised in [true, false] {
            let matrices: Vec<MatrixRef<'_>> = (0..3)
                .map(|i| match quantised {
                    true => MatrixRef::from_contiguous(cases[i].shape, &cases[i].bytes).unwrap(),
                    false => MatrixRef::from_contiguous(shape, &floats[i]).unwrap(),
                })
                .collect();
            let [gate, up, third] = [matrices[0], matrices[1], matrices[2]];
            let mut scratch = vec![0; spec.bytes(cols, tokens)];
            let input = match quantised {
                true => Input::Quant(quantise(&one, spec, &x, tokens, cols, &mut scratch)),
                false => Input::F32(&x),
            };
            let want: Vec<Vec<f32>> = [gate, up, third]
                .iter()
                .map(|w| {
                    let mut out = vec![f32::NAN; tokens * rows];
                    matmul(&one, w, input, tokens, &mut out);
                    out
                })
                .collect();
            let mut gated = want[..2].to_vec();
            for (out, bias) in gated.iter_mut().zip(&biases) {
                out.chunks_mut(rows.max(1)).for_each(|row| ops::add(&one, row, bias));
            }
            let [with_silu, with_bias] = &mut gated[..] else { unreachable!() };
            let mut with_relu = with_silu.clone();
            ops::silu_mul(&one, with_silu, with_bias);
            ops::gate_mul(&one, Activation::Relu, &mut with_relu, with_bias);
            let mut sum = start.clone();
            ops::add(&one, &mut sum, &want[2]);
            executions(|exec| {
                let mut out = [(); 4].map(|()| vec![f32::NAN; tokens * rows]);
                let [a, b, c, d] = &mut out;
                matmul_all(exec, input, tokens, &mut [(gate, a), (up, b), (third, c), (gate, d)]);
                for (out, want) in out.iter().zip([&want[0], &want[1], &want[2], &want[0]]) {
                    assert_same(out, want, (exec, rows, cols, tokens));
                }
                let [a, b, c, d] = &mut out;
                let both = [Some(&biases[0][..]), Some(&biases[1][..])];
                for (activation, want) in [(Activation::Silu, &*with_silu), (Activation::Relu, &with_relu)] {
                    matmul_gated(exec, activation, [gate, up], both, input, tokens, [&mut *a, &mut *b]);
                    assert_same(a, want, (exec, activation, rows, cols, tokens));
                }
                c.copy_from_slice(&start);
                matmul_add(exec, &third, input, tokens, d, c);
                assert_same(c, &sum, (exec, "added", rows, cols, tokens));
            });
        }
    }
}

#[test]
fn units_together_give_the_bits_of_one_after_another() {
    let mut rng = Rng::new(33);
    let one = fastest();
    let quant = |fields| Quant { fields: Fields::new(fields).unwrap(), group: Group::G32, affine: true, zero_x2: 0 };
    for (fields, width, hidden, count, activation) in [
        (Some([4, 0, 0, 0]), 256, 576, 6, Activation::Silu),
        (Some([1, 1, 0, 0]), 32, 200, 5, Activation::Silu),
        (Some([2, 2, 0, 0]), 64, 40, 2, Activation::Relu),
        (None, 200, 96, 3, Activation::Silu),
        (None, 5, 31, 8, Activation::Relu),
        (Some([4, 0, 0, 0]), 32, 0, 2, Activation::Silu),
    ] {
        let mut bytes_of = |rows: usize, cols: usize| match fields {
            Some(fields) => {
                let case = Case::new(&mut rng, quant(fields), rows, cols);
                (case.shape, case.bytes)
            }
            None => {
                let shape = MatrixShape { rows: rows as u32, cols: cols as u32, encoding: Encoding::F32 };
                let mut bytes: Vec<u8> = (0..rows * cols).flat_map(|_| rng.normal().to_le_bytes()).collect();
                bytes.resize(shape.bytes() as usize, 0);
                (shape, bytes)
            }
        };
        let stored: Vec<_> =
            (0..count).map(|_| [bytes_of(width, hidden), bytes_of(width, hidden), bytes_of(hidden, width)]).collect();
        let units: Vec<[MatrixRef<'_>; 3]> = stored
            .iter()
            .map(|unit| unit.each_ref().map(|(shape, bytes)| MatrixRef::from_contiguous(*shape, bytes).unwrap()))
            .collect();
        let gated: Vec<_> = units.iter().map(|[gate, up, _]| [*gate, *up]).collect();
        let downs: Vec<_> = units.iter().map(|[.., down]| *down).collect();
        assert!(units_fit(&gated[0][0].shape()));
        let (x, start) = (rng.normals(hidden), rng.normals(hidden));
        let mut scratch = vec![0; 64 * (hidden + 256)];
        let mut scratch_of_units = vec![0; 64 * count * (width + 256)];
        let input = match gated[0][0].shape().act_spec() {
            Some(spec) => Input::Quant(quantise(&one, spec, &x, 1, hidden, &mut scratch)),
            None => Input::F32(&x),
        };
        let mut activations = Vec::new();
        for [gate, up, _] in &units {
            let mut out = [vec![f32::NAN; width], vec![f32::NAN; width]];
            let [a, b] = &mut out;
            matmul_gated(&one, activation, [*gate, *up], [None; 2], input, 1, [a, b]);
            activations.extend_from_slice(&out[0]);
        }
        let spec = downs[0].shape().act_spec();
        let mut sum = start.clone();
        for (down, x) in downs.iter().zip(activations.chunks(width)) {
            let input = match spec {
                Some(spec) => Input::Quant(quantise(&one, spec, x, 1, width, &mut scratch_of_units)),
                None => Input::F32(x),
            };
            matmul_add(&one, down, input, 1, &mut vec![f32::NAN; hidden], &mut sum);
        }
        executions(|exec| {
            let mut out = [vec![f32::NAN; count * width], vec![f32::NAN; count * width]];
            let [gate, up] = &mut out;
            matmul_gated_units(exec, activation, &gated, input, [gate, up]);
            assert_same(gate, &activations, (exec, "gated", width, hidden));
            let input = match spec {
                Some(spec) => Input::Quant(quantise(exec, spec, gate, count, width, &mut scratch_of_units)),
                None => Input::F32(gate),
            };
            let mut acc = start.clone();
            matmul_add_units(exec, &downs, input, &mut vec![f32::NAN; hidden], &mut acc);
            assert_same(&acc, &sum, (exec, "added", width, hidden));
        });
    }
}
