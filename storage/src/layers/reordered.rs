//! A layer that completes reads in a random order.

use core::fmt;

use heapless::Vec;

use super::SplitMix64;
use crate::pending::MAX_DEPTH;
use crate::store::{BlockStore, Completion, Geometry, ReadRequest};

/// Completes the reads of a store in a random order drawn from a seed, and at random polls says that nothing
/// has finished yet: every order that the trait allows can happen.
pub struct Reordered<'b, S: BlockStore<'b>> {
    inner: S,
    random: SplitMix64,
    held: Vec<Completion<'b, S::Error>, MAX_DEPTH>,
}

impl<'b, S: BlockStore<'b>> Reordered<'b, S> {
    /// Reorders the reads of `inner`.
    pub fn new(inner: S, seed: u64) -> Self {
        Self { inner, random: SplitMix64(seed), held: Vec::new() }
    }

    /// Gives the store back; completions not yet polled are lost.
    pub fn into_inner(self) -> S {
        self.inner
    }

    fn pick(&mut self) -> Option<Completion<'b, S::Error>> {
        if self.held.is_empty() {
            return None;
        }
        let index = self.random.below(self.held.len() as u64) as usize;
        Some(self.held.swap_remove(index))
    }
}

impl<'b, S: BlockStore<'b>> BlockStore<'b> for Reordered<'b, S> {
    type Error = S::Error;

    fn geometry(&self) -> Geometry {
        let geometry = self.inner.geometry();
        Geometry { queue_depth: geometry.queue_depth.min(MAX_DEPTH as u16), ..geometry }
    }

    fn submit(&mut self, request: ReadRequest<'b>) -> Result<(), ReadRequest<'b>> {
        if self.in_flight() >= usize::from(self.geometry().queue_depth) {
            return Err(request);
        }
        self.inner.submit(request)
    }

    fn poll(&mut self) -> Option<Completion<'b, S::Error>> {
        while !self.held.is_full()
            && let Some(done) = self.inner.poll()
        {
            let _ = self.held.push(done);
        }
        if self.random.below(2) == 0 {
            return None;
        }
        self.pick()
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight() + self.held.len()
    }

    fn wait(&mut self) -> Option<Completion<'b, S::Error>> {
        // All of them, so that the choice is as wide as it can be.
        while !self.held.is_full()
            && let Some(done) = self.inner.wait()
        {
            let _ = self.held.push(done);
        }
        self.pick()
    }
}

impl<'b, S: BlockStore<'b> + fmt::Debug> fmt::Debug for Reordered<'b, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reordered").field("inner", &self.inner).field("held", &self.held.len()).finish()
    }
}
