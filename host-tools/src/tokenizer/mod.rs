//! Building the TOKENIZER section of an image from a Hugging Face directory or from GGUF metadata.
//!
//! Both are read into one [`TokenizerSource`], which says in plain terms what the device needs;
//! [`build`] lays it out as the tables that [`forebay_runtime::tokenizer::Tokenizer`] reads.

mod build;
mod gguf;
mod hf;

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail, ensure};
pub use build::build;
use forebay_runtime::tokenizer::{Kind, Pretokenizer, SpacePrefix};
pub use gguf::{GgufTokenizer, from_gguf_fields};

/// One merge of a byte-pair vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Merge {
    /// Left token.
    pub left: u32,
    /// Right token.
    pub right: u32,
    /// The token that both become.
    pub result: u32,
    /// Order of merging, lower first; merges of equal rank go left to right.
    pub rank: u32,
}

/// A token that is cut out of the text before merging.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AddedToken {
    /// Token id.
    pub id: u32,
    /// The text to match.
    pub content: String,
    /// A control symbol: recognised only in trusted text, skipped by decoders on request.
    pub special: bool,
    /// White space before the token belongs to it.
    pub lstrip: bool,
    /// White space after the token belongs to it.
    pub rstrip: bool,
    /// Matched in the second pass, in the text as the normaliser leaves it.
    pub normalized: bool,
}

/// A tokenizer in the terms of the device: what [`build`] lays out.
#[derive(Clone, Debug)]
pub struct TokenizerSource {
    /// What merging starts from.
    pub kind: Kind,
    /// How texts are cut before merging.
    pub pretokenizer: Pretokenizer,
    /// When a space is put before a stretch of text (SentencePiece-style models).
    pub space_prefix: SpacePrefix,
    /// Bytes of each token, by id: the byte-level alphabet undone, U+2581 as a space, a byte token as
    /// its byte. Unused ids are empty.
    pub tokens: Vec<Vec<u8>>,
    /// Ids that pieces of text may be looked up as: the model's own tokens without byte tokens.
    pub model_tokens: Vec<u32>,
    /// Merges, in any order; a pair occurs once.
    pub merges: Vec<Merge>,
    /// Tokens cut out before merging.
    pub added: Vec<AddedToken>,
    /// Token of each single byte: the byte alphabet or the byte-fallback tokens.
    pub byte_ids: [Option<u32>; 256],
    /// Stands for symbols outside the vocabulary.
    pub unk: Option<u32>,
    /// Begin-of-text token.
    pub bos: Option<u32>,
    /// Whether the model expects `bos` before a text.
    pub add_bos: bool,
    /// Tokens that end a text or a turn, the model's own end-of-text token first.
    pub eos: Vec<u32>,
    /// A piece that is a token as a whole is taken without merging.
    pub ignore_merges: bool,
    /// Characters outside the vocabulary become byte tokens.
    pub byte_fallback: bool,
    /// Consecutive unknown characters give one `unk`.
    pub fuse_unk: bool,
    /// Each space starts a piece of its own.
    pub split_on_space: bool,
    /// The normaliser replaces spaces by U+2581 before added tokens of the second pass are matched.
    pub spaces_normalized: bool,
    /// Decoders drop one space at the start of a text.
    pub strip_first_space: bool,
    /// The model's own tokenizer applies NFC first.
    pub expects_nfc: bool,
}

impl TokenizerSource {
    /// A source without tokens.
    pub fn new(kind: Kind, pretokenizer: Pretokenizer) -> Self {
        Self {
            kind,
            pretokenizer,
            space_prefix: SpacePrefix::Never,
            tokens: Vec::new(),
            model_tokens: Vec::new(),
            merges: Vec::new(),
            added: Vec::new(),
            byte_ids: [None; 256],
            unk: None,
            bos: None,
            add_bos: false,
            eos: Vec::new(),
            ignore_merges: false,
            byte_fallback: false,
            fuse_unk: false,
            split_on_space: false,
            spaces_normalized: false,
            strip_first_space: false,
            expects_nfc: false,
        }
    }

