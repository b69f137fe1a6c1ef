//! Causal attention with grouped queries over a cache of keys and values.
//!
//! Keys and values of a few positions are converted to binary32 once and used for all heads that share them and for
//! several tokens (Ainslie et al., *GQA*, 2023, section 2.2, is why heads share them).

use core::ops::Range;

use crate::arch::split::{Columns, Split, run_parts};
use crate::arch::{Float, Kernels};
use crate::exec::Exec;
use crate::matmul::parts;
use crate::reference::attention::POSITIONS;
use crate::reference::kv8;

/// Rows of scores, one a token and head, that a worker keeps at once: as many uses has a converted key or value.
const SCORE_ROWS: usize = 16;

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
}

/// Shape of one layer's cache of keys, or of values.
///
/// Values are `[kv_heads][capacity][head_dim]`. Keys are `[kv_heads][blocks][head_dim][16]`, so that 16 positions of an
/// element lie together. With 8 bits the scales of a row, or of a block (`[groups][16]`), follow its codes.
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
        self.kv_heads * self.head_bytes(format)
    }
    /// Bytes of a head: the positions of whole blocks.
    const fn head_bytes(&self, format: KvFormat) -> usize {
        self.capacity.next_multiple_of(POSITIONS) * format.row_bytes(self.head_dim)
    }
    fn check_store(&self, format: KvFormat, cache: &[u8], pos: usize, x: &[f32]) {
        assert!(pos < self.capacity, "position outside the cache");
        assert_eq!(cache.len(), self.bytes(format), "cache of another shape");
        assert_eq!(x.len(), self.kv_heads * self.head_dim, "x is [kv_heads][head_dim]");
    }
}

/// Stores the keys of position `pos`; `x` is `[kv_heads][head_dim]`.
///
/// # Panics
/// If `pos` is outside the capacity or a slice has another length.
pub fn store_keys(exec: &Exec<'_>, format: KvFormat, shape: &KvShape, cache: &mut [u8], pos: usize, x: &[f32]) {
    shape.check_store(format, cache, pos, x);
    if x.is_empty() {
        return;
    }
    let kernels = exec.backend.kernels();
    let (dim, lane) = (shape.head_dim, pos % POSITIONS);
    let block_bytes = POSITIONS * format.row_bytes(dim);
    let heads = x.chunks_exact(dim).zip(cache.chunks_exact_mut(shape.head_bytes(format)));
    for (x, head) in heads {
        let block = &mut head[pos / POSITIONS * block_bytes..][..block_bytes];
        match format {
            KvFormat::F32 => {
                let lanes = block.as_chunks_mut::<4>().0.iter_mut().skip(lane).step_by(POSITIONS);
                lanes.zip(x).for_each(|(out, x)| *out = x.to_le_bytes());
            }
            KvFormat::F16 => {
                let mut halves = [0; 2 * POSITIONS];
                let elements = block.chunks_mut(2 * POSITIONS * POSITIONS);
                for (x, block) in x.chunks(POSITIONS).zip(elements) {
                    kernels.store_f16(x, &mut halves[..2 * x.len()]);
                    let lanes = block.as_chunks_mut::<2>().0.iter_mut().skip(lane).step_by(POSITIONS);
                    lanes.zip(halves.as_chunks::<2>().0).for_each(|(out, half)| *out = *half);
                }
            }
            KvFormat::Q8 => {
                let (codes, scales) = block.split_at_mut(dim * POSITIONS);
                let mut row = [0; kv8::row_bytes(kv8::GROUP)];
                let scales = scales.as_chunks_mut::<2>().0.iter_mut().skip(lane).step_by(POSITIONS);
                let groups = x.chunks(kv8::GROUP).zip(codes.chunks_mut(kv8::GROUP * POSITIONS));
                for ((x, codes), scale) in groups.zip(scales) {
                    let row = &mut row[..kv8::row_bytes(x.len())];
                    kv8::store(x, row);
                    let (stored, stored_scale) = row.split_at(x.len());
                    codes.iter_mut().skip(lane).step_by(POSITIONS).zip(stored).for_each(|(out, code)| *out = *code);
                    scale.copy_from_slice(stored_scale);
                }
            }
        }
    }
}

