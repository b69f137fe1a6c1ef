//! Conversion of a Hugging Face folder or a GGUF file into an image.
//!
//! The source is read by rows and written by row blocks and units, so memory does not grow with the model. The
//! bytes of an image depend on the source, the options and the converter's version alone.

mod encode;
mod plan;
mod writer;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use forebay_kernels::ops::Activation;
use forebay_kernels::weights::{Fields as CodeFields, Group};
use forebay_runtime::model::record::{
    GATE_RELU, LayerRecord, MatrixRecord, ModelRecord, NO_ROPE, Operator, RECORD_VERSION, ROUTER_NORMALISE, Router,
};
use forebay_runtime::tokenizer::Tokenizer;
use forebay_storage::image::{MAX_PAGE, MIN_PAGE};
use serde::Serialize;
use zerocopy::FromZeros;

pub use encode::{Tally, encoding_name};

use crate::arch::{self, Architecture, FeedForward, Mixer, Model};
use crate::gguf::{self, Gguf};
use crate::moments::Moments;
use crate::neurons::NeuronPlan;
use crate::source::{Fields, Format, Key, Source, read_json};
use crate::template::{self, Template};
use crate::tokenizer::{GgufTokenizer, TokenizerSource, from_gguf_fields};

/// Encoding that weights are asked to have.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum WeightChoice {
    /// 4 bits.
    Q4,
    /// 3 bits.
    Q3,
    /// 2 bits.
    Q2,
    /// 1 bit.
    Q1,
    /// -1, 0 and 1 times a scale, in 2 bits.
    Ternary,
    /// 8 bits.
    Q8,
    /// 16-bit floats: bfloat16 where the source is bfloat16, else binary16.
    F16,
    /// 32-bit floats.
    F32,
}

impl WeightChoice {
    /// Every choice.
    pub const ALL: [Self; 8] = [Self::Q4, Self::Q3, Self::Q2, Self::Q1, Self::Ternary, Self::Q8, Self::F16, Self::F32];

    /// Name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Q4 => "q4",
            Self::Q3 => "q3",
            Self::Q2 => "q2",
            Self::Q1 => "q1",
            Self::Ternary => "ternary",
            Self::Q8 => "q8",
            Self::F16 => "f16",
            Self::F32 => "f32",
        }
    }

    /// Bits a weight.
    const fn bits(self) -> u8 {
        match self {
            Self::Q4 => 4,
            Self::Q3 => 3,
            Self::Q2 | Self::Ternary => 2,
            Self::Q1 => 1,
            Self::Q8 => 8,
            Self::F16 => 16,
            Self::F32 => 32,
        }
    }
}

impl std::str::FromStr for WeightChoice {
    type Err = anyhow::Error;

    fn from_str(s: &str) -> Result<Self> {
        let names = || Self::ALL.map(Self::name).join(", ");
        Self::ALL
            .into_iter()
            .find(|c| c.name() == s)
            .with_context(|| format!("{s:?} is no encoding of weights, expected one of {}", names()))
    }
}

/// How to convert.
#[derive(Clone, Debug)]
pub struct ConvertOptions {
    /// Encoding of matrices; `None` is q4 for a Hugging Face folder, and keeps a GGUF file's own encodings.
    pub weights: Option<WeightChoice>,
    /// Encoding of the streamed units (experts, clusters of neurons); `None` is that of the other matrices.
    pub unit_weights: Option<WeightChoice>,
    /// Encoding of the embedding and the output head; `None` is that of the other matrices, but at least 8 bits where
    /// `weights` is given.
    pub head_weights: Option<WeightChoice>,
    /// Weights a scale; `None` is 32.
    pub group: Option<Group>,
    /// Whether groups of 1 to 4 bits have a minimum; `None` measures whether it is worth its bytes.
    pub affine: Option<bool>,
    /// Page of the image, in bytes: a power of two from 512 to 1 MiB.
    pub page: u32,
    /// Neurons of a dense feed-forward's clusters; `None` chooses by size.
    pub unit_width: Option<u32>,
    /// How the codes of streamed units are cut, where their bits are these; `None` is `[2, 2]` and `[2, 1]`.
    pub unit_fields: Option<CodeFields>,
    /// Threads; `None` is one a processor.
    pub threads: Option<usize>,
    /// Order, clusters and predictors of dense layers' neurons; sets their `unit_width`.
    pub neurons: Option<Arc<NeuronPlan>>,
    /// Which errors of streamed weights matter; their codes are chosen for that. Codes of the source are kept only
    /// in units of one level.
    pub moments: Option<Arc<Moments>>,
    /// With moments: what the squared error of a unit's first levels counts, that of the whole unit being 1.
    pub prefix_weight: f32,
    /// Name of the model; `None` is the folder's or the GGUF file's.
    pub name: Option<String>,
}

