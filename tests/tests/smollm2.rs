//! SmolLM2-135M-Instruct, Q4_1: a real model against transformers and llama.cpp.
//!
//! The 98 MB file is not in the repository. README says how to get it; `FOREBAY_SMOLLM2` is its path.

use std::path::{Path, PathBuf};

use forebay::convert::{ConvertOptions, WeightChoice};
use forebay_conformance::reference::argmax;
use forebay_conformance::{Run, Setup, image_of, run, skipped};
use forebay_kernels::attention::KvFormat;
use serde_json::Value;

fn model() -> Option<PathBuf> {
    match std::env::var_os("FOREBAY_SMOLLM2") {
        Some(path) => Some(path.into()),
        None => {
            skipped("FOREBAY_SMOLLM2 does not name SmolLM2-135M-Instruct.Q4_1.gguf (see README)");
            None
        }
    }
}

fn references() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/smollm2/refs.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

fn setup() -> Setup {
    Setup { batch: 64, logit_rows: 16, kv: KvFormat::F16, workers: 2, context: 512, ..Setup::default() }
}

/// Natural-log probability of each token but the first, and the whole run.
fn log_probabilities(run: &Run, tokens: &[u32]) -> Vec<f64> {
    let vocab = run.logits.len() / tokens.len();
    let rows = run.logits.chunks_exact(vocab).zip(&tokens[1..]);
    rows.map(|(row, &next)| {
        let top = row.iter().copied().fold(f32::MIN, f32::max);
        let sum: f64 = row.iter().map(|x| f64::from(x - top).exp()).sum();
        f64::from(row[next as usize] - top) - sum.ln()
    })
    .collect()
}

/// Steps of the recorded greedy continuations at which the image's best token is another: the gap between the two
/// best logits there. `common` says how many steps of a prompt count.
fn misses(image: &[u8], setup: &Setup, common: impl Fn(&Value) -> usize) -> (usize, Vec<f64>) {
    let (mut steps, mut gaps) = (0, Vec::new());
    for prompt in references()["prompts"].as_array().unwrap() {
        let (prompt_ids, greedy) = (ids(&prompt["ids"]), ids(&prompt["greedy"]));
        let tokens: Vec<u32> = prompt_ids.iter().chain(&greedy).copied().collect();
        let got = run(image, setup, &tokens).unwrap();
        let vocab = got.logits.len() / tokens.len();
        for (step, want) in greedy[..common(prompt)].iter().enumerate() {
            let row = &got.logits[(prompt_ids.len() + step - 1) * vocab..][..vocab];
            steps += 1;
            if argmax(row) != *want as usize {
                gaps.push(prompt["gaps"][step].as_f64().unwrap());
            }
        }
    }
    (steps, gaps)
}

/// The same weights in f32, with f32 activations, keys and values: every greedy token of transformers and llama.cpp.
#[test]
fn greedy_tokens_in_f32() {
    let Some(path) = model() else { return };
    let options = ConvertOptions { weights: Some(WeightChoice::F32), ..ConvertOptions::default() };
    let image = image_of(&path, &options).unwrap();
    let (steps, gaps) = misses(&image, &Setup { kv: KvFormat::F32, ..setup() }, |_| 32);
    assert_eq!((steps, gaps), (160, vec![]));
}

/// With 8-bit activations: the tokens that llama.cpp's 4-bit kernels and transformers agree on, but for near ties.
#[test]
fn greedy_tokens_and_perplexity() {
    let Some(path) = model() else { return };
    let refs = references();
    let image = image_of(&path, &ConvertOptions::default()).unwrap();
    let both = |prompt: &Value| prompt["llamacpp_q4_1_common_prefix"].as_u64().unwrap() as usize;
    let (steps, gaps) = misses(&image, &setup(), both);
    println!("{steps} greedy tokens, another one at gaps {gaps:?}");
    assert!(steps > 90 && gaps.len() <= 2 && gaps.iter().all(|gap| *gap < 0.05), "{gaps:?}");
    let ppl = &refs["ppl"];
    let window = ppl["window"].as_u64().unwrap() as usize;
    let tokens = ids(&ppl["tokens"]);
    let (mut sum, mut count) = (0.0, 0);
    for chunk in tokens.chunks(window) {
        let scored = log_probabilities(&run(&image, &setup(), chunk).unwrap(), chunk);
        sum += scored.iter().sum::<f64>();
        count += scored.len();
    }
    assert_eq!(count as u64, ppl["scored"].as_u64().unwrap());
    let got = (-sum / count as f64).exp();
    for peer in ["transformers_f32", "llamacpp_f32", "llamacpp_q4_1"] {
        let want = ppl[peer].as_f64().unwrap();
        println!("perplexity {got:.4}, {peer} {want:.4}: {:+.3} %", (got / want - 1.0) * 100.0);
        assert!((got / want - 1.0).abs() < 0.005, "{peer}");
    }
}
