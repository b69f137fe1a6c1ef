//! NEON with the dot-product extension (Armv8.2, Cortex-A55 and A75 onwards): [`super::neon`] with `sdot` for fields
//! of 2, 4 and 8 bits. The intrinsic is not stable, so the instruction is written out.

use super::attention;
use super::neon::{self, Dot};
use crate::activations::{ActSpec, Acts, TokenMut};
use crate::arch::{Float, Kernels};
use crate::reference::quant::QuantBlock;
use crate::weights::ROW_BLOCK;
use core::arch::aarch64::*;
use core::arch::asm;

/// Proof that the CPU has the dot-product extension.
#[derive(Clone, Copy)]
pub(crate) struct Dotprod(());

/// The back-end, if this CPU has the extension. Without `std` and under an operating system, this build decides.
pub(crate) fn get() -> Option<&'static dyn Kernels> {
    #[cfg(any(test, feature = "std"))]
    let available = std::arch::is_aarch64_feature_detected!("dotprod");
    #[cfg(all(target_os = "none", not(any(test, feature = "std"))))]
    let available = cfg!(target_feature = "dotprod") || identified();
    #[cfg(not(any(test, feature = "std", target_os = "none")))]
    let available = cfg!(target_feature = "dotprod");
    if available { Some(&Dotprod(())) } else { None }
}

/// Whether ID_AA64ISAR0_EL1 has the extension (field DP). Only privileged code may read it, which is what runs where
/// there is no operating system.
#[cfg(all(target_os = "none", not(any(test, feature = "std"))))]
fn identified() -> bool {
    let features: u64;
    // SAFETY: reads a register of EL1 and above, and changes nothing.
    unsafe { asm!("mrs {}, id_aa64isar0_el1", out(reg) features, options(pure, nomem, nostack, preserves_flags)) };
    features >> 44 & 0xf != 0
}

impl Dot for Dotprod {
    type Sum = int32x4_t;
    /// Sums of 32 bits hold any group.
    const SAFE_STEPS: usize = 128;
    const WIDE: bool = true;
    #[inline(always)]
    fn zero(self) -> int32x4_t {
        neon::zero()
    }
    #[inline(always)]
    fn dot<const LANE: i32>(self, mut sum: int32x4_t, w: int8x16_t, q: int8x16_t) -> int32x4_t {
        // SAFETY: `self` proves the extension; the instruction touches its operands only.
        unsafe {
            asm!(
                ".arch_extension dotprod",
                "sdot {sum:v}.4s, {w:v}.16b, {q:v}.4b[{lane}]",
                sum = inout(vreg) sum,
                w = in(vreg) w,
                q = in(vreg) q,
                lane = const LANE,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        sum
    }
    #[inline(always)]
    fn dot8<const LANE: i32>(self, sum: int32x4_t, w: int8x16_t, q: int8x16_t) -> int32x4_t {
        self.dot::<LANE>(sum, w, q)
    }
    #[inline(always)]
    fn rows(self, sum: int32x4_t) -> int32x4_t {
        sum
    }
}

impl Kernels for Dotprod {
    fn name(&self) -> &'static str {
        "dotprod"
    }
    fn quantise(&self, spec: ActSpec, x: &[f32], out: TokenMut<'_>) {
        neon::quantise(spec, x, out);
    }
    fn quant_tile(&self, block: &QuantBlock<'_>, acts: &Acts<'_>, first: usize, out: &mut [[f32; ROW_BLOCK]]) {
        neon::quant_tile(*self, block, acts, first, out);
    }
    fn dot_rows(&self, format: Float, rows: &[u8], x: &[f32], out: &mut [f32]) {
        neon::dot_rows(format, rows, x, out);
    }
    fn widen(&self, format: Float, stored: &[u8], out: &mut [f32]) {
        attention::widen(format, stored, out);
    }
    fn scores(&self, keys: &[f32], q: &[f32], scale: f32, scores: &mut [f32], stride: usize) {
        attention::scores(keys, q, scale, scores, stride);
    }
    fn mix(&self, values: &[f32], dim: usize, weights: &[f32], stride: usize, out: &mut [f32]) {
        attention::mix(values, dim, weights, stride, out);
    }
}
