//! What is in an image, for people and for programs.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use forebay_kernels::weights::MatrixShape;
use forebay_runtime::model::Model;
use forebay_runtime::model::record::{NO_LAYER, Operator, Role, Router};
use forebay_storage::image::{
    ExtentKind, ExtentRecord, ExtentTable, SUPERBLOCK_SLOT, Section, SectionKind, Superblock,
};
use serde::Serialize;
use zerocopy::{FromBytes, IntoBytes};

use crate::convert::encoding_name;
use crate::settings::Settings;

/// What is in an image.
#[derive(Clone, Debug, Serialize)]
pub struct Inspection {
    /// Container.
    pub header: Header,
    /// Sections, by offset.
    pub sections: Vec<SectionInfo>,
    /// The model as a whole.
    pub model: ModelInfo,
    /// Its layers.
    pub layers: Vec<LayerInfo>,
    /// Weights and bytes, by name of encoding; padding to whole rows and groups included.
    pub encodings: BTreeMap<String, EncodingInfo>,
    /// Extents that are read once and stay.
    pub resident: ExtentsInfo,
    /// Extents that come and go.
    pub units: ExtentsInfo,
    /// The METADATA section, if it is JSON.
    pub metadata: Option<serde_json::Value>,
    /// What `forebay plan` chose, if it did.
    pub settings: Option<Settings>,
}

/// The container.
#[derive(Clone, Debug, Serialize)]
pub struct Header {
    /// Bytes of the file.
    pub file_len: u64,
    /// Bytes of the image.
    pub image_len: u64,
    /// Identity, in hexadecimal.
    pub id: String,
    /// Generation of the superblock in force.
    pub generation: u64,
    /// Page in bytes.
    pub page: u32,
}

/// A section.
#[derive(Clone, Debug, Serialize)]
pub struct SectionInfo {
    /// Name of its kind.
    pub kind: String,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// The model as a whole.
#[derive(Clone, Debug, Serialize)]
#[expect(missing_docs, reason = "the fields of ModelRecord")]
pub struct ModelInfo {
    pub name: String,
    pub family: String,
    pub weights: String,
    pub layers: usize,
    pub hidden: u32,
    pub vocab: u32,
    pub context: u32,
    pub norm_eps: f32,
    pub embedding_scale: f32,
    pub residual_scale: f32,
    pub logit_scale: f32,
    pub temperature: f32,
    pub top_k: u32,
    pub top_p: f32,
    pub min_p: f32,
    pub repetition_penalty: f32,
    /// Encoding of the embedding.
    pub embedding: String,
    /// Encoding of the output head, if it is not the embedding.
    pub output_head: Option<String>,
}

/// A layer.
#[derive(Clone, Debug, Serialize)]
pub struct LayerInfo {
    /// `attention` or `short convolution`, with its numbers.
    pub operator: String,
    /// How units are chosen.
    pub router: String,
    /// Experts or neuron clusters.
    pub units: usize,
    /// Units a token.
    pub top_k: usize,
    /// Neurons of a unit.
    pub unit_width: usize,
    /// Encodings of gate, up and down.
    pub encodings: [String; 3],
    /// Bytes of each level of a unit.
    pub unit_levels: Vec<u64>,
    /// Bytes of the layer's resident tensors.
    pub resident_len: u64,
}

/// What an encoding takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct EncodingInfo {
    /// Matrices and vectors.
    pub matrices: u64,
    /// Elements.
    pub weights: u64,
    /// Bytes.
    pub bytes: u64,
}

/// Extents of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ExtentsInfo {
    /// Number.
    pub count: u64,
    /// Bytes of all of them.
    pub bytes: u64,
    /// Bytes of the smallest.
    pub least: u64,
    /// Bytes of the largest.
    pub most: u64,
}