/// Stores the values of position `pos`; `x` is `[kv_heads][head_dim]`.
///
/// # Panics
/// As [`store_keys`].
pub fn store_values(exec: &Exec<'_>, format: KvFormat, shape: &KvShape, cache: &mut [u8], pos: usize, x: &[f32]) {
    shape.check_store(format, cache, pos, x);
    if x.is_empty() {
        return;
    }
    let row = format.row_bytes(shape.head_dim);
    let heads = x.chunks_exact(shape.head_dim).zip(cache.chunks_exact_mut(shape.head_bytes(format)));
    for (x, head) in heads {
        let out = &mut head[pos * row..][..row];
        match format {
            KvFormat::F32 => out.as_chunks_mut().0.iter_mut().zip(x).for_each(|(o, x)| *o = x.to_le_bytes()),
            KvFormat::F16 => exec.backend.kernels().store_f16(x, out),
            KvFormat::Q8 => kv8::store(x, out),
        }
    }
}

/// Tokens whose scores a worker keeps at once.
fn tile_tokens(group: usize, tokens: usize) -> usize {
    (SCORE_ROWS / group.max(1)).clamp(1, tokens.max(1))
}

/// Elements of scratch that [`attention`] of at most `tokens` tokens needs with `workers` workers.
pub fn attention_scratch(shape: &KvShape, heads: usize, tokens: usize, workers: usize) -> usize {
    let group = heads.checked_div(shape.kv_heads).unwrap_or(0);
    let scores = group * tile_tokens(group, tokens) * (shape.capacity.next_multiple_of(POSITIONS) + POSITIONS);
    (scores + POSITIONS * shape.head_dim) * workers.max(1)
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
    let workers = exec.workers.count();
    assert!(pos0 + tokens <= shape.capacity, "tokens outside the cache");
    assert!(k.len() == shape.bytes(format) && v.len() == k.len(), "cache of another shape");
    assert!(q.len() == tokens * width && out.len() == q.len(), "q and out are [tokens][heads][head_dim]");
    assert!(scratch.len() >= attention_scratch(shape, heads, tokens, workers), "scratch too small");
    if out.is_empty() {
        return;
    }
    assert!(shape.kv_heads > 0 && heads.is_multiple_of(shape.kv_heads), "heads share key heads evenly");
    let group = heads / shape.kv_heads;
    let pass = Pass { kernels: exec.backend.kernels(), format, shape: *shape, k, v, q, heads, pos0, window, scale };
    let span = if window == 0 { pos0 + tokens } else { window.min(pos0 + tokens) };
    let work = tokens * width * span;
    let tile = tile_tokens(group, tokens);
    // Many tokens are split among the workers, few are computed together and their heads are split. A token costs the
    // more the later it stands, so a worker takes as many from the end as from the beginning.
    let by_tokens = parts(exec, work, tokens / (2 * tile)).min(usize::BITS as usize / 2);
    let parts = if by_tokens > 1 { by_tokens } else { parts(exec, work, heads) };
    let outs = if by_tokens > 1 {
        Split::new(out, tokens * width, width, 2 * parts)
    } else {
        Split::new(out, width, dim, parts)
    };
    let share = scratch.len() / parts;
    let scratches = Split::new(&mut scratch[..share * parts], share * parts, share, parts);
    run_parts(exec, parts, &|part| {
        let Some(mut scratch) = scratches.take(part) else { return };
        let mut pieces = [outs.take(part), None];
        if by_tokens > 1 {
            pieces[1] = outs.take(2 * parts - 1 - part);
        }
        for columns in pieces.iter_mut().flatten() {
            let range = columns.range();
            let (range_tokens, range_heads) = match by_tokens > 1 {
                true => (range.start / width..range.end / width, 0..heads),
                false => (0..tokens, range.start / dim..range.end / dim),
            };
            for kv_head in range_heads.start / group..range_heads.end.div_ceil(group) {
                let its_heads = kv_head * group..(kv_head + 1) * group;
                let its_heads = its_heads.start.max(range_heads.start)..its_heads.end.min(range_heads.end);
                for first in range_tokens.clone().step_by(tile) {
                    let tokens = first..range_tokens.end.min(first + tile);
                    pass.tile(kv_head, its_heads.clone(), tokens, scratch.row(0), columns);
                }
            }
        }
    });
}

