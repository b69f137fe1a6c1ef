//! What the subcommands share: finding an image, running it, talking to it.

pub mod accounting;
pub mod generate;
pub mod models;
pub mod npy;
pub mod port;
pub mod rehearse;
pub mod score;
pub mod session;
pub mod size;
pub mod store;
