//! Back-ends for 64-bit RISC-V.

mod operators;
pub(super) mod rvv;
