//! The families that can be converted.

use anyhow::{Result, ensure};
use forebay_runtime::model::record::{Role, Router};

use super::{
    Architecture, Attention, Common, FeedForward, HEADS, KV_HEADS, Layer, Mixer, Name, Presence, QkNorm, Slot, WIDTH,
    attention,
};
use crate::source::{Fields, Key};

const fn resident(role: Role, hf: &'static str, gguf: &'static str) -> Name {
    Name { slot: Slot::Resident(role), hf, gguf }
}

const fn unit(slot: Slot, hf: &'static str, gguf: &'static str) -> Name {
    Name { slot, hf, gguf }
}

const EMBEDDING: &[Name] = &[
    resident(Role::Embedding, "model.embed_tokens.weight", "token_embd.weight"),
    resident(Role::OutputHead, "lm_head.weight", "output.weight"),
];

const ATTENTION: &[Name] = &[
    resident(Role::Query, "model.layers.{l}.self_attn.q_proj.weight", "blk.{l}.attn_q.weight"),
    resident(Role::Key, "model.layers.{l}.self_attn.k_proj.weight", "blk.{l}.attn_k.weight"),
    resident(Role::Value, "model.layers.{l}.self_attn.v_proj.weight", "blk.{l}.attn_v.weight"),
    resident(Role::QueryBias, "model.layers.{l}.self_attn.q_proj.bias", "blk.{l}.attn_q.bias"),
    resident(Role::KeyBias, "model.layers.{l}.self_attn.k_proj.bias", "blk.{l}.attn_k.bias"),
    resident(Role::ValueBias, "model.layers.{l}.self_attn.v_proj.bias", "blk.{l}.attn_v.bias"),
];

const LLAMA: &[Name] = &[
    resident(Role::FinalNorm, "model.norm.weight", "output_norm.weight"),
    unit(Slot::RopeDivisors, "", "rope_freqs.weight"),
    resident(Role::OperatorNorm, "model.layers.{l}.input_layernorm.weight", "blk.{l}.attn_norm.weight"),
    resident(Role::FfnNorm, "model.layers.{l}.post_attention_layernorm.weight", "blk.{l}.ffn_norm.weight"),
    resident(Role::AttentionOut, "model.layers.{l}.self_attn.o_proj.weight", "blk.{l}.attn_output.weight"),
    resident(Role::AttentionOutBias, "model.layers.{l}.self_attn.o_proj.bias", "blk.{l}.attn_output.bias"),
    unit(Slot::Gate, "model.layers.{l}.mlp.gate_proj.weight", "blk.{l}.ffn_gate.weight"),
    unit(Slot::Up, "model.layers.{l}.mlp.up_proj.weight", "blk.{l}.ffn_up.weight"),
    unit(Slot::Down, "model.layers.{l}.mlp.down_proj.weight", "blk.{l}.ffn_down.weight"),
    resident(Role::GateBias, "model.layers.{l}.mlp.gate_proj.bias", "blk.{l}.ffn_gate.bias"),
    resident(Role::UpBias, "model.layers.{l}.mlp.up_proj.bias", "blk.{l}.ffn_up.bias"),
    resident(Role::DownBias, "model.layers.{l}.mlp.down_proj.bias", "blk.{l}.ffn_down.bias"),
];

const LFM2: &[Name] = &[
    // GGUF calls the final norm token_embd_norm; it is not applied to the embeddings.
    resident(Role::FinalNorm, "model.embedding_norm.weight", "token_embd_norm.weight"),
    resident(Role::OperatorNorm, "model.layers.{l}.operator_norm.weight", "blk.{l}.attn_norm.weight"),
    resident(Role::FfnNorm, "model.layers.{l}.ffn_norm.weight", "blk.{l}.ffn_norm.weight"),
    resident(Role::AttentionOut, "model.layers.{l}.self_attn.out_proj.weight", "blk.{l}.attn_output.weight"),
    resident(Role::QueryNorm, "model.layers.{l}.self_attn.q_layernorm.weight", "blk.{l}.attn_q_norm.weight"),
    resident(Role::KeyNorm, "model.layers.{l}.self_attn.k_layernorm.weight", "blk.{l}.attn_k_norm.weight"),
    resident(Role::ConvIn, "model.layers.{l}.conv.in_proj.weight", "blk.{l}.shortconv.in_proj.weight"),
    resident(Role::ConvTaps, "model.layers.{l}.conv.conv.weight", "blk.{l}.shortconv.conv.weight"),
    resident(Role::ConvOut, "model.layers.{l}.conv.out_proj.weight", "blk.{l}.shortconv.out_proj.weight"),
    resident(Role::ConvInBias, "model.layers.{l}.conv.in_proj.bias", "blk.{l}.shortconv.in_proj.bias"),
    resident(Role::ConvTapsBias, "model.layers.{l}.conv.conv.bias", "blk.{l}.shortconv.conv.bias"),
    resident(Role::ConvOutBias, "model.layers.{l}.conv.out_proj.bias", "blk.{l}.shortconv.out_proj.bias"),
    unit(Slot::Gate, "model.layers.{l}.feed_forward.w1.weight", "blk.{l}.ffn_gate.weight"),
    unit(Slot::Up, "model.layers.{l}.feed_forward.w3.weight", "blk.{l}.ffn_up.weight"),
    unit(Slot::Down, "model.layers.{l}.feed_forward.w2.weight", "blk.{l}.ffn_down.weight"),
];

