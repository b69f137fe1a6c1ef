//! What an image will hold: which tensor goes where, in which encoding.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail, ensure};
use forebay_kernels::weights::{Encoding, Fields as CodeFields, Group, MatrixShape, Quant};
use forebay_runtime::model::record::{NO_LAYER, Role};
use forebay_runtime::model::unit::UnitShape;

use super::encode::{Picked, View, deinterleave};
use super::{ConvertOptions, WeightChoice};
use crate::arch::{Architecture, FeedForward, Layer, Mixer, Model, Presence, QkNorm, Slot};
use crate::moments::Moments;
use crate::neurons::NeuronPlan;
use crate::quantize::{Grid, quantise_group};
use crate::source::{DType, Source, SourceTensor};

/// Largest default unit, in bytes.
const UNIT_BYTES: u64 = 512 << 10;
/// Clusters that a dense layer has by default, where it is wide enough.
const CLUSTERS: u32 = 4;
/// Most units of a layer that an engine accepts.
const MAX_UNITS: u32 = forebay_runtime::model::MAX_UNITS as u32;
/// Narrowest default cluster.
const NARROWEST: u32 = 32;

/// Where a resident tensor's values come from.
#[derive(Clone, Debug)]
pub(super) enum Content<'a> {
    /// Encoded from the source.
    View(View<'a>),
    /// Numbers, rounded to the float type of the shape.
    Values(Vec<f32>),
}

/// A resident tensor.
#[derive(Clone, Debug)]
pub(super) struct Resident<'a> {
    pub layer: u16,
    pub role: Role,
    pub shape: MatrixShape,
    pub content: Content<'a>,
}

/// The streamed units of a layer.
#[derive(Clone, Debug)]
pub(super) struct Units<'a> {
    pub shape: UnitShape,
    /// Gate, up and down of every unit.
    pub views: Vec<[View<'a>; 3]>,
    /// Whether they are experts.
    experts: bool,
}

impl Units<'_> {
    /// The neurons of a unit, numbered over all units as they lie in the source.
    pub fn neurons(&self, unit: usize) -> Vec<usize> {
        let down = &self.views[unit][2];
        let all = 0..down.cols as usize;
        match down.picked {
            Some(Picked::Cols(cols)) => cols.iter().map(|c| *c as usize).collect(),
            _ if self.experts => all.map(|c| unit * down.cols as usize + c).collect(),
            _ => all.map(|c| down.first_col as usize + c).collect(),
        }
    }
}

/// What an image will hold.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    /// By layer, the tensors of no layer last; then by role.
    pub residents: Vec<Resident<'a>>,
    /// One a layer.
    pub units: Vec<Units<'a>>,
    /// What was asked for, in a word.
    pub label: String,
    /// What the user should know.
    pub notices: Vec<String>,
}

/// How encodings are chosen.
struct Chooser {
    /// `None`: as in the source.
    choice: Option<WeightChoice>,
    /// That of units; `None`: as all.
    unit_choice: Option<WeightChoice>,
    /// That of the embedding and the output head; `None`: as all, but never less than 8 bits.
    head_choice: Option<WeightChoice>,
    group: Group,
    grids: BTreeMap<u8, Grid>,
    unit_fields: Option<CodeFields>,
}

/// What a matrix is for.
#[derive(Clone, Copy, PartialEq)]
enum Use {
    Embedding,
    Resident,
    Unit,
}

impl Chooser {
    /// The encoding that a source type is kept in, and whether it keeps every value.
    fn kept(dtype: DType) -> (Option<(u8, Grid)>, bool) {
        match dtype {
            DType::F32 | DType::F16 | DType::Bf16 => (None, true),
            DType::Q4_0 => (Some((4, Grid::with_zero(4))), true),
            DType::Q4_1 => (Some((4, Grid::affine(4))), true),
            DType::Q8_0 => (Some((8, Grid::Q8)), true),
            DType::Tq1 | DType::Tq2 => (Some((2, Grid::TERNARY)), true),
            DType::Q5_0 | DType::Q5_1 | DType::Q5K | DType::Q6K => (Some((8, Grid::Q8)), false),
            DType::Q2K | DType::Q3K | DType::Q4K => (Some((4, Grid::affine(4))), false),
        }
    }

