//! Validation of the MODEL and TENSORS sections against the extents.
//!
//! After [`Model::parse`] every number that the engine indexes with has been checked, so the engine can treat
//! a missing tensor as a bug of its own and never meets a size that does not fit.

use core::fmt;

use forebay_kernels::ops::Activation;
use forebay_kernels::weights::{Encoding, MatrixShape};
use forebay_storage::image::{ExtentKind, ExtentTable};
use zerocopy::FromBytes;
use zerocopy::little_endian::U16;

use super::record::{
    GATE_RELU, HOT_STEPS, LayerRecord, ModelRecord, NO_LAYER, NO_ROPE, Operator, RECORD_VERSION, ROUTER_NORMALISE,
    Role, Router, TensorRecord,
};
use super::unit::UnitShape;

/// Most layers of a model.
pub const MAX_LAYERS: usize = 128;
/// Most units (experts or neuron clusters) of a layer.
pub const MAX_UNITS: usize = 1024;
/// Most experts a token.
pub const MAX_TOP_K: usize = 32;
const MAX_WIDTH: u32 = 1 << 18;
const MAX_VOCAB: u32 = 1 << 22;

/// Why a model description is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum ModelError {
    /// The section is shorter than its records.
    #[error("{section} section: {len} bytes do not hold its records; the image is damaged, convert the model again")]
    Truncated {
        /// Name of the section.
        section: &'static str,
        /// Its length.
        len: usize,
    },
    /// The records are of another version.
    #[error("MODEL section: record version {found}, this build reads {RECORD_VERSION}; convert the model again")]
    Version {
        /// The image's version.
        found: u16,
    },
    /// A field has a value that no model can have.
    #[error("MODEL section: {place}: {field} is {value}, which is out of range")]
    Field {
        /// Where.
        place: Place,
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// A factor or epsilon is not a finite number.
    #[error("MODEL section: {place}: {field} is not a finite number")]
    NotFinite {
        /// Where.
        place: Place,
        /// Name of the field.
        field: &'static str,
    },
    /// Tensor records are unsorted, repeated, misplaced or of unknown role.
    #[error("TENSORS section: record {index}: {what}")]
    Record {
        /// Index of the record.
        index: usize,
        /// What is wrong.
        what: &'static str,
    },
    /// A tensor that the description needs is absent.
    #[error("{place}: the tensor {role:?} is missing")]
    Missing {
        /// Where.
        place: Place,
        /// Its role.
        role: Role,
    },
    /// A tensor has another shape than the description says.
    #[error("{place}: the tensor {role:?} is [{rows}, {cols}], expected [{want_rows}, {want_cols}]{note}")]
    Shape {
        /// Where.
        place: Place,
        /// Its role.
        role: Role,
        /// Rows found.
        rows: u32,
        /// Columns found.
        cols: u32,
        /// Rows expected.
        want_rows: u32,
        /// Columns expected.
        want_cols: u32,
        /// What else was expected.
        note: &'static str,
    },
    /// An extent that the description names is absent, or of another kind or size.
    #[error("{place}: extent {extent}: {what}")]
    Extent {
        /// Where.
        place: Place,
        /// Index of the extent.
        extent: u32,
        /// What is wrong.
        what: &'static str,
    },
}

/// A layer, or the part of a model outside of its layers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Place(pub u16);

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            NO_LAYER => f.write_str("model"),
            layer => write!(f, "layer {layer}"),
        }
    }
}

/// A layer's description with its numbers decoded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerShape {
    /// What mixes positions.
    pub operator: Operator,
    /// How units are chosen.
    pub router: Router,
    /// Whether routing weights are normalised to sum 1.
    pub normalise: bool,
    /// What the feed-forward does to its gate.
    pub activation: Activation,
    /// Whether queries and keys are rotated.
    pub rope: bool,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Taps of the short convolution.
    pub taps: usize,
    /// Sliding window, 0 for none.
    pub window: usize,
    /// Factor on attention scores.
    pub attention_scale: f32,
    /// Factor on cos and sin.
    pub rope_mscale: f32,
    /// Experts or neuron clusters.
    pub units: usize,
    /// Units used by a token.
    pub top_k: usize,
    /// Neurons of a unit.
    pub unit_width: usize,
    /// Epsilon of the routing weights' normalisation.
    pub router_norm_eps: f32,
    /// Factor on the routing weights.
    pub router_scale: f32,
    /// First unit extent.
    pub first_extent: u32,
    /// How many of the first units are among the hottest of all dense layers, in shares of `1 / HOT_STEPS`; zeros if
    /// the layer was not calibrated.
    pub hot: [u16; HOT_STEPS],
    /// Shapes of a unit's matrices.
    pub unit: UnitShape,
}

