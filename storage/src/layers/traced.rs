//! A layer that reports every read.

use crate::pending::{MAX_DEPTH, Pending};
use crate::store::{BlockStore, Completion, Geometry, ReadError, ReadRequest};

/// What happened to a read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum TraceEvent {
    /// The store took it.
    Submitted {
        /// The request's id.
        id: u32,
        /// Offset in the store, bytes.
        offset: u64,
        /// Length, bytes.
        len: u64,
    },
    /// It finished.
    Completed {
        /// The request's id.
        id: u32,
        /// Offset in the store, bytes.
        offset: u64,
        /// Length, bytes.
        len: u64,
        /// How; without the device's own error, so that the event is plain data.
        result: Result<(), ReadError<()>>,
    },
}

/// Calls a sink when a read starts and when its completion is handed out.
#[derive(Debug)]
pub struct Traced<S, F> {
    inner: S,
    sink: F,
    ranges: Pending<(u64, u64)>,
}

impl<S, F: FnMut(TraceEvent)> Traced<S, F> {
    /// Reports the reads of `inner` to `sink`.
    pub fn new(inner: S, sink: F) -> Self {
        Self { inner, sink, ranges: Pending::new() }
    }

    /// Gives the store and the sink back.
    pub fn into_parts(self) -> (S, F) {
        (self.inner, self.sink)
    }

    fn report<'b, E>(&mut self, done: Completion<'b, E>) -> Completion<'b, E> {
        let result = match &done.result {
            Ok(()) => Ok(()),
            Err(ReadError::Device(_)) => Err(ReadError::Device(())),
            Err(ReadError::OutOfBounds) => Err(ReadError::OutOfBounds),
            Err(ReadError::Misaligned) => Err(ReadError::Misaligned),
            Err(ReadError::Short { got }) => Err(ReadError::Short { got: *got }),
            Err(ReadError::Gone) => Err(ReadError::Gone),
        };
        let (offset, len) = self.ranges.take(done.id).unwrap_or((0, 0));
        (self.sink)(TraceEvent::Completed { id: done.id, offset, len, result });
        done
    }
}

impl<'b, S: BlockStore<'b>, F: FnMut(TraceEvent)> BlockStore<'b> for Traced<S, F> {
    type Error = S::Error;

    fn geometry(&self) -> Geometry {
        let geometry = self.inner.geometry();
        Geometry { queue_depth: geometry.queue_depth.min(MAX_DEPTH as u16), ..geometry }
    }

    fn submit(&mut self, request: ReadRequest<'b>) -> Result<(), ReadRequest<'b>> {
        if self.ranges.is_full() {
            return Err(request);
        }
        let (id, offset, len) = (request.id, request.offset, request.len as u64);
        self.inner.submit(request)?;
        self.ranges.insert(id, (offset, len));
        (self.sink)(TraceEvent::Submitted { id, offset, len });
        Ok(())
    }

    fn poll(&mut self) -> Option<Completion<'b, S::Error>> {
        let done = self.inner.poll()?;
        Some(self.report(done))
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight()
    }

    fn wait(&mut self) -> Option<Completion<'b, S::Error>> {
        let done = self.inner.wait()?;
        Some(self.report(done))
    }
}
