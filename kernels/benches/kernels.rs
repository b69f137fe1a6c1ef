//! Times every operator, and a loop that only reads the same bytes: `cargo bench -p forebay-kernels --features std`.
//!
//! Matrices are 4096 x 4096 (GEMV) and 2048 x 2048 (GEMM), vectors as long as the matrices are wide; everything stays
//! in the caches that it fits.

mod cases;

use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};

fn main() {
    println!("back-end {}", cases::backend().name());
    divan::main();
}

fn case(name: &str) -> cases::Case {
    let side = if name.starts_with("gemm") { 2048 } else { 4096 };
    cases::case(name, side, side).expect("a case of this name")
}

/// The operator.
#[divan::bench(args = cases::NAMES)]
fn operator(bencher: Bencher<'_, '_>, name: &str) {
    let mut case = case(name);
    let bencher = bencher.counter(BytesCount::new(case.bytes.len())).counter(ItemsCount::new(case.items));
    bencher.bench_local(|| (case.run)());
}

/// The bytes that it reads, read and nothing else.
#[divan::bench(args = cases::NAMES)]
fn read_only(bencher: Bencher<'_, '_>, name: &str) {
    let case = case(name);
    let backend = cases::backend();
    bencher.counter(BytesCount::new(case.bytes.len())).bench_local(|| backend.read_only(black_box(&case.bytes)));
}
