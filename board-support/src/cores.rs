//! Further cores as workers of the kernels.
//!
//! A [`Team`] is what cores share; how a core starts, sleeps and is woken is the architecture's. The calling core does
//! part 0 of every job and whatever part no other core has come to, so a core that is late holds nobody up.

use core::cell::UnsafeCell;
use core::fmt;
use core::ops::Range;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use forebay_kernels::exec::{Serial, Workers};

use crate::app::Clock;
use crate::stack::Stack;

/// Seconds that a core may take to come up.
const LIMIT: u64 = 2;

/// The cores of a machine.
pub trait Cores {
    /// Brings cores up until `count` can compute, the first one among them. Gives as many as came.
    fn start(&self, count: usize) -> &'static dyn Workers;

    /// What the further cores did; `None` if only one core computes.
    fn further(&self) -> Option<Further>;
}

/// What further cores did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Further {
    /// Parts of jobs that they computed.
    pub parts: usize,
    /// Bytes of stack that one of them used at most.
    pub stack_used: usize,
    /// Bytes of stack that each has.
    pub stack_len: usize,
}

/// A way to start cores.
pub trait Power {
    /// Whether cores that are not needed, too, should be brought from where they wait to where they sleep.
    const STARTS_ALL: bool;

    /// Starts core `core`, from 1 on. False if there is none.
    fn start(&self, core: usize) -> bool;
}

/// A machine whose first core computes alone.
#[derive(Clone, Copy, Debug)]
pub struct OneCore;

impl Cores for OneCore {
    fn start(&self, _: usize) -> &'static dyn Workers {
        &Serial
    }
    fn further(&self) -> Option<Further> {
        None
    }
}

type Job = dyn Fn(usize) + Sync;

/// Cores that run the kernels' jobs together. A static; further cores enter [`Team::serve`] and stay there.
pub struct Team {
    /// The job of the current round, its lifetime erased.
    job: UnsafeCell<Option<&'static Job>>,
    /// Parts of the job that nobody has taken: 1 to this number; 0 between rounds.
    left: AtomicUsize,
    /// Parts of the round, but for the caller's own, that have not been finished.
    running: AtomicUsize,
    /// Whether a round is on.
    busy: AtomicBool,
    /// Cores that serve.
    serving: AtomicUsize,
    /// Cores that are to compute, the first one among them. Written before any core is started.
    wanted: AtomicUsize,
    /// Parts that further cores computed.
    helped: AtomicUsize,
    /// Puts a core to sleep until `wake` was called since it last slept, or returns early.
    sleep: fn(),
    /// Wakes all cores that sleep.
    wake: fn(),
}

// SAFETY: `job` is written only by who has set `busy`, while `running` is 0, and read only by who has taken a part and
// not yet finished it, which is between the release store of `left` and the decrement of `running`.
unsafe impl Sync for Team {}

impl fmt::Debug for Team {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Team").field("cores", &self.count()).finish()
    }
}

impl Team {
    /// A team of the first core alone.
    pub const fn new(sleep: fn(), wake: fn()) -> Self {
        Self {
            job: UnsafeCell::new(None),
            left: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            busy: AtomicBool::new(false),
            serving: AtomicUsize::new(0),
            wanted: AtomicUsize::new(1),
            helped: AtomicUsize::new(0),
            sleep,
            wake,
        }
    }

    /// Joins the team for good. To be called by a further core, once.
    pub fn serve(&self) -> ! {
        self.serving.fetch_add(1, Ordering::Release);
        loop {
            match self.take() {
                Some(part) => {
                    self.helped.fetch_add(1, Ordering::Relaxed);
                    self.perform(part);
                }
                None => (self.sleep)(),
            }
        }
    }

    /// Cores that have joined.
    pub fn serving(&self) -> usize {
        self.serving.load(Ordering::Acquire)
    }

    /// Whether core `core` is to join.
    pub fn wants(&self, core: usize) -> bool {
        core < self.wanted.load(Ordering::Acquire)
    }

