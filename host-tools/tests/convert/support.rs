//! Small models made on the spot, in both formats, and a reader of images.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use forebay::convert::{ConvertOptions, ConvertReport, Silent, convert};
use forebay_kernels::matmul::row_to_f32;
use forebay_kernels::weights::{MatrixRef, MatrixShape};
use forebay_runtime::model::record::Role;
use forebay_runtime::model::unit::UnitRef;
use forebay_runtime::model::{LayerShape, Model, ModelError};
use forebay_storage::image::{ExtentKind, ExtentRecord, ExtentTable, SUPERBLOCK_SLOT, SectionKind, Superblock};
use half::{bf16, f16};
use zerocopy::{FromBytes, IntoBytes};

/// A folder that is removed again.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new() -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("forebay-convert-{}-{n}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Numbers between -1 and 1 that depend on `name` alone.
pub fn numbers(name: &str, n: usize) -> Vec<f32> {
    let mut state = name.bytes().fold(0x9e37_79b9u32, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193));
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            (state >> 8) as f32 / (1u32 << 23) as f32 - 1.0
        })
        .collect()
}

/// A tensor: dimensions slowest first, GGML type, bytes.
#[derive(Clone)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub kind: u32,
    pub data: Vec<u8>,
}

impl Tensor {
    pub fn f32(shape: &[usize], values: &[f32]) -> Self {
        Self { shape: shape.into(), kind: 0, data: values.as_bytes().to_vec() }
    }

    pub fn bf16(shape: &[usize], values: &[f32]) -> Self {
        let data = values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect();
        Self { shape: shape.into(), kind: 30, data }
    }

    pub fn f16(shape: &[usize], values: &[f32]) -> Self {
        let data = values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect();
        Self { shape: shape.into(), kind: 1, data }
    }

    /// Blocks of GGML type `kind`, of `block` elements: two or one half-precision numbers, then noise.
    pub fn blocks(shape: &[usize], kind: u32, block: usize, bytes: usize, name: &str) -> Self {
        let n = shape.iter().product::<usize>() / block;
        let noise = numbers(name, n * bytes);
        let mut data: Vec<u8> = noise.iter().map(|x| (x * 128.0) as i8 as u8).collect();
        for (i, block) in data.chunks_exact_mut(bytes).enumerate() {
            let scale = f16::from_f32(0.01 * noise[i * bytes] + 0.02);
            block[..2].copy_from_slice(&scale.to_le_bytes());
            if kind == 3 {
                block[2..4].copy_from_slice(&f16::from_f32(-0.1 * noise[i * bytes + 1]).to_le_bytes());
            }
        }
        Self { shape: shape.into(), kind, data }
    }

    /// Blocks of GGML's ternary types: digits, then a half-precision number.
    pub fn ternary(shape: &[usize], kind: u32, bytes: usize, name: &str) -> Self {
        let n = shape.iter().product::<usize>() / 256;
        let noise = numbers(name, n * bytes);
        let digits = |x: f32, count: u32| (0..count).map(move |i| ((x + 1.0) * 1e4) as u32 / 3u32.pow(i) % 3);
        let byte = |x: &f32| match kind {
            // Five digits in 256ths of 3^5, rounded up; or four of 2 bits.
            34 => (digits(*x, 5).fold(0, |q, digit| 3 * q + digit) * 256).div_ceil(243) as u8,
            _ => digits(*x, 4).fold(0, |q, digit| 4 * q + digit) as u8,
        };
        let mut data: Vec<u8> = noise.iter().map(byte).collect();
        for (i, block) in data.chunks_exact_mut(bytes).enumerate() {
            let scale = f16::from_f32(0.01 * noise[i * bytes] + 0.02);
            block[bytes - 2..].copy_from_slice(&scale.to_le_bytes());
        }
        Self { shape: shape.into(), kind, data }
    }

    pub fn values(&self) -> Vec<f32> {
        use forebay::source::DType;
        let dtype = match self.kind {
            0 => DType::F32,
            1 => DType::F16,
            2 => DType::Q4_0,
            3 => DType::Q4_1,
            8 => DType::Q8_0,
            30 => DType::Bf16,
            34 => DType::Tq1,
            35 => DType::Tq2,
            other => panic!("type {other}"),
        };
        let mut out = vec![0.0; self.shape.iter().product()];
        forebay::source::dequantise(dtype, &self.data, &mut out);
        out
    }
}

pub type Tensors = BTreeMap<String, Tensor>;

/// Writes a Hugging Face folder.
pub fn write_folder(folder: &Path, config: &serde_json::Value, tensors: &Tensors) {
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    fs::write(folder.join("model.safetensors"), safetensors(tensors)).unwrap();
}

