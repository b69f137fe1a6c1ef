//! A block store over virtio-blk.
//!
//! Reads are started with the driver's non-blocking calls and their end is seen by polling the used ring, so the
//! device fills buffers while the processor computes. A read is cut into requests of [`MAX_REQUEST`] bytes at most;
//! the requests of all reads in flight share the queue.
//!
//! Buffers are `'static`: whatever becomes of the store, memory that a device may still write to never comes back
//! into anybody's hands before the device has said that it is done.

use core::cell::Cell;
use core::fmt;
use core::ptr::NonNull;

use critical_section::Mutex;
use forebay_storage::store::{BlockStore, Completion, Geometry, ReadError, ReadRequest};
use heapless::{Deque, Vec};
use static_cell::{ConstStaticCell, StaticCell};
use virtio_drivers::device::blk::{BlkReq, BlkResp, SECTOR_SIZE, VirtIOBlk};
use virtio_drivers::transport::mmio::{MmioTransport, VirtIOHeader};
use virtio_drivers::transport::{DeviceType, Transport};
use virtio_drivers::{BufferDirection, Error, Hal, PAGE_SIZE, PhysAddr};

use crate::app::Clock;
use crate::board::Disk;
use crate::status::{HasStatus, Status};

/// Most bytes of one request to the device.
pub const MAX_REQUEST: usize = 128 << 10;
/// Requests in the queue at once: each takes three of the driver's 16 descriptors.
pub const REQUESTS: usize = 5;
/// Reads that can be in flight at once.
pub const READS: usize = 16;
/// Pages of queue memory for all devices together; a queue takes two, a legacy device's three.
const QUEUE_PAGES: usize = 4;

/// Memory for the queues, zeroed and handed out once.
#[repr(C, align(4096))]
struct QueueMemory([u8; QUEUE_PAGES * PAGE_SIZE]);

static QUEUE_MEMORY: ConstStaticCell<QueueMemory> = ConstStaticCell::new(QueueMemory([0; QUEUE_PAGES * PAGE_SIZE]));
/// Address and pages of what is left of the queue memory; `None` before the first call.
static QUEUE_LEFT: Mutex<Cell<Option<(usize, usize)>>> = Mutex::new(Cell::new(None));

/// Memory as boards have it that map it one to one and whose devices see the processor's caches.
#[derive(Debug)]
pub struct IdentityHal;

// SAFETY: `dma_alloc` hands each page of a static out once, so pages alias nothing, are zeroed and aligned; physical
// and virtual addresses are equal and devices are coherent with the caches, so sharing a buffer is its address.
unsafe impl Hal for IdentityHal {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let taken = critical_section::with(|cs| {
            let left = QUEUE_LEFT.borrow(cs);
            let (start, free) = left.get().unwrap_or_else(|| {
                let memory = QUEUE_MEMORY.take();
                (memory.0.as_mut_ptr().expose_provenance(), QUEUE_PAGES)
            });
            let enough = pages <= free;
            left.set(Some(if enough { (start + pages * PAGE_SIZE, free - pages) } else { (start, free) }));
            enough.then_some(start)
        });
        // Address 0 tells the driver that there is no memory.
        let start = taken.unwrap_or(0);
        let pointer = core::ptr::with_exposed_provenance_mut(start);
        (start as PhysAddr, NonNull::new(pointer).unwrap_or(NonNull::dangling()))
    }

    unsafe fn dma_dealloc(_: PhysAddr, _: NonNull<u8>, _: usize) -> i32 {
        // Boards bring their devices up once: pages are not used again, so that they stay zeroed.
        0
    }

    unsafe fn mmio_phys_to_virt(address: PhysAddr, _: usize) -> NonNull<u8> {
        let pointer = core::ptr::with_exposed_provenance_mut(address as usize);
        NonNull::new(pointer).unwrap_or(NonNull::dangling())
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        buffer.cast::<u8>().as_ptr().expose_provenance() as PhysAddr
    }

    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}

/// What the device reports.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DiskError(pub Error);

impl fmt::Display for DiskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Error::IoError => f.write_str("virtio-blk: I/O error"),
            Error::AlreadyUsed => f.write_str("virtio-blk: one store at a time"),
            error => write!(f, "virtio-blk: {error}"),
        }
    }
}

/// A request's header and status, which the device reads and writes.
#[derive(Default)]
struct Slot {
    header: BlkReq,
    status: BlkResp,
}

