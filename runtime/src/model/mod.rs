//! A model as data: records, their validation, and where each tensor lies.

mod parse;
pub mod record;
pub mod unit;

pub use parse::{LayerShape, MAX_LAYERS, MAX_TOP_K, MAX_UNITS, Model, ModelError, Place, TensorRef};
