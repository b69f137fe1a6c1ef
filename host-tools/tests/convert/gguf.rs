//! The GGUF parser against files that are cut off, lie, or have been changed at random.

use std::fs;
use std::io::Cursor;

use forebay::convert::ConvertOptions;
use forebay::gguf::{Gguf, Value, parse};
use proptest::prelude::*;

use crate::support::*;

/// A small file with values of every kind.
fn sample() -> Vec<u8> {
    let metadata = [
        ("general.architecture", Meta::Text("llama")),
        ("llama.block_count", Meta::U32(1)),
        ("llama.context_length", Meta::U32(64)),
        ("llama.embedding_length", Meta::U32(32)),
        ("llama.feed_forward_length", Meta::U32(32)),
        ("llama.attention.head_count", Meta::U32(2)),
        ("llama.attention.head_count_kv", Meta::I32s(vec![2])),
        ("llama.attention.layer_norm_rms_epsilon", Meta::F32(1e-5)),
    ];
    let mut tensors = Tensors::new();
    for name in ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"] {
        let name = format!("blk.0.{name}.weight");
        tensors.insert(name.clone(), Tensor::blocks(&[32, 32], 2, 32, 18, &name));
    }
    tensors.insert("token_embd.weight".into(), Tensor::blocks(&[40, 32], 8, 32, 34, "e"));
    for name in ["blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"] {
        tensors.insert(name.into(), Tensor::f32(&[32], &numbers(name, 32)));
    }
    gguf(&metadata, &tensors)
}

/// Elements and bytes of text that a header keeps in memory.
fn kept(header: &Gguf) -> usize {
    let value = |v: &Value| match v {
        Value::Text(s) => s.len(),
        Value::Ints(v) => v.len() * 8,
        Value::Floats(v) => v.len() * 4,
        Value::Bools(v) => v.len(),
        Value::Texts(v) => v.iter().map(|s| s.len() + 8).sum(),
        _ => 8,
    };
    header.metadata.iter().map(|(k, v)| k.len() + value(v)).sum::<usize>()
        + header.tensors.iter().map(|t| t.name.len() + 8 * t.dims.len()).sum::<usize>()
}

fn message(bytes: &[u8]) -> String {
    format!("{:#}", parse(Cursor::new(bytes)).expect_err("must be refused"))
}

#[test]
fn a_good_file() {
    let bytes = sample();
    let header = parse(Cursor::new(&bytes)).unwrap();
    assert_eq!(header.get("general.architecture"), Some(&Value::Text("llama".into())));
    assert_eq!(header.get("llama.attention.head_count_kv"), Some(&Value::Ints(vec![2])));
    assert_eq!(header.tensors.len(), 11);
    assert!(crate::fuzz::check(&bytes));
    let last = header.tensors.iter().map(|t| t.offset + t.len).max().unwrap();
    assert_eq!(last, bytes.len() as u64);
    let folder = Folder::new();
    fs::write(folder.join("a.gguf"), &bytes).unwrap();
    quietly(&folder.join("a.gguf"), &folder.join("a.fby"), &ConvertOptions::default()).unwrap();
    Image::open(&folder.join("a.fby"));
}

#[test]
fn every_cut_is_an_error() {
    let bytes = sample();
    for cut in 0..bytes.len() {
        let text = message(&bytes[..cut]);
        assert!(!text.is_empty());
    }
    let folder = Folder::new();
    fs::create_dir_all(folder.join("out")).unwrap();
    for cut in (0..bytes.len()).step_by(97) {
        fs::write(folder.join("a.gguf"), &bytes[..cut]).unwrap();
        let result = quietly(&folder.join("a.gguf"), &folder.join("out/a.fby"), &ConvertOptions::default());
        assert!(format!("{:#}", result.unwrap_err()).contains("a.gguf"));
        assert_eq!(fs::read_dir(folder.join("out")).unwrap().count(), 0);
    }
}

