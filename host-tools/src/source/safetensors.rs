//! The weight files of a Hugging Face folder.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ::safetensors::tensor::{Dtype, Metadata};
use anyhow::{Context, Result, bail, ensure};

use super::{DType, SourceTensor, read_json};

/// Longest header, as in the safetensors crate.
const MAX_HEADER: u64 = 100_000_000;

/// The weight files of the folder, each with the tensors to take from it (all, if `None`).
pub(super) fn weight_files(folder: &Path) -> Result<Vec<(PathBuf, Option<BTreeSet<String>>)>> {
    let single = folder.join("model.safetensors");
    let index = folder.join("model.safetensors.index.json");
    if index.is_file() {
        let json = read_json(&index)?;
        let map =
            json["weight_map"].as_object().with_context(|| format!("{}: no \"weight_map\" object", index.display()))?;
        let mut files: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (tensor, file) in map {
            let file = file.as_str().unwrap_or_default();
            // A name must not lead out of the folder.
            ensure!(
                !file.is_empty() && !file.contains(['/', '\\']) && file != "..",
                "{}: tensor {tensor} lies in {file:?}, expected the name of a file in the same folder",
                index.display()
            );
            files.entry(file.into()).or_default().insert(tensor.clone());
        }
        return Ok(files.into_iter().map(|(file, tensors)| (folder.join(file), Some(tensors))).collect());
    }
    if single.is_file() {
        return Ok(vec![(single, None)]);
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| format!("listing {}", folder.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            found.push(path);
        }
    }
    match <[PathBuf; 1]>::try_from(found) {
        Ok([file]) => Ok(vec![(file, None)]),
        Err(found) if found.is_empty() => bail!(
            "{} has no *.safetensors; if the model is in PyTorch's .bin format, save it with save_pretrained(safe_serialization=True)",
            folder.display()
        ),
        Err(found) => bail!(
            "{} has {} *.safetensors files, but neither model.safetensors nor model.safetensors.index.json to say which belong to the model",
            folder.display(),
            found.len()
        ),
    }
}

/// Adds the tensors of `file` (number `number` of the source) to `tensors`.
pub(super) fn read_header(
    file: &File,
    number: usize,
    wanted: Option<&BTreeSet<String>>,
    tensors: &mut BTreeMap<String, SourceTensor>,
) -> Result<()> {
    let len = file.metadata()?.len();
    ensure!(len >= 8, "{len} bytes, expected a safetensors header; the file is cut off");
    let mut prefix = [0; 8];
    file.read_exact_at(&mut prefix, 0)?;
    let header_len = u64::from_le_bytes(prefix);
    ensure!(
        header_len <= MAX_HEADER && header_len <= len - 8,
        "a header of {header_len} bytes in a file of {len}; this is no safetensors file, or it is cut off"
    );
    let mut header = vec![0; usize::try_from(header_len)?];
    file.read_exact_at(&mut header, 8)?;
    let header: Metadata = serde_json::from_slice(&header).context("parsing the header")?;
    let data = 8 + header_len;
    let expected = header.data_len() as u64;
    ensure!(
        len - data == expected,
        "{} bytes of tensors, expected {expected}; the file is cut off or damaged",
        len - data
    );
    let infos = header.tensors();
    if let Some(missing) = wanted.and_then(|w| w.iter().find(|name| !infos.contains_key(*name))) {
        bail!("the tensor {missing}, which the index places here, is missing");
    }
    for (name, info) in infos {
        if wanted.is_some_and(|w| !w.contains(&name)) {
            continue;
        }
        let dtype = match info.dtype {
            Dtype::F32 => Some(DType::F32),
            Dtype::F16 => Some(DType::F16),
            Dtype::BF16 => Some(DType::Bf16),
            _ => None,
        };
        let shape: Vec<u64> = info.shape.iter().map(|&n| n as u64).collect();
        let tensor = SourceTensor {
            name: name.clone(),
            shape,
            type_name: format!("{:?}", info.dtype),
            dtype,
            file: number,
            offset: data + info.data_offsets.0 as u64,
        };
        tensors.insert(name, tensor);
    }
    Ok(())
}
