//! The records of the MODEL and TENSORS sections: fixed-width, little-endian, readable in place.
//!
//! A model is data: a [`ModelRecord`], one [`LayerRecord`] a layer, and [`TensorRecord`]s that say where each
//! resident tensor lies. The same structs are read by the engine and written by the converter.

use forebay_kernels::weights::{Encoding, Fields, Group, MatrixShape, Quant};
use zerocopy::little_endian::{F32, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Version of the MODEL and TENSORS records, and of the units' layout ([`super::unit`]).
pub const RECORD_VERSION: u16 = 2;
/// The `layer` of a tensor that belongs to no layer.
pub const NO_LAYER: u16 = 0xffff;
/// The `rope` of an attention layer without rotary positions.
pub const NO_ROPE: u8 = 0xff;

/// Shape and encoding of a matrix, 16 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct MatrixRecord {
    /// 0 absent, 1 f32, 2 f16, 3 bf16, 4 grouped integers.
    pub kind: u8,
    /// 1 if groups store a minimum (kind 4).
    pub affine: u8,
    /// Twice the zero point (kind 4).
    pub zero_x2: u8,
    /// log2 of the group length (kind 4).
    pub group_log2: u8,
    /// Field widths, most significant first (kind 4).
    pub fields: [u8; 4],
    /// Output dimension.
    pub rows: U32,
    /// Input dimension.
    pub cols: U32,
}

impl MatrixRecord {
    /// The record of `shape`.
    pub fn new(shape: MatrixShape) -> Self {
        let mut record = Self { rows: shape.rows.into(), cols: shape.cols.into(), ..Self::default() };
        match shape.encoding {
            Encoding::F32 => record.kind = 1,
            Encoding::F16 => record.kind = 2,
            Encoding::Bf16 => record.kind = 3,
            Encoding::Quant(q) => {
                record.kind = 4;
                record.affine = q.affine as u8;
                record.zero_x2 = q.zero_x2;
                record.group_log2 = q.group as u8;
                record.fields = q.fields.widths();
            }
        }
        record
    }

    /// The shape, or `None` if the record is not a valid encoding.
    pub fn shape(&self) -> Option<MatrixShape> {
        let quantised = self.kind == 4;
        let extra = self.affine | self.zero_x2 | self.group_log2 | self.fields.iter().fold(0, |a, b| a | b);
        if !quantised && extra != 0 {
            return None;
        }
        let encoding = match self.kind {
            1 => Encoding::F32,
            2 => Encoding::F16,
            3 => Encoding::Bf16,
            4 if self.affine <= 1 => Encoding::Quant(Quant {
                fields: Fields::new(self.fields)?,
                group: Group::from_len(1usize.checked_shl(self.group_log2.into())?)?,
                affine: self.affine == 1,
                zero_x2: self.zero_x2,
            }),
            _ => return None,
        };
        Some(MatrixShape { rows: self.rows.get(), cols: self.cols.get(), encoding })
    }
}

/// Head of the MODEL section, followed by `layers` [`LayerRecord`]s. 192 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ModelRecord {
    /// [`RECORD_VERSION`].
    pub version: U16,
    /// Decoder layers.
    pub layers: U16,
    /// Width of the residual stream.
    pub hidden: U32,
    /// Rows of the embedding and of the logits.
    pub vocab: U32,
    /// Longest sequence that the model was made for.
    pub context: U32,
    /// Epsilon of every RMSNorm.
    pub norm_eps: F32,
    /// Factor on embedding rows.
    pub embedding_scale: F32,
    /// Factor on each sub-layer's output before it is added to the residual stream.
    pub residual_scale: F32,
    /// Factor on the logits.
    pub logit_scale: F32,
    /// First of the consecutive extents that hold the tensors of no layer ([`NO_LAYER`]), the *global group*.
    pub resident_first: U32,
    /// Number of those extents.
    pub resident_count: U32,
    /// Suggested sampling: temperature (0: greedy).
    pub temperature: F32,
    /// Suggested sampling: nucleus (1: off).
    pub top_p: F32,
    /// Suggested sampling: minimum relative probability (0: off).
    pub min_p: F32,
    /// Suggested sampling: repetition penalty (1: off).
    pub repetition_penalty: F32,
    /// Suggested sampling: number of candidates (0: off).
    pub top_k: U32,
    /// Bits the weights were asked to have at conversion, for people to read: UTF-8, zero padded.
    pub weights_label: [u8; 12],
    /// Model family, e.g. `lfm2_moe`: UTF-8, zero padded.
    pub family: [u8; 32],
    /// Model name for people to read: UTF-8, zero padded.
    pub name: [u8; 64],
    /// Zero.
    pub reserved: [u8; 24],
}

