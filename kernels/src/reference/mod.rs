//! The arithmetic definition of every operator, in safe scalar code (`docs/arithmetic.md` in prose).
//!
//! The functions are inlined everywhere, so that a back-end may also compile one of them once more for its own
//! instruction set: the compiler neither fuses nor reorders float operations, so the bits stay.

pub(crate) mod attention;
pub(crate) mod float;
pub(crate) mod kv8;
pub(crate) mod math;
pub(crate) mod quant;
