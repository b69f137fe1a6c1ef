//! Float sums in one fixed order: 16 partial sums, element `i` into partial `i % 16`, folded by 8, 4, 2, 1.

use crate::arch::Float;

/// Number of partial sums.
pub(crate) const PARTIALS: usize = 16;

/// Folds the partial sums: `p[i] += p[i + 8]`, then 4, 2, 1.
#[inline(always)]
pub(crate) fn fold(mut p: [f32; PARTIALS]) -> f32 {
    let mut n = PARTIALS / 2;
    while n > 0 {
        for i in 0..n {
            p[i] += p[i + n];
        }
        n /= 2;
    }
    p[0]
}

/// Inner product.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a, a_rest) = a.as_chunks::<PARTIALS>();
    let (b, b_rest) = b.as_chunks::<PARTIALS>();
    let mut p = [0.0; PARTIALS];
    for (a, b) in a.iter().zip(b) {
        for i in 0..PARTIALS {
            p[i] += a[i] * b[i];
        }
    }
    for (i, (a, b)) in a_rest.iter().zip(b_rest).enumerate() {
        p[i] += a * b;
    }
    fold(p)
}

/// Sum.
#[inline(always)]
pub(crate) fn sum(x: &[f32]) -> f32 {
    let (x, rest) = x.as_chunks::<PARTIALS>();
    let mut p = [0.0; PARTIALS];
    for x in x {
        for i in 0..PARTIALS {
            p[i] += x[i];
        }
    }
    for (i, x) in rest.iter().enumerate() {
        p[i] += x;
    }
    fold(p)
}

/// Largest element, NaN aside; negative infinity if there is none. Its order does not matter.
#[inline(always)]
pub(crate) fn max(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (x, rest) = x.as_chunks::<PARTIALS>();
    let mut p = [f32::NEG_INFINITY; PARTIALS];
    for x in x {
        for i in 0..PARTIALS {
            p[i] = larger(p[i], x[i]);
        }
    }
    rest.iter().chain(&p).fold(f32::NEG_INFINITY, |a, &b| larger(a, b))
}

/// `acc += x`.
#[inline(always)]
pub(crate) fn add(acc: &mut [f32], x: &[f32]) {
    for (a, x) in acc.iter_mut().zip(x) {
        *a += x;
    }
}

/// `x *= s`.
#[inline(always)]
pub(crate) fn scale(x: &mut [f32], s: f32) {
    for x in x {
        *x *= s;
    }
}

/// `acc += x * w`.
#[inline(always)]
pub(crate) fn add_scaled(acc: &mut [f32], x: &[f32], w: f32) {
    for (a, x) in acc.iter_mut().zip(x) {
        *a += x * w;
    }
}

/// An element format whose conversion to `f32` is exact.
pub(crate) trait Element {
    const BYTES: usize;
    fn load(bytes: &[u8], index: usize) -> f32;
}

pub(crate) struct F32;
pub(crate) struct F16;
pub(crate) struct Bf16;

impl Element for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    fn load(bytes: &[u8], index: usize) -> f32 {
        let b = &bytes[4 * index..4 * index + 4];
        f32::from_le_bytes([b[0], b[1], b[2], b[3]])
    }
}

impl Element for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    fn load(bytes: &[u8], index: usize) -> f32 {
        f16_to_f32(u16::from_le_bytes([bytes[2 * index], bytes[2 * index + 1]]))
    }
}

impl Element for Bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    fn load(bytes: &[u8], index: usize) -> f32 {
        let bits = u16::from_le_bytes([bytes[2 * index], bytes[2 * index + 1]]);
        f32::from_bits(u32::from(bits) << 16)
    }
}

/// binary16 to binary32, exact, without branches: the exponent is rebiased by one multiplication, which also
/// normalises subnormals.
#[inline(always)]
pub(crate) fn f16_to_f32(bits: u16) -> f32 {
    let bits = u32::from(bits);
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
    // The multiplication maps infinity and NaN, whose exponent is all ones, to 2^16 and up.
    let special = if magnitude >= 65536.0 { 0x7f80_0000 } else { 0 };
    f32::from_bits(magnitude.to_bits() | special | (bits & 0x8000) << 16)
}

/// Rounds to binary16, nearest even.
pub(crate) fn store_f16(x: &[f32], out: &mut [u8]) {
    for (x, out) in x.iter().zip(out.as_chunks_mut().0) {
        *out = half::f16::from_f32(*x).to_le_bytes();
    }
}

/// Inner product of a stored row with `x`.
#[inline(always)]
fn dot_element<E: Element>(row: &[u8], x: &[f32]) -> f32 {
    let mut p = [0.0; PARTIALS];
    for (row, x) in row.chunks(PARTIALS * E::BYTES).zip(x.chunks(PARTIALS)) {
        for (i, (p, x)) in p.iter_mut().zip(x).enumerate() {
            *p += x * E::load(row, i);
        }
    }
    fold(p)
}

/// `out[i]` = inner product of stored row `i` with `x`.
#[inline(always)]
pub(crate) fn dot_rows(format: Float, rows: &[u8], x: &[f32], out: &mut [f32]) {
    let dot = match format {
        Float::F32 => dot_element::<F32>,
        Float::F16 => dot_element::<F16>,
        Float::Bf16 => dot_element::<Bf16>,
    };
    for (row, out) in rows.chunks_exact(x.len() * format.bytes()).zip(out) {
        *out = dot(row, x);
    }
}
