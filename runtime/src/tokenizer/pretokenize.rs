//! Pre-tokenisers: hand-written matchers for the regular expressions of the supported models.
//!
//! Each matcher is equivalent to its expression as Oniguruma (the engine behind Hugging Face's
//! `tokenizers`) runs it: alternatives are tried in order, quantifiers are greedy. Every alternative
//! needs a bounded look ahead over what it does not consume, so a text is scanned in linear time.

use super::unicode::{Class, class};

/// How a text is cut into pieces before merging. The values are those of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Pretokenizer {
    /// The text is one piece (SentencePiece-style models).
    None,
    /// GPT-2:
    /// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`.
    Gpt2,
    /// SmolLM: each `\p{N}` is a piece and an end of text for what is before it, then GPT-2.
    SmolLm,
    /// Llama-3 and LFM2:
    /// `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|`
    /// ` ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`.
    Llama3,
    /// Qwen2: Llama-3's expression with `\p{N}` for `\p{N}{1,3}`.
    Qwen2,
}

impl Pretokenizer {
    /// The image's code for this pre-tokeniser.
    pub const fn code(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Gpt2 => 1,
            Self::SmolLm => 2,
            Self::Llama3 => 3,
            Self::Qwen2 => 4,
        }
    }

    /// The pre-tokeniser with an image's code.
    pub const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            0 => Self::None,
            1 => Self::Gpt2,
            2 => Self::SmolLm,
            3 => Self::Llama3,
            4 => Self::Qwen2,
            _ => return None,
        })
    }

    /// Length in bytes of the first piece of `text`: at least one character unless `text` is empty.
    pub fn piece_len(self, text: &str) -> usize {
        let Some(first) = text.chars().next() else {
            return 0;
        };
        match self {
            Self::None => text.len(),
            Self::Gpt2 => gpt2(text, first, false),
            Self::SmolLm => gpt2(text, first, true),
            Self::Llama3 => llama3(text, first, 3),
            Self::Qwen2 => llama3(text, first, 1),
        }
    }
}

/// GPT-2's expression; with `digits_apart` every number is a piece and looks like the end of the text.
fn gpt2(text: &str, first: char, digits_apart: bool) -> usize {
    if digits_apart && class(first) == Class::Number {
        return first.len_utf8();
    }
    if let Some(len) = contraction(text, false) {
        return len;
    }
    let lead = usize::from(first == ' ');
    let body = &text[lead..];
    match body.chars().next().map(class) {
        None | Some(Class::Space) => {}
        Some(Class::Number) if digits_apart => {}
        Some(kind) => return lead + run(body, kind),
    }
    white_space(text, digits_apart)
}

/// Llama-3's expression with at most `digits` numbers in a piece.
fn llama3(text: &str, first: char, digits: usize) -> usize {
    if let Some(len) = contraction(text, true) {
        return len;
    }
    let kind = class(first);
    // `[^\r\n\p{L}\p{N}]?\p{L}+`
    if kind == Class::Letter {
        return run(text, Class::Letter);
    }
    if kind == Class::Number {
        return text
            .char_indices()
            .take(digits)
            .take_while(|&(_, c)| class(c) == Class::Number)
            .last()
            .map_or(first.len_utf8(), |(at, c)| at + c.len_utf8());
    }
    if !matches!(first, '\r' | '\n') {
        let lead = first.len_utf8();
        let letters = run(&text[lead..], Class::Letter);
        if letters > 0 {
            return lead + letters;
        }
    }
    // ` ?[^\s\p{L}\p{N}]+[\r\n]*`
    let lead = usize::from(first == ' ');
    let others = run(&text[lead..], Class::Other);
    if others > 0 {
        let end = lead + others;
        return end + newlines(&text[end..]);
    }
    // `\s*[\r\n]+`: the longest run of white space, given back as far as its last line break.
    let spaces = run(text, Class::Space);
    if let Some(last) = text[..spaces].rfind(['\r', '\n']) {
        return last + 1;
    }
    white_space(text, false)
}

/// `\s+(?!\S)|\s+` at a white space; `digits_apart` as in [`gpt2`].
fn white_space(text: &str, digits_apart: bool) -> usize {
    let len = run(text, Class::Space);
    let at_end = match text[len..].chars().next() {
        None => true,
        Some(next) => digits_apart && class(next) == Class::Number,
    };
    if at_end {
        return len;
    }
    // The look-ahead fails at a non-space, so the last space is left for the next piece, if it is
    // not the only one.
    match text[..len].char_indices().next_back() {
        Some((last, _)) if last > 0 => last,
        _ => len,
    }
}

/// Bytes of the characters of class `kind` that `text` starts with.
fn run(text: &str, kind: Class) -> usize {
    text.char_indices().find(|&(_, c)| class(c) != kind).map_or(text.len(), |(at, _)| at)
}

/// Bytes of the line breaks that `text` starts with.
fn newlines(text: &str) -> usize {
    text.bytes().take_while(|b| matches!(b, b'\r' | b'\n')).count()
}

/// `'s|'t|'re|'ve|'m|'ll|'d`, with any case when `fold` is set.
///
/// Folding is Unicode's simple one: U+017F (long s) is an `s`; no other non-ASCII character folds to
/// one of these letters.
fn contraction(text: &str, fold: bool) -> Option<usize> {
    let mut chars = text.chars();
    if chars.next() != Some('\'') {
        return None;
    }
    let letter = |c: Option<char>| match c {
        Some(c) if fold && c == '\u{17f}' => 's',
        Some(c) if fold => c.to_ascii_lowercase(),
        Some(c) => c,
        None => '\0',
    };
    let first = chars.next();
    match letter(first) {
        's' | 't' | 'm' | 'd' => Some(1 + first.map_or(0, char::len_utf8)),
        'r' | 'v' if letter(chars.next()) == 'e' => Some(3),
        'l' if letter(chars.next()) == 'l' => Some(3),
        _ => None,
    }
}