/// What all parts of one call share.
struct Pass<'a> {
    kernels: &'a dyn Kernels,
    format: KvFormat,
    shape: KvShape,
    k: &'a [u8],
    v: &'a [u8],
    q: &'a [f32],
    heads: usize,
    pos0: usize,
    window: usize,
    scale: f32,
}

impl Pass<'_> {
    /// Positions that a token attends to.
    fn seen(&self, token: usize) -> Range<usize> {
        let end = self.pos0 + token + 1;
        if self.window == 0 { 0..end } else { end.saturating_sub(self.window)..end }
    }

    /// Some tokens' attention with some of the heads that share `kv_head`.
    fn tile(
        &self,
        kv_head: usize,
        heads: Range<usize>,
        tokens: Range<usize>,
        scratch: &mut [f32],
        columns: &mut Columns<'_, f32>,
    ) {
        let dim = self.shape.head_dim;
        let (widened, scores) = scratch.split_at_mut(POSITIONS * dim);
        let (first, last) = (self.seen(tokens.start).start, self.seen(tokens.end - 1).end);
        let blocks = first / POSITIONS..last.div_ceil(POSITIONS);
        let base = blocks.start * POSITIONS;
        // A block more than there is, so that rows do not lie a power of two apart and evict each other.
        let stride = (blocks.len() + 1) * POSITIONS;
        let rows = heads.len() * stride;
        let place = |token: usize| (token * self.heads + heads.start) * dim;
        // The block's positions that a token attends to.
        let of_block = |token: usize, block: usize| {
            let seen = self.seen(token);
            seen.start.max(block * POSITIONS)..seen.end.min((block + 1) * POSITIONS)
        };
        for block in blocks.clone() {
            self.widen_keys(kv_head, block, widened);
            for (token, scores) in tokens.clone().zip(scores.chunks_exact_mut(rows)) {
                if !of_block(token, block).is_empty() {
                    let q = &self.q[place(token)..][..heads.len() * dim];
                    let scores = &mut scores[block * POSITIONS - base..];
                    self.kernels.scores(widened, q, self.scale, scores, stride);
                }
            }
        }
        for (token, scores) in tokens.clone().zip(scores.chunks_exact_mut(rows)) {
            let seen = self.seen(token);
            for row in scores.chunks_exact_mut(stride) {
                self.kernels.softmax(&mut row[seen.start - base..seen.end - base]);
            }
            columns.at(place(token), heads.len() * dim).fill(0.0);
        }
        for block in blocks {
            let positions = block * POSITIONS..last.min((block + 1) * POSITIONS);
            let values = &mut widened[..positions.len() * dim];
            self.widen_values(kv_head, positions.clone(), values);
            for (token, scores) in tokens.clone().zip(scores.chunks_exact(rows)) {
                let seen = of_block(token, block);
                if !seen.is_empty() {
                    let values = &values[(seen.start - positions.start) * dim..(seen.end - positions.start) * dim];
                    let out = columns.at(place(token), heads.len() * dim);
                    self.kernels.mix(values, dim, &scores[seen.start - base..], stride, out);
                }
            }
        }
    }

    /// Converts a block of keys to `[head_dim][POSITIONS]`.
    fn widen_keys(&self, kv_head: usize, block: usize, out: &mut [f32]) {
        let bytes = POSITIONS * self.format.row_bytes(self.shape.head_dim);
        let stored = &self.k[kv_head * self.shape.head_bytes(self.format) + block * bytes..][..bytes];
        match self.format {
            KvFormat::F32 => self.kernels.widen(Float::F32, stored, out),
            KvFormat::F16 => self.kernels.widen(Float::F16, stored, out),
            KvFormat::Q8 => self.kernels.widen_keys_q8(stored, out),
        }
    }

    /// Converts the values of some positions to `[positions][head_dim]`.
    fn widen_values(&self, kv_head: usize, positions: Range<usize>, out: &mut [f32]) {
        let row = self.format.row_bytes(self.shape.head_dim);
        let head = kv_head * self.shape.head_bytes(self.format);
        let stored = &self.v[head + positions.start * row..head + positions.end * row];
        match self.format {
            KvFormat::F32 => self.kernels.widen(Float::F32, stored, out),
            KvFormat::F16 => self.kernels.widen(Float::F16, stored, out),
            KvFormat::Q8 => self.kernels.widen_values_q8(stored, self.shape.head_dim, out),
        }
    }
}
