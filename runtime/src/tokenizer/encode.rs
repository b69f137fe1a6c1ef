//! From text to ids: added tokens first, then pieces, then merging.

use super::bpe::{WORDS_PER_SYMBOL, merge_symbols};
use super::unicode::{Class, class};
use super::{EncodeOptions, Kind, SpacePrefix, Tokenizer, TokenizerError, layout};

/// SentencePiece's visible space, U+2581.
const VISIBLE_SPACE: char = '\u{2581}';

/// Whether a SentencePiece-style model sees a space in this character.
fn is_space_symbol(c: char) -> bool {
    c == ' ' || c == VISIBLE_SPACE
}

impl Tokenizer<'_> {
    /// Words (`u32`) of scratch that [`encode`](Self::encode) needs for any text whose pieces are
    /// at most `max_piece_bytes` bytes long. A piece is what the pre-tokeniser leaves whole: a
    /// word, a number, a run of spaces or of signs. The length of the longest text is always a
    /// safe bound; a smaller one serves ordinary text, and a longer piece is refused with the
    /// number of words that it needs.
    pub const fn encode_scratch(max_piece_bytes: usize) -> usize {
        max_piece_bytes.saturating_add(1).saturating_mul(WORDS_PER_SYMBOL)
    }

    /// Writes the ids of `text` to the start of `out` and gives their number: for byte-level models at
    /// most one for each byte, for SentencePiece-style ones at most one more for each stretch
    /// between added tokens (its first space), and one for `bos`. So `2 * text.len() + 1` always do.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::ScratchTooSmall`] and [`TokenizerError::OutputTooSmall`], each with the
    /// size that suffices for this text; `out` then holds the ids that fit or is partly written.
    pub fn encode(
        &self,
        text: &str,
        options: EncodeOptions,
        scratch: &mut [u32],
        out: &mut [u32],
    ) -> Result<usize, TokenizerError> {
        let mut run = Run {
            tokenizer: self,
            parse_special: options.parse_special,
            scratch_needed: 0,
            scratch,
            ids: Ids { out, count: 0 },
        };
        if options.add_bos
            && let Some(bos) = self.bos
        {
            run.ids.push(bos);
        }
        run.raw_pass(text);
        if run.scratch_needed > run.scratch.len() {
            return Err(TokenizerError::ScratchTooSmall { needed: run.scratch_needed, given: run.scratch.len() });
        }
        let Ids { out, count } = run.ids;
        if count > out.len() {
            return Err(TokenizerError::OutputTooSmall { needed: count, given: out.len() });
        }
        Ok(count)
    }

    /// The leftmost and there longest added token of one pass at or after `from`.
    ///
    /// With `before` set, the text has a space in front of its start that tokens may take in.
    fn find_added(&self, text: &str, from: usize, pass: usize, before: bool) -> Option<Match> {
        let spaces_as_one = pass == 1 && self.flag(layout::FLAG_SPACES_NORMALIZED);
        if before && let Some(found) = self.added_at(text, None, pass, spaces_as_one) {
            return Some(found);
        }
        let bits = &self.added_first[pass];
        text.as_bytes()
            .iter()
            .enumerate()
            .skip(from)
            .filter(|&(_, &byte)| bits[usize::from(byte) / 64] >> (byte % 64) & 1 == 1 || spaces_as_one && byte == 0xe2)
            .find_map(|(at, _)| self.added_at(text, Some(at), pass, spaces_as_one))
    }

    /// The longest added token of one pass at `at`, or at the space before the text for `None`.
    fn added_at(&self, text: &str, at: Option<usize>, pass: usize, spaces_as_one: bool) -> Option<Match> {
        let rest = text.get(at.unwrap_or(0)..)?;
        let first = match at {
            None => b' ',
            Some(_) if spaces_as_one && rest.starts_with(VISIBLE_SPACE) => b' ',
            Some(_) => *rest.as_bytes().first()?,
        };
        let (mut low, end) = match pass {
            0 => (0, self.added_raw_count),
            _ => (self.added_raw_count, self.added_count),
        };
        let mut high = end;
        while low < high {
            let middle = low + (high - low) / 2;
            if self.added(middle).content[0] < first {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        (low..end).map(|i| self.added(i)).take_while(|added| added.content[0] == first).find_map(|added| {
            let content = &added.content[usize::from(at.is_none())..];
            let len = if spaces_as_one {
                matched_len(rest, content)
            } else {
                rest.as_bytes().starts_with(content).then_some(content.len())
            };
            len.map(|len| Match {
                start: at.unwrap_or(0),
                end: at.unwrap_or(0) + len,
                takes_prefix: at.is_none(),
                id: added.id,
                flags: added.flags,
            })
        })
    }
}

/// Bytes of `text` that `content` matches when U+2581 in the text counts as a space.
fn matched_len(text: &str, content: &[u8]) -> Option<usize> {
    let (mut rest, mut content) = (text, content);
    while let Some(&byte) = content.first() {
        match rest.strip_prefix(VISIBLE_SPACE) {
            Some(after) if byte == b' ' => {
                rest = after;
                content = &content[1..];
            }
            _ => {
                let c = rest.chars().next()?;
                content = content.strip_prefix(c.encode_utf8(&mut [0; 4]).as_bytes())?;
                rest = &rest[c.len_utf8()..];
            }
        }
    }
    Some(text.len() - rest.len())
}

/// An added token found in a text.
struct Match {
    start: usize,
    end: usize,
    /// The token begins with the space before the text.
    takes_prefix: bool,
    id: u32,
    flags: u8,
}

/// Ids given out so far; those beyond the room given are only counted.
struct Ids<'s> {
    out: &'s mut [u32],
    count: usize,
}

