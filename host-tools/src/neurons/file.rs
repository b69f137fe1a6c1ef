//! The file of a [`NeuronPlan`]: safetensors, so that other tools can look into it.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use zerocopy::IntoBytes;

use super::{LayerNeurons, NeuronPlan, clusters};

/// Marks the file.
const FORMAT: &str = "forebay-neurons-2";

impl NeuronPlan {
    /// Writes the plan to `path`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let numbers =
            [("format", FORMAT.to_owned()), ("width", self.width.to_string()), ("hidden", self.hidden.to_string())];
        let metadata: HashMap<String, String> = numbers.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
        let mut tensors = Vec::new();
        for (l, layer) in &self.layers {
            let hidden = self.hidden as usize;
            let parts: [(&str, Dtype, Vec<usize>, &[u8]); 5] = [
                ("order", Dtype::U32, vec![layer.order.len()], layer.order.as_bytes()),
                ("gate", Dtype::F32, vec![layer.bias.len(), hidden], layer.gate.as_bytes()),
                ("bias", Dtype::F32, vec![layer.bias.len()], layer.bias.as_bytes()),
                ("thresholds", Dtype::F32, vec![layer.thresholds.len()], layer.thresholds.as_bytes()),
                ("uses", Dtype::F32, vec![layer.uses.len()], layer.uses.as_bytes()),
            ];
            for (part, dtype, shape, bytes) in parts {
                let view = TensorView::new(dtype, shape, bytes).context("describing a tensor")?;
                tensors.push((format!("layers.{l}.{part}"), view));
            }
        }
        safetensors::serialize_to_file(tensors, Some(metadata), path)
            .with_context(|| format!("writing {}", path.display()))
    }

    /// Reads a plan from `path` and checks that it is one.
    ///
    /// # Errors
    /// The file cannot be read, or is no plan; says what is wrong with it.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        Self::parse(&bytes).with_context(|| format!("{} is no file that `forebay calibrate` wrote", path.display()))
    }

    fn parse(bytes: &[u8]) -> Result<Self> {
        let (_, header) = SafeTensors::read_metadata(bytes)?;
        let metadata = header.metadata().as_ref().context("it has no metadata")?;
        ensure!(metadata.get("format").is_some_and(|f| f == FORMAT), "its format is not {FORMAT}");
        let number = |key: &str| -> Result<u32> {
            let text = metadata.get(key).with_context(|| format!("it has no {key}"))?;
            text.parse().ok().filter(|n| (1..1 << 20).contains(n)).with_context(|| format!("its {key} is {text:?}"))
        };
        let (width, hidden) = (number("width")?, number("hidden")?);
        let tensors = SafeTensors::deserialize(bytes)?;
        let mut parts: BTreeMap<u16, BTreeMap<&str, TensorView<'_>>> = BTreeMap::new();
        for (name, view) in tensors.iter() {
            let known = name.strip_prefix("layers.").and_then(|rest| rest.split_once('.'));
            let Some((layer, part)) = known.and_then(|(l, part)| Some((l.parse().ok()?, part))) else {
                bail!("the tensor {name} is unknown");
            };
            parts.entry(layer).or_default().insert(part, view);
        }
        let mut layers = BTreeMap::new();
        for (l, parts) in parts {
            let get = |part: &str, dtype| -> Result<&TensorView<'_>> {
                let view = parts.get(part).with_context(|| format!("layer {l} has no {part}"))?;
                ensure!(view.dtype() == dtype, "the {part} of layer {l} is of another type");
                Ok(view)
            };
            let words = |view: &TensorView<'_>| -> Vec<[u8; 4]> {
                view.data().chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]).collect()
            };
            let floats = |part: &str| -> Result<Vec<f32>> {
                let values: Vec<f32> = words(get(part, Dtype::F32)?).into_iter().map(f32::from_le_bytes).collect();
                ensure!(
                    values.iter().all(|x| x.is_finite()),
                    "the {part} of layer {l} has numbers that are not finite"
                );
                Ok(values)
            };
            let order: Vec<u32> = words(get("order", Dtype::U32)?).into_iter().map(u32::from_le_bytes).collect();
            let [gate, bias] = [floats("gate")?, floats("bias")?];
            let layer = LayerNeurons { gate, bias, thresholds: floats("thresholds")?, uses: floats("uses")?, order };
            let mut sorted = layer.order.clone();
            sorted.sort_unstable();
            ensure!(sorted.into_iter().eq(0..layer.order.len() as u32), "the order of layer {l} is not a permutation");
            let count = clusters(layer.order.len(), width);
            let fits = count > 0 && layer.bias.len() == count && layer.gate.len() == count * hidden as usize;
            ensure!(fits, "the predictor of layer {l} has not a row of {hidden} for each of {count} clusters");
            ensure!(layer.thresholds.len() >= 2, "layer {l} has no thresholds");
            ensure!(layer.uses.len() == count, "layer {l} has not a number of uses for each of {count} clusters");
            layers.insert(l, layer);
        }
        Ok(Self { width, hidden, layers })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> NeuronPlan {
        let layer = LayerNeurons {
            order: (0..40).rev().collect(),
            gate: vec![0.5; 2 * 3],
            bias: vec![1.0, 2.0],
            thresholds: vec![2.0, 1.0, 0.0],
            uses: vec![0.75, 0.5],
        };
        NeuronPlan { width: 32, hidden: 3, layers: BTreeMap::from([(0, layer.clone()), (7, layer)]) }
    }

    fn round_trip(plan: &NeuronPlan) -> Result<NeuronPlan> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("plan");
        plan.write(&path)?;
        NeuronPlan::read(&path)
    }

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(round_trip(&plan()).unwrap(), plan());
    }

    #[test]
    fn what_is_no_plan_is_refused() {
        type Break = fn(&mut LayerNeurons);
        let broken: [(&str, Break); 6] = [
            ("permutation", |l| l.order[0] = 0),
            ("predictor", |l| l.order.truncate(0)),
            ("predictor", |l| l.gate.truncate(l.gate.len() - 1)),
            ("finite", |l| l.bias[0] = f32::NAN),
            ("thresholds", |l| l.thresholds.truncate(1)),
            ("uses", |l| l.uses.truncate(1)),
        ];
        for (word, damage) in broken {
            let mut plan = plan();
            damage(plan.layers.get_mut(&7).unwrap());
            let gate = plan.layers[&7].gate.len();
            // A shape that contradicts its bytes is refused when it is written.
            let message = format!("{:#}", round_trip(&plan).unwrap_err());
            assert!(message.contains(word) || !gate.is_multiple_of(3), "{word}: {message}");
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("text");
        std::fs::write(&path, "not a plan").unwrap();
        let message = format!("{:#}", NeuronPlan::read(&path).unwrap_err());
        assert!(message.contains("forebay calibrate"), "{message}");
    }
}
