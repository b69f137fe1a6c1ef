//! Quantised activations: what a quantised matrix multiplies.
//!
//! Each token's vector is cut into groups of the weights' group length; a group becomes signed integers of 7
//! or 8 bits and one scale. Weights with a field of 1 bit take 7 bits, so that all subset sums of four
//! activations, offset to be non-negative, fit a byte *exactly*: look-up tables and dot-product instructions
//! then give the same integers. All others take 8 bits, which quarters the noise: `docs/BENCHMARKS.md` has what
//! that is worth in perplexity.

use crate::arch::split::{Split, run_parts};
use crate::exec::Exec;
use crate::matmul::parts;
use crate::weights::{Encoding, MatrixShape};
use core::ops::Range;

/// What a quantised matrix wants of its input. Matrices with equal specifications share one quantised input.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct ActSpec {
    /// Elements per scale: 32, 64 or 128.
    pub group: u8,
    /// 7 with tables, else 8.
    pub bits: u8,
    /// Whether the matrix has fields of 1 bit, which are multiplied by table look-up.
    pub tables: bool,
}

impl MatrixShape {
    /// What this matrix wants of its input; `None` for float encodings, which take `f32`.
    pub const fn act_spec(&self) -> Option<ActSpec> {
        let Encoding::Quant(quant) = self.encoding else {
            return None;
        };
        let widths = quant.fields.widths();
        let tables = widths[0] == 1 || widths[1] == 1 || widths[2] == 1 || widths[3] == 1;
        let bits = if tables { 7 } else { 8 };
        Some(ActSpec { group: quant.group.len() as u8, bits, tables })
    }
}

/// Where the parts of one token's activations lie, in bytes from the token's start; each part is 64-aligned.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    /// Padded K.
    k: usize,
    groups: usize,
    scales: usize,
    sums: usize,
    lows: usize,
    tables: usize,
    pub(crate) stride: usize,
}

impl Layout {
    const fn new(spec: ActSpec, cols: usize) -> Self {
        let groups = cols.div_ceil(spec.group as usize);
        let k = groups * spec.group as usize;
        let meta = (4 * groups).next_multiple_of(64);
        let scales = k.next_multiple_of(64);
        let sums = scales + meta;
        let lows = sums + meta;
        let tables = lows + if spec.tables { meta } else { 0 };
        let stride = tables + if spec.tables { 4 * k } else { 0 };
        Self { k, groups, scales, sums, lows, tables, stride: stride.next_multiple_of(64) }
    }
    const fn table_range(&self, spec: ActSpec) -> Range<usize> {
        self.tables..self.tables + if spec.tables { 4 * self.k } else { 0 }
    }
}

impl ActSpec {
    /// Scratch bytes for `tokens` vectors of `cols` elements, a multiple of 64.
    pub const fn bytes(&self, cols: usize, tokens: usize) -> usize {
        Layout::new(*self, cols).stride * tokens
    }
    /// Largest magnitude of a quantised activation.
    pub(crate) const fn limit(&self) -> i32 {
        if self.bits == 8 { 127 } else { 63 }
    }
}

/// A view of quantised activations in the scratch memory that [`quantise`] filled.
#[derive(Clone, Copy, Debug)]
pub struct Acts<'a> {
    spec: ActSpec,
    layout: Layout,
    cols: usize,
    tokens: usize,
    data: &'a [u8],
}

impl<'a> Acts<'a> {
    /// How the activations are quantised.
    pub const fn spec(&self) -> ActSpec {
        self.spec
    }
    /// Elements per token.
    pub const fn cols(&self) -> usize {
        self.cols
    }
    /// Tokens.
    pub const fn tokens(&self) -> usize {
        self.tokens
    }
    /// Whether a matrix that wants `spec` can take these.
    pub(crate) fn fits(&self, spec: ActSpec) -> bool {
        self.spec.group == spec.group && self.spec.bits == spec.bits && (self.spec.tables || !spec.tables)
    }
    #[inline(always)]
    pub(crate) fn token(&self, token: usize) -> TokenActs<'a> {
        let layout = &self.layout;
        let data = &self.data[token * layout.stride..(token + 1) * layout.stride];
        let meta = 4 * layout.groups;
        TokenActs {
            codes: &data[..layout.k],
            scales: &data[layout.scales..layout.scales + meta],
            sums: &data[layout.sums..layout.sums + meta],
            lows: if self.spec.tables { &data[layout.lows..layout.lows + meta] } else { &[] },
            tables: &data[layout.table_range(self.spec)],
        }
    }
}

/// One token's quantised activations.
#[derive(Clone, Copy)]
pub(crate) struct TokenActs<'a> {
    /// Signed codes, K padded to the group with zeros.
    pub codes: &'a [u8],
    scales: &'a [u8],
    sums: &'a [u8],
    lows: &'a [u8],
    /// Subset sums, or empty: for every 32 activations, eight tables of 16 bytes in the order
    /// 0, 2, 4, 6, 1, 3, 5, 7, table `j` covering activations `4j..4j + 4`.
    pub tables: &'a [u8],
}

