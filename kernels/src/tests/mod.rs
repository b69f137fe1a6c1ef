//! One runner for every back-end: [`executions`] are compared bit for bit with the scalar definition, and the
//! definition with arithmetic of its own kind (integers) and with binary64.

mod accuracy;
mod attention;
mod operators;
mod pool;
mod products;

use crate::exec::{Backend, Exec, Serial, Workers};

/// Splitmix64 (Steele, Lea and Flood, 2014): test data from a seed.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    /// Uniform in -1..1.
    pub fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }
    /// Roughly normal, of variance 1.
    pub fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() / 2.0
    }
    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }
    /// Normal, but now and then a value that breaks careless code.
    pub fn nasty(&mut self) -> f32 {
        const NASTY: [f32; 14] = [
            0.0,
            -0.0,
            1e-40,
            -1e-45,
            1e30,
            -1e30,
            f32::MAX,
            f32::MIN_POSITIVE,
            f32::NAN,
            f32::INFINITY,
            f32::NEG_INFINITY,
            7.6e-37,
            65504.0,
            0.5,
        ];
        if self.below(4) == 0 { NASTY[self.below(NASTY.len())] } else { self.normal() }
    }
}

/// Workers that run one after another, last first: whatever depends on order or overlaps shows.
pub struct Backwards(pub usize);

impl Workers for Backwards {
    fn count(&self) -> usize {
        self.0
    }
    fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        (0..self.0).rev().for_each(job);
    }
}

/// The fastest back-end on one core.
pub fn fastest() -> Exec<'static> {
    Exec { backend: Backend::detect(), workers: &Serial }
}

/// Calls `f` for every back-end with 1 to 3 workers.
pub fn executions(mut f: impl FnMut(&Exec<'_>)) {
    for backend in Backend::all() {
        for workers in [Backwards(1), Backwards(2), Backwards(3)] {
            f(&Exec { backend, workers: &workers });
        }
    }
}

/// Equal bits; all NaN are one value.
#[track_caller]
pub fn assert_same(got: &[f32], want: &[f32], what: impl std::fmt::Debug) {
    assert_eq!(got.len(), want.len());
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let same = g.to_bits() == w.to_bits() || g.is_nan() && w.is_nan();
        assert!(same, "element {i}: {g:e} ({:08x}), not {w:e} ({:08x}): {what:?}", g.to_bits(), w.to_bits());
    }
}

/// Energy of the error over the energy of the signal.
pub fn nmse(got: &[f32], want: &[f64]) -> f64 {
    let error: f64 = got.iter().zip(want).map(|(g, w)| (f64::from(*g) - w).powi(2)).sum();
    error / want.iter().map(|w| w * w).sum::<f64>()
}

/// A test double must itself be able to fail.
#[test]
#[should_panic(expected = "element 1")]
fn assert_same_sees_one_bit() {
    assert_same(&[1.0, 2.0], &[1.0, f32::from_bits(2.0f32.to_bits() + 1)], "");
}
