//! A layer that is as slow as another device.

use core::cell::Cell;
use core::fmt;

use heapless::Vec;

use super::DeviceProfile;
use crate::pending::{MAX_DEPTH, Pending};
use crate::store::{BlockStore, Completion, Geometry, ReadRequest};

/// A monotonic clock, given by whoever has one.
pub trait Clock {
    /// Nanoseconds since some fixed moment.
    fn now_ns(&self) -> u64;

    /// Returns at `deadline_ns` or soon after. Spins, unless the clock knows how to sleep.
    fn wait_until_ns(&self, deadline_ns: u64) {
        while self.now_ns() < deadline_ns {
            core::hint::spin_loop();
        }
    }
}

impl<C: Clock + ?Sized> Clock for &C {
    fn now_ns(&self) -> u64 {
        (**self).now_ns()
    }

    fn wait_until_ns(&self, deadline_ns: u64) {
        (**self).wait_until_ns(deadline_ns);
    }
}

/// A clock that moves when it is told to, or is waited on: simulated time.
#[derive(Debug, Default)]
pub struct ManualClock(Cell<u64>);

impl ManualClock {
    /// A clock at 0.
    #[must_use]
    pub const fn new() -> Self {
        Self(Cell::new(0))
    }

    /// Moves the clock by `ns`.
    pub fn advance_ns(&self, ns: u64) {
        self.0.set(self.0.get().saturating_add(ns));
    }
}

impl Clock for ManualClock {
    fn now_ns(&self) -> u64 {
        self.0.get()
    }

    fn wait_until_ns(&self, deadline_ns: u64) {
        self.0.set(self.0.get().max(deadline_ns));
    }
}

/// The host's monotonic clock; waiting sleeps.
#[cfg(feature = "std")]
#[derive(Clone, Copy, Debug)]
pub struct StdClock(std::time::Instant);

#[cfg(feature = "std")]
impl StdClock {
    /// A clock that starts now.
    #[must_use]
    pub fn new() -> Self {
        Self(std::time::Instant::now())
    }
}

#[cfg(feature = "std")]
impl Default for StdClock {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(feature = "std")]
impl Clock for StdClock {
    fn now_ns(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn wait_until_ns(&self, deadline_ns: u64) {
        loop {
            let left = deadline_ns.saturating_sub(self.now_ns());
            if left == 0 {
                return;
            }
            std::thread::sleep(std::time::Duration::from_nanos(left));
        }
    }
}

/// Completes the reads of a store no earlier than a device of the given profile would.
///
/// The model has two parts that work at once: commands start at most `iops` a second and each takes the
/// latency, latencies overlapping; data then crosses one bus at the bandwidth, one read after another.
pub struct Throttled<'b, S: BlockStore<'b>, C> {
    inner: S,
    clock: C,
    profile: DeviceProfile,
    /// Due times of the reads in flight below.
    pending: Pending<u64>,
    /// Reads that have finished below, with their due times.
    held: Vec<(u64, Completion<'b, S::Error>), MAX_DEPTH>,
    next_command: u64,
    bus_free: u64,
}

impl<'b, S: BlockStore<'b>, C: Clock> Throttled<'b, S, C> {
    /// Slows `inner` down to `profile`, by `clock`.
    pub fn new(inner: S, profile: DeviceProfile, clock: C) -> Self {
        Self { inner, clock, profile, pending: Pending::new(), held: Vec::new(), next_command: 0, bus_free: 0 }
    }

    /// The device that is modelled.
    pub fn profile(&self) -> &DeviceProfile {
        &self.profile
    }

    /// Gives the store back; completions not yet polled are lost.
    pub fn into_inner(self) -> S {
        self.inner
    }

    /// When a read of `len` bytes that is submitted now will be done.
    fn schedule(&mut self, len: u64) -> u64 {
        let command = self.clock.now_ns().max(self.next_command);
        self.next_command = command.saturating_add(self.profile.command_interval_ns());
        let data = command.saturating_add(self.profile.latency_ns);
        let due = data.max(self.bus_free).saturating_add(self.profile.transfer_ns(len));
        self.bus_free = due;
        due
    }

    fn hold(&mut self, done: Completion<'b, S::Error>) {
        let due = self.pending.take(done.id).unwrap_or(0);
        let _ = self.held.push((due, done));
    }

    /// Takes what has finished below, and says where the read that is due first is held.
    fn collect(&mut self) -> Option<(usize, u64)> {
        while !self.held.is_full()
            && let Some(done) = self.inner.poll()
        {
            self.hold(done);
        }
        self.held.iter().enumerate().map(|(index, &(due, _))| (index, due)).min_by_key(|&(_, due)| due)
    }
}

impl<'b, S: BlockStore<'b>, C: Clock> BlockStore<'b> for Throttled<'b, S, C> {
    type Error = S::Error;

    fn geometry(&self) -> Geometry {
        let geometry = self.inner.geometry();
        Geometry {
            queue_depth: geometry.queue_depth.min(self.profile.queue_depth).clamp(1, MAX_DEPTH as u16),
            ..geometry
        }
    }

    fn submit(&mut self, request: ReadRequest<'b>) -> Result<(), ReadRequest<'b>> {
        if self.in_flight() >= usize::from(self.geometry().queue_depth) {
            return Err(request);
        }
        let (id, len) = (request.id, request.len as u64);
        self.inner.submit(request)?;
        let due = self.schedule(len);
        self.pending.insert(id, due);
        Ok(())
    }

    fn poll(&mut self) -> Option<Completion<'b, S::Error>> {
        let (index, due) = self.collect()?;
        (due <= self.clock.now_ns()).then(|| self.held.swap_remove(index).1)
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight() + self.held.len()
    }

    fn wait(&mut self) -> Option<Completion<'b, S::Error>> {
        loop {
            let first = self.collect();
            let sooner = |&&due: &&u64| first.is_none_or(|(_, held)| due < held);
            if self.pending.values().any(|due| sooner(&due)) && !self.held.is_full() {
                match self.inner.wait() {
                    Some(done) => self.hold(done),
                    // The store has lost the reads; there is nothing to wait for.
                    None => self.pending.clear(),
                }
                continue;
            }
            let (index, due) = first?;
            self.clock.wait_until_ns(due);
            return Some(self.held.swap_remove(index).1);
        }
    }
}

impl<'b, S: BlockStore<'b> + fmt::Debug, C: fmt::Debug> fmt::Debug for Throttled<'b, S, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Throttled")
            .field("inner", &self.inner)
            .field("clock", &self.clock)
            .field("profile", &self.profile)
            .field("held", &self.held.len())
            .finish()
    }
}
