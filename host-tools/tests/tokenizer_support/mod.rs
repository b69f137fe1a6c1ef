//! What the tokenizer tests share: models' pipelines, trained vocabularies, generated texts.
#![allow(dead_code)]

use std::str::FromStr;
use std::sync::LazyLock;

use forebay::tokenizer::{TokenizerSource, build};
use forebay_runtime::tokenizer::{EncodeOptions, Tokenizer};
use serde_json::{Value, json};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::BpeTrainer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

pub const MULTILINGUAL: &str = include_str!("../fixtures/multilingual.txt");
/// Folder of the bundled model.
pub const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny-lfm2moe");

pub const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A tokenizer in both forms.
pub struct Pair {
    pub name: &'static str,
    pub oracle: tokenizers::Tokenizer,
    /// Lives as long as the test.
    pub section: &'static [u8],
    pub ours: Tokenizer<'static>,
    /// Added tokens, to be scattered over the texts.
    pub added: Vec<String>,
}

impl Pair {
    pub fn new(name: &'static str, json: &Value, config: &Value) -> Self {
        let oracle = tokenizers::Tokenizer::from_str(&json.to_string()).unwrap();
        let source = TokenizerSource::from_hf_json(json, config, &Value::Null).unwrap();
        Self::of(name, oracle, &source)
    }

    pub fn of(name: &'static str, oracle: tokenizers::Tokenizer, source: &TokenizerSource) -> Self {
        let section: &[u8] = build(source).unwrap().leak();
        Self {
            name,
            oracle,
            section,
            ours: Tokenizer::parse(section).unwrap(),
            added: source.added.iter().map(|token| token.content.clone()).collect(),
        }
    }
}

pub fn encode(tokenizer: &Tokenizer<'_>, text: &str, options: EncodeOptions) -> Vec<u32> {
    let mut scratch = vec![0; Tokenizer::encode_scratch(text.len())];
    let mut ids = vec![0; text.len() + 2];
    let len = tokenizer.encode(text, options, &mut scratch, &mut ids).unwrap();
    ids.truncate(len);
    ids
}

pub fn decode(tokenizer: &Tokenizer<'_>, ids: &[u32], skip_special: bool) -> String {
    let mut text = String::new();
    let mut decoder = tokenizer.decoder().skip_special(skip_special);
    for &id in ids {
        decoder.push(id, &mut |part| text.push_str(part));
    }
    decoder.finish(&mut |part| text.push_str(part));
    text
}

/// Text to train on: the multilingual fixture and the builder's own source.
fn corpus() -> Vec<String> {
    let sources = [
        include_str!("../../src/tokenizer/hf.rs"),
        include_str!("../../src/tokenizer/gguf.rs"),
        include_str!("../../src/tokenizer/build.rs"),
        include_str!("../../../runtime/src/tokenizer/pretokenize.rs"),
    ];
    let mut lines: Vec<String> = MULTILINGUAL.lines().map(str::to_owned).collect();
    for source in sources {
        lines.push(source.to_owned());
    }
    lines.push("It's we're I've I'm they'll she'd IT'S WE'RE 12 123 1234 2024 1,234.56  \n\n\t x\r\n".repeat(3));
    lines
}

pub fn added(id: u32, content: &str, special: bool) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
           "normalized": false, "special": special})
}

fn pipeline(normalizer: Value, pre_tokenizer: Value, decoder: Value, model: Value) -> Value {
    json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
           "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": null,
           "decoder": decoder, "model": model})
}

fn bpe() -> Value {
    json!({"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
           "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
           "ignore_merges": false, "vocab": {}, "merges": []})
}

/// The `model` object of a BPE trained with a pipeline; `first` are the first tokens.
fn train(pipeline: &Value, size: usize, alphabet: bool, first: &[String]) -> Value {
    let mut tokenizer = tokenizers::Tokenizer::from_str(&pipeline.to_string()).unwrap();
    let mut builder = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(size)
        .special_tokens(first.iter().map(|token| tokenizers::AddedToken::from(token.clone(), true)).collect());
    if alphabet {
        builder = builder.initial_alphabet(ByteLevel::alphabet().into_iter().collect());
    }
    let mut trainer = TrainerWrapper::BpeTrainer(builder.build());
    tokenizer.train(&mut trainer, corpus().into_iter()).unwrap();
    let text = tokenizer.to_string(false).unwrap();
    serde_json::from_str::<Value>(&text).unwrap()["model"].clone()
}

