//! `forebay bench --kernels`: matrix products beside a loop that only reads the same bytes, in the same rounds.

use std::hint::black_box;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use forebay_kernels::activations::{Input, quantise};
use forebay_kernels::exec::{Backend, Exec, Workers};
use forebay_kernels::matmul::{matmul, row_to_f32};
use forebay_kernels::pages::prefer_huge;
use forebay_kernels::pool::ThreadPool;
use forebay_kernels::weights::{Encoding, Fields, Group, MatrixRef, MatrixShape, Quant};
use serde::Serialize;

use super::positive;

/// Arguments that the kernels alone have no use for.
pub const NOT_KERNELS: [&str; 10] =
    ["model", "weights", "prompt", "generation", "repetitions", "ram", "batch", "kv", "store", "device"];

/// What only `--kernels` reads.
#[derive(Args)]
pub struct KernelArgs {
    /// Rows (outputs) and columns (inputs) of the matrix
    #[arg(long, value_name = "MxK", default_value = "4096x4096", requires = "kernels", conflicts_with_all = NOT_KERNELS)]
    shape: Shape,
    /// Bits of a weight: 1, 2, 3, 4 or 8 [default: 4, 3, 2 and 1]
    #[arg(long, value_name = "B", value_parser = bits, requires = "kernels", conflicts_with_all = NOT_KERNELS)]
    bits: Option<u8>,
    /// Vectors that are multiplied together
    #[arg(long, value_name = "N", default_value = "1", value_parser = positive, requires = "kernels", conflicts_with_all = NOT_KERNELS)]
    tokens: usize,
    /// Where the weights lie: in the caches if they fit (hot), or in main memory (dram) [default: both]
    #[arg(long, value_enum, requires = "kernels", conflicts_with_all = NOT_KERNELS)]
    memory: Option<Memory>,
}

/// Rows and columns.
#[derive(Clone, Copy)]
struct Shape {
    rows: u32,
    cols: u32,
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |part: &str| part.parse().ok().filter(|n| (1..=1 << 20).contains(n));
        let parts = text.split_once('x').and_then(|(rows, cols)| Some((number(rows)?, number(cols)?)));
        let (rows, cols) = parts.ok_or("expected rows x columns, such as 4096x4096, each at most 1048576")?;
        Ok(Self { rows, cols })
    }
}

fn bits(text: &str) -> Result<u8, String> {
    text.parse().ok().filter(|bits| matches!(bits, 1..=4 | 8)).ok_or_else(|| "expected 1, 2, 3, 4 or 8".into())
}

/// Where the weights are when a product starts.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Memory {
    /// The same matrix every time.
    Hot,
    /// Another copy every time, of so many that no cache keeps them.
    Dram,
}

/// One measurement.
#[derive(Serialize)]
struct Row {
    /// `gemv`, or `gemm` and the number of tokens, and the back-end.
    kernel: String,
    bits: u8,
    shape: String,
    threads: usize,
    memory: Memory,
    /// A product, the quantisation of its input included.
    median_us: f64,
    /// The loop that only reads the matrix.
    read_only_us: f64,
    /// Bytes of the matrix over the product's time.
    gbps: f64,
    /// Multiplications and additions over the product's time.
    gops: f64,
    /// Energy of the product's error over its own: what quantised activations cost.
    nmse: f64,
}

/// Time spent on one measurement, and its rounds at least and at most.
const BUDGET: Duration = Duration::from_millis(600);
const ROUNDS: std::ops::RangeInclusive<usize> = 11..=2000;
/// Most bytes of copies, whatever cache a server says it shares among its guests.
const MOST_COPIED: usize = 1 << 30;
/// Rows whose products are checked against binary64.
const CHECKED_ROWS: usize = 256;

