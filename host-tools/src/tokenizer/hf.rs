//! Reading `tokenizer.json` and the files beside it.
//!
//! The file describes a pipeline of normalisers, pre-tokenisers and decoders. Only pipelines that the
//! device reproduces exactly are accepted; anything else is refused with the JSON path and what would
//! be supported there.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use forebay_runtime::tokenizer::{Kind, Pretokenizer, SpacePrefix};
use serde_json::Value;

use super::{AddedToken, Merge, TokenizerSource, add_token, set_model_tokens};

const GPT2_PATTERN: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3_PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_PATTERN: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const SUPPORTED_PRETOKENIZERS: &str = "ByteLevel with use_regex and without add_prefix_space (GPT-2); \
     Sequence of Digits with individual_digits and ByteLevel (SmolLM2); Sequence of Split by the \
     expression of GPT-2, Llama-3, LFM2 or Qwen2 and ByteLevel without use_regex; null or Metaspace \
     for SentencePiece-style models";

impl TokenizerSource {
    /// Reads `tokenizer.json` and, where present, `tokenizer_config.json` and
    /// `generation_config.json` of a directory.
    ///
    /// # Errors
    ///
    /// A file cannot be read, or describes a tokenizer that the device does not reproduce exactly;
    /// the message names the file and the JSON path.
    pub fn from_hf_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let read = |name: &str| -> Result<Option<Value>> {
            let path = dir.join(name);
            match std::fs::read(&path) {
                Ok(bytes) => {
                    serde_json::from_slice(&bytes).with_context(|| format!("{} is not JSON", path.display())).map(Some)
                }
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
            }
        };
        let tokenizer = read("tokenizer.json")?.with_context(|| format!("no tokenizer.json in {}", dir.display()))?;
        let config = read("tokenizer_config.json")?.unwrap_or(Value::Null);
        let generation = read("generation_config.json")?.unwrap_or(Value::Null);
        Self::from_hf_json(&tokenizer, &config, &generation)
            .with_context(|| format!("{}", dir.join("tokenizer.json").display()))
    }

    /// As [`from_hf_dir`](Self::from_hf_dir), from parsed files; `Null` for one that is missing.
    pub fn from_hf_json(tokenizer: &Value, config: &Value, generation: &Value) -> Result<Self> {
        let model = &tokenizer["model"];
        check_model(model)?;
        let mut source = pipeline(tokenizer)?;
        let vocab = vocabulary(model)?;
        let len = vocab.values().max().map_or(0, |&id| id as usize + 1);
        let mut texts = vec![None; len];
        for (text, &id) in &vocab {
            ensure!(texts[id as usize].replace(*text).is_none(), "model.vocab: id {id} occurs twice");
        }
        set_model_tokens(&mut source, &texts)?;
        source.merges = merges(model, &vocab)?;
        source.ignore_merges = model["ignore_merges"] == true;
        source.fuse_unk = model["fuse_unk"] == true;
        source.byte_fallback = model["byte_fallback"] == true;
        if let Some(unk) = model["unk_token"].as_str() {
            let id = vocab.get(unk).with_context(|| format!("model.unk_token {unk:?} is not in model.vocab"))?;
            source.unk = Some(*id);
        }
        ensure!(
            !(source.kind == Kind::ByteLevel && source.byte_fallback),
            "model.byte_fallback: supported for SentencePiece-style models, not for byte-level ones"
        );
        ensure!(
            !(source.kind == Kind::SentencePiece && source.ignore_merges),
            "model.ignore_merges: supported for byte-level models, not for SentencePiece-style ones"
        );
        for (n, token) in tokenizer["added_tokens"].as_array().into_iter().flatten().enumerate() {
            let token = added_token(token, &vocab).with_context(|| format!("added_tokens[{n}]"))?;
            add_token(&mut source, token)?;
        }
        set_special(&mut source, tokenizer, config, generation)?;
        Ok(source)
    }
}