impl Default for ConvertOptions {
    fn default() -> Self {
        Self {
            weights: None,
            unit_weights: None,
            head_weights: None,
            group: None,
            affine: None,
            page: 4096,
            unit_width: None,
            unit_fields: None,
            threads: None,
            neurons: None,
            moments: None,
            prefix_weight: 0.2,
            name: None,
        }
    }
}

/// Is told how a conversion goes.
pub trait Progress {
    /// There will be `bytes` bytes to write.
    fn set_total(&mut self, bytes: u64);
    /// `bytes` more have been written.
    fn advance(&mut self, bytes: u64);
    /// Something the user should know.
    fn message(&mut self, text: &str);
}

/// Tells nobody.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn set_total(&mut self, _bytes: u64) {}
    fn advance(&mut self, _bytes: u64) {}
    fn message(&mut self, _text: &str) {}
}

/// What a conversion made.
#[derive(Clone, Debug, Serialize)]
pub struct ConvertReport {
    /// Model name.
    pub name: String,
    /// Model family.
    pub family: String,
    /// Decoder layers.
    pub layers: usize,
    /// Bytes of the image.
    pub image_len: u64,
    /// Bytes that stay in memory.
    pub resident_len: u64,
    /// Streamed units.
    pub units: usize,
    /// Bytes of the streamed units.
    pub unit_len: u64,
    /// Weights, bytes and errors by encoding.
    pub encodings: BTreeMap<String, Tally>,
    /// What the user should know.
    pub notices: Vec<String>,
    /// Whether the image has a tokenizer.
    pub tokenizer: bool,
    /// Whether the image has a chat template.
    pub chat_template: bool,
}

impl fmt::Display for ConvertReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |n: u64| n as f64 / f64::from(1 << 20);
        writeln!(f, "{} ({}, {} layers): {:.1} MiB", self.name, self.family, self.layers, mib(self.image_len))?;
        let (resident, units) = (mib(self.resident_len), mib(self.unit_len));
        writeln!(f, "  resident {resident:.1} MiB, {} units {units:.1} MiB", self.units)?;
        for (name, t) in &self.encodings {
            writeln!(
                f,
                "  {name:<20} {:>13} weights  {:>9.2} MiB  rmse {:.3e} ({:.2} %)",
                t.weights,
                mib(t.bytes),
                t.rmse(),
                t.relative_rmse() * 100.0
            )?;
        }
        Ok(())
    }
}

/// Suggested sampling.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Sampling {
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    repetition_penalty: f32,
}

/// Converts the model at `model`, a Hugging Face folder or a GGUF file, into an image at `image`.
///
/// The image is written beside its final name and renamed when it is complete: `image` is never half written.
///
/// # Errors
/// Says what is wrong with which file, tensor, parameter or option, and what to do about it.
pub fn convert(
    model: &Path,
    image: &Path,
    options: &ConvertOptions,
    progress: &mut dyn Progress,
) -> Result<ConvertReport> {
    convert_source(&Source::open(model)?, image, options, progress)
}

