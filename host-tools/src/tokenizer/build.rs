//! Laying a [`TokenizerSource`] out as the tables of a TOKENIZER section.

use anyhow::{Context, Result, ensure};
use forebay_runtime::tokenizer::layout::{self, Header};
use forebay_runtime::tokenizer::{Kind, Tokenizer};

use super::{AddedToken, Merge, TokenizerSource};

/// Fewest bytes, at least two, that hold every value up to `greatest`.
fn width(greatest: usize) -> Result<u8> {
    Ok(match greatest {
        0..=0xffff => 2,
        0x1_0000..=0xff_ffff => 3,
        0x100_0000..=0xffff_ffff => 4,
        _ => anyhow::bail!("{greatest} does not fit in four bytes"),
    })
}

fn put(bytes: &mut Vec<u8>, value: u32, width: u8) {
    bytes.extend_from_slice(&value.to_le_bytes()[..usize::from(width)]);
}

/// Whether no merge joins a token that ends in a non-space with one that starts with a space, and
/// the space is a token: then a text may be cut before such a space and gives the same ids.
fn cut_before_space(source: &TokenizerSource) -> bool {
    let joins = |merge: &Merge| {
        let (left, right) = (&source.tokens[merge.left as usize], &source.tokens[merge.right as usize]);
        left.last() != Some(&b' ') && right.first() == Some(&b' ')
    };
    source.kind == Kind::SentencePiece
        && !source.ignore_merges
        && source.model_tokens.iter().any(|&id| source.tokens[id as usize] == b" ")
        && !source.merges.iter().any(joins)
}

/// The content that is matched: as normalised for tokens of the second pass.
fn matched_content(source: &TokenizerSource, token: &AddedToken) -> Vec<u8> {
    use forebay_runtime::tokenizer::SpacePrefix;
    if !token.normalized || !source.spaces_normalized {
        return token.content.clone().into_bytes();
    }
    let spaces = token.content.replace('\u{2581}', " ");
    match source.space_prefix {
        SpacePrefix::Always => format!(" {spaces}").into_bytes(),
        _ => spaces.into_bytes(),
    }
}

