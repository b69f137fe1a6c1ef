//! Where a model comes from: a Hugging Face folder or a GGUF file, read by ranges, never whole.

mod blocks;
mod fields;
mod safetensors;

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

pub(crate) use blocks::half_at;
pub use blocks::{DType, dequantise};
pub use fields::{Fields, Key};

use crate::gguf::{self, Gguf};

/// A tensor in a source, seen as a matrix: every dimension but the last is a row.
#[derive(Clone, Debug)]
pub struct SourceTensor {
    /// Name in the file.
    pub name: String,
    /// Dimensions, slowest first.
    pub shape: Vec<u64>,
    /// Element type as the file names it.
    pub type_name: String,
    /// Element type, if it can be read.
    pub dtype: Option<DType>,
    file: usize,
    offset: u64,
}

impl SourceTensor {
    /// Length of a row.
    pub fn cols(&self) -> u64 {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Number of rows.
    pub fn rows(&self) -> u64 {
        self.shape.iter().rev().skip(1).product()
    }

    /// Bytes of a row.
    fn row_bytes(&self, dtype: DType) -> u64 {
        self.cols() / dtype.block() as u64 * dtype.bytes() as u64
    }
}

/// The two kinds of source.
#[derive(Clone, Debug)]
pub enum Format {
    /// A folder of config.json and safetensors.
    HuggingFace,
    /// A GGUF file and its header.
    Gguf(Box<Gguf>),
}

/// Makes the tensors of a source that has no file.
pub trait Maker: fmt::Debug + Send + Sync {
    /// Fills `out` with row `row` of tensor `name` as GGUF stores it. Only names and rows of the header are asked for.
    fn row(&self, name: &str, row: u64, out: &mut [u8]);
}

/// Where the bytes of tensors come from.
#[derive(Debug)]
enum Data {
    Files(Vec<(PathBuf, File)>),
    Made(Box<dyn Maker>),
}

/// A model to convert.
#[derive(Debug)]
pub struct Source {
    /// What it is.
    pub format: Format,
    /// The folder or file.
    pub path: PathBuf,
    /// Name for people.
    pub name: String,
    /// The architecture's parameters.
    pub fields: Fields,
    /// Tensors by name.
    pub tensors: BTreeMap<String, SourceTensor>,
    data: Data,
}

impl Source {
    /// Opens the Hugging Face folder or GGUF file at `path`.
    ///
    /// # Errors
    /// Says which file is missing or broken, and how.
    pub fn open(path: &Path) -> Result<Self> {
        let meta = std::fs::metadata(path).with_context(|| format!("opening {}", path.display()))?;
        if meta.is_dir() {
            return Self::open_folder(path);
        }
        if path.extension().is_some_and(|e| e == "safetensors" || e == "json") {
            bail!("{} is one file of a model; give the folder that it lies in", path.display());
        }
        Self::open_gguf(path)
    }

    fn open_folder(path: &Path) -> Result<Self> {
        let config = path.join("config.json");
        ensure!(
            config.is_file(),
            "{} has no config.json; expected a Hugging Face model folder (config.json and *.safetensors) or a .gguf file",
            path.display()
        );
        let fields = Fields::from_json(read_json(&config)?, "config.json")?;
        let mut files = Vec::new();
        let mut tensors = BTreeMap::new();
        for (file, wanted) in safetensors::weight_files(path)? {
            let opened = File::open(&file).with_context(|| format!("opening {}", file.display()))?;
            safetensors::read_header(&opened, files.len(), wanted.as_ref(), &mut tensors)
                .with_context(|| format!("reading {}", file.display()))?;
            files.push((file, opened));
        }
        let full = path.canonicalize().with_context(|| format!("opening {}", path.display()))?;
        let name = full.file_name().map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned());
        Ok(Self { format: Format::HuggingFace, path: path.into(), name, fields, tensors, data: Data::Files(files) })
    }

    fn open_gguf(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        let header = gguf::parse(&file).with_context(|| format!("reading {}", path.display()))?;
        Self::from_header(path, header, Data::Files(vec![(path.into(), file)]))
    }

    /// A model of this header whose tensors `maker` makes; `path` is what it is called in messages.
    ///
    /// # Errors
    /// The header has no architecture.
    pub fn made(path: &Path, header: Gguf, maker: Box<dyn Maker>) -> Result<Self> {
        Self::from_header(path, header, Data::Made(maker))
    }