/// The encoding measured for a width: fields as the converter cuts resident weights, and the group that
/// `docs/BENCHMARKS.md` compares.
fn encoding(bits: u8, group: Option<Group>) -> Quant {
    let (fields, usual) = match bits {
        8 => (Some(Fields::Q8), Group::G32),
        4 => (Some(Fields::NIBBLE), Group::G32),
        3 => (Fields::new([2, 1, 0, 0]), Group::G64),
        2 => (Fields::new([2, 0, 0, 0]), Group::G64),
        _ => (Fields::new([1, 0, 0, 0]), Group::G128),
    };
    let zero_x2 = if bits == 8 { 0 } else { (1 << bits) - 1 };
    Quant { fields: fields.unwrap_or(Fields::NIBBLE), group: group.unwrap_or(usual), affine: false, zero_x2 }
}

/// Numbers that repeat late and mean nothing.
fn noise() -> impl Iterator<Item = u32> {
    let mut state = 1u64;
    std::iter::repeat_with(move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 32) as u32
    })
}

/// Copies of a matrix one after another, the first of them at the start of a page.
struct Copies {
    bytes: Vec<u8>,
    start: usize,
    size: usize,
}

impl Copies {
    /// `count` matrices with random codes and scales of 0.02 to 0.03, on large pages where the system has them, as in a
    /// run's arena.
    fn new(shape: MatrixShape, count: usize) -> Self {
        const PAGE: usize = 4096;
        let size = shape.bytes() as usize;
        let mut one: Vec<u8> = noise().flat_map(u32::to_le_bytes).take(size).collect();
        let (scales, _) = one.split_at_mut(shape.scale_bytes() as usize);
        for (scale, noise) in scales.as_chunks_mut::<2>().0.iter_mut().zip(noise()) {
            *scale = half::f16::from_f32(0.02 + 0.01 * (noise >> 8) as f32 / (1 << 24) as f32).to_le_bytes();
        }
        let mut bytes = Vec::with_capacity(size * count + PAGE);
        prefer_huge(bytes.spare_capacity_mut());
        let start = bytes.as_ptr().align_offset(PAGE).min(PAGE);
        bytes.resize(start, 0);
        (0..count).for_each(|_| bytes.extend_from_slice(&one));
        Self { bytes, start, size }
    }
    fn get(&self, copy: usize) -> &[u8] {
        &self.bytes[self.start + copy * self.size..][..self.size]
    }
}

/// Roughly normal numbers.
fn activations(count: usize) -> Vec<f32> {
    let mut noise = noise().skip(99);
    let mut uniform = || (noise.next().unwrap_or(0) >> 8) as f32 / (1 << 23) as f32 - 1.0;
    (0..count).map(|_| (0..12).map(|_| uniform()).sum::<f32>() / 2.0).collect()
}

/// Bytes of the largest cache, as far as Linux says, else 32 MiB.
fn largest_cache() -> usize {
    let size = |index| {
        let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size");
        std::fs::read_to_string(path).ok()?.trim().strip_suffix('K')?.parse::<usize>().ok()
    };
    (0..8).filter_map(size).max().map_or(32 << 20, |kib| kib << 10)
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1e6
}

/// Error of the first rows' products for the first token against sums of binary64.
fn nmse(matrix: &MatrixRef<'_>, x: &[f32], out: &[f32]) -> f64 {
    let (mut error, mut energy) = (0.0, 0.0);
    let mut weights = vec![0.0; x.len()];
    for (row, got) in out.iter().enumerate().take(CHECKED_ROWS) {
        row_to_f32(matrix, row, &mut weights);
        let want: f64 = weights.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
        error += (f64::from(*got) - want).powi(2);
        energy += want * want;
    }
    error / energy
}

