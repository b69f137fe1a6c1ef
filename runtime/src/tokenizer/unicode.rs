//! The three Unicode classes that pre-tokenisers tell apart.
//!
//! The table is what Oniguruma in the `tokenizers` crate matches by `\p{L}`, `\p{N}` and `\s`; a test
//! of the host tools (`tokenizer_unicode`) asks it for every code point, compares, and rewrites the
//! table when told to.

use super::unicode_table::{RUNS, UNICODE_VERSION};

/// Unicode version of the table.
pub const VERSION: &str = UNICODE_VERSION;

/// Class of a character in the pre-tokenisers' expressions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// `[^\s\p{L}\p{N}]`.
    Other,
    /// `\p{L}`: general category Letter.
    Letter,
    /// `\p{N}`: general category Number.
    Number,
    /// `\s`: property White_Space.
    Space,
}

/// Class of a character.
pub fn class(c: char) -> Class {
    let code = c as u32;
    if code < 0x80 {
        return match code as u8 {
            b'a'..=b'z' | b'A'..=b'Z' => Class::Letter,
            b'0'..=b'9' => Class::Number,
            b'\t'..=b'\r' | b' ' => Class::Space,
            _ => Class::Other,
        };
    }
    // Each run is its first code point times four plus its class and ends where the next starts.
    let after = RUNS.partition_point(|&run| run >> 2 <= code);
    match after.checked_sub(1).map(|i| RUNS[i] & 3) {
        Some(1) => Class::Letter,
        Some(2) => Class::Number,
        Some(3) => Class::Space,
        _ => Class::Other,
    }
}