    /// Adds the special tokens that by their names end a turn to [`eos`](Self::eos), as llama.cpp does.
    fn add_known_ends(&mut self) {
        const ENDS: [&str; 13] = [
            "<|endoftext|>",
            "<|end_of_text|>",
            "<|im_end|>",
            "<|eot_id|>",
            "<|eom_id|>",
            "<|end|>",
            "<|return|>",
            "<|call|>",
            "<end_of_turn>",
            "<end_of_utterance>",
            "</s>",
            "<EOT>",
            "[EOS]",
        ];
        for added in &self.added {
            if added.special && ENDS.contains(&added.content.as_str()) {
                self.eos.push(added.id);
            }
        }
        let mut seen = BTreeSet::new();
        self.eos.retain(|&id| seen.insert(id));
    }
}

/// GPT-2's alphabet: the character that stands for each byte.
///
/// Printable Latin-1 stands for itself; the other bytes, ascending, are U+0100 and on (`bytes_to_unicode`
/// of OpenAI's `encoder.py`).
pub(crate) fn byte_alphabet() -> [char; 256] {
    let mut next = 0x100u32;
    std::array::from_fn(|byte| {
        let byte = byte as u8;
        if matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff) {
            char::from(byte)
        } else {
            let c = char::from_u32(next).unwrap_or_default();
            next += 1;
            c
        }
    })
}

/// Undoes [`byte_alphabet`]; `None` if a character is not of the alphabet.
fn bytes_of_alphabet(text: &str) -> Option<Vec<u8>> {
    static BYTES: std::sync::LazyLock<std::collections::HashMap<char, u8>> =
        std::sync::LazyLock::new(|| byte_alphabet().into_iter().zip(0..=u8::MAX).collect());
    text.chars().map(|c| BYTES.get(&c).copied()).collect()
}

/// The byte of a byte token's name, `<0x00>` to `<0xFF>`.
fn byte_token(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// Fills `tokens`, `model_tokens` and `byte_ids` from the texts of the model's vocabulary.
///
/// Texts that occur twice count by the first id. Unused ids are `None`.
fn set_model_tokens(source: &mut TokenizerSource, texts: &[Option<&str>]) -> Result<()> {
    source.tokens = vec![Vec::new(); texts.len()];
    let mut seen = BTreeSet::new();
    for (id, text) in (0u32..).zip(texts) {
        let Some(text) = text else { continue };
        let (bytes, findable) = match source.kind {
            Kind::ByteLevel => match bytes_of_alphabet(text) {
                Some(bytes) => {
                    if let &[byte] = bytes.as_slice() {
                        source.byte_ids[usize::from(byte)].get_or_insert(id);
                    }
                    (bytes, true)
                }
                None => (text.as_bytes().to_vec(), false),
            },
            Kind::SentencePiece => match byte_token(text) {
                Some(byte) => {
                    source.byte_ids[usize::from(byte)].get_or_insert(id);
                    (vec![byte], false)
                }
                // Normalised text has no spaces, so a token with one is never found.
                None => (text.replace('\u{2581}', " ").into_bytes(), !text.contains(' ')),
            },
            kind => bail!("tokens of kind {kind:?} are not supported"),
        };
        if findable && !bytes.is_empty() && seen.insert(bytes.clone()) {
            source.model_tokens.push(id);
        }
        source.tokens[id as usize] = bytes;
    }
    if source.kind == Kind::SentencePiece {
        ensure!(seen.contains(b" ".as_slice()), "the vocabulary has no token for U+2581, SentencePiece's space");
    }
    Ok(())
}

/// Adds a token that is cut out of the text, growing the vocabulary if its id lies beyond.
fn add_token(source: &mut TokenizerSource, token: AddedToken) -> Result<()> {
    ensure!(!token.content.is_empty(), "added token {} has no content", token.id);
    let at = usize::try_from(token.id).context("token id")?;
    ensure!(at < 1 << 24, "added token {:?} has id {at}, ids from 2^24 on are not supported", token.content);
    if at >= source.tokens.len() {
        source.tokens.resize(at + 1, Vec::new());
    }
    // A token that the model's vocabulary has too keeps the bytes it has there.
    if source.tokens[at].is_empty() {
        source.tokens[at] = match source.kind {
            Kind::ByteLevel => bytes_of_alphabet(&token.content).unwrap_or_else(|| token.content.clone().into_bytes()),
            _ => token.content.replace('\u{2581}', " ").into_bytes(),
        };
    }
    source.added.push(token);
    Ok(())
}
