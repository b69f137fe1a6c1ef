//! The bytes of a TOKENIZER section: header offsets, flag bits and the order of the tables.
//!
//! The builder on the host and [`Tokenizer::parse`](super::Tokenizer::parse) share these constants.
//! All integers are little-endian and nothing in the section is aligned. After the header the tables
//! follow one another without gaps, in the order of [`Header::tables`].

/// First four bytes of the section.
pub const MAGIC: [u8; 4] = *b"FTOK";
/// Version of the layout described here.
pub const VERSION: u16 = 1;
/// Bytes of the fixed header.
pub const HEADER_LEN: usize = 64;
/// "No such token" in a 32-bit field (`bos`, `unk`, `byte_ids`).
pub const NO_ID: u32 = u32::MAX;
/// Bytes of one entry of the added-token table before its packed id: content end (4) and flags (1).
pub const ADDED_FIXED: usize = 5;
/// Greatest number of tokens and of merges: both are stored in at most three bytes.
pub const MAX_COUNT: u32 = 1 << 24;

/// Byte-level or SentencePiece-style symbols; see [`Kind`](super::Kind).
pub const AT_KIND: usize = 6;
/// Pre-tokeniser; see [`Pretokenizer`](super::Pretokenizer).
pub const AT_PRETOKENIZER: usize = 7;
/// Rule for the space put before a text; see [`SpacePrefix`](super::SpacePrefix).
pub const AT_SPACE_PREFIX: usize = 8;
/// Bytes of a packed token id, 2 or 3.
pub const AT_ID_WIDTH: usize = 9;
/// Bytes of a packed merge rank or merge index, 2 or 3.
pub const AT_MERGE_WIDTH: usize = 10;
/// Bytes of a packed offset into the token bytes, 2, 3 or 4.
pub const AT_OFFSET_WIDTH: usize = 11;
/// Flag bits, `FLAG_*`.
pub const AT_FLAGS: usize = 12;
/// Length of the whole section in bytes.
pub const AT_TOTAL_LEN: usize = 16;
/// Number of token ids.
pub const AT_VOCAB_LEN: usize = 20;
/// Number of merges.
pub const AT_MERGE_COUNT: usize = 24;
/// Number of entries of the index of the model's vocabulary.
pub const AT_INDEX_COUNT: usize = 28;
/// Number of added tokens.
pub const AT_ADDED_COUNT: usize = 32;
/// How many of the added tokens are matched in the first pass (before normalisation).
pub const AT_ADDED_RAW_COUNT: usize = 36;
/// Number of tokens that end a text.
pub const AT_EOS_COUNT: usize = 40;
/// Bytes of the token byte pool.
pub const AT_TOKEN_BYTES_LEN: usize = 44;
/// Bytes of the added-token content pool.
pub const AT_ADDED_BYTES_LEN: usize = 48;
/// Begin-of-text token or [`NO_ID`].
pub const AT_BOS: usize = 52;
/// Token for symbols outside the vocabulary or [`NO_ID`].
pub const AT_UNK: usize = 56;
/// Four bytes that are zero.
pub const AT_RESERVED: usize = 60;

/// The model expects `bos` before a text.
pub const FLAG_ADD_BOS: u32 = 1 << 0;
/// A piece that is a token as a whole is taken without merging (Llama-3).
pub const FLAG_IGNORE_MERGES: u32 = 1 << 1;
/// Characters outside the vocabulary become byte tokens.
pub const FLAG_BYTE_FALLBACK: u32 = 1 << 2;
/// Consecutive unknown characters give one `unk`.
pub const FLAG_FUSE_UNK: u32 = 1 << 3;
/// Each space starts a piece of its own (Metaspace with `split`).
pub const FLAG_SPLIT_ON_SPACE: u32 = 1 << 4;
/// No merge joins a non-space with a following space: texts may be cut there without changing ids.
pub const FLAG_CUT_BEFORE_SPACE: u32 = 1 << 5;
/// Added tokens of the second pass match normalised text, in which U+2581 and the space are one.
pub const FLAG_SPACES_NORMALIZED: u32 = 1 << 6;
/// The decoder drops one space at the start of a text.
pub const FLAG_STRIP_FIRST_SPACE: u32 = 1 << 7;
/// The model's own tokenizer applies Unicode NFC first; callers should give NFC text.
pub const FLAG_EXPECTS_NFC: u32 = 1 << 8;
/// All flag bits that have a meaning.
pub const FLAGS_KNOWN: u32 = (1 << 9) - 1;