const LFM2_MOE: &[Name] = &[
    resident(Role::RouterGate, "model.layers.{l}.feed_forward.gate.weight", "blk.{l}.ffn_gate_inp.weight"),
    resident(Role::RouterBias, "model.layers.{l}.feed_forward.expert_bias", "blk.{l}.exp_probs_b.bias"),
    unit(Slot::ExpertGate, "model.layers.{l}.feed_forward.experts.{e}.w1.weight", "blk.{l}.ffn_gate_exps.weight"),
    unit(Slot::ExpertUp, "model.layers.{l}.feed_forward.experts.{e}.w3.weight", "blk.{l}.ffn_up_exps.weight"),
    unit(Slot::ExpertDown, "model.layers.{l}.feed_forward.experts.{e}.w2.weight", "blk.{l}.ffn_down_exps.weight"),
];

/// RMSNorms of queries and keys, as transformers' newer families call them.
const QK_NORM: &[Name] = &[
    resident(Role::QueryNorm, "model.layers.{l}.self_attn.q_norm.weight", "blk.{l}.attn_q_norm.weight"),
    resident(Role::KeyNorm, "model.layers.{l}.self_attn.k_norm.weight", "blk.{l}.attn_k_norm.weight"),
];

const MIXTRAL: &[Name] = &[
    resident(Role::RouterGate, "model.layers.{l}.block_sparse_moe.gate.weight", "blk.{l}.ffn_gate_inp.weight"),
    unit(Slot::ExpertGate, "model.layers.{l}.block_sparse_moe.experts.{e}.w1.weight", "blk.{l}.ffn_gate_exps.weight"),
    unit(Slot::ExpertUp, "model.layers.{l}.block_sparse_moe.experts.{e}.w3.weight", "blk.{l}.ffn_up_exps.weight"),
    unit(Slot::ExpertDown, "model.layers.{l}.block_sparse_moe.experts.{e}.w2.weight", "blk.{l}.ffn_down_exps.weight"),
];

/// Experts as OLMoE and Qwen3-MoE call them.
const MLP_EXPERTS: &[Name] = &[
    resident(Role::RouterGate, "model.layers.{l}.mlp.gate.weight", "blk.{l}.ffn_gate_inp.weight"),
    unit(Slot::ExpertGate, "model.layers.{l}.mlp.experts.{e}.gate_proj.weight", "blk.{l}.ffn_gate_exps.weight"),
    unit(Slot::ExpertUp, "model.layers.{l}.mlp.experts.{e}.up_proj.weight", "blk.{l}.ffn_up_exps.weight"),
    unit(Slot::ExpertDown, "model.layers.{l}.mlp.experts.{e}.down_proj.weight", "blk.{l}.ffn_down_exps.weight"),
];

