//! A layer that fails as flash fails.

use core::fmt;

use heapless::Vec;

use super::SplitMix64;
use crate::pending::{MAX_DEPTH, Pending};
use crate::store::{BlockStore, Completion, Geometry, ReadError, ReadRequest};

/// Which faults to inject. Rates are parts per million of the reads, and exclude one another: at most one fault
/// happens to a read. The default injects none.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct FaultPlan {
    /// Where the faults are drawn from: reads submitted in one order get the same faults.
    pub seed: u64,
    /// Reads that end with [`FaultError::Injected`].
    pub device_error_ppm: u32,
    /// Reads that end with [`ReadError::Short`].
    pub short_ppm: u32,
    /// Reads that succeed with one bit flipped.
    pub flip_ppm: u32,
    /// Reads that get stuck.
    pub stuck_ppm: u32,
    /// Polls after which a stuck read is given up with [`ReadError::Gone`].
    pub stuck_polls: u32,
    /// Bytes after which the power fails: the read that crosses them, and all later ones, end with
    /// [`ReadError::Gone`].
    pub power_off_after: Option<u64>,
}

/// Faults that were injected.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct FaultCounts {
    /// Device errors.
    pub device_errors: u64,
    /// Short reads.
    pub short: u64,
    /// Reads with a flipped bit.
    pub flipped: u64,
    /// Reads that got stuck.
    pub stuck: u64,
    /// Reads after the power had failed, with the one during which it did.
    pub powerless: u64,
}

/// An error of the device under a [`Faulty`] layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum FaultError<E> {
    /// One that was made up.
    #[error("injected fault")]
    Injected,
    /// A real one.
    #[error("{0}")]
    Inner(E),
}

/// What is to become of a read, drawn when it is submitted.
#[derive(Clone, Copy, Debug)]
struct Fate {
    fault: Fault,
    /// Where in the read it happens.
    aim: u64,
    /// The range of the buffer that is read.
    start: usize,
    len: usize,
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    None,
    Device,
    Short,
    Flip,
    Stuck,
}

/// A read that has got stuck, or waits to be handed out.
struct Stuck<'b> {
    id: u32,
    buf: &'b mut [u8],
    polls: u32,
}

/// Injects faults into the reads of a store.
pub struct Faulty<'b, S> {
    inner: S,
    plan: FaultPlan,
    random: SplitMix64,
    pending: Pending<Fate>,
    stuck: Vec<Stuck<'b>, MAX_DEPTH>,
    delivered: u64,
    counts: FaultCounts,
}