fn check_model(model: &Value) -> Result<()> {
    let kind = model["type"].as_str().unwrap_or("BPE");
    ensure!(kind == "BPE", "model.type is {kind:?}, supported is \"BPE\"");
    for (key, empty) in [
        ("dropout", Value::from(0.0)),
        ("continuing_subword_prefix", Value::from("")),
        ("end_of_word_suffix", Value::from("")),
    ] {
        let value = &model[key];
        ensure!(value.is_null() || *value == empty, "model.{key} is {value}, supported is null");
    }
    Ok(())
}

fn vocabulary(model: &Value) -> Result<HashMap<&str, u32>> {
    let vocab = model["vocab"].as_object().context("model.vocab is not an object")?;
    vocab
        .iter()
        .map(|(text, id)| {
            let id = id
                .as_u64()
                .filter(|&id| id < 1 << 24)
                .with_context(|| format!("model.vocab[{text:?}] is not an id below 2^24"))?;
            Ok((text.as_str(), id as u32))
        })
        .collect()
}

fn merges(model: &Value, vocab: &HashMap<&str, u32>) -> Result<Vec<Merge>> {
    let list = model["merges"].as_array().context("model.merges is not an array")?;
    let mut merges: Vec<Merge> = Vec::with_capacity(list.len());
    let mut places = HashMap::with_capacity(list.len());
    for (n, merge) in list.iter().enumerate() {
        let (left, right) = match merge {
            Value::String(pair) => pair.split_once(' '),
            Value::Array(pair) => match pair.as_slice() {
                [Value::String(left), Value::String(right)] => Some((left.as_str(), right.as_str())),
                _ => None,
            },
            _ => None,
        }
        .with_context(|| format!("model.merges[{n}] is not a pair"))?;
        let id = |text: &str| {
            vocab.get(text).copied().with_context(|| format!("model.merges[{n}]: {text:?} is not in model.vocab"))
        };
        let merge = Merge {
            left: id(left)?,
            right: id(right)?,
            result: id(&format!("{left}{right}"))?,
            rank: u32::try_from(n)?,
        };
        // A pair that occurs twice has the later rank, as in the `tokenizers` crate.
        match places.insert((merge.left, merge.right), merges.len()) {
            Some(place) => {
                places.insert((merge.left, merge.right), place);
                merges[place] = merge;
            }
            None => merges.push(merge),
        }
    }
    Ok(merges)
}

fn added_token(token: &Value, vocab: &HashMap<&str, u32>) -> Result<AddedToken> {
    let content = token["content"].as_str().context("content is not a string")?;
    let id = token["id"].as_u64().context("id is not a number")?;
    let id = u32::try_from(id).context("id")?;
    let flag = |name: &str| token[name] == true;
    ensure!(!flag("single_word"), "{content:?}: single_word is true, supported is false");
    if let Some(&other) = vocab.get(content) {
        ensure!(other == id, "{content:?} has id {id} here and {other} in model.vocab");
    }
    Ok(AddedToken {
        id,
        content: content.to_owned(),
        special: flag("special"),
        lstrip: flag("lstrip"),
        rstrip: flag("rstrip"),
        normalized: flag("normalized"),
    })
}

/// The steps of a `Sequence`, or the one step, or none for `null`.
fn steps<'v>(value: &'v Value, list: &str) -> Vec<&'v Value> {
    match value {
        Value::Null => Vec::new(),
        value if value["type"] == "Sequence" => value[list].as_array().into_iter().flatten().collect(),
        value => vec![value],
    }
}

fn kind_of(step: &Value) -> &str {
    step["type"].as_str().unwrap_or("")
}

/// Whether a `Replace` or `Split` step has this literal pattern.
fn literal(step: &Value, text: &str) -> bool {
    step["pattern"]["String"] == text
}

