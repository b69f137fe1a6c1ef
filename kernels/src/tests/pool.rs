//! The thread pool, and the rule that no output part is handed out twice.

use super::{Backwards, Rng, assert_same};
use crate::activations::Input;
use crate::exec::{Backend, Exec, Serial, Workers};
use crate::matmul::matmul;
use crate::pool::ThreadPool;
use crate::weights::{Encoding, MatrixRef, MatrixShape};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

#[test]
fn every_worker_runs_once_a_round() {
    for threads in [0, 1, 2, 5] {
        let pool = ThreadPool::new(threads);
        assert_eq!(pool.count(), threads.max(1));
        let counts: Vec<AtomicUsize> = (0..pool.count()).map(|_| AtomicUsize::new(0)).collect();
        for round in 1..300 {
            pool.run(&|i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == round));
            if round % 100 == 0 {
                // Long enough for the workers to park.
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

#[test]
fn job_zero_runs_on_the_caller() {
    let caller = std::thread::current().id();
    ThreadPool::new(3).run(&|i| assert!(i != 0 || std::thread::current().id() == caller));
}

#[test]
fn a_panic_reaches_the_caller_and_the_pool_lives() {
    let pool = ThreadPool::new(3);
    for bad in 0..3 {
        assert!(catch_unwind(AssertUnwindSafe(|| pool.run(&|i| assert_ne!(i, bad)))).is_err());
        let sum = AtomicUsize::new(0);
        pool.run(&|i| {
            sum.fetch_add(i + 1, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 6);
    }
}

#[test]
fn a_job_may_use_the_pool() {
    let pool = ThreadPool::new(2);
    let runs = AtomicUsize::new(0);
    pool.run(&|_| {
        pool.run(&|_| {
            runs.fetch_add(1, Ordering::Relaxed);
        })
    });
    assert_eq!(runs.into_inner(), 4);
}

struct Twice;

impl Workers for Twice {
    fn count(&self) -> usize {
        2
    }
    fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        std::thread::scope(|scope| {
            for i in [0, 1, 1, 0, 2, 99] {
                scope.spawn(move || job(i));
            }
        });
    }
}

#[test]
fn threads_and_careless_workers_give_the_same_bits() {
    let mut rng = Rng::new(40);
    let shape = MatrixShape { rows: 301, cols: 257, encoding: Encoding::F32 };
    let mut bytes: Vec<u8> = rng.normals(301 * 257).iter().flat_map(|w| w.to_le_bytes()).collect();
    bytes.resize(shape.bytes() as usize, 0);
    let matrix = MatrixRef::from_contiguous(shape, &bytes).unwrap();
    let x = rng.normals(3 * 257);
    let run = |workers: &dyn Workers| {
        let mut out = vec![f32::NAN; 3 * 301];
        matmul(&Exec { backend: Backend::detect(), workers }, &matrix, Input::F32(&x), 3, &mut out);
        out
    };
    let want = run(&Serial);
    let pool = ThreadPool::new(3);
    for _ in 0..20 {
        assert_same(&run(&pool), &want, "pool");
    }
    assert_same(&run(&Twice), &want, "careless");
    assert_same(&run(&Backwards(100)), &want, "more workers than bits in a word");
}
