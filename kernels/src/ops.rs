//! The small operators of a decoder layer, on slices.

use crate::exec::Exec;
use crate::reference::math;

fn same(a: usize, b: usize) {
    assert_eq!(a, b, "operands of different length");
}

/// Root-mean-square norm of one vector: `out = x / sqrt(mean(x^2) + eps) * weight`
/// (Zhang and Sennrich, *Root Mean Square Layer Normalization*, 2019).
///
/// # Panics
/// If the lengths differ.
pub fn rms_norm(exec: &Exec<'_>, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    same(x.len(), weight.len());
    same(x.len(), out.len());
    exec.backend.kernels().rms_norm(x, weight, eps, out);
}

/// Cosines and sines of the rotary angles `pos * inv_freq`, times `mscale`.
///
/// # Panics
/// If the lengths differ.
pub fn rope_tables(pos: u32, inv_freq: &[f32], mscale: f32, cos: &mut [f32], sin: &mut [f32]) {
    same(inv_freq.len(), cos.len());
    same(inv_freq.len(), sin.len());
    for ((f, c), s) in inv_freq.iter().zip(cos).zip(sin) {
        let (sine, cosine) = libm::sincosf(pos as f32 * f);
        *c = cosine * mscale;
        *s = sine * mscale;
    }
}

/// Rotates one head in place, pairing element `i` with `i + cos.len()` (Su et al., *RoFormer*, 2021, in the
/// half-split order of GPT-NeoX); elements from `2 * cos.len()` on are left alone.
///
/// # Panics
/// If `cos` and `sin` differ in length or the head is shorter than `2 * cos.len()`.
pub fn rope(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    same(cos.len(), sin.len());
    let (low, high) = x[..2 * cos.len()].split_at_mut(cos.len());
    for (((a, b), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
    }
}

/// `x = exp(x - max) / sum`, in place. All NaN if an element is NaN or positive infinity, or all are negative
/// infinity.
pub fn softmax(exec: &Exec<'_>, x: &mut [f32]) {
    exec.backend.kernels().softmax(x);
}

/// Logistic function.
pub fn sigmoid(x: f32) -> f32 {
    math::sigmoid(x)
}

/// Exponential function, within 2 units in the last place, the same bits everywhere.
pub fn exp(x: f32) -> f32 {
    math::exp(x)
}

/// `gate = silu(gate) * up` in place, `silu(x)` being `x * sigmoid(x)` (Shazeer, *GLU Variants Improve
/// Transformer*, 2020).
///
/// # Panics
/// If the lengths differ.
pub fn silu_mul(exec: &Exec<'_>, gate: &mut [f32], up: &[f32]) {
    same(gate.len(), up.len());
    exec.backend.kernels().silu_mul(gate, up);
}

/// What a gated feed-forward does to its gate.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Activation {
    /// `x * sigmoid(x)`.
    #[default]
    Silu,
    /// `max(x, 0)`: neurons whose gate is not above zero add nothing, whatever their other weights are.
    Relu,
}

/// `gate = activation(gate) * up` in place.
///
/// # Panics
/// If the lengths differ.
pub fn gate_mul(exec: &Exec<'_>, activation: Activation, gate: &mut [f32], up: &[f32]) {
    same(gate.len(), up.len());
    match activation {
        Activation::Silu => exec.backend.kernels().silu_mul(gate, up),
        Activation::Relu => math::relu_mul(gate, up),
    }
}

/// `acc += x`.
///
/// # Panics
/// If the lengths differ.
pub fn add(exec: &Exec<'_>, acc: &mut [f32], x: &[f32]) {
    same(acc.len(), x.len());
    exec.backend.kernels().add(acc, x);
}

/// `acc += x * w`, not fused.
///
/// # Panics
/// If the lengths differ.
pub fn add_scaled(exec: &Exec<'_>, acc: &mut [f32], x: &[f32], w: f32) {
    same(acc.len(), x.len());
    exec.backend.kernels().add_scaled(acc, x, w);
}

/// `x *= s`.
pub fn scale(exec: &Exec<'_>, x: &mut [f32], s: f32) {
    exec.backend.kernels().scale(x, s);
}

/// Inner product in the order of `docs/arithmetic.md` (16 partial sums).
///
/// # Panics
/// If the lengths differ.
pub fn dot(exec: &Exec<'_>, a: &[f32], b: &[f32]) -> f32 {
    same(a.len(), b.len());
    exec.backend.kernels().dot(a, b)
}

/// Gated causal depthwise convolution over `tokens` tokens: `out = C * (conv(B * x) + bias)`, the short
/// convolution of LFM2.
///
/// - `bcx`: `[tokens][3 * hidden]`, each token holding B, C and x one after another.
/// - `weight`: `[hidden][taps]`, the last tap being the current token's.
/// - `bias`: `[hidden]`.
/// - `state`: `[taps - 1][hidden]`, the last values of `B * x`, oldest first; updated.
/// - `out`: `[tokens][hidden]`.
///
/// # Panics
/// If a slice has another length or `taps` is 0.
#[allow(clippy::too_many_arguments)]
pub fn short_conv(
    bcx: &[f32],
    weight: &[f32],
    bias: Option<&[f32]>,
    state: &mut [f32],
    tokens: usize,
    hidden: usize,
    taps: usize,
    out: &mut [f32],
) {
    assert!(taps > 0, "a convolution has at least one tap");
    same(bcx.len(), tokens * 3 * hidden);
    same(weight.len(), hidden * taps);
    same(state.len(), (taps - 1) * hidden);
    same(out.len(), tokens * hidden);
    if let Some(bias) = bias {
        same(bias.len(), hidden);
    }
    if hidden == 0 {
        return;
    }
    for (bcx, out) in bcx.chunks_exact(3 * hidden).zip(out.chunks_exact_mut(hidden)) {
        let (b, rest) = bcx.split_at(hidden);
        let (c, x) = rest.split_at(hidden);
        for channel in 0..hidden {
            let value = b[channel] * x[channel];
            let taps_of = &weight[channel * taps..(channel + 1) * taps];
            let mut acc = 0.0;
            for (tap, w) in taps_of[..taps - 1].iter().enumerate() {
                acc += w * state[tap * hidden + channel];
            }
            acc += taps_of[taps - 1] * value;
            if let Some(bias) = bias {
                acc += bias[channel];
            }
            out[channel] = c[channel] * acc;
            for tap in 1..taps - 1 {
                state[(tap - 1) * hidden + channel] = state[tap * hidden + channel];
            }
            if taps > 1 {
                state[(taps - 2) * hidden + channel] = value;
            }
        }
    }
}

/// Index of the largest element, the first of equals; NaN never wins. 0 if there is none.
pub fn argmax(x: &[f32]) -> usize {
    let mut best = None;
    for (i, &v) in x.iter().enumerate() {
        if !v.is_nan() && best.is_none_or(|(_, max)| v > max) {
            best = Some((i, v));
        }
    }
    best.map_or(0, |(i, _)| i)
}

/// Whether an element is NaN or infinite.
pub fn has_non_finite(x: &[f32]) -> bool {
    // One maximum over the exponent bits instead of an early exit, so that it vectorises.
    x.iter().fold(0, |max, v| max.max(v.to_bits() & 0x7fff_ffff)) >= 0x7f80_0000
}