pub fn safetensors(tensors: &Tensors) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, t) in tensors {
        let dtype = match t.kind {
            0 => "F32",
            1 => "F16",
            30 => "BF16",
            other => panic!("type {other}"),
        };
        let end = data.len() + t.data.len();
        let info = serde_json::json!({"dtype": dtype, "shape": t.shape, "data_offsets": [data.len(), end]});
        header.insert(name.clone(), info);
        data.extend_from_slice(&t.data);
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(&data);
    out
}

/// A GGUF metadata value.
pub enum Meta {
    U32(u32),
    F32(f32),
    Text(&'static str),
    I32s(Vec<i32>),
}

/// A GGUF file.
pub fn gguf(metadata: &[(&str, Meta)], tensors: &Tensors) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    let text = |out: &mut Vec<u8>, s: &str| {
        out.extend_from_slice(&(s.len() as u64).to_le_bytes());
        out.extend_from_slice(s.as_bytes());
    };
    out.extend_from_slice(&3u32.to_le_bytes());
    out.extend_from_slice(&(tensors.len() as u64).to_le_bytes());
    out.extend_from_slice(&(metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        text(&mut out, key);
        match value {
            Meta::U32(n) => {
                out.extend_from_slice(&4u32.to_le_bytes());
                out.extend_from_slice(&n.to_le_bytes());
            }
            Meta::F32(x) => {
                out.extend_from_slice(&6u32.to_le_bytes());
                out.extend_from_slice(&x.to_le_bytes());
            }
            Meta::Text(s) => {
                out.extend_from_slice(&8u32.to_le_bytes());
                text(&mut out, s);
            }
            Meta::I32s(list) => {
                out.extend_from_slice(&9u32.to_le_bytes());
                out.extend_from_slice(&5u32.to_le_bytes());
                out.extend_from_slice(&(list.len() as u64).to_le_bytes());
                list.iter().for_each(|n| out.extend_from_slice(&n.to_le_bytes()));
            }
        }
    }
    let mut offset = 0u64;
    for (name, t) in tensors {
        text(&mut out, name);
        out.extend_from_slice(&(t.shape.len() as u32).to_le_bytes());
        for dim in t.shape.iter().rev() {
            out.extend_from_slice(&(*dim as u64).to_le_bytes());
        }
        out.extend_from_slice(&t.kind.to_le_bytes());
        out.extend_from_slice(&offset.to_le_bytes());
        offset = (offset + t.data.len() as u64).next_multiple_of(32);
    }
    for t in tensors.values() {
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend_from_slice(&t.data);
    }
    out
}

/// Sizes of a small Llama: three query heads a key head, widths that are no multiple of 32.
pub const HIDDEN: usize = 48;
pub const HEADS: usize = 6;
pub const KV_HEADS: usize = 2;
pub const HEAD_DIM: usize = 8;
pub const WIDTH: usize = 176;
pub const VOCAB: usize = 70;
pub const LAYERS: usize = 2;

pub fn llama_config() -> serde_json::Value {
    serde_json::json!({
        "model_type": "llama", "hidden_act": "silu", "hidden_size": HIDDEN, "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM, "vocab_size": VOCAB, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "attention_bias": true, "mlp_bias": true, "tie_word_embeddings": false, "dtype": "float32",
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    })
}

/// The same Llama's tensors under their names in safetensors, values by name.
pub fn llama_tensors(make: impl Fn(&[usize], &[f32]) -> Tensor) -> Tensors {
    let mut list: Vec<(String, Vec<usize>)> = vec![
        ("model.embed_tokens.weight".into(), vec![VOCAB, HIDDEN]),
        ("lm_head.weight".into(), vec![VOCAB, HIDDEN]),
        ("model.norm.weight".into(), vec![HIDDEN]),
    ];
    for l in 0..LAYERS {
        let (q, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
        for (name, shape) in [
            ("input_layernorm.weight", vec![HIDDEN]),
            ("post_attention_layernorm.weight", vec![HIDDEN]),
            ("self_attn.q_proj.weight", vec![q, HIDDEN]),
            ("self_attn.k_proj.weight", vec![kv, HIDDEN]),
            ("self_attn.v_proj.weight", vec![kv, HIDDEN]),
            ("self_attn.o_proj.weight", vec![HIDDEN, q]),
            ("self_attn.q_proj.bias", vec![q]),
            ("self_attn.k_proj.bias", vec![kv]),
            ("self_attn.v_proj.bias", vec![kv]),
            ("self_attn.o_proj.bias", vec![HIDDEN]),
            ("mlp.gate_proj.weight", vec![WIDTH, HIDDEN]),
            ("mlp.up_proj.weight", vec![WIDTH, HIDDEN]),
            ("mlp.down_proj.weight", vec![HIDDEN, WIDTH]),
            ("mlp.gate_proj.bias", vec![WIDTH]),
            ("mlp.up_proj.bias", vec![WIDTH]),
            ("mlp.down_proj.bias", vec![HIDDEN]),
        ] {
            list.push((format!("model.layers.{l}.{name}"), shape));
        }
    }
    list.into_iter()
        .map(|(name, shape)| {
            let tensor = make(&shape, &numbers(&name, shape.iter().product()));
            (name, tensor)
        })
        .collect()
}

/// The folder of the small Llama, in float32.
pub fn llama_folder(folder: &Folder) -> PathBuf {
    let path = folder.join("llama");
    write_folder(&path, &llama_config(), &llama_tensors(Tensor::f32));
    path
}

/// Converts without a word.
pub fn quietly(model: &Path, image: &Path, options: &ConvertOptions) -> anyhow::Result<ConvertReport> {
    convert(model, image, options, &mut Silent)
}

/// An image in memory, every checksum of which holds.
pub struct Image {
    pub bytes: Vec<u8>,
    pub superblock: Superblock,
    extents: Vec<ExtentRecord>,
    model: Vec<u8>,
    tensors: Vec<u8>,
}

impl Image {
    pub fn open(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap();
        let superblock = Superblock::parse(&bytes[..2 * SUPERBLOCK_SLOT as usize], bytes.len() as u64).unwrap();
        assert_eq!(superblock.image_len(), bytes.len() as u64);
        assert!(bytes[SUPERBLOCK_SLOT as usize..2 * SUPERBLOCK_SLOT as usize].iter().all(|b| *b == 0));
        let section = |kind| {
            let s = superblock.section(kind).unwrap();
            let range = s.offset as usize..(s.offset + s.len) as usize;
            s.verify(&bytes[range.clone()]).unwrap();
            bytes[range].to_vec()
        };
        let (model, tensors) = (section(SectionKind::Model), section(SectionKind::Tensors));
        let extents: Vec<ExtentRecord> =
            section(SectionKind::Extents).chunks_exact(64).map(|b| ExtentRecord::read_from_bytes(b).unwrap()).collect();
        for extent in &extents {
            let range = extent.offset() as usize..(extent.offset() + extent.total_len()) as usize;
            assert_eq!(extent.verify(0, &bytes[range]).unwrap(), extent.levels());
        }
        Self { superblock, extents, model, tensors, bytes }
    }

    pub fn section(&self, kind: SectionKind) -> Option<&[u8]> {
        let s = self.superblock.section(kind)?;
        Some(&self.bytes[s.offset as usize..(s.offset + s.len) as usize])
    }

    pub fn model(&self) -> Model<'_> {
        let table = ExtentTable::parse(self.extents.as_bytes(), &self.superblock).unwrap();
        Model::parse(&self.model, &self.tensors, table, self.superblock.page()).unwrap()
    }

    /// What becomes of the model if its records say that they are of another version.
    pub fn parse_as_version(&self, version: u16) -> Result<(), ModelError> {
        let table = ExtentTable::parse(self.extents.as_bytes(), &self.superblock).unwrap();
        let mut model = self.model.clone();
        model[..2].copy_from_slice(&version.to_le_bytes());
        Model::parse(&model, &self.tensors, table, self.superblock.page()).map(|_| ())
    }

    pub fn layer(&self, layer: usize) -> LayerShape {
        self.model().layer(layer).unwrap()
    }

    /// Shape and values of a resident tensor.
    pub fn tensor(&self, layer: u16, role: Role) -> Option<(MatrixShape, Vec<f32>)> {
        let model = self.model();
        let t = model.tensor(layer, role)?;
        let start = (model.group(layer).0 + t.offset) as usize;
        let matrix = MatrixRef::from_contiguous(t.shape, &self.bytes[start..start + t.len as usize]).unwrap();
        Some((t.shape, matrix_values(&matrix)))
    }

    /// A unit of a layer, at `levels` levels.
    pub fn unit(&self, layer: usize, unit: usize, levels: usize) -> UnitRef<'_> {
        let shape = self.layer(layer);
        let extent = &self.extents[shape.first_extent as usize + unit];
        assert_eq!(extent.kind(), ExtentKind::Unit);
        assert_eq!(extent.levels(), shape.unit.levels());
        let page = self.superblock.page();
        let start = extent.offset() as usize;
        assert_eq!(extent.prefix_len(levels), shape.unit.prefix_len(levels, page));
        let bytes = &self.bytes[start..start + extent.prefix_len(levels) as usize];
        let pieces = shape.unit.split(levels, page, bytes).unwrap();
        shape.unit.view(levels, page, &pieces).unwrap()
    }
}

pub fn matrix_values(matrix: &MatrixRef<'_>) -> Vec<f32> {
    let shape = matrix.shape();
    let mut out = vec![0.0; shape.rows as usize * shape.cols as usize];
    for (row, out) in out.chunks_exact_mut(shape.cols as usize).enumerate() {
        row_to_f32(matrix, row, out);
    }
    out
}
