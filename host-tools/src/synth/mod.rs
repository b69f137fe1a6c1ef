//! Models of random weights with the exact shapes of known ones, so that what a mixture of experts costs to stream can
//! be measured where the real weights cannot be had.
//!
//! The weights are made row by row whenever they are asked for, by the converter for an image or for a GGUF file of
//! the same codes and scales, so neither memory nor disk holds more than what is written.

mod shape;
mod weights;

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, ensure};
pub use shape::{SHAPES, Shape};
use weights::Weights;

use crate::convert::Progress;
use crate::gguf::{self, Gguf, type_by_name};
use crate::source::{Maker, Source};

/// Groups of tokens with a part of their embeddings in common.
pub const TOPICS: u64 = 64;
/// Tokens that a topic lasts in [`Synthetic::tokens`], on average.
pub const TOPIC_TOKENS: f64 = 32.0;

/// What is drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Whether matrices have 8 bits (`Q8_0`) rather than 4 (`Q4_0`).
    pub eight_bits: bool,
    /// Experts' popularity falls as `rank^-skew` (Zipf's law); 0 makes them equal.
    pub skew: f64,
    /// Share of the router's input that tokens of one topic have in common, 0 to 1.
    pub locality: f64,
    /// Standard deviation of the router's scores from token to token.
    pub router_std: f64,
    /// Seed.
    pub seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { eight_bits: false, skew: 0.0, locality: 0.0, router_std: 1.0, seed: 1 }
    }
}

/// A model that is made when it is read.
#[derive(Debug)]
pub struct Synthetic {
    shape: Shape,
    options: Options,
    specs: Vec<shape::Spec>,
    header_bytes: Vec<u8>,
    header: Gguf,
    name: String,
}

impl Synthetic {
    /// A model of `shape`.
    ///
    /// # Errors
    /// A skew, locality or deviation that is out of range.
    pub fn new(shape: &Shape, options: &Options) -> Result<Self> {
        ensure!((0.0..=4.0).contains(&options.skew), "a skew of {}, expected 0 to 4", options.skew);
        ensure!((0.0..=0.95).contains(&options.locality), "a locality of {}, expected 0 to 0.95", options.locality);
        ensure!(
            options.router_std > 0.0 && options.router_std <= 20.0,
            "a deviation of the router's scores of {}, expected more than 0, at most 20",
            options.router_std
        );
        let (kind, file_type) = if options.eight_bits { ("Q8_0", 7) } else { ("Q4_0", 2) };
        let specs = shape.tensors(type_by_name(kind).context("a known type")?)?;
        let name = format!(
            "synthetic {}, {} layers, skew {}, locality {}, seed {}",
            shape.name, shape.layers, options.skew, options.locality, options.seed
        );
        let tensors = specs.iter().map(|s| (s.name.clone(), s.shape.iter().rev().copied().collect(), s.kind));
        let (header_bytes, header) = gguf::lay_out(shape.metadata(&name, file_type), tensors)?;
        Ok(Self { shape: shape.clone(), options: options.clone(), specs, header_bytes, header, name })
    }

    fn weights(&self) -> Weights {
        Weights::new(&self.shape, &self.specs, &self.options)
    }

    /// The model as something to convert.
    ///
    /// # Errors
    /// Never: the header is complete.
    pub fn source(&self) -> Result<Source> {
        Source::made(Path::new(&self.name), self.header.clone(), Box::new(self.weights()))
    }

    /// Bytes of the model as a GGUF file.
    #[must_use]
    pub fn gguf_len(&self) -> u64 {
        self.header.tensors.last().map_or(0, |last| last.offset + last.len)
    }

    /// Writes the model as a GGUF file.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_gguf(&self, path: &Path, progress: &mut dyn Progress) -> Result<()> {
        let what = || format!("writing {}", path.display());
        let mut out = std::io::BufWriter::with_capacity(1 << 20, std::fs::File::create(path).with_context(what)?);
        progress.set_total(self.gguf_len());
        out.write_all(&self.header_bytes).with_context(what)?;
        let weights = self.weights();
        let mut at = self.header_bytes.len() as u64;
        let mut row = Vec::new();
        for (spec, tensor) in self.specs.iter().zip(&self.header.tensors) {
            out.write_all(&vec![0; (tensor.offset - at) as usize]).with_context(what)?;
            let rows = tensor.dims[1..].iter().product::<u64>();
            row.resize((tensor.len / rows) as usize, 0);
            for r in 0..rows {
                weights.row(&spec.name, r, &mut row);
                out.write_all(&row).with_context(what)?;
            }
            at = tensor.offset + tensor.len;
            progress.advance(tensor.len);
        }
        out.into_inner().map_err(std::io::IntoInnerError::into_error).and_then(|f| f.sync_all()).with_context(what)
    }

    /// `count` tokens that stay with their topics as the model itself would.
    #[must_use]
    pub fn tokens(&self, count: usize) -> Vec<u32> {
        weights::tokens(self.shape.vocab, self.options.seed, count)
    }
}
