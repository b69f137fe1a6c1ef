//! Architectures as data: what a model is made of, and what its tensors are called.
//!
//! An [`Architecture`] names the parameters and tensors of one family in both formats; [`describe`] reads them
//! into a [`Model`], which no longer knows where it came from.

pub mod rope;
mod table;

use anyhow::{Result, bail, ensure};
use forebay_kernels::ops::Activation;
use forebay_runtime::model::record::{Role, Router};

use crate::source::{Fields, Key, Source};
use rope::Rope;
pub use table::ARCHITECTURES;

/// Whether a tensor belongs to a model.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Presence {
    /// The model cannot do without it.
    Required,
    /// It is used if the source has it.
    Optional,
    /// The source must not have it.
    Absent,
}

impl Presence {
    /// Required or absent, as a flag in config.json says; GGUF has no such flags, the tensors themselves say.
    fn from_flag(fields: &Fields, key: Key, default: bool) -> Result<Self> {
        Ok(match fields.flag(key, default)? {
            _ if fields.is_gguf() => Self::Optional,
            true => Self::Required,
            false => Self::Absent,
        })
    }
}

/// RMSNorm of queries and keys before the rotation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum QkNorm {
    /// There is none.
    None,
    /// Each head by itself.
    Head,
    /// All heads of a token together.
    Whole,
}

/// Grouped-query attention of one layer.
#[derive(Clone, PartialEq, Debug)]
pub struct Attention {
    /// Query heads.
    pub heads: u32,
    /// Key and value heads.
    pub kv_heads: u32,
    /// Width of a head.
    pub head_dim: u32,
    /// Sliding window including the token itself, 0 for none.
    pub window: u32,
    /// Factor on the scores.
    pub scale: f32,
    /// Biases of the query, key and value projections.
    pub qkv_bias: Presence,
    /// Bias of the output projection.
    pub out_bias: Presence,
    /// RMSNorm of queries and keys.
    pub qk_norm: QkNorm,
}

/// What mixes positions in a layer.
#[derive(Clone, PartialEq, Debug)]
pub enum Mixer {
    /// Grouped-query attention.
    Attention(Attention),
    /// LFM2's gated short convolution.
    ShortConv {
        /// Length of the convolution.
        taps: u32,
        /// Biases of the convolution and of both projections.
        bias: Presence,
    },
}

/// The feed-forward of a layer.
#[derive(Clone, PartialEq, Debug)]
pub enum FeedForward {
    /// One SwiGLU.
    Dense {
        /// Neurons.
        width: u32,
        /// Biases of the three projections.
        bias: Presence,
    },
    /// Experts, each a SwiGLU, chosen by a router.
    Experts {
        /// How.
        router: Router,
        /// Number of experts.
        count: u32,
        /// Experts a token.
        top_k: u32,
        /// Neurons of an expert.
        width: u32,
        /// Bias on the selection scores.
        bias: Presence,
        /// Whether the chosen weights are divided by their sum plus `norm_eps`.
        normalise: bool,
        /// See `normalise`.
        norm_eps: f32,
        /// Factor on the weights.
        scale: f32,
    },
}

/// A decoder layer.
#[derive(Clone, PartialEq, Debug)]
pub struct Layer {
    /// What mixes positions.
    pub mixer: Mixer,
    /// The feed-forward.
    pub feed_forward: FeedForward,
}

/// A model, whatever it was read from.
#[derive(Clone, PartialEq, Debug)]
pub struct Model {
    /// Name of the family.
    pub family: &'static str,
    /// Width of the residual stream.
    pub hidden: u32,
    /// Rows of the embedding.
    pub vocab: u32,
    /// Longest sequence.
    pub context: u32,
    /// Epsilon of every RMSNorm.
    pub norm_eps: f32,
    /// Factor on embedding rows.
    pub embedding_scale: f32,
    /// Factor on each sub-layer's output.
    pub residual_scale: f32,
    /// Factor on the logits.
    pub logit_scale: f32,
    /// Whether there is an output head beside the embedding.
    pub head: Presence,
    /// What every feed-forward does to its gate.
    pub activation: Activation,
    /// Rotary positions of every attention layer.
    pub rope: Rope,
    /// The layers.
    pub layers: Vec<Layer>,
}

/// What a name in a source stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Slot {
    /// A resident tensor.
    Resident(Role),
    /// Gate projection of a dense feed-forward, [width, hidden].
    Gate,
    /// Up projection of a dense feed-forward, [width, hidden].
    Up,
    /// Down projection of a dense feed-forward, [hidden, width].
    Down,
    /// Gate projection of an expert; stacked along the slowest dimension if the name has no `{e}`.
    ExpertGate,
    /// Up projection of an expert, as `ExpertGate`.
    ExpertUp,
    /// Down projection of an expert, as `ExpertGate`.
    ExpertDown,
    /// Divisors of the inverse frequencies, f32 [head_dim / 2].
    RopeDivisors,
}