/// Converts an opened source; see [`convert`].
///
/// # Errors
/// As [`convert`].
pub fn convert_source(
    source: &Source,
    image: &Path,
    options: &ConvertOptions,
    progress: &mut dyn Progress,
) -> Result<ConvertReport> {
    let model = &source.path;
    ensure!(
        options.page.is_power_of_two() && (MIN_PAGE..=MAX_PAGE).contains(&options.page),
        "a page of {} bytes, expected a power of two from {MIN_PAGE} to {MAX_PAGE}",
        options.page
    );
    ensure!(options.unit_width != Some(0), "units of 0 neurons, expected at least 1");
    let architecture = Architecture::of(source).with_context(|| model.display().to_string())?;
    let description = arch::describe(source, architecture).with_context(|| model.display().to_string())?;
    let mut plan = plan::plan(source, architecture, &description, options)?;
    let sampling = sampling(source)?;
    let mut notices = core::mem::take(&mut plan.notices);
    let tokenizer = tokenizer(source, &mut notices).with_context(|| model.display().to_string())?;
    let chat_template = chat_template(source)?;
    let chat_turns = chat_turns(tokenizer.as_deref(), chat_template.as_deref(), &mut notices)?;
    for notice in &notices {
        progress.message(notice);
    }

    let name = options.name.clone().unwrap_or_else(|| source.name.clone());
    let metadata = metadata(source, &name, &plan.label, options);
    let records = records(&description, &plan, options.neurons.as_deref(), &sampling, &name);
    let sections =
        writer::Sections { tokenizer, chat_template: chat_template.map(String::into_bytes), chat_turns, metadata };
    let written = writer::write(source, &plan, records, &sections, image, options, progress)
        .with_context(|| format!("writing {}", image.display()))?;
    Ok(ConvertReport {
        name,
        family: description.family.into(),
        layers: description.layers.len(),
        image_len: written.image_len,
        resident_len: written.resident_len,
        units: plan.units.iter().map(|u| u.views.len()).sum(),
        unit_len: written.unit_len,
        encodings: written.tallies,
        notices,
        tokenizer: sections.tokenizer.is_some(),
        chat_template: sections.chat_template.is_some(),
    })
}

/// `text` cut to fit `N` bytes of UTF-8, zero padded.
fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut out = [0; N];
    let mut len = text.len().min(N);
    while !text.is_char_boundary(len) {
        len -= 1;
    }
    out[..len].copy_from_slice(&text.as_bytes()[..len]);
    out
}

/// The MODEL section's records, but for the extents.
fn records(
    model: &Model,
    plan: &plan::Plan<'_>,
    neurons: Option<&NeuronPlan>,
    sampling: &Sampling,
    name: &str,
) -> (ModelRecord, Vec<LayerRecord>) {
    let mut record = ModelRecord::new_zeroed();
    record.version = RECORD_VERSION.into();
    record.layers = (model.layers.len() as u16).into();
    record.hidden = model.hidden.into();
    record.vocab = model.vocab.into();
    record.context = model.context.into();
    record.norm_eps = model.norm_eps.into();
    record.embedding_scale = model.embedding_scale.into();
    record.residual_scale = model.residual_scale.into();
    record.logit_scale = model.logit_scale.into();
    record.temperature = sampling.temperature.into();
    record.top_p = sampling.top_p.into();
    record.min_p = sampling.min_p.into();
    record.repetition_penalty = sampling.repetition_penalty.into();
    record.top_k = sampling.top_k.into();
    record.weights_label = padded(&plan.label);
    record.family = padded(model.family);
    record.name = padded(name);
    let hot = neurons.map_or_else(BTreeMap::new, NeuronPlan::hot);
    let layers = (0u16..).zip(&model.layers).zip(&plan.units).map(|((l, layer), units)| {
        let mut record = LayerRecord::new_zeroed();
        record.rope_mscale = model.rope.mscale.into();
        match &layer.mixer {
            Mixer::Attention(a) => {
                record.operator = Operator::Attention as u8;
                record.heads = (a.heads as u16).into();
                record.kv_heads = (a.kv_heads as u16).into();
                record.head_dim = (a.head_dim as u16).into();
                record.window = a.window.into();
                record.attention_scale = a.scale.into();
            }
            Mixer::ShortConv { taps, .. } => {
                record.operator = Operator::ShortConv as u8;
                record.rope = NO_ROPE;
                record.conv_taps = (*taps as u16).into();
            }
        }
        let count = units.views.len() as u16;
        record.units = count.into();
        match &layer.feed_forward {
            FeedForward::Dense { .. } => {
                record.router = Router::All as u8;
                record.top_k = count.into();
                record.router_scale = 1.0.into();
            }
            FeedForward::Experts { top_k, router, normalise, norm_eps, scale, .. } => {
                record.router = *router as u8;
                record.flags = if *normalise { ROUTER_NORMALISE } else { 0 };
                record.top_k = (*top_k as u16).into();
                record.router_norm_eps = (*norm_eps).into();
                record.router_scale = (*scale).into();
            }
        }
        if model.activation == Activation::Relu {
            record.flags |= GATE_RELU;
        }
        let [gate, up, down] = units.shape.matrices().map(MatrixRecord::new);
        (record.gate, record.up, record.down) = (gate, up, down);
        record.hot = hot.get(&l).copied().unwrap_or_default().map(Into::into);
        record
    });
    (record, layers.collect())
}

