//! A layer over a store that counts what is read through it.

use forebay_storage::store::{BlockStore, Completion, Geometry, ReadRequest};

/// Counts of a [`Meter`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Reads {
    /// Reads that came back.
    pub finished: u64,
    /// Bytes asked for.
    pub bytes: u64,
    /// Most reads in flight at once.
    pub most_in_flight: usize,
    /// Reads whose end was waited for; the others came back while something was computed.
    pub waited: u64,
}

/// Counts the reads of the store below.
#[derive(Debug)]
pub struct Meter<S> {
    store: S,
    reads: Reads,
}

impl<S> Meter<S> {
    /// A layer over `store`.
    pub fn new(store: S) -> Self {
        Self { store, reads: Reads::default() }
    }

    /// The counts so far.
    pub fn reads(&self) -> Reads {
        self.reads
    }

    fn finish<'b, E>(&mut self, done: Option<Completion<'b, E>>) -> Option<Completion<'b, E>> {
        self.reads.finished += u64::from(done.is_some());
        done
    }
}

impl<'b, S: BlockStore<'b>> BlockStore<'b> for Meter<S> {
    type Error = S::Error;

    fn geometry(&self) -> Geometry {
        self.store.geometry()
    }

    fn mapped(&self) -> Option<&'b [u8]> {
        self.store.mapped()
    }

    fn submit(&mut self, request: ReadRequest<'b>) -> Result<(), ReadRequest<'b>> {
        let len = request.len as u64;
        self.store.submit(request)?;
        self.reads.bytes += len;
        self.reads.most_in_flight = self.reads.most_in_flight.max(self.store.in_flight());
        Ok(())
    }

    fn poll(&mut self) -> Option<Completion<'b, Self::Error>> {
        let done = self.store.poll();
        self.finish(done)
    }

    fn in_flight(&self) -> usize {
        self.store.in_flight()
    }

    fn wait(&mut self) -> Option<Completion<'b, Self::Error>> {
        let done = self.store.wait();
        self.reads.waited += u64::from(done.is_some());
        self.finish(done)
    }
}