/// A resident tensor: its shape and its byte range within its group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TensorRef {
    /// Shape and encoding.
    pub shape: MatrixShape,
    /// Byte offset in the group.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// A validated model description, read in place.
#[derive(Clone, Copy, Debug)]
pub struct Model<'a> {
    record: &'a ModelRecord,
    layers: &'a [LayerRecord],
    tensors: &'a [TensorRecord],
    extents: ExtentTable<'a>,
    page: u32,
}

impl LayerShape {
    fn decode(record: &LayerRecord, hidden: u32, layer: u16) -> Result<Self, ModelError> {
        let place = Place(layer);
        let field = |field, value: u64| ModelError::Field { place, field, value };
        let finite = |field, value: f32| {
            if value.is_finite() { Ok(value) } else { Err(ModelError::NotFinite { place, field }) }
        };
        let operator = match record.operator {
            0 => Operator::Attention,
            1 => Operator::ShortConv,
            n => return Err(field("operator", n.into())),
        };
        let router = match record.router {
            0 => Router::All,
            1 => Router::Sigmoid,
            2 => Router::Softmax,
            n => return Err(field("router", n.into())),
        };
        if record.flags & !(ROUTER_NORMALISE | GATE_RELU) != 0 {
            return Err(field("flags", record.flags.into()));
        }
        if record.rope != 0 && record.rope != NO_ROPE {
            return Err(field("rope", record.rope.into()));
        }
        let (heads, kv_heads, head_dim) = (record.heads.get(), record.kv_heads.get(), record.head_dim.get());
        let taps = record.conv_taps.get();
        match operator {
            Operator::Attention => {
                if heads == 0 || heads > 1024 {
                    return Err(field("heads", heads.into()));
                }
                if kv_heads == 0 || heads % kv_heads != 0 {
                    return Err(field("kv_heads", kv_heads.into()));
                }
                if head_dim == 0 || head_dim % 2 != 0 || head_dim > 1024 {
                    return Err(field("head_dim", head_dim.into()));
                }
            }
            Operator::ShortConv => {
                if !(2..=64).contains(&taps) {
                    return Err(field("conv_taps", taps.into()));
                }
            }
        }
        let (units, top_k) = (record.units.get(), record.top_k.get());
        if units == 0 || usize::from(units) > MAX_UNITS {
            return Err(field("units", units.into()));
        }
        let top_k_fits = match router {
            Router::All => top_k == units,
            Router::Sigmoid | Router::Softmax => top_k >= 1 && top_k <= units && usize::from(top_k) <= MAX_TOP_K,
        };
        if !top_k_fits {
            return Err(field("top_k", top_k.into()));
        }
        let hot = record.hot.map(U16::get);
        let most = if router == Router::All { units } else { 0 };
        if !hot.is_sorted() || (hot[HOT_STEPS - 1] != 0 && hot[HOT_STEPS - 1] != most) {
            return Err(field("hot", hot[HOT_STEPS - 1].into()));
        }
        let matrix = |name, m: &super::record::MatrixRecord| m.shape().ok_or(field(name, m.kind.into()));
        let unit = UnitShape {
            gate: matrix("gate", &record.gate)?,
            up: matrix("up", &record.up)?,
            down: matrix("down", &record.down)?,
        };
        let width = unit.gate.rows;
        if width == 0 || width > MAX_WIDTH {
            return Err(field("unit width", width.into()));
        }
        for (name, m, rows, cols) in
            [("gate", unit.gate, width, hidden), ("up", unit.up, width, hidden), ("down", unit.down, hidden, width)]
        {
            if m.rows != rows {
                return Err(field(name, m.rows.into()));
            }
            if m.cols != cols {
                return Err(field(name, m.cols.into()));
            }
        }
        Ok(Self {
            operator,
            router,
            normalise: record.flags & ROUTER_NORMALISE != 0,
            activation: if record.flags & GATE_RELU != 0 { Activation::Relu } else { Activation::Silu },
            rope: record.rope != NO_ROPE && operator == Operator::Attention,
            heads: heads.into(),
            kv_heads: kv_heads.into(),
            head_dim: head_dim.into(),
            taps: taps.into(),
            window: record.window.get() as usize,
            attention_scale: finite("attention_scale", record.attention_scale.get())?,
            rope_mscale: finite("rope_mscale", record.rope_mscale.get())?,
            units: units.into(),
            top_k: top_k.into(),
            unit_width: width as usize,
            router_norm_eps: finite("router_norm_eps", record.router_norm_eps.get())?,
            router_scale: finite("router_scale", record.router_scale.get())?,
            first_extent: record.first_extent.get(),
            hot,
            unit,
        })
    }

