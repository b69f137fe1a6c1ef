//! Forebay's engine: a sans-IO step machine over one arena.
#![cfg_attr(not(feature = "std"), no_std)]
#![forbid(unsafe_code)]
pub mod model;