/// Lays out a TOKENIZER section; `docs/format.md` describes it.
///
/// # Errors
///
/// The source contradicts itself (ids outside the vocabulary, a pair merged twice) or is beyond the
/// limits of the format: 2^24 tokens, 2^24 merges, 4 GiB.
pub fn build(source: &TokenizerSource) -> Result<Vec<u8>> {
    let vocab_len = source.tokens.len();
    let limit = layout::MAX_COUNT as usize;
    ensure!(vocab_len > 0, "the vocabulary is empty");
    ensure!(vocab_len < limit, "{vocab_len} tokens, fewer than {limit} are supported");
    let merge_count = source.merges.len();
    ensure!(merge_count < limit, "{merge_count} merges, fewer than {limit} are supported");
    let known = |id: u32| (id as usize) < vocab_len;
    for (n, merge) in source.merges.iter().enumerate() {
        ensure!(
            known(merge.left) && known(merge.right) && known(merge.result),
            "merge {n} names an id outside the vocabulary"
        );
    }

    // Ranks are numbered anew, without gaps, so that they fit the width of the merge count.
    let mut ranks: Vec<u32> = source.merges.iter().map(|merge| merge.rank).collect();
    ranks.sort_unstable();
    ranks.dedup();
    let mut merges = source.merges.clone();
    merges.sort_by_key(|merge| (merge.left, merge.right));
    if let Some(pair) = merges.windows(2).find(|pair| (pair[0].left, pair[0].right) == (pair[1].left, pair[1].right)) {
        anyhow::bail!("tokens {} and {} are merged twice", pair[0].left, pair[0].right);
    }

    let mut index = source.model_tokens.clone();
    ensure!(index.iter().all(|&id| known(id)), "a model token is outside the vocabulary");
    index.sort_by_key(|&id| &source.tokens[id as usize]);

    // First pass before second; within each the order that the reader searches by.
    let mut added: Vec<(&AddedToken, Vec<u8>)> =
        source.added.iter().map(|token| (token, matched_content(source, token))).collect();
    added.sort_by(|(a, left), (b, right)| {
        let key = |token: &AddedToken, content: &Vec<u8>| {
            (token.normalized, content.first().copied(), usize::MAX - content.len())
        };
        key(a, left).cmp(&key(b, right)).then_with(|| left.cmp(right))
    });

    let token_bytes_len: usize = source.tokens.iter().map(Vec::len).sum();
    let added_bytes_len: usize = added.iter().map(|(_, content)| content.len()).sum();
    let header = Header {
        id_width: width(vocab_len - 1)?,
        merge_width: width(merge_count)?,
        offset_width: width(token_bytes_len)?,
        vocab_len: vocab_len as u32,
        merge_count: merge_count as u32,
        index_count: index.len() as u32,
        added_count: added.len() as u32,
        eos_count: source.eos.len() as u32,
        token_bytes_len: u32::try_from(token_bytes_len)?,
        added_bytes_len: u32::try_from(added_bytes_len)?,
    };
    let total_len = u32::try_from(header.total_len()).context("the section is over 4 GiB")?;

    let flags = [
        (source.add_bos && source.bos.is_some(), layout::FLAG_ADD_BOS),
        (source.ignore_merges, layout::FLAG_IGNORE_MERGES),
        (source.byte_fallback, layout::FLAG_BYTE_FALLBACK),
        (source.fuse_unk, layout::FLAG_FUSE_UNK),
        (source.split_on_space, layout::FLAG_SPLIT_ON_SPACE),
        (cut_before_space(source), layout::FLAG_CUT_BEFORE_SPACE),
        (source.spaces_normalized, layout::FLAG_SPACES_NORMALIZED),
        (source.strip_first_space, layout::FLAG_STRIP_FIRST_SPACE),
        (source.expects_nfc, layout::FLAG_EXPECTS_NFC),
    ]
    .into_iter()
    .filter_map(|(set, flag)| set.then_some(flag))
    .sum::<u32>();

    let mut bytes = Vec::with_capacity(total_len as usize);
    bytes.extend_from_slice(&layout::MAGIC);
    bytes.extend_from_slice(&layout::VERSION.to_le_bytes());
    bytes.extend_from_slice(&[
        source.kind.code(),
        source.pretokenizer.code(),
        source.space_prefix.code(),
        header.id_width,
        header.merge_width,
        header.offset_width,
    ]);
    let raw_count = added.iter().filter(|(token, _)| !token.normalized).count();
    for field in [
        flags,
        total_len,
        header.vocab_len,
        header.merge_count,
        header.index_count,
        header.added_count,
        raw_count as u32,
        header.eos_count,
        header.token_bytes_len,
        header.added_bytes_len,
        source.bos.unwrap_or(layout::NO_ID),
        source.unk.unwrap_or(layout::NO_ID),
        0,
    ] {
        put(&mut bytes, field, 4);
    }

    for id in source.byte_ids {
        put(&mut bytes, id.unwrap_or(layout::NO_ID), 4);
    }
    let mut end = 0;
    for token in &source.tokens {
        end += token.len() as u32;
        put(&mut bytes, end, header.offset_width);
    }
    source.tokens.iter().for_each(|token| bytes.extend_from_slice(token));
    let mut special = vec![0u8; vocab_len.div_ceil(8)];
    for token in &source.added {
        ensure!(known(token.id), "added token {:?} is outside the vocabulary", token.content);
        special[token.id as usize / 8] |= u8::from(token.special) << (token.id % 8);
    }
    bytes.extend_from_slice(&special);

    let mut start = 0;
    for left in 0..=header.vocab_len {
        put(&mut bytes, start as u32, header.merge_width);
        start += merges[start..].iter().take_while(|merge| merge.left == left).count();
    }
    merges.iter().for_each(|merge| put(&mut bytes, merge.right, header.id_width));
    for merge in &merges {
        let rank = ranks.partition_point(|&rank| rank < merge.rank);
        put(&mut bytes, rank as u32, header.merge_width);
    }
    merges.iter().for_each(|merge| put(&mut bytes, merge.result, header.id_width));

    index.iter().for_each(|&id| put(&mut bytes, id, header.id_width));
    let mut end = 0;
    for (token, content) in &added {
        end += content.len() as u32;
        put(&mut bytes, end, 4);
        let flags = [
            (token.special, layout::ADDED_SPECIAL),
            (token.lstrip, layout::ADDED_LSTRIP),
            (token.rstrip, layout::ADDED_RSTRIP),
        ];
        bytes.push(flags.into_iter().filter_map(|(set, flag)| set.then_some(flag)).sum());
        put(&mut bytes, token.id, header.id_width);
    }
    added.iter().for_each(|(_, content)| bytes.extend_from_slice(content));
    source.eos.iter().for_each(|&id| put(&mut bytes, id, header.id_width));

    // What the device would refuse is refused here, with the same words.
    Tokenizer::parse(&bytes).context("the tokenizer breaks a rule of the image format")?;
    Ok(bytes)
}