/// Headers and statuses live as long as the program because a device may write them late.
static SLOTS: StaticCell<[Slot; REQUESTS]> = StaticCell::new();

/// A request in the queue.
struct InQueue {
    token: u16,
    slot: usize,
    read: usize,
    /// The bytes that the device fills.
    target: NonNull<[u8]>,
}

/// A read and how far it has come.
struct Read {
    id: u32,
    buf: NonNull<[u8]>,
    /// Image offset and place in the buffer of the next byte to ask for, and bytes that are left to ask for.
    offset: u64,
    start: usize,
    left: usize,
    /// Requests in the queue.
    requests: usize,
    result: Result<(), ReadError<DiskError>>,
}

/// A block store over one virtio-blk device.
pub struct VirtioStore<T: Transport> {
    device: VirtIOBlk<IdentityHal, T>,
    slots: NonNull<[Slot; REQUESTS]>,
    free: Vec<usize, REQUESTS>,
    queue: Vec<InQueue, REQUESTS>,
    /// Reads by number; a number without a read is free.
    reads: [Option<Read>; READS],
    /// Reads that have bytes left to ask for, in order of submission: only the first can have asked for some.
    waiting: Deque<usize, READS>,
    finished: Deque<usize, READS>,
    count: usize,
    now: fn() -> u64,
    patience: u64,
}

impl<T: Transport> fmt::Debug for VirtioStore<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioStore").field("reads", &self.count).field("requests", &self.queue.len()).finish()
    }
}

impl<T: Transport> VirtioStore<T> {
    /// Brings the device up. A wait for a read gives up after `patience` ticks of the clock `now`.
    pub fn new(transport: T, now: fn() -> u64, patience: u64) -> Result<Self, DiskError> {
        let slots = SLOTS.try_init_with(Default::default).ok_or(DiskError(Error::AlreadyUsed))?;
        Ok(Self {
            device: VirtIOBlk::new(transport).map_err(DiskError)?,
            slots: NonNull::from(slots),
            free: (0..REQUESTS).collect(),
            queue: Vec::new(),
            reads: [const { None }; READS],
            waiting: Deque::new(),
            finished: Deque::new(),
            count: 0,
            now,
            patience,
        })
    }

    fn len(&self) -> u64 {
        self.device.capacity() * SECTOR_SIZE as u64
    }

    /// Why a request cannot be asked of the device.
    fn check(&self, request: &mut ReadRequest<'static>) -> Result<(), ReadError<DiskError>> {
        let (offset, len) = (request.offset, request.len as u64);
        request.target().ok_or(ReadError::OutOfBounds)?;
        if !(offset | len).is_multiple_of(SECTOR_SIZE as u64) {
            return Err(ReadError::Misaligned);
        }
        let end = offset.checked_add(len).filter(|end| *end <= self.len());
        end.map(|_| ()).ok_or(ReadError::OutOfBounds)
    }

    /// Takes back what the device is done with, then fills the queue.
    fn pump(&mut self) {
        while let Some(token) = self.device.peek_used() {
            // A token that is not ours stays where it is: the device is broken, and waiting ends by the clock.
            let Some(index) = self.queue.iter().position(|r| r.token == token) else { break };
            let request = self.queue.swap_remove(index);
            self.take_back(request);
        }
        while let (Some(&number), Some(&slot)) = (self.waiting.front(), self.free.last()) {
            let Some(read) = self.reads[number].as_mut() else { break };
            let len = read.left.min(MAX_REQUEST);
            // SAFETY: `check` has seen that start + left is inside of the buffer, which this store owns.
            let target = unsafe { read.buf.cast::<u8>().add(read.start) };
            let target = NonNull::slice_from_raw_parts(target, len);
            let sector = (read.offset / SECTOR_SIZE as u64) as usize;
            // SAFETY: the slot is free, and is not touched again before `take_back`; it lives as long as the program.
            let Slot { header, status } = unsafe { &mut *self.slots.cast::<Slot>().add(slot).as_ptr() };
            // SAFETY: header, target and status belong to this store, live as long as the program, and are not
            // touched before `take_back`; parts of one buffer do not overlap.
            let started = unsafe { self.device.read_blocks_nb(sector, header, &mut *target.as_ptr(), status) };
            match started {
                Ok(token) => {
                    self.free.pop();
                    // There is room: there are as many entries as slots.
                    let _ = self.queue.push(InQueue { token, slot, read: number, target });
                    read.requests += 1;
                    read.offset += len as u64;
                    read.start += len;
                    read.left -= len;
                }
                Err(Error::QueueFull) => break,
                Err(error) => {
                    read.result = Err(ReadError::Device(DiskError(error)));
                    read.left = 0;
                }
            }
            if read.left == 0 {
                self.waiting.pop_front();
                self.finish_if_done(number);
            }
        }
    }