fn measure(
    backend: Backend,
    pool: &ThreadPool,
    quant: Quant,
    shape: Shape,
    tokens: usize,
    memory: Memory,
) -> Result<Row> {
    let Shape { rows, cols } = shape;
    let matrix_shape = MatrixShape { rows, cols, encoding: Encoding::Quant(quant) };
    let size = matrix_shape.bytes() as usize;
    let copies = match memory {
        Memory::Hot => 1,
        Memory::Dram => (4 * largest_cache()).min(MOST_COPIED).div_ceil(size).max(2),
    };
    let data = Copies::new(matrix_shape, copies);
    let matrix = |copy: usize| MatrixRef::from_contiguous(matrix_shape, data.get(copy));
    let exec = Exec { backend, workers: pool };
    let (rows, cols) = (rows as usize, cols as usize);
    let x = activations(tokens * cols);
    let spec = matrix_shape.act_spec().context("quantised weights take quantised inputs")?;
    // One cache line more, so that the part in use can begin at one.
    let mut scratch = vec![0; spec.bytes(cols, tokens) + 64];
    let start = scratch.as_ptr().align_offset(64);
    let mut out = vec![0.0; tokens * rows];
    let mut product = |copy: usize| -> Result<Duration> {
        let matrix = matrix(copy).context("the bytes are the shape's")?;
        let start_time = Instant::now();
        let acts = quantise(&exec, spec, &x, tokens, cols, &mut scratch[start..]);
        matmul(&exec, &matrix, Input::Quant(acts), tokens, &mut out);
        black_box(&out);
        Ok(start_time.elapsed())
    };
    let read = |copy: usize| {
        let (data, n) = (data.get(copy), pool.count());
        let start_time = Instant::now();
        pool.run(&|i| {
            black_box(backend.read_only(&data[i * size / n..(i + 1) * size / n]));
        });
        start_time.elapsed()
    };
    let (mut products, mut reads) = (Vec::new(), Vec::new());
    product(0)?;
    let begun = Instant::now();
    for round in 0..*ROUNDS.end() {
        if round >= *ROUNDS.start() && begun.elapsed() > BUDGET {
            break;
        }
        products.push(product(round % copies)?);
        reads.push(read((round + copies / 2) % copies));
    }
    let (median_us, read_only_us) = (median(products), median(reads));
    Ok(Row {
        kernel: format!("{} {}", if tokens == 1 { "gemv".into() } else { format!("gemm{tokens}") }, backend.name()),
        bits: quant.fields.bits(),
        shape: format!("{rows}x{cols}"),
        threads: pool.count(),
        memory,
        median_us,
        read_only_us,
        gbps: size as f64 / median_us / 1e3,
        gops: 2.0 * (rows * cols * tokens) as f64 / median_us / 1e3,
        nmse: nmse(&matrix(0).context("the bytes are the shape's")?, &x[..cols], &out[..rows]),
    })
}

pub fn main(args: &KernelArgs, backend: Backend, threads: usize, group: Option<Group>, json: bool) -> Result<()> {
    let pool = ThreadPool::new(threads);
    if !json {
        println!(
            "| kernel | bits | shape | threads | memory | median, µs | read only, µs | share | GB/s | Gop/s | NMSE |"
        );
        println!("|---|---:|---|---:|---|---:|---:|---:|---:|---:|---:|");
    }
    for bits in args.bits.map_or(vec![4, 3, 2, 1], |bits| vec![bits]) {
        for memory in args.memory.map_or(vec![Memory::Hot, Memory::Dram], |memory| vec![memory]) {
            let row = measure(backend, &pool, encoding(bits, group), args.shape, args.tokens, memory)?;
            if json {
                println!("{}", serde_json::to_string(&row)?);
                continue;
            }
            println!(
                "| {} | {} | {} | {} | {} | {:.1} | {:.1} | {:.0} % | {:.1} | {:.1} | {:.1e} |",
                row.kernel,
                row.bits,
                row.shape,
                row.threads,
                if memory == Memory::Hot { "hot" } else { "dram" },
                row.median_us,
                row.read_only_us,
                100.0 * row.read_only_us / row.median_us,
                row.gbps,
                row.gops,
                row.nmse
            );
        }
    }
    Ok(())
}
