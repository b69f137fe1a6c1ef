//! Second moments of what the matrices of feed-forwards are applied to: which errors of their weights matter.
//!
//! An error `e` of a row of weights adds `e x` to a product, whose mean square over a text is `e H e'` with
//! `H = mean of x' x`. A run of the engine over a calibration text records H ([`Recorder`]), a file keeps it, and a
//! conversion quantises with it ([`Moments::input`], [`Moments::neurons`]). All experts of a layer have the layer's
//! input in common; what the down projections are applied to is recorded for each unit. Moments of columns that lie in
//! different blocks of `BLOCK` are taken to be zero, which keeps the matrices positive and the file small.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use forebay_kernels::exec::{Backend, Exec, Serial};
use forebay_kernels::ops::add_scaled;
use forebay_runtime::drive::Observer;
use safetensors::tensor::{Dtype, Metadata, TensorView};
use zerocopy::IntoBytes;

use crate::quantize::Feedback;

/// Marks the file.
const FORMAT: &str = "forebay-moments-1";
/// Columns whose moments are kept together.
const BLOCK: usize = 512;
/// Longest header that is read.
const MAX_HEADER: u64 = 1 << 26;
/// Added to the diagonal, as a share of its mean: directions that the text has hardly shown count too (GPTQ,
/// 2210.17323, section 3.3).
const DAMPING: f64 = 0.01;
/// Tokens whose products are added to a row of sums at once.
const STRIP: usize = 16;

/// Sums of products over tokens.
#[derive(Clone, Debug)]
struct Sums {
    columns: usize,
    block: usize,
    /// `[columns][block]`: row i has the products with the columns of its block.
    products: Vec<f32>,
    tokens: u64,
}

impl Sums {
    fn new(columns: usize) -> Self {
        let block = columns.min(BLOCK);
        Self { columns, block, products: vec![0.0; columns * block], tokens: 0 }
    }

    /// Adds `rows`, `[tokens][columns]`.
    fn add(&mut self, rows: &[f32]) {
        let (columns, block) = (self.columns, self.block);
        let exec = Exec { backend: Backend::detect(), workers: &Serial };
        self.tokens += (rows.len() / columns) as u64;
        for strip in rows.chunks(STRIP * columns) {
            for (i, products) in self.products.chunks_exact_mut(block).enumerate() {
                // What is left of the diagonal is the same.
                let last = (i / block * block + block).min(columns);
                for row in strip.chunks_exact(columns) {
                    let x = row[i];
                    let at = i % block;
                    add_scaled(&exec, &mut products[at..at + last - i], &row[i..last], x);
                }
            }
        }
    }

    /// Means, with both halves.
    fn finish(mut self) -> Vec<f32> {
        let (block, scale) = (self.block, 1.0 / self.tokens.max(1) as f32);
        self.products.iter_mut().for_each(|x| *x *= scale);
        for i in 0..self.columns {
            for j in i / block * block..i {
                self.products[i * block + j % block] = self.products[j * block + i % block];
            }
        }
        self.products
    }
}

/// A layer being recorded.
#[derive(Clone, Debug)]
struct LayerSums {
    width: usize,
    input: Sums,
    units: Vec<Sums>,
}

/// Watches a run and records moments.
#[derive(Clone, Debug)]
pub struct Recorder {
    hidden: usize,
    layers: Vec<LayerSums>,
}

impl Recorder {
    /// For a model of this width, whose layers have so many units of so many neurons.
    #[must_use]
    pub fn new(hidden: usize, layers: impl IntoIterator<Item = (usize, usize)>) -> Self {
        let layer =
            |(units, width)| LayerSums { width, input: Sums::new(hidden), units: vec![Sums::new(width); units] };
        Self { hidden, layers: layers.into_iter().map(layer).collect() }
    }

