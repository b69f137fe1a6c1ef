//! The block store over a card: multi-block reads from the image's partition.
//!
//! The card does one read after the other. [`SdStore`] keeps a queue of reads and, for the first one, where it is:
//! each call of `poll` looks whether the controller has come further. With DMA it fills the buffer while the processor
//! computes; without, `poll` moves the blocks that have arrived out of the controller's buffer, and the card goes on
//! by one block meanwhile. Nothing but the recovery after an error waits.
//!
//! Buffers are `'static`: if the controller cannot even be reset, what it may still write to never comes back.

use core::fmt;
use core::ptr::NonNull;

use forebay_storage::store::{BlockStore, Completion, Geometry, ReadError, ReadRequest};
use heapless::Deque;
use sdio_host::common_cmd;
use static_cell::StaticCell;

use super::card::{Card, STATUS_ERRORS};
use super::controller::{Checked, Dma, Registers, command, interrupt, reg};
use super::{BLOCK, SdError, partition};

/// Most bytes of one transfer.
pub const MAX_TRANSFER: usize = 256 << 10;
/// Reads that can be in flight at once.
pub const READS: usize = 8;

/// A row of the controller's list of buffers (ADMA2 with addresses of 32 bits): bytes and flags, address.
type Row = [u32; 2];
/// Bytes of one row; its length field has 16 bits.
const ROW_BYTES: usize = 32 << 10;
const ROWS: usize = MAX_TRANSFER / ROW_BYTES;
/// The row is valid and names data; the last one ends the list.
const ROW_DATA: u32 = 0x21;
const ROW_END: u32 = 0x02;

/// The list of buffers. Of its own cache lines, because the controller reads it behind the caches' back.
#[repr(C, align(128))]
struct Table([Row; ROWS]);

static TABLE: StaticCell<Table> = StaticCell::new();

/// A read and how far it has come.
struct Read {
    id: u32,
    buf: NonNull<[u8]>,
    /// The next byte on the card and in the buffer, and bytes that are left.
    offset: u64,
    start: usize,
    left: usize,
    result: Result<(), ReadError<SdError>>,
}

/// A transfer for the first read of the queue.
#[derive(Clone, Copy, Debug)]
struct Transfer {
    len: usize,
    phase: Phase,
    /// When the controller last came further.
    since: u64,
}

/// What the controller is to do next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// Take the card's response.
    Command,
    /// Give this many bytes more by hand.
    Data(usize),
    /// End the transfer.
    End,
}

/// A block store over the image's partition of a card.
pub struct SdStore<R> {
    card: Card<R>,
    /// Bytes from the card's first on.
    start: u64,
    len: u64,
    dma: Option<(Dma, NonNull<Table>)>,
    queue: Deque<Read, READS>,
    transfer: Option<Transfer>,
    finished: Deque<Read, READS>,
    patience: u64,
    /// The controller could not be reset with a transfer under way: nothing works any more.
    lost: bool,
}

impl<R> fmt::Debug for SdStore<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SdStore")
            .field("start", &self.start)
            .field("len", &self.len)
            .field("dma", &self.has_dma())
            .finish()
    }
}

impl<R> SdStore<R> {
    /// Whether the controller writes to memory itself.
    pub fn has_dma(&self) -> bool {
        self.dma.is_some()
    }
}

impl<R: Registers> SdStore<R> {
    /// A store over the image's partition. A read is given up when nothing has come for `patience` ticks of the
    /// controller's clock.
    ///
    /// # Errors
    /// [`SdError::NoPartition`] or [`SdError::PastEnd`], or what the card says to reading its first block.
    pub fn new(card: Card<R>, patience: u64) -> Result<Self, SdError> {
        let blocks = card.blocks();
        let mut store = Self {
            card,
            start: 0,
            len: blocks * BLOCK as u64,
            dma: None,
            queue: Deque::new(),
            transfer: None,
            finished: Deque::new(),
            patience,
            lost: false,
        };
        let mut first = [0; BLOCK];
        store.read_first(&mut first)?;
        let blocks = partition::image_blocks(&first).ok_or(SdError::NoPartition)?;
        let (start, end) = (blocks.start * BLOCK as u64, blocks.end * BLOCK as u64);
        if end > store.len {
            return Err(SdError::PastEnd { partition: end, card: store.len });
        }
        (store.start, store.len) = (start, end - start);
        if let Some(dma) = store.card.controller.dma() {
            // One store at a time has DMA; another one works without.
            store.dma = TABLE.try_init(Table([[0; 2]; ROWS])).map(|table| (dma, NonNull::from(table)));
        }
        Ok(store)
    }