/// Every family.
pub const ARCHITECTURES: &[Architecture] = &[
    Architecture {
        family: "llama",
        hf: &["llama"],
        gguf: &["llama"],
        experts: false,
        names: &[EMBEDDING, ATTENTION, LLAMA],
        relu: true,
        gguf_interleaved: true,
        read: llama,
        rope_theta: 10_000.0,
    },
    Architecture {
        family: "lfm2",
        hf: &["lfm2"],
        gguf: &["lfm2"],
        experts: false,
        names: &[EMBEDDING, ATTENTION, LFM2],
        relu: false,
        gguf_interleaved: false,
        read: lfm2,
        rope_theta: 1_000_000.0,
    },
    Architecture {
        family: "lfm2_moe",
        hf: &["lfm2_moe"],
        gguf: &["lfm2moe"],
        experts: true,
        names: &[EMBEDDING, ATTENTION, LFM2, LFM2_MOE],
        relu: false,
        gguf_interleaved: false,
        read: lfm2_moe,
        rope_theta: 1_000_000.0,
    },
    Architecture {
        family: "mixtral",
        hf: &["mixtral"],
        // llama.cpp has no architecture of its own for Mixtral: it is a llama with experts.
        gguf: &["llama"],
        experts: true,
        names: &[EMBEDDING, ATTENTION, LLAMA, MIXTRAL],
        relu: false,
        gguf_interleaved: true,
        read: mixtral,
        rope_theta: 1_000_000.0,
    },
    Architecture {
        family: "olmoe",
        hf: &["olmoe"],
        gguf: &["olmoe"],
        experts: true,
        names: &[EMBEDDING, ATTENTION, LLAMA, QK_NORM, MLP_EXPERTS],
        relu: false,
        gguf_interleaved: false,
        read: olmoe,
        rope_theta: 10_000.0,
    },
    Architecture {
        family: "qwen3_moe",
        hf: &["qwen3_moe"],
        gguf: &["qwen3moe"],
        experts: true,
        names: &[EMBEDDING, ATTENTION, LLAMA, QK_NORM, MLP_EXPERTS],
        relu: false,
        gguf_interleaved: false,
        read: qwen3_moe,
        rope_theta: 10_000.0,
    },
];

const ATTENTION_BIAS: Key = Key { hf: &["attention_bias"], gguf: "" };
const MLP_BIAS: Key = Key { hf: &["mlp_bias"], gguf: "" };
pub(super) const EXPERTS: Key = Key { hf: &["num_experts", "num_local_experts"], gguf: ".expert_count" };
const EXPERTS_USED: Key = Key { hf: &["num_experts_per_tok"], gguf: ".expert_used_count" };
const EXPERT_WIDTH: Key = Key { hf: &["moe_intermediate_size"], gguf: ".expert_feed_forward_length" };
const DENSE_LAYERS: Key = Key { hf: &["num_dense_layers"], gguf: ".leading_dense_block_count" };
const NORM_TOPK: Key = Key { hf: &["norm_topk_prob"], gguf: ".expert_weights_norm" };
const EXPERT_BIAS: Key = Key { hf: &["use_expert_bias"], gguf: "" };
const EXPERT_SCALE: Key = Key { hf: &["routed_scaling_factor"], gguf: ".expert_weights_scale" };
const GATING: Key = Key { hf: &[], gguf: ".expert_gating_func" };
const CLIP_QKV: Key = Key { hf: &["clip_qkv"], gguf: ".attention.clamp_kqv" };
const SPARSE_STEP: Key = Key { hf: &["decoder_sparse_step"], gguf: "" };
const DENSE_ONLY: Key = Key { hf: &["mlp_only_layers"], gguf: "" };
const TAPS: Key = Key { hf: &["conv_L_cache"], gguf: ".shortconv.l_cache" };
const CONV_BIAS: Key = Key { hf: &["conv_bias"], gguf: "" };
const LAYER_TYPES: Key = Key { hf: &["layer_types"], gguf: "" };
const ATTENTION_LAYERS: Key = Key { hf: &["full_attn_idxs"], gguf: "" };
const AUTO_WIDTH: Key = Key { hf: &["block_auto_adjust_ff_dim"], gguf: "" };
const WIDTH_FACTOR: Key = Key { hf: &["block_ffn_dim_multiplier"], gguf: "" };
const WIDTH_MULTIPLE: Key = Key { hf: &["block_multiple_of"], gguf: "" };

fn llama(f: &Fields, common: Common) -> Result<Vec<Layer>> {
    if f.get(EXPERTS).and_then(serde_json::Value::as_u64).unwrap_or(0) > 0 {
        return Err(f.wrong(EXPERTS, "no experts: this architecture is dense"));
    }
    let widths = f.per_layer(WIDTH, common.layers)?.ok_or_else(|| f.wrong(WIDTH, "a whole number"))?;
    let kv_heads = f.per_layer(KV_HEADS, common.layers)?.unwrap_or_else(|| vec![common.heads; common.layers]);
    let attention_bias = Presence::from_flag(f, ATTENTION_BIAS, false)?;
    let bias = Presence::from_flag(f, MLP_BIAS, false)?;
    widths
        .into_iter()
        .zip(kv_heads)
        .map(|(width, kv_heads)| {
            ensure!(width > 0, "{}", f.wrong(WIDTH, "a number above 0"));
            let attention = attention(f, common, kv_heads)?;
            let mixer = Mixer::Attention(Attention { qkv_bias: attention_bias, out_bias: attention_bias, ..attention });
            Ok(Layer { mixer, feed_forward: FeedForward::Dense { width, bias } })
        })
        .collect()
}