    fn encoding(&self, dtype: DType, usage: Use) -> Encoding {
        let as_stored = match dtype {
            DType::F16 => Encoding::F16,
            DType::Bf16 => Encoding::Bf16,
            _ => Encoding::F32,
        };
        let own = match usage {
            Use::Embedding => self.head_choice,
            Use::Resident => None,
            Use::Unit => self.unit_choice,
        };
        let choice = own.or(self.choice);
        let (grid, group) = match choice {
            None => match Self::kept(dtype).0 {
                None => return as_stored,
                // GGML has one scale for 256.
                Some((_, Grid::TERNARY)) => (Grid::TERNARY, Group::G128),
                Some((_, grid)) => (grid, Group::G32),
            },
            Some(WeightChoice::F32) => return Encoding::F32,
            // bfloat16 has 16 bits too, and numbers that binary16 has not.
            Some(WeightChoice::F16) if dtype == DType::Bf16 => return Encoding::Bf16,
            Some(WeightChoice::F16) => return Encoding::F16,
            Some(WeightChoice::Q8) => (Grid::Q8, self.group),
            // Rows of the embedding are read one by one, and the head decides between tokens: both need precision,
            // unless they are given less by name.
            Some(_) if usage == Use::Embedding && own.is_none() => (Grid::Q8, self.group),
            Some(WeightChoice::Ternary) => (Grid::TERNARY, self.group),
            Some(low) => (self.grids[&low.bits()], self.group),
        };
        let fields = match (grid.bits, usage) {
            (8, _) => CodeFields::Q8,
            (bits, Use::Unit) => match self.unit_fields {
                Some(fields) if fields.bits() == bits => fields,
                _ => streamed_fields(bits),
            },
            (bits, _) => resident_fields(bits),
        };
        Encoding::Quant(Quant { fields, group, affine: grid.affine, zero_x2: grid.zero_x2 })
    }

    /// The chosen bits that take a grid that has to be measured.
    fn needs_grids(&self) -> impl Iterator<Item = u8> + use<> {
        let measured = |choice: &WeightChoice| *choice != WeightChoice::Ternary && choice.bits() <= 4;
        [self.choice, self.unit_choice, self.head_choice].into_iter().flatten().filter(measured).map(WeightChoice::bits)
    }
}

/// Fields of weights that are always read whole.
fn resident_fields(bits: u8) -> CodeFields {
    fields(if bits == 3 { [2, 1, 0, 0] } else { [bits, 0, 0, 0] })
}

/// Fields of weights of which a part may be read.
fn streamed_fields(bits: u8) -> CodeFields {
    fields(match bits {
        4 => [2, 2, 0, 0],
        3 => [2, 1, 0, 0],
        bits => [bits, 0, 0, 0],
    })
}

fn fields(widths: [u8; 4]) -> CodeFields {
    CodeFields::new(widths).unwrap_or(CodeFields::NIBBLE)
}

/// Finds the source tensors of a model, and remembers which were used.
struct Binder<'a> {
    source: &'a Source,
    architecture: &'static Architecture,
    used: BTreeSet<&'a str>,
}

impl<'a> Binder<'a> {
    fn name(&self, slot: Slot, layer: u16, expert: u32) -> Option<String> {
        let pattern = self.architecture.pattern(slot, self.source.is_gguf())?;
        Some(pattern.replace("{l}", &layer.to_string()).replace("{e}", &expert.to_string()))
    }