    /// Reads the card's first block by hand.
    fn read_first(&mut self, block: &mut [u8; BLOCK]) -> Result<(), SdError> {
        let read = Read { id: 0, buf: NonNull::from(&mut block[..]), offset: 0, start: 0, left: BLOCK, result: Ok(()) };
        // There is room: the queue is empty.
        let _ = self.queue.push_back(read);
        let finished = loop {
            self.pump();
            if let Some(read) = self.finished.pop_front() {
                break read;
            }
        };
        match finished.result {
            Ok(()) => Ok(()),
            Err(ReadError::Device(error)) => Err(error),
            Err(_) => Err(SdError::NoAnswer),
        }
    }

    /// Why a request cannot be asked of the card.
    fn check(&self, request: &mut ReadRequest<'static>) -> Result<(), ReadError<SdError>> {
        let (offset, len) = (request.offset, request.len as u64);
        request.target().ok_or(ReadError::OutOfBounds)?;
        if !(offset | len | request.start as u64).is_multiple_of(BLOCK as u64) {
            return Err(ReadError::Misaligned);
        }
        let end = offset.checked_add(len).filter(|end| *end <= self.len);
        end.map(|_| ()).ok_or(ReadError::OutOfBounds)
    }

    /// Does what can be done without waiting.
    fn pump(&mut self) {
        while !self.queue.is_empty() && !self.lost {
            let Some(transfer) = self.transfer else {
                self.begin();
                continue;
            };
            match self.advance(transfer) {
                Ok(Some(phase)) => {
                    let since = self.card.controller.now();
                    self.transfer = Some(Transfer { phase, since, ..transfer });
                }
                // The transfer is finished.
                Ok(None) => {
                    self.transfer = None;
                    let dma = self.dma;
                    let Some(read) = self.queue.front_mut() else { return };
                    if let Some((dma, _)) = dma {
                        // What the processor fetched of these lines meanwhile is old.
                        (dma.flush)(part(read.buf, read.start, transfer.len));
                    }
                    read.offset += transfer.len as u64;
                    read.start += transfer.len;
                    read.left -= transfer.len;
                    if read.left == 0 {
                        self.finish(Ok(()));
                    }
                }
                Err(Stop::Wait) => return,
                Err(Stop::Failed(error)) => self.give_up(transfer, error),
            }
        }
    }

    /// Asks the card for the next part of the first read.
    fn begin(&mut self) {
        let Some(read) = self.queue.front() else { return };
        let len = read.left.min(MAX_TRANSFER);
        let (block, target) = (read.offset / BLOCK as u64, part(read.buf, read.start, len));
        let argument = self.card.argument(block);
        let (cmd, mut flags) = match len / BLOCK {
            1 => (common_cmd::read_single_block(argument), 0),
            _ => {
                let many = command::MULTIPLE | command::BLOCK_COUNT | command::AUTO_STOP;
                (common_cmd::read_multiple_blocks(argument), many)
            }
        };
        flags |= command::DATA | command::READ | common_cmd::R1::FLAGS;
        let controller = &mut self.card.controller;
        if let Some((dma, table)) = self.dma {
            flags |= command::DMA;
            // SAFETY: the table is this store's; the controller reads it during a transfer only, and none is under way.
            let rows = unsafe { &mut (*table.as_ptr()).0 };
            let bus = |address: *const u8| (address.addr() as u32).wrapping_add(dma.offset);
            let first = target.cast::<u8>().as_ptr();
            first.expose_provenance();
            for (i, row) in rows.iter_mut().enumerate().take(len.div_ceil(ROW_BYTES)) {
                let (from, to) = (i * ROW_BYTES, ((i + 1) * ROW_BYTES).min(len));
                let end = if to == len { ROW_END } else { 0 };
                *row = [((to - from) as u32) << 16 | ROW_DATA | end, bus(first.wrapping_add(from))];
            }
            // Nothing of the buffer is written back over what the controller writes, and the table reaches memory.
            (dma.flush)(target);
            let bytes = NonNull::slice_from_raw_parts(table.cast::<u8>(), size_of::<Table>());
            (dma.flush)(bytes);
            controller.write(reg::ADMA_ADDRESS, bus(bytes.cast::<u8>().as_ptr()));
            controller.write(reg::ADMA_ADDRESS + 4, 0);
        }
        controller.write(reg::BLOCKS, ((len / BLOCK) as u32) << 16 | BLOCK as u32);
        controller.start(cmd.cmd, cmd.arg, flags);
        let since = controller.now();
        self.transfer = Some(Transfer { len, phase: Phase::Command, since });
    }