/// The METADATA section: where the image came from, without paths or dates, so that it can be made again.
fn metadata(source: &Source, name: &str, label: &str, options: &ConvertOptions) -> Vec<u8> {
    let json = serde_json::json!({
        "converter": concat!("forebay ", env!("CARGO_PKG_VERSION")),
        "source": {
            "name": name,
            "format": if source.is_gguf() { "gguf" } else { "safetensors" },
            "architecture": source.fields.architecture(),
        },
        "options": {
            "weights": options.weights.map(WeightChoice::name),
            "unit_weights": options.unit_weights.map(WeightChoice::name),
            "head_weights": options.head_weights.map(WeightChoice::name),
            "group": options.group.map(Group::len),
            "affine": options.affine,
            "page": options.page,
            "unit_width": options.unit_width,
            "neurons": options.neurons.as_ref().map(|plan| plan.width),
            "moments": options.moments.is_some(),
            "prefix_weight": options.moments.as_ref().map(|_| options.prefix_weight),
            "unit_fields": options.unit_fields.map(CodeFields::widths),
        },
        "weights": label,
    });
    json.to_string().into_bytes()
}

/// The TOKENIZER section, if the source has a tokenizer.
fn tokenizer(source: &Source, notices: &mut Vec<String>) -> Result<Option<Vec<u8>>> {
    let found = match &source.format {
        Format::HuggingFace if source.path.join("tokenizer.json").is_file() => {
            Some(TokenizerSource::from_hf_dir(&source.path)?)
        }
        Format::HuggingFace => None,
        Format::Gguf(header) => gguf_tokenizer(header)?,
    };
    if found.is_none() {
        notices.push("the model has no tokenizer: the image takes and gives token ids only".into());
    }
    found.map(|tokenizer| crate::tokenizer::build(&tokenizer)).transpose()
}

/// The tokenizer in the metadata of a GGUF file; `None` if it has none.
fn gguf_tokenizer(header: &Gguf) -> Result<Option<TokenizerSource>> {
    use gguf::Value;
    let get = |key: &str| header.get(&format!("tokenizer.ggml.{key}"));
    let wrong = |key: &str, found: &Value| {
        let found: String = format!("{found:?}").chars().take(60).collect();
        anyhow::anyhow!("tokenizer.ggml.{key} is of another type than expected: {found}")
    };
    let text = |key| match get(key) {
        None => Ok(None),
        Some(Value::Text(s)) => Ok(Some(s.as_str())),
        Some(other) => Err(wrong(key, other)),
    };
    let texts = |key| match get(key) {
        None => Ok(&[][..]),
        Some(Value::Texts(list)) => Ok(list.as_slice()),
        Some(other) => Err(wrong(key, other)),
    };
    let flag = |key| match get(key) {
        None => Ok(None),
        Some(Value::Bool(b)) => Ok(Some(*b)),
        Some(other) => Err(wrong(key, other)),
    };
    let id = |key| match get(key) {
        None => Ok(None),
        Some(Value::Int(n)) => Ok(u32::try_from(*n).ok()),
        Some(other) => Err(wrong(key, other)),
    };
    let Some(model) = text("model")?.filter(|model| *model != "none" && *model != "no_vocab") else {
        return Ok(None);
    };
    let token_types: Vec<i32> = match get("token_type") {
        None => Vec::new(),
        // A type beyond 32 bits is none that is known.
        Some(Value::Ints(list)) => list.iter().map(|n| i32::try_from(*n).unwrap_or(0)).collect(),
        Some(other) => return Err(wrong("token_type", other)),
    };
    let scores = match get("scores") {
        None => &[][..],
        Some(Value::Floats(list)) => list.as_slice(),
        Some(other) => return Err(wrong("scores", other)),
    };
    let mut eos = Vec::new();
    for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
        eos.extend(id(key)?);
    }
    let fields = GgufTokenizer {
        model,
        pre: text("pre")?,
        tokens: texts("tokens")?,
        token_types: &token_types,
        merges: texts("merges")?,
        scores,
        bos: id("bos_token_id")?,
        eos,
        unknown: id("unknown_token_id")?,
        add_bos: flag("add_bos_token")?,
        add_space_prefix: flag("add_space_prefix")?,
    };
    from_gguf_fields(&fields).map(Some)
}

