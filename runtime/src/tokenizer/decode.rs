//! From ids back to text, one id at a time.

use super::Tokenizer;

/// Incremental decoder: takes ids one by one and gives out text as soon as characters are complete.
///
/// What [`push`](Self::push) and [`finish`](Self::finish) give out, joined, is the lossy UTF-8
/// decoding of the joined token bytes: each maximal invalid sequence becomes one U+FFFD (Unicode
/// 3.9, "substitution of maximal subparts", as `String::from_utf8_lossy` does). For byte-level
/// models that is what Hugging Face's decoder gives for the whole sequence. SentencePiece-style
/// models differ only for byte tokens that are no valid UTF-8: Hugging Face then writes one U+FFFD
/// for every byte token of the run.
#[derive(Clone, Debug)]
pub struct Decoder<'a> {
    tokenizer: Tokenizer<'a>,
    skip_special: bool,
    /// Start of a character whose other bytes have not come yet.
    pending: [u8; 4],
    pending_len: usize,
    /// The next character is the first of the text and dropped if it is a space.
    strip_space: bool,
}

impl<'a> Decoder<'a> {
    pub(super) fn new(tokenizer: Tokenizer<'a>) -> Self {
        let strip_space = tokenizer.strips_first_space();
        Self { tokenizer, skip_special: false, pending: [0; 4], pending_len: 0, strip_space }
    }

    /// Whether special tokens are left out of the text. They are kept unless this is called.
    #[must_use]
    pub fn skip_special(mut self, skip: bool) -> Self {
        self.skip_special = skip;
        self
    }

    /// Takes one id and hands the text that is complete now to `emit`, in any number of parts.
    /// An id outside the vocabulary gives nothing.
    pub fn push(&mut self, id: u32, emit: &mut impl FnMut(&str)) {
        if self.skip_special && self.tokenizer.is_special(id) {
            return;
        }
        let Some(mut bytes) = self.tokenizer.token_bytes(id) else {
            return;
        };
        while self.pending_len > 0 {
            let Some((&first, rest)) = bytes.split_first() else {
                return;
            };
            let mut joined = self.pending;
            // At most three bytes can be an incomplete character.
            let len = (self.pending_len + 1).min(joined.len());
            joined[len - 1] = first;
            match core::str::from_utf8(&joined[..len]) {
                Ok(text) => {
                    self.pending_len = 0;
                    bytes = rest;
                    self.give(text, emit);
                }
                Err(error) if error.error_len().is_none() => {
                    self.pending = joined;
                    self.pending_len = len;
                    bytes = rest;
                }
                // The byte does not continue the character: it is looked at again on its own.
                Err(_) => {
                    self.pending_len = 0;
                    self.give("\u{fffd}", emit);
                }
            }
        }
        let mut left = bytes.len();
        for chunk in bytes.utf8_chunks() {
            self.give(chunk.valid(), emit);
            let invalid = chunk.invalid();
            left -= chunk.valid().len() + invalid.len();
            let incomplete = left == 0 && core::str::from_utf8(invalid).is_err_and(|e| e.error_len().is_none());
            if incomplete {
                self.pending_len = invalid.len();
                self.pending[..invalid.len()].copy_from_slice(invalid);
            } else if !invalid.is_empty() {
                self.give("\u{fffd}", emit);
            }
        }
    }

    /// Ends the text: an incomplete character becomes U+FFFD. The decoder is as new afterwards.
    pub fn finish(&mut self, emit: &mut impl FnMut(&str)) {
        if self.pending_len > 0 {
            self.pending_len = 0;
            self.give("\u{fffd}", emit);
        }
        self.strip_space = self.tokenizer.strips_first_space();
    }

    fn give(&mut self, text: &str, emit: &mut impl FnMut(&str)) {
        if text.is_empty() {
            return;
        }
        let text = if self.strip_space { text.strip_prefix(' ').unwrap_or(text) } else { text };
        self.strip_space = false;
        if !text.is_empty() {
            emit(text);
        }
    }
}
