//! References computed by other software: tokens, logits, routers' choices.

use std::path::Path;

use anyhow::{Context, Result};
use safetensors::{Dtype, SafeTensors};

/// A reference case.
#[derive(Clone, Debug)]
pub struct Reference {
    /// Prompt and greedy continuation.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt.
    pub prompt_len: usize,
    /// `[tokens][vocab]`.
    pub logits: Vec<f32>,
    /// Layer, chosen experts `[tokens][k]`, their weights.
    pub routers: Vec<(usize, Vec<u32>, Vec<f32>)>,
}

fn f32s(t: &safetensors::tensor::TensorView<'_>) -> Vec<f32> {
    assert_eq!(t.dtype(), Dtype::F32);
    t.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

fn ids(t: &safetensors::tensor::TensorView<'_>) -> Vec<u32> {
    assert_eq!(t.dtype(), Dtype::I32);
    t.data().chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// One f32 tensor of a safetensors file.
pub fn tensor(path: &Path, name: &str) -> Result<Vec<f32>> {
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    Ok(f32s(&SafeTensors::deserialize(&bytes)?.tensor(name)?))
}

/// Reads a case's `refs.safetensors` and `refs.json`.
pub fn load(dir: &Path) -> Result<Reference> {
    let path = dir.join("refs.safetensors");
    let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
    let file = SafeTensors::deserialize(&bytes)?;
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(dir.join("refs.json"))?)?;
    let prompt_len = json["prompt"].as_array().context("refs.json: no prompt")?.len();
    let mut routers = Vec::new();
    for name in file.names() {
        if let Some(layer) = name.strip_prefix("router.").and_then(|n| n.strip_suffix(".experts")) {
            let weights = f32s(&file.tensor(&format!("router.{layer}.weights"))?);
            routers.push((layer.parse()?, ids(&file.tensor(name)?), weights));
        }
    }
    routers.sort_by_key(|r| r.0);
    Ok(Reference { tokens: ids(&file.tensor("tokens")?), prompt_len, logits: f32s(&file.tensor("logits")?), routers })
}

/// Index of the largest element.
pub fn argmax(row: &[f32]) -> usize {
    (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
}

/// Largest difference, and the bound that the references ask for: 2e-4 of the larger of 1 and the largest logit.
pub fn difference(got: &[f32], want: &[f32]) -> (f32, f32) {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(1.0f32, |m, x| m.max(x.abs()));
    let worst = got.iter().zip(want).fold(0.0f32, |m, (a, b)| if (a - b).abs() <= m { m } else { (a - b).abs() });
    (worst, 2e-4 * largest)
}
