//! Numeric kernels of Forebay: low-bit matrix products and the small operators of a decoder layer.
//!
//! Every operator has one arithmetic definition, the scalar code in `reference`, and every back-end in
//! `arch` returns the same bits (see `docs/arithmetic.md`). Nothing here allocates, blocks or knows a file.
#![cfg_attr(not(feature = "std"), no_std)]
#![deny(unsafe_code)]

pub mod weights;
