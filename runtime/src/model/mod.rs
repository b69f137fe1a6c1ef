//! A model as data: records, their validation, and where each tensor lies.

mod parse;
pub mod record;
pub mod unit;


