//! Quantising whole rows for the error of their products.

use core::ops::Range;

use forebay_kernels::exec::{Backend, Exec, Serial};
use forebay_kernels::ops::{add_scaled, dot};
use half::f16;

use super::{Grid, MAX_GROUP, MAX_PREFIXES, Prefix, Target, middle};

/// Rounds of coordinate descent at most.
const SWEEPS: usize = 12;
/// A new scale that takes less than this share of a row's mean error of a group away is not worth its sums.
const WORTH: f32 = 1e-3;
/// Codes of the widest grid.
const CODES: usize = 16;

/// What errors of a row's weights do to the row's products, as [`crate::moments`] knows it.
///
/// With H the second moments of what the row is multiplied with, the mean squared error of its product is
/// `e H e'`. Written as `H = M D M'` with M unit upper triangular this is the sum over columns j of
/// `D_j (e_j + sum over i < j of e_i M_ij)^2`, so each column can make good for what those before it did: GPTQ
/// (2210.17323) in the form of QuIP's LDLQ (2307.13304, section 3).
pub struct Feedback {
    /// D, scaled to a mean of 1.
    pub importance: Vec<f32>,
    /// M by rows, `[columns][columns]`; only what is right of the diagonal counts.
    pub coupling: Vec<f32>,
    /// H, `[columns][columns]`, on the same scale as D.
    pub moments: Vec<f32>,
    /// For each column, where the first to the last column lie that it has moments with.
    pub spans: Vec<Range<usize>>,
}

/// A row quantised with [`Feedback`]: where its codes, and the scale and minimum of each group go.
pub struct Row<'a> {
    /// One a weight.
    pub codes: &'a mut [u8],
    /// One a group.
    pub scales: &'a mut [f16],
    /// One a group.
    pub minima: &'a mut [f16],
}

/// Quantises the row `x` in groups of `group`, each column making good for the errors of those before it, in the whole
/// code and in every prefix by itself. `scratch` may be used again for the next row.
///
/// All weights must be finite, and the grid have 1 to 4 bits. Returns `None` if a group is too large for a binary16 scale.
pub fn quantise_row(
    x: &[f32],
    feedback: &Feedback,
    grid: Grid,
    prefixes: &[Prefix],
    group: usize,
    scratch: &mut Vec<f32>,
    row: &mut Row<'_>,
) -> Option<()> {
    let mut levels = [Prefix::WHOLE; 1 + MAX_PREFIXES];
    levels[1..=prefixes.len()].copy_from_slice(prefixes);
    let exec = Exec { backend: Backend::detect(), workers: &Serial };
    let problem = Problem { x, feedback, grid, levels: &levels[..=prefixes.len()], group, exec };
    scratch.resize(problem.levels.len() * x.len(), 0.0);
    problem.feed_forward(scratch, row)?;
    problem.residues(scratch, row);
    for _ in 0..SWEEPS {
        if !problem.improve(scratch, row) {
            break;
        }
    }
    Some(())
}

/// A row to be quantised.
struct Problem<'a> {
    x: &'a [f32],
    feedback: &'a Feedback,
    grid: Grid,
    /// The whole code, then its prefixes.
    levels: &'a [Prefix],
    group: usize,
    exec: Exec<'a>,
}

/// What every code stands for in every precision; those that the grid has not are as its last one.
type Values = [[f32; CODES]; 1 + MAX_PREFIXES];