/// Added token: skipped by decoders on request, matched only when the caller trusts the text.
pub const ADDED_SPECIAL: u8 = 1 << 0;
/// Added token that takes the white space before it along.
pub const ADDED_LSTRIP: u8 = 1 << 1;
/// Added token that takes the white space after it along.
pub const ADDED_RSTRIP: u8 = 1 << 2;
/// All bits of an added token's flags that have a meaning.
pub const ADDED_KNOWN: u8 = (1 << 3) - 1;

/// The counts and widths that decide where each table lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Bytes of a packed token id.
    pub id_width: u8,
    /// Bytes of a packed rank or merge index.
    pub merge_width: u8,
    /// Bytes of a packed offset into the token bytes.
    pub offset_width: u8,
    /// Number of token ids.
    pub vocab_len: u32,
    /// Number of merges.
    pub merge_count: u32,
    /// Number of entries of the vocabulary index.
    pub index_count: u32,
    /// Number of added tokens.
    pub added_count: u32,
    /// Number of tokens that end a text.
    pub eos_count: u32,
    /// Bytes of the token byte pool.
    pub token_bytes_len: u32,
    /// Bytes of the added-token content pool.
    pub added_bytes_len: u32,
}

/// The tables of a section, in file order; the discriminant is the position in [`Header::tables`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// `256 x u32`: the token of each single byte, or [`NO_ID`].
    ByteIds,
    /// `vocab_len x offset_width`: where each token's bytes end in the pool.
    TokenEnds,
    /// The token byte pool.
    TokenBytes,
    /// `ceil(vocab_len / 8)`: one bit per token id, set for special tokens.
    SpecialBits,
    /// `(vocab_len + 1) x merge_width`: where the merges of each left token start.
    MergeStarts,
    /// `merge_count x id_width`: right token of each merge, ascending within a left token.
    MergeRights,
    /// `merge_count x merge_width`: rank of each merge, lower first.
    MergeRanks,
    /// `merge_count x id_width`: token that each merge gives.
    MergeResults,
    /// `index_count x id_width`: the model's tokens in ascending order of their bytes.
    Index,
    /// `added_count x (u32 content end, u8 flags, id_width id)`.
    Added,
    /// The added-token content pool.
    AddedBytes,
    /// `eos_count x id_width`: tokens that end a text.
    Eos,
}

/// Number of tables.
pub const TABLES: usize = 12;

impl Header {
    /// Byte length of each table, in file order.
    pub fn tables(&self) -> [u64; TABLES] {
        let (id, merge) = (u64::from(self.id_width), u64::from(self.merge_width));
        let (vocab, merges) = (u64::from(self.vocab_len), u64::from(self.merge_count));
        [
            256 * 4,
            vocab * u64::from(self.offset_width),
            u64::from(self.token_bytes_len),
            vocab.div_ceil(8),
            (vocab + 1) * merge,
            merges * id,
            merges * merge,
            merges * id,
            u64::from(self.index_count) * id,
            u64::from(self.added_count) * (ADDED_FIXED as u64 + id),
            u64::from(self.added_bytes_len),
            u64::from(self.eos_count) * id,
        ]
    }

    /// Length of the section in bytes: the header and all tables.
    pub fn total_len(&self) -> u64 {
        HEADER_LEN as u64 + self.tables().iter().sum::<u64>()
    }
}
