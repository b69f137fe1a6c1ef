//! A store over bytes in memory.

use core::convert::Infallible;

use heapless::Deque;

use crate::pending::{MAX_DEPTH, check, clamp_depth, target};
use crate::store::{BlockStore, Completion, Geometry, ReadError, ReadRequest};

/// An image that is addressable as it is: RAM, memory-mapped flash, an array in the binary. [`MappedStore`] does without
/// copies.
///
/// Reads are copied at `submit` and completed in order. No alignment is asked for.
#[derive(Debug)]
pub struct MemoryStore<'b, 'm> {
    bytes: &'m [u8],
    depth: u16,
    done: Deque<Completion<'b, Infallible>, MAX_DEPTH>,
}

impl<'m> MemoryStore<'_, 'm> {
    /// A store of `bytes`, 16 reads deep.
    #[must_use]
    pub fn new(bytes: &'m [u8]) -> Self {
        Self::with_depth(bytes, 16)
    }

    /// A store of `bytes` that takes `depth` reads at once, clamped to 1 to [`MAX_DEPTH`].
    #[must_use]
    pub fn with_depth(bytes: &'m [u8], depth: u16) -> Self {
        Self { bytes, depth: clamp_depth(depth), done: Deque::new() }
    }

    fn read(&self, request: &mut ReadRequest<'_>) -> Result<(), ReadError<Infallible>> {
        check(&self.geometry_of(), request)?;
        let offset = request.offset;
        let target = target(request)?;
        let source = usize::try_from(offset)
            .ok()
            .and_then(|start| self.bytes.get(start..)?.get(..target.len()))
            .ok_or(ReadError::OutOfBounds)?;
        target.copy_from_slice(source);
        Ok(())
    }

    fn geometry_of(&self) -> Geometry {
        Geometry { len: self.bytes.len() as u64, block: 1, queue_depth: self.depth }
    }
}

impl<'b> BlockStore<'b> for MemoryStore<'b, '_> {
    type Error = Infallible;

    fn geometry(&self) -> Geometry {
        self.geometry_of()
    }

    fn submit(&mut self, mut request: ReadRequest<'b>) -> Result<(), ReadRequest<'b>> {
        if self.done.len() >= usize::from(self.depth) {
            return Err(request);
        }
        let result = self.read(&mut request);
        // There is room: the queue is as long as the greatest depth.
        let _ = self.done.push_back(Completion { id: request.id, buf: request.buf, result });
        Ok(())
    }

    fn poll(&mut self) -> Option<Completion<'b, Infallible>> {
        self.done.pop_front()
    }

    fn in_flight(&self) -> usize {
        self.done.len()
    }
}

/// An image that is used where it is: memory-mapped flash, which nothing writes to while the store's buffers live.
#[derive(Debug)]
pub struct MappedStore<'b> {
    bytes: &'b [u8],
    copies: MemoryStore<'b, 'b>,
}

impl<'b> MappedStore<'b> {
    /// A store of `bytes`.
    #[must_use]
    pub fn new(bytes: &'b [u8]) -> Self {
        Self { bytes, copies: MemoryStore::new(bytes) }
    }
}

impl<'b> BlockStore<'b> for MappedStore<'b> {
    type Error = Infallible;

    fn geometry(&self) -> Geometry {
        self.copies.geometry()
    }

    fn mapped(&self) -> Option<&'b [u8]> {
        Some(self.bytes)
    }

    fn submit(&mut self, request: ReadRequest<'b>) -> Result<(), ReadRequest<'b>> {
        self.copies.submit(request)
    }

    fn poll(&mut self) -> Option<Completion<'b, Infallible>> {
        self.copies.poll()
    }

    fn in_flight(&self) -> usize {
        self.copies.in_flight()
    }
}