/// The chat template, if the source has one.
fn chat_template(source: &Source) -> Result<Option<String>> {
    match &source.format {
        Format::Gguf(header) => match header.get("tokenizer.chat_template") {
            Some(gguf::Value::Text(template)) => Ok(Some(template.clone()).filter(|t| !t.is_empty())),
            _ => Ok(None),
        },
        Format::HuggingFace => {
            let file = source.path.join("chat_template.jinja");
            if file.is_file() {
                let text = std::fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
                return Ok(Some(text).filter(|t| !t.is_empty()));
            }
            let config = source.path.join("tokenizer_config.json");
            if !config.is_file() {
                return Ok(None);
            }
            let json = read_json(&config)?;
            let template = match &json["chat_template"] {
                serde_json::Value::String(text) => Some(text.as_str()),
                // Several templates by name; the plain one is called default.
                serde_json::Value::Array(list) => list
                    .iter()
                    .find(|t| t["name"] == "default")
                    .or_else(|| list.first())
                    .and_then(|t| t["template"].as_str()),
                _ => None,
            };
            Ok(template.filter(|t| !t.is_empty()).map(str::to_owned))
        }
    }
}

/// The CHAT TURNS section, if the template only puts texts between the turns.
fn chat_turns(tokenizer: Option<&[u8]>, template: Option<&str>, notices: &mut Vec<String>) -> Result<Option<Vec<u8>>> {
    let (Some(tokenizer), Some(template)) = (tokenizer, template) else { return Ok(None) };
    let tokenizer = Tokenizer::parse(tokenizer)?;
    let turns = Template::new(template.to_owned(), &tokenizer).ok().and_then(|template| template::turns(&template));
    if turns.is_none() {
        notices.push("the chat template does more than put texts between turns: boards cannot chat with it".into());
    }
    Ok(turns.map(|texts| template::turns_section(&texts)))
}

/// The sampling that generation_config.json or a GGUF file suggests.
fn sampling(source: &Source) -> Result<Sampling> {
    const KEYS: [Key; 5] = [
        Key { hf: &["temperature"], gguf: "general.sampling.temp" },
        Key { hf: &["top_k"], gguf: "general.sampling.top_k" },
        Key { hf: &["top_p"], gguf: "general.sampling.top_p" },
        Key { hf: &["min_p"], gguf: "general.sampling.min_p" },
        Key { hf: &["repetition_penalty"], gguf: "general.sampling.penalty_repeat" },
    ];
    let file = source.path.join("generation_config.json");
    let fields = if source.is_gguf() {
        source.fields.clone()
    } else if file.is_file() {
        Fields::of_object(read_json(&file)?, "generation_config.json")?
    } else {
        Fields::of_object(serde_json::json!({}), "generation_config.json")?
    };
    let [temperature, top_k, top_p, min_p, repetition] = KEYS;
    let number = |key, default: f64, range: core::ops::RangeInclusive<f64>| {
        let x = fields.maybe_number(key)?.unwrap_or(default);
        ensure!(
            range.contains(&x),
            "{}",
            fields.wrong(key, &format!("a number from {} to {}", range.start(), range.end()))
        );
        Ok(x)
    };
    Ok(Sampling {
        temperature: number(temperature, 0.0, 0.0..=100.0)? as f32,
        top_k: number(top_k, 0.0, 0.0..=1e6)? as u32,
        top_p: number(top_p, 1.0, 0.0..=1.0)? as f32,
        min_p: number(min_p, 0.0, 0.0..=1.0)? as f32,
        repetition_penalty: number(repetition, 1.0, 0.01..=100.0)? as f32,
    })
}
