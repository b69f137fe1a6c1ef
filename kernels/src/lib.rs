//! Numeric kernels of Forebay: low-bit matrix products and the small operators of a decoder layer.
//!
//! Every operator has one arithmetic definition, the scalar code in `reference`, and every back-end in
//! `arch` returns the same bits (see `docs/arithmetic.md`). Nothing here allocates, blocks or knows a file.
#![cfg_attr(not(any(test, feature = "std")), no_std)]
#![deny(unsafe_code)]

pub mod activations;
mod arch;
pub mod attention;
pub mod exec;
pub mod matmul;
pub mod ops;
pub mod pack;
mod reference;
#[cfg(test)]
mod tests;
pub mod weights;

/// Pages of memory on hosts.
#[cfg(feature = "std")]
pub mod pages {
    pub use crate::arch::pages::prefer_huge;
}

/// A thread pool for hosts.
#[cfg(any(test, feature = "std"))]
pub mod pool {
    pub use crate::arch::pool::ThreadPool;
}