fn lfm2(f: &Fields, common: Common) -> Result<Vec<Layer>> {
    let mut width = f.count(WIDTH)?;
    if !f.is_gguf() && f.flag(AUTO_WIDTH, true)? {
        width = adjusted_width(f, width)?;
    }
    let mixers = lfm2_mixers(f, common)?;
    let feed_forward = FeedForward::Dense { width, bias: Presence::Absent };
    Ok(mixers.into_iter().map(|mixer| Layer { mixer, feed_forward: feed_forward.clone() }).collect())
}

/// Two thirds of the width that is given, times a factor, rounded up (`Lfm2MLP` of transformers).
fn adjusted_width(f: &Fields, given: u32) -> Result<u32> {
    let mut width = u64::from(given) * 2 / 3;
    if let Some(factor) = f.maybe_number(WIDTH_FACTOR)? {
        ensure!(factor > 0.0 && factor < 1000.0, "{}", f.wrong(WIDTH_FACTOR, "a number from 0 to 1000"));
        width = (factor * width as f64) as u64;
    }
    let multiple = f.maybe_count(WIDTH_MULTIPLE)?.unwrap_or(256);
    let width = width.next_multiple_of(multiple.into());
    ensure!(width > 0, "{}", f.wrong(WIDTH, "a larger width"));
    Ok(u32::try_from(width)?)
}

fn lfm2_moe(f: &Fields, common: Common) -> Result<Vec<Layer>> {
    let mixers = lfm2_mixers(f, common)?;
    let dense_layers = f.get(DENSE_LAYERS).and_then(serde_json::Value::as_u64);
    let dense_layers = dense_layers.ok_or_else(|| f.wrong(DENSE_LAYERS, "a number of layers"))?;
    if let Some(function) = f.maybe_count(GATING)? {
        ensure!(function == 2, "{}", f.wrong(GATING, "2 (sigmoid)"));
    }
    let (count, top_k) = (f.count(EXPERTS)?, f.count(EXPERTS_USED)?);
    ensure!(top_k <= count, "{}", f.wrong(EXPERTS_USED, &format!("at most the {count} experts")));
    let experts = FeedForward::Experts {
        router: Router::Sigmoid,
        count,
        top_k,
        width: f.count(EXPERT_WIDTH)?,
        bias: Presence::from_flag(f, EXPERT_BIAS, true)?,
        normalise: f.flag(NORM_TOPK, true)?,
        norm_eps: 1e-6,
        scale: f.maybe_number(EXPERT_SCALE)?.unwrap_or(1.0) as f32,
    };
    let dense = FeedForward::Dense { width: f.count(WIDTH)?, bias: Presence::Absent };
    let layers = mixers.into_iter().enumerate().map(|(l, mixer)| {
        let feed_forward = if (l as u64) < dense_layers { &dense } else { &experts };
        Layer { mixer, feed_forward: feed_forward.clone() }
    });
    Ok(layers.collect())
}

/// Attention as in Llama for every layer, with a norm of queries and keys.
fn normed_attention(f: &Fields, common: Common, qk_norm: QkNorm) -> Result<Vec<Mixer>> {
    let kv_heads = f.per_layer(KV_HEADS, common.layers)?.unwrap_or_else(|| vec![common.heads; common.layers]);
    let bias = Presence::from_flag(f, ATTENTION_BIAS, false)?;
    let mixer = |n| Ok(Attention { qkv_bias: bias, out_bias: bias, qk_norm, ..attention(f, common, n)? });
    kv_heads.into_iter().map(|n| mixer(n).map(Mixer::Attention)).collect()
}

/// Experts behind a softmax over all of them.
fn softmax_experts(f: &Fields, width: u32, normalise: bool) -> Result<FeedForward> {
    if let Some(function) = f.maybe_count(GATING)? {
        ensure!(function == 1, "{}", f.wrong(GATING, "1 (softmax)"));
    }
    let (count, top_k) = (f.count(EXPERTS)?, f.count(EXPERTS_USED)?);
    ensure!(top_k <= count, "{}", f.wrong(EXPERTS_USED, &format!("at most the {count} experts")));
    Ok(FeedForward::Experts {
        router: Router::Softmax,
        count,
        top_k,
        width,
        bias: Presence::Absent,
        normalise,
        norm_eps: 0.0,
        scale: f.maybe_number(EXPERT_SCALE)?.unwrap_or(1.0) as f32,
    })
}

