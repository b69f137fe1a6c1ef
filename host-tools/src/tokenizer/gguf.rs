//! Reading the tokenizer from GGUF metadata (`tokenizer.ggml.*`), by llama.cpp's rules.

use std::collections::HashMap;

use anyhow::{Context, Result, bail, ensure};
use forebay_runtime::tokenizer::{Kind, Pretokenizer, SpacePrefix};

use super::{AddedToken, Merge, TokenizerSource, add_token, set_model_tokens};

/// Token types of `tokenizer.ggml.token_type` that matter here.
mod token_type {
    pub const UNKNOWN: i32 = 2;
    pub const CONTROL: i32 = 3;
    pub const USER_DEFINED: i32 = 4;
    pub const UNUSED: i32 = 5;
}

/// The metadata fields, as arrays and values; the key of each is given without `tokenizer.ggml.`.
#[derive(Clone, Debug, Default)]
pub struct GgufTokenizer<'a> {
    /// `model`: `gpt2` (byte-level) or `llama` (SentencePiece-style).
    pub model: &'a str,
    /// `pre`: name of the pre-tokeniser; only `gpt2` models have one.
    pub pre: Option<&'a str>,
    /// `tokens`.
    pub tokens: &'a [String],
    /// `token_type`; may be empty: all normal.
    pub token_types: &'a [i32],
    /// `merges`, each two tokens with a space between; `gpt2` models need them.
    pub merges: &'a [String],
    /// `scores`; `llama` models without merges need them.
    pub scores: &'a [f32],
    /// `bos_token_id`.
    pub bos: Option<u32>,
    /// `eos_token_id`, `eot_token_id`, `eom_token_id`: those that are there, in this order.
    pub eos: Vec<u32>,
    /// `unknown_token_id`.
    pub unknown: Option<u32>,
    /// `add_bos_token`.
    pub add_bos: Option<bool>,
    /// `add_space_prefix`; only `llama` models use it.
    pub add_space_prefix: Option<bool>,
}

/// Reads a tokenizer from GGUF metadata.
///
/// # Errors
///
/// A model or pre-tokeniser that is not supported, with the names that are; arrays that contradict
/// each other.
pub fn from_gguf_fields(fields: &GgufTokenizer<'_>) -> Result<TokenizerSource> {
    ensure!(
        fields.tokens.len() < 1 << 24,
        "tokenizer.ggml.tokens: {} tokens, fewer than 2^24 are supported",
        fields.tokens.len()
    );
    ensure!(
        fields.token_types.is_empty() || fields.token_types.len() == fields.tokens.len(),
        "tokenizer.ggml.token_type has {} entries for {} tokens",
        fields.token_types.len(),
        fields.tokens.len()
    );
    let known = |id: &u32| (*id as usize) < fields.tokens.len();
    let mut source = match fields.model {
        "gpt2" => byte_level(fields.pre)?,
        "llama" => sentencepiece(fields.add_space_prefix.unwrap_or(true)),
        other => bail!("tokenizer.ggml.model is {other:?}, supported are \"gpt2\" and \"llama\""),
    };
    let type_of = |id: usize| fields.token_types.get(id).copied().unwrap_or(1);
    let texts: Vec<Option<&str>> = fields
        .tokens
        .iter()
        .enumerate()
        .map(|(id, text)| match type_of(id) {
            // These are found only as added tokens. Unused ids of a byte-level vocabulary are padding.
            token_type::CONTROL | token_type::UNKNOWN | token_type::USER_DEFINED => None,
            token_type::UNUSED if source.kind == Kind::ByteLevel => None,
            _ => Some(text.as_str()),
        })
        .collect();
    set_model_tokens(&mut source, &texts)?;
    for (id, text) in (0u32..).zip(fields.tokens) {
        let kind = type_of(id as usize);
        let added = matches!(kind, token_type::CONTROL | token_type::UNKNOWN | token_type::USER_DEFINED);
        if added && !text.is_empty() {
            let token = AddedToken {
                id,
                content: text.clone(),
                special: kind != token_type::USER_DEFINED,
                ..AddedToken::default()
            };
            add_token(&mut source, token)?;
        }
    }
    source.merges = match source.kind {
        Kind::ByteLevel => listed_merges(fields)?,
        _ if !fields.merges.is_empty() => listed_merges(fields)?,
        _ => scored_merges(&source, fields.scores)?,
    };
    source.unk = match source.kind {
        // llama.cpp drops what a byte-level vocabulary does not cover.
        Kind::ByteLevel => None,
        _ => fields.unknown.filter(known),
    };
    source.bos = fields.bos.filter(known);
    source.add_bos = source.bos.is_some()
        && fields.add_bos.unwrap_or(source.kind == Kind::SentencePiece || source.pretokenizer == Pretokenizer::Llama3);
    source.eos = fields.eos.iter().copied().filter(known).collect();
    source.add_known_ends();
    Ok(source)
}

