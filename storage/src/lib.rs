//! Forebay's storage: the image container and the block stores it is read through.
//!
//! The container ([`image`]) knows sections and extents, never tensors. A [`store::BlockStore`] reads extents
//! into buffers that it owns while a read is in flight, so a thread, a DMA engine or a virtio queue can fill
//! them while the caller computes.
//!
//! | store | over |
//! |---|---|
//! | [`MemoryStore`] | bytes in memory |
//! | [`IoStore`] | `embedded_io::Read + Seek` |
//! | [`NorStore`] | `embedded_storage::ReadStorage`, up to 4 GiB |
//! | `FileStore` (`std`) | a file, past the page cache where that can be had |
//!
//! [`layers`] go over any of them.
#![cfg_attr(not(feature = "std"), no_std)]
#![forbid(unsafe_code)]

#[cfg(feature = "std")]
mod file;
pub mod image;
mod io;
pub mod layers;
mod memory;
mod nor;
mod pending;
pub mod store;

#[cfg(feature = "std")]
pub use file::FileStore;
pub use io::IoStore;
pub use memory::{MappedStore, MemoryStore};
pub use nor::{NorError, NorStore};
pub use pending::MAX_DEPTH;
