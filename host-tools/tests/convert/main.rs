//! Conversion: what goes in comes out, and what is broken is refused.

mod broken;
#[path = "../../../tests/fuzz/src/gguf.rs"]
mod fuzz;
mod gguf;
mod support;
mod values;
