//! Quantising groups of weights to the codes, scale and minimum with the least squared error.
//!
//! For 1 to 4 bits the scale is searched: every candidate is rounded to codes, the scale (and minimum) that fit
//! those codes best follow by least squares, and the best pair is refined by rounding and fitting again, as in
//! Lloyd's algorithm (IEEE Trans. Inf. Theory 28 (2), 1982) and the `make_qx_quants` and `make_qkx2_quants` of
//! GGML. Where the first bits of a code are to be useful alone, the errors of these prefixes are added to the one that is
//! minimised. All errors are measured with the scale and minimum rounded to binary16, as they are stored. Sums run in
//! eight fixed lanes, so results do not depend on the machine. Where it is known what a row is multiplied with,
//! [`quantise_row`] chooses its codes for the error of the product instead.

mod feedback;

use half::f16;

pub use feedback::{Feedback, Row, quantise_row};

/// Longest group.
const MAX_GROUP: usize = 128;
/// Most precisions below that of the whole code.
pub const MAX_PREFIXES: usize = 3;
/// Every weight counts the same.
const EQUAL: [f32; MAX_GROUP] = [1.0; MAX_GROUP];
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
    /// -1, 0 and 1 in 2 bits; the fourth code is not used.
    pub const TERNARY: Self = Self { bits: 2, affine: false, zero_x2: 2 };
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

    /// The largest code, of those that are not signed.
    fn top(self) -> f32 {
        if self == Self::TERNARY { 2.0 } else { f32::from((1u8 << self.bits) - 1) }
    }

    /// The code that stands for zero best.
    pub fn zero_code(self, scale: f16, minimum: f16) -> u8 {
        if self.bits == 8 || scale == f16::ZERO {
            return 0;
        }
        (f32::from(self.zero_x2) / 2.0 - minimum.to_f32() / scale.to_f32()).round().clamp(0.0, self.top()) as u8
    }

    /// The value of the codes that share all but the last `dropped` bits with `code`, before any gain.
    pub fn prefix_weight(self, code: u8, dropped: u8, scale: f16, minimum: f16) -> f32 {
        scale.to_f32() * (middle(f32::from(code), dropped) - f32::from(self.zero_x2) / 2.0) + minimum.to_f32()
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

/// A precision below that of the whole code: its first bits, for which the middle of what they leave open stands,
/// multiplied by a gain.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Prefix {
    /// Bits of the code that are left out; fewer than the code has.
    pub dropped: u8,
    /// What this precision's squared error counts, that of the whole code being 1.
    pub weight: f32,
    /// The gain that is expected. The one that fits best is known only when a whole matrix is quantised.
    pub gain: f32,
}

impl Prefix {
    /// The whole code.
    const WHOLE: Self = Self { dropped: 0, weight: 1.0, gain: 1.0 };

    /// The prefix without the last `dropped` bits, with the weight and gain that were found best for trained weights
    /// (`docs/BENCHMARKS.md`).
    pub const fn new(dropped: u8) -> Self {
        let (weight, gain) = match dropped {
            1 => (0.05, 0.985),
            2 => (0.05, 0.93),
            _ => (0.01, 0.69),
        };
        Self { dropped, weight, gain }
    }

    /// The same where columns make good for each other's errors. Those of a prefix are then right on average, not
    /// each as near as can be, so that it has no use for a gain.
    pub const fn with_feedback(dropped: u8, weight: f32) -> Self {
        // One bit is of little use whatever is done for it.
        Self { dropped, weight: if dropped > 2 { 0.1 * weight } else { weight }, gain: 1.0 }
    }
}

/// The middle of the codes that share all but the last `dropped` bits with `code`.
fn middle(code: f32, dropped: u8) -> f32 {
    let step = f32::from(1u8 << dropped);
    // Codes are whole numbers, so this rounds down and never meets a half.
    let part = ((code / step - (0.5 - 0.5 / step)) + ROUND) - ROUND;
    part * step + 0.5 * (step - 1.0)
}

/// Quantises the group `x`, at most 128 weights, into `codes` of the same length. Returns scale and minimum.
///
/// All weights must be finite. Returns `None` if they are too large for a binary16 scale.
pub fn quantise_group(x: &[f32], grid: Grid, codes: &mut [u8]) -> Option<(f16, f16)> {
    quantise_nested(x, grid, &[], codes)
}

