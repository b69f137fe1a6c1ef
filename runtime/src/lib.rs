//! Forebay's engine: a sans-IO step machine over one arena.
//!
//! An image is opened through a block store ([`open`]), a plan splits the arena ([`plan`]), and the engine
//! ([`engine`]) turns tokens into logits, saying what it wants read on the way.
#![cfg_attr(not(feature = "std"), no_std)]
#![forbid(unsafe_code)]

#[cfg(target_endian = "big")]
compile_error!("images are little-endian and read in place");

pub mod arena;
pub mod cache;
pub mod chat;
pub mod drive;
pub mod engine;
pub mod governor;
pub mod model;
pub mod open;
pub mod plan;
pub mod policy;
pub mod pool;
pub mod sample;
pub mod tokenizer;