    /// The tensor of `slot`; `None` if it is not there and need not be.
    fn find(&mut self, slot: Slot, layer: u16, expert: u32, presence: Presence) -> Result<Option<&'a SourceTensor>> {
        if presence == Presence::Absent {
            return Ok(None);
        }
        let name = self.name(slot, layer, expert);
        let found = name.as_ref().and_then(|name| self.source.tensors.get(name));
        if found.is_none() && presence == Presence::Required {
            bail!(
                "{}: the tensor {} is missing, which a model of architecture {} needs; the download may be incomplete",
                self.source.path.display(),
                name.unwrap_or_else(|| format!("{slot:?}")),
                self.architecture.family
            );
        }
        if let Some(tensor) = found {
            self.used.insert(&tensor.name);
        }
        Ok(found)
    }

    fn check(&self, tensor: &SourceTensor, expected: &[u64]) -> Result<()> {
        // A vector may be written as a matrix of one row, and a depthwise kernel with a dimension of 1.
        let squeeze = |shape: &[u64]| shape.iter().copied().filter(|&n| n != 1).collect::<Vec<_>>();
        ensure!(
            squeeze(&tensor.shape) == squeeze(expected) && tensor.cols() == expected.last().copied().unwrap_or(1),
            "{}: tensor {} has shape {:?}, expected {expected:?} from the model's parameters; the file and its parameters do not belong together",
            self.source.file_name(tensor),
            tensor.name,
            tensor.shape
        );
        self.source.dtype(tensor)?;
        Ok(())
    }

    fn matrix(&mut self, slot: Slot, layer: u16, rows: u32, cols: u32, presence: Presence) -> Result<Option<View<'a>>> {
        let Some(tensor) = self.find(slot, layer, 0, presence)? else { return Ok(None) };
        self.check(tensor, &[rows.into(), cols.into()])?;
        Ok(Some(View { tensor, first_row: 0, rows, first_col: 0, cols, interleaved: None, picked: None }))
    }

    /// The matrix of an expert, which has a tensor of its own or is a part of one.
    fn expert(&mut self, slot: Slot, layer: u16, expert: u32, of: u32, rows: u32, cols: u32) -> Result<View<'a>> {
        let tensor = self.find(slot, layer, expert, Presence::Required)?.context("a required tensor")?;
        let own = self.architecture.pattern(slot, self.source.is_gguf()).is_some_and(|name| name.contains("{e}"));
        let shape = [of.into(), rows.into(), cols.into()];
        self.check(tensor, if own { &shape[1..] } else { &shape })?;
        let first_row = if own { 0 } else { u64::from(expert) * u64::from(rows) };
        Ok(View { tensor, first_row, rows, first_col: 0, cols, interleaved: None, picked: None })
    }
}

/// Decides what the image of `model` holds.
pub(super) fn plan<'a>(
    source: &'a Source,
    architecture: &'static Architecture,
    model: &Model,
    options: &'a ConvertOptions,
) -> Result<Plan<'a>> {
    if let Some(neurons) = &options.neurons {
        check_neurons(neurons, model, options)?;
    }
    if let Some(moments) = &options.moments {
        check_moments(moments, model)?;
    }
    let choice = options.weights.or_else(|| (!source.is_gguf()).then_some(WeightChoice::Q4));
    let (unit_choice, head_choice) = (options.unit_weights, options.head_weights);
    if choice.or(unit_choice).or(head_choice).is_none() && options.group.is_some() {
        bail!("a group length needs a choice of weights: without one, a GGUF file's own encodings are kept");
    }
    let group = options.group.unwrap_or(Group::G32);
    let mut binder = Binder { source, architecture, used: BTreeSet::new() };
    let parts: Vec<Parts<'a>> = (0u16..)
        .zip(&model.layers)
        .map(|(l, layer)| Parts::bind(&mut binder, model, l, layer))
        .collect::<Result<_>>()?;
    let grids = BTreeMap::new();
    let mut chooser = Chooser { choice, unit_choice, head_choice, group, grids, unit_fields: options.unit_fields };
    for bits in chooser.needs_grids() {
        let measured = choose_grid(source, &parts, bits, group, options.affine)?;
        chooser.grids.insert(bits, measured);
    }

    let mut residents = global(&mut binder, model, &chooser)?;
    let mut units = Vec::new();
    let expert_width = parts.iter().find(|part| part.experts.is_some()).map(|part| part.width);
    for (l, part) in (0u16..).zip(parts) {
        let (layer_residents, layer_units) = part.finish(source, l, model.hidden, &chooser, options, expert_width)?;
        residents.extend(layer_residents);
        units.push(layer_units);
    }
    residents.sort_by_key(|r| (r.layer, r.role));
    if let Some(fields) = options.unit_fields {
        let cut = |m: &MatrixShape| matches!(m.encoding, Encoding::Quant(q) if q.fields == fields);
        ensure!(
            units.iter().any(|u: &Units<'_>| u.shape.matrices().iter().any(cut)),
            "no streamed weights have the {} bits that they were to be cut from; choose other fields or weights",
            fields.bits()
        );
    }

    let mut notices = Vec::new();
    check_unused(&binder, model, &mut notices)?;
    if choice.is_none() {
        note_requantised(&binder, &mut notices);
    }
    let label = match (choice, units[0].views.first()) {
        (Some(choice), _) => choice.name().to_owned(),
        (None, Some([gate, ..])) => source.dtype(gate.tensor)?.name().to_lowercase(),
        (None, None) => String::new(),
    };
    let label = match unit_choice {
        Some(units) => format!("{label} units {}", units.name()),
        None => label,
    };
    let label = match head_choice {
        Some(head) => format!("{label} head {}", head.name()),
        None => label,
    };
    Ok(Plan { residents, units, label, notices })
}

