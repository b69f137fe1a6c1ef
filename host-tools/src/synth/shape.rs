//! The shapes of known models: every number that decides how large their tensors are and how they are used.

use anyhow::{Result, ensure};

use super::weights::Law;
use crate::arch::QkNorm;
use crate::gguf::{GgmlType, Value, type_by_name};
use crate::tokenizer::byte_alphabet;

/// The shape of a mixture of experts, as published by its maker.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    /// Name on the command line.
    pub name: &'static str,
    /// `general.architecture`.
    pub architecture: &'static str,
    /// Decoder layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: u64,
    /// Query heads.
    pub heads: u64,
    /// Key and value heads.
    pub kv_heads: u64,
    /// Width of a head.
    pub head_dim: u64,
    /// Layers with attention, where the others have LFM2's short convolution; `None` if all have it.
    pub attention: Option<&'static [usize]>,
    /// Taps of the convolution.
    pub taps: u64,
    /// Norm of queries and keys.
    pub qk_norm: QkNorm,
    /// First layers with a dense feed-forward.
    pub dense_layers: usize,
    /// Neurons of a dense feed-forward.
    pub dense_width: u64,
    /// Experts.
    pub experts: u64,
    /// Experts a token.
    pub top_k: u64,
    /// Neurons of an expert.
    pub expert_width: u64,
    /// Whether scores are sigmoids, with a bias on the selection, rather than a softmax.
    pub sigmoid: bool,
    /// Whether the chosen experts' weights sum to 1.
    pub normalise: bool,
    /// Tokens.
    pub vocab: u64,
    /// Longest sequence.
    pub context: u64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Epsilon of every RMSNorm.
    pub norm_eps: f64,
    /// Whether the embedding is the output head.
    pub tied: bool,
}

/// The models that can be made, from their config.json: LiquidAI/LFM2-8B-A1B, allenai/OLMoE-1B-7B-0924,
/// Qwen/Qwen3-30B-A3B, mistralai/Mixtral-8x7B-v0.1.
pub const SHAPES: &[Shape] = &[
    Shape {
        name: "lfm2-8b-a1b",
        architecture: "lfm2moe",
        layers: 24,
        hidden: 2048,
        heads: 32,
        kv_heads: 8,
        head_dim: 64,
        attention: Some(&[2, 6, 10, 14, 18, 21]),
        taps: 3,
        qk_norm: QkNorm::Head,
        dense_layers: 2,
        dense_width: 7168,
        experts: 32,
        top_k: 4,
        expert_width: 1792,
        sigmoid: true,
        normalise: true,
        vocab: 65_536,
        context: 128_000,
        rope_theta: 1e6,
        norm_eps: 1e-5,
        tied: true,
    },
    Shape {
        name: "olmoe-1b-7b",
        architecture: "olmoe",
        layers: 16,
        hidden: 2048,
        heads: 16,
        kv_heads: 16,
        head_dim: 128,
        attention: None,
        taps: 0,
        qk_norm: QkNorm::Whole,
        dense_layers: 0,
        dense_width: 0,
        experts: 64,
        top_k: 8,
        expert_width: 1024,
        sigmoid: false,
        normalise: false,
        vocab: 50_304,
        context: 4096,
        rope_theta: 10_000.0,
        norm_eps: 1e-5,
        tied: false,
    },
    Shape {
        name: "qwen3-30b-a3b",
        architecture: "qwen3moe",
        layers: 48,
        hidden: 2048,
        heads: 32,
        kv_heads: 4,
        head_dim: 128,
        attention: None,
        taps: 0,
        qk_norm: QkNorm::Head,
        dense_layers: 0,
        dense_width: 0,
        experts: 128,
        top_k: 8,
        expert_width: 768,
        sigmoid: false,
        normalise: true,
        vocab: 151_936,
        context: 40_960,
        rope_theta: 1e6,
        norm_eps: 1e-6,
        tied: false,
    },
    Shape {
        name: "mixtral-8x7b",
        architecture: "llama",
        layers: 32,
        hidden: 4096,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        attention: None,
        taps: 0,
        qk_norm: QkNorm::None,
        dense_layers: 0,
        dense_width: 0,
        experts: 8,
        top_k: 2,
        expert_width: 14_336,
        sigmoid: false,
        normalise: true,
        vocab: 32_000,
        context: 32_768,
        rope_theta: 1e6,
        norm_eps: 1e-5,
        tied: false,
    },
];

