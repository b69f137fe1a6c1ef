//! A store over NOR flash and other `embedded-storage` devices.

use core::fmt;

use embedded_storage::ReadStorage;

use crate::pending::{check, target};
use crate::store::{BlockStore, Completion, Geometry, ReadError, ReadRequest};

/// A store over `embedded_storage::ReadStorage`.
///
/// That trait's offsets are 32 bits: of a device above 4 GiB only the first 4 GiB can be read, and a read
/// beyond is refused with [`NorError::Beyond32Bits`]. The device is synchronous, so `poll` is where its read
/// happens; one read is in flight at a time. No alignment is asked for: `ReadStorage` reads any byte.
#[derive(Debug)]
pub struct NorStore<'b, T> {
    device: T,
    request: Option<ReadRequest<'b>>,
}

/// Why an `embedded-storage` device could not read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum NorError<E> {
    /// The device's own error.
    Device(E),
    /// The read ends above 4 GiB, where `ReadStorage` has no offsets.
    Beyond32Bits {
        /// Offset of the read.
        offset: u64,
    },
}

impl<E: fmt::Debug> fmt::Display for NorError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device(error) => write!(f, "{error:?}"),
            Self::Beyond32Bits { offset } => {
                write!(f, "the read at {offset} ends above 4 GiB, the device's last offset")
            }
        }
    }
}

impl<E: fmt::Debug> core::error::Error for NorError<E> {}

impl<T: ReadStorage> NorStore<'_, T> {
    /// A store of the whole of `device`.
    pub fn new(device: T) -> Self {
        Self { device, request: None }
    }

    /// Gives the device back.
    pub fn into_inner(self) -> T {
        self.device
    }

    fn read(&mut self, request: &mut ReadRequest<'_>) -> Result<(), ReadError<NorError<T::Error>>> {
        let geometry = Geometry { len: self.device.capacity() as u64, block: 1, queue_depth: 1 };
        check(&geometry, request)?;
        let offset = request.offset;
        let end = offset + request.len as u64;
        let start = u32::try_from(offset)
            .ok()
            .filter(|_| end <= 1 << 32)
            .ok_or(ReadError::Device(NorError::Beyond32Bits { offset }))?;
        self.device.read(start, target(request)?).map_err(|error| ReadError::Device(NorError::Device(error)))
    }
}

impl<'b, T> BlockStore<'b> for NorStore<'b, T>
where
    T: ReadStorage,
    T::Error: fmt::Debug,
{
    type Error = NorError<T::Error>;

    fn geometry(&self) -> Geometry {
        Geometry { len: self.device.capacity() as u64, block: 1, queue_depth: 1 }
    }

    fn submit(&mut self, request: ReadRequest<'b>) -> Result<(), ReadRequest<'b>> {
        if self.request.is_some() {
            return Err(request);
        }
        self.request = Some(request);
        Ok(())
    }

    fn poll(&mut self) -> Option<Completion<'b, Self::Error>> {
        let mut request = self.request.take()?;
        let result = self.read(&mut request);
        Some(Completion { id: request.id, buf: request.buf, result })
    }

    fn in_flight(&self) -> usize {
        usize::from(self.request.is_some())
    }
}
