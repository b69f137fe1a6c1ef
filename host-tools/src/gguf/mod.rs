//! GGUF, versions 2 and 3: metadata and the table of tensors.
//!
//! Written after the specification, `docs/gguf.md` of github.com/ggml-org/ggml. Everything read is a claim:
//! no count or length is believed before it is known to fit into the rest of the file, so memory stays within
//! a small multiple of the header's size, whatever the file says. Tensor data is not read here.

mod write;

use std::collections::HashSet;
use std::io::{BufReader, Read, Seek, SeekFrom};

use anyhow::{Context, Result, bail, ensure};

pub use write::lay_out;

/// Most dimensions of a tensor.
const MAX_DIMS: u32 = 4;
/// Longest key or tensor name, in bytes.
const MAX_NAME: u64 = 65_535;
/// Least bytes of a metadata pair: key length, one byte of key, type, one byte of value.
const MIN_PAIR: u64 = 8 + 1 + 4 + 1;
/// Least bytes of a tensor record: name length, one byte of name, dimensions, one of them, type, offset.
const MIN_TENSOR: u64 = 8 + 1 + 4 + 8 + 4 + 8;

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Any of the integer types.
    Int(i128),
    /// float32 or float64.
    Float(f64),
    /// bool.
    Bool(bool),
    /// UTF-8 text.
    Text(String),
    /// Array of integers.
    Ints(Vec<i64>),
    /// Array of floats.
    Floats(Vec<f32>),
    /// Array of bools.
    Bools(Vec<bool>),
    /// Array of strings.
    Texts(Vec<String>),
}

/// Element type of a tensor: its name in GGML, elements a block, and bytes a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GgmlType {
    /// The number that is stored.
    pub id: u32,
    /// Name as llama.cpp prints it.
    pub name: &'static str,
    /// Elements a block.
    pub block: u64,
    /// Bytes a block.
    pub bytes: u64,
}

/// The types that GGML defines, for their sizes; [`crate::source`] says which can be converted.
const TYPES: &[GgmlType] = &[
    ggml(0, "F32", 1, 4),
    ggml(1, "F16", 1, 2),
    ggml(2, "Q4_0", 32, 18),
    ggml(3, "Q4_1", 32, 20),
    ggml(6, "Q5_0", 32, 22),
    ggml(7, "Q5_1", 32, 24),
    ggml(8, "Q8_0", 32, 34),
    ggml(9, "Q8_1", 32, 36),
    ggml(10, "Q2_K", 256, 84),
    ggml(11, "Q3_K", 256, 110),
    ggml(12, "Q4_K", 256, 144),
    ggml(13, "Q5_K", 256, 176),
    ggml(14, "Q6_K", 256, 210),
    ggml(15, "Q8_K", 256, 292),
    ggml(16, "IQ2_XXS", 256, 66),
    ggml(17, "IQ2_XS", 256, 74),
    ggml(18, "IQ3_XXS", 256, 98),
    ggml(19, "IQ1_S", 256, 50),
    ggml(20, "IQ4_NL", 32, 18),
    ggml(21, "IQ3_S", 256, 110),
    ggml(22, "IQ2_S", 256, 82),
    ggml(23, "IQ4_XS", 256, 136),
    ggml(24, "I8", 1, 1),
    ggml(25, "I16", 1, 2),
    ggml(26, "I32", 1, 4),
    ggml(27, "I64", 1, 8),
    ggml(28, "F64", 1, 8),
    ggml(29, "IQ1_M", 256, 56),
    ggml(30, "BF16", 1, 2),
    ggml(34, "TQ1_0", 256, 54),
    ggml(35, "TQ2_0", 256, 66),
    ggml(39, "MXFP4", 32, 17),
];

/// The type of this name.
pub fn type_by_name(name: &str) -> Option<GgmlType> {
    TYPES.iter().copied().find(|t| t.name == name)
}

const fn ggml(id: u32, name: &'static str, block: u64, bytes: u64) -> GgmlType {
    GgmlType { id, name, block, bytes }
}

/// A tensor's record.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Name.
    pub name: String,
    /// Dimensions, fastest first, as stored.
    pub dims: Vec<u64>,
    /// Element type.
    pub kind: GgmlType,
    /// First byte, from the start of the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// The header of a GGUF file.