fn byte_level(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
           "use_regex": use_regex})
}

fn split(pattern: &str) -> Value {
    json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
        byte_level(false)]})
}

/// A byte-level tokenizer with a vocabulary trained for its own pipeline.
fn trained_byte_level(normalizer: Value, pre_tokenizer: Value, size: usize) -> Value {
    let mut json = pipeline(normalizer, pre_tokenizer, byte_level(true), bpe());
    json["model"] = train(&json, size, true, &[]);
    json
}

fn vocab_len(json: &Value) -> u32 {
    json["model"]["vocab"].as_object().unwrap().len() as u32
}

fn template(bos: &str, id: u32) -> Value {
    json!({"type": "TemplateProcessing",
           "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
           "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
           "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}}})
}

pub fn tiny() -> Pair {
    let source = TokenizerSource::from_hf_dir(TINY).unwrap();
    let oracle = tokenizers::Tokenizer::from_file(format!("{TINY}/tokenizer.json")).unwrap();
    Pair::of("tiny (GPT-2)", oracle, &source)
}

pub fn smollm() -> Pair {
    let pre = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": true}, byte_level(true)]});
    let mut json = trained_byte_level(Value::Null, pre, 1500);
    let n = vocab_len(&json);
    let names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"];
    json["added_tokens"] = (n..).zip(names).map(|(id, name)| added(id, name, true)).collect();
    Pair::new("SmolLM2", &json, &json!({"eos_token": "<|im_end|>"}))
}

pub fn llama3() -> Pair {
    let mut json = trained_byte_level(Value::Null, split(LLAMA3), 2500);
    let n = vocab_len(&json);
    json["model"]["ignore_merges"] = true.into();
    // Makes a token that no merge gives, for `ignore_merges` to find.
    json["model"]["vocab"]["Ġunreachable"] = n.into();
    let names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>"];
    let mut tokens: Vec<Value> = (n + 1..).zip(names).map(|(id, name)| added(id, name, true)).collect();
    tokens.extend((0..40).map(|i| added(n + 5 + i, &format!("<|reserved_special_token_{i}|>"), true)));
    json["added_tokens"] = tokens.into();
    json["post_processor"] = json!({"type": "Sequence", "processors": [
        {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true},
        template("<|begin_of_text|>", n + 1)]});
    Pair::new("Llama-3", &json, &json!({"eos_token": "<|eot_id|>"}))
}

pub fn lfm2() -> Pair {
    let mut json = trained_byte_level(Value::Null, split(LLAMA3), 2000);
    let n = vocab_len(&json);
    let mut tokens: Vec<Value> = ["<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>"]
        .iter()
        .zip(n..)
        .map(|(name, id)| added(id, name, true))
        .collect();
    // Text tokens of all kinds: overlapping, taking white space along, in the second pass.
    for (id, (content, lstrip, rstrip, normalized)) in (n + 4..).zip([
        ("<think>", false, false, false),
        ("</think>", false, true, false),
        ("<tool", true, false, false),
        ("<tool_call>", true, true, false),
        ("  ", false, false, true),
        ("    ", false, false, true),
        ("dignity", true, false, true),
        ("éé", false, false, true),
    ]) {
        tokens.push(json!({"id": id, "content": content, "single_word": false, "lstrip": lstrip,
            "rstrip": rstrip, "normalized": normalized, "special": false}));
    }
    json["added_tokens"] = tokens.into();
    json["post_processor"] = template("<|startoftext|>", n + 1);
    Pair::new("LFM2", &json, &json!({"eos_token": {"content": "<|endoftext|>"}}))
}

pub fn qwen2() -> Pair {
    let mut json = trained_byte_level(json!({"type": "NFC"}), split(QWEN2), 1800);
    let n = vocab_len(&json);
    json["added_tokens"] = json!([
        added(n, "<|endoftext|>", true),
        added(n + 1, "<|im_start|>", true),
        added(n + 2, "<|im_end|>", true),
        added(n + 3, "<tool_call>", false)
    ]);
    Pair::new("Qwen2", &json, &json!({"eos_token": "<|im_end|>", "add_bos_token": false}))
}

/// A SentencePiece-style vocabulary with byte tokens, as in Llama-2, without a pipeline around it.
pub fn sentencepiece_model() -> Value {
    let mut first: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    first.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always",
                           "split": true});
    let json = pipeline(Value::Null, metaspace, Value::Null, bpe());
    let mut model = train(&json, 1900, false, &first);
    // Some characters are left to fall back to bytes.
    for c in ["ጻ", "遵", "í", "x"] {
        model["vocab"].as_object_mut().unwrap().remove(c);
        let holds = |text: &Value| text.as_str().is_some_and(|text| text.contains(c));
        model["merges"].as_array_mut().unwrap().retain(|merge| !merge.as_array().unwrap().iter().any(holds));
    }
    let mut ids: Vec<(String, u64)> =
        model["vocab"].as_object().unwrap().iter().map(|(text, id)| (text.clone(), id.as_u64().unwrap())).collect();
    ids.sort_by_key(|&(_, id)| id);
    model["vocab"] = ids.into_iter().zip(0u32..).map(|((text, _), id)| (text, Value::from(id))).collect();
    let n = model["vocab"].as_object().unwrap().len();
    for (id, spaces) in (n..).zip(["▁▁", "▁▁▁▁", "▁▁▁▁▁▁▁▁"]) {
        model["vocab"][spaces] = id.into();
        let half: String = spaces.chars().take(spaces.chars().count() / 2).collect();
        model["merges"].as_array_mut().unwrap().push(json!([half, half]));
    }
    model["unk_token"] = "<unk>".into();
    model["fuse_unk"] = true.into();
    model["byte_fallback"] = true.into();
    model
}