/// As [`quantise_group`], with the scale (and minimum) that suits `prefixes` of the codes too. Without prefixes,
/// and with signed codes of 8 bits, it is the same.
pub fn quantise_nested(x: &[f32], grid: Grid, prefixes: &[Prefix], codes: &mut [u8]) -> Option<(f16, f16)> {
    debug_assert!(x.len() <= MAX_GROUP && x.len() == codes.len());
    if grid.bits == 8 {
        return eight_bits(x, codes);
    }
    Target { whole: x, importance: &EQUAL[..x.len()], grid, prefixes, of_prefix: [x; MAX_PREFIXES] }.quantise(codes)
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

/// What is to be approximated: the weights, by codes of the grid and by prefixes of them.
#[derive(Clone, Copy)]
struct Target<'a> {
    /// By the whole code.
    whole: &'a [f32],
    /// What each weight's squared error counts.
    importance: &'a [f32],
    grid: Grid,
    prefixes: &'a [Prefix],
    /// By each of the prefixes.
    of_prefix: [&'a [f32]; MAX_PREFIXES],
}

/// The nearest codes.
fn round(x: &[f32], grid: Grid, inverse: f32, minimum: f32, codes: &mut [f32; MAX_GROUP]) {
    let (zero, top) = (f32::from(grid.zero_x2) / 2.0, grid.top());
    for (q, x) in codes.iter_mut().zip(x) {
        *q = (((x - minimum) * inverse + zero).clamp(0.0, top) + ROUND) - ROUND;
    }
}

/// Sum of `importance * f(x, q)`, in lanes.
#[inline(always)]
fn sum(x: &[f32], importance: &[f32], q: &[f32; MAX_GROUP], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    let (weights, rest_weights) = importance.as_chunks::<LANES>();
    let (codes, _) = q.as_chunks::<LANES>();
    for ((x, w), q) in chunks.iter().zip(weights).zip(codes) {
        for i in 0..LANES {
            lanes[i] += w[i] * f(x[i], q[i]);
        }
    }
    for (i, (x, w)) in rest.iter().zip(rest_weights).enumerate() {
        lanes[i] += w * f(*x, q[chunks.len() * LANES + i]);
    }
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}

impl<'a> Target<'a> {
    fn quantise(&self, codes: &mut [u8]) -> Option<(f16, f16)> {
        let fit = if self.grid.affine { self.affine() } else { self.symmetric() };
        for (code, q) in codes.iter_mut().zip(&fit.codes) {
            *code = *q as u8;
        }
        (fit.scale.is_finite() && fit.minimum.is_finite()).then_some((fit.scale, fit.minimum))
    }

    /// Every precision and what it is to approximate, the whole code first.
    fn levels(&self) -> impl Iterator<Item = (&'a [f32], Prefix)> + use<'a> {
        let prefixes = self.of_prefix.into_iter().zip(self.prefixes.iter().copied());
        core::iter::once((self.whole, Prefix::WHOLE)).chain(prefixes)
    }

    /// Rounds the weights to the codes of `scale` and `minimum` as they will be stored.
    fn rounded(&self, scale: f32, minimum: f32) -> Fit {
        let (scale, minimum) = (f16::from_f32(scale), f16::from_f32(minimum));
        let (s, m) = (scale.to_f32(), minimum.to_f32());
        let inverse = if s == 0.0 { 0.0 } else { 1.0 / s };
        let mut codes = [0.0; MAX_GROUP];
        round(self.whole, self.grid, inverse, m, &mut codes);
        let zero = self.zero();
        let mut error = 0.0;
        for (x, level) in self.levels() {
            error += level.weight
                * sum(x, self.importance, &codes, |x, q| {
                    let e = level.gain * (s * (middle(q, level.dropped) - zero) + m) - x;
                    e * e
                });
        }
        Fit { scale, minimum, codes, error: if error.is_finite() { error } else { f32::INFINITY } }
    }

    fn zero(&self) -> f32 {
        f32::from(self.grid.zero_x2) / 2.0
    }

    /// The scale for `codes` by least squares, and how much of the square sum it explains.
    fn fit_scale(&self, codes: &[f32; MAX_GROUP]) -> (f32, f32) {
        let zero = self.zero();
        let (mut xl, mut ll) = (0.0, 0.0);
        for (x, p) in self.levels() {
            let level = |q| p.gain * (middle(q, p.dropped) - zero);
            xl += p.weight * sum(x, self.importance, codes, |x, q| x * level(q));
            ll += p.weight * sum(x, self.importance, codes, |_, q| level(q) * level(q));
        }
        if ll > 0.0 { (xl / ll, xl * xl / ll) } else { (0.0, 0.0) }
    }

    /// Scale and minimum for `codes` by least squares.
    fn fit_line(&self, codes: &[f32; MAX_GROUP]) -> Fit {
        let (mut n, mut bx, mut sq, mut xq, mut qq) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for (x, p) in self.levels() {
            let (once, twice) = (p.weight * p.gain, p.weight * p.gain * p.gain);
            let over = |f: fn(f32, f32) -> f32| sum(x, self.importance, codes, |x, q| f(x, middle(q, p.dropped)));
            n += twice * over(|_, _| 1.0);
            bx += once * over(|x, _| x);
            sq += twice * over(|_, q| q);
            xq += once * over(|x, q| x * q);
            qq += twice * over(|_, q| q * q);
        }
        let det = n * qq - sq * sq;
        if det > 0.0 {
            let scale = (n * xq - bx * sq) / det;
            self.rounded(scale, (bx - scale * sq) / n)
        } else {
            self.rounded(0.0, bx / n)
        }
    }

    fn symmetric(&self) -> Fit {
        let Self { whole: x, grid, .. } = *self;
        // With a code for zero, one side has a code more, and the sign of the scale decides which.
        let signs: &[f32] = if grid.zero_x2.is_multiple_of(2) { &[-1.0, 1.0] } else { &[1.0] };
        let extreme = x.iter().fold(0.0f32, |a, &x| if x.abs() > a.abs() { x } else { a });
        if extreme == 0.0 {
            return self.rounded(0.0, 0.0);
        }
        let mut codes = [0.0; MAX_GROUP];
        let (mut scale, mut best) = (0.0, f32::NEG_INFINITY);
        for i in 0..CANDIDATES {
            // From clipping half of the range away to leaving a quarter unused.
            let shrink = 0.5 + 0.75 * i as f32 / (CANDIDATES - 1) as f32;
            for &sign in signs {
                round(x, grid, sign * self.zero() / (extreme * shrink), 0.0, &mut codes);
                let (s, explained) = self.fit_scale(&codes);
                if explained > best {
                    (scale, best) = (s, explained);
                }
            }
        }
        refine(self.rounded(scale, 0.0), |codes| self.rounded(self.fit_scale(codes).0, 0.0))
    }

    fn affine(&self) -> Fit {
        let Self { whole: x, grid, .. } = *self;
        let (least, most) = x.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(a, b), &x| (a.min(x), b.max(x)));
        let top = grid.top();
        let mut best = self.rounded((most - least) / top, least);
        if most <= least {
            return best;
        }
        let mut codes = [0.0; MAX_GROUP];
        let middle = (most + least) / 2.0;
        for i in 0..CANDIDATES {
            let shrink = 0.55 + 0.5 * i as f32 / (CANDIDATES - 1) as f32;
            let range = (most - least) * shrink;
            round(x, grid, top / range, middle - range / 2.0, &mut codes);
            let fitted = self.fit_line(&codes);
            if fitted.error < best.error {
                best = fitted;
            }
        }
        refine(best, |codes| self.fit_line(codes))
    }
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

    /// A prefix gains from what the whole code loses little by.
    #[test]
    fn prefixes_count_too() {
        for grid in [Grid::with_zero(4), Grid::paired(4), Grid::affine(4)] {
            for group in [32, 64, 128] {
                let errors = |prefixes: &[Prefix]| {
                    let mut codes = vec![0; group];
                    let (mut whole, mut xv, mut vv, mut xx) = (0.0, 0.0, 0.0, 0.0);
                    for x in normal(7, 1 << 14).chunks(group) {
                        let (s, m) = quantise_nested(x, grid, prefixes, &mut codes).unwrap();
                        for (x, q) in x.iter().zip(&codes) {
                            let (x, value) = (f64::from(*x), f64::from(grid.prefix_weight(*q, 2, s, m)));
                            whole += (f64::from(grid.weight(*q, s, m)) - x).powi(2);
                            xv += x * value;
                            vv += value * value;
                            xx += x * x;
                        }
                    }
                    // With the best gain, the error is what the values do not explain.
                    (whole, xx - xv * xv / vv, xv / vv)
                };
                let (plain, nested) = (errors(&[]), errors(&[Prefix::new(2)]));
                assert!(nested.0 < 1.04 * plain.0, "{grid:?} {group}: whole {} -> {}", plain.0, nested.0);
                assert!(nested.1 < 0.99 * plain.1, "{grid:?} {group}: prefix {} -> {}", plain.1, nested.1);
                assert!(
                    (nested.2 - f64::from(Prefix::new(2).gain)).abs() < 0.05,
                    "{grid:?} {group}: gain {}",
                    nested.2
                );
            }
        }
    }

    #[test]
    fn middles_of_ranges() {
        for code in 0..16u8 {
            for dropped in 0..4 {
                let range = (0..16u8).filter(|other| other >> dropped == code >> dropped).map(f32::from);
                let want = range.clone().sum::<f32>() / range.count() as f32;
                assert_eq!(middle(code.into(), dropped), want);
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
        for grid in [Grid::with_zero(4), Grid::affine(4), Grid::paired(2), Grid::paired(3), Grid::TERNARY, Grid::Q8] {
            let (scale, minimum) = (f16::from_f32(0.03125), f16::from_f32(if grid.affine { -0.25 } else { 0.0 }));
            let top = if grid.bits == 8 { 127 } else { grid.top() as u8 };
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
        for grid in [Grid::with_zero(4), Grid::affine(4), Grid::paired(1), Grid::TERNARY, Grid::Q8] {
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