impl Ids<'_> {
    fn push(&mut self, id: u32) {
        if let Some(place) = self.out.get_mut(self.count) {
            *place = id;
        }
        self.count += 1;
    }
}

/// One call of `encode`.
struct Run<'r, 'a> {
    tokenizer: &'r Tokenizer<'a>,
    parse_special: bool,
    scratch_needed: usize,
    scratch: &'r mut [u32],
    ids: Ids<'r>,
}

impl Run<'_, '_> {
    /// Cuts out the added tokens that are matched in the text as it is.
    fn raw_pass(&mut self, text: &str) {
        let (mut done, mut search) = (0, 0);
        while let Some(found) = self.tokenizer.find_added(text, search, 0, false) {
            search = found.end;
            if self.leaves_as_text(&found) {
                continue;
            }
            let (start, end) = widen(text, done, &found, false);
            if done < start {
                self.normalized_pass(&text[done..start], done == 0);
            }
            self.ids.push(found.id);
            done = end;
        }
        if done < text.len() {
            self.normalized_pass(&text[done..], done == 0);
        }
    }

    /// Cuts out the added tokens that are matched in normalised text; `text` is not empty.
    fn normalized_pass(&mut self, text: &str, at_start: bool) {
        let prefix = self.tokenizer.space_prefix == SpacePrefix::Always;
        let spaces_as_one = self.tokenizer.flag(layout::FLAG_SPACES_NORMALIZED);
        let (mut done, mut search) = (0, 0);
        let mut prefix_left = prefix;
        let mut before = prefix;
        while let Some(found) = self.tokenizer.find_added(text, search, 1, before) {
            search = found.end;
            before = false;
            if self.leaves_as_text(&found) {
                continue;
            }
            let (start, end) = widen(text, done, &found, spaces_as_one);
            let gap = text.get(done..start).unwrap_or_default();
            self.stretch(prefix_left && !found.takes_prefix, gap, at_start && done == 0);
            self.ids.push(found.id);
            prefix_left = false;
            done = end;
        }
        self.stretch(prefix_left, text.get(done..).unwrap_or_default(), at_start && done == 0);
    }

    /// Special tokens of an untrusted text stay text; what they cover is not searched again.
    fn leaves_as_text(&self, found: &Match) -> bool {
        found.flags & layout::ADDED_SPECIAL != 0 && !self.parse_special
    }

    /// Encodes a stretch without added tokens. `prefix`: a space comes before it.
    fn stretch(&mut self, prefix: bool, text: &str, at_start: bool) {
        if text.is_empty() && !prefix {
            return;
        }
        match self.tokenizer.kind {
            Kind::ByteLevel => {
                let mut rest = text;
                while !rest.is_empty() {
                    let (piece, after) = rest.split_at(self.tokenizer.pretokenizer.piece_len(rest));
                    self.piece(false, piece);
                    rest = after;
                }
            }
            Kind::SentencePiece => {
                let bare = !text.starts_with(is_space_symbol);
                let prefix = match self.tokenizer.space_prefix {
                    SpacePrefix::Never | SpacePrefix::Always => prefix,
                    SpacePrefix::UnlessSpace => bare,
                    SpacePrefix::FirstUnlessSpace => bare && at_start,
                };
                self.characters(prefix, text);
            }
        }
    }