    /// Writes the file.
    ///
    /// # Errors
    /// Nothing was recorded, numbers are not finite, or the file cannot be written.
    pub fn write(self, path: &Path) -> Result<()> {
        let mut metadata = HashMap::from([("format".to_owned(), FORMAT.to_owned())]);
        let mut tensors: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
        for (l, layer) in self.layers.into_iter().enumerate() {
            metadata.insert(format!("layers.{l}.unit_width"), layer.width.to_string());
            let rows = layer.units.len() * layer.width;
            let input = layer.input.finish();
            let neurons: Vec<f32> = layer.units.into_iter().flat_map(Sums::finish).collect();
            let finite = input.iter().chain(&neurons).all(|x| x.is_finite());
            ensure!(finite, "the activations of layer {l} are not finite");
            tensors.push((format!("layers.{l}.input"), vec![self.hidden, input.len() / self.hidden], input));
            tensors.push((format!("layers.{l}.neurons"), vec![rows, neurons.len() / rows], neurons));
        }
        let views = tensors.iter().map(|(name, shape, values)| {
            let view = TensorView::new(Dtype::F32, shape.clone(), values.as_bytes());
            Ok((name, view.context("describing a tensor")?))
        });
        let views = views.collect::<Result<Vec<_>>>()?;
        safetensors::serialize_to_file(views, Some(metadata), path)
            .with_context(|| format!("writing {}", path.display()))
    }
}

impl Observer for Recorder {
    fn feed_forward(&mut self, layer: usize, input: &[f32], _residual: &[f32]) {
        if let Some(layer) = self.layers.get_mut(layer) {
            layer.input.add(input);
        }
    }

    fn unit(&mut self, layer: usize, unit: usize, activations: &[f32]) {
        if let Some(unit) = self.layers.get_mut(layer).and_then(|layer| layer.units.get_mut(unit)) {
            unit.add(activations);
        }
    }
}

/// A matrix in the file, `[rows][block]`.
#[derive(Clone, Copy, Debug)]
struct Stored {
    rows: usize,
    block: usize,
    offset: u64,
}

/// A layer in the file.
#[derive(Clone, Copy, Debug)]
struct StoredLayer {
    width: usize,
    input: Stored,
    neurons: Stored,
}

/// A file of moments.
#[derive(Debug)]
pub struct Moments {
    file: File,
    layers: BTreeMap<u16, StoredLayer>,
}

