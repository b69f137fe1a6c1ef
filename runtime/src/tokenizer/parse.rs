//! Reading a TOKENIZER section: every rule that encoding and decoding rely on is checked here.

use super::layout::{self, Header, Table};
use super::{Added, Kind, Packed, Pretokenizer, SpacePrefix, Tokenizer, TokenizerError};

fn malformed(table: &'static str, entry: usize, rule: &'static str) -> TokenizerError {
    TokenizerError::Malformed { table, entry, rule }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(value)
}

impl<'a> Tokenizer<'a> {
    /// Reads a section and checks it whole, in time about linear in its length. Bytes after the
    /// length that the header gives are ignored.
    ///
    /// # Errors
    ///
    /// The section is truncated, of another format or version, or breaks a rule of the format; a
    /// section that is accepted makes no later call panic or run without end.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, TokenizerError> {
        if bytes.len() < layout::HEADER_LEN {
            return Err(TokenizerError::Truncated { needed: layout::HEADER_LEN as u64, len: bytes.len() });
        }
        if bytes[..4] != layout::MAGIC {
            return Err(TokenizerError::Magic);
        }
        let version = u16::from_le_bytes([bytes[4], bytes[5]]);
        if version != layout::VERSION {
            return Err(TokenizerError::Version(version));
        }
        let header = Header {
            id_width: bytes[layout::AT_ID_WIDTH],
            merge_width: bytes[layout::AT_MERGE_WIDTH],
            offset_width: bytes[layout::AT_OFFSET_WIDTH],
            vocab_len: u32_at(bytes, layout::AT_VOCAB_LEN),
            merge_count: u32_at(bytes, layout::AT_MERGE_COUNT),
            index_count: u32_at(bytes, layout::AT_INDEX_COUNT),
            added_count: u32_at(bytes, layout::AT_ADDED_COUNT),
            eos_count: u32_at(bytes, layout::AT_EOS_COUNT),
            token_bytes_len: u32_at(bytes, layout::AT_TOKEN_BYTES_LEN),
            added_bytes_len: u32_at(bytes, layout::AT_ADDED_BYTES_LEN),
        };
        for (width, widest, name) in [
            (header.id_width, 3, "id width"),
            (header.merge_width, 3, "merge width"),
            (header.offset_width, 4, "offset width"),
        ] {
            if !(2..=widest).contains(&width) {
                return Err(malformed(name, 0, "is out of range"));
            }
        }
        for (count, name) in [
            (header.vocab_len, "vocabulary length"),
            (header.merge_count, "merge count"),
            (header.index_count, "index count"),
            (header.added_count, "added-token count"),
            (header.eos_count, "end-token count"),
        ] {
            if count >= layout::MAX_COUNT {
                return Err(malformed(name, 0, "is not below 2^24"));
            }
        }
        let needed = header.total_len();
        if u64::from(u32_at(bytes, layout::AT_TOTAL_LEN)) != needed {
            return Err(malformed("total length", 0, "does not match the counts"));
        }
        if (bytes.len() as u64) < needed {
            return Err(TokenizerError::Truncated { needed, len: bytes.len() });
        }
        let lengths = header.tables();
        // All lengths add up to at most `bytes.len()`, so they fit in `usize`.
        let table = |which: Table| {
            let start: u64 = layout::HEADER_LEN as u64 + lengths[..which as usize].iter().sum::<u64>();
            &bytes[start as usize..(start + lengths[which as usize]) as usize]
        };
        let packed = |which, width: u8| Packed { bytes: table(which), width: usize::from(width) };
        let code = |at: usize, name| (bytes[at], malformed(name, 0, "is not a known code"));
        let (kind, unknown_kind) = code(layout::AT_KIND, "kind");
        let (pre, unknown_pre) = code(layout::AT_PRETOKENIZER, "pre-tokeniser");
        let (prefix, unknown_prefix) = code(layout::AT_SPACE_PREFIX, "space prefix");
        let optional = |id| Some(id).filter(|&id| id != layout::NO_ID);
        let mut tokenizer = Tokenizer {
            kind: Kind::from_code(kind).ok_or(unknown_kind)?,
            pretokenizer: Pretokenizer::from_code(pre).ok_or(unknown_pre)?,
            space_prefix: SpacePrefix::from_code(prefix).ok_or(unknown_prefix)?,
            flags: u32_at(bytes, layout::AT_FLAGS),
            vocab_len: header.vocab_len,
            bos: optional(u32_at(bytes, layout::AT_BOS)),
            unk: optional(u32_at(bytes, layout::AT_UNK)),
            index_count: header.index_count as usize,
            added_count: header.added_count as usize,
            added_raw_count: u32_at(bytes, layout::AT_ADDED_RAW_COUNT) as usize,
            eos_count: header.eos_count as usize,
            byte_ids: table(Table::ByteIds),
            token_ends: packed(Table::TokenEnds, header.offset_width),
            token_pool: table(Table::TokenBytes),
            special_bits: table(Table::SpecialBits),
            merge_starts: packed(Table::MergeStarts, header.merge_width),
            merge_rights: packed(Table::MergeRights, header.id_width),
            merge_ranks: packed(Table::MergeRanks, header.merge_width),
            merge_results: packed(Table::MergeResults, header.id_width),
            index: packed(Table::Index, header.id_width),
            added: table(Table::Added),
            added_pool: table(Table::AddedBytes),
            eos: packed(Table::Eos, header.id_width),
            added_first: [[0; 4]; 2],
        };
        tokenizer.check_header(u32_at(bytes, layout::AT_RESERVED))?;
        tokenizer.check_tokens()?;
        tokenizer.check_merges(header.merge_count)?;
        tokenizer.check_added()?;
        Ok(tokenizer)
    }

    fn check_id(&self, id: u32, table: &'static str, entry: usize) -> Result<(), TokenizerError> {
        if id < self.vocab_len { Ok(()) } else { Err(malformed(table, entry, "is not an id of the vocabulary")) }
    }

    fn check_header(&self, reserved: u32) -> Result<(), TokenizerError> {
        if self.vocab_len == 0 {
            return Err(malformed("vocabulary length", 0, "is zero"));
        }
        if self.flags & !layout::FLAGS_KNOWN != 0 {
            return Err(malformed("flags", 0, "has unknown bits"));
        }
        if reserved != 0 {
            return Err(malformed("reserved", 0, "is not zero"));
        }
        if self.added_raw_count > self.added_count {
            return Err(malformed("added tokens", 0, "first pass has too many"));
        }
        if let Some(bos) = self.bos {
            self.check_id(bos, "bos", 0)?;
        } else if self.add_bos() {
            return Err(malformed("bos", 0, "is missing"));
        }
        if let Some(unk) = self.unk {
            self.check_id(unk, "unk", 0)?;
        }
        for byte in 0..=u8::MAX {
            if let Some(id) = self.byte_id(byte) {
                self.check_id(id, "byte ids", usize::from(byte))?;
            }
        }
        for i in 0..self.eos_count {
            self.check_id(self.eos.get(i), "end tokens", i)?;
        }
        Ok(())
    }

    fn check_tokens(&self) -> Result<(), TokenizerError> {
        let mut last = 0;
        for id in 0..self.vocab_len as usize {
            let end = self.token_ends.get(id);
            if end < last {
                return Err(malformed("token ends", id, "goes back"));
            }
            last = end;
        }
        if last as usize != self.token_pool.len() {
            return Err(malformed("token ends", 0, "does not end with the pool"));
        }
        let mut before: Option<&[u8]> = None;
        for i in 0..self.index_count {
            let id = self.index.get(i);
            self.check_id(id, "vocabulary index", i)?;
            let bytes = self.token_bytes(id).unwrap_or_default();
            if before.is_some_and(|before| before >= bytes) {
                return Err(malformed("vocabulary index", i, "is not ascending"));
            }
            before = Some(bytes);
        }
        Ok(())
    }

    fn check_merges(&self, merge_count: u32) -> Result<(), TokenizerError> {
        let mut start = self.merge_starts.get(0);
        if start != 0 {
            return Err(malformed("merge starts", 0, "is not zero"));
        }
        for left in 0..self.vocab_len as usize {
            let end = self.merge_starts.get(left + 1);
            if end < start || end > merge_count {
                return Err(malformed("merge starts", left + 1, "is out of order"));
            }
            for i in start as usize..end as usize {
                let right = self.merge_rights.get(i);
                self.check_id(right, "merge rights", i)?;
                self.check_id(self.merge_results.get(i), "merge results", i)?;
                if i > start as usize && self.merge_rights.get(i - 1) >= right {
                    return Err(malformed("merge rights", i, "is not ascending"));
                }
            }
            start = end;
        }
        if start != merge_count {
            return Err(malformed("merge starts", 0, "does not cover all merges"));
        }
        Ok(())
    }

    fn check_added(&mut self) -> Result<(), TokenizerError> {
        let table = "added tokens";
        let mut start = 0;
        for i in 0..self.added_count {
            let end = self.added_end(i);
            if end <= start || end > self.added_pool.len() {
                return Err(malformed(table, i, "has no content or is out of bounds"));
            }
            start = end;
        }
        if start != self.added_pool.len() {
            return Err(malformed(table, 0, "does not end with the pool"));
        }
        let mut before: Option<Added<'_>> = None;
        for i in 0..self.added_count {
            let added = self.added(i);
            self.check_id(added.id, table, i)?;
            if added.flags & !layout::ADDED_KNOWN != 0 {
                return Err(malformed(table, i, "has unknown flags"));
            }
            // Matches then begin and end between characters of the text.
            if core::str::from_utf8(added.content).is_err() {
                return Err(malformed(table, i, "is not UTF-8"));
            }
            // Ascending first byte for the binary search, then longest first.
            let key = |added: Added<'_>| (added.content[0], usize::MAX - added.content.len());
            if i != self.added_raw_count && before.is_some_and(|before| key(before) > key(added)) {
                return Err(malformed(table, i, "is out of order"));
            }
            before = Some(added);
            let pass = usize::from(i >= self.added_raw_count);
            let first = added.content[0];
            self.added_first[pass][usize::from(first) / 64] |= 1 << (first % 64);
        }
        Ok(())
    }
}