    fn from_header(path: &Path, header: Gguf, data: Data) -> Result<Self> {
        let fields = Fields::from_gguf(&header)?;
        let mut tensors = BTreeMap::new();
        for t in &header.tensors {
            tensors.insert(
                t.name.clone(),
                SourceTensor {
                    name: t.name.clone(),
                    shape: t.dims.iter().rev().copied().collect(),
                    type_name: t.kind.name.into(),
                    dtype: DType::from_name(t.kind.name),
                    file: 0,
                    offset: t.offset,
                },
            );
        }
        let stem = path.file_stem().map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned());
        let name = match header.get("general.name") {
            Some(gguf::Value::Text(name)) if !name.trim().is_empty() => name.trim().into(),
            _ => stem,
        };
        Ok(Self { format: Format::Gguf(Box::new(header)), path: path.into(), name, fields, tensors, data })
    }

    /// Whether the source is a GGUF file.
    pub fn is_gguf(&self) -> bool {
        matches!(self.format, Format::Gguf(_))
    }

    /// The file that holds `tensor`, for messages.
    pub fn file_name(&self, tensor: &SourceTensor) -> String {
        let path = match &self.data {
            Data::Files(files) => &files[tensor.file].0,
            Data::Made(_) => &self.path,
        };
        path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned())
    }

    /// The type of `tensor`, or what to do about it.
    ///
    /// # Errors
    /// The type cannot be read.
    pub fn dtype(&self, tensor: &SourceTensor) -> Result<DType> {
        tensor.dtype.with_context(|| {
            let known: Vec<_> = DType::ALL.iter().map(|t| t.name()).collect();
            let remedy = if self.is_gguf() {
                "requantise the model to one of them with llama-quantize"
            } else {
                "save the model in bfloat16, float16 or float32"
            };
            format!(
                "{}: tensor {} is of type {}, which cannot be converted (expected one of {}); {remedy}",
                self.file_name(tensor),
                tensor.name,
                tensor.type_name,
                known.join(", ")
            )
        })
    }

    /// Reads columns `cols` of row `row` as stored. `cols` are whole blocks, or run to the end of the row.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read_raw(
        &self,
        tensor: &SourceTensor,
        row: u64,
        cols: core::ops::Range<u64>,
        out: &mut Vec<u8>,
    ) -> Result<()> {
        let dtype = self.dtype(tensor)?;
        let block = dtype.block() as u64;
        ensure!(
            row < tensor.rows() && cols.start.is_multiple_of(block) && cols.end <= tensor.cols(),
            "tensor {}: row {row}, columns {cols:?} are not whole blocks of [{}, {}]",
            tensor.name,
            tensor.rows(),
            tensor.cols()
        );
        let bytes = dtype.bytes() as u64;
        let skip = cols.start / block * bytes;
        let len = usize::try_from((cols.end - cols.start).div_ceil(block) * bytes)?;
        let files = match &self.data {
            Data::Files(files) => files,
            Data::Made(maker) => {
                out.resize(usize::try_from(tensor.row_bytes(dtype))?, 0);
                maker.row(&tensor.name, row, out);
                out.copy_within(skip as usize..skip as usize + len, 0);
                out.truncate(len);
                return Ok(());
            }
        };
        let start = tensor.offset + row * tensor.row_bytes(dtype) + skip;
        out.resize(len, 0);
        let (path, file) = &files[tensor.file];
        file.read_exact_at(out, start).with_context(|| format!("reading tensor {} of {}", tensor.name, path.display()))
    }

    /// Reads columns `cols` of row `row` as binary32, and checks that every number is finite. `raw` is scratch.
    ///
    /// # Errors
    /// The file cannot be read, or holds a NaN or an infinity.
    pub fn read_f32(
        &self,
        tensor: &SourceTensor,
        row: u64,
        cols: core::ops::Range<u64>,
        raw: &mut Vec<u8>,
        out: &mut [f32],
    ) -> Result<()> {
        let dtype = self.dtype(tensor)?;
        let block = dtype.block() as u64;
        if cols.start.is_multiple_of(block) && cols.end.is_multiple_of(block) {
            self.read_raw(tensor, row, cols.clone(), raw)?;
            dequantise(dtype, raw, out);
        } else {
            // Decode the blocks around the columns, then cut.
            let (start, end) = (cols.start / block * block, cols.end.div_ceil(block) * block);
            self.read_raw(tensor, row, start..end, raw)?;
            let mut wide = vec![0.0; (end - start) as usize];
            dequantise(dtype, raw, &mut wide);
            let skip = (cols.start - start) as usize;
            out.copy_from_slice(&wide[skip..skip + out.len()]);
        }
        if let Some(at) = out.iter().position(|x| !x.is_finite()) {
            return Err(self.not_finite(tensor, row, cols.start + at as u64, out[at]));
        }
        Ok(())
    }

    /// The error of a number that is not one.
    pub fn not_finite(&self, tensor: &SourceTensor, row: u64, col: u64, found: f32) -> anyhow::Error {
        anyhow::anyhow!(
            "{}: tensor {} holds {found} at row {row}, column {col}, expected finite numbers; the file is damaged or the model diverged in training",
            self.file_name(tensor),
            tensor.name
        )
    }
}

/// Reads and parses the JSON file `path`.
pub(crate) fn read_json(path: &Path) -> Result<serde_json::Value> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("reading {}", path.display()))
}