fn sentencepiece(normalizer: Value, pre_tokenizer: Value, strip: bool) -> Value {
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if strip {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let decoder = json!({"type": "Sequence", "decoders": decoders});
    let mut json = pipeline(normalizer, pre_tokenizer, decoder, sentencepiece_model());
    json["added_tokens"] = json!([added(0, "<unk>", true), added(1, "<s>", true), added(2, "</s>", true)]);
    json["post_processor"] = template("<s>", 1);
    json
}

fn replace() -> Value {
    json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
}

fn prepend_replace() -> Value {
    json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace()]})
}

pub fn llama2() -> Pair {
    let json = sentencepiece(prepend_replace(), Value::Null, true);
    Pair::new("Llama-2", &json, &json!({"eos_token": "</s>"}))
}

/// Llama-2 with tokens of the second pass, and without byte fallback.
pub fn llama2_normalized() -> Pair {
    let mut json = sentencepiece(prepend_replace(), Value::Null, true);
    json["model"]["byte_fallback"] = false.into();
    json["model"]["fuse_unk"] = false.into();
    for token in json["added_tokens"].as_array_mut().unwrap() {
        token["normalized"] = true.into();
    }
    let mut strip = added(5000, "<strip me>", false);
    strip["normalized"] = true.into();
    strip["lstrip"] = true.into();
    strip["rstrip"] = true.into();
    json["added_tokens"].as_array_mut().unwrap().push(strip);
    // The crate numbers added tokens on from the vocabulary.
    let next = json["model"]["vocab"].as_object().unwrap().len();
    json["added_tokens"][3]["id"] = next.into();
    Pair::new("Llama-2, normalized tokens", &json, &json!({}))
}

pub fn metaspace(scheme: &str, split: bool, name: &'static str) -> Pair {
    let pre = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split});
    Pair::new(name, &sentencepiece(Value::Null, pre, true), &Value::Null)
}

pub fn gemma() -> Pair {
    let pre = json!({"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
                     "invert": false});
    Pair::new("Gemma", &sentencepiece(replace(), pre, false), &Value::Null)
}

