//! What is measured: every operator on data of its own, as a closure that runs it once.

use forebay_kernels::activations::{ActSpec, Input, quantise};
use forebay_kernels::attention::{KvFormat, KvShape, attention, attention_scratch, store_keys, store_values};
use forebay_kernels::exec::{Backend, Exec, Serial};
use forebay_kernels::matmul::matmul;
use forebay_kernels::ops;
use forebay_kernels::weights::{Encoding, Fields, Group, MatrixRef, MatrixShape, Quant};
use std::hint::black_box;

/// An operator that is ready to run.
pub struct Case {
    /// Runs it once.
    pub run: Box<dyn FnMut()>,
    /// What it reads of weights, keys and values or vectors.
    pub bytes: Vec<u8>,
    /// Multiplications of weights, or elements.
    pub items: u64,
}

/// Numbers in -1..1 that repeat late.
fn numbers(count: usize) -> Vec<f32> {
    let mut state = 7u64;
    let mut next = move || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// Bytes whose pairs are finite as binary16, so that they serve as codes and as scales.
fn codes(count: usize) -> Vec<u8> {
    numbers(count.div_ceil(2)).into_iter().flat_map(|x| ((x.to_bits() >> 3) as u16 & 0x3bff).to_le_bytes()).collect()
}

/// Bytes of floats.
fn bytes_of(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// The fastest back-end on one core.
fn exec() -> Exec<'static> {
    Exec { backend: Backend::detect(), workers: &Serial }
}

/// A matrix of `widths`, one scale every `group` weights, times `tokens` vectors that have been quantised.
fn product(widths: [u8; 4], group: Group, zero_x2: u8, rows: usize, cols: usize, tokens: usize) -> Case {
    let fields = Fields::new(widths).expect("valid widths");
    let quant = Quant { fields, group, affine: false, zero_x2 };
    let shape = MatrixShape { rows: rows as u32, cols: cols as u32, encoding: Encoding::Quant(quant) };
    let data = codes(shape.bytes() as usize);
    let bytes = data.clone();
    let spec = shape.act_spec().expect("quantised weights");
    let x = numbers(tokens * cols);
    let mut out = vec![0.0; tokens * rows];
    let exec = exec();
    let scratch = Vec::leak(vec![0; spec.bytes(cols, tokens) + 64]);
    let start = scratch.as_ptr().align_offset(64);
    let acts = quantise(&exec, spec, &x, tokens, cols, &mut scratch[start..]);
    let run = move || {
        let matrix = MatrixRef::from_contiguous(shape, black_box(&data)).expect("the shape's bytes");
        matmul(&exec, &matrix, Input::Quant(acts), tokens, &mut out);
        black_box(&out);
    };
    Case { run: Box::new(run), bytes, items: (rows * cols * tokens) as u64 }
}

/// Activations of `bits` bits a group of `group`, with tables if they have 7.
fn quantising(bits: u8, group: u8, cols: usize) -> Case {
    let spec = ActSpec { group, bits, tables: bits == 7 };
    let x = numbers(cols);
    let bytes = bytes_of(&x);
    let mut scratch = vec![0; spec.bytes(cols, 1) + 64];
    let start = scratch.as_ptr().align_offset(64);
    let exec = exec();
    let run = move || {
        black_box(quantise(&exec, spec, black_box(&x), 1, cols, &mut scratch[start..]));
    };
    Case { run: Box::new(run), bytes, items: cols as u64 }
}

/// `tokens` queries of 9 heads over 3 heads of `positions` keys and values of 64 elements (SmolLM2-135M's shape).
fn attending(positions: usize, tokens: usize) -> Case {
    let (heads, format) = (9, KvFormat::F16);
    let shape = KvShape { kv_heads: 3, head_dim: 64, capacity: positions };
    let mut k = vec![0; shape.bytes(format)];
    let mut v = k.clone();
    let rows = numbers(positions * 3 * 64);
    let exec = exec();
    for (pos, x) in rows.chunks_exact(3 * 64).enumerate() {
        store_keys(&exec, format, &shape, &mut k, pos, x);
        store_values(&exec, format, &shape, &mut v, positions - 1 - pos, x);
    }
    let bytes = [&k[..], &v].concat();
    let q = numbers(tokens * heads * 64);
    let mut out = vec![0.0; q.len()];
    let mut scratch = vec![0.0; attention_scratch(&shape, heads, tokens, 1)];
    let run = move || {
        let first = positions - tokens;
        let (k, v) = (black_box(&k), black_box(&v));
        attention(&exec, format, &shape, k, v, &q, heads, tokens, first, 0, 0.125, &mut scratch, &mut out);
        black_box(&out);
    };
    Case { run: Box::new(run), bytes, items: (2 * heads * 64 * tokens * (positions - tokens / 2)) as u64 }
}

/// An operator on two vectors of `n`.
fn vector(n: usize, mut f: impl FnMut(&mut [f32], &[f32]) + 'static) -> Case {
    let (x, y) = (numbers(n), numbers(n));
    let bytes = bytes_of(&x);
    let mut out = x.clone();
    let run = move || {
        // Operators in place would drift away.
        out.copy_from_slice(&x);
        f(black_box(&mut out), black_box(&y));
        black_box(&out);
    };
    Case { run: Box::new(run), bytes, items: n as u64 }
}

/// LFM2's short convolution, for one token.
fn convolution(hidden: usize, taps: usize) -> Case {
    let (bcx, weight) = (numbers(3 * hidden), numbers(hidden * taps));
    let bytes = bytes_of(&[&bcx[..], &weight].concat());
    let (mut state, mut out) = (vec![0.0; (taps - 1) * hidden], vec![0.0; hidden]);
    let run = move || {
        ops::short_conv(black_box(&bcx), &weight, None, &mut state, 1, hidden, taps, &mut out);
        black_box(&out);
    };
    Case { run: Box::new(run), bytes, items: hidden as u64 }
}

/// Names of all cases.
pub const NAMES: [&str; 27] = [
    "gemv q8",
    "gemv q4",
    "gemv q4 as 2+2",
    "gemv q3",
    "gemv q2",
    "gemv q2 as 1+1",
    "gemv q1",
    "gemv ternary",
    "gemm8 q4",
    "gemm32 q4",
    "gemm64 q4",
    "gemm32 q3",
    "gemm32 q2",
    "gemm32 q1",
    "quantise 8 bits",
    "quantise 7 bits with tables",
    "attention, 1 token",
    "attention, 32 tokens",
    "rms_norm",
    "softmax",
    "silu_mul",
    "add",
    "add_scaled",
    "dot",
    "rope",
    "short_conv",
    "argmax",
];

/// The case called `name`, its matrices `rows` x `cols`, its vectors `cols`.
pub fn case(name: &str, rows: usize, cols: usize) -> Option<Case> {
    use Group::{G32, G64, G128};
    let product = |widths, group, zero_x2, tokens| product(widths, group, zero_x2, rows, cols, tokens);
    Some(match name {
        "gemv q8" => product([8, 0, 0, 0], G32, 0, 1),
        "gemv q4" => product([4, 0, 0, 0], G32, 16, 1),
        "gemv q4 as 2+2" => product([2, 2, 0, 0], G32, 16, 1),
        "gemv q3" => product([2, 1, 0, 0], G64, 7, 1),
        "gemv q2" => product([2, 0, 0, 0], G64, 3, 1),
        "gemv q2 as 1+1" => product([1, 1, 0, 0], G64, 3, 1),
        "gemv q1" => product([1, 0, 0, 0], G128, 1, 1),
        "gemv ternary" => product([2, 0, 0, 0], G128, 2, 1),
        "gemm8 q4" => product([4, 0, 0, 0], G32, 16, 8),
        "gemm32 q4" => product([4, 0, 0, 0], G32, 16, 32),
        "gemm64 q4" => product([4, 0, 0, 0], G32, 16, 64),
        "gemm32 q3" => product([2, 1, 0, 0], G64, 7, 32),
        "gemm32 q2" => product([2, 0, 0, 0], G64, 3, 32),
        "gemm32 q1" => product([1, 0, 0, 0], G128, 1, 32),
        "quantise 8 bits" => quantising(8, 32, cols),
        "quantise 7 bits with tables" => quantising(7, 64, cols),
        "attention, 1 token" => attending(512, 1),
        "attention, 32 tokens" => attending(512, 32),
        "rms_norm" => {
            let weight = numbers(cols);
            vector(cols, move |out, x| ops::rms_norm(&exec(), x, &weight, 1e-5, out))
        }
        "softmax" => vector(cols, |x, _| ops::softmax(&exec(), x)),
        "silu_mul" => vector(cols, |x, y| ops::silu_mul(&exec(), x, y)),
        "add" => vector(cols, |x, y| ops::add(&exec(), x, y)),
        "add_scaled" => vector(cols, |x, y| ops::add_scaled(&exec(), x, y, 0.3)),
        "dot" => vector(cols, |x, y| x[0] = ops::dot(&exec(), x, y)),
        "rope" => vector(cols, |x, y| ops::rope(x, &y[..y.len() / 2], &y[y.len() / 2..])),
        "short_conv" => convolution(cols, 3),
        "argmax" => vector(cols, |x, _| x[0] = ops::argmax(x) as f32),
        _ => return None,
    })
}

/// The fastest back-end, which all cases use.
pub fn backend() -> Backend {
    Backend::detect()
}
