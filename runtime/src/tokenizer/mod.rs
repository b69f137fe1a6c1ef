//! The tokenizer: byte-pair encoding over flat tables that lie in the image's TOKENIZER section.
//!
//! Two kinds of model are covered. *Byte-level* BPE (GPT-2, SmolLM2, Llama-3, LFM2, Qwen2) cuts a text
//! by a [`Pretokenizer`] and merges the bytes of each piece. *SentencePiece-style* BPE (Llama-2,
//! TinyLlama, Mixtral) puts a space before the text and merges characters; characters outside the
//! vocabulary become byte tokens. In both, added tokens (`<|im_start|>` and the like) are cut out
//! first.
//!
//! Nothing is copied out of the section and nothing is allocated: [`Tokenizer`] is a handful of
//! slices. [`Tokenizer::parse`] checks every id, offset and order that later calls rely on.
//!
//! No Unicode normalisation is done. Models whose own tokenizer applies NFC (Qwen2) say so by
//! [`Tokenizer::expects_nfc`]: for text that is already NFC, as nearly all is, ids are the same.

mod bpe;
mod decode;
mod encode;
pub mod layout;
mod parse;
mod pretokenize;
pub mod unicode;
mod unicode_table;

pub use decode::Decoder;
pub use pretokenize::Pretokenizer;

use core::cmp::Ordering;

/// What the symbols are that merging starts from. The values are those of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// Bytes.
    ByteLevel,
    /// Characters, with the space for U+2581.
    SentencePiece,
}

impl Kind {
    /// The image's code for this kind.
    pub const fn code(self) -> u8 {
        match self {
            Self::ByteLevel => 0,
            Self::SentencePiece => 1,
        }
    }

    /// The kind with an image's code.
    pub const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            0 => Self::ByteLevel,
            1 => Self::SentencePiece,
            _ => return None,
        })
    }
}

/// When a SentencePiece-style model puts a space before a stretch of text between added tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SpacePrefix {
    /// Never.
    Never,
    /// Before every stretch (`Prepend` normaliser; llama.cpp's `add_space_prefix`).
    Always,
    /// Before every stretch that does not start with a space (Metaspace, `always`).
    UnlessSpace,
    /// Before a stretch at the start of the text that does not start with a space (Metaspace, `first`).
    FirstUnlessSpace,
}

impl SpacePrefix {
    /// The image's code for this rule.
    pub const fn code(self) -> u8 {
        match self {
            Self::Never => 0,
            Self::Always => 1,
            Self::UnlessSpace => 2,
            Self::FirstUnlessSpace => 3,
        }
    }

    /// The rule with an image's code.
    pub const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            0 => Self::Never,
            1 => Self::Always,
            2 => Self::UnlessSpace,
            3 => Self::FirstUnlessSpace,
            _ => return None,
        })
    }
}

/// Why a section is refused or a text was not encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// The section is shorter than its header or than the header says.
    #[error("tokenizer section: {len} bytes, {needed} needed")]
    Truncated {
        /// Bytes needed.
        needed: u64,
        /// Bytes given.
        len: usize,
    },
    /// The section does not start with the magic number.
    #[error("tokenizer section: wrong magic number")]
    Magic,
    /// The section has a layout that this version does not read.
    #[error("tokenizer section: version {0} is not supported")]
    Version(u16),
    /// A table or header field breaks a rule of the format.
    #[error("tokenizer section: {table}, entry {entry}: {rule}")]
    Malformed {
        /// Table or header field.
        table: &'static str,
        /// Index within the table; 0 for a header field.
        entry: usize,
        /// The rule that does not hold.
        rule: &'static str,
    },
    /// The output is too small for the ids of the text.
    #[error("tokenizer: the text has {needed} ids, room for {given}")]
    OutputTooSmall {
        /// Ids of the whole text.
        needed: usize,
        /// Room given, in ids.
        given: usize,
    },
    /// The scratch memory is too small for the longest piece of the text.
    #[error("tokenizer: {needed} words of scratch needed, {given} given")]
    ScratchTooSmall {
        /// Words (`u32`) that suffice for this text.
        needed: usize,
        /// Words given.
        given: usize,
    },
}

/// What [`Tokenizer::encode`] does beyond the text itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Put the begin-of-text token first, if the model has one.
    pub add_bos: bool,
    /// Recognise special tokens in the text. Leave unset for text from an untrusted source, which
    /// could otherwise forge the borders of a chat turn. Added tokens that are not special are
    /// recognised always.
    pub parse_special: bool,
}

/// An array of little-endian integers of 2, 3 or 4 bytes.
#[derive(Clone, Copy, Debug)]
struct Packed<'a> {
    bytes: &'a [u8],
    width: usize,
}

impl Packed<'_> {
    /// Element `i`, which the caller knows to exist.
    fn get(&self, i: usize) -> u32 {
        let at = i * self.width;
        match self.bytes[at..at + self.width] {
            [a, b] => u32::from_le_bytes([a, b, 0, 0]),
            [a, b, c] => u32::from_le_bytes([a, b, c, 0]),
            [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
            // `parse` lets no other width through.
            _ => 0,
        }
    }
}

