//! Writing the header of a GGUF file, version 3.

use anyhow::{Context, Result, ensure};

use super::{GgmlType, Gguf, Tensor, Value};

/// Alignment of tensor data where the metadata does not say.
const ALIGNMENT: u64 = 32;

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// The number of a value's type, and its bytes. Whole numbers are written as uint32 where they fit, which is what
/// llama.cpp reads counts as, and arrays of them as int32.
fn value(out: &mut Vec<u8>, value: &Value) -> Result<()> {
    let kind = |out: &mut Vec<u8>, kind: u32| out.extend_from_slice(&kind.to_le_bytes());
    let array = |out: &mut Vec<u8>, element: u32, len: usize| {
        kind(out, 9);
        kind(out, element);
        out.extend_from_slice(&(len as u64).to_le_bytes());
    };
    match value {
        Value::Int(n) => match u32::try_from(*n) {
            Ok(n) => {
                kind(out, 4);
                out.extend_from_slice(&n.to_le_bytes());
            }
            Err(_) => {
                kind(out, 11);
                out.extend_from_slice(&i64::try_from(*n).context("an integer beyond 63 bits")?.to_le_bytes());
            }
        },
        Value::Float(x) => {
            kind(out, 6);
            out.extend_from_slice(&(*x as f32).to_le_bytes());
        }
        Value::Bool(b) => {
            kind(out, 7);
            out.push((*b).into());
        }
        Value::Text(s) => {
            kind(out, 8);
            text(out, s);
        }
        Value::Ints(list) => {
            array(out, 5, list.len());
            for n in list {
                out.extend_from_slice(&i32::try_from(*n).context("an array's integer beyond 31 bits")?.to_le_bytes());
            }
        }
        Value::Floats(list) => {
            array(out, 6, list.len());
            list.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes()));
        }
        Value::Bools(list) => {
            array(out, 7, list.len());
            list.iter().for_each(|b| out.push((*b).into()));
        }
        Value::Texts(list) => {
            array(out, 8, list.len());
            list.iter().for_each(|s| text(out, s));
        }
    }
    Ok(())
}

/// The header of a file that holds `metadata` and tensors of these names, dimensions (fastest first) and types, in
/// this order: its bytes, up to the first tensor's, and what reading it gives. Tensors lie 32 bytes aligned.
///
/// # Errors
/// A number that the format has no room for, or a row that is not whole blocks.
pub fn lay_out(
    metadata: Vec<(String, Value)>,
    tensors: impl IntoIterator<Item = (String, Vec<u64>, GgmlType)>,
) -> Result<(Vec<u8>, Gguf)> {
    let mut placed = Vec::new();
    let mut at = 0u64;
    for (name, dims, kind) in tensors {
        let row = dims.first().copied().unwrap_or(0);
        ensure!(row > 0 && row.is_multiple_of(kind.block), "tensor {name}: rows of {row}, blocks of {}", kind.block);
        let len = dims.iter().product::<u64>() / kind.block * kind.bytes;
        placed.push(Tensor { name, dims, kind, offset: at, len });
        at = (at + len).next_multiple_of(ALIGNMENT);
    }
    let mut out = b"GGUF".to_vec();
    out.extend_from_slice(&3u32.to_le_bytes());
    out.extend_from_slice(&(placed.len() as u64).to_le_bytes());
    out.extend_from_slice(&(metadata.len() as u64).to_le_bytes());
    for (key, v) in &metadata {
        text(&mut out, key);
        value(&mut out, v).with_context(|| format!("the value of {key}"))?;
    }
    for tensor in &placed {
        text(&mut out, &tensor.name);
        out.extend_from_slice(&(tensor.dims.len() as u32).to_le_bytes());
        tensor.dims.iter().for_each(|n| out.extend_from_slice(&n.to_le_bytes()));
        out.extend_from_slice(&tensor.kind.id.to_le_bytes());
        out.extend_from_slice(&tensor.offset.to_le_bytes());
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
    let data = out.len() as u64;
    placed.iter_mut().for_each(|tensor| tensor.offset += data);
    Ok((out, Gguf { version: 3, metadata, tensors: placed }))
}

#[cfg(test)]
mod tests {
    use super::super::{parse, type_by_name};
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let metadata = vec![
            ("general.architecture".to_owned(), Value::Text("llama".into())),
            ("a.count".to_owned(), Value::Int(7)),
            ("a.big".to_owned(), Value::Int(1 << 40)),
            ("a.x".to_owned(), Value::Float(0.5)),
            ("a.flag".to_owned(), Value::Bool(true)),
            ("a.list".to_owned(), Value::Ints(vec![0, -3, 8])),
            ("a.floats".to_owned(), Value::Floats(vec![1.5])),
            ("a.bools".to_owned(), Value::Bools(vec![true, false])),
            ("a.texts".to_owned(), Value::Texts(vec!["x".into(), "".into()])),
        ];
        let f32s = type_by_name("F32").unwrap();
        let q4 = type_by_name("Q4_0").unwrap();
        let tensors = [("a".to_owned(), vec![3], f32s), ("b".to_owned(), vec![64, 5], q4)];
        let (mut bytes, header) = lay_out(metadata, tensors.clone()).unwrap();
        let last = header.tensors.last().unwrap();
        bytes.resize((last.offset + last.len) as usize, 0);
        assert_eq!(parse(std::io::Cursor::new(&bytes)).unwrap(), header);
        // A byte less, and the last tensor is cut off.
        bytes.pop();
        assert!(parse(std::io::Cursor::new(&bytes)).is_err());
        assert!(lay_out(Vec::new(), [("c".to_owned(), vec![33], q4)]).is_err());
    }
}