    /// The roles that the layer must (`true`) or may have, with their rows and columns.
    fn tensors(&self, hidden: u32) -> heapless::Vec<(Role, u32, u32, bool), 20> {
        let mut list = heapless::Vec::new();
        let mut want = |role, rows: usize, cols: usize, needed| {
            // The capacity is the number of calls below.
            let _ = list.push((role, rows as u32, cols as u32, needed));
        };
        let hidden = hidden as usize;
        want(Role::OperatorNorm, 1, hidden, true);
        want(Role::FfnNorm, 1, hidden, true);
        match self.operator {
            Operator::Attention => {
                let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
                want(Role::Query, q, hidden, true);
                want(Role::Key, kv, hidden, true);
                want(Role::Value, kv, hidden, true);
                want(Role::AttentionOut, hidden, q, true);
                want(Role::QueryBias, 1, q, false);
                want(Role::KeyBias, 1, kv, false);
                want(Role::ValueBias, 1, kv, false);
                want(Role::AttentionOutBias, 1, hidden, false);
                want(Role::QueryNorm, 1, self.head_dim, false);
                want(Role::KeyNorm, 1, self.head_dim, false);
            }
            Operator::ShortConv => {
                want(Role::ConvIn, 3 * hidden, hidden, true);
                want(Role::ConvTaps, hidden, self.taps, true);
                want(Role::ConvOut, hidden, hidden, true);
                want(Role::ConvInBias, 1, 3 * hidden, false);
                want(Role::ConvTapsBias, 1, hidden, false);
                want(Role::ConvOutBias, 1, hidden, false);
            }
        }
        match self.router {
            Router::All => {
                want(Role::GateBias, 1, self.units * self.unit_width, false);
                want(Role::UpBias, 1, self.units * self.unit_width, false);
                want(Role::DownBias, 1, hidden, false);
                want(Role::ClusterGate, self.units, hidden, false);
                want(Role::ClusterBias, 1, self.units, false);
            }
            Router::Sigmoid | Router::Softmax => {
                want(Role::RouterGate, self.units, hidden, true);
                want(Role::RouterBias, 1, self.units, false);
            }
        }
        list
    }
}

/// Whether a role is one that must be plain f32: vectors and the convolution's taps, which operators read in place.
fn is_f32_role(role: Role) -> bool {
    !matches!(
        role,
        Role::Embedding
            | Role::OutputHead
            | Role::Query
            | Role::Key
            | Role::Value
            | Role::AttentionOut
            | Role::ConvIn
            | Role::ConvOut
            | Role::RouterGate
            | Role::ClusterGate
    )
}