impl Moments {
    /// Opens a file and checks that it is one of moments.
    ///
    /// # Errors
    /// The file cannot be read, or holds something else; says what.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        let hint = || format!("{} is no file that `forebay calibrate --moments` wrote", path.display());
        let layers = Self::parse(&file).with_context(hint)?;
        Ok(Self { file, layers })
    }

    fn parse(file: &File) -> Result<BTreeMap<u16, StoredLayer>> {
        let mut prefix = [0; 8];
        file.read_exact_at(&mut prefix, 0)?;
        let header = u64::from_le_bytes(prefix);
        ensure!(header <= MAX_HEADER, "its header would have {header} bytes");
        let mut bytes = vec![0; header as usize];
        file.read_exact_at(&mut bytes, 8)?;
        let metadata: Metadata = serde_json::from_slice(&bytes)?;
        let data = 8 + header;
        ensure!(file.metadata()?.len() == data + metadata.data_len() as u64, "it is cut off, or longer than it says");
        let texts = metadata.metadata().as_ref().context("it has no metadata")?;
        ensure!(texts.get("format").is_some_and(|f| f == FORMAT), "its format is not {FORMAT}");
        let tensors = metadata.tensors();
        let stored = |name: String| -> Result<Stored> {
            let info = tensors.get(&name).with_context(|| format!("{name} is missing"))?;
            let (Dtype::F32, &[rows, block]) = (info.dtype, info.shape.as_slice()) else {
                bail!("{name} is {:?} {:?}", info.dtype, info.shape);
            };
            ensure!(rows > 0 && (1..=BLOCK).contains(&block), "{name} has the shape {rows} x {block}");
            Ok(Stored { rows, block, offset: data + info.data_offsets.0 as u64 })
        };
        let mut layers = BTreeMap::new();
        for l in 0..tensors.len() as u16 / 2 {
            let text = texts.get(&format!("layers.{l}.unit_width"));
            let width: Option<usize> = text.and_then(|text| text.parse().ok());
            let (input, neurons) = (stored(format!("layers.{l}.input"))?, stored(format!("layers.{l}.neurons"))?);
            let width = width.filter(|w| *w > 0 && neurons.rows.is_multiple_of(*w) && neurons.block == BLOCK.min(*w));
            let width = width.with_context(|| format!("the unit width of layer {l} is {text:?}"))?;
            ensure!(input.block == BLOCK.min(input.rows), "the input of layer {l} has blocks of {}", input.block);
            layers.insert(l, StoredLayer { width, input, neurons });
        }
        ensure!(!layers.is_empty(), "it has no layers");
        Ok(layers)
    }

    /// Neurons of layer `l`, those of all experts together, and the columns of its input; `None` if it is not there.
    #[must_use]
    pub fn shape(&self, l: u16) -> Option<(usize, usize)> {
        self.layers.get(&l).map(|layer| (layer.neurons.rows, layer.input.rows))
    }

    /// Layers.
    #[must_use]
    pub fn layer_count(&self) -> usize {
        self.layers.len()
    }

    /// Of the input of layer `l`, which gate and up projections are applied to.
    ///
    /// # Errors
    /// The layer is not there, or the file cannot be read.
    pub fn input(&self, l: u16) -> Result<Feedback> {
        let layer = self.layers.get(&l).with_context(|| format!("there are no moments of layer {l}"))?;
        let columns: Vec<usize> = (0..layer.input.rows).collect();
        self.feedback(layer.input, layer.input.rows, &columns)
    }

    /// Of neurons of layer `l`, which the down projection is applied to; expert e's first neuron follows the last of
    /// expert e - 1.
    ///
    /// # Errors
    /// The layer or a neuron is not there, or the file cannot be read.
    pub fn neurons(&self, l: u16, neurons: &[usize]) -> Result<Feedback> {
        let layer = self.layers.get(&l).with_context(|| format!("there are no moments of layer {l}"))?;
        ensure!(neurons.iter().all(|n| *n < layer.neurons.rows), "there are no moments of all neurons of layer {l}");
        self.feedback(layer.neurons, layer.width, neurons)
    }

    /// Of columns of a matrix whose blocks lie in parts of `width`.
    fn feedback(&self, stored: Stored, width: usize, columns: &[usize]) -> Result<Feedback> {
        let n = columns.len();
        let place = |c: usize| (c / width, c % width / stored.block, c % width % stored.block);
        let mut moments = vec![0.0f64; n * n];
        let mut row = vec![0; stored.block * 4];
        for (i, c) in columns.iter().enumerate() {
            self.file.read_exact_at(&mut row, stored.offset + (c * stored.block * 4) as u64)?;
            let (unit, block, _) = place(*c);
            for (j, other) in columns.iter().enumerate() {
                let (other_unit, other_block, at) = place(*other);
                if (other_unit, other_block) == (unit, block) {
                    let value = [row[4 * at], row[4 * at + 1], row[4 * at + 2], row[4 * at + 3]];
                    moments[i * n + j] = f32::from_le_bytes(value).into();
                }
            }
        }
        ensure!(moments.iter().all(|x| x.is_finite()), "moments that are not finite");
        Ok(factor(moments, n))
    }
}

