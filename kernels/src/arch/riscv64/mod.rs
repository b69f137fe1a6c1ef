//! Back-ends for 64-bit RISC-V.

mod operators;
pub(crate) mod rvv;