/// Reads normaliser, pre-tokeniser and decoder into a source without tokens.
fn pipeline(tokenizer: &Value) -> Result<TokenizerSource> {
    let pre = &tokenizer["pre_tokenizer"];
    let pre_steps = steps(pre, "pretokenizers");
    let byte_level = pre_steps.last().is_some_and(|step| kind_of(step) == "ByteLevel");
    if byte_level {
        let mut source = TokenizerSource::new(Kind::ByteLevel, byte_level_pretokenizer(&pre_steps)?);
        source.expects_nfc = match steps(&tokenizer["normalizer"], "normalizers").as_slice() {
            [] => false,
            [step] if kind_of(step) == "NFC" => true,
            _ => bail!("normalizer is {}, supported for byte-level models are null and NFC", tokenizer["normalizer"]),
        };
        let decoder = &tokenizer["decoder"];
        ensure!(kind_of(decoder) == "ByteLevel", "decoder is {decoder}, supported for byte-level models is ByteLevel");
        return Ok(source);
    }
    sentencepiece_pipeline(tokenizer, &pre_steps)
}

fn byte_level_pretokenizer(steps: &[&Value]) -> Result<Pretokenizer> {
    let (last, before) = steps.split_last().context("pre_tokenizer is empty")?;
    let path = if before.is_empty() {
        "pre_tokenizer".to_owned()
    } else {
        format!("pre_tokenizer.pretokenizers[{}]", before.len())
    };
    ensure!(
        last["add_prefix_space"] == false,
        "{path}.add_prefix_space is not false; supported: {SUPPORTED_PRETOKENIZERS}"
    );
    // The crate reads a missing field as true.
    let use_regex = last["use_regex"] != false;
    Ok(match before {
        [] if use_regex => Pretokenizer::Gpt2,
        [digits] if use_regex && kind_of(digits) == "Digits" && digits["individual_digits"] == true => {
            Pretokenizer::SmolLm
        }
        [split] if !use_regex && kind_of(split) == "Split" => {
            let path = "pre_tokenizer.pretokenizers[0]";
            // All text is matched, so what is done with the rest does not matter: matches isolated,
            // or what is between matches removed.
            let whole = (split["behavior"] == "Isolated" && split["invert"] != true)
                || (split["behavior"] == "Removed" && split["invert"] == true);
            ensure!(
                whole,
                "{path}: behavior {} with invert {}; supported: Isolated without, Removed with invert",
                split["behavior"],
                split["invert"]
            );
            match split["pattern"]["Regex"].as_str() {
                Some(GPT2_PATTERN) => Pretokenizer::Gpt2,
                Some(LLAMA3_PATTERN) => Pretokenizer::Llama3,
                Some(QWEN2_PATTERN) => Pretokenizer::Qwen2,
                _ => bail!("{path}.pattern is {}; supported: {SUPPORTED_PRETOKENIZERS}", split["pattern"]),
            }
        }
        _ => {
            let kinds: Vec<&str> = steps.iter().map(|step| kind_of(step)).collect();
            bail!(
                "pre_tokenizer is {} with use_regex {use_regex} at its end; supported: \
                 {SUPPORTED_PRETOKENIZERS}",
                kinds.join(", ")
            )
        }
    })
}