/// The name of a slot in both formats (`{l}` the layer, `{e}` the expert); empty where there is none.
#[derive(Clone, Copy, Debug)]
pub struct Name {
    /// What it stands for.
    pub slot: Slot,
    /// Name in safetensors.
    pub hf: &'static str,
    /// Name in GGUF.
    pub gguf: &'static str,
}

/// A family of models.
#[derive(Debug)]
pub struct Architecture {
    /// Name in images.
    pub family: &'static str,
    /// `model_type`s.
    pub hf: &'static [&'static str],
    /// `general.architecture`s.
    pub gguf: &'static [&'static str],
    /// Whether a GGUF file of this name with experts is meant, where several families share the name.
    pub experts: bool,
    /// Names of tensors.
    pub names: &'static [&'static [Name]],
    /// Whether models may gate their feed-forwards with ReLU.
    pub relu: bool,
    /// Whether GGUF files hold the rows of the query and key projections in the order of interleaved rotation.
    pub gguf_interleaved: bool,
    /// Reads the parameters.
    read: fn(&Fields, Common) -> Result<Vec<Layer>>,
    /// Base of the rotary frequencies where none is given.
    rope_theta: f64,
}

impl Architecture {
    /// The architecture of `source`.
    ///
    /// # Errors
    /// It is unknown.
    pub fn of(source: &Source) -> Result<&'static Self> {
        let name = source.fields.architecture();
        let names = |a: &Self| if source.is_gguf() { a.gguf } else { a.hf };
        let experts = source.fields.get(table::EXPERTS).and_then(serde_json::Value::as_u64).is_some_and(|n| n > 0);
        let mut named = ARCHITECTURES.iter().filter(|a| names(a).contains(&name));
        if let Some(first) = named.next() {
            let meant = core::iter::once(first).chain(named).find(|a| a.experts == experts);
            return Ok(meant.unwrap_or(first));
        }
        let known: Vec<&str> = ARCHITECTURES.iter().flat_map(names).copied().collect();
        let field = if source.is_gguf() { "general.architecture" } else { "config.json: model_type" };
        bail!("{field} is {name:?}, which is not supported; expected one of: {}", known.join(", "))
    }

    /// The name of `slot`, with `{l}` and `{e}` in place; `None` if this format has none.
    pub fn pattern(&self, slot: Slot, gguf: bool) -> Option<&'static str> {
        let name = self.names.iter().flat_map(|names| names.iter()).find(|n| n.slot == slot)?;
        let name = if gguf { name.gguf } else { name.hf };
        (!name.is_empty()).then_some(name)
    }
}

/// The parameters that every architecture has.
#[derive(Clone, Copy, Debug)]
pub struct Common {
    layers: usize,
    heads: u32,
    head_dim: u32,
}

const HIDDEN: Key = Key { hf: &["hidden_size"], gguf: ".embedding_length" };
const LAYERS: Key = Key { hf: &["num_hidden_layers"], gguf: ".block_count" };
const VOCAB: Key = Key { hf: &["vocab_size"], gguf: ".vocab_size" };
const CONTEXT: Key = Key { hf: &["max_position_embeddings"], gguf: ".context_length" };
const EPS: Key = Key { hf: &["rms_norm_eps", "norm_eps", "block_norm_eps"], gguf: ".attention.layer_norm_rms_epsilon" };
const HEADS: Key = Key { hf: &["num_attention_heads"], gguf: ".attention.head_count" };
const KV_HEADS: Key = Key { hf: &["num_key_value_heads"], gguf: ".attention.head_count_kv" };
const HEAD_DIM: Key = Key { hf: &["head_dim"], gguf: ".attention.key_length" };
const VALUE_DIM: Key = Key { hf: &[], gguf: ".attention.value_length" };
const ROTARY_DIM: Key = Key { hf: &[], gguf: ".rope.dimension_count" };
const ROTARY_PART: Key = Key { hf: &["rope_parameters.partial_rotary_factor", "partial_rotary_factor"], gguf: "" };
const ACTIVATION: Key = Key { hf: &["hidden_act"], gguf: "" };
const TIED: Key = Key { hf: &["tie_embedding", "tie_word_embeddings"], gguf: "" };
const WIDTH: Key = Key { hf: &["block_ff_dim", "intermediate_size"], gguf: ".feed_forward_length" };
const WINDOW: Key = Key { hf: &["sliding_window"], gguf: ".attention.sliding_window" };
const USE_WINDOW: Key = Key { hf: &["use_sliding_window"], gguf: "" };