    /// One step of a transfer: the next phase, or `None` when it is finished.
    fn advance(&mut self, transfer: Transfer) -> Result<Option<Phase>, Stop> {
        let by_hand = self.dma.is_none();
        let controller = &mut self.card.controller;
        let index = if transfer.len == BLOCK { 17 } else { 18 };
        let seen = controller.read(reg::INTERRUPT);
        if seen & interrupt::ERROR != 0 {
            return Err(Stop::Failed(SdError::Command { index, errors: (seen >> 16) as u16 }));
        }
        match transfer.phase {
            Phase::Command if seen & interrupt::COMMAND != 0 => {
                controller.write(reg::INTERRUPT, interrupt::COMMAND);
                let status = controller.read(reg::RESPONSE);
                if status & STATUS_ERRORS != 0 {
                    return Err(Stop::Failed(SdError::Refused { index, status }));
                }
                Ok(Some(if by_hand { Phase::Data(transfer.len) } else { Phase::End }))
            }
            Phase::Data(0) => Ok(Some(Phase::End)),
            Phase::Data(left) if seen & interrupt::READ_READY != 0 => {
                controller.write(reg::INTERRUPT, interrupt::READ_READY);
                let before = controller.now();
                let Some(read) = self.queue.front() else { return Err(Stop::Wait) };
                let block = part(read.buf, read.start + transfer.len - left, BLOCK).cast::<[u8; 4]>();
                for i in 0..BLOCK / 4 {
                    let word = controller.read(reg::DATA).to_le_bytes();
                    // SAFETY: within the part of the buffer that is read, which this store owns.
                    unsafe { block.add(i).write(word) };
                }
                // A controller may also hold up the bus instead of saying that it has no data.
                if controller.now().wrapping_sub(before) > self.patience {
                    return Err(Stop::Failed(SdError::NoAnswer));
                }
                Ok(Some(Phase::Data(left - BLOCK)))
            }
            Phase::End if seen & interrupt::TRANSFER != 0 => {
                controller.write(reg::INTERRUPT, interrupt::TRANSFER);
                Ok(None)
            }
            _ if controller.now().wrapping_sub(transfer.since) > self.patience => Err(Stop::Failed(SdError::NoAnswer)),
            _ => Err(Stop::Wait),
        }
    }

    /// Ends a failed transfer and its read, and makes controller and card ready for another one.
    fn give_up(&mut self, transfer: Transfer, error: SdError) {
        let controller = &mut self.card.controller;
        let mut ready = controller.reset_lines();
        if ready.is_ok() && transfer.phase != Phase::Command {
            // The card may still be sending. If it is not, it does not know this command now, which is as good.
            let stopped = controller.command_busy(common_cmd::stop_transmission());
            if matches!(stopped, Err(SdError::Controller(_))) {
                ready = controller.reset_lines();
            }
        }
        self.transfer = None;
        match ready {
            Ok(()) => {
                let gone = error == SdError::NoAnswer;
                self.finish(Err(if gone { ReadError::Gone } else { ReadError::Device(error) }));
            }
            // A controller that moves data by hand has nothing of the buffer.
            Err(_) if self.dma.is_none() => {
                while !self.queue.is_empty() {
                    self.finish(Err(ReadError::Gone));
                }
                self.lost = true;
            }
            Err(_) => self.lost = true,
        }
    }

    /// Ends the first read of the queue.
    fn finish(&mut self, result: Result<(), ReadError<SdError>>) {
        if let Some(read) = self.queue.pop_front() {
            // There is room: `submit` keeps queue and finished reads together below `READS`.
            let _ = self.finished.push_back(Read { result, ..read });
        }
    }
}

/// Why a transfer does not advance.
enum Stop {
    /// Nothing has come yet.
    Wait,
    Failed(SdError),
}

/// `buf[start..start + len]`, which is inside.
fn part(buf: NonNull<[u8]>, start: usize, len: usize) -> NonNull<[u8]> {
    debug_assert!(start + len <= buf.len());
    // SAFETY: `check` has seen that the read's range is inside of its buffer; parts are inside of that.
    NonNull::slice_from_raw_parts(unsafe { buf.cast::<u8>().add(start) }, len)
}

