//! What the stores share: checking a request, and remembering it by id.

use heapless::Vec;

use crate::store::{Geometry, ReadError, ReadRequest};

/// Most reads that any store or layer of this crate holds at once.
pub const MAX_DEPTH: usize = 64;

/// A queue depth that the bounded queues can hold.
pub(crate) fn clamp_depth(depth: u16) -> u16 {
    depth.clamp(1, MAX_DEPTH as u16)
}

/// Refuses a request that the geometry rules out, or whose range is not inside its buffer.
pub(crate) fn check<E>(geometry: &Geometry, request: &mut ReadRequest<'_>) -> Result<(), ReadError<E>> {
    let offset = request.offset;
    let target = request.target().ok_or(ReadError::OutOfBounds)?;
    let (address, len) = (target.as_ptr().addr() as u64, target.len() as u64);
    let block = u64::from(geometry.block.max(1));
    if !(offset | len | address).is_multiple_of(block) {
        return Err(ReadError::Misaligned);
    }
    match offset.checked_add(len) {
        Some(end) if end <= geometry.len => Ok(()),
        _ => Err(ReadError::OutOfBounds),
    }
}

/// The bytes that a checked request fills.
pub(crate) fn target<'r, E>(request: &'r mut ReadRequest<'_>) -> Result<&'r mut [u8], ReadError<E>> {
    request.target().ok_or(ReadError::OutOfBounds)
}

/// What a layer remembers of each read in flight below it. Reads of one id are taken in the order they came.
#[derive(Debug)]
pub(crate) struct Pending<T> {
    reads: Vec<(u32, T), MAX_DEPTH>,
}

impl<T> Pending<T> {
    pub(crate) const fn new() -> Self {
        Self { reads: Vec::new() }
    }

    pub(crate) fn is_full(&self) -> bool {
        self.reads.is_full()
    }

    /// Remembers a read; the caller has made sure that there is room.
    pub(crate) fn insert(&mut self, id: u32, value: T) {
        debug_assert!(!self.is_full());
        let _ = self.reads.push((id, value));
    }

    pub(crate) fn take(&mut self, id: u32) -> Option<T> {
        let index = self.reads.iter().position(|&(known, _)| known == id)?;
        Some(self.reads.remove(index).1)
    }

    pub(crate) fn values(&self) -> impl Iterator<Item = &T> {
        self.reads.iter().map(|(_, value)| value)
    }

    pub(crate) fn clear(&mut self) {
        self.reads.clear();
    }
}
