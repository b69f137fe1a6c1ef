//! Transcendental functions and the operators made of them.

use super::float;

/// Adding this to a float of magnitude below 2^22 rounds it to an integer, half to even, which then stands in
/// the low bits.
pub(crate) const ROUND: f32 = 12_582_912.0;

/// The nearest integer, half to even, of a float of magnitude below 2^22.
#[inline(always)]
pub(crate) fn round(x: f32) -> i32 {
    (x + ROUND).to_bits().wrapping_sub(ROUND.to_bits()) as i32
}

/// `2^n` for n in -126..=127.
#[inline(always)]
fn exp2i(n: i32) -> f32 {
    f32::from_bits(((n + 127) << 23) as u32)
}

/// e^x: x = n ln 2 + r with |r| <= ln 2 / 2 (Cody and Waite's two-part constant), the minimax polynomial of
/// Moshier's Cephes `expf`, and the scaling by 2^n in two steps so that subnormal results come out right.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Beyond these bounds the result is infinity or zero anyway.
    let y = if x > 89.0 { 89.0 } else { x };
    let y = if y < -104.0 { -104.0 } else { y };
    let n = round(y * core::f32::consts::LOG2_E);
    let nf = n as f32;
    #[allow(clippy::excessive_precision)]
    let r = y - nf * 0.693_359_375 - nf * -2.121_944_40e-4;
    #[allow(clippy::excessive_precision)]
    let p = {
        let p = 1.987_569_15e-4 * r + 1.398_199_95e-3;
        let p = p * r + 8.333_451_9e-3;
        let p = p * r + 4.166_579_6e-2;
        let p = p * r + 1.666_666_55e-1;
        p * r + 5.000_000_1e-1
    };
    let p = p * (r * r) + r + 1.0;
    let half = n >> 1;
    let e = p * exp2i(half) * exp2i(n - half);
    if x.is_nan() { x } else { e }
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `gate = gate / (1 + e^-gate) * up`.
#[inline(always)]
pub(crate) fn silu_mul(gate: &mut [f32], up: &[f32]) {
    for (g, u) in gate.iter_mut().zip(up) {
        *g = *g / (1.0 + exp(-*g)) * u;
    }
}

/// `gate = gate * up` where `gate` is above zero or NaN, else 0 whatever `up` is.
#[inline(always)]
pub(crate) fn relu_mul(gate: &mut [f32], up: &[f32]) {
    for (g, u) in gate.iter_mut().zip(up) {
        *g = if *g <= 0.0 { 0.0 } else { *g * *u };
    }
}

/// Softmax in place: exact maximum, exponentials, their sum by 16 partials, one reciprocal.
#[inline(always)]
pub(crate) fn softmax(x: &mut [f32]) {
    let max = float::max(x);
    for v in x.iter_mut() {
        *v = exp(*v - max);
    }
    let inverse = 1.0 / float::sum(x);
    for v in x {
        *v *= inverse;
    }
}

/// `1 / sqrt(square / n + eps)`.
#[inline(always)]
pub(crate) fn inverse_rms(square: f32, n: usize, eps: f32) -> f32 {
    let mean = square / n as f32;
    1.0 / libm::sqrtf(mean + eps)
}

/// RMS norm: `x * (1 / sqrt(square / n + eps)) * weight`, `square` being the inner product of `x` with itself.
#[inline(always)]
pub(crate) fn rms_norm(square: f32, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let inverse = inverse_rms(square, x.len(), eps);
    for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
        *o = x * inverse * w;
    }
}
