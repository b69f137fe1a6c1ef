//! Back-ends for AArch64.

mod attention;
pub(super) mod dotprod;
pub(super) mod neon;