impl<'a> Model<'a> {
    /// Reads and checks a model: `model` and `tensors` are the MODEL and TENSORS sections, `extents` the image's
    /// extent table, `page` its page.
    pub fn parse(model: &'a [u8], tensors: &'a [u8], extents: ExtentTable<'a>, page: u32) -> Result<Self, ModelError> {
        let truncated = ModelError::Truncated { section: "MODEL", len: model.len() };
        let (record, rest) = ModelRecord::ref_from_prefix(model).map_err(|_| truncated)?;
        if record.version.get() != RECORD_VERSION {
            return Err(ModelError::Version { found: record.version.get() });
        }
        let count = usize::from(record.layers.get());
        let place = Place(NO_LAYER);
        if count == 0 || count > MAX_LAYERS {
            return Err(ModelError::Field { place, field: "layers", value: count as u64 });
        }
        let (layers, _) = <[LayerRecord]>::ref_from_prefix_with_elems(rest, count).map_err(|_| truncated)?;
        let tensors = <[TensorRecord]>::ref_from_bytes(tensors)
            .map_err(|_| ModelError::Truncated { section: "TENSORS", len: tensors.len() })?;
        let this = Self { record, layers, tensors, extents, page };
        this.check_record()?;
        this.check_tensor_order()?;
        this.check_global()?;
        for index in 0..count {
            this.check_layer(index as u16)?;
        }
        this.check_hot()?;
        Ok(this)
    }

    /// The dense layers were all calibrated or none was, and their shares of the hottest units are no more than there are:
    /// what is pinned by them must leave room in the pool.
    fn check_hot(&self) -> Result<(), ModelError> {
        let layers = || (0..self.layers.len()).filter_map(|l| self.layer(l)).filter(|l| l.router == Router::All);
        let wrong = |value: usize| ModelError::Field { place: Place(NO_LAYER), field: "hot", value: value as u64 };
        let dense: usize = layers().map(|layer| layer.units).sum();
        let whole: usize = layers().map(|layer| usize::from(layer.hot[HOT_STEPS - 1])).sum();
        if whole != 0 && whole != dense {
            return Err(wrong(whole));
        }
        for step in 0..HOT_STEPS {
            let sum: usize = layers().map(|layer| usize::from(layer.hot[step])).sum();
            if sum > (step + 1) * dense / HOT_STEPS {
                return Err(wrong(sum));
            }
        }
        Ok(())
    }

    fn check_record(&self) -> Result<(), ModelError> {
        let place = Place(NO_LAYER);
        let r = self.record;
        for (field, value, max) in [
            ("hidden", r.hidden.get(), MAX_WIDTH),
            ("vocab", r.vocab.get(), MAX_VOCAB),
            ("context", r.context.get(), 1 << 24),
        ] {
            if value == 0 || value > max {
                return Err(ModelError::Field { place, field, value: value.into() });
            }
        }
        for (field, value) in [
            ("norm_eps", r.norm_eps),
            ("embedding_scale", r.embedding_scale),
            ("residual_scale", r.residual_scale),
            ("logit_scale", r.logit_scale),
            ("temperature", r.temperature),
            ("top_p", r.top_p),
            ("min_p", r.min_p),
            ("repetition_penalty", r.repetition_penalty),
        ] {
            if !value.get().is_finite() {
                return Err(ModelError::NotFinite { place, field });
            }
        }
        Ok(())
    }

    /// Every record is sorted, known, and inside its group.
    fn check_tensor_order(&self) -> Result<(), ModelError> {
        let mut last = None;
        // Sorted records change group rarely; measuring a group walks its extents.
        let mut group = (NO_LAYER, self.group_len(NO_LAYER)?);
        for (index, t) in self.tensors.iter().enumerate() {
            let wrong = |what| ModelError::Record { index, what };
            let key = (t.layer.get(), t.role.get());
            if last.is_some_and(|last| last >= key) {
                return Err(wrong("is not sorted by layer and role, or repeats its predecessor"));
            }
            last = Some(key);
            Role::from_u16(key.1).ok_or(wrong("the role is unknown"))?;
            if key.0 != NO_LAYER && usize::from(key.0) >= self.layers.len() {
                return Err(wrong("the layer does not exist"));
            }
            let shape = t.matrix.shape().ok_or(wrong("the encoding is unknown"))?;
            if shape.rows == 0 || shape.cols == 0 || shape.rows > MAX_VOCAB || shape.cols > MAX_VOCAB {
                return Err(wrong("the shape is out of range"));
            }
            if shape.bytes() != t.len.get() {
                return Err(wrong("the length is not that of the shape and encoding"));
            }
            if group.0 != key.0 {
                group = (key.0, self.group_len(key.0)?);
            }
            let end = t.offset.get().checked_add(t.len.get());
            if t.offset.get() % 64 != 0 || end.is_none_or(|end| end > group.1) {
                return Err(wrong("the tensor does not lie inside its group, at a multiple of 64"));
            }
        }
        Ok(())
    }