impl ExtentsInfo {
    fn add(&mut self, len: u64) {
        self.least = if self.count == 0 { len } else { self.least.min(len) };
        self.most = self.most.max(len);
        self.count += 1;
        self.bytes += len;
    }
}

/// Reads the header, sections and model description of the image at `image`. The weights are not read.
///
/// # Errors
/// The file cannot be read, is no image, or is damaged; says where.
pub fn inspect(image: &Path) -> Result<Inspection> {
    read(image).with_context(|| format!("inspecting {}", image.display()))
}

fn read(path: &Path) -> Result<Inspection> {
    let file = File::open(path)?;
    let file_len = file.metadata()?.len();
    let mut slots = vec![0; (2 * SUPERBLOCK_SLOT).min(file_len) as usize];
    file.read_exact_at(&mut slots, 0)?;
    let superblock = Superblock::parse(&slots, file_len)?;
    let load = |kind| -> Result<Option<Vec<u8>>> {
        let Some(section) = superblock.section(kind) else { return Ok(None) };
        let mut bytes = vec![0; usize::try_from(section.len)?];
        file.read_exact_at(&mut bytes, section.offset)?;
        section.verify(&bytes)?;
        Ok(Some(bytes))
    };
    let need = |kind: SectionKind| load(kind)?.with_context(|| format!("the image has no {kind} section"));
    let (model, tensors) = (need(SectionKind::Model)?, need(SectionKind::Tensors)?);
    let extents = records(&need(SectionKind::Extents)?)?;
    let table = ExtentTable::parse(extents.as_bytes(), &superblock)?;
    let model = Model::parse(&model, &tensors, table, superblock.page())?;

    let mut encodings: BTreeMap<String, EncodingInfo> = BTreeMap::new();
    let mut add = |shape: MatrixShape, times: u64| {
        let info = encodings.entry(encoding_name(shape.encoding)).or_default();
        info.matrices += times;
        info.weights += times * u64::from(shape.rows) * u64::from(shape.cols);
        info.bytes += times * shape.bytes();
    };
    for tensor in model.tensors() {
        add(tensor.matrix.shape().context("a tensor of unknown encoding")?, 1);
    }
    let mut layers = Vec::new();
    for l in 0..model.layer_count() {
        let layer = model.layer(l).context("a layer is missing")?;
        for shape in layer.unit.matrices() {
            add(shape, layer.units as u64);
        }
        let window = if layer.window > 0 { format!(", window {}", layer.window) } else { String::new() };
        layers.push(LayerInfo {
            operator: match layer.operator {
                Operator::Attention => {
                    format!("attention, {}/{} heads of {}{window}", layer.heads, layer.kv_heads, layer.head_dim)
                }
                Operator::ShortConv => format!("short convolution, {} taps", layer.taps),
            },
            router: match layer.router {
                Router::All => "dense".into(),
                router => format!("{router:?} router").to_lowercase(),
            },
            units: layer.units,
            top_k: layer.top_k,
            unit_width: layer.unit_width,
            encodings: layer.unit.matrices().map(|m| encoding_name(m.encoding)),
            unit_levels: (0..layer.unit.levels()).map(|i| layer.unit.level_len(i, superblock.page())).collect(),
            resident_len: model.group(l as u16).1,
        });
    }
    let (mut resident, mut units) = (ExtentsInfo::default(), ExtentsInfo::default());
    for extent in table.records() {
        match extent.kind() {
            ExtentKind::Resident => resident.add(extent.total_len()),
            _ => units.add(extent.total_len()),
        }
    }
    let mut sections: Vec<Section> = superblock.sections().collect();
    sections.sort_by_key(|s| s.offset);
    let metadata = load(SectionKind::Metadata)?.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let encoding_of = |role| model.tensor(NO_LAYER, role).map(|t| encoding_name(t.shape.encoding));
    let r = model.record();
    ensure!(r.layers.get() as usize == layers.len(), "the number of layers changed under way");
    Ok(Inspection {
        header: Header {
            file_len,
            image_len: superblock.image_len(),
            id: superblock.id().iter().map(|b| format!("{b:02x}")).collect(),
            generation: superblock.generation(),
            page: superblock.page(),
        },
        sections: sections
            .iter()
            .map(|s| SectionInfo { kind: s.kind.to_string(), offset: s.offset, len: s.len })
            .collect(),
        model: ModelInfo {
            name: text(&r.name),
            family: text(&r.family),
            weights: text(&r.weights_label),
            layers: layers.len(),
            hidden: r.hidden.get(),
            vocab: r.vocab.get(),
            context: r.context.get(),
            norm_eps: r.norm_eps.get(),
            embedding_scale: r.embedding_scale.get(),
            residual_scale: r.residual_scale.get(),
            logit_scale: r.logit_scale.get(),
            temperature: r.temperature.get(),
            top_k: r.top_k.get(),
            top_p: r.top_p.get(),
            min_p: r.min_p.get(),
            repetition_penalty: r.repetition_penalty.get(),
            embedding: encoding_of(Role::Embedding).context("the model has no embedding")?,
            output_head: encoding_of(Role::OutputHead),
        },
        layers,
        encodings,
        resident,
        units,
        metadata,
        settings: Settings::load(path)?,
    })
}