fn byte_level(pre: Option<&str>) -> Result<TokenizerSource> {
    let (pretokenizer, ignore_merges) = match pre {
        Some("gpt-2" | "phi-2" | "olmo" | "mpt") => (Pretokenizer::Gpt2, false),
        Some("smollm" | "starcoder" | "refact") => (Pretokenizer::SmolLm, false),
        Some("llama-bpe" | "llama3" | "llama-v3" | "lfm2") => (Pretokenizer::Llama3, true),
        Some("qwen2" | "deepseek-r1-qwen") => (Pretokenizer::Qwen2, false),
        other => bail!(
            "tokenizer.ggml.pre is {other:?}, supported are gpt-2, phi-2, olmo, mpt, smollm, starcoder, \
             refact, llama-bpe, llama3, llama-v3, lfm2, qwen2, deepseek-r1-qwen"
        ),
    };
    let mut source = TokenizerSource::new(Kind::ByteLevel, pretokenizer);
    source.ignore_merges = ignore_merges;
    source.expects_nfc = pretokenizer == Pretokenizer::Qwen2;
    Ok(source)
}

fn sentencepiece(add_space_prefix: bool) -> TokenizerSource {
    let mut source = TokenizerSource::new(Kind::SentencePiece, Pretokenizer::None);
    source.space_prefix = if add_space_prefix { SpacePrefix::Always } else { SpacePrefix::Never };
    source.strip_first_space = add_space_prefix;
    source.spaces_normalized = true;
    source.byte_fallback = true;
    source
}

/// Merges as listed; a pair that occurs twice has the earlier rank.
fn listed_merges(fields: &GgufTokenizer<'_>) -> Result<Vec<Merge>> {
    ensure!(!fields.merges.is_empty(), "tokenizer.ggml.merges is missing or empty");
    let mut ids = HashMap::with_capacity(fields.tokens.len());
    for (id, text) in (0u32..).zip(fields.tokens) {
        ids.entry(text.as_str()).or_insert(id);
    }
    let mut seen = HashMap::with_capacity(fields.merges.len());
    let mut merges = Vec::with_capacity(fields.merges.len());
    for (rank, pair) in (0u32..).zip(fields.merges) {
        // Tokens may begin with a space in SentencePiece-style vocabularies only as U+2581, so the
        // first space after the first character parts the two.
        let first = pair.chars().next().map_or(0, char::len_utf8);
        let at = pair[first..]
            .find(' ')
            .with_context(|| format!("tokenizer.ggml.merges[{rank}] is not a pair: {pair:?}"))?;
        let (left, right) = (&pair[..first + at], &pair[first + at + 1..]);
        let id = |text: &str| {
            ids.get(text)
                .copied()
                .with_context(|| format!("tokenizer.ggml.merges[{rank}]: {text:?} is not in tokenizer.ggml.tokens"))
        };
        let merge = Merge { left: id(left)?, right: id(right)?, result: id(&format!("{left}{right}"))?, rank };
        if seen.insert((merge.left, merge.right), ()).is_none() {
            merges.push(merge);
        }
    }
    Ok(merges)
}

/// SentencePiece's rule as merges: two tokens merge if what they make together is a token, the one of
/// the highest score first. Every way to cut a token in two is a merge of that token's rank.
fn scored_merges(source: &TokenizerSource, scores: &[f32]) -> Result<Vec<Merge>> {
    ensure!(
        scores.len() == source.tokens.len(),
        "tokenizer.ggml.scores has {} entries for {} tokens",
        scores.len(),
        source.tokens.len()
    );
    let ids: HashMap<&[u8], u32> =
        source.model_tokens.iter().map(|&id| (source.tokens[id as usize].as_slice(), id)).collect();
    let mut order: Vec<f32> = source.model_tokens.iter().map(|&id| scores[id as usize]).collect();
    ensure!(order.iter().all(|score| !score.is_nan()), "tokenizer.ggml.scores has a NaN");
    order.sort_by(|a, b| b.total_cmp(a));
    order.dedup();
    let mut merges = Vec::new();
    for &result in &source.model_tokens {
        let bytes = source.tokens[result as usize].as_slice();
        let rank = order.partition_point(|&score| score > scores[result as usize]) as u32;
        for at in 1..bytes.len() {
            let (left, right) = bytes.split_at(at);
            if let (Some(&left), Some(&right)) = (ids.get(left), ids.get(right)) {
                merges.push(Merge { left, right, result, rank });
            }
        }
    }
    Ok(merges)
}