    /// Checks one tensor's presence and shape.
    fn check_tensor(&self, layer: u16, role: Role, rows: u32, cols: u32, needed: bool) -> Result<(), ModelError> {
        let place = Place(layer);
        let Some(t) = self.tensor(layer, role) else {
            return if needed { Err(ModelError::Missing { place, role }) } else { Ok(()) };
        };
        let plain = match t.shape.encoding {
            Encoding::F32 => true,
            Encoding::F16 | Encoding::Bf16 => !is_f32_role(role),
            Encoding::Quant(_) => !is_f32_role(role) && role != Role::RouterGate,
        };
        if (t.shape.rows, t.shape.cols) != (rows, cols) || !plain {
            let note = if plain { "" } else { " of another encoding" };
            return Err(ModelError::Shape {
                place,
                role,
                rows: t.shape.rows,
                cols: t.shape.cols,
                want_rows: rows,
                want_cols: cols,
                note,
            });
        }
        Ok(())
    }

    fn check_global(&self) -> Result<(), ModelError> {
        let (hidden, vocab) = (self.hidden() as u32, self.vocab() as u32);
        self.check_tensor(NO_LAYER, Role::Embedding, vocab, hidden, true)?;
        self.check_tensor(NO_LAYER, Role::OutputHead, vocab, hidden, false)?;
        self.check_tensor(NO_LAYER, Role::FinalNorm, 1, hidden, true)?;
        if let Some(t) = self.tensor(NO_LAYER, Role::RopeInvFreq) {
            self.check_tensor(NO_LAYER, Role::RopeInvFreq, 1, t.shape.cols, true)?;
        }
        Ok(())
    }

    fn check_layer(&self, layer: u16) -> Result<(), ModelError> {
        let shape = LayerShape::decode(&self.layers[usize::from(layer)], self.record.hidden.get(), layer)?;
        let place = Place(layer);
        for (role, rows, cols, needed) in shape.tensors(self.record.hidden.get()) {
            let whole = match role {
                Role::QueryNorm => shape.heads * shape.head_dim,
                Role::KeyNorm => shape.kv_heads * shape.head_dim,
                _ => 0,
            };
            // These two are of each head, or of all heads together.
            let found = self.tensor(layer, role).map(|t| t.shape.cols).filter(|found| *found as usize == whole);
            let cols = found.unwrap_or(cols);
            self.check_tensor(layer, role, rows, cols, needed)?;
        }
        if self.predicts(layer) {
            // A predictor's parts belong together.
            self.tensor(layer, Role::ClusterBias).ok_or(ModelError::Missing { place, role: Role::ClusterBias })?;
            // At least the thresholds of nothing and of everything.
            let cols = self.tensor(layer, Role::ClusterThresholds).map_or(2, |t| t.shape.cols.max(2));
            self.check_tensor(layer, Role::ClusterThresholds, 1, cols, true)?;
        }
        if shape.rope {
            let t = self
                .tensor(NO_LAYER, Role::RopeInvFreq)
                .ok_or(ModelError::Missing { place: Place(NO_LAYER), role: Role::RopeInvFreq })?;
            if t.shape.cols as usize * 2 > shape.head_dim {
                return Err(ModelError::Field { place, field: "head_dim", value: shape.head_dim as u64 });
            }
        }
        for unit in 0..shape.units {
            let extent = shape.first_extent.checked_add(unit as u32);
            let wrong = |what| ModelError::Extent { place, extent: extent.unwrap_or(u32::MAX), what };
            let record =
                extent.and_then(|e| self.extents.get(e as usize)).ok_or(wrong("the unit's extent does not exist"))?;
            if record.kind() != ExtentKind::Unit {
                return Err(wrong("is not a unit"));
            }
            if record.levels() != shape.unit.levels() {
                return Err(wrong("has another number of levels than the unit's encoding"));
            }
            for level in 0..record.levels() {
                if u64::from(record.level_len(level)) != shape.unit.level_len(level, self.page) {
                    return Err(wrong("a level has another length than the unit's encoding"));
                }
            }
        }
        Ok(())
    }

