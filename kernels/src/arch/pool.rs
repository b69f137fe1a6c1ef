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
    /// Parts of the job that nobody has taken: 1 to this number; 0 between rounds.
    left: AtomicUsize,
    /// Parts of the round, but for the caller's own, that have not been finished.
    running: AtomicUsize,
    /// Whether a part of the round panicked.
    panicked: AtomicBool,
    stop: AtomicBool,
}

// SAFETY: `job` is written only by the caller that holds the pool's lock while `running` is 0, and read only by who has
// taken a part and not yet finished it, which is between the release store of `left` and the decrement of `running`.
unsafe impl Sync for Shared {}

impl Shared {
    /// Takes a part that nobody has taken.
    fn take(&self) -> Option<usize> {
        self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).ok()
    }

    /// Runs part `index`, which the caller of this function has taken.
    fn perform(&self, index: usize) {
        // SAFETY: taking a part of a round happens after its job was written, and the job is neither written again
        // nor its borrow ended before every part that was taken has been finished.
        let job = unsafe { *self.job.get() };
        if let Some(job) = job
            && catch_unwind(AssertUnwindSafe(|| job(index))).is_err()
        {
            self.panicked.store(true, Ordering::SeqCst);
        }
        self.running.fetch_sub(1, Ordering::SeqCst);
    }
}

struct Worker {
    handle: Option<JoinHandle<()>>,
    asleep: Arc<AtomicBool>,
}

/// [`Workers`] on persistent threads. The calling thread does part 0; the others are done by whoever comes first, so
/// a thread that the system does not let run holds nobody up. A round costs no allocation; between rounds the threads
/// spin briefly, then park.
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

fn serve(shared: &Shared, asleep: &AtomicBool) {
    loop {
        let mut spins = 0;
        let part = loop {
            if let Some(part) = shared.take() {
                break part;
            }
            if shared.stop.load(Ordering::SeqCst) {
                return;
            }
            if spins < SPINS {
                spins += 1;
                std::hint::spin_loop();
                continue;
            }
            // Whoever starts a round stores `left` before it looks at `asleep`, so one of the two sees the other.
            asleep.store(true, Ordering::SeqCst);
            if shared.left.load(Ordering::SeqCst) == 0 && !shared.stop.load(Ordering::SeqCst) {
                thread::park();
            }
            asleep.store(false, Ordering::SeqCst);
        };
        shared.perform(part);
    }
}

impl ThreadPool {
    /// A pool of `threads` workers (at least one), `threads - 1` of them new threads. If the system refuses a
    /// thread the pool has as many as it got.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            job: UnsafeCell::new(None),
            left: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let mut workers = Vec::new();
        for index in 1..threads {
            let asleep = Arc::new(AtomicBool::new(false));
            let (its_shared, its_asleep) = (Arc::clone(&shared), Arc::clone(&asleep));
            let builder = thread::Builder::new().name(format!("kernels-{index}"));
            let Ok(handle) = builder.spawn(move || serve(&its_shared, &its_asleep)) else {
                break;
            };
            workers.push(Worker { handle: Some(handle), asleep });
        }
        Self { shared, workers, lock: Mutex::new(()) }
    }

    /// Wakes the workers that sleep.
    fn wake(&self) {
        for worker in &self.workers {
            if let Some(handle) = &worker.handle
                && worker.asleep.load(Ordering::SeqCst)
            {
                handle.thread().unpark();
            }
        }
    }
}

/// Ends the round when dropped, so that a panic of the caller's part cannot end the job's borrow too early: does the
/// parts that no worker has come to, as on a busy machine, and waits for the others.
struct Finish<'a>(&'a Shared);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        while let Some(part) = self.0.take() {
            self.0.perform(part);
        }
        let mut spins = 0;
        while self.0.running.load(Ordering::SeqCst) != 0 {
            spins += 1;
            if spins < SPINS { std::hint::spin_loop() } else { thread::yield_now() }
        }
        // SAFETY: `running` is 0, so nobody reads the job, and the caller holds the pool's lock.
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
        self.shared.left.store(self.workers.len(), Ordering::SeqCst);
        let finish = Finish(&self.shared);
        self.wake();
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
        for worker in &mut self.workers {
            if let Some(handle) = worker.handle.take() {
                handle.thread().unpark();
                // A worker catches its jobs' panics, so there is no error to report.
                let _ = handle.join();
            }
        }
    }
}