    /// Cuts a stretch of a SentencePiece-style model where no merge can cross, and merges the parts.
    fn characters(&mut self, mut prefix: bool, text: &str) {
        let split = self.tokenizer.flag(layout::FLAG_SPLIT_ON_SPACE);
        let cut = self.tokenizer.flag(layout::FLAG_CUT_BEFORE_SPACE);
        let mut start = 0;
        let mut last_is_space = prefix.then_some(true);
        for (at, c) in text.char_indices() {
            let space = is_space_symbol(c);
            let here = match last_is_space {
                None => false,
                Some(last) => space && (split || cut && !last),
            };
            if here {
                self.piece(prefix, &text[start..at]);
                prefix = false;
                start = at;
            }
            last_is_space = Some(space);
        }
        self.piece(prefix, &text[start..]);
    }

    /// Merges one piece and gives out its ids.
    fn piece(&mut self, prefix: bool, text: &str) {
        let tokenizer = self.tokenizer;
        if tokenizer.flag(layout::FLAG_IGNORE_MERGES)
            && !prefix
            && let Some(id) = tokenizer.model_token(text.as_bytes())
        {
            self.ids.push(id);
            return;
        }
        let most = text.len() + usize::from(prefix);
        let needed = most.saturating_mul(WORDS_PER_SYMBOL);
        if needed > self.scratch.len() {
            self.scratch_needed = self.scratch_needed.max(needed);
            return;
        }
        let mut symbols = SymbolWriter { tokenizer, ids: &mut *self.scratch, count: 0, unknown: false };
        match tokenizer.kind {
            Kind::ByteLevel => {
                for byte in text.bytes() {
                    symbols.symbol(tokenizer.byte_id(byte), &[]);
                }
            }
            Kind::SentencePiece => {
                if prefix {
                    symbols.character(' ');
                }
                for c in text.chars() {
                    symbols.character(c);
                }
            }
        }
        symbols.end_unknown();
        let count = symbols.count;
        let ids = &mut self.ids;
        merge_symbols(tokenizer, self.scratch, count, |id| ids.push(id));
    }
}

/// Where a match begins and ends with the white space that it takes along; `done` is where the
/// match before ended.
fn widen(text: &str, done: usize, found: &Match, spaces_as_one: bool) -> (usize, usize) {
    let white = |c: char| class(c) == Class::Space && !(spaces_as_one && c == ' ');
    let (mut start, mut end) = (found.start, found.end);
    if found.flags & layout::ADDED_LSTRIP != 0
        && let Some(gap) = text.get(done..start)
    {
        start = done + gap.trim_end_matches(white).len();
    }
    if found.flags & layout::ADDED_RSTRIP != 0 {
        end = text.len() - text[end..].trim_start_matches(white).len();
    }
    (start, end)
}

/// Fills the scratch with the first symbols of a piece: at most one for each byte.
struct SymbolWriter<'r, 'a> {
    tokenizer: &'r Tokenizer<'a>,
    ids: &'r mut [u32],
    count: usize,
    /// An unknown symbol waits: it is written before the next known one, or fused with the next
    /// unknown one. Byte tokens overtake it, as they do in Hugging Face's implementation.
    unknown: bool,
}

impl SymbolWriter<'_, '_> {
    fn add(&mut self, id: u32) {
        self.ids[self.count] = id;
        self.count += 1;
    }

    fn end_unknown(&mut self) {
        if self.unknown
            && let Some(unk) = self.tokenizer.unk
        {
            self.add(unk);
        }
        self.unknown = false;
    }

    fn character(&mut self, c: char) {
        let c = if c == VISIBLE_SPACE { ' ' } else { c };
        let mut utf8 = [0; 4];
        let bytes = c.encode_utf8(&mut utf8).as_bytes();
        self.symbol(self.tokenizer.model_token(bytes), bytes);
    }

    /// Writes a symbol that is `id` in the vocabulary, or else its `bytes` as byte tokens if the
    /// model has them all, or else the unknown token if the model has one.
    fn symbol(&mut self, id: Option<u32>, bytes: &[u8]) {
        if let Some(id) = id {
            self.end_unknown();
            self.add(id);
            return;
        }
        let fallback = self.tokenizer.flag(layout::FLAG_BYTE_FALLBACK);
        if fallback && bytes.iter().all(|&b| self.tokenizer.byte_id(b).is_some()) {
            for id in bytes.iter().filter_map(|&b| self.tokenizer.byte_id(b)) {
                self.add(id);
            }
            return;
        }
        if self.unknown && !self.tokenizer.flag(layout::FLAG_FUSE_UNK) {
            self.end_unknown();
        }
        self.unknown = true;
    }
}