#[derive(Clone, Debug, PartialEq)]
pub struct Gguf {
    /// 2 or 3.
    pub version: u32,
    /// Keys and values, in file order; keys are unique.
    pub metadata: Vec<(String, Value)>,
    /// Tensors, in file order; names are unique, and the data is inside the file.
    pub tensors: Vec<Tensor>,
}

impl Gguf {
    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.iter().find(|(k, _)| k == key).map(|(_, v)| v)
    }
}

/// Reads the header of the GGUF file `file`.
///
/// # Errors
/// Says what is wrong, at which key or tensor, and what was expected.
pub fn parse(file: impl Read + Seek) -> Result<Gguf> {
    let mut file = file;
    let len = file.seek(SeekFrom::End(0)).context("finding the end of the file")?;
    file.seek(SeekFrom::Start(0)).context("going back to the start of the file")?;
    let mut reader = Reader { input: BufReader::new(file), at: 0, len };

    let magic = reader.array::<4>().context("reading the magic")?;
    ensure!(magic == *b"GGUF", "not a GGUF file: the first bytes are {magic:02x?}, expected \"GGUF\"");
    let version = reader.u32()?;
    if version.swap_bytes() == 2 || version.swap_bytes() == 3 {
        bail!("a big-endian GGUF file; convert it to little-endian with gguf-py's gguf_convert_endian.py");
    }
    ensure!(version == 2 || version == 3, "GGUF version {version}, expected 2 or 3");
    let tensor_count = reader.u64()?;
    let pair_count = reader.u64()?;
    reader.check_count("tensors", tensor_count, MIN_TENSOR)?;
    reader.check_count("metadata pairs", pair_count, MIN_PAIR)?;

    let mut metadata = Vec::new();
    let mut seen = HashSet::new();
    for index in 0..pair_count {
        let key = reader.text(MAX_NAME).with_context(|| format!("reading key {index} of {pair_count}"))?;
        let value = reader.value().with_context(|| format!("reading the value of {key:?}"))?;
        ensure!(seen.insert(key.clone()), "the key {key:?} is there twice");
        metadata.push((key, value));
    }

    let alignment = match metadata.iter().find(|(k, _)| k == "general.alignment") {
        None => 32,
        Some((_, Value::Int(n))) if *n > 0 && *n <= 1 << 20 && (*n as u64).is_power_of_two() => *n as u64,
        Some((_, found)) => bail!("general.alignment is {found:?}, expected a power of two up to 1048576"),
    };

    let mut tensors = Vec::new();
    seen.clear();
    for index in 0..tensor_count {
        let tensor = reader.tensor().with_context(|| format!("reading tensor {index} of {tensor_count}"))?;
        ensure!(seen.insert(tensor.name.clone()), "the tensor {:?} is there twice", tensor.name);
        tensors.push(tensor);
    }

    // Offsets are stored relative to the data, which begins at the next aligned byte.
    let data = reader.at.next_multiple_of(alignment);
    for tensor in &mut tensors {
        ensure!(
            tensor.offset.is_multiple_of(alignment),
            "tensor {:?}: offset {} is not a multiple of the alignment {alignment}",
            tensor.name,
            tensor.offset
        );
        let end = tensor.offset.checked_add(data).and_then(|start| start.checked_add(tensor.len));
        match end {
            Some(end) if end <= len => tensor.offset += data,
            _ => bail!(
                "tensor {:?}: {} bytes at offset {} reach past the end of the file ({len} bytes); the file is cut off or damaged",
                tensor.name,
                tensor.len,
                tensor.offset
            ),
        }
    }
    Ok(Gguf { version, metadata, tensors })
}

struct Reader<R> {
    input: R,
    at: u64,
    len: u64,
}

impl<R: Read> Reader<R> {
    fn remaining(&self) -> u64 {
        self.len.saturating_sub(self.at)
    }