/// Reads the parameters of `source`, a model of `architecture`.
///
/// # Errors
/// Names the parameter that is missing, wrong or not supported.
pub fn describe(source: &Source, architecture: &Architecture) -> Result<Model> {
    let f = &source.fields;
    let layers = f.count(LAYERS)?;
    ensure!(layers < 4096, "{}", f.wrong(LAYERS, "fewer than 4096 layers"));
    let hidden = f.count(HIDDEN)?;
    let heads = match f.per_layer(HEADS, layers as usize)? {
        Some(heads) if heads.iter().all(|&n| n == heads[0] && n > 0) => heads[0],
        _ => return Err(f.wrong(HEADS, "one number of heads for all layers")),
    };
    let head_dim = match f.maybe_count(HEAD_DIM)? {
        Some(dim) => dim,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => bail!("{}", f.wrong(HIDDEN, &format!("a multiple of the {heads} heads"))),
    };
    ensure!(
        head_dim.is_multiple_of(2) && head_dim < 1 << 16 && heads < 1 << 16,
        "{heads} heads of width {head_dim}, expected an even width, and both below 65536"
    );
    // GGUF has no field for it: llama.cpp computes these families with SiLU.
    let activation = match f.maybe_text(ACTIVATION)? {
        None | Some("silu" | "swish") => Activation::Silu,
        Some("relu") if architecture.relu => Activation::Relu,
        Some(_) if architecture.relu => bail!("{}", f.wrong(ACTIVATION, "silu or relu")),
        Some(_) => bail!("{}", f.wrong(ACTIVATION, "silu, the only activation that this family has")),
    };
    for (key, what) in [(VALUE_DIM, "the width of a key"), (ROTARY_DIM, "the width of a head, rotated whole")] {
        if let Some(n) = f.maybe_count(key)? {
            ensure!(n == head_dim, "{}", f.wrong(key, &format!("{head_dim}, {what}")));
        }
    }
    if f.maybe_number(ROTARY_PART)?.is_some_and(|part| part != 1.0) {
        return Err(f.wrong(ROTARY_PART, "1: heads are rotated whole"));
    }
    let embedding = architecture
        .pattern(Slot::Resident(Role::Embedding), source.is_gguf())
        .and_then(|name| source.tensors.get(name));
    let vocab = match (f.maybe_count(VOCAB)?, embedding) {
        (Some(n), _) => n,
        (None, Some(t)) => u32::try_from(t.rows())?,
        (None, None) => return Err(f.wrong(VOCAB, "a whole number")),
    };
    let head = match f.get(TIED) {
        Some(_) if f.flag(TIED, false)? => Presence::Absent,
        Some(_) => Presence::Required,
        None => Presence::Optional,
    };
    let common = Common { layers: layers as usize, heads, head_dim };
    let read = (architecture.read)(f, common)?;
    let context = f.count(CONTEXT)?;
    let divisors = rope_divisors(source, architecture, head_dim)?;
    let rope = rope::read(f, head_dim, context, architecture.rope_theta, divisors.as_deref())?;
    let norm_eps = f.number(EPS)? as f32;
    ensure!(norm_eps > 0.0, "{}", f.wrong(EPS, "a number above 0"));
    Ok(Model {
        family: architecture.family,
        hidden,
        vocab,
        context,
        norm_eps,
        embedding_scale: 1.0,
        residual_scale: 1.0,
        logit_scale: 1.0,
        head,
        activation,
        rope,
        layers: read,
    })
}

/// The divisors of the rotary frequencies that some GGUF files hold as a tensor.
fn rope_divisors(source: &Source, architecture: &Architecture, head_dim: u32) -> Result<Option<Vec<f32>>> {
    let name = architecture.pattern(Slot::RopeDivisors, source.is_gguf());
    let Some(tensor) = name.and_then(|name| source.tensors.get(name)) else { return Ok(None) };
    ensure!(
        tensor.shape == [u64::from(head_dim / 2)],
        "tensor {} has shape {:?}, expected [{}]",
        tensor.name,
        tensor.shape,
        head_dim / 2
    );
    let mut values = vec![0.0; head_dim as usize / 2];
    source.read_f32(tensor, 0, 0..u64::from(head_dim / 2), &mut Vec::new(), &mut values)?;
    ensure!(values.iter().all(|&x| x > 0.0), "tensor {} holds {values:?}, expected numbers above 0", tensor.name);
    Ok(Some(values))
}

/// The attention that most families share; `kv_heads` of the layer.
fn attention(f: &Fields, common: Common, kv_heads: u32) -> Result<Attention> {
    let Common { heads, head_dim, .. } = common;
    ensure!(
        kv_heads > 0 && heads.is_multiple_of(kv_heads),
        "{}",
        f.wrong(KV_HEADS, &format!("a divisor of the {heads} query heads"))
    );
    let window = if f.flag(USE_WINDOW, true)? { f.maybe_count(WINDOW)?.unwrap_or(0) } else { 0 };
    Ok(Attention {
        heads,
        kv_heads,
        head_dim,
        window,
        scale: (1.0 / f64::from(head_dim).sqrt()) as f32,
        qkv_bias: Presence::Absent,
        out_bias: Presence::Absent,
        qk_norm: QkNorm::None,
    })
}
