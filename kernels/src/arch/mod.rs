//! Back-ends: one private trait, the scalar definition, and one file per instruction set.
//!
//! The only unsafe code of the crate is here: vector intrinsics, the hand-out of disjoint parts of an output to
//! the workers, the thread pool's borrowed job, and advice to the system about pages.
#![allow(unsafe_code)]

#[cfg(all(target_arch = "aarch64", target_feature = "neon", target_endian = "little"))]
mod aarch64;
#[cfg(feature = "std")]
pub(crate) mod pages;
#[cfg(any(test, feature = "std"))]
pub(crate) mod pool;
#[cfg(all(target_arch = "riscv64", target_feature = "d"))]
pub(crate) mod riscv64;
pub(crate) mod split;
#[cfg(any(test, target_arch = "riscv64"))]
mod swar;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use crate::activations::{ActSpec, Acts, TokenMut};
use crate::reference::quant::QuantBlock;
use crate::reference::{attention, float, kv8, math, quant};
use crate::weights::ROW_BLOCK;

/// Most tokens that one call of [`Kernels::quant_tile`] multiplies.
pub(crate) const TILE: usize = 4;

/// Stored float formats; all convert to `f32` exactly.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Float {
    F32,
    F16,
    Bf16,
}

impl Float {
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
    /// Converts a stored row.
    pub fn to_f32(self, row: &[u8], out: &mut [f32]) {
        use float::Element;
        let load = match self {
            Self::F32 => float::F32::load,
            Self::F16 => float::F16::load,
            Self::Bf16 => float::Bf16::load,
        };
        for (i, out) in out.iter_mut().enumerate() {
            *out = load(row, i);
        }
    }
}

/// What a back-end implements. Every provided method is the definition; an implementation that replaces one
/// returns the same bits. Lengths have been checked by the caller.
pub(crate) trait Kernels: Sync {
    fn name(&self) -> &'static str;
    /// Quantises one token.
    fn quantise(&self, spec: ActSpec, x: &[f32], out: TokenMut<'_>) {
        quant::quantise(spec, x, out);
    }
    /// Multiplies a row block with `out.len()` tokens, at most [`TILE`], from `first` on.
    fn quant_tile(&self, block: &QuantBlock<'_>, acts: &Acts<'_>, first: usize, out: &mut [[f32; ROW_BLOCK]]) {
        quant::quant_tile(block, acts, first, out);
    }
    /// Multiplies a row block with all tokens; `put(t, products)` takes those of token `t`.
    fn quant_block(&self, block: &QuantBlock<'_>, acts: &Acts<'_>, put: &mut dyn FnMut(usize, &[f32; ROW_BLOCK])) {
        quant_block(self, block, acts, put);
    }
    /// `out[i]` = inner product of stored row `i` with `x`.
    fn dot_rows(&self, format: Float, rows: &[u8], x: &[f32], out: &mut [f32]) {
        float::dot_rows(format, rows, x, out);
    }
    /// Converts stored elements, as many as `out` has.
    fn widen(&self, format: Float, stored: &[u8], out: &mut [f32]) {
        format.to_f32(stored, out);
    }
    /// Converts a block of 8-bit keys to `[dim][POSITIONS]`.
    fn widen_keys_q8(&self, block: &[u8], out: &mut [f32]) {
        kv8::widen_keys(block, out);
    }
    /// Converts rows of 8-bit values of `dim` elements.
    fn widen_values_q8(&self, rows: &[u8], dim: usize, out: &mut [f32]) {
        kv8::widen_values(rows, dim, out);
    }
    /// `scores[h * stride + j]` = inner product of query `h` with the key of position `j`, times `scale`. `keys` is
    /// `[dim][POSITIONS]`, `q` `[heads][dim]`; both are lent for a group of heads that share their keys.
    fn scores(&self, keys: &[f32], q: &[f32], scale: f32, scores: &mut [f32], stride: usize) {
        attention::scores(keys, q, scale, scores, stride);
    }
    /// `out[h] += weights[h * stride + j] * values[j]`, position after position. `values` is `[positions][dim]`, `out`
    /// `[heads][dim]`.
    fn mix(&self, values: &[f32], dim: usize, weights: &[f32], stride: usize, out: &mut [f32]) {
        attention::mix(values, dim, weights, stride, out);
    }
    /// Rounds to binary16, nearest even; `out` is two bytes an element.
    fn store_f16(&self, x: &[f32], out: &mut [u8]) {
        float::store_f16(x, out);
    }
    fn dot(&self, a: &[f32], b: &[f32]) -> f32 {
        float::dot(a, b)
    }
    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        math::rms_norm(self.dot(x, x), x, weight, eps, out);
    }
    fn softmax(&self, x: &mut [f32]) {
        math::softmax(x);
    }
    fn silu_mul(&self, gate: &mut [f32], up: &[f32]) {
        math::silu_mul(gate, up);
    }
    fn add(&self, acc: &mut [f32], x: &[f32]) {
        float::add(acc, x);
    }
    fn add_scaled(&self, acc: &mut [f32], x: &[f32], w: f32) {
        float::add_scaled(acc, x, w);
    }
    fn scale(&self, x: &mut [f32], s: f32) {
        float::scale(x, s);
    }
    /// The exclusive or of all whole 64-bit words.
    fn read_only(&self, bytes: &[u8]) -> u64 {
        read_only(bytes)
    }
}

