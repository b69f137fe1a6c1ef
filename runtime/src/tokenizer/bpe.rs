//! Byte-pair merging of one piece in caller-given scratch memory.
//!
//! The piece is a doubly linked list of symbols; a tournament tree over the positions holds the
//! pair of the lowest rank, the leftmost among equals. A merge updates three leaves, so a piece of
//! `n` symbols takes `O(n log n)` table look-ups and comparisons, whatever it contains, and the
//! memory is [`WORDS_PER_SYMBOL`] words for each symbol. The result is that of the textbook rule
//! "merge the leftmost pair of the lowest rank until none is left" (Sennrich et al., 2016,
//! arXiv:1508.07909).

use super::Tokenizer;

/// Scratch words for each symbol of a piece: id, next, previous, rank, tree node.
pub const WORDS_PER_SYMBOL: usize = 5;

/// End of the list.
const NONE: u32 = u32::MAX;
/// Rank of a pair that does not merge; ranks of merges are below 2^24.
const NO_RANK: u32 = u32::MAX;

struct Symbols<'s> {
    ids: &'s mut [u32],
    next: &'s mut [u32],
    prev: &'s mut [u32],
    /// Rank of the pair that starts at each position.
    rank: &'s mut [u32],
    /// Node `i` has the children `2i` and `2i + 1`; from `n` on they are leaves, leaf `n + p` being
    /// position `p`. Each node holds the better position of its two children; node 0 is unused.
    tree: &'s mut [u32],
}

impl Symbols<'_> {
    fn node(&self, i: usize) -> u32 {
        let n = self.tree.len();
        if i >= n { (i - n) as u32 } else { self.tree[i] }
    }

    fn play(&mut self, i: usize) {
        let (a, b) = (self.node(2 * i), self.node(2 * i + 1));
        let key = |p: u32| (self.rank[p as usize], p);
        self.tree[i] = if key(b) < key(a) { b } else { a };
    }

    fn set_rank(&mut self, at: usize, rank: u32) {
        self.rank[at] = rank;
        let mut i = (at + self.tree.len()) / 2;
        while i > 0 {
            self.play(i);
            i /= 2;
        }
    }

    fn pair_rank(&self, tokenizer: &Tokenizer<'_>, at: usize) -> u32 {
        match self.next[at] {
            NONE => NO_RANK,
            right => tokenizer.merge(self.ids[at], self.ids[right as usize]).map_or(NO_RANK, |(rank, _)| rank),
        }
    }
}

/// Merges the symbols `scratch[..n]` (token ids, all below the vocabulary's length) and hands the
/// resulting ids to `emit`.
///
/// `scratch` holds at least `n * WORDS_PER_SYMBOL` words.
pub fn merge_symbols(tokenizer: &Tokenizer<'_>, scratch: &mut [u32], n: usize, mut emit: impl FnMut(u32)) {
    if n < 2 {
        scratch[..n].iter().copied().for_each(emit);
        return;
    }
    let (ids, rest) = scratch.split_at_mut(n);
    let (next, rest) = rest.split_at_mut(n);
    let (prev, rest) = rest.split_at_mut(n);
    let (rank, rest) = rest.split_at_mut(n);
    let tree = &mut rest[..n];
    let mut symbols = Symbols { ids, next, prev, rank, tree };
    for at in 0..n {
        symbols.next[at] = if at + 1 < n { at as u32 + 1 } else { NONE };
        symbols.prev[at] = if at > 0 { at as u32 - 1 } else { NONE };
    }
    for at in 0..n {
        symbols.rank[at] = symbols.pair_rank(tokenizer, at);
    }
    for i in (1..n).rev() {
        symbols.play(i);
    }
    loop {
        let at = symbols.tree[1] as usize;
        if symbols.rank[at] == NO_RANK {
            break;
        }
        let right = symbols.next[at] as usize;
        let Some((_, merged)) = tokenizer.merge(symbols.ids[at], symbols.ids[right]) else {
            break;
        };
        symbols.ids[at] = merged;
        let after = symbols.next[right];
        symbols.next[at] = after;
        if after != NONE {
            symbols.prev[after as usize] = at as u32;
        }
        symbols.set_rank(right, NO_RANK);
        let rank = symbols.pair_rank(tokenizer, at);
        symbols.set_rank(at, rank);
        let before = symbols.prev[at];
        if before != NONE {
            let rank = symbols.pair_rank(tokenizer, before as usize);
            symbols.set_rank(before as usize, rank);
        }
    }
    let mut at = 0;
    loop {
        emit(symbols.ids[at]);
        match symbols.next[at] {
            NONE => break,
            next => at = next as usize,
        }
    }
}
