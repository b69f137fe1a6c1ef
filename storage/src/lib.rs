//! Forebay's storage: the image container and the block stores it is read through.
//!
//! The container ([`image`]) knows sections and extents, never tensors. A [`store::BlockStore`] reads extents
//! into buffers that it owns while a read is in flight, so a thread, a DMA engine or a virtio queue can fill
//! them while the caller computes.
#![cfg_attr(not(feature = "std"), no_std)]
#![forbid(unsafe_code)]

pub mod image;
mod memory;
pub mod store;

pub use memory::{MAX_DEPTH, MemoryStore};
