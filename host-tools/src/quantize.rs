//! Quantising groups of weights to the codes, scale and minimum with the least squared error.
//!
//! For 1 to 4 bits the scale is searched: every candidate is rounded to codes, the scale (and minimum) that fit
//! those codes best follow by least squares, and the best pair is refined by rounding and fitting again, as in
//! Lloyd's algorithm (IEEE Trans. Inf. Theory 28 (2), 1982) and the `make_qx_quants` and `make_qkx2_quants` of
//! GGML. All errors are measured with the scale and minimum rounded to binary16, as they are stored. Sums run in
//! eight fixed lanes, so results do not depend on the machine.

use half::f16;

/// Longest group.
const MAX_GROUP: usize = 128;
/// Lanes of every sum.
const LANES: usize = 8;
/// Candidates for the scale.
const CANDIDATES: u32 = 20;
/// Rounds of refinement at most.
const ROUNDS: usize = 4;
/// Adding and subtracting this rounds to the nearest whole number, for |x| < 2^22.
const ROUND: f32 = 12_582_912.0;

/// The codes a weight can have: a weight is `scale * (code - zero_x2 / 2) + minimum`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Grid {
    /// 1 to 4, or 8 for signed codes.
    pub bits: u8,
    /// Whether there is a minimum.
    pub affine: bool,
    /// Twice the zero point.
    pub zero_x2: u8,
}

impl Grid {
    /// Signed codes from -127 to 127.
    pub const Q8: Self = Self { bits: 8, affine: false, zero_x2: 0 };

    /// Codes from 0 with a minimum.
    pub const fn affine(bits: u8) -> Self {
        Self { bits, affine: true, zero_x2: 0 }
    }

    /// Codes around a code that is exactly zero.
    pub const fn with_zero(bits: u8) -> Self {
        Self { bits, affine: false, zero_x2: 1 << bits }
    }

    /// Codes in pairs of opposite values, none of them zero.
    pub const fn paired(bits: u8) -> Self {
        Self { bits, affine: false, zero_x2: (1 << bits) - 1 }
    }

    /// The code that stands for zero best.
    pub fn zero_code(self, scale: f16, minimum: f16) -> u8 {
        if self.bits == 8 || scale == f16::ZERO {
            return 0;
        }
        let top = f32::from((1u8 << self.bits) - 1);
        (f32::from(self.zero_x2) / 2.0 - minimum.to_f32() / scale.to_f32()).round().clamp(0.0, top) as u8
    }

    /// The weight of `code`.
    pub fn weight(self, code: u8, scale: f16, minimum: f16) -> f32 {
        let scale = scale.to_f32();
        if self.bits == 8 {
            return scale * f32::from(code as i8);
        }
        scale * (f32::from(code) - f32::from(self.zero_x2) / 2.0) + minimum.to_f32()
    }
}

/// Quantises the group `x`, at most 128 weights, into `codes` of the same length. Returns scale and minimum.
///
/// All weights must be finite. Returns `None` if they are too large for a binary16 scale.
pub fn quantise_group(x: &[f32], grid: Grid, codes: &mut [u8]) -> Option<(f16, f16)> {
    debug_assert!(x.len() <= MAX_GROUP && x.len() == codes.len());
    let fit = match grid {
        Grid { bits: 8, .. } => return eight_bits(x, codes),
        Grid { affine: true, .. } => affine(x, grid),
        _ => symmetric(x, grid),
    };
    for (code, q) in codes.iter_mut().zip(&fit.codes) {
        *code = *q as u8;
    }
    (fit.scale.is_finite() && fit.minimum.is_finite()).then_some((fit.scale, fit.minimum))
}

fn eight_bits(x: &[f32], codes: &mut [u8]) -> Option<(f16, f16)> {
    let largest = x.iter().fold(0.0f32, |a, x| a.max(x.abs()));
    let scale = f16::from_f32(largest / 127.0);
    let inverse = if scale == f16::ZERO { 0.0 } else { 1.0 / scale.to_f32() };
    for (code, x) in codes.iter_mut().zip(x) {
        *code = (((x * inverse).clamp(-127.0, 127.0) + ROUND) - ROUND) as i8 as u8;
    }
    scale.is_finite().then_some((scale, f16::ZERO))
}

/// A scale and a minimum, the codes that go with them, and what they cost.
struct Fit {
    scale: f16,
    minimum: f16,
    codes: [f32; MAX_GROUP],
    error: f32,
}

impl Fit {
    /// Rounds `x` to the codes of `scale` and `minimum` as they will be stored.
    fn new(x: &[f32], grid: Grid, scale: f32, minimum: f32) -> Self {
        let (scale, minimum) = (f16::from_f32(scale), f16::from_f32(minimum));
        let (s, m) = (scale.to_f32(), minimum.to_f32());
        let inverse = if s == 0.0 { 0.0 } else { 1.0 / s };
        let mut codes = [0.0; MAX_GROUP];
        round(x, grid, inverse, m, &mut codes);
        let zero = f32::from(grid.zero_x2) / 2.0;
        let error = sum(x, &codes, |x, q| {
            let e = s * (q - zero) + m - x;
            e * e
        });
        Self { scale, minimum, codes, error: if error.is_finite() { error } else { f32::INFINITY } }
    }
}

