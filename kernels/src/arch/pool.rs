//! A pool of persistent threads.

use crate::exec::Workers;
use std::cell::UnsafeCell;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, TryLockError};
use std::thread::{self, JoinHandle};

/// Iterations that a thread spins for before it parks (workers) or yields (the caller).
const SPINS: usize = 4096;

type Job = dyn Fn(usize) + Sync;

struct Shared {
    /// The job of the current round, its lifetime erased.
    job: UnsafeCell<Option<&'static Job>>,
    /// Round number; a change tells the workers that there is a job.
    round: AtomicUsize,
    /// Workers that have not finished the round.
    running: AtomicUsize,
    /// Whether a worker panicked in the round.
    panicked: AtomicBool,
    stop: AtomicBool,
}

// SAFETY: `job` is written only by the caller that holds the pool's lock while `running` is 0, and read by workers
// only between the release store of `round` and their release decrement of `running`.
unsafe impl Sync for Shared {}

struct Worker {
    handle: Option<JoinHandle<()>>,
    asleep: Arc<AtomicBool>,
}

/// [`Workers`] on persistent threads, the calling thread being worker 0. A round costs no allocation; between
/// rounds the threads spin briefly, then park.
///
/// A second caller, or a job that calls the pool again, runs its own job alone. A panic in a job reaches the
/// caller after all workers have finished.
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<Worker>,
    lock: Mutex<()>,
}

impl fmt::Debug for ThreadPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ThreadPool").field("threads", &self.count()).finish()
    }
}

fn serve(shared: &Shared, index: usize, asleep: &AtomicBool) {
    let mut seen = 0;
    loop {
        let mut spins = 0;
        loop {
            let round = shared.round.load(Ordering::SeqCst);
            if round != seen {
                seen = round;
                break;
            }
            if spins < SPINS {
                spins += 1;
                std::hint::spin_loop();
                continue;
            }
            // Whoever starts a round stores it before it looks at `asleep`, so one of the two sees the other.
            asleep.store(true, Ordering::SeqCst);
            if shared.round.load(Ordering::SeqCst) == seen {
                thread::park();
            }
            asleep.store(false, Ordering::SeqCst);
        }
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        // SAFETY: the round number was stored after the job was written, and the caller neither writes it again nor
        // ends the job's borrow before this worker has decremented `running`.
        let job = unsafe { *shared.job.get() };
        if let Some(job) = job
            && catch_unwind(AssertUnwindSafe(|| job(index))).is_err()
        {
            shared.panicked.store(true, Ordering::SeqCst);
        }
        shared.running.fetch_sub(1, Ordering::SeqCst);
    }
}

impl ThreadPool {
    /// A pool of `threads` workers (at least one), `threads - 1` of them new threads. If the system refuses a
    /// thread the pool has as many as it got.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            job: UnsafeCell::new(None),
            round: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let mut workers = Vec::new();
        for index in 1..threads {
            let asleep = Arc::new(AtomicBool::new(false));
            let (its_shared, its_asleep) = (Arc::clone(&shared), Arc::clone(&asleep));
            let builder = thread::Builder::new().name(format!("kernels-{index}"));
            let Ok(handle) = builder.spawn(move || serve(&its_shared, index, &its_asleep)) else {
                break;
            };
            workers.push(Worker { handle: Some(handle), asleep });
        }
        Self { shared, workers, lock: Mutex::new(()) }
    }

    fn start_round(&self) {
        self.shared.round.fetch_add(1, Ordering::SeqCst);
        for worker in &self.workers {
            if let Some(handle) = &worker.handle
                && worker.asleep.load(Ordering::SeqCst)
            {
                handle.thread().unpark();
            }
        }
    }
}

/// Waits for the workers when dropped, so that a panic of worker 0 cannot end the job's borrow too early.
struct Finish<'a>(&'a Shared);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        let mut spins = 0;
        while self.0.running.load(Ordering::SeqCst) != 0 {
            spins += 1;
            if spins < SPINS { std::hint::spin_loop() } else { thread::yield_now() }
        }
        // SAFETY: `running` is 0, so no worker reads the job, and the caller holds the pool's lock.
        unsafe { *self.0.job.get() = None };
    }
}

impl Workers for ThreadPool {
    fn count(&self) -> usize {
        self.workers.len() + 1
    }
    fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        let _guard = match self.lock.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                (0..self.count()).for_each(job);
                return;
            }
        };
        if self.workers.is_empty() {
            return job(0);
        }
        // SAFETY: only the lifetime changes. `Finish` waits until no worker uses the job before this function returns
        // or unwinds, and clears it.
        let erased = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static Job>(job) };
        // SAFETY: the lock is held and `running` is 0: nobody else touches the job.
        unsafe { *self.shared.job.get() = Some(erased) };
        self.shared.panicked.store(false, Ordering::SeqCst);
        self.shared.running.store(self.workers.len(), Ordering::SeqCst);
        let finish = Finish(&self.shared);
        self.start_round();
        let own = catch_unwind(AssertUnwindSafe(|| job(0)));
        drop(finish);
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        assert!(!self.shared.panicked.load(Ordering::SeqCst), "a worker panicked");
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.start_round();
        for worker in &mut self.workers {
            if let Some(handle) = worker.handle.take() {
                handle.thread().unpark();
                // A worker catches its jobs' panics, so there is no error to report.
                let _ = handle.join();
            }
        }
    }
}
