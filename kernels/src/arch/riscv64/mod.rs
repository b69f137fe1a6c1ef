//! Back-ends for 64-bit RISC-V.

pub(super) mod rvv;