#[test]
fn lies_are_named() {
    let bytes = sample();
    let with = |at: usize, new: &[u8]| {
        let mut bytes = bytes.clone();
        bytes[at..at + new.len()].copy_from_slice(new);
        message(&bytes)
    };
    let find = |what: &[u8]| bytes.windows(what.len()).position(|w| w == what).unwrap();
    assert!(with(0, b"GGML").contains("not a GGUF file"));
    assert!(with(4, &1u32.to_le_bytes()).contains("version 1"));
    assert!(with(4, &3u32.to_be_bytes()).contains("big-endian"));
    for lie in [u64::MAX, 1 << 62, 1 << 40, 100_000] {
        assert!(with(8, &lie.to_le_bytes()).contains("tensors"), "{lie}");
        assert!(with(16, &lie.to_le_bytes()).contains("metadata pairs"), "{lie}");
        assert!(with(24, &lie.to_le_bytes()).contains("string"), "{lie}");
        let array = find(b"head_count_kv") + 13 + 8;
        assert!(with(array, &lie.to_le_bytes()).contains("head_count_kv"), "{lie}");
        let dims = find(b"token_embd.weight") + 17 + 4;
        assert!(with(dims, &lie.to_le_bytes()).contains("token_embd.weight"), "{lie}");
        assert!(with(dims + 8 + 8 + 4, &lie.to_le_bytes()).contains("token_embd.weight"), "{lie}");
    }
    let kind = find(b"token_embd.weight") + 17 + 4 + 16;
    assert!(with(kind, &99u32.to_le_bytes()).contains("type 99"));
    let unknown = find(b"llama.block_count") + 17;
    assert!(with(unknown, &13u32.to_le_bytes()).contains("llama.block_count"));
    assert!(with(find(b"llama.block_count"), &[0xff, 0xff]).contains("UTF-8"));
    let twice = find(b"blk.0.attn_k.weight") + 11;
    assert!(with(twice, b"q").contains("twice"));
}

#[test]
fn types_that_cannot_be_converted_are_named() {
    let mut bytes = sample();
    // IQ4_NL has blocks of the size of Q4_0's.
    let at = bytes.windows(19).position(|w| w == b"blk.0.attn_v.weight").unwrap() + 19 + 4 + 16;
    bytes[at..at + 4].copy_from_slice(&20u32.to_le_bytes());
    let folder = Folder::new();
    fs::write(folder.join("a.gguf"), &bytes).unwrap();
    let error = quietly(&folder.join("a.gguf"), &folder.join("a.fby"), &ConvertOptions::default()).unwrap_err();
    let error = format!("{error:#}");
    for word in ["a.gguf", "blk.0.attn_v.weight", "IQ4_NL", "Q4_0", "llama-quantize"] {
        assert!(error.contains(word), "{word}: {error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(3000) })]

    #[test]
    fn no_change_makes_it_panic(
        changes in prop::collection::vec((0usize..2000, any::<u8>()), 1..12),
        cut in 0usize..20_000,
    ) {
        let mut bytes = sample();
        for (at, byte) in changes {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        bytes.truncate(cut.max(24));
        crate::fuzz::run(&bytes);
        if let Ok(header) = parse(Cursor::new(&bytes)) {
            prop_assert!(kept(&header) <= 8 * bytes.len());
        }
    }

    #[test]
    fn noise_is_refused(noise in prop::collection::vec(any::<u8>(), 0..400)) {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(noise);
        if let Ok(header) = parse(Cursor::new(&bytes)) {
            prop_assert!(kept(&header) <= 8 * bytes.len());
        }
    }
}

#[test]
fn changed_files_convert_or_are_refused() {
    let folder = Folder::new();
    fs::create_dir_all(folder.join("out")).unwrap();
    let bytes = sample();
    let header = bytes.len() - 7 * 18 * 32 - 34 * 40 - 3 * 128;
    let mut state = 1u32;
    for _ in 0..400 {
        let mut changed = bytes.clone();
        for _ in 0..3 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let at = (state >> 8) as usize % header;
            changed[at] ^= 1 << (state % 8);
        }
        fs::write(folder.join("a.gguf"), &changed).unwrap();
        if quietly(&folder.join("a.gguf"), &folder.join("out/a.fby"), &ConvertOptions::default()).is_ok() {
            Image::open(&folder.join("out/a.fby"));
            fs::remove_file(folder.join("out/a.fby")).unwrap();
        }
        assert_eq!(fs::read_dir(folder.join("out")).unwrap().count(), 0);
    }
}