/// What mixes positions in a layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Operator {
    /// Grouped-query attention.
    Attention = 0,
    /// LFM2's gated short convolution.
    ShortConv = 1,
}

/// How the units of a layer's feed-forward are chosen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Router {
    /// Dense: every unit (a neuron cluster), in order, with weight 1.
    All = 0,
    /// LFM2-MoE: `p = sigmoid(gate x)`; the top k of `p + bias`; weights `p`.
    Sigmoid = 1,
    /// Mixtral, OLMoE and Qwen3-MoE: `p = softmax(gate x)` over all experts; the top k of `p`; weights `p`.
    Softmax = 2,
}

/// [`LayerRecord::flags`]: the chosen weights are divided by their sum plus `router_norm_eps`.
pub const ROUTER_NORMALISE: u8 = 1;
/// [`LayerRecord::flags`]: the feed-forward gates with ReLU instead of SiLU.
pub const GATE_RELU: u8 = 2;

/// Steps of [`LayerRecord::hot`].
pub const HOT_STEPS: usize = 16;

/// One decoder layer. 128 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct LayerRecord {
    /// An [`Operator`].
    pub operator: u8,
    /// A [`Router`].
    pub router: u8,
    /// [`ROUTER_NORMALISE`], [`GATE_RELU`].
    pub flags: u8,
    /// 0 for the [`Role::RopeInvFreq`] table, or [`NO_ROPE`].
    pub rope: u8,
    /// Query heads (attention).
    pub heads: U16,
    /// Key and value heads (attention).
    pub kv_heads: U16,
    /// Width of a head (attention).
    pub head_dim: U16,
    /// Taps (short convolution).
    pub conv_taps: U16,
    /// Sliding window including the token itself (attention), 0 for none.
    pub window: U32,
    /// Factor on attention scores.
    pub attention_scale: F32,
    /// Factor on cos and sin of the RoPE table (YaRN's attention factor).
    pub rope_mscale: F32,
    /// Experts, or neuron clusters of a dense feed-forward.
    pub units: U16,
    /// Experts a token.
    pub top_k: U16,
    /// Epsilon of the weights' normalisation.
    pub router_norm_eps: F32,
    /// Factor on the routing weights.
    pub router_scale: F32,
    /// First of the layer's `units` consecutive unit extents.
    pub first_extent: U32,
    /// Gate projection of one unit: [unit width, hidden].
    pub gate: MatrixRecord,
    /// Up projection of one unit: [unit width, hidden].
    pub up: MatrixRecord,
    /// Down projection of one unit: [hidden, unit width].
    pub down: MatrixRecord,
    /// First of the consecutive extents that hold this layer's resident tensors, the layer's *group*.
    pub resident_first: U32,
    /// Number of those extents.
    pub resident_count: U32,
    /// Of a dense layer that was calibrated: entry `i` is how many of its units, the first ones, are among the most often
    /// used `(i + 1) / 16` of the units of all dense layers; else 0.
    pub hot: [U16; HOT_STEPS],
}