/// The nearest codes.
fn round(x: &[f32], grid: Grid, inverse: f32, minimum: f32, codes: &mut [f32; MAX_GROUP]) {
    let zero = f32::from(grid.zero_x2) / 2.0;
    let top = f32::from((1u8 << grid.bits) - 1);
    for (q, x) in codes.iter_mut().zip(x) {
        *q = (((x - minimum) * inverse + zero).clamp(0.0, top) + ROUND) - ROUND;
    }
}

/// Sum of `f(x, q)`, in lanes.
#[inline(always)]
fn sum(x: &[f32], q: &[f32; MAX_GROUP], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    let (codes, _) = q.as_chunks::<LANES>();
    for (x, q) in chunks.iter().zip(codes) {
        for i in 0..LANES {
            lanes[i] += f(x[i], q[i]);
        }
    }
    for (i, x) in rest.iter().enumerate() {
        lanes[i] += f(*x, q[chunks.len() * LANES + i]);
    }
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}

/// The scale for `codes` by least squares, and how much of the square sum it explains.
fn fit_scale(x: &[f32], codes: &[f32; MAX_GROUP], zero: f32) -> (f32, f32) {
    let xl = sum(x, codes, |x, q| x * (q - zero));
    let ll = sum(x, codes, |_, q| (q - zero) * (q - zero));
    if ll > 0.0 { (xl / ll, xl * xl / ll) } else { (0.0, 0.0) }
}

fn symmetric(x: &[f32], grid: Grid) -> Fit {
    // With a code for zero, one side has a code more, and the sign of the scale decides which.
    let signs: &[f32] = if grid.zero_x2.is_multiple_of(2) { &[-1.0, 1.0] } else { &[1.0] };
    let extreme = x.iter().fold(0.0f32, |a, &x| if x.abs() > a.abs() { x } else { a });
    if extreme == 0.0 {
        return Fit::new(x, grid, 0.0, 0.0);
    }
    let zero = f32::from(grid.zero_x2) / 2.0;
    let mut codes = [0.0; MAX_GROUP];
    let (mut scale, mut explained) = (0.0, -1.0);
    for i in 0..CANDIDATES {
        // From clipping half of the range away to leaving a quarter unused.
        let shrink = 0.5 + 0.75 * i as f32 / (CANDIDATES - 1) as f32;
        for &sign in signs {
            round(x, grid, sign * zero / (extreme * shrink), 0.0, &mut codes);
            let (s, e) = fit_scale(x, &codes, zero);
            if e > explained {
                (scale, explained) = (s, e);
            }
        }
    }
    refine(Fit::new(x, grid, scale, 0.0), |codes| Fit::new(x, grid, fit_scale(x, codes, zero).0, 0.0))
}

fn affine(x: &[f32], grid: Grid) -> Fit {
    let (least, most) = x.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(a, b), &x| (a.min(x), b.max(x)));
    let top = f32::from((1u8 << grid.bits) - 1);
    let fit = |codes: &[f32; MAX_GROUP]| {
        let n = x.len() as f32;
        let (sx, sq) = (sum(x, codes, |x, _| x), sum(x, codes, |_, q| q));
        let (xq, qq) = (sum(x, codes, |x, q| x * q), sum(x, codes, |_, q| q * q));
        let det = n * qq - sq * sq;
        if det > 0.0 {
            let scale = (n * xq - sx * sq) / det;
            Fit::new(x, grid, scale, (sx - scale * sq) / n)
        } else {
            Fit::new(x, grid, 0.0, sx / n)
        }
    };
    let mut best = Fit::new(x, grid, (most - least) / top, least);
    if most <= least {
        return best;
    }
    let mut codes = [0.0; MAX_GROUP];
    let middle = (most + least) / 2.0;
    for i in 0..CANDIDATES {
        let shrink = 0.55 + 0.5 * i as f32 / (CANDIDATES - 1) as f32;
        let range = (most - least) * shrink;
        round(x, grid, top / range, middle - range / 2.0, &mut codes);
        let fitted = fit(&codes);
        if fitted.error < best.error {
            best = fitted;
        }
    }
    refine(best, fit)
}