pub fn all() -> Vec<Pair> {
    vec![
        tiny(),
        smollm(),
        llama3(),
        lfm2(),
        qwen2(),
        llama2(),
        llama2_normalized(),
        metaspace("first", false, "Metaspace first"),
        metaspace("always", true, "Metaspace always, split"),
        gemma(),
    ]
}

/// SplitMix64 (Steele et al., 2014): small, seeded, the same everywhere.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub fn pick<'t, T>(&mut self, from: &'t [T]) -> &'t T {
        &from[self.below(from.len())]
    }

    fn char_of(&mut self, low: u32, high: u32) -> char {
        loop {
            let code = low + self.below((high - low) as usize) as u32;
            if let Some(c) = char::from_u32(code) {
                return c;
            }
        }
    }
}

const SCRIPTS: [(u32, u32); 16] = [
    (0x20, 0x7f),
    (0x20, 0x7f),
    (0xa0, 0x250),
    (0x300, 0x370),
    (0x370, 0x530),
    (0x590, 0x700),
    (0x900, 0xa00),
    (0xe00, 0xe80),
    (0x1200, 0x1380),
    (0x2000, 0x2070),
    (0x2150, 0x2190),
    (0x3000, 0x3100),
    (0x4e00, 0x5000),
    (0xac00, 0xad00),
    (0x1f300, 0x1f650),
    (0x1d7c0, 0x1d800),
];

const SNIPPETS: [&str; 48] = [
    "'s",
    "'S",
    "'t",
    "'T",
    "'re",
    "'RE",
    "'rE",
    "'ve",
    "'Ve",
    "'m",
    "'M",
    "'ll",
    "'LL",
    "'d",
    "'D",
    "'\u{17f}",
    "'x",
    "''s",
    "it's",
    "WE'RE",
    "0",
    "7",
    "12",
    "123",
    "1234567",
    "½",
    "Ⅷ",
    "٣٤٥",
    "一二",
    "👩‍👩‍👧‍👦",
    "🏳️‍🌈",
    "👍🏽",
    "e\u{301}",
    "a\u{308}\u{323}",
    "\u{feff}",
    "\u{200d}",
    "\u{85}",
    "\u{a0}",
    "\u{2028}",
    "\u{3000}",
    "\u{0}",
    "\u{1b}",
    "\u{7f}",
    "▁",
    "▁▁ ",
    "_",
    "<|",
    "|>",
];

const WHITE: [&str; 12] = [" ", "  ", "   ", "        ", "\n", "\n\n", "\r\n", "\t", " \n", "\n ", "\u{b}", "\u{c}"];

/// A text of mixed scripts, words, numbers, white space, control characters and added tokens.
pub fn text(random: &mut Random, added: &[String]) -> String {
    static WORDS: LazyLock<Vec<&str>> = LazyLock::new(|| MULTILINGUAL.split(' ').collect());
    let mut text = String::new();
    let parts = 1 + random.below(14);
    for _ in 0..parts {
        match random.below(10) {
            0 | 1 => text.push_str(random.pick::<&str>(&WHITE)),
            2 | 3 => {
                text.push(' ');
                text.push_str(random.pick::<&str>(&WORDS));
            }
            4 => text.push_str(random.pick::<&str>(&WORDS)),
            5 | 6 => text.push_str(random.pick::<&str>(&SNIPPETS)),
            7 => {
                let &(low, high) = random.pick(&SCRIPTS);
                for _ in 0..=random.below(6) {
                    text.push(random.char_of(low, high));
                }
            }
            8 => text.push(random.char_of(0, 0x11_0000)),
            _ if added.is_empty() => text.push('!'),
            _ => text.push_str(random.pick(added).as_str()),
        }
        if random.below(4) == 0 {
            text.push(' ');
        }
    }
    // Now and then a long run without a border.
    if random.below(100) == 0 {
        let run = random.pick::<&str>(&["a", "ab", " ", "\n", "7", "-", "éé", "ñandú", "漢"]);
        text.push_str(&run.repeat(200 + random.below(800)));
    }
    text
}