/// The extent records in `bytes`.
fn records(bytes: &[u8]) -> Result<Vec<ExtentRecord>> {
    ensure!(bytes.len().is_multiple_of(size_of::<ExtentRecord>()), "the extents section is cut off");
    Ok(bytes
        .chunks_exact(size_of::<ExtentRecord>())
        .filter_map(|record| ExtentRecord::read_from_bytes(record).ok())
        .collect())
}

/// Zero-padded UTF-8.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// Bytes in the unit that suits.
pub(crate) fn size(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..1_048_576 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        _ => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
    }
}

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (h, m) = (&self.header, &self.model);
        writeln!(f, "{} ({}), weights {}", m.name, m.family, m.weights)?;
        writeln!(
            f,
            "  image    {} ({} bytes), page {}, generation {}, id {}",
            size(h.image_len),
            h.image_len,
            h.page,
            h.generation,
            h.id
        )?;
        writeln!(
            f,
            "  model    {} layers, hidden {}, vocabulary {}, context {}",
            m.layers, m.hidden, m.vocab, m.context
        )?;
        let head = m.output_head.as_deref().unwrap_or("the embedding");
        writeln!(f, "  embedding {}, output head {head}", m.embedding)?;
        writeln!(f, "  sections")?;
        for s in &self.sections {
            writeln!(f, "    {:<14} {:>10} at {}", s.kind, size(s.len), s.offset)?;
        }
        writeln!(f, "  extents")?;
        for (name, e) in [("resident", &self.resident), ("units", &self.units)] {
            writeln!(
                f,
                "    {name:<10} {:>6} extents {:>10}  ({} to {})",
                e.count,
                size(e.bytes),
                size(e.least),
                size(e.most)
            )?;
        }
        writeln!(f, "  encodings")?;
        for (name, e) in &self.encodings {
            writeln!(f, "    {name:<20} {:>6} matrices {:>13} weights {:>10}", e.matrices, e.weights, size(e.bytes))?;
        }
        writeln!(f, "  layers")?;
        for (l, layer) in self.layers.iter().enumerate() {
            let levels: Vec<String> = layer.unit_levels.iter().map(|&n| size(n)).collect();
            writeln!(
                f,
                "    {l:>3}  {}; {}, {} of {} units of {} neurons ({}); {} resident",
                layer.operator,
                layer.router,
                layer.top_k,
                layer.units,
                layer.unit_width,
                levels.join(" + "),
                size(layer.resident_len)
            )?;
        }
        self.settings.as_ref().map_or(Ok(()), |settings| write!(f, "  {settings}"))
    }
}
