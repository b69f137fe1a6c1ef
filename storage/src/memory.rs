//! A store over bytes in memory.

use core::convert::Infallible;

use heapless::Deque;

use crate::store::{BlockStore, Completion, Geometry, ReadError, ReadRequest};

/// Most reads any of this crate's bounded queues holds.
pub const MAX_DEPTH: usize = 64;

/// What to answer to a request that the geometry rules out.
pub(crate) fn check<E>(geometry: &Geometry, request: &ReadRequest<'_>) -> Result<(), ReadError<E>> {
    let len = request.len as u64;
    let block = u64::from(geometry.block.max(1));
    let address = request.buf.as_ptr().addr().wrapping_add(request.start) as u64;
    let end = request.start.checked_add(request.len);
    if end.is_none_or(|end| end > request.buf.len()) {
        return Err(ReadError::OutOfBounds);
    }
    if !(request.offset | len | address).is_multiple_of(block) {
        return Err(ReadError::Misaligned);
    }
    match request.offset.checked_add(len) {
        Some(end) if end <= geometry.len => Ok(()),
        _ => Err(ReadError::OutOfBounds),
    }
}

/// An image that is addressable as it is: RAM, memory-mapped flash, an array in the binary.
///
/// Reads are copied at `submit` and completed in order.
#[derive(Debug)]
pub struct MemoryStore<'b, 'm> {
    bytes: &'m [u8],
    depth: u16,
    done: Deque<Completion<'b, Infallible>, MAX_DEPTH>,
}

impl<'m> MemoryStore<'_, 'm> {
    /// A store of `bytes` without an alignment rule, 16 reads deep.
    #[must_use]
    pub fn new(bytes: &'m [u8]) -> Self {
        Self::with_depth(bytes, 16)
    }

    /// A store of `bytes` that takes `depth` reads at once, 1 to [`MAX_DEPTH`]; other values are clamped.
    #[must_use]
    pub fn with_depth(bytes: &'m [u8], depth: u16) -> Self {
        Self {
            bytes,
            depth: depth.clamp(1, MAX_DEPTH as u16),
            done: Deque::new(),
        }
    }
}

impl<'b> BlockStore<'b> for MemoryStore<'b, '_> {
    type Error = Infallible;

    fn geometry(&self) -> Geometry {
        Geometry {
            len: self.bytes.len() as u64,
            block: 1,
            queue_depth: self.depth,
        }
    }

    fn submit(&mut self, request: ReadRequest<'b>) -> Result<(), ReadRequest<'b>> {
        if self.done.len() >= usize::from(self.depth) {
            return Err(request);
        }
        let mut request = request;
        let mut result = check(&self.geometry(), &request);
        if result.is_ok() {
            let start = usize::try_from(request.offset).ok();
            let source = start.and_then(|start| self.bytes.get(start..)?.get(..request.len));
            match (source, request.target()) {
                (Some(source), Some(target)) => target.copy_from_slice(source),
                _ => result = Err(ReadError::OutOfBounds),
            }
        }
        let ReadRequest {
            id,
            offset,
            buf,
            start,
            len,
        } = request;
        self.done
            .push_back(Completion { id, buf, result })
            .map_err(|done| ReadRequest {
                id: done.id,
                offset,
                buf: done.buf,
                start,
                len,
            })
    }

    fn poll(&mut self) -> Option<Completion<'b, Infallible>> {
        self.done.pop_front()
    }

    fn in_flight(&self) -> usize {
        self.done.len()
    }
}