/// What a resident tensor is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u16)]
#[non_exhaustive]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Role {
    /// [vocab, hidden]; also the output head where there is none.
    Embedding = 1,
    /// [vocab, hidden].
    OutputHead = 2,
    /// Final RMSNorm, f32 [1, hidden].
    FinalNorm = 3,
    /// Inverse frequencies, f32 [1, rotary width / 2], scaling applied.
    RopeInvFreq = 4,
    /// RMSNorm before the operator, f32 [1, hidden].
    OperatorNorm = 16,
    /// RMSNorm before the feed-forward, f32 [1, hidden].
    FfnNorm = 17,
    /// [heads * head_dim, hidden].
    Query = 18,
    /// [kv_heads * head_dim, hidden].
    Key = 19,
    /// [kv_heads * head_dim, hidden].
    Value = 20,
    /// [hidden, heads * head_dim].
    AttentionOut = 21,
    /// f32 [1, heads * head_dim].
    QueryBias = 22,
    /// f32 [1, kv_heads * head_dim].
    KeyBias = 23,
    /// f32 [1, kv_heads * head_dim].
    ValueBias = 24,
    /// f32 [1, hidden].
    AttentionOutBias = 25,
    /// RMSNorm of queries before RoPE: of each head, f32 [1, head_dim], or of all together (OLMoE), f32
    /// [1, heads * head_dim].
    QueryNorm = 26,
    /// RMSNorm of keys before RoPE: of each head, f32 [1, head_dim], or of all together, f32 [1, kv_heads * head_dim].
    KeyNorm = 27,
    /// [3 * hidden, hidden], rows in the order B, C, x.
    ConvIn = 28,
    /// Depthwise taps, f32 [hidden, taps], the last tap the present token's.
    ConvTaps = 29,
    /// [hidden, hidden].
    ConvOut = 30,
    /// f32 [1, 3 * hidden].
    ConvInBias = 31,
    /// f32 [1, hidden].
    ConvTapsBias = 32,
    /// f32 [1, hidden].
    ConvOutBias = 33,
    /// Router gate, float [units, hidden].
    RouterGate = 34,
    /// Bias on the selection scores, f32 [1, units].
    RouterBias = 35,
    /// f32 [1, units * unit width].
    GateBias = 36,
    /// f32 [1, units * unit width].
    UpBias = 37,
    /// f32 [1, hidden].
    DownBias = 38,
    /// Predictor of a dense layer's neuron clusters, applied to the feed-forward's input: [units, hidden].
    ClusterGate = 48,
    /// Bias of that predictor, f32 [1, units].
    ClusterBias = 49,
    /// Thresholds on that predictor's scores, f32 [1, n + 1]. Entry `i` is the one with which a share of `i / n` of the
    /// clusters of all layers was kept on the calibration text.
    ClusterThresholds = 50,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 30] = [
        Self::Embedding,
        Self::OutputHead,
        Self::FinalNorm,
        Self::RopeInvFreq,
        Self::OperatorNorm,
        Self::FfnNorm,
        Self::Query,
        Self::Key,
        Self::Value,
        Self::AttentionOut,
        Self::QueryBias,
        Self::KeyBias,
        Self::ValueBias,
        Self::AttentionOutBias,
        Self::QueryNorm,
        Self::KeyNorm,
        Self::ConvIn,
        Self::ConvTaps,
        Self::ConvOut,
        Self::ConvInBias,
        Self::ConvTapsBias,
        Self::ConvOutBias,
        Self::RouterGate,
        Self::RouterBias,
        Self::GateBias,
        Self::UpBias,
        Self::DownBias,
        Self::ClusterGate,
        Self::ClusterBias,
        Self::ClusterThresholds,
    ];

    /// The role with this number.
    pub fn from_u16(n: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|r| *r as u16 == n)
    }
}

/// Where a resident tensor lies. 40 bytes. A group's tensors are one run of bytes, padded to the page and cut
/// into extents, so that layers can be loaded, and waited for, one by one. The TENSORS section is an array of these, sorted by
/// (`layer`, `role`) without repetition.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct TensorRecord {
    /// Layer, or [`NO_LAYER`].
    pub layer: U16,
    /// A [`Role`].
    pub role: U16,
    /// Shape and encoding; vectors are [1, n].
    pub matrix: MatrixRecord,
    /// Offset from the start of its group (the layer's, or the global one), a multiple of 64.
    pub offset: U64,
    /// Bytes: [`MatrixShape::bytes`].
    pub len: U64,
    /// Zero.
    pub reserved: [u8; 4],
}

const _: () = assert!(size_of::<MatrixRecord>() == 16);
const _: () = assert!(size_of::<ModelRecord>() == 192);
const _: () = assert!(size_of::<LayerRecord>() == 128);
const _: () = assert!(size_of::<TensorRecord>() == 40);
