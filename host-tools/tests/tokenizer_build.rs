//! What the builder refuses, and in which words; how long the sections are.

mod tokenizer_support;

use forebay::tokenizer::{GgufTokenizer, Merge, TokenizerSource, build, from_gguf_fields};
use forebay_runtime::tokenizer::{Kind, Pretokenizer};
use serde_json::{Value, json};

fn tiny_json() -> Value {
    let path = format!("{}/tokenizer.json", tokenizer_support::TINY);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The message for the bundled model's file with one place changed.
fn refusal(path: &str, value: Value) -> String {
    let mut json = tiny_json();
    *json.pointer_mut(path).unwrap() = value;
    let error = TokenizerSource::from_hf_json(&json, &Value::Null, &Value::Null).unwrap_err();
    format!("{error:#}")
}

#[test]
fn unknown_pipelines_are_refused_by_their_path() {
    let split = |pattern: &str, behavior: &str| {
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false}]})
    };
    for (path, value, words) in [
        ("/pre_tokenizer", json!({"type": "Whitespace"}), "pre_tokenizer is "),
        ("/pre_tokenizer", Value::Null, "neither normalizer nor pre_tokenizer replaces spaces"),
        ("/pre_tokenizer", split(r"\w+", "Isolated"), "pre_tokenizer.pretokenizers[0].pattern is "),
        (
            "/pre_tokenizer",
            split(tokenizer_support::LLAMA3, "Removed"),
            "pre_tokenizer.pretokenizers[0]: behavior \"Removed\"",
        ),
        ("/pre_tokenizer/add_prefix_space", json!(true), "pre_tokenizer.add_prefix_space is not false"),
        ("/pre_tokenizer/use_regex", json!(false), "use_regex false"),
        ("/normalizer", json!({"type": "NFKC"}), "normalizer is "),
        ("/decoder", json!({"type": "WordPiece"}), "decoder is "),
        ("/model/type", json!("Unigram"), "model.type is \"Unigram\""),
        ("/model/dropout", json!(0.1), "model.dropout is 0.1"),
        ("/model/end_of_word_suffix", json!("</w>"), "model.end_of_word_suffix is "),
        ("/model/byte_fallback", json!(true), "model.byte_fallback: "),
        ("/model/unk_token", json!("<unk>"), "model.unk_token \"<unk>\" is not in model.vocab"),
        ("/model/merges/7", json!(["q", "no such token"]), "model.merges[7]: \"no such token\""),
        ("/model/merges/7", json!("alone"), "model.merges[7] is not a pair"),
        ("/model/vocab/!", json!(4), "model.vocab: id 4 occurs twice"),
        ("/model/vocab/!", json!(-1), "model.vocab[\"!\"]"),
        ("/added_tokens/0/single_word", json!(true), "added_tokens[0]: \"<|pad|>\": single_word"),
        ("/added_tokens/1/id", json!(77), "added_tokens[1]: \"<|startoftext|>\" has id 77"),
        ("/added_tokens/2/content", json!(""), "added token 2 has no content"),
    ] {
        let message = refusal(path, value);
        assert!(message.contains(words), "{path}: {message}");
    }
    let json = tiny_json();
    let error = TokenizerSource::from_hf_json(&json, &json!({"add_bos_token": true}), &Value::Null);
    assert!(error.unwrap().add_bos);
    let mut bare = json;
    bare["post_processor"] = Value::Null;
    let error = TokenizerSource::from_hf_json(&bare, &json!({"add_bos_token": true}), &Value::Null);
    assert!(format!("{:#}", error.unwrap_err()).contains("there is no bos_token"));
    let missing = TokenizerSource::from_hf_dir(env!("CARGO_MANIFEST_DIR")).unwrap_err();
    assert!(format!("{missing:#}").contains("no tokenizer.json in"));
}

#[test]
fn gguf_fields_that_contradict_each_other_are_refused() {
    let tokens = ["a", "b", "ab", "▁"].map(str::to_owned);
    let merges = ["a b".to_owned()];
    let good = GgufTokenizer {
        model: "gpt2",
        pre: Some("gpt-2"),
        tokens: &tokens,
        merges: &merges,
        ..GgufTokenizer::default()
    };
    assert!(build(&from_gguf_fields(&good).unwrap()).is_ok());
    let stray = ["a c".to_owned()];
    let single = ["a".to_owned()];
    for (fields, words) in [
        (GgufTokenizer { model: "bert", ..good.clone() }, "tokenizer.ggml.model is \"bert\""),
        (GgufTokenizer { pre: Some("gpt-4o"), ..good.clone() }, "tokenizer.ggml.pre is Some(\"gpt-4o\")"),
        (GgufTokenizer { pre: None, ..good.clone() }, "tokenizer.ggml.pre is None"),
        (GgufTokenizer { token_types: &[1, 1], ..good.clone() }, "2 entries for 4 tokens"),
        (GgufTokenizer { merges: &[], ..good.clone() }, "tokenizer.ggml.merges is missing"),
        (GgufTokenizer { merges: &stray, ..good.clone() }, "tokenizer.ggml.merges[0]: \"c\""),
        (GgufTokenizer { merges: &single, ..good.clone() }, "tokenizer.ggml.merges[0] is not a pair"),
        (
            GgufTokenizer { model: "llama", merges: &[], ..good.clone() },
            "tokenizer.ggml.scores has 0 entries for 4 tokens",
        ),
        (GgufTokenizer { model: "llama", tokens: &tokens[..3], ..good.clone() }, "no token for U+2581"),
    ] {
        let message = format!("{:#}", from_gguf_fields(&fields).unwrap_err());
        assert!(message.contains(words), "{message}");
    }
}

#[test]
fn a_source_that_contradicts_itself_is_not_built() {
    let mut source = TokenizerSource::new(Kind::ByteLevel, Pretokenizer::Gpt2);
    assert!(format!("{:#}", build(&source).unwrap_err()).contains("vocabulary is empty"));
    source.tokens = vec![b"a".to_vec(), b"aa".to_vec()];
    source.model_tokens = vec![0, 1];
    let merge = Merge { left: 0, right: 0, result: 1, rank: 0 };
    source.merges = vec![merge, Merge { rank: 1, ..merge }];
    assert!(format!("{:#}", build(&source).unwrap_err()).contains("merged twice"));
    source.merges = vec![Merge { result: 2, ..merge }];
    assert!(format!("{:#}", build(&source).unwrap_err()).contains("merge 0"));
    source.merges = vec![merge];
    source.eos = vec![5];
    assert!(format!("{:#}", build(&source).unwrap_err()).contains("end tokens"));
    source.eos = vec![1];
    assert!(build(&source).is_ok());
}

#[test]
fn the_section_stays_small() {
    // The bundled model's: 4096 tokens, 3837 merges.
    let source = TokenizerSource::from_hf_dir(tokenizer_support::TINY).unwrap();
    let len = build(&source).unwrap().len();
    assert!((60_000..85_000).contains(&len), "{len} bytes");
}
