//! Quantising whole rows for the error of their products.

use core::iter;

use half::f16;

use super::{Grid, LANES, MAX_GROUP, MAX_PREFIXES, Prefix, Target, middle};

/// Rounds of coordinate descent.
const SWEEPS: usize = 2;

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
/// code and in every prefix by itself. `wanted` gets what each precision was to approximate once the columns before had
/// their codes, `[1 + prefixes][columns]`.
///
/// All weights must be finite, and the grid have 1 to 4 bits. Returns `None` if a group is too large for a binary16 scale.
pub fn quantise_row(
    x: &[f32],
    feedback: &Feedback,
    grid: Grid,
    prefixes: &[Prefix],
    group: usize,
    wanted: &mut Vec<f32>,
    row: &mut Row<'_>,
) -> Option<()> {
    let n = x.len();
    let levels = iter::once(Prefix::WHOLE).chain(prefixes.iter().copied());
    wanted.clear();
    levels.clone().for_each(|_| wanted.extend_from_slice(x));
    let top = grid.top() as u8;
    for (g, from) in (0..n).step_by(group).enumerate() {
        let columns = from..(from + group).min(n);
        let mut of_prefix = [&x[..0]; MAX_PREFIXES];
        let mut parts = wanted.chunks_exact(n).map(|part| &part[columns.clone()]);
        let whole = parts.next()?;
        of_prefix.iter_mut().zip(parts).for_each(|(of, part)| *of = part);
        let importance = &feedback.importance[columns.clone()];
        let target = Target { whole, importance, grid, prefixes, of_prefix };
        let (scale, minimum) = target.quantise(&mut row.codes[columns.clone()])?;
        (row.scales[g], row.minima[g]) = (scale, minimum);
        for j in columns {
            let value = |code: u8, level: &Prefix| level.gain * grid.prefix_weight(code, level.dropped, scale, minimum);
            let mut best = (f32::INFINITY, 0);
            for code in 0..=top {
                let cost = levels.clone().enumerate().fold(0.0, |cost, (l, level)| {
                    let e = value(code, &level) - wanted[l * n + j];
                    cost + level.weight * e * e
                });
                if cost < best.0 {
                    best = (cost, code);
                }
            }
            row.codes[j] = best.1;
            let coupling = &feedback.coupling[j * n..][..n];
            for (wanted, level) in wanted.chunks_exact_mut(n).zip(levels.clone()) {
                let error = x[j] - value(best.1, &level);
                wanted[j + 1..].iter_mut().zip(&coupling[j + 1..]).for_each(|(w, m)| *w += error * m);
            }
        }
    }
    for _ in 0..SWEEPS {
        improve(x, feedback, grid, levels.clone(), group, wanted, row);
    }
    Some(())
}

/// The value of the columns `columns` in one precision.
fn value(grid: Grid, level: Prefix, group: usize, row: &Row<'_>, j: usize) -> f32 {
    level.gain * grid.prefix_weight(row.codes[j], level.dropped, row.scales[j / group], row.minima[j / group])
}

/// One round of coordinate descent on `e H e'`, summed over all precisions: each group's scale and minimum, then each of its
/// codes, is set to what is best while everything else stays.
fn improve(
    x: &[f32],
    feedback: &Feedback,
    grid: Grid,
    levels: impl Iterator<Item = Prefix> + Clone,
    group: usize,
    residues: &mut [f32],
    row: &mut Row<'_>,
) {
    let n = x.len();
    let h = |j: usize| &feedback.moments[j * n..][..n];
    // H e', for every precision.
    residues.fill(0.0);
    for (r, level) in residues.chunks_exact_mut(n).zip(levels.clone()) {
        for (j, x) in x.iter().enumerate() {
            let e = x - value(grid, level, group, row, j);
            r.iter_mut().zip(h(j)).for_each(|(r, h)| *r += e * h);
        }
    }
    let zero = f32::from(grid.zero_x2) / 2.0;
    let top = grid.top() as u8;
    for (g, from) in (0..n).step_by(group).enumerate() {
        let columns = from..(from + group).min(n);
        let len = columns.len();
        // Least squares for the change of scale and minimum.
        let (mut uu, mut uo, mut oo, mut ur, mut or) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for (r, level) in residues.chunks_exact(n).zip(levels.clone()) {
            let mut unit = [0.0; MAX_GROUP];
            for (u, code) in unit.iter_mut().zip(&row.codes[columns.clone()]) {
                *u = level.gain * (middle(f32::from(*code), level.dropped) - zero);
            }
            let unit = &unit[..len];
            for (j, u) in columns.clone().zip(unit) {
                let part = &h(j)[columns.clone()];
                let hu = dot(part, unit);
                uu += level.weight * u * hu;
                uo += level.weight * level.gain * hu;
                oo += level.weight * level.gain * level.gain * part.iter().sum::<f32>();
                ur += level.weight * u * r[j];
                or += level.weight * level.gain * r[j];
            }
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
        if change < 0.0 {
            for (r, level) in residues.chunks_exact_mut(n).zip(levels.clone()) {
                for j in columns.clone() {
                    let d = level.gain * (ds * (middle(f32::from(row.codes[j]), level.dropped) - zero) + dm);
                    r.iter_mut().zip(h(j)).for_each(|(r, h)| *r -= d * h);
                }
            }
            (row.scales[g], row.minima[g]) = (scale, minimum);
        }
        for j in columns {
            let (scale, minimum) = (row.scales[g], row.minima[g]);
            let value = |code, level: &Prefix| level.gain * grid.prefix_weight(code, level.dropped, scale, minimum);
            let diagonal = h(j)[j];
            let mut best = (0.0, row.codes[j]);
            for code in 0..=top {
                let cost = levels.clone().enumerate().fold(0.0, |cost, (l, level)| {
                    let d = value(code, &level) - value(row.codes[j], &level);
                    cost + level.weight * d * (d * diagonal - 2.0 * residues[l * n + j])
                });
                if cost < best.0 {
                    best = (cost, code);
                }
            }
            if best.1 != row.codes[j] {
                for (r, level) in residues.chunks_exact_mut(n).zip(levels.clone()) {
                    let d = value(best.1, &level) - value(row.codes[j], &level);
                    r.iter_mut().zip(h(j)).for_each(|(r, h)| *r -= d * h);
                }
                row.codes[j] = best.1;
            }
        }
    }
}

/// Inner product, in lanes.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (chunks_a, rest_a) = a.as_chunks::<LANES>();
    let (chunks_b, rest_b) = b.as_chunks::<LANES>();
    for (a, b) in chunks_a.iter().zip(chunks_b) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    let rest: f32 = rest_a.iter().zip(rest_b).map(|(a, b)| a * b).sum();
    lanes.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests {
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