impl Problem<'_> {
    fn groups(&self) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
        let (n, group) = (self.x.len(), self.group);
        (0..n).step_by(group).map(move |from| from..(from + group).min(n)).enumerate()
    }

    fn values(&self, scale: f16, minimum: f16) -> Values {
        let (scale, minimum) = (scale.to_f32(), minimum.to_f32());
        let (zero, top) = (f32::from(self.grid.zero_x2) / 2.0, self.grid.top());
        let mut values = [[0.0; CODES]; 1 + MAX_PREFIXES];
        for (values, level) in values.iter_mut().zip(self.levels) {
            for (code, value) in values.iter_mut().enumerate() {
                let code = (code as f32).min(top);
                *value = level.gain * (scale * (middle(code, level.dropped) - zero) + minimum);
            }
        }
        values
    }

    /// The code with the least cost below that of `start`, if there is one.
    fn cheapest(&self, costs: &[f32; CODES], start: (f32, u8)) -> u8 {
        let mut best = start;
        for (code, cost) in (0..=self.grid.top() as u8).zip(costs) {
            if *cost < best.0 {
                best = (*cost, code);
            }
        }
        best.1
    }

    /// Codes column by column, with what the columns before leave to make good for.
    fn feed_forward(&self, wanted: &mut [f32], row: &mut Row<'_>) -> Option<()> {
        let n = self.x.len();
        wanted.chunks_exact_mut(n).for_each(|wanted| wanted.copy_from_slice(self.x));
        for (g, columns) in self.groups() {
            let mut of_prefix = [&self.x[..0]; MAX_PREFIXES];
            let mut parts = wanted.chunks_exact(n).map(|part| &part[columns.clone()]);
            let whole = parts.next()?;
            of_prefix.iter_mut().zip(parts).for_each(|(of, part)| *of = part);
            let importance = &self.feedback.importance[columns.clone()];
            let target = Target { whole, importance, grid: self.grid, prefixes: &self.levels[1..], of_prefix };
            let (scale, minimum) = target.quantise(&mut row.codes[columns.clone()])?;
            (row.scales[g], row.minima[g]) = (scale, minimum);
            let values = self.values(scale, minimum);
            for j in columns {
                let mut costs = [0.0; CODES];
                for ((values, wanted), level) in values.iter().zip(wanted.chunks_exact(n)).zip(self.levels) {
                    for (cost, value) in costs.iter_mut().zip(values) {
                        let e = value - wanted[j];
                        *cost += level.weight * e * e;
                    }
                }
                let code = self.cheapest(&costs, (f32::INFINITY, 0));
                row.codes[j] = code;
                let after = j + 1..self.feedback.spans[j].end;
                let coupling = &self.feedback.coupling[j * n..][after.clone()];
                for (values, wanted) in values.iter().zip(wanted.chunks_exact_mut(n)) {
                    let error = self.x[j] - values[usize::from(code)];
                    add_scaled(&self.exec, &mut wanted[after.clone()], coupling, error);
                }
            }
        }
        Some(())
    }

    /// Adds `change` in column j to `H e'`.
    fn shift(&self, residues: &mut [f32], j: usize, change: f32) {
        let span = self.feedback.spans[j].clone();
        let h = &self.feedback.moments[j * self.x.len()..][span.clone()];
        add_scaled(&self.exec, &mut residues[span], h, change);
    }

    /// `H e'`, for every precision.
    fn residues(&self, residues: &mut [f32], row: &Row<'_>) {
        let n = self.x.len();
        residues.fill(0.0);
        for (g, columns) in self.groups() {
            let values = self.values(row.scales[g], row.minima[g]);
            for j in columns {
                for (values, residues) in values.iter().zip(residues.chunks_exact_mut(n)) {
                    self.shift(residues, j, self.x[j] - values[usize::from(row.codes[j])]);
                }
            }
        }
    }

    /// One round of coordinate descent on `e H e'`, summed over all precisions: each group's scale and minimum, then each
    /// of its codes, is set to what is best while everything else stays. Returns whether a code has changed.
    fn improve(&self, residues: &mut [f32], row: &mut Row<'_>) -> bool {
        let n = self.x.len();
        let worth = WORTH * self.error(residues, row) / n.div_ceil(self.group) as f32;
        let mut changed = false;
        for (g, columns) in self.groups() {
            self.improve_scale(g, columns.clone(), worth, residues, row);
            let values = self.values(row.scales[g], row.minima[g]);
            for j in columns {
                let (old, diagonal) = (usize::from(row.codes[j]), self.feedback.moments[j * n + j]);
                let mut costs = [0.0; CODES];
                for ((values, residues), level) in values.iter().zip(residues.chunks_exact(n)).zip(self.levels) {
                    let (now, r) = (values[old], 2.0 * residues[j]);
                    for (cost, value) in costs.iter_mut().zip(values) {
                        let d = value - now;
                        *cost += level.weight * d * (d * diagonal - r);
                    }
                }
                let code = self.cheapest(&costs, (0.0, row.codes[j]));
                if code != row.codes[j] {
                    for (values, residues) in values.iter().zip(residues.chunks_exact_mut(n)) {
                        self.shift(residues, j, values[old] - values[usize::from(code)]);
                    }
                    row.codes[j] = code;
                    changed = true;
                }
            }
        }
        changed
    }

    /// `e H e'`, summed over all precisions.
    fn error(&self, residues: &[f32], row: &Row<'_>) -> f32 {
        let mut error = 0.0;
        for (g, columns) in self.groups() {
            let values = self.values(row.scales[g], row.minima[g]);
            for ((values, residues), level) in values.iter().zip(residues.chunks_exact(self.x.len())).zip(self.levels) {
                let of = |j: usize| (self.x[j] - values[usize::from(row.codes[j])]) * residues[j];
                error += level.weight * columns.clone().map(of).sum::<f32>();
            }
        }
        error
    }

    /// The scale and minimum of group g by least squares, for the codes that it has, if they take more than `worth` of the
    /// error away.
    fn improve_scale(&self, g: usize, columns: Range<usize>, worth: f32, residues: &mut [f32], row: &mut Row<'_>) {
        let (n, grid) = (self.x.len(), self.grid);
        let len = columns.len();
        let zero = f32::from(grid.zero_x2) / 2.0;
        let h = |j: usize| &self.feedback.moments[j * n..][columns.clone()];
        let sums: f32 = columns.clone().map(|j| h(j).iter().sum::<f32>()).sum();
        let mut units = [[0.0; MAX_GROUP]; 1 + MAX_PREFIXES];
        let (mut uu, mut uo, mut oo, mut ur, mut or) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for ((r, level), unit) in residues.chunks_exact(n).zip(self.levels).zip(&mut units) {
            for (u, code) in unit.iter_mut().zip(&row.codes[columns.clone()]) {
                *u = level.gain * (middle(f32::from(*code), level.dropped) - zero);
            }
            for (j, u) in columns.clone().zip(&unit[..len]) {
                let hu = dot(&self.exec, h(j), &unit[..len]);
                uu += level.weight * u * hu;
                uo += level.weight * level.gain * hu;
                ur += level.weight * u * r[j];
                or += level.weight * level.gain * r[j];
            }
            oo += level.weight * level.gain * level.gain * sums;
        }
        let (old_scale, old_minimum) = (row.scales[g], row.minima[g]);
        let (ds, dm) = if grid.affine {
            let det = uu * oo - uo * uo;
            if det > 1e-6 * uu * oo { ((ur * oo - or * uo) / det, (or * uu - ur * uo) / det) } else { (0.0, 0.0) }
        } else if uu > 0.0 {
            (ur / uu, 0.0)
        } else {
            (0.0, 0.0)
        };
        let (scale, minimum) = (f16::from_f32(old_scale.to_f32() + ds), f16::from_f32(old_minimum.to_f32() + dm));
        let (ds, dm) = (scale.to_f32() - old_scale.to_f32(), minimum.to_f32() - old_minimum.to_f32());
        let change = ds * ds * uu + 2.0 * ds * dm * uo + dm * dm * oo - 2.0 * (ds * ur + dm * or);
        if change < -worth {
            for ((r, level), unit) in residues.chunks_exact_mut(n).zip(self.levels).zip(&units) {
                for (j, u) in columns.clone().zip(unit) {
                    self.shift(r, j, -(ds * u + level.gain * dm));
                }
            }
            (row.scales[g], row.minima[g]) = (scale, minimum);
        }
    }
}

