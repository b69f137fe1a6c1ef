//! Conversion: what goes in comes out, and what is broken is refused.

mod broken;
mod gguf;
mod support;
mod values;