    /// First extent and number of extents of a group of resident tensors.
    pub fn group_extents(&self, layer: u16) -> (u32, u32) {
        match self.layers.get(usize::from(layer)) {
            Some(record) => (record.resident_first.get(), record.resident_count.get()),
            None => (self.record.resident_first.get(), self.record.resident_count.get()),
        }
    }

    /// Bytes of a group of resident tensors. Its extents must exist, follow one another and be of kind resident.
    fn group_len(&self, layer: u16) -> Result<u64, ModelError> {
        let (first, count) = self.group_extents(layer);
        let place = Place(layer);
        let (mut sum, mut end) = (0, None);
        for extent in first..first.saturating_add(count) {
            let wrong = |what| ModelError::Extent { place, extent, what };
            let record = self.extents.get(extent as usize).ok_or(wrong("the group's extent does not exist"))?;
            if record.kind() != ExtentKind::Resident || record.levels() != 1 {
                return Err(wrong("is not resident data"));
            }
            if end.is_some_and(|end| end != record.offset()) {
                return Err(wrong("does not follow its predecessor"));
            }
            end = Some(record.offset() + record.total_len());
            sum += record.total_len();
        }
        Ok(sum)
    }

    /// Image offset and bytes of a group of resident tensors (0 bytes if it has none).
    pub fn group(&self, layer: u16) -> (u64, u64) {
        let (first, _) = self.group_extents(layer);
        let offset = self.extents.get(first as usize).map_or(0, |r| r.offset());
        (offset, self.group_len(layer).unwrap_or(0))
    }

    /// The model's own record.
    pub fn record(&self) -> &'a ModelRecord {
        self.record
    }
    /// Number of layers.
    pub fn layer_count(&self) -> usize {
        self.layers.len()
    }
    /// Width of the residual stream.
    pub fn hidden(&self) -> usize {
        self.record.hidden.get() as usize
    }
    /// Tokens of the vocabulary.
    pub fn vocab(&self) -> usize {
        self.record.vocab.get() as usize
    }
    /// Longest sequence that the model was made for.
    pub fn context(&self) -> usize {
        self.record.context.get() as usize
    }
    /// The image's page.
    pub fn page(&self) -> u32 {
        self.page
    }
    /// The image's extents.
    pub fn extents(&self) -> ExtentTable<'a> {
        self.extents
    }
    /// The resident tensors' records.
    pub fn tensors(&self) -> &'a [TensorRecord] {
        self.tensors
    }
    /// A layer's description; `None` past the last.
    pub fn layer(&self, layer: usize) -> Option<LayerShape> {
        LayerShape::decode(self.layers.get(layer)?, self.record.hidden.get(), layer as u16).ok()
    }
    /// Where a tensor lies in its group.
    pub fn tensor(&self, layer: u16, role: Role) -> Option<TensorRef> {
        let key = (layer, role as u16);
        let at = self.tensors.binary_search_by_key(&key, |t| (t.layer.get(), t.role.get())).ok()?;
        let t = &self.tensors[at];
        Some(TensorRef { shape: t.matrix.shape()?, offset: t.offset.get(), len: t.len.get() })
    }
    /// Whether a layer has a predictor of the neuron clusters that a token needs.
    pub fn predicts(&self, layer: u16) -> bool {
        self.tensor(layer, Role::ClusterGate).is_some()
    }
    /// Number of units over all layers.
    pub fn unit_count(&self) -> usize {
        self.layers.iter().map(|l| usize::from(l.units.get())).sum()
    }
    /// Bytes of all unit extents.
    pub fn streamed_len(&self) -> u64 {
        self.extents.records().iter().filter(|r| r.kind() == ExtentKind::Unit).map(|r| r.total_len()).sum()
    }
}