/// The exclusive or of all whole 64-bit words, in as many independent chains as hide the latency of an operation.
#[inline(always)]
fn read_only(bytes: &[u8]) -> u64 {
    let (words, _) = bytes.as_chunks::<8>();
    let (lines, rest) = words.as_chunks::<32>();
    let mut parities = [0; 32];
    for line in lines {
        for (parity, word) in parities.iter_mut().zip(line) {
            *parity ^= u64::from_ne_bytes(*word);
        }
    }
    rest.iter().map(|word| u64::from_ne_bytes(*word)).chain(parities).fold(0, |a, b| a ^ b)
}

/// The products of a row block with all tokens, a few of them at a time.
pub(crate) fn quant_block<K: Kernels + ?Sized>(
    kernels: &K,
    block: &QuantBlock<'_>,
    acts: &Acts<'_>,
    put: &mut dyn FnMut(usize, &[f32; ROW_BLOCK]),
) {
    let mut tile = [[0.0; ROW_BLOCK]; TILE];
    for first in (0..acts.tokens()).step_by(TILE) {
        let tile = &mut tile[..TILE.min(acts.tokens() - first)];
        kernels.quant_tile(block, acts, first, tile);
        tile.iter().enumerate().for_each(|(t, products)| put(first + t, products));
    }
}

/// The definition as a back-end.
pub(crate) struct Scalar;

impl Kernels for Scalar {
    fn name(&self) -> &'static str {
        "scalar"
    }
}

/// The vector back-ends of this CPU, slowest first.
#[cfg(target_arch = "x86_64")]
pub(crate) fn vector_backends() -> [Option<&'static dyn Kernels>; 2] {
    [x86_64::avx2::get(), x86_64::avx512::get()]
}

/// The vector back-ends of this CPU, slowest first.
#[cfg(all(target_arch = "aarch64", target_feature = "neon", target_endian = "little"))]
pub(crate) fn vector_backends() -> [Option<&'static dyn Kernels>; 2] {
    [aarch64::neon::get(), aarch64::dotprod::get()]
}

/// The vector back-ends of this CPU, slowest first.
#[cfg(all(target_arch = "riscv64", target_feature = "d"))]
pub(crate) fn vector_backends() -> [Option<&'static dyn Kernels>; 1] {
    [riscv64::rvv::get()]
}

/// The vector back-ends of this CPU, slowest first.
#[cfg(not(any(
    target_arch = "x86_64",
    all(target_arch = "aarch64", target_feature = "neon", target_endian = "little"),
    all(target_arch = "riscv64", target_feature = "d")
)))]
pub(crate) fn vector_backends() -> [Option<&'static dyn Kernels>; 0] {
    []
}

/// The back-end of 64-bit cores without vectors. The compiler's vectors make the definition faster than it on other
/// cores, where only tests have it.
fn word_backend() -> Option<&'static dyn Kernels> {
    #[cfg(any(test, target_arch = "riscv64"))]
    return Some(&swar::Swar);
    #[cfg(not(any(test, target_arch = "riscv64")))]
    None
}

/// All back-ends of this CPU, slowest first.
pub(crate) fn backends() -> impl Iterator<Item = &'static dyn Kernels> {
    let scalar: &'static dyn Kernels = &Scalar;
    [Some(scalar), word_backend()].into_iter().chain(vector_backends()).flatten()
}

/// The back-end that the build was made for: `FOREBAY_BACKEND=scalar cargo build`.
pub(crate) const FORCED: Option<&str> = option_env!("FOREBAY_BACKEND");
const NAMES: [&str; 7] = ["scalar", "swar", "avx2", "avx512", "neon", "dotprod", "rvv"];
const _: () = assert!(known(FORCED), "FOREBAY_BACKEND names no back-end");

const fn known(forced: Option<&str>) -> bool {
    let Some(forced) = forced else { return true };
    let mut index = 0;
    while index < NAMES.len() {
        let (name, mut same) = (NAMES[index].as_bytes(), NAMES[index].len() == forced.len());
        let mut byte = 0;
        while same && byte < name.len() {
            same = name[byte] == forced.as_bytes()[byte];
            byte += 1;
        }
        if same {
            return true;
        }
        index += 1;
    }
    false
}

/// The fastest back-end, or the one that the build was made for; the definition where the CPU has not that one.
pub(crate) fn best() -> &'static dyn Kernels {
    if let Some(forced) = FORCED {
        return backends().find(|backend| backend.name() == forced).unwrap_or(&Scalar);
    }
    let words = if cfg!(target_arch = "riscv64") { word_backend() } else { None };
    vector_backends().into_iter().rev().flatten().next().or(words).unwrap_or(&Scalar)
}