fn word(bytes: &[u8], index: usize) -> [u8; 4] {
    let bytes = &bytes[4 * index..4 * index + 4];
    [bytes[0], bytes[1], bytes[2], bytes[3]]
}

impl TokenActs<'_> {
    /// Scale of a group; NaN if the group held a NaN or an infinity.
    #[inline(always)]
    pub fn scale(&self, group: usize) -> f32 {
        f32::from_ne_bytes(word(self.scales, group))
    }
    /// All scales, as bytes.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub fn scales(&self) -> &[[u8; 4]] {
        self.scales.as_chunks().0
    }
    /// The sums of all groups' codes, as bytes.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub fn sums(&self) -> &[[u8; 4]] {
        self.sums.as_chunks().0
    }
    /// The sums of all groups' negative codes, as bytes; none without tables.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub fn lows(&self) -> &[[u8; 4]] {
        self.lows.as_chunks().0
    }
    /// Sum of a group's codes.
    #[inline(always)]
    pub fn sum(&self, group: usize) -> i32 {
        i32::from_ne_bytes(word(self.sums, group))
    }
    /// Sum of a group's negative codes: what its table entries are short of.
    #[inline(always)]
    pub fn low(&self, group: usize) -> i32 {
        i32::from_ne_bytes(word(self.lows, group))
    }
}

/// One token's activations while they are written.
pub(crate) struct TokenMut<'a> {
    pub codes: &'a mut [u8],
    pub scales: &'a mut [u8],
    pub sums: &'a mut [u8],
    pub lows: &'a mut [u8],
    /// Empty if no tables are wanted.
    pub tables: &'a mut [u8],
}

impl<'a> TokenMut<'a> {
    fn new(data: &'a mut [u8], layout: &Layout, tables: bool) -> Self {
        let meta = 4 * layout.groups;
        let (codes, rest) = data.split_at_mut(layout.scales);
        let (scales, rest) = rest.split_at_mut(layout.sums - layout.scales);
        let (sums, rest) = rest.split_at_mut(layout.lows - layout.sums);
        let (lows, rest) = rest.split_at_mut(layout.tables - layout.lows);
        let (meta_lows, table_bytes) = if tables { (meta, 4 * layout.k) } else { (0, 0) };
        Self {
            codes: &mut codes[..layout.k],
            scales: &mut scales[..meta],
            sums: &mut sums[..meta],
            lows: &mut lows[..meta_lows],
            tables: &mut rest[..table_bytes],
        }
    }
}

/// Quantises `tokens` vectors of `cols` elements, `x` being `[tokens][cols]`, into `scratch`, which should be
/// 64-aligned.
///
/// # Panics
/// If `x` has not `tokens * cols` elements or `scratch` less than [`ActSpec::bytes`].
pub fn quantise<'a>(
    exec: &Exec<'_>,
    spec: ActSpec,
    x: &[f32],
    tokens: usize,
    cols: usize,
    scratch: &'a mut [u8],
) -> Acts<'a> {
    assert_eq!(x.len(), tokens * cols, "x is [tokens][cols]");
    let layout = Layout::new(spec, cols);
    let scratch = &mut scratch[..layout.stride * tokens];
    let kernels = exec.backend.kernels();
    if tokens > 0 && cols > 0 {
        // An element costs about as much as some multiplications.
        let parts = parts(exec, 16 * tokens * cols, tokens);
        let split = Split::new(scratch, layout.stride * tokens, layout.stride, parts);
        run_parts(exec, parts, &|part| {
            let Some(mut columns) = split.take(part) else { return };
            let first = columns.range().start / layout.stride;
            let x = x[first * cols..].chunks_exact(cols);
            for (x, data) in x.zip(columns.row(0).chunks_exact_mut(layout.stride)) {
                kernels.quantise(spec, x, TokenMut::new(data, &layout, spec.tables));
            }
        });
    }
    Acts { spec, layout, cols, tokens, data: scratch }
}

/// The input of a matrix product.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// For float encodings: `[tokens][cols]`.
    F32(&'a [f32]),
    /// For quantised encodings.
    Quant(Acts<'a>),
}

impl<'a> Input<'a> {
    /// One of `tokens` tokens.
    pub(crate) fn token(self, token: usize, tokens: usize) -> Self {
        match self {
            Self::F32(x) => {
                let cols = x.len() / tokens;
                Self::F32(&x[token * cols..(token + 1) * cols])
            }
            Self::Quant(acts) => {
                let stride = acts.layout.stride;
                Self::Quant(Acts { tokens: 1, data: &acts.data[token * stride..(token + 1) * stride], ..acts })
            }
        }
    }
}
