//! AVX-512 with VNNI and VBMI: 16 lanes own 16 output rows, two vectors a row block.
//!
//! Fields of 8, 4 and 2 bits multiply by `vpdpbusd`, whose sums of 32 bits no group can overflow, fields of 1 bit look
//! subset sums up with `vpermb` in four tables at a time and add them up by `vpdpbusd` too. Operators without a kernel
//! of their own are the definition, compiled for this instruction set.
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

/// Proof that the CPU has AVX-512 F, BW, VL, DQ, VNNI and VBMI, and GFNI.
pub(crate) struct Avx512(());

/// The back-end, if this CPU (with `std`) or this build (without) has the features.
pub(crate) fn get() -> Option<&'static dyn Kernels> {
    #[cfg(any(test, feature = "std"))]
    let available = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("avx512vbmi")
        && is_x86_feature_detected!("gfni");
    #[cfg(not(any(test, feature = "std")))]
    let available = cfg!(all(
        target_feature = "avx512f",
        target_feature = "avx512bw",
        target_feature = "avx512vl",
        target_feature = "avx512dq",
        target_feature = "avx512vnni",
        target_feature = "avx512vbmi",
        target_feature = "gfni"
    ));
    if available { Some(&Avx512(())) } else { None }
}

impl Kernels for Avx512 {
    fn name(&self) -> &'static str {
        "avx512"
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

/// Loads 64 bytes.
///
/// # Safety
/// `p` heads 64 readable bytes.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load(p: *const u8) -> __m512i {
    // SAFETY: the caller's promise; the load is unaligned.
    unsafe { _mm512_loadu_si512(p.cast()) }
}

/// Four bytes in every 32-bit lane.
///
/// # Safety
/// `p` heads 4 readable bytes.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn broadcast(p: *const u8) -> __m512i {
    // SAFETY: the caller's promise.
    _mm512_set1_epi32(unsafe { p.cast::<i32>().read_unaligned() })
}

/// 32 halves as two vectors of 16 floats.
///
/// # Safety
/// `p` heads 64 readable bytes.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn halves(p: *const u8) -> [__m512; 2] {
    // SAFETY: the caller's promise.
    unsafe { [_mm512_cvtph_ps(_mm256_loadu_si256(p.cast())), _mm512_cvtph_ps(_mm256_loadu_si256(p.add(32).cast()))] }
}

/// Brings a vector of a field of 1 bit, whose byte `16t + r` belongs to row r, to the order `4r + t`, so that the four
/// bytes of a row are one 32-bit lane.
#[inline]
#[target_feature(enable = "avx512vbmi")]
fn rows_to_lanes(codes: __m512i) -> __m512i {
    const ORDER: [u8; 64] = {
        let mut order = [0; 64];
        let mut i = 0;
        while i < 64 {
            order[i] = (i % 4 * 16 + i / 4) as u8;
            i += 1;
        }
        order
    };
    // SAFETY: the order has 64 bytes.
    _mm512_permutexvar_epi8(unsafe { load(ORDER.as_ptr()) }, codes)
}

/// Where the bytes of a field of 1 bit are looked up, low bits and high bits: byte t of a row's lane in the t-th of four
/// tables.
#[inline]
#[target_feature(enable = "avx512vbmi")]
fn indices(codes: __m512i) -> [__m512i; 2] {
    const FIRST_AND_SECOND_OR_THIRD: i32 = 0xea;
    let (nibble, table) = (_mm512_set1_epi8(15), _mm512_set1_epi32(0x3020_1000));
    let low = rows_to_lanes(codes);
    let high = _mm512_srli_epi16::<4>(low);
    [
        _mm512_ternarylogic_epi32::<FIRST_AND_SECOND_OR_THIRD>(low, nibble, table),
        _mm512_ternarylogic_epi32::<FIRST_AND_SECOND_OR_THIRD>(high, nibble, table),
    ]
}