fn sentencepiece_pipeline(tokenizer: &Value, pre_steps: &[&Value]) -> Result<TokenizerSource> {
    let mut source = TokenizerSource::new(Kind::SentencePiece, Pretokenizer::None);
    for (n, step) in steps(&tokenizer["normalizer"], "normalizers").iter().enumerate() {
        match kind_of(step) {
            // After the replacement a prepended space would stay a space, unlike the others.
            "Prepend" if step["prepend"] == "\u{2581}" && !source.spaces_normalized => {
                source.space_prefix = SpacePrefix::Always;
            }
            "Replace" if literal(step, " ") && step["content"] == "\u{2581}" => {
                source.spaces_normalized = true;
            }
            _ => bail!(
                "normalizer, step {n} is {step}; supported: Prepend \"\u{2581}\", then Replace \" \" by \
                 \"\u{2581}\" (SentencePiece-style models), NFC (byte-level models)"
            ),
        }
    }
    match pre_steps {
        [] => {}
        // Spaces are gone by then, so this splits nothing.
        [split] if kind_of(split) == "Split" && literal(split, " ") && source.spaces_normalized => {}
        [metaspace] if kind_of(metaspace) == "Metaspace" => {
            ensure!(
                metaspace["replacement"] == "\u{2581}" && !source.spaces_normalized,
                "pre_tokenizer is {metaspace}; supported is Metaspace with \"\u{2581}\" and without a \
                 normalizer"
            );
            source.space_prefix = match metaspace["prepend_scheme"].as_str() {
                _ if metaspace["add_prefix_space"] == false => SpacePrefix::Never,
                None | Some("always") => SpacePrefix::UnlessSpace,
                Some("first") => SpacePrefix::FirstUnlessSpace,
                Some("never") => SpacePrefix::Never,
                Some(other) => bail!("pre_tokenizer.prepend_scheme is {other:?}"),
            };
            source.split_on_space = metaspace["split"] != false;
        }
        _ => bail!("pre_tokenizer is {}; supported: {SUPPORTED_PRETOKENIZERS}", tokenizer["pre_tokenizer"]),
    }
    let metaspace = pre_steps.first().is_some_and(|step| kind_of(step) == "Metaspace");
    ensure!(
        source.spaces_normalized || metaspace,
        "neither normalizer nor pre_tokenizer replaces spaces by \"\u{2581}\"; supported: \
         {SUPPORTED_PRETOKENIZERS}"
    );
    let decoder = &tokenizer["decoder"];
    let decoders = steps(decoder, "decoders");
    let kinds: Vec<&str> = decoders.iter().map(|step| kind_of(step)).collect();
    let replaces = decoders.first().is_some_and(|step| literal(step, "\u{2581}") && step["content"] == " ");
    source.strip_first_space = match kinds.as_slice() {
        ["Replace", "ByteFallback", "Fuse"] if replaces => false,
        ["Replace", "ByteFallback", "Fuse", "Strip"]
            if replaces && decoders[3]["content"] == " " && decoders[3]["start"] == 1 && decoders[3]["stop"] == 0 =>
        {
            true
        }
        _ => bail!(
            "decoder is {decoder}; supported for SentencePiece-style models is the Sequence Replace \
             \"\u{2581}\" by \" \", ByteFallback, Fuse and perhaps Strip of one \" \" at the start"
        ),
    };
    Ok(source)
}

/// Special tokens by their roles: from the post-processor and the files beside `tokenizer.json`.
fn set_special(source: &mut TokenizerSource, tokenizer: &Value, config: &Value, generation: &Value) -> Result<()> {
    let find = |content: &str| source.added.iter().find(|token| token.content == content).map(|token| token.id);
    // A token's name, or an object with its name.
    let named = |key: &str| {
        let value = &config[key];
        value.as_str().or_else(|| value["content"].as_str()).and_then(find)
    };
    // The first piece of the template, where it is a special token. What follows the text in a
    // template (an end token, in models that embed) is left out: generation continues the text.
    let template_bos = steps(&tokenizer["post_processor"], "processors")
        .iter()
        .find(|step| kind_of(step) == "TemplateProcessing")
        .and_then(|step| step["single"][0]["SpecialToken"]["id"].as_str())
        .and_then(find);
    let ids = |value: &Value| -> Vec<u32> {
        let list = match value {
            Value::Array(list) => list.clone(),
            value => vec![value.clone()],
        };
        list.iter()
            .filter_map(Value::as_u64)
            .filter(|&id| (id as usize) < source.tokens.len())
            .map(|id| id as u32)
            .collect()
    };
    let bos = template_bos.or_else(|| named("bos_token")).or_else(|| ids(&generation["bos_token_id"]).first().copied());
    let mut eos: Vec<u32> = named("eos_token").into_iter().collect();
    eos.extend(ids(&generation["eos_token_id"]));
    source.bos = bos;
    source.add_bos = config["add_bos_token"].as_bool().unwrap_or(template_bos.is_some());
    source.eos = eos;
    source.add_known_ends();
    ensure!(
        !source.add_bos || bos.is_some(),
        "tokenizer_config.json: add_bos_token is true, but there is no bos_token"
    );
    Ok(())
}