impl<R: Registers> BlockStore<'static> for SdStore<R> {
    type Error = SdError;

    fn geometry(&self) -> Geometry {
        Geometry { len: self.len, block: BLOCK as u32, queue_depth: READS as u16 }
    }

    fn submit(&mut self, mut request: ReadRequest<'static>) -> Result<(), ReadRequest<'static>> {
        if self.in_flight() == READS {
            return Err(request);
        }
        let result = if self.lost { Err(ReadError::Gone) } else { self.check(&mut request) };
        let ReadRequest { id, offset, buf, start, len } = request;
        // An offset that was refused may be anything.
        let (offset, left) = if result.is_ok() { (self.start + offset, len) } else { (offset, 0) };
        let read = Read { id, buf: NonNull::from(buf), offset, start, left, result };
        // There is room in both: together they hold fewer than `READS`.
        let _ = if left > 0 { self.queue.push_back(read) } else { self.finished.push_back(read) };
        // Asking is quick; what comes is taken by `poll`.
        if self.transfer.is_none() && !self.lost {
            self.begin();
        }
        Ok(())
    }

    fn poll(&mut self) -> Option<Completion<'static, SdError>> {
        self.pump();
        let read = self.finished.pop_front()?;
        // SAFETY: this is the buffer that `submit` was given for good; nothing writes to it any more.
        let buf: &'static mut [u8] = unsafe { &mut *read.buf.as_ptr() };
        Some(Completion { id: read.id, buf, result: read.result })
    }

    fn in_flight(&self) -> usize {
        self.queue.len() + self.finished.len()
    }

    /// Polls; `None` if the controller keeps buffers that it may still write to.
    fn wait(&mut self) -> Option<Completion<'static, SdError>> {
        while self.in_flight() > 0 {
            if let Some(done) = self.poll() {
                return Some(done);
            }
            if self.lost {
                return None;
            }
            core::hint::spin_loop();
        }
        None
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::boxed::Box;
    use std::vec;
    use std::vec::Vec;

    use super::super::controller::Controller;
    use super::super::simulated::{CLOCK, Faults, Simulated, WIRING};
    use super::*;

    /// First block and blocks of the image's partition.
    const FIRST: usize = 40;
    const COUNT: usize = 1500;
    /// Ticks.
    const PATIENCE: u64 = 5000;

    /// A card of 1 MiB whose bytes tell their place.
    fn content() -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..1 << 20).map(|i: u32| (i ^ i >> 8 ^ i >> 16) as u8).collect();
        bytes[446..512].fill(0);
        bytes[446 + 4] = partition::IMAGE_KIND;
        bytes[446 + 8..][..4].copy_from_slice(&(FIRST as u32).to_le_bytes());
        bytes[446 + 12..][..4].copy_from_slice(&(COUNT as u32).to_le_bytes());
        bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
        bytes
    }

    fn open(simulated: Simulated) -> Result<SdStore<Simulated>, SdError> {
        SdStore::new(Card::identify(Controller::new(simulated, WIRING, CLOCK))?, PATIENCE)
    }

    fn store(faults: Faults) -> SdStore<Simulated> {
        // The first block is read in peace.
        let mut store = open(Simulated::new(content(), Faults::default())).unwrap();
        store.card.controller.registers_mut().faults = faults;
        store
    }

    fn buffer(len: usize) -> &'static mut [u8] {
        Box::leak(vec![0xee; len].into_boxed_slice())
    }

    #[test]
    fn reads_are_the_partitions_bytes() {
        for high_capacity in [true, false] {
            let mut simulated = Simulated::new(content(), Faults { latency: 3, ..Faults::default() });
            simulated.high_capacity = high_capacity;
            let mut store = open(simulated).unwrap();
            assert_eq!(store.geometry(), Geometry { len: (COUNT * BLOCK) as u64, block: 512, queue_depth: 8 });
            let want = &content()[FIRST * BLOCK..][..COUNT * BLOCK];
            // One block; several; more than one transfer holds; the last block.
            let ranges = [(0, 1), (3, 7), (1, 1200), (COUNT - 1, 1)];
            for (i, (first, count)) in ranges.into_iter().enumerate() {
                let (start, len) = (BLOCK, count * BLOCK);
                let buf = buffer(len + 2 * BLOCK);
                let request = ReadRequest { id: i as u32, offset: (first * BLOCK) as u64, buf, start, len };
                store.submit(request).unwrap();
            }
            assert_eq!(store.in_flight(), 4);
            for (i, (first, count)) in ranges.into_iter().enumerate() {
                let done = store.wait().unwrap();
                assert_eq!((done.id, done.result), (i as u32, Ok(())));
                let (before, rest) = done.buf.split_at(BLOCK);
                let (middle, after) = rest.split_at(count * BLOCK);
                assert_eq!(middle, &want[first * BLOCK..][..count * BLOCK]);
                assert!(before.iter().chain(after).all(|b| *b == 0xee), "bytes around the range were touched");
            }
            assert!(store.wait().is_none());
        }
    }

    #[test]
    fn poll_does_not_wait() {
        let mut store = store(Faults { latency: 2, ..Faults::default() });
        let len = 8 * BLOCK;
        store.submit(ReadRequest::whole(1, 0, buffer(len))).unwrap();
        let mut polls = 1;
        let done = loop {
            polls += 1;
            if let Some(done) = store.poll() {
                break done;
            }
        };
        assert_eq!(done.buf, &content()[FIRST * BLOCK..][..len]);
        assert!(polls >= 8, "{polls} polls: one of them waited for the card");
    }

    #[test]
    fn what_cannot_be_asked_is_refused() {
        let mut store = store(Faults::default());
        let end = (COUNT * BLOCK) as u64;
        for (offset, len, start, want) in [
            (1, BLOCK, 0, ReadError::Misaligned),
            (0, 100, 0, ReadError::Misaligned),
            (0, BLOCK, 8, ReadError::Misaligned),
            (end, BLOCK, 0, ReadError::OutOfBounds),
            (0, 8 * BLOCK, BLOCK, ReadError::OutOfBounds),
            (u64::MAX - 511, BLOCK, 0, ReadError::OutOfBounds),
        ] {
            store.submit(ReadRequest { id: 9, offset, buf: buffer(8 * BLOCK), start, len }).unwrap();
            assert_eq!(store.wait().unwrap().result, Err(want), "{offset} {len} {start}");
        }
        for id in 0..READS as u32 {
            store.submit(ReadRequest::whole(id, 0, buffer(BLOCK))).unwrap();
        }
        assert_eq!(store.submit(ReadRequest::whole(99, 0, buffer(BLOCK))).unwrap_err().id, 99);
    }

    #[test]
    fn a_failed_read_does_not_fail_the_next() {
        let mut store = store(Faults { bad_crcs: 1, ..Faults::default() });
        for id in [1, 2] {
            store.submit(ReadRequest::whole(id, 0, buffer(2 * BLOCK))).unwrap();
        }
        let crc = SdError::Command { index: 18, errors: 1 << 5 };
        assert_eq!(store.wait().unwrap().result, Err(ReadError::Device(crc)));
        assert_eq!(store.wait().unwrap().result, Ok(()));
        store.card.controller.registers_mut().faults.status = 1 << 31;
        store.submit(ReadRequest::whole(3, 0, buffer(BLOCK))).unwrap();
        let refused = SdError::Refused { index: 17, status: 1 << 31 };
        assert_eq!(store.wait().unwrap().result, Err(ReadError::Device(refused)));
    }

    #[test]
    fn a_card_that_stops_answering_is_given_up() {
        let mut store = store(Faults { silent_from: Some(3), ..Faults::default() });
        store.submit(ReadRequest::whole(1, 0, buffer(8 * BLOCK))).unwrap();
        store.submit(ReadRequest::whole(2, 0, buffer(2 * BLOCK))).unwrap();
        assert_eq!(store.wait().unwrap().result, Err(ReadError::Gone));
        // The transfer was stopped, and the card is asked again.
        assert_eq!(store.card.controller.registers_mut().commands.last(), Some(&18));
        assert_eq!(store.wait().unwrap().result, Ok(()));
        // A controller that cannot be reset either ends everything, and gives the buffers back.
        store.card.controller.registers_mut().faults.no_reset = true;
        for id in [3, 4] {
            store.submit(ReadRequest::whole(id, 0, buffer(8 * BLOCK))).unwrap();
        }
        for id in [3, 4] {
            let done = store.wait().unwrap();
            assert_eq!((done.id, done.result), (id, Err(ReadError::Gone)));
        }
        store.submit(ReadRequest::whole(5, 0, buffer(BLOCK))).unwrap();
        assert_eq!(store.wait().unwrap().result, Err(ReadError::Gone));
    }

    #[test]
    fn a_slot_without_a_good_card_says_so() {
        let failure = |content: Vec<u8>, faults| open(Simulated::new(content, faults)).unwrap_err();
        assert_eq!(failure(content(), Faults { absent: true, ..Faults::default() }), SdError::NoCard);
        assert_eq!(failure(content(), Faults { busy: true, ..Faults::default() }), SdError::NotReady);
        let silent = Faults { silent_from: Some(0), ..Faults::default() };
        assert_eq!(failure(content(), silent), SdError::NoAnswer);
        assert_eq!(failure(vec![0; 1 << 20], Faults::default()), SdError::NoPartition);
        let short = content()[..512 << 10].to_vec();
        let (partition, card) = (((FIRST + COUNT) * BLOCK) as u64, 512 << 10);
        assert_eq!(failure(short, Faults::default()), SdError::PastEnd { partition, card });
    }
}