    /// Starts cores one after another until `count` can compute, of the `have` that there are stacks for. To be called
    /// once, by the first core.
    ///
    /// # Safety
    /// `stack` gives the stack of each core from 1 to `have`: writable memory that nothing else uses.
    pub unsafe fn start<P: Power>(
        &self,
        power: &P,
        count: usize,
        have: usize,
        stack: fn(usize) -> Range<usize>,
        clock: &Clock,
    ) {
        let count = count.min(have);
        self.wanted.store(count, Ordering::Release);
        for core in 1..count {
            // SAFETY: the stack of a core that has not been started.
            unsafe { Stack::paint_all(stack(core)) };
            if !power.start(core) {
                break;
            }
            let begin = (clock.now)();
            while self.serving() < core && (clock.now)().wrapping_sub(begin) < LIMIT * clock.hertz {
                core::hint::spin_loop();
            }
            if self.serving() < core {
                break;
            }
        }
        if P::STARTS_ALL {
            for core in count..have {
                let _ = power.start(core);
            }
        }
    }

    /// What the further cores did, which [`Team::start`] has started with these stacks.
    pub fn further(&self, stack: fn(usize) -> Range<usize>) -> Option<Further> {
        let stacks = (1..=self.serving()).map(|core| {
            // SAFETY: `start` has painted it.
            let stack = unsafe { Stack::painted(stack(core)) };
            (stack.high_water(), stack.len())
        });
        let (stack_used, stack_len) = stacks.max()?;
        Some(Further { parts: self.helped.load(Ordering::Relaxed), stack_used, stack_len })
    }

    /// Takes a part that nobody has taken.
    fn take(&self) -> Option<usize> {
        self.left.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |left| left.checked_sub(1)).ok()
    }

    /// Runs part `index`, which the caller of this function has taken.
    fn perform(&self, index: usize) {
        // SAFETY: taking a part of a round happens after its job was written, and the job is neither written again
        // nor its borrow ended before every part that was taken has been finished.
        if let Some(job) = unsafe { *self.job.get() } {
            job(index);
        }
        self.running.fetch_sub(1, Ordering::Release);
    }
}

impl Workers for Team {
    fn count(&self) -> usize {
        self.serving() + 1
    }

    /// A job that runs another one, or a second caller, does its own job alone.
    fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        let others = self.serving();
        if others == 0 || self.busy.swap(true, Ordering::Acquire) {
            (0..=others).for_each(job);
            return;
        }
        // SAFETY: only the lifetime changes. This function does not return before every part has been finished; there
        // is no unwinding on boards, a panic ends the program.
        let erased = unsafe { core::mem::transmute::<&(dyn Fn(usize) + Sync), &'static Job>(job) };
        // SAFETY: `busy` was set here and `running` is 0: nobody else touches the job.
        unsafe { *self.job.get() = Some(erased) };
        self.running.store(others, Ordering::Relaxed);
        self.left.store(others, Ordering::Release);
        (self.wake)();
        job(0);
        while let Some(part) = self.take() {
            self.perform(part);
        }
        while self.running.load(Ordering::Acquire) != 0 {
            core::hint::spin_loop();
        }
        // SAFETY: `running` is 0, so nobody reads the job, and `busy` is still set.
        unsafe { *self.job.get() = None };
        self.busy.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::thread;
    use std::vec::Vec;

    use super::*;

    static TEAM: Team = Team::new(thread::yield_now, || {});

    /// Threads stand in for cores; they end with the process.
    #[test]
    fn every_part_is_done_once() {
        assert_eq!(TEAM.count(), 1);
        for _ in 0..3 {
            thread::spawn(|| TEAM.serve());
        }
        while TEAM.serving() < 3 {
            thread::yield_now();
        }
        assert_eq!(TEAM.count(), 4);
        for round in 1..=2000 {
            let done: Vec<AtomicUsize> = (0..4).map(|_| AtomicUsize::new(0)).collect();
            let nested = AtomicUsize::new(0);
            TEAM.run(&|part| {
                done[part].fetch_add(1, Ordering::Relaxed);
                // A job within a job is done by its caller.
                if round % 100 == 0 && part == 2 {
                    TEAM.run(&|_| {
                        nested.fetch_add(1, Ordering::Relaxed);
                    });
                }
            });
            assert!(done.iter().all(|d| d.load(Ordering::Relaxed) == 1), "round {round}: {done:?}");
            assert_eq!(nested.load(Ordering::Relaxed), if round % 100 == 0 { 4 } else { 0 });
        }
    }
}
