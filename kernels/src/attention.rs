//! Causal attention with grouped queries over a cache of keys and values.

use crate::arch::split::{Split, run_parts};
use crate::arch::{Float, Kernels};
use crate::exec::Exec;
use crate::matmul::parts;
use crate::reference::kv8;

/// Element format of the cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum KvFormat {
    /// IEEE binary32.
    F32,
    /// IEEE binary16, rounded to nearest even when stored.
    F16,
    /// Codes of 8 bits with a binary16 scale for every 32 elements of a head.
    Q8,
}

impl KvFormat {
    /// Bytes of a head of one position, `dim` elements.
    pub const fn row_bytes(self, dim: usize) -> usize {
        match self {
            Self::F32 => 4 * dim,
            Self::F16 => 2 * dim,
            Self::Q8 => kv8::row_bytes(dim),
        }
    }
    fn dot_rows(self, kernels: &dyn Kernels, rows: &[u8], x: &[f32], out: &mut [f32]) {
        match self {
            Self::F32 => kernels.dot_rows(Float::F32, rows, x, out),
            Self::F16 => kernels.dot_rows(Float::F16, rows, x, out),
            Self::Q8 => kernels.dot_rows_q8(rows, x, out),
        }
    }
    fn weighted_sum(self, kernels: &dyn Kernels, rows: &[u8], weights: &[f32], out: &mut [f32]) {
        match self {
            Self::F32 => kernels.weighted_sum(Float::F32, rows, weights, out),
            Self::F16 => kernels.weighted_sum(Float::F16, rows, weights, out),
            Self::Q8 => kernels.weighted_sum_q8(rows, weights, out),
        }
    }
}

/// Shape of one layer's cache of keys, or of values: `[kv_heads][capacity][head_dim]`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct KvShape {
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Positions.
    pub capacity: usize,
}

impl KvShape {
    /// Bytes of the cache of keys, or of values.
    pub const fn bytes(&self, format: KvFormat) -> usize {
        self.kv_heads * self.capacity * format.row_bytes(self.head_dim)
    }
}

/// Stores the keys, or values, of position `pos`; `x` is `[kv_heads][head_dim]`.
///
/// # Panics
/// If `pos` is outside the capacity or a slice has another length.
pub fn kv_store(exec: &Exec<'_>, format: KvFormat, shape: &KvShape, cache: &mut [u8], pos: usize, x: &[f32]) {
    assert!(pos < shape.capacity, "position outside the cache");
    assert_eq!(cache.len(), shape.bytes(format), "cache of another shape");
    assert_eq!(x.len(), shape.kv_heads * shape.head_dim, "x is [kv_heads][head_dim]");
    if x.is_empty() {
        return;
    }
    let row = format.row_bytes(shape.head_dim);
    let kernels = exec.backend.kernels();
    for (head, x) in x.chunks_exact(shape.head_dim).enumerate() {
        let at = (head * shape.capacity + pos) * row;
        let out = &mut cache[at..at + row];
        match format {
            KvFormat::F32 => out.as_chunks_mut().0.iter_mut().zip(x).for_each(|(o, x)| *o = x.to_le_bytes()),
            KvFormat::F16 => kernels.store_f16(x, out),
            KvFormat::Q8 => kv8::store(x, out),
        }
    }
}

/// Elements of scratch that [`attention`] needs with `workers` workers.
pub fn attention_scratch(shape: &KvShape, heads: usize, workers: usize) -> usize {
    let _ = heads;
    shape.capacity.next_multiple_of(16) * workers.max(1)
}

/// Attention of `tokens` tokens at positions `pos0..`, whose keys and values are already in the caches.
///
/// - `k`, `v`: the caches.
/// - `q`, `out`: `[tokens][heads][head_dim]`; query head `h` uses key head `h * kv_heads / heads`.
/// - `window`: 0, or the number of last positions, its own included, that a token attends to.
/// - `scratch`: at least [`attention_scratch`] elements for the workers of `exec`.
///
/// # Panics
/// If a slice has another length, `heads` is no multiple of the shape's `kv_heads`, or the tokens do not fit the
/// capacity.
#[allow(clippy::too_many_arguments)]
pub fn attention(
    exec: &Exec<'_>,
    format: KvFormat,
    shape: &KvShape,
    k: &[u8],
    v: &[u8],
    q: &[f32],
    heads: usize,
    tokens: usize,
    pos0: usize,
    window: usize,
    scale: f32,
    scratch: &mut [f32],
    out: &mut [f32],
) {
    let (dim, width) = (shape.head_dim, heads * shape.head_dim);
    assert!(pos0 + tokens <= shape.capacity, "tokens outside the cache");
    assert!(k.len() == shape.bytes(format) && v.len() == k.len(), "cache of another shape");
    assert!(q.len() == tokens * width && out.len() == q.len(), "q and out are [tokens][heads][head_dim]");
    assert!(scratch.len() >= attention_scratch(shape, heads, exec.workers.count()), "scratch too small");
    if out.is_empty() {
        return;
    }
    assert!(shape.kv_heads > 0 && heads.is_multiple_of(shape.kv_heads), "heads share key heads evenly");
    let group = heads / shape.kv_heads;
    let kernels = exec.backend.kernels();
    let row = format.row_bytes(dim);
    let span = if window == 0 { pos0 + tokens } else { window.min(pos0 + tokens) };
    let parts = parts(exec, tokens * width * span, heads);
    let share = scratch.len() / parts;
    let outs = Split::new(out, width, dim, parts);
    let scratches = Split::new(&mut scratch[..share * parts], share * parts, share, parts);
    run_parts(exec, parts, &|part| {
        let (Some(mut columns), Some(mut scores)) = (outs.take(part), scratches.take(part)) else { return };
        let (range, scores) = (columns.range(), scores.row(0));
        for head in range.start / dim..range.end / dim {
            let cache = head / group * shape.capacity * row..(head / group + 1) * shape.capacity * row;
            let (k, v) = (&k[cache.clone()], &v[cache]);
            for token in 0..tokens {
                let end = pos0 + token + 1;
                let start = if window == 0 { 0 } else { end.saturating_sub(window) };
                let scores = &mut scores[..end - start];
                let q = &q[token * width + head * dim..][..dim];
                format.dot_rows(kernels, &k[start * row..end * row], q, scores);
                kernels.scale(scores, scale);
                kernels.softmax(scores);
                let out = &mut columns.row(token)[head * dim - range.start..][..dim];
                format.weighted_sum(kernels, &v[start * row..end * row], scores, out);
            }
        }
    });
}