    fn check_count(&self, what: &str, count: u64, least: u64) -> Result<()> {
        let most = self.remaining() / least;
        ensure!(
            count <= most,
            "{count} {what}, but the {} bytes that are left have room for at most {most}; the file is cut off or damaged",
            self.remaining()
        );
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes).with_context(|| format!("the file ends at byte {}", self.len))?;
        self.at += N as u64;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn text(&mut self, most: u64) -> Result<String> {
        let len = self.u64()?;
        ensure!(len <= most, "a string of {len} bytes, expected at most {most}");
        self.check_count("bytes of text", len, 1)?;
        let mut bytes = vec![0; usize::try_from(len)?];
        self.input.read_exact(&mut bytes).with_context(|| format!("the file ends at byte {}", self.len))?;
        self.at += len;
        String::from_utf8(bytes).map_err(|e| anyhow::anyhow!("text that is not UTF-8: {e}"))
    }

    fn bool(&mut self) -> Result<bool> {
        match self.array::<1>()?[0] {
            0 => Ok(false),
            1 => Ok(true),
            n => bail!("a bool of value {n}, expected 0 or 1"),
        }
    }

    fn int(&mut self, kind: u32) -> Result<i128> {
        Ok(match kind {
            0 => self.array::<1>()?[0].into(),
            1 => (self.array::<1>()?[0] as i8).into(),
            2 => u16::from_le_bytes(self.array()?).into(),
            3 => i16::from_le_bytes(self.array()?).into(),
            4 => u32::from_le_bytes(self.array()?).into(),
            5 => i32::from_le_bytes(self.array()?).into(),
            10 => u64::from_le_bytes(self.array()?).into(),
            11 => i64::from_le_bytes(self.array()?).into(),
            _ => bail!("value type {kind}, expected 0 to 12"),
        })
    }

    fn value(&mut self) -> Result<Value> {
        let kind = self.u32()?;
        Ok(match kind {
            6 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            7 => Value::Bool(self.bool()?),
            8 => Value::Text(self.text(self.len)?),
            9 => self.values()?,
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            _ => Value::Int(self.int(kind)?),
        })
    }

    fn values(&mut self) -> Result<Value> {
        let kind = self.u32()?;
        let count = self.u64()?;
        let least = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => bail!("an array of arrays, which no known key has"),
            _ => bail!("array elements of type {kind}, expected 0 to 12"),
        };
        self.check_count("array elements", count, least)?;
        Ok(match kind {
            6 => Value::Floats((0..count).map(|_| Ok(f32::from_le_bytes(self.array()?))).collect::<Result<_>>()?),
            12 => {
                Value::Floats((0..count).map(|_| Ok(f64::from_le_bytes(self.array()?) as f32)).collect::<Result<_>>()?)
            }
            7 => Value::Bools((0..count).map(|_| self.bool()).collect::<Result<_>>()?),
            8 => Value::Texts((0..count).map(|_| self.text(self.len)).collect::<Result<_>>()?),
            _ => Value::Ints(
                (0..count)
                    .map(|_| i64::try_from(self.int(kind)?).context("an integer beyond 63 bits"))
                    .collect::<Result<_>>()?,
            ),
        })
    }

    fn tensor(&mut self) -> Result<Tensor> {
        let name = self.text(MAX_NAME)?;
        let read = |r: &mut Self| -> Result<_> {
            let count = r.u32()?;
            ensure!((1..=MAX_DIMS).contains(&count), "{count} dimensions, expected 1 to {MAX_DIMS}");
            let dims = (0..count).map(|_| r.u64()).collect::<Result<Vec<_>>>()?;
            let id = r.u32()?;
            let offset = r.u64()?;
            let Some(&kind) = TYPES.iter().find(|t| t.id == id) else {
                bail!("tensor type {id} is not known; convert the model to F16, BF16, Q8_0, Q4_1 or Q4_0 first");
            };
            ensure!(dims.iter().all(|&n| n > 0), "dimensions {dims:?}, expected none to be 0");
            ensure!(
                dims[0].is_multiple_of(kind.block),
                "a row of {} elements is not a whole number of {} blocks of {}",
                dims[0],
                kind.name,
                kind.block
            );
            let len = dims
                .iter()
                .try_fold(1u64, |n, &d| n.checked_mul(d))
                .and_then(|n| (n / kind.block).checked_mul(kind.bytes))
                .with_context(|| format!("dimensions {dims:?} are more elements than there can be"))?;
            Ok((dims, kind, offset, len))
        };
        let (dims, kind, offset, len) = read(self).with_context(|| format!("tensor {name:?}"))?;
        Ok(Tensor { name, dims, kind, offset, len })
    }
}