#[cfg(test)]
mod tests {
    use core::iter;

    use super::*;
    use crate::moments::factor;

    const COLUMNS: usize = 72;

    /// Inputs that have much in common, as activations have, and their second moments.
    fn moments() -> Vec<f64> {
        let mut state = 5u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f64::from(state >> 8) / f64::from(1 << 24) - 0.5
        };
        let shared: Vec<f64> = (0..6 * COLUMNS).map(|_| random()).collect();
        let mut sums = vec![0.0; COLUMNS * COLUMNS];
        for _ in 0..400 {
            let parts: [f64; 6] = core::array::from_fn(|_| random());
            let x: Vec<f64> = (0..COLUMNS)
                .map(|c| 0.3 * random() + (0..6).map(|p| parts[p] * shared[p * COLUMNS + c]).sum::<f64>())
                .collect();
            for i in 0..COLUMNS {
                (0..COLUMNS).for_each(|j| sums[i * COLUMNS + j] += x[i] * x[j] / 400.0);
            }
        }
        sums
    }

    fn weights(rows: usize) -> Vec<f32> {
        let mut state = 9u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..rows * COLUMNS).map(|_| (random() + random() + random()) * 0.04).collect()
    }

    /// Mean squared error of the products, with and without feedback, for the whole code and each prefix.
    fn errors(grid: Grid, prefixes: &[Prefix]) -> (Vec<f64>, Vec<f64>) {
        let h = moments();
        let feedback = factor(h.clone(), COLUMNS);
        let groups = COLUMNS.div_ceil(32);
        let mut sums = [vec![0.0; 1 + prefixes.len()], vec![0.0; 1 + prefixes.len()]];
        for x in weights(12).chunks(COLUMNS) {
            for (with, sums) in [false, true].into_iter().zip(&mut sums) {
                let (mut codes, mut scales, mut minima) =
                    ([0; COLUMNS], vec![f16::ZERO; groups], vec![f16::ZERO; groups]);
                if with {
                    let mut row = Row { codes: &mut codes, scales: &mut scales, minima: &mut minima };
                    quantise_row(x, &feedback, grid, prefixes, 32, &mut Vec::new(), &mut row).unwrap();
                } else {
                    for (g, (x, codes)) in x.chunks(32).zip(codes.chunks_mut(32)).enumerate() {
                        (scales[g], minima[g]) = super::super::quantise_nested(x, grid, prefixes, codes).unwrap();
                    }
                }
                for (sum, level) in sums.iter_mut().zip(iter::once(&Prefix::WHOLE).chain(prefixes)) {
                    let e: Vec<f64> = (0..COLUMNS)
                        .map(|j| {
                            let v = grid.prefix_weight(codes[j], level.dropped, scales[j / 32], minima[j / 32]);
                            f64::from(x[j] - level.gain * v)
                        })
                        .collect();
                    *sum += h.iter().enumerate().map(|(at, h)| h * e[at / COLUMNS] * e[at % COLUMNS]).sum::<f64>();
                }
            }
        }
        let [without, with] = sums;
        (without, with)
    }

    #[test]
    fn products_are_nearer() {
        for bits in 2..=4 {
            for grid in [Grid::paired(bits), Grid::affine(bits), Grid::with_zero(bits)] {
                let (without, with) = errors(grid, &[]);
                assert!(with[0] < 0.6 * without[0], "{grid:?}: {} {}", with[0], without[0]);
            }
        }
        for grid in [Grid::paired(4), Grid::affine(4)] {
            let (_, alone) = errors(grid, &[]);
            let (without, with) = errors(grid, &[Prefix::with_feedback(2, 0.2)]);
            assert!(with[1] < 0.6 * without[1], "{grid:?}: prefix {} {}", with[1], without[1]);
            assert!(with[0] < 3.0 * alone[0], "{grid:?}: whole {} {}", with[0], alone[0]);
        }
    }

    /// `M D M'` is H with what was added to its diagonal, on another scale.
    #[test]
    fn factors_multiply_to_the_moments() {
        let h = moments();
        let feedback = factor(h.clone(), COLUMNS);
        let m = |i: usize, j: usize| match i.cmp(&j) {
            core::cmp::Ordering::Less => f64::from(feedback.coupling[i * COLUMNS + j]),
            core::cmp::Ordering::Equal => 1.0,
            core::cmp::Ordering::Greater => 0.0,
        };
        let scale = f64::from(feedback.moments[1]) / h[1];
        for i in 0..COLUMNS {
            for j in 0..COLUMNS {
                let product: f64 = (0..COLUMNS).map(|k| m(i, k) * f64::from(feedback.importance[k]) * m(j, k)).sum();
                let stored = f64::from(feedback.moments[i * COLUMNS + j]);
                assert!((product - stored).abs() < 1e-4 * scale, "{i} {j}: {product} {stored}");
                if i != j {
                    assert!((stored - scale * h[i * COLUMNS + j]).abs() < 1e-4 * scale, "{i} {j}");
                }
            }
        }
    }

    #[test]
    fn what_was_never_seen_is_quantised_all_the_same() {
        let feedback = factor(vec![0.0; COLUMNS * COLUMNS], COLUMNS);
        let x = &weights(1)[..COLUMNS];
        let (mut codes, mut scales, mut minima) = ([0; COLUMNS], [f16::ZERO; 3], [f16::ZERO; 3]);
        let mut row = Row { codes: &mut codes, scales: &mut scales, minima: &mut minima };
        quantise_row(x, &feedback, Grid::paired(4), &[], 32, &mut Vec::new(), &mut row).unwrap();
        for (j, x) in x.iter().enumerate() {
            let near = Grid::paired(4).weight(codes[j], scales[j / 32], f16::ZERO);
            assert!((near - x).abs() < scales[j / 32].to_f32().abs(), "{x} {near}");
        }
    }
}
