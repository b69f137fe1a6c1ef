//! Times one matrix-vector product against a read-only loop over the same bytes, in the same rounds.
//!
//! `gemv [rows] [cols] [fields, as 4 or 2,1,1 or 8] [group] [tokens] [threads]`
//!
//! "cold" cycles through copies of the matrix that together exceed the last-level cache; "hot" repeats one.

use forebay_kernels::activations::{Input, quantise};
use forebay_kernels::exec::{Backend, Exec, Workers};
use forebay_kernels::matmul::matmul;
use forebay_kernels::pool::ThreadPool;
use forebay_kernels::weights::{Encoding, Fields, Group, MAX_FIELDS, MatrixRef, MatrixShape, Quant};
use std::hint::black_box;
use std::time::Instant;

const COLD_BYTES: usize = 256 << 20;
const ROUNDS: usize = 60;

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Reads every byte with as many independent sums as hide the latency of an addition.
fn read_all(bytes: &[u8]) -> u64 {
    let mut sums = [0u64; 16];
    for chunk in bytes.as_chunks::<128>().0 {
        for (sum, word) in sums.iter_mut().zip(chunk.as_chunks::<8>().0) {
            *sum = sum.wrapping_add(u64::from_ne_bytes(*word));
        }
    }
    sums.iter().fold(0, |a, b| a ^ b)
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize, default: usize| args.get(i).map_or(default, |a| a.parse().expect("a number"));
    let (rows, cols) = (number(0, 4096), number(1, 4096));
    let mut widths = [0; MAX_FIELDS];
    for (width, text) in widths.iter_mut().zip(args.get(2).map_or("4", |a| a).split(',')) {
        *width = text.parse().expect("a width");
    }
    let fields = Fields::new(widths).expect("valid widths");
    let group = Group::from_len(number(3, 32)).expect("a group of 32, 64 or 128");
    let (tokens, threads) = (number(4, 1), number(5, 1));

    let quant = Quant { fields, group, affine: false, zero_x2: 0 };
    let shape = MatrixShape { rows: rows as u32, cols: cols as u32, encoding: Encoding::Quant(quant) };
    let size = shape.bytes() as usize;
    let copies = COLD_BYTES.div_ceil(size);
    let mut state = 1u64;
    let words = std::iter::repeat_with(|| {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        // No code sets an f16 exponent to all ones: these bytes serve as scales too.
        ((state >> 32) as u32 & 0x3bff_3bff).to_le_bytes()
    });
    let data: Vec<u8> = words.flatten().take(copies * size).collect();
    let matrices: Vec<&[u8]> = data.chunks_exact(size).collect();

    let pool = ThreadPool::new(threads);
    let x: Vec<f32> = (0..tokens * cols).map(|i| (i as f32 * 0.37).sin()).collect();
    let spec = shape.act_spec().expect("quantised");
    let mut scratch = vec![0; spec.bytes(cols, tokens)];
    let mut out = vec![0.0; tokens * rows];
    println!(
        "{rows} x {cols}, fields {widths:?}, group {}, {tokens} tokens, {threads} threads: {size} bytes",
        group.len()
    );
    for backend in Backend::all() {
        let exec = Exec { backend, workers: &pool };
        let timed = |f: &mut dyn FnMut()| {
            let start = Instant::now();
            f();
            start.elapsed().as_secs_f64() * 1e6
        };
        let mut times = [const { Vec::new() }; 5];
        for round in 0..ROUNDS {
            let cold = matrices[round % copies];
            let also_cold = matrices[(round + copies / 2) % copies];
            let mut product = |bytes: &[u8]| {
                let matrix = MatrixRef::from_contiguous(shape, bytes).expect("the shape's bytes");
                let acts = quantise(&exec, spec, &x, tokens, cols, &mut scratch);
                matmul(&exec, &matrix, Input::Quant(acts), tokens, &mut out);
                black_box(&out);
            };
            times[0].push(timed(&mut || product(cold)));
            times[1].push(timed(&mut || product(cold)));
            let read = |bytes: &[u8]| {
                pool.run(&|i| {
                    let n = pool.count();
                    black_box(read_all(&bytes[i * size / n..(i + 1) * size / n]));
                })
            };
            times[2].push(timed(&mut || read(also_cold)));
            times[3].push(timed(&mut || read(also_cold)));
            times[4].push(timed(&mut || {
                black_box(quantise(&exec, spec, &x, tokens, cols, &mut scratch));
            }));
        }
        let [cold, hot, read_cold, read_hot, quantising] = times.map(median);
        println!(
            "{:8} cold {cold:8.1} us ({:5.1} GB/s, read {read_cold:7.1} us)  hot {hot:8.1} us ({:5.1} GB/s, read \
             {read_hot:7.1} us)  quantise {quantising:6.2} us  {:7.1} Gop/s",
            backend.name(),
            size as f64 / cold / 1e3,
            size as f64 / hot / 1e3,
            2.0 * (rows * cols * tokens) as f64 / hot / 1e3,
        );
    }
}
