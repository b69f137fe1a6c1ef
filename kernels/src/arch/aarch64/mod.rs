//! Back-ends for AArch64.

pub(super) mod dotprod;
pub(super) mod neon;