fn refine(mut best: Fit, fit: impl Fn(&[f32; MAX_GROUP]) -> Fit) -> Fit {
    for _ in 0..ROUNDS {
        let next = fit(&best.codes);
        if next.error >= best.error {
            break;
        }
        best = next;
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that look normal: sums of four uniform ones.
    fn normal(seed: u32, n: usize) -> Vec<f32> {
        let mut state = seed;
        let mut uniform = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..n).map(|_| (uniform() + uniform() + uniform() + uniform()) * 0.03).collect()
    }

    /// Relative error of `quantise` over groups of `group`.
    fn error(grid: Grid, group: usize, quantise: impl Fn(&[f32], &mut [u8]) -> (f16, f16)) -> f64 {
        let x = normal(7, 1 << 14);
        let (mut error, mut power) = (0.0, 0.0);
        let mut codes = vec![0; group];
        for x in x.chunks(group) {
            let (s, m) = quantise(x, &mut codes);
            for (x, q) in x.iter().zip(&codes) {
                error += f64::from(grid.weight(*q, s, m) - x).powi(2);
                power += f64::from(*x).powi(2);
            }
        }
        (error / power).sqrt()
    }

    /// The scale that just spans the group, as GGML's reference quantisers of Q4_0 and Q4_1 take it.
    fn spanning(x: &[f32], grid: Grid, codes: &mut [u8]) -> (f16, f16) {
        let top = f32::from((1u8 << grid.bits) - 1);
        let (least, most) = x.iter().fold((0.0f32, 0.0f32), |(a, b), &x| (a.min(x), b.max(x)));
        let extreme = if -least > most { least } else { most };
        let zero = f32::from(grid.zero_x2) / 2.0;
        let (scale, minimum) = if grid.affine { ((most - least) / top, least) } else { (extreme / -zero, 0.0) };
        for (q, x) in codes.iter_mut().zip(x) {
            *q = ((x - minimum) / scale + zero + 0.5).clamp(0.0, top) as u8;
        }
        (f16::from_f32(scale), f16::from_f32(minimum))
    }

    #[test]
    fn searching_beats_spanning() {
        for bits in 1..=4 {
            for grid in [Grid::with_zero(bits), Grid::paired(bits), Grid::affine(bits)] {
                if bits == 1 && grid == Grid::with_zero(1) {
                    continue;
                }
                let mut last = 0.0;
                for group in [32, 64, 128] {
                    let found = error(grid, group, |x, codes| quantise_group(x, grid, codes).unwrap());
                    let plain = error(grid, group, |x, codes| spanning(x, grid, codes));
                    assert!(found < 0.95 * plain, "{grid:?}, group {group}: {found}, spanning {plain}");
                    assert!(found > last, "{grid:?}, group {group}: longer groups cost precision");
                    last = found;
                }
            }
        }
    }

    #[test]
    fn eight_bits_are_within_half_a_step() {
        let mut codes = [0; 32];
        for x in normal(3, 1 << 12).chunks(32) {
            let (scale, m) = quantise_group(x, Grid::Q8, &mut codes).unwrap();
            for (x, q) in x.iter().zip(codes) {
                // Rounding the scale to binary16 can move the extremes by a little more.
                assert!((Grid::Q8.weight(q, scale, m) - x).abs() <= 0.57 * scale.to_f32());
            }
        }
    }

    #[test]
    fn values_on_the_grid_are_exact() {
        for grid in [Grid::with_zero(4), Grid::affine(4), Grid::paired(2), Grid::paired(3), Grid::Q8] {
            let (scale, minimum) = (f16::from_f32(0.03125), f16::from_f32(if grid.affine { -0.25 } else { 0.0 }));
            let top = if grid.bits == 8 { 127 } else { (1u8 << grid.bits) - 1 };
            let x: Vec<f32> = (0..32).map(|i| grid.weight(i % (top + 1), scale, minimum)).collect();
            let mut x = x;
            if grid.bits == 8 {
                x[0] = grid.weight(127, scale, minimum);
            }
            let mut codes = [0; 32];
            let (s, m) = quantise_group(&x, grid, &mut codes).unwrap();
            for (x, q) in x.iter().zip(codes) {
                assert_eq!(grid.weight(q, s, m), *x, "{grid:?}");
            }
        }
    }

    #[test]
    fn odd_groups() {
        for grid in [Grid::with_zero(4), Grid::affine(4), Grid::paired(1), Grid::Q8] {
            let mut codes = [9; 5];
            let (s, m) = quantise_group(&[0.0; 5], grid, &mut codes).unwrap();
            assert!(codes.iter().all(|&q| grid.weight(q, s, m) == 0.0), "{grid:?}");
            let constant = [0.5; 5];
            let (s, m) = quantise_group(&constant, grid, &mut codes).unwrap();
            assert!(codes.iter().all(|&q| (grid.weight(q, s, m) - 0.5).abs() < 1e-3), "{grid:?}");
            assert_eq!(quantise_group(&[3e38; 5], grid, &mut codes), None, "{grid:?}");
            // Too small for a binary16 scale: zero, not garbage.
            let (s, m) = quantise_group(&[1e-20; 5], grid, &mut codes).unwrap();
            assert!(codes.iter().all(|&q| grid.weight(q, s, m).abs() < 1e-6), "{grid:?}");
        }
    }

    #[test]
    fn zero_code_is_the_nearest_to_zero() {
        let (one, minimum) = (f16::from_f32(1.0), f16::from_f32(-3.2));
        assert_eq!(Grid::with_zero(4).zero_code(one, f16::ZERO), 8);
        assert_eq!(Grid::affine(4).zero_code(one, minimum), 3);
        assert_eq!(Grid::Q8.zero_code(one, f16::ZERO), 0);
    }
}