    fn take_back(&mut self, request: InQueue) {
        let InQueue { token, slot, read: number, target } = request;
        // SAFETY: the device has used the request up, so header, status and target are this store's again; they are
        // what `read_blocks_nb` was given for this token.
        let result = unsafe {
            let Slot { header, status } = &mut *self.slots.cast::<Slot>().add(slot).as_ptr();
            self.device.complete_read_blocks(token, header, &mut *target.as_ptr(), status)
        };
        // There is room: the slot was taken from this list.
        let _ = self.free.push(slot);
        let Some(read) = self.reads[number].as_mut() else { return };
        read.requests -= 1;
        if let Err(error) = result {
            read.result = Err(ReadError::Device(DiskError(error)));
            if read.left > 0 {
                read.left = 0;
                self.waiting.pop_front();
            }
        }
        self.finish_if_done(number);
    }

    fn finish_if_done(&mut self, number: usize) {
        if self.reads[number].as_ref().is_some_and(|r| r.left == 0 && r.requests == 0) {
            // There is room: a read is finished once.
            let _ = self.finished.push_back(number);
        }
    }
}

impl HasStatus for DiskError {
    fn status(&self) -> Status {
        Status::Device
    }
}

impl Disk for MmioTransport<'static> {
    type Store = VirtioStore<Self>;
    type Error = DiskError;
    const KIND: &'static str = "virtio-blk";

    fn bring_up(self, clock: &Clock, patience: u64) -> Result<Self::Store, DiskError> {
        VirtioStore::new(self, clock.now, patience)
    }
}

impl<T: Transport> BlockStore<'static> for VirtioStore<T> {
    type Error = DiskError;

    fn geometry(&self) -> Geometry {
        Geometry { len: self.len(), block: SECTOR_SIZE as u32, queue_depth: READS as u16 }
    }

    fn submit(&mut self, mut request: ReadRequest<'static>) -> Result<(), ReadRequest<'static>> {
        let Some(number) = self.reads.iter().position(Option::is_none) else { return Err(request) };
        let result = self.check(&mut request);
        let left = if result.is_ok() { request.len } else { 0 };
        let ReadRequest { id, offset, buf, start, .. } = request;
        self.reads[number] = Some(Read { id, buf: NonNull::from(buf), offset, start, left, requests: 0, result });
        self.count += 1;
        if left > 0 {
            // There is room: there are as many entries as reads.
            let _ = self.waiting.push_back(number);
            self.pump();
        } else {
            self.finish_if_done(number);
        }
        Ok(())
    }

    fn poll(&mut self) -> Option<Completion<'static, DiskError>> {
        self.pump();
        let read = self.reads[self.finished.pop_front()?].take()?;
        self.count -= 1;
        // SAFETY: this is the buffer that `submit` was given for good; no request of the read is in the queue.
        let buf: &'static mut [u8] = unsafe { &mut *read.buf.as_ptr() };
        Some(Completion { id: read.id, buf, result: read.result })
    }

    fn in_flight(&self) -> usize {
        self.count
    }

    /// Polls; gives up, with `None`, when the device has not answered for as long as the store has patience.
    fn wait(&mut self) -> Option<Completion<'static, DiskError>> {
        let start = (self.now)();
        while self.count > 0 {
            if let Some(done) = self.poll() {
                return Some(done);
            }
            if (self.now)().wrapping_sub(start) > self.patience {
                return None;
            }
            core::hint::spin_loop();
        }
        None
    }
}

/// The first disk among `count` virtio-mmio devices, `stride` bytes apart from `base` on.
///
/// # Safety
/// These addresses are virtio-mmio register blocks, mapped as device memory, that nothing else uses.
pub unsafe fn first_disk(base: usize, stride: usize, count: usize) -> Option<MmioTransport<'static>> {
    (0..count).find_map(|slot| {
        let header = NonNull::new(core::ptr::with_exposed_provenance_mut::<VirtIOHeader>(base + slot * stride))?;
        // SAFETY: the caller's promise. Empty slots fail here: they have device type 0.
        let transport = unsafe { MmioTransport::new(header, stride) }.ok()?;
        (transport.device_type() == DeviceType::Block).then_some(transport)
    })
}
