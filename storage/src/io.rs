//! A store over a synchronous reader that can seek (`embedded-io`).

use embedded_io::{Read, Seek, SeekFrom};

use crate::pending::{check, target};
use crate::store::{BlockStore, Completion, Geometry, ReadError, ReadRequest};

/// A store over `embedded_io::Read + Seek`: a file on a card's file system, a test's cursor.
///
/// The device is synchronous, so `poll` is where its read happens and takes as long as the read; one read is
/// in flight at a time. No alignment is asked for.
#[derive(Debug)]
pub struct IoStore<'b, T> {
    device: T,
    len: u64,
    request: Option<ReadRequest<'b>>,
}

impl<T: Read + Seek> IoStore<'_, T> {
    /// A store of all bytes of `device`, which is asked for its length once.
    ///
    /// # Errors
    /// The device's, if it cannot seek to its end.
    pub fn new(mut device: T) -> Result<Self, T::Error> {
        let len = device.seek(SeekFrom::End(0))?;
        Ok(Self { device, len, request: None })
    }

    /// Gives the device back.
    pub fn into_inner(self) -> T {
        self.device
    }

    fn read(&mut self, request: &mut ReadRequest<'_>) -> Result<(), ReadError<T::Error>> {
        check(&self.geometry_of(), request)?;
        self.device.seek(SeekFrom::Start(request.offset)).map_err(ReadError::Device)?;
        let target = target(request)?;
        let mut got = 0;
        while got < target.len() {
            match self.device.read(&mut target[got..]).map_err(ReadError::Device)? {
                0 => return Err(ReadError::Short { got: got as u64 }),
                // A device that claims more than the slice holds is not believed.
                n => got = got.saturating_add(n).min(target.len()),
            }
        }
        Ok(())
    }

    fn geometry_of(&self) -> Geometry {
        Geometry { len: self.len, block: 1, queue_depth: 1 }
    }
}

impl<'b, T: Read + Seek> BlockStore<'b> for IoStore<'b, T> {
    type Error = T::Error;

    fn geometry(&self) -> Geometry {
        self.geometry_of()
    }

    fn submit(&mut self, request: ReadRequest<'b>) -> Result<(), ReadRequest<'b>> {
        if self.request.is_some() {
            return Err(request);
        }
        self.request = Some(request);
        Ok(())
    }

    fn poll(&mut self) -> Option<Completion<'b, T::Error>> {
        let mut request = self.request.take()?;
        let result = self.read(&mut request);
        Some(Completion { id: request.id, buf: request.buf, result })
    }

    fn in_flight(&self) -> usize {
        usize::from(self.request.is_some())
    }
}