fn mixtral(f: &Fields, common: Common) -> Result<Vec<Layer>> {
    let experts = softmax_experts(f, f.count(WIDTH)?, true)?;
    let mixers = normed_attention(f, common, QkNorm::None)?;
    Ok(mixers.into_iter().map(|mixer| Layer { mixer, feed_forward: experts.clone() }).collect())
}

fn olmoe(f: &Fields, common: Common) -> Result<Vec<Layer>> {
    if f.maybe_number(CLIP_QKV)?.is_some_and(|clip| clip != 0.0) {
        return Err(f.wrong(CLIP_QKV, "none: queries, keys and values are not clipped"));
    }
    let experts = softmax_experts(f, f.count(WIDTH)?, f.flag(NORM_TOPK, false)?)?;
    let mixers = normed_attention(f, common, QkNorm::Whole)?;
    Ok(mixers.into_iter().map(|mixer| Layer { mixer, feed_forward: experts.clone() }).collect())
}

fn qwen3_moe(f: &Fields, common: Common) -> Result<Vec<Layer>> {
    // GGUF has no such key: llama.cpp always normalises here.
    let experts = softmax_experts(f, f.count(EXPERT_WIDTH)?, f.flag(NORM_TOPK, f.is_gguf())?)?;
    let step = f.maybe_count(SPARSE_STEP)?.unwrap_or(1) as usize;
    let dense_only = f.get(DENSE_ONLY).and_then(serde_json::Value::as_array);
    let is_dense = |l: usize| {
        !(l + 1).is_multiple_of(step)
            || dense_only.is_some_and(|list| list.iter().any(|n| n.as_u64() == Some(l as u64)))
    };
    let dense = if (0..common.layers).any(is_dense) {
        Some(FeedForward::Dense { width: f.count(WIDTH)?, bias: Presence::Absent })
    } else {
        None
    };
    let mixers = normed_attention(f, common, QkNorm::Head)?;
    let layers = mixers.into_iter().enumerate().map(|(l, mixer)| {
        let feed_forward = dense.as_ref().filter(|_| is_dense(l)).unwrap_or(&experts);
        Layer { mixer, feed_forward: feed_forward.clone() }
    });
    Ok(layers.collect())
}

fn lfm2_mixers(f: &Fields, common: Common) -> Result<Vec<Mixer>> {
    let taps = f.count(TAPS)?;
    ensure!(taps < 1 << 16, "{}", f.wrong(TAPS, "fewer than 65536 taps"));
    let conv = Mixer::ShortConv { taps, bias: Presence::from_flag(f, CONV_BIAS, false)? };
    // GGUF marks a convolution by 0 key heads; config.json lists the kinds, or the layers with attention.
    let kv_heads = f.per_layer(KV_HEADS, common.layers)?;
    let mut kv_heads = kv_heads.unwrap_or_else(|| vec![common.heads; common.layers]);
    if let Some(kinds) = f.get(LAYER_TYPES) {
        let kinds = kinds.as_array().filter(|kinds| kinds.len() == common.layers);
        let kinds = kinds.ok_or_else(|| f.wrong(LAYER_TYPES, &format!("{} kinds of layer", common.layers)))?;
        for (n, kind) in kv_heads.iter_mut().zip(kinds) {
            match kind.as_str() {
                Some("conv") => *n = 0,
                Some("full_attention") => {}
                _ => return Err(f.wrong(LAYER_TYPES, "\"conv\" or \"full_attention\"")),
            }
        }
    } else if let Some(indices) = f.get(ATTENTION_LAYERS) {
        let indices = indices.as_array().ok_or_else(|| f.wrong(ATTENTION_LAYERS, "an array of layers"))?;
        for (l, n) in kv_heads.iter_mut().enumerate() {
            if !indices.iter().any(|i| i.as_u64() == Some(l as u64)) {
                *n = 0;
            }
        }
    } else if !f.is_gguf() {
        return Err(f.wrong(LAYER_TYPES, "\"conv\" or \"full_attention\" for every layer"));
    }
    ensure!(
        kv_heads.iter().all(|&n| n == 0 || n <= common.heads),
        "{}",
        f.wrong(KV_HEADS, &format!("at most {}, {}", common.heads, f.label(HEADS)))
    );
    kv_heads
        .into_iter()
        .map(|n| match n {
            0 => Ok(conv.clone()),
            n => Ok(Mixer::Attention(Attention { qk_norm: QkNorm::Head, ..attention(f, common, n)? })),
        })
        .collect()
}