impl<'b, S: BlockStore<'b>> Faulty<'b, S> {
    /// Injects the faults of `plan` into the reads of `inner`.
    pub fn new(inner: S, plan: FaultPlan) -> Self {
        Self {
            inner,
            plan,
            random: SplitMix64(plan.seed),
            pending: Pending::new(),
            stuck: Vec::new(),
            delivered: 0,
            counts: FaultCounts::default(),
        }
    }

    /// Faults injected so far.
    pub fn counts(&self) -> FaultCounts {
        self.counts
    }

    /// Bytes that reached a buffer before the power failed, those of a read cut short included.
    pub fn delivered(&self) -> u64 {
        self.delivered
    }

    /// Gives the store back; stuck reads are lost.
    pub fn into_inner(self) -> S {
        self.inner
    }

    fn draw(&mut self, start: usize, len: usize) -> Fate {
        let mut dice = self.random.below(1_000_000);
        let aim = self.random.next();
        let plan = &self.plan;
        for (ppm, fault) in [
            (plan.device_error_ppm, Fault::Device),
            (plan.short_ppm, Fault::Short),
            (plan.flip_ppm, Fault::Flip),
            (plan.stuck_ppm, Fault::Stuck),
        ] {
            if dice < u64::from(ppm) {
                return Fate { fault, aim, start, len };
            }
            dice -= u64::from(ppm);
        }
        Fate { fault: Fault::None, aim, start, len }
    }

    /// Lets the read's fate happen. `None` if it got stuck.
    fn befall(&mut self, done: Completion<'b, S::Error>) -> Option<Completion<'b, FaultError<S::Error>>> {
        let Completion { id, buf, result } = done;
        // A completion that nobody asked for passes as it is, and so does one that failed already.
        let fate = self.pending.take(id);
        let (Ok(()), Some(Fate { fault, aim, start, len })) = (&result, fate) else {
            return Some(Completion { id, buf, result: result.map_err(wrap) });
        };
        let Some(read) = buf.get_mut(start..).and_then(|tail| tail.get_mut(..len)) else {
            return Some(Completion { id, buf, result: Err(ReadError::OutOfBounds) });
        };
        let len = len as u64;
        if let Some(budget) = self.plan.power_off_after {
            let left = budget - self.delivered;
            if len > left {
                self.delivered = budget;
                self.counts.powerless += 1;
                spoil(&mut read[left as usize..]);
                let result = Err(ReadError::Gone);
                return Some(Completion { id, buf, result });
            }
        }
        let result = match fault {
            Fault::Device => {
                self.counts.device_errors += 1;
                spoil(read);
                Err(ReadError::Device(FaultError::Injected))
            }
            Fault::Short if len > 0 => {
                self.counts.short += 1;
                let got = aim % len;
                spoil(&mut read[got as usize..]);
                self.delivered += got;
                Err(ReadError::Short { got })
            }
            Fault::Flip if len > 0 => {
                self.counts.flipped += 1;
                let bit = aim % 8;
                read[(aim / 8 % len) as usize] ^= 1 << bit;
                self.delivered += len;
                Ok(())
            }
            Fault::Stuck => {
                self.counts.stuck += 1;
                spoil(read);
                let polls = self.plan.stuck_polls;
                return match self.stuck.push(Stuck { id, buf, polls }) {
                    Ok(()) => None,
                    Err(Stuck { id, buf, .. }) => Some(Completion { id, buf, result: Err(ReadError::Gone) }),
                };
            }
            Fault::None | Fault::Short | Fault::Flip => {
                self.delivered += len;
                Ok(())
            }
        };
        Some(Completion { id, buf, result })
    }

    /// Counts a poll against the stuck reads' budgets, and hands out one whose budget is spent.
    fn give_up(&mut self) -> Option<Completion<'b, FaultError<S::Error>>> {
        let spent = self.stuck.iter().position(|read| read.polls == 0);
        for read in &mut self.stuck {
            read.polls = read.polls.saturating_sub(1);
        }
        let Stuck { id, buf, .. } = self.stuck.remove(spent?);
        Some(Completion { id, buf, result: Err(ReadError::Gone) })
    }
}

impl<'b, S: BlockStore<'b>> BlockStore<'b> for Faulty<'b, S> {
    type Error = FaultError<S::Error>;

    fn geometry(&self) -> Geometry {
        let geometry = self.inner.geometry();
        Geometry { queue_depth: geometry.queue_depth.min(MAX_DEPTH as u16), ..geometry }
    }

    fn submit(&mut self, request: ReadRequest<'b>) -> Result<(), ReadRequest<'b>> {
        if self.in_flight() >= usize::from(self.geometry().queue_depth) {
            return Err(request);
        }
        let (id, start, len) = (request.id, request.start, request.len);
        self.inner.submit(request)?;
        let fate = self.draw(start, len);
        self.pending.insert(id, fate);
        Ok(())
    }

    fn poll(&mut self) -> Option<Completion<'b, Self::Error>> {
        if let Some(gone) = self.give_up() {
            return Some(gone);
        }
        while let Some(done) = self.inner.poll() {
            if let Some(done) = self.befall(done) {
                return Some(done);
            }
        }
        None
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight() + self.stuck.len()
    }

    fn wait(&mut self) -> Option<Completion<'b, Self::Error>> {
        while self.in_flight() > 0 {
            if let Some(done) = self.poll() {
                return Some(done);
            }
            if self.inner.in_flight() > 0
                && let Some(done) = self.inner.wait()
                && let Some(done) = self.befall(done)
            {
                return Some(done);
            }
        }
        None
    }
}

/// Overwrites bytes that did not arrive: their content is undefined, and a caller that uses it shall notice.
fn spoil(bytes: &mut [u8]) {
    bytes.fill(0xa5);
}

fn wrap<E>(error: ReadError<E>) -> ReadError<FaultError<E>> {
    match error {
        ReadError::Device(error) => ReadError::Device(FaultError::Inner(error)),
        ReadError::OutOfBounds => ReadError::OutOfBounds,
        ReadError::Misaligned => ReadError::Misaligned,
        ReadError::Short { got } => ReadError::Short { got },
        ReadError::Gone => ReadError::Gone,
    }
}

impl<S: fmt::Debug> fmt::Debug for Faulty<'_, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Faulty")
            .field("inner", &self.inner)
            .field("plan", &self.plan)
            .field("stuck", &self.stuck.len())
            .field("delivered", &self.delivered)
            .field("counts", &self.counts)
            .finish()
    }
}