/// The tensors of no layer.
fn global<'a>(binder: &mut Binder<'a>, model: &Model, chooser: &Chooser) -> Result<Vec<Resident<'a>>> {
    let mut list = Vec::new();
    let slots = [
        (Role::Embedding, model.vocab, Presence::Required),
        (Role::OutputHead, model.vocab, model.head),
        (Role::FinalNorm, 1, Presence::Required),
    ];
    for (role, rows, presence) in slots {
        let Some(view) = binder.matrix(Slot::Resident(role), NO_LAYER, rows, model.hidden, presence)? else { continue };
        let encoding = match role {
            Role::FinalNorm => Encoding::F32,
            _ => chooser.encoding(binder.source.dtype(view.tensor)?, Use::Embedding),
        };
        let shape = MatrixShape { rows, cols: model.hidden, encoding };
        list.push(Resident { layer: NO_LAYER, role, shape, content: Content::View(view) });
    }
    let values = model.rope.inv_freq.clone();
    let shape = MatrixShape { rows: 1, cols: values.len() as u32, encoding: Encoding::F32 };
    list.push(Resident { layer: NO_LAYER, role: Role::RopeInvFreq, shape, content: Content::Values(values) });
    // Read here only so that they do not count as unknown.
    binder.find(Slot::RopeDivisors, NO_LAYER, 0, Presence::Optional)?;
    Ok(list)
}

