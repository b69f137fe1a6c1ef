//! AVX2 and F16C: lanes own output rows.
//!
//! Fields of 4 and 2 bits multiply by `vpmaddubsw` with 16-bit sums inside a group, fields of 8 bits the same way
//! after moving the weight's sign to the activation, fields of 1 bit look subset sums up with `vpshufb`. Operators
//! without a kernel of their own are the definition, compiled for this instruction set.
#![allow(clippy::needless_range_loop, reason = "row vectors and tokens index several arrays at once")]

mod acts;
mod attention;
mod float;
mod gemm;
mod gemv;

use crate::activations::{ActSpec, Acts, TokenMut};
use crate::arch::{self, Float, Kernels};
use crate::reference::quant::QuantBlock;
use crate::weights::ROW_BLOCK;
use core::arch::x86_64::*;

/// Proof that the CPU has AVX2 and F16C.
pub(crate) struct Avx2(());

/// The back-end, if this CPU (with `std`) or this build (without) has the features.
pub(crate) fn get() -> Option<&'static dyn Kernels> {
    #[cfg(any(test, feature = "std"))]
    let available = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c");
    #[cfg(not(any(test, feature = "std")))]
    let available = cfg!(all(target_feature = "avx2", target_feature = "f16c"));
    if available { Some(&Avx2(())) } else { None }
}

impl Kernels for Avx2 {
    fn name(&self) -> &'static str {
        "avx2"
    }
    fn quantise(&self, spec: ActSpec, x: &[f32], out: TokenMut<'_>) {
        // SAFETY: `self` proves the features, here and below.
        unsafe { acts::quantise(spec, x, out) }
    }
    fn quant_tile(&self, block: &QuantBlock<'_>, acts: &Acts<'_>, first: usize, out: &mut [[f32; ROW_BLOCK]]) {
        // SAFETY: as above.
        unsafe { gemv::quant_tile(block, acts, first, out) }
    }
    fn quant_block(&self, block: &QuantBlock<'_>, acts: &Acts<'_>, put: &mut dyn FnMut(usize, &[f32; ROW_BLOCK])) {
        if acts.tokens() < gemm::MIN_TOKENS {
            return arch::quant_block(self, block, acts, put);
        }
        // SAFETY: as above.
        unsafe { gemm::quant_block(block, acts, put) }
    }
    fn dot_rows(&self, format: Float, rows: &[u8], x: &[f32], out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { float::dot_rows(format, rows, x, out) }
    }
    fn widen(&self, format: Float, stored: &[u8], out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { attention::widen(format, stored, out) }
    }
    fn widen_keys_q8(&self, block: &[u8], out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { attention::widen_keys_q8(block, out) }
    }
    fn widen_values_q8(&self, rows: &[u8], dim: usize, out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { attention::widen_values_q8(rows, dim, out) }
    }
    fn scores(&self, keys: &[f32], q: &[f32], scale: f32, scores: &mut [f32], stride: usize) {
        // SAFETY: as above.
        unsafe { attention::scores(keys, q, scale, scores, stride) }
    }
    fn mix(&self, values: &[f32], dim: usize, weights: &[f32], stride: usize, out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { attention::mix(values, dim, weights, stride, out) }
    }
    fn store_f16(&self, x: &[f32], out: &mut [u8]) {
        // SAFETY: as above.
        unsafe { float::store_f16(x, out) }
    }
    fn dot(&self, a: &[f32], b: &[f32]) -> f32 {
        // SAFETY: as above.
        unsafe { float::dot(a, b) }
    }
    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { float::rms_norm(x, weight, eps, out) }
    }
    fn softmax(&self, x: &mut [f32]) {
        // SAFETY: as above.
        unsafe { float::softmax(x) }
    }
    fn silu_mul(&self, gate: &mut [f32], up: &[f32]) {
        // SAFETY: as above.
        unsafe { float::silu_mul(gate, up) }
    }
    fn add(&self, acc: &mut [f32], x: &[f32]) {
        // SAFETY: as above.
        unsafe { float::add(acc, x) }
    }
    fn add_scaled(&self, acc: &mut [f32], x: &[f32], w: f32) {
        // SAFETY: as above.
        unsafe { float::add_scaled(acc, x, w) }
    }
    fn scale(&self, x: &mut [f32], s: f32) {
        // SAFETY: as above.
        unsafe { float::scale(x, s) }
    }
    fn read_only(&self, bytes: &[u8]) -> u64 {
        // SAFETY: as above.
        unsafe { float::read_only(bytes) }
    }
}

/// Bytes ahead that a stream read once asks for: it comes from memory, and the processor's own prefetching ends at the
/// end of a page.
const AHEAD: usize = 2048;

/// Loads 32 bytes.
///
/// # Safety
/// `p` heads 32 readable bytes.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load(p: *const u8) -> __m256i {
    // SAFETY: the caller's promise; the load is unaligned.
    unsafe { _mm256_loadu_si256(p.cast()) }
}

/// Loads `V` times 32 bytes. (Closures with intrinsics, as `core::array::from_fn` would take, are not inlined into it:
/// it has not their features.)
///
/// # Safety
/// `p` heads as many readable bytes.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn loads<const V: usize>(p: *const u8) -> [__m256i; V] {
    let mut vectors = [_mm256_setzero_si256(); V];
    for (v, vector) in vectors.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *vector = unsafe { load(p.add(32 * v)) };
    }
    vectors
}

/// Four bytes in every 32-bit lane.
///
/// # Safety
/// `p` heads 4 readable bytes.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn broadcast(p: *const u8) -> __m256i {
    // SAFETY: the caller's promise.
    _mm256_set1_epi32(unsafe { p.cast::<i32>().read_unaligned() })
}
