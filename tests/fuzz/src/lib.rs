//! Bodies of the fuzz targets: each a function of bytes that panics if something that must hold does not.

pub mod decode;
pub mod gguf;
pub mod image;