/// The tensors of a layer, bound but not encoded.
struct Parts<'a> {
    /// Matrices that are quantised, and those that stay floats.
    matrices: Vec<(Role, View<'a>, bool)>,
    /// Gate and up bias, to be padded to the clusters.
    neuron_biases: Vec<(Role, View<'a>)>,
    width: u32,
    experts: Option<Vec<[View<'a>; 3]>>,
    dense: Option<[View<'a>; 3]>,
}

impl<'a> Parts<'a> {
    fn bind(binder: &mut Binder<'a>, model: &Model, l: u16, layer: &Layer) -> Result<Self> {
        use Presence::Required;
        let hidden = model.hidden;
        let mut wanted =
            vec![(Role::OperatorNorm, 1, hidden, Required, false), (Role::FfnNorm, 1, hidden, Required, false)];
        let mut head_dim = 0;
        match &layer.mixer {
            Mixer::Attention(a) => {
                head_dim = a.head_dim;
                let (q, kv) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
                let (norm, q_norm, k_norm) = match a.qk_norm {
                    QkNorm::None => (Presence::Absent, 0, 0),
                    QkNorm::Head => (Required, a.head_dim, a.head_dim),
                    QkNorm::Whole => (Required, q, kv),
                };
                wanted.extend([
                    (Role::Query, q, hidden, Required, true),
                    (Role::Key, kv, hidden, Required, true),
                    (Role::Value, kv, hidden, Required, true),
                    (Role::AttentionOut, hidden, q, Required, true),
                    (Role::QueryBias, 1, q, a.qkv_bias, false),
                    (Role::KeyBias, 1, kv, a.qkv_bias, false),
                    (Role::ValueBias, 1, kv, a.qkv_bias, false),
                    (Role::AttentionOutBias, 1, hidden, a.out_bias, false),
                    (Role::QueryNorm, 1, q_norm, norm, false),
                    (Role::KeyNorm, 1, k_norm, norm, false),
                ]);
            }
            Mixer::ShortConv { taps, bias } => wanted.extend([
                (Role::ConvIn, 3 * hidden, hidden, Required, true),
                (Role::ConvTaps, hidden, *taps, Required, false),
                (Role::ConvOut, hidden, hidden, Required, true),
                (Role::ConvInBias, 1, 3 * hidden, *bias, false),
                (Role::ConvTapsBias, 1, hidden, *bias, false),
                (Role::ConvOutBias, 1, hidden, *bias, false),
            ]),
        }
        let mut neuron_biases = Vec::new();
        let (mut experts, mut dense) = (None, None);
        let width = match &layer.feed_forward {
            FeedForward::Dense { width, bias } => {
                for role in [Role::GateBias, Role::UpBias] {
                    if let Some(view) = binder.matrix(Slot::Resident(role), l, 1, *width, *bias)? {
                        neuron_biases.push((role, view));
                    }
                }
                wanted.push((Role::DownBias, 1, hidden, *bias, false));
                let mut get = |slot, rows, cols| -> Result<View<'a>> {
                    binder.matrix(slot, l, rows, cols, Required)?.context("a required tensor")
                };
                dense = Some([
                    get(Slot::Gate, *width, hidden)?,
                    get(Slot::Up, *width, hidden)?,
                    get(Slot::Down, hidden, *width)?,
                ]);
                *width
            }
            FeedForward::Experts { count, width, bias, .. } => {
                wanted.push((Role::RouterGate, *count, hidden, Required, false));
                wanted.push((Role::RouterBias, 1, *count, *bias, false));
                let mut get = |e| -> Result<[View<'a>; 3]> {
                    Ok([
                        binder.expert(Slot::ExpertGate, l, e, *count, *width, hidden)?,
                        binder.expert(Slot::ExpertUp, l, e, *count, *width, hidden)?,
                        binder.expert(Slot::ExpertDown, l, e, *count, hidden, *width)?,
                    ])
                };
                experts = Some((0..*count).map(&mut get).collect::<Result<_>>()?);
                *width
            }
        };
        let mut matrices = Vec::new();
        let gguf_interleaved = binder.source.is_gguf() && binder.architecture.gguf_interleaved;
        for (role, rows, cols, presence, quantised) in wanted {
            let Some(mut view) = binder.matrix(Slot::Resident(role), l, rows, cols, presence)? else { continue };
            if gguf_interleaved && matches!(role, Role::Query | Role::Key | Role::QueryBias | Role::KeyBias) {
                view.interleaved = Some(head_dim);
            }
            matrices.push((role, view, quantised));
        }
        Ok(Self { matrices, neuron_biases, width, experts, dense })
    }

    fn finish(
        self,
        source: &Source,
        layer: u16,
        hidden: u32,
        chooser: &Chooser,
        options: &'a ConvertOptions,
        expert_width: Option<u32>,
    ) -> Result<(Vec<Resident<'a>>, Units<'a>)> {
        let mut residents = Vec::new();
        for (role, view, quantised) in self.matrices {
            let encoding = match quantised {
                true => chooser.encoding(source.dtype(view.tensor)?, Use::Resident),
                false => Encoding::F32,
            };
            let shape = MatrixShape { rows: view.rows, cols: view.cols, encoding };
            let content = match view.interleaved {
                Some(dim) if view.rows == 1 => Content::Values(deinterleaved_vector(source, &view, dim)?),
                _ => Content::View(view),
            };
            residents.push(Resident { layer, role, shape, content });
        }
        let neurons = options.neurons.as_ref().and_then(|plan| Some((plan.width, plan.layers.get(&layer)?)));
        let experts = self.experts.is_some();
        let (unit_width, views) = match (self.experts, self.dense) {
            (Some(experts), _) => (self.width, experts),
            (None, Some(dense)) => {
                let default = || default_width(source, &dense, self.width, hidden, chooser, expert_width);
                let width = neurons.map(|(width, _)| width).or(options.unit_width).map_or_else(default, Ok)?;
                (width, clusters(&dense, self.width, width, neurons.map(|(_, neurons)| neurons.order.as_slice())))
            }
            (None, None) => bail!("layer {layer} has no feed-forward"),
        };
        let units = views.len() as u32;
        ensure!(
            units <= MAX_UNITS,
            "layer {layer} would have {units} units of {unit_width} neurons, expected at most {MAX_UNITS}; choose wider units"
        );
        let matrix = |m: usize, rows, cols| -> Result<MatrixShape> {
            // All units of a layer have one encoding: the source type's, if they share one.
            let mut dtypes = views.iter().map(|unit| source.dtype(unit[m].tensor));
            let first = dtypes.next().context("a layer without units")??;
            let mut dtype = first;
            for other in dtypes {
                if other? != first {
                    dtype = DType::F32;
                }
            }
            Ok(MatrixShape { rows, cols, encoding: chooser.encoding(dtype, Use::Unit) })
        };
        let shape = UnitShape {
            gate: matrix(0, unit_width, hidden)?,
            up: matrix(1, unit_width, hidden)?,
            down: matrix(2, hidden, unit_width)?,
        };
        for m in shape.matrices() {
            if let Encoding::Quant(q) = m.encoding {
                ensure!(
                    self.width.is_multiple_of(unit_width) || unit_width.is_multiple_of(q.group.len() as u32),
                    "units of {unit_width} neurons are not a multiple of the group of {}",
                    q.group.len()
                );
            }
        }
        for (role, mut view) in self.neuron_biases {
            view.picked = neurons.map(|(_, neurons)| Picked::Cols(&neurons.order));
            let shape = MatrixShape { rows: 1, cols: units * unit_width, encoding: Encoding::F32 };
            residents.push(Resident { layer, role, shape, content: Content::View(view) });
        }
        if let Some((_, neurons)) = neurons {
            let mut add = |role, encoding, cols: usize, values: &[f32]| {
                let shape = MatrixShape { rows: (values.len() / cols) as u32, cols: cols as u32, encoding };
                residents.push(Resident { layer, role, shape, content: Content::Values(values.to_vec()) });
            };
            add(Role::ClusterGate, Encoding::F16, hidden as usize, &neurons.gate);
            add(Role::ClusterBias, Encoding::F32, neurons.bias.len(), &neurons.bias);
            add(Role::ClusterThresholds, Encoding::F32, neurons.thresholds.len(), &neurons.thresholds);
        }
        Ok((residents, Units { shape, views, experts }))
    }
}

/// The vector `view`, with each head's pairs put in the order of halves.
fn deinterleaved_vector(source: &Source, view: &View<'_>, dim: u32) -> Result<Vec<f32>> {
    let mut stored = vec![0.0; view.cols as usize];
    source.read_f32(view.tensor, 0, 0..u64::from(view.cols), &mut Vec::new(), &mut stored)?;
    Ok((0..view.cols).map(|i| stored[deinterleave(i, dim) as usize]).collect())
}

/// The width of a dense layer's clusters: a power of two times 32 such that a unit has at most [`UNIT_BYTES`],
/// the layer at least [`CLUSTERS`] clusters, and at most as many as an engine accepts.
///
/// Beside experts that are larger than that, clusters are as wide as an expert: the pool's slots are as large as the
/// largest unit, so smaller clusters would only waste them.
fn default_width(
    source: &Source,
    dense: &[View<'_>; 3],
    width: u32,
    hidden: u32,
    chooser: &Chooser,
    expert_width: Option<u32>,
) -> Result<u32> {
    let mut least = NARROWEST;
    let mut encodings = Vec::new();
    for view in dense {
        let encoding = chooser.encoding(source.dtype(view.tensor)?, Use::Unit);
        if let Encoding::Quant(q) = encoding {
            least = least.max(q.group.len() as u32);
        }
        encodings.push(encoding);
    }
    let bytes = |w: u32| -> u64 {
        let shape = |rows, cols, encoding| MatrixShape { rows, cols, encoding }.bytes();
        shape(w, hidden, encodings[0]) + shape(w, hidden, encodings[1]) + shape(hidden, w, encodings[2])
    };
    if let Some(expert) = expert_width.filter(|&expert| bytes(expert) > UNIT_BYTES && width.is_multiple_of(expert)) {
        return Ok(expert);
    }
    let mut best = least;
    while bytes(best * 2) <= UNIT_BYTES && width.div_ceil(best * 2) >= CLUSTERS {
        best *= 2;
    }
    while width.div_ceil(best) > MAX_UNITS {
        best *= 2;
    }
    Ok(best)
}

/// Refuses a plan that was made for another model, or that the options contradict.
fn check_neurons(neurons: &NeuronPlan, model: &Model, options: &ConvertOptions) -> Result<()> {
    let remedy = "calibrate an image of this very model";
    ensure!(
        neurons.hidden == model.hidden,
        "the neuron plan is for a model of width {}, but this one has {}; {remedy}",
        neurons.hidden,
        model.hidden
    );
    ensure!(
        options.unit_width.is_none_or(|width| width == neurons.width),
        "the neuron plan is for clusters of {} neurons, not {}",
        neurons.width,
        options.unit_width.unwrap_or_default()
    );
    if let Some(layer) = neurons.layers.keys().find(|l| usize::from(**l) >= model.layers.len()) {
        bail!("the neuron plan is for a layer {layer}, which this model does not have; {remedy}");
    }
    for (l, layer) in (0u16..).zip(&model.layers) {
        let planned = neurons.layers.get(&l).map(|layer| layer.order.len());
        let found = match &layer.feed_forward {
            FeedForward::Dense { width, .. } => Some(*width as usize),
            FeedForward::Experts { .. } => None,
        };
        let text = |n: Option<usize>| n.map_or("no dense neurons".into(), |n| format!("{n} dense neurons"));
        ensure!(
            planned == found,
            "the neuron plan has {} for layer {l}, but the model has {} there; {remedy}",
            text(planned),
            text(found)
        );
    }
    Ok(())
}

/// Refuses moments of another model.
fn check_moments(moments: &Moments, model: &Model) -> Result<()> {
    let remedy = "calibrate an image of this very model";
    ensure!(
        moments.layer_count() == model.layers.len(),
        "the moments are of {} layers, but the model has {}; {remedy}",
        moments.layer_count(),
        model.layers.len()
    );
    for (l, layer) in (0u16..).zip(&model.layers) {
        let Some((neurons, hidden)) = moments.shape(l) else { continue };
        // Those of a dense layer are filled up to whole units.
        let (fits, expected) = match &layer.feed_forward {
            FeedForward::Dense { width, .. } => (neurons >= *width as usize, *width as usize),
            FeedForward::Experts { count, width, .. } => {
                let expected = *count as usize * *width as usize;
                (neurons == expected, expected)
            }
        };
        ensure!(
            fits && hidden == model.hidden as usize,
            "the moments of layer {l} are of {neurons} neurons and an input of {hidden}, but the model has {expected} and \
             {}; {remedy}",
            model.hidden
        );
    }
    Ok(())
}

/// Cuts a dense feed-forward of `width` neurons into clusters of `unit_width`, the last one padded; in `order`, if
/// there is one.
fn clusters<'a>(dense: &[View<'a>; 3], width: u32, unit_width: u32, order: Option<&'a [u32]>) -> Vec<[View<'a>; 3]> {
    let [gate, up, down] = dense;
    (0..width.div_ceil(unit_width))
        .map(|u| {
            let first = u * unit_width;
            let n = unit_width.min(width - first);
            let picked = order.map(|order| &order[first as usize..][..n as usize]);
            let rows =
                |v: &View<'a>| View { first_row: first.into(), rows: n, picked: picked.map(Picked::Rows), ..v.clone() };
            let cols = View { first_col: first.into(), cols: n, picked: picked.map(Picked::Cols), ..down.clone() };
            [rows(gate), rows(up), cols]
        })
        .collect()
}

/// Refuses tensors that nothing uses: a model with a part left out would be wrong in silence.
fn check_unused(binder: &Binder<'_>, model: &Model, notices: &mut Vec<String>) -> Result<()> {
    let head = binder.name(Slot::Resident(Role::OutputHead), NO_LAYER, 0);
    for (name, tensor) in &binder.source.tensors {
        if binder.used.contains(name.as_str()) || name.ends_with(".rotary_emb.inv_freq") {
            continue;
        }
        if Some(name) == head.as_ref() && model.head == Presence::Absent {
            notices
                .push(format!("{name} is left out: the model's parameters say that the embedding is the output head"));
            continue;
        }
        bail!(
            "{}: the tensor {name} {:?} has no place in a model of architecture {}; it is a variant that is not supported",
            binder.source.file_name(tensor),
            tensor.shape,
            binder.architecture.family
        );
    }
    Ok(())
}

fn note_requantised(binder: &Binder<'_>, notices: &mut Vec<String>) {
    let mut counts: BTreeMap<&str, (usize, String)> = BTreeMap::new();
    for name in &binder.used {
        let Some(dtype) = binder.source.tensors.get(*name).and_then(|t| t.dtype) else { continue };
        if let (Some((_, grid)), false) = Chooser::kept(dtype) {
            counts.entry(dtype.name()).or_insert_with(|| (0, format!("{} bits", grid.bits))).0 += 1;
        }
    }
    for (name, (n, bits)) in counts {
        notices.push(format!("{n} tensors of type {name} were requantised to {bits}, with a small loss"));
    }
}

/// Chooses how codes of `bits` lie: the symmetric grid with the least squared error on a sample of the model's
/// matrices, or, if `affine` does not say, codes with a minimum when these are worth their bytes: 6.02 dB a bit.
fn choose_grid(source: &Source, parts: &[Parts<'_>], bits: u8, group: Group, affine: Option<bool>) -> Result<Grid> {
    const ROWS: usize = 256;
    let mut candidates = vec![Grid::paired(bits)];
    if bits > 1 {
        candidates.push(Grid::with_zero(bits));
    }
    candidates.push(Grid::affine(bits));
    let mut views: Vec<&View<'_>> = Vec::new();
    for part in parts {
        views.extend(part.matrices.iter().filter(|(.., quantised)| *quantised).map(|(_, view, _)| view));
        views.extend(part.experts.iter().flatten().chain(&part.dense).flatten());
    }
    let total: u64 = views.iter().map(|v| u64::from(v.rows)).sum();
    let mut errors = vec![0.0f64; candidates.len()];
    let (mut raw, mut row, mut codes) = (Vec::new(), Vec::new(), vec![0; group.len()]);
    let (mut view, mut before) = (0, 0);
    for i in 0..ROWS as u64 {
        // Evenly spaced rows of all matrices, one after another.
        let at = total * (2 * i + 1) / (2 * ROWS as u64);
        while at >= before + u64::from(views[view].rows) {
            before += u64::from(views[view].rows);
            view += 1;
        }
        let v = views[view];
        row.resize(v.cols as usize, 0.0);
        let cols = v.first_col..v.first_col + u64::from(v.cols);
        source.read_f32(v.tensor, v.first_row + at - before, cols, &mut raw, &mut row)?;
        for x in row.chunks(group.len()) {
            for (grid, error) in candidates.iter().zip(&mut errors) {
                let codes = &mut codes[..x.len()];
                let Some((s, m)) = quantise_group(x, *grid, codes) else { continue };
                *error += x.iter().zip(&*codes).map(|(x, q)| f64::from(grid.weight(*q, s, m) - x).powi(2)).sum::<f64>();
            }
        }
    }
    let (symmetric, with_minimum) = errors.split_at(candidates.len() - 1);
    let best = if symmetric.len() > 1 && symmetric[1] <= symmetric[0] { 1 } else { 0 };
    let worth = symmetric[best] * 4f64.powf(-16.0 / group.len() as f64);
    let use_affine = affine.unwrap_or(with_minimum[0] < worth);
    Ok(candidates[if use_affine { candidates.len() - 1 } else { best }])
}