/// Takes `moments`, `[n][n]`, apart as [`Feedback`] says. Plain loops in one order, so that the result is the same on
/// every machine.
pub(crate) fn factor(mut moments: Vec<f64>, n: usize) -> Feedback {
    let mean = (0..n).map(|i| moments[i * n + i]).sum::<f64>() / n.max(1) as f64;
    if mean <= 0.0 {
        // Nothing was ever seen here: all errors are equal.
        let mut moments = vec![0.0; n * n];
        (0..n).for_each(|i| moments[i * n + i] = 1.0);
        let spans = (0..n).map(|i| i..i + 1).collect();
        return Feedback { importance: vec![1.0; n], coupling: vec![0.0; n * n], moments, spans };
    }
    let mut importance = vec![0.0f64; n];
    let mut coupling = vec![0.0f32; n * n];
    for i in 0..n {
        moments[i * n + i] += DAMPING * mean;
    }
    let damped = moments.clone();
    let spans = damped.chunks_exact(n).map(|row| {
        let first = row.iter().position(|h| *h != 0.0).unwrap_or_default();
        first..row.iter().rposition(|h| *h != 0.0).map_or(first, |last| last + 1)
    });
    let spans = spans.collect();
    let mut column = vec![0.0f64; n];
    for k in (0..n).rev() {
        let pivot = moments[k * n + k].max(DAMPING * mean);
        importance[k] = pivot;
        for i in 0..k {
            column[i] = moments[i * n + k] / pivot;
            coupling[i * n + k] = column[i] as f32;
        }
        for i in 0..k {
            let factor = column[i] * pivot;
            if factor != 0.0 {
                moments[i * n + i..i * n + k].iter_mut().zip(&column[i..k]).for_each(|(h, m)| *h -= factor * m);
            }
        }
    }
    let mean = importance.iter().sum::<f64>() / n as f64;
    let scaled = |values: &[f64]| values.iter().map(|x| (x / mean) as f32).collect();
    Feedback { importance: scaled(&importance), coupling, moments: scaled(&damped), spans }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two layers: one of two units of 40 neurons, one of three of 8; an input wider than a block.
    fn recorded(path: &Path) -> Vec<f32> {
        let hidden = BLOCK + 8;
        let mut recorder = Recorder::new(hidden, [(2, 40), (3, 8)]);
        let rows = |n: usize, seed: usize| -> Vec<f32> {
            (0..n).map(|i| ((i * 37 + seed * 11 + i * i * seed) % 41) as f32 / 20.0 - 1.0).collect()
        };
        let activations = rows(5 * 40, 3);
        for layer in 0..2 {
            recorder.feed_forward(layer, &rows(5 * hidden, layer + 1), &[]);
        }
        recorder.unit(0, 1, &activations[..3 * 40]);
        recorder.unit(0, 1, &activations[3 * 40..]);
        recorder.write(path).unwrap();
        activations
    }

    #[test]
    fn what_is_recorded_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("moments");
        let activations = recorded(&path);
        let moments = Moments::open(&path).unwrap();
        assert_eq!((moments.layer_count(), moments.shape(0), moments.shape(1)), (2, Some((80, 520)), Some((24, 520))));
        // Neurons of another order, one of them of a unit that was never used.
        let neurons = [57, 41, 79, 3];
        let found = moments.neurons(0, &neurons).unwrap();
        let want = |a: usize, b: usize| {
            let column = |n: usize| activations.iter().skip(n - 40).step_by(40);
            column(neurons[a]).zip(column(neurons[b])).map(|(x, y)| x * y).sum::<f32>() / 5.0
        };
        let scale = found.moments[1] / want(0, 1);
        for (a, b) in [(0, 2), (1, 2), (2, 0), (2, 1)] {
            let (stored, want) = (found.moments[a * 4 + b], scale * want(a, b));
            assert!((stored - want).abs() < 1e-5 * scale.abs(), "{a} {b}: {stored} {want}");
        }
        assert!((0..3).all(|a| found.moments[a * 4 + 3] == 0.0 && found.moments[3 * 4 + a] == 0.0));
        // The input's columns in different blocks have nothing in common.
        let input = moments.input(1).unwrap();
        assert!(input.moments[BLOCK - 1] != 0.0 && input.moments[BLOCK] == 0.0);
        assert!(moments.neurons(0, &[80]).is_err() && moments.input(2).is_err());
    }

    #[test]
    fn what_is_no_file_of_moments_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("moments");
        recorded(&path);
        let good = std::fs::read(&path).unwrap();
        let mut broken = vec![Vec::new(), b"not moments".to_vec(), good[..good.len() - 4].to_vec()];
        for (from, to) in [("moments-1", "moments-9"), ("[80,40]", "[40,80]"), ("layers.1.input", "layers.1.inpux")] {
            let at = good.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
            let mut bytes = good.clone();
            bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
            broken.push(bytes);
        }
        for bytes in broken {
            std::fs::write(&path, &bytes).unwrap();
            let message = format!("{:#}", Moments::open(&path).unwrap_err());
            assert!(message.contains("forebay calibrate --moments"), "{message}");
        }
        let mut recorder = Recorder::new(1, [(1, 1)]);
        recorder.feed_forward(0, &[f32::NAN], &[]);
        assert!(recorder.write(&path).is_err());
    }
}
