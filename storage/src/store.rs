//! The block-store trait.

use core::fmt;

/// What a store asks of a request, and what it holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Geometry {
    /// Bytes that can be read.
    pub len: u64,
    /// Offset, length and address of a request must be multiples of this power of two (1: no rule).
    pub block: u32,
    /// Reads that can usefully be in flight at once.
    pub queue_depth: u16,
}

/// A read of `len` bytes from `offset` into `buf[start..start + len]`. The buffer belongs to the request until it
/// comes back; its other bytes keep their value, so a unit's missing planes can be read behind those it has.
#[derive(Debug)]
pub struct ReadRequest<'b> {
    /// The caller's name for the read; comes back with its completion.
    pub id: u32,
    /// Byte offset from the start of the store.
    pub offset: u64,
    /// The buffer.
    pub buf: &'b mut [u8],
    /// First byte of the buffer that is filled.
    pub start: usize,
    /// Bytes that are filled, all of them, or the read fails.
    pub len: usize,
}

impl<'b> ReadRequest<'b> {
    /// A read that fills the whole of `buf`.
    pub fn whole(id: u32, offset: u64, buf: &'b mut [u8]) -> Self {
        let len = buf.len();
        Self { id, offset, buf, start: 0, len }
    }

    /// The bytes to fill; `None` if the range is not inside the buffer.
    pub fn target(&mut self) -> Option<&mut [u8]> {
        self.buf.get_mut(self.start..self.start.checked_add(self.len)?)
    }
}

/// A finished read.
#[derive(Debug)]
pub struct Completion<'b, E> {
    /// The request's id.
    pub id: u32,
    /// The request's buffer; its content is defined only if `result` is `Ok`.
    pub buf: &'b mut [u8],
    /// What became of it.
    pub result: Result<(), ReadError<E>>,
}

/// Why a read failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum ReadError<E> {
    /// The device reported an error.
    Device(E),
    /// The request reaches past the end of the store.
    OutOfBounds,
    /// Offset, length or address is not a multiple of the block.
    Misaligned,
    /// The device returned fewer bytes than asked.
    Short {
        /// Bytes that did arrive.
        got: u64,
    },
    /// The device stopped answering or lost power.
    Gone,
}

impl<E: fmt::Display> fmt::Display for ReadError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device(e) => write!(f, "the device reported an error: {e}"),
            Self::OutOfBounds => write!(f, "the read reaches past the end of the store"),
            Self::Misaligned => write!(f, "the read is not aligned to the device's block"),
            Self::Short { got } => write!(f, "short read: only {got} bytes arrived"),
            Self::Gone => write!(f, "the device stopped answering"),
        }
    }
}

/// A device of bytes that is read asynchronously into buffers it owns meanwhile.
///
/// Reads may complete in any order. `submit` and `poll` never block.
pub trait BlockStore<'b> {
    /// The device's own error.
    type Error: fmt::Debug + fmt::Display;

    /// Size, alignment and depth; constant for the life of the store.
    fn geometry(&self) -> Geometry;

    /// All bytes of the device, if the processor can read them where they are, for as long as the store's buffers live:
    /// then nothing need be read. A layer over a store that is to see reads leaves this out.
    fn mapped(&self) -> Option<&'b [u8]> {
        None
    }

    /// Starts a read. Gives the request back if no more reads can be in flight; errors come with completions.
    fn submit(&mut self, request: ReadRequest<'b>) -> Result<(), ReadRequest<'b>>;

    /// A finished read, if there is one.
    fn poll(&mut self) -> Option<Completion<'b, Self::Error>>;

    /// Reads submitted and not yet returned by `poll`.
    fn in_flight(&self) -> usize;

    /// Blocks until a read has finished; `None` if none is in flight.
    fn wait(&mut self) -> Option<Completion<'b, Self::Error>> {
        while self.in_flight() > 0 {
            if let Some(done) = self.poll() {
                return Some(done);
            }
            core::hint::spin_loop();
        }
        None
    }
}