/// A tensor to be made.
#[derive(Clone, Debug)]
pub(super) struct Spec {
    /// Name in GGUF.
    pub name: String,
    /// Dimensions, slowest first.
    pub shape: Vec<u64>,
    /// Element type.
    pub kind: GgmlType,
    /// How its values are drawn.
    pub law: Law,
}

/// Share of the residual stream's variance at its end that the layers have added to the embedding's 1.
const GROWTH: f64 = 0.5;
/// Mean square of `silu(a) * b` for independent normal `a` and `b`.
const SWIGLU_POWER: f64 = 0.356;

impl Shape {
    /// The shape of this name.
    #[must_use]
    pub fn by_name(name: &str) -> Option<&'static Self> {
        SHAPES.iter().find(|shape| shape.name == name)
    }

    /// The same with only the first `layers` layers.
    ///
    /// # Errors
    /// There are fewer, or no layer with experts is left.
    pub fn cut(&self, layers: usize) -> Result<Self> {
        let least = self.dense_layers + 1;
        ensure!(
            (least..=self.layers).contains(&layers),
            "{} layers of {}, expected {least} to {}",
            layers,
            self.name,
            self.layers
        );
        Ok(Self { layers, ..self.clone() })
    }

    fn has_attention(&self, layer: usize) -> bool {
        self.attention.is_none_or(|layers| layers.contains(&layer))
    }

    /// Variance that each sub-layer adds to the residual stream.
    fn step(&self) -> f64 {
        GROWTH / (2 * self.layers) as f64
    }

    /// Mean square of the residual stream where the router of `layer` sees it.
    pub(super) fn power(&self, layer: usize) -> f64 {
        1.0 + self.step() * (2 * layer + 1) as f64
    }

    /// The tensors, in the order of a GGUF file. Matrices that are streamed or multiplied have elements of `kind`.
    pub(super) fn tensors(&self, kind: GgmlType) -> Result<Vec<Spec>> {
        let known = |name| type_by_name(name).ok_or_else(|| anyhow::anyhow!("no type {name}"));
        let (f32s, q8) = (known("F32")?, known("Q8_0")?);
        let mut list = Vec::new();
        let mut add = |name: String, kind, shape: &[u64], law| list.push(Spec { name, shape: shape.into(), kind, law });
        let (h, q, kv) = (self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let fan_in = |n: u64| 1.0 / (n as f64).sqrt();
        let into = |n: u64| Law::Codes { std: fan_in(n), quiet: false };
        // Back into the residual stream: `power` is the mean square of the input.
        let out = |n: u64, power: f64| Law::Codes { std: fan_in(n) * (self.step() / power).sqrt(), quiet: true };
        add("token_embd.weight".into(), q8, &[self.vocab, h], Law::Tokens { head: false });
        if !self.tied {
            add("output.weight".into(), q8, &[self.vocab, h], Law::Tokens { head: true });
        }
        let final_norm = if self.architecture == "lfm2moe" { "token_embd_norm.weight" } else { "output_norm.weight" };
        add(final_norm.into(), f32s, &[h], Law::FinalNorm);
        for l in 0..self.layers {
            let name = |rest: &str| format!("blk.{l}.{rest}");
            add(name("attn_norm.weight"), f32s, &[h], Law::Ones);
            add(name("ffn_norm.weight"), f32s, &[h], Law::Ones);
            if self.has_attention(l) {
                add(name("attn_q.weight"), kind, &[q, h], into(h));
                add(name("attn_k.weight"), kind, &[kv, h], into(h));
                add(name("attn_v.weight"), kind, &[kv, h], into(h));
                add(name("attn_output.weight"), kind, &[h, q], out(q, 1.0));
                let norms = match self.qk_norm {
                    QkNorm::None => None,
                    QkNorm::Head => Some((self.head_dim, self.head_dim)),
                    QkNorm::Whole => Some((q, kv)),
                };
                if let Some((q, k)) = norms {
                    add(name("attn_q_norm.weight"), f32s, &[q], Law::Ones);
                    add(name("attn_k_norm.weight"), f32s, &[k], Law::Ones);
                }
            } else {
                add(name("shortconv.conv.weight"), f32s, &[h, self.taps], Law::Normal { std: fan_in(self.taps) });
                add(name("shortconv.in_proj.weight"), kind, &[3 * h, h], into(h));
                add(name("shortconv.out_proj.weight"), kind, &[h, h], out(h, 1.0));
            }
            if l < self.dense_layers {
                let n = self.dense_width;
                add(name("ffn_gate.weight"), kind, &[n, h], into(h));
                add(name("ffn_up.weight"), kind, &[n, h], into(h));
                add(name("ffn_down.weight"), kind, &[h, n], out(n, SWIGLU_POWER));
                continue;
            }
            let (e, n) = (self.experts, self.expert_width);
            add(name("ffn_gate_inp.weight"), f32s, &[e, h], Law::Gate { layer: l });
            if self.sigmoid {
                add(name("exp_probs_b.bias"), f32s, &[e], Law::Zero);
            }
            // Of k nearly equal weights that sum to 1 (or to the share that the best of a softmax have, about twice
            // their number's), the squares sum to 1/k.
            let sum = if self.normalise { 1.0 } else { (2.0 * self.top_k as f64 / e as f64).min(1.0) };
            add(name("ffn_gate_exps.weight"), kind, &[e, n, h], into(h));
            add(name("ffn_up_exps.weight"), kind, &[e, n, h], into(h));
            let power = SWIGLU_POWER * sum * sum / self.top_k as f64;
            add(name("ffn_down_exps.weight"), kind, &[e, h, n], out(n, power));
        }
        Ok(list)
    }

    /// The metadata of a GGUF file of this shape: parameters, and a byte-level vocabulary whose other tokens are a space
    /// and their id, so that what a model says can be seen, and counted.
    pub(super) fn metadata(&self, name: &str, file_type: i128) -> Vec<(String, Value)> {
        let mut list = vec![
            ("general.architecture".to_owned(), Value::Text(self.architecture.into())),
            ("general.name".to_owned(), Value::Text(name.into())),
            ("general.file_type".to_owned(), Value::Int(file_type)),
            ("general.quantization_version".to_owned(), Value::Int(2)),
        ];
        let mut own = |key: &str, value| list.push((format!("{}.{key}", self.architecture), value));
        let int = |n: u64| Value::Int(n.into());
        own("context_length", int(self.context));
        own("block_count", int(self.layers as u64));
        own("embedding_length", int(self.hidden));
        own("feed_forward_length", int(if self.dense_layers > 0 { self.dense_width } else { self.expert_width }));
        own("attention.head_count", int(self.heads));
        own(
            "attention.head_count_kv",
            match self.attention {
                None => int(self.kv_heads),
                Some(_) => {
                    let heads = |l| if self.has_attention(l) { self.kv_heads as i64 } else { 0 };
                    Value::Ints((0..self.layers).map(heads).collect())
                }
            },
        );
        own("attention.key_length", int(self.head_dim));
        own("attention.value_length", int(self.head_dim));
        own("attention.layer_norm_rms_epsilon", Value::Float(self.norm_eps));
        own("rope.freq_base", Value::Float(self.rope_theta));
        own("rope.dimension_count", int(self.head_dim));
        own("expert_count", int(self.experts));
        own("expert_used_count", int(self.top_k));
        own("expert_feed_forward_length", int(self.expert_width));
        own("vocab_size", int(self.vocab));
        if self.sigmoid {
            own("leading_dense_block_count", int(self.dense_layers as u64));
            own("expert_gating_func", Value::Int(2));
        }
        if self.attention.is_some() {
            own("shortconv.l_cache", int(self.taps));
        }
        let (normal, control) = (1, 3);
        let mut tokens: Vec<String> = byte_alphabet().iter().map(|c| c.to_string()).collect();
        let mut types = vec![normal; tokens.len()];
        // A byte-level vocabulary has merges.
        let merges = ["t h", "i n", "e r"];
        tokens.extend(merges.map(|pair| pair.replace(' ', "")));
        types.resize(tokens.len(), normal);
        let end = tokens.len();
        tokens.push("<|endoftext|>".into());
        types.push(control);
        // U+0120 is the alphabet's space.
        tokens.extend((tokens.len()..self.vocab as usize).map(|id| format!("\u{120}{id}")));
        types.resize(tokens.len(), normal);
        let mut add = |key: &str, value| list.push((format!("tokenizer.ggml.{key}"), value));
        add("model", Value::Text("gpt2".into()));
        add("pre", Value::Text("gpt-2".into()));
        add("tokens", Value::Texts(tokens));
        add("token_type", Value::Ints(types));
        add("merges", Value::Texts(merges.map(str::to_owned).into()));
        add("eos_token_id", Value::Int(end as i128));
        add("add_bos_token", Value::Bool(false));
        list
    }
}