/// A model's tokenizer, borrowing the tables of a TOKENIZER section.
#[derive(Clone, Copy, Debug)]
pub struct Tokenizer<'a> {
    kind: Kind,
    pretokenizer: Pretokenizer,
    space_prefix: SpacePrefix,
    flags: u32,
    vocab_len: u32,
    bos: Option<u32>,
    unk: Option<u32>,
    index_count: usize,
    added_count: usize,
    added_raw_count: usize,
    eos_count: usize,
    byte_ids: &'a [u8],
    token_ends: Packed<'a>,
    token_pool: &'a [u8],
    special_bits: &'a [u8],
    merge_starts: Packed<'a>,
    merge_rights: Packed<'a>,
    merge_ranks: Packed<'a>,
    merge_results: Packed<'a>,
    index: Packed<'a>,
    added: &'a [u8],
    added_pool: &'a [u8],
    eos: Packed<'a>,
    /// First bytes of the added tokens of each pass, one bit for each byte value.
    added_first: [[u64; 4]; 2],
}

/// One added token, as stored.
#[derive(Clone, Copy, Debug)]
struct Added<'a> {
    id: u32,
    flags: u8,
    /// What is matched: never empty, valid UTF-8.
    content: &'a [u8],
}

impl<'a> Tokenizer<'a> {
    /// Number of token ids; ids are below it. Some ids may be unused.
    pub fn vocab_len(&self) -> usize {
        self.vocab_len as usize
    }

    /// What merging starts from.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// How texts are cut before merging.
    pub fn pretokenizer(&self) -> Pretokenizer {
        self.pretokenizer
    }

    /// The begin-of-text token.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Whether the model expects [`bos`](Self::bos) before a text.
    pub fn add_bos(&self) -> bool {
        self.flag(layout::FLAG_ADD_BOS)
    }

    /// Whether the model's own tokenizer normalises to NFC first; this one does not.
    pub fn expects_nfc(&self) -> bool {
        self.flag(layout::FLAG_EXPECTS_NFC)
    }

    /// Whether `id` ends a text or a turn.
    pub fn is_eos(&self, id: u32) -> bool {
        (0..self.eos_count).any(|i| self.eos.get(i) == id)
    }

    /// The tokens that end a text or a turn; the model's own end-of-text token first.
    pub fn eos_ids(&self) -> impl Iterator<Item = u32> + 'a {
        let eos = self.eos;
        (0..self.eos_count).map(move |i| eos.get(i))
    }

    /// Whether `id` is a special token: a control symbol, not text.
    pub fn is_special(&self, id: u32) -> bool {
        id < self.vocab_len && self.special_bits[id as usize / 8] >> (id % 8) & 1 == 1
    }

    /// The bytes that `id` stands for, not always UTF-8 on their own; `None` outside the vocabulary.
    ///
    /// SentencePiece's U+2581 is a space here and a byte token is its one byte. An unused id has no
    /// bytes.
    pub fn token_bytes(&self, id: u32) -> Option<&'a [u8]> {
        if id >= self.vocab_len {
            return None;
        }
        let start = match id {
            0 => 0,
            _ => self.token_ends.get(id as usize - 1),
        };
        self.token_pool.get(start as usize..self.token_ends.get(id as usize) as usize)
    }

    /// The token with exactly these bytes: a token of the model, else an added token, else a byte
    /// token.
    pub fn token_id(&self, bytes: &[u8]) -> Option<u32> {
        self.model_token(bytes)
            .or_else(|| {
                (0..self.added_count)
                    .map(|i| self.added(i))
                    .find(|added| added.content == bytes || self.token_bytes(added.id) == Some(bytes))
                    .map(|added| added.id)
            })
            .or_else(|| match bytes {
                &[byte] => self.byte_id(byte),
                _ => None,
            })
    }

    /// A decoder at the start of a text.
    pub fn decoder(&self) -> Decoder<'a> {
        Decoder::new(*self)
    }

    fn flag(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    fn strips_first_space(&self) -> bool {
        self.flag(layout::FLAG_STRIP_FIRST_SPACE)
    }

    /// Rank and result of merging two tokens that are in the vocabulary.
    fn merge(&self, left: u32, right: u32) -> Option<(u32, u32)> {
        let mut low = self.merge_starts.get(left as usize) as usize;
        let mut high = self.merge_starts.get(left as usize + 1) as usize;
        while low < high {
            let middle = low + (high - low) / 2;
            match self.merge_rights.get(middle).cmp(&right) {
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
                Ordering::Equal => {
                    return Some((self.merge_ranks.get(middle), self.merge_results.get(middle)));
                }
            }
        }
        None
    }

    /// The token of the model's vocabulary with these bytes.
    fn model_token(&self, bytes: &[u8]) -> Option<u32> {
        let (mut low, mut high) = (0, self.index_count);
        while low < high {
            let middle = low + (high - low) / 2;
            let id = self.index.get(middle);
            match self.token_bytes(id)?.cmp(bytes) {
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
                Ordering::Equal => return Some(id),
            }
        }
        None
    }

    fn byte_id(&self, byte: u8) -> Option<u32> {
        let at = usize::from(byte) * 4;
        let mut id = [0; 4];
        id.copy_from_slice(&self.byte_ids[at..at + 4]);
        Some(u32::from_le_bytes(id)).filter(|&id| id != layout::NO_ID)
    }

    /// Where the content of added token `i` ends in the pool.
    fn added_end(&self, i: usize) -> usize {
        let at = i * (layout::ADDED_FIXED + self.index.width);
        let mut end = [0; 4];
        end.copy_from_slice(&self.added[at..at + 4]);
        u32::from_le_bytes(end) as usize
    }

    fn added(&self, i: usize) -> Added<'a> {
        let entry = layout::ADDED_FIXED + self.index.width;
        let fields = &self.added[i * entry..(i + 1) * entry];
        let start = if i == 0 { 0 } else { self.added_end(i - 1) };
        Added {
            id: Packed { bytes: &fields[layout::ADDED_FIXED..], width: self.index.width }.get(0),
            flags: fields[4],
            content: &self.added_pool[start..self.added_end(i)],
        }
    }
}
