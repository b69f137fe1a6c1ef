//! A block store over a SPI NOR flash chip.
//!
//! The chip is found by its JEDEC id and described by its own tables (SFDP, JESD216): capacity, address width and the
//! read command. A chip without tables is taken by the capacity code of its id.
//!
//! A read is a state machine over the port's FIFO: [`BlockStore::poll`] moves what has arrived and asks for more, and
//! never waits, so the port shifts bytes while the processor computes, as many as its FIFO holds. After every read the
//! chip is asked for its id again: a chip that has lost power answers all reads with ones, and this tells.

use core::convert::Infallible;
use core::fmt;

use forebay_storage::store::{BlockStore, Completion, Geometry, ReadError, ReadRequest};
use heapless::Deque;

use crate::app::Clock;
use crate::board::Disk;
use crate::status::{HasStatus, Status};

/// Reads that can wait for their turn.
pub const READS: usize = 8;
/// Most bytes that one call of `poll` moves.
const BURST: usize = 4096;

/// A SPI master (mode 0, most significant bit first) that shifts bytes by itself.
pub trait Port {
    /// Bytes that can be under way: sent, and not yet taken back.
    const DEPTH: usize;
    /// Selects the chip, or ends a transaction.
    fn select(&mut self, on: bool);
    /// Sends a byte. Called only while fewer than [`Self::DEPTH`] are under way.
    fn send(&mut self, byte: u8);
    /// The next byte received, if it is there: one for each byte sent.
    fn receive(&mut self) -> Option<u8>;
}

mod opcode {
    pub const READ_ID: u8 = 0x9f;
    pub const READ_TABLES: u8 = 0x5a;
    pub const READ: u8 = 0x03;
    pub const FAST_READ: u8 = 0x0b;
    /// With addresses of four bytes.
    pub const READ_4: u8 = 0x13;
    pub const FAST_READ_4: u8 = 0x0c;
}

/// Capacity that addresses of three bytes reach.
const THREE_BYTES: u64 = 1 << 24;

/// Why there is no chip to read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// No chip drives the line: the id is all zeros or all ones.
    #[error("SPI NOR: no chip answers (its id reads as {0:02x?})")]
    NoChip([u8; 3]),
    /// Neither tables nor id tell the capacity.
    #[error("SPI NOR: the chip with id {0:02x?} does not tell its capacity")]
    Unknown([u8; 3]),
    /// The port has not shifted a byte for too long.
    #[error("SPI NOR: the port does not answer")]
    Port,
}

/// How a chip is read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Chip {
    /// The JEDEC id: manufacturer, type, capacity code.
    pub id: [u8; 3],
    /// Bytes that can be read.
    pub len: u64,
    opcode: u8,
    /// Bytes of an address: 3 or 4.
    address: usize,
    /// Bytes between address and data.
    dummy: usize,
}

impl fmt::Display for Chip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SPI NOR {:02x?}, {} bytes, read by {:#04x}", self.id, self.len, self.opcode)
    }
}

/// Ids of parameter tables.
const BASIC_TABLE: u16 = 0xff00;
const FOUR_BYTE_TABLE: u16 = 0xff84;

/// The first 32-bit word of eight bytes.
fn low_word(bytes: [u8; 8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

impl Chip {
    /// From the first two words of the basic table and the first of the table of four-byte commands (JESD216): bit 0
    /// is [`opcode::READ_4`], bit 1 [`opcode::FAST_READ_4`].
    fn from_tables(id: [u8; 3], basic: u32, density: u32, four_byte: u32) -> Option<Self> {
        let bits = match density >> 31 {
            0 => u64::from(density) + 1,
            _ => 1u64.checked_shl(density & 0x7fff_ffff)?,
        };
        let len = bits / 8;
        // Bits 18:17 of the first word: three bytes of address, three or four, four only.
        let widths = basic >> 17 & 3;
        let (opcode, address, dummy) = match (len > THREE_BYTES, widths) {
            (_, 2) => (opcode::FAST_READ, 4, 1),
            (true, _) if four_byte >> 1 & 1 == 1 => (opcode::FAST_READ_4, 4, 1),
            (true, _) if four_byte & 1 == 1 => (opcode::READ_4, 4, 0),
            _ => (opcode::FAST_READ, 3, 1),
        };
        // What lies above the reach of the only command is not there.
        let len = if address == 3 { len.min(THREE_BYTES) } else { len };
        (len > 0).then_some(Self { id, len, opcode, address, dummy })
    }

    /// From the capacity code of the id, which is a power of two but for a gap after 32 MiB.
    fn from_id(id: [u8; 3]) -> Option<Self> {
        let log2 = match id[2] {
            code @ 0x10..=0x19 => code,
            code @ 0x20..=0x22 => code - 6,
            _ => return None,
        };
        let len = 1 << log2;
        let (opcode, address) = if len > THREE_BYTES { (opcode::READ_4, 4) } else { (opcode::READ, 3) };
        Some(Self { id, len, opcode, address, dummy: 0 })
    }
}

/// Most bytes before the data: command, address, dummy.
const HEADER: usize = 6;

/// One transaction: a header is sent, then bytes are taken.
#[derive(Clone, Copy, Debug)]
struct Transaction {
    header: [u8; HEADER],
    header_len: usize,
    /// Bytes of header and data.
    len: usize,
    sent: usize,
    received: usize,
}

impl Transaction {
    /// `data` bytes after `opcode`, an address of `address_len` bytes and `dummy` bytes; at most [`HEADER`] altogether.
    fn new(opcode: u8, address: u32, address_len: usize, dummy: usize, data: usize) -> Self {
        let mut header = [0; HEADER];
        header[0] = opcode;
        for (byte, shift) in header[1..].iter_mut().zip((0..address_len).rev()) {
            *byte = (address >> (8 * shift)) as u8;
        }
        let header_len = 1 + address_len + dummy;
        Self { header, header_len, len: header_len + data, sent: 0, received: 0 }
    }

    /// Sends and takes what the port can do at once, at most `burst` bytes; gives the number taken.
    fn pump<P: Port>(&mut self, port: &mut P, data: &mut [u8], burst: usize) -> usize {
        let before = self.received;
        if self.sent == 0 {
            port.select(true);
        }
        while self.received - before < burst {
            while self.sent < self.len && self.sent - self.received < P::DEPTH {
                port.send(self.header.get(self.sent).copied().unwrap_or(0));
                self.sent += 1;
            }
            if self.is_done() {
                port.select(false);
                break;
            }
            let Some(byte) = port.receive() else { break };
            if let Some(place) = self.received.checked_sub(self.header_len).and_then(|at| data.get_mut(at)) {
                *place = byte;
            }
            self.received += 1;
        }
        self.received - before
    }

    fn is_done(&self) -> bool {
        self.received == self.len
    }
}

/// What the first read in the queue is at.
#[derive(Debug)]
enum Stage {
    Start,
    Data(Transaction),
    Identity(Transaction, [u8; 3]),
}

/// A block store over one chip. Reads wait in a queue and are made one after another.
#[derive(Debug)]
pub struct SpiNor<'b, P> {
    port: P,
    chip: Chip,
    queue: Deque<ReadRequest<'b>, READS>,
    stage: Stage,
    clock: Clock,
    patience: u64,
}

impl<'b, P: Port> SpiNor<'b, P> {
    /// Finds out what chip is there. A port that shifts nothing for `patience` ticks of the clock is given up.
    pub fn new(mut port: P, clock: Clock, patience: u64) -> Result<Self, ProbeError> {
        let chip = probe(&mut port, &clock, patience)?;
        Ok(Self { port, chip, queue: Deque::new(), stage: Stage::Start, clock, patience })
    }

    /// The chip.
    pub fn chip(&self) -> &Chip {
        &self.chip
    }

    /// Moves the first read on by one burst; gives the bytes moved and, at its end, the result.
    fn advance(&mut self) -> (usize, Option<Result<(), ReadError<Infallible>>>) {
        let Some(request) = self.queue.front_mut() else { return (0, None) };
        let (offset, len) = (request.offset, request.len);
        let Some(target) = request.target() else { return (0, Some(Err(ReadError::OutOfBounds))) };
        if let Stage::Start = self.stage {
            if offset.checked_add(len as u64).is_none_or(|end| end > self.chip.len) {
                return (0, Some(Err(ReadError::OutOfBounds)));
            }
            let Chip { opcode, address, dummy, .. } = self.chip;
            self.stage = Stage::Data(Transaction::new(opcode, offset as u32, address, dummy, len));
        }
        match &mut self.stage {
            Stage::Start => (0, None),
            Stage::Data(transaction) => {
                let moved = transaction.pump(&mut self.port, target, BURST);
                if transaction.is_done() {
                    self.stage = Stage::Identity(Transaction::new(opcode::READ_ID, 0, 0, 0, 3), [0; 3]);
                }
                (moved, None)
            }
            Stage::Identity(transaction, id) => {
                let moved = transaction.pump(&mut self.port, id, BURST);
                let result = if *id == self.chip.id { Ok(()) } else { Err(ReadError::Gone) };
                (moved, transaction.is_done().then_some(result))
            }
        }
    }

    fn finish(&mut self, result: Result<(), ReadError<Infallible>>) -> Option<Completion<'b, Infallible>> {
        self.stage = Stage::Start;
        self.queue.pop_front().map(|ReadRequest { id, buf, .. }| Completion { id, buf, result })
    }
}

impl<'b, P: Port> BlockStore<'b> for SpiNor<'b, P> {
    type Error = Infallible;

    fn geometry(&self) -> Geometry {
        Geometry { len: self.chip.len, block: 1, queue_depth: READS as u16 }
    }

    /// The read waits for its turn; `poll` starts it.
    fn submit(&mut self, request: ReadRequest<'b>) -> Result<(), ReadRequest<'b>> {
        self.queue.push_back(request)
    }

    fn poll(&mut self) -> Option<Completion<'b, Infallible>> {
        let (_, result) = self.advance();
        self.finish(result?)
    }

    fn in_flight(&self) -> usize {
        self.queue.len()
    }

    /// Polls; a port that has shifted nothing for as long as the store has patience ends the read.
    fn wait(&mut self) -> Option<Completion<'b, Infallible>> {
        let mut since = (self.clock.now)();
        while !self.queue.is_empty() {
            let (moved, result) = self.advance();
            if let Some(result) = result {
                return self.finish(result);
            }
            if moved > 0 {
                since = (self.clock.now)();
            } else if (self.clock.now)().wrapping_sub(since) > self.patience {
                self.port.select(false);
                return self.finish(Err(ReadError::Gone));
            }
        }
        None
    }
}

/// A port behind which a chip is expected, as a board's disk.
#[derive(Debug)]
pub struct Flash<P>(pub P);

impl<P: Port> Disk for Flash<P> {
    type Store = SpiNor<'static, P>;
    type Error = ProbeError;
    const KIND: &'static str = "SPI NOR";

    fn bring_up(self, clock: &Clock, patience: u64) -> Result<Self::Store, ProbeError> {
        SpiNor::new(self.0, *clock, patience)
    }
}

impl HasStatus for ProbeError {
    fn status(&self) -> Status {
        match self {
            Self::NoChip(_) => Status::NoDisk,
            Self::Unknown(_) => Status::Device,
            Self::Port => Status::NoAnswer,
        }
    }
}

/// A whole transaction: fills `data` with what follows the header.
fn exchange<P: Port>(
    port: &mut P,
    mut transaction: Transaction,
    data: &mut [u8],
    clock: &Clock,
    patience: u64,
) -> Result<(), ProbeError> {
    let mut since = (clock.now)();
    while !transaction.is_done() {
        if transaction.pump(port, data, BURST) > 0 {
            since = (clock.now)();
        } else if (clock.now)().wrapping_sub(since) > patience {
            port.select(false);
            return Err(ProbeError::Port);
        }
    }
    Ok(())
}

fn probe<P: Port>(port: &mut P, clock: &Clock, patience: u64) -> Result<Chip, ProbeError> {
    let mut id = [0; 3];
    exchange(port, Transaction::new(opcode::READ_ID, 0, 0, 0, 3), &mut id, clock, patience)?;
    if id == [0; 3] || id == [0xff; 3] {
        return Err(ProbeError::NoChip(id));
    }
    let mut table = |at: u32| -> Result<[u8; 8], ProbeError> {
        let mut bytes = [0; 8];
        exchange(port, Transaction::new(opcode::READ_TABLES, at, 3, 1, 8), &mut bytes, clock, patience)?;
        Ok(bytes)
    };
    let header = table(0)?;
    let (mut basic, mut four_byte) = (None, 0);
    if header.starts_with(b"SFDP") && header[5] == 1 {
        for index in 0..=u32::from(header[6]) {
            let [low, _, major, words, at @ .., high] = table(8 + 8 * index)?;
            let at = u32::from_le_bytes([at[0], at[1], at[2], 0]);
            match u16::from_le_bytes([low, high]) {
                // Later headers of the same table are newer revisions of it.
                BASIC_TABLE if major == 1 && words >= 2 => {
                    basic = Some(table(at)?);
                    // Word 16, bit 29: there are commands of four bytes. Without a table of them, take the plainest.
                    if words >= 16 && four_byte == 0 && low_word(table(at + 60)?) >> 29 & 1 == 1 {
                        four_byte = 1;
                    }
                }
                FOUR_BYTE_TABLE if words >= 1 => four_byte = low_word(table(at)?),
                _ => {}
            }
        }
    }
    let by_tables = |basic: [u8; 8]| {
        let density = u32::from_le_bytes([basic[4], basic[5], basic[6], basic[7]]);
        Chip::from_tables(id, low_word(basic), density, four_byte)
    };
    basic.and_then(by_tables).or_else(|| Chip::from_id(id)).ok_or(ProbeError::Unknown(id))
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::collections::VecDeque;
    use std::vec;
    use std::vec::Vec;

    use super::*;

    /// A chip on a port that shifts `rate` bytes between two looks at its FIFO.
    #[derive(Debug)]
    struct Bench {
        id: [u8; 3],
        tables: Vec<u8>,
        content: Vec<u8>,
        selected: bool,
        /// Bytes of the transaction so far.
        sent: Vec<u8>,
        fifo: VecDeque<u8>,
        /// Reads of the FIFO after which nothing comes any more.
        dies_after: usize,
        /// Reads of the FIFO between which nothing is there.
        stutter: usize,
        looks: usize,
    }

    impl Bench {
        fn new(id: [u8; 3], tables: Vec<u8>, content: Vec<u8>) -> Self {
            Self {
                id,
                tables,
                content,
                selected: false,
                sent: vec![],
                fifo: VecDeque::new(),
                dies_after: usize::MAX,
                stutter: 3,
                looks: 0,
            }
        }
        /// What the chip answers to the last byte sent.
        fn answer(&self) -> u8 {
            let at = self.sent.len() - 1;
            let data = |address: usize, dummy: usize, bytes: &[u8]| -> u8 {
                let start = self.sent[1..].iter().take(address).fold(0, |a, b| a << 8 | usize::from(*b));
                at.checked_sub(1 + address + dummy).map_or(0xaa, |i| bytes.get(start + i).copied().unwrap_or(0xff))
            };
            match self.sent[0] {
                opcode::READ_ID => at.checked_sub(1).map_or(0xaa, |i| self.id[i % 3]),
                opcode::READ_TABLES => data(3, 1, &self.tables),
                opcode::READ => data(3, 0, &self.content),
                opcode::FAST_READ => data(3, 1, &self.content),
                opcode::READ_4 => data(4, 0, &self.content),
                opcode::FAST_READ_4 => data(4, 1, &self.content),
                other => panic!("command {other:#x}"),
            }
        }
    }

    impl Port for Bench {
        const DEPTH: usize = 8;
        fn select(&mut self, on: bool) {
            assert!(!on || !self.selected, "the last transaction was not ended");
            self.selected = on;
            self.sent.clear();
        }
        fn send(&mut self, byte: u8) {
            assert!(self.selected && self.fifo.len() < Self::DEPTH, "the FIFO overflows");
            self.sent.push(byte);
            let answer = self.answer();
            self.fifo.push_back(answer);
        }
        fn receive(&mut self) -> Option<u8> {
            self.looks += 1;
            if self.looks > self.dies_after || self.looks.is_multiple_of(self.stutter) {
                None
            } else {
                self.fifo.pop_front()
            }
        }
    }

    /// Ticks once a look.
    fn clock() -> Clock {
        std::thread_local!(static TICKS: core::cell::Cell<u64> = const { core::cell::Cell::new(0) });
        Clock {
            now: || {
                TICKS.set(TICKS.get() + 1);
                TICKS.get()
            },
            hertz: 1,
        }
    }

    /// Tables as a chip of `len` bytes has them: basic, and of four-byte commands where `four_byte` is not 0.
    fn tables(widths: u32, len: u64, four_byte: u32) -> Vec<u8> {
        let mut bytes = b"SFDP\x06\x01\x01\xff".to_vec();
        bytes.extend([0x00, 6, 1, 16, 0x30, 0, 0, 0xff]);
        bytes.extend([0x84, 0, 1, 2, 0x70, 0, 0, 0xff]);
        bytes.resize(0x30, 0xff);
        bytes.extend((widths << 17 | 0xffe5).to_le_bytes());
        bytes.extend(((len * 8 - 1) as u32).to_le_bytes());
        bytes.resize(0x70, 0xff);
        bytes.extend(four_byte.to_le_bytes());
        bytes.resize(0x78, 0xff);
        bytes
    }

    const ID: [u8; 3] = [0x9d, 0x70, 0x19];

    fn content() -> Vec<u8> {
        (0..40_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
    }

    fn chip(id: [u8; 3], tables: Vec<u8>) -> Result<Chip, ProbeError> {
        SpiNor::new(Bench::new(id, tables, vec![]), clock(), 100).map(|store| *store.chip())
    }

    #[test]
    fn tables_tell_capacity_and_command() {
        let read = |widths, len, four_byte| {
            let chip = chip(ID, tables(widths, len, four_byte)).unwrap();
            (chip.len, chip.opcode, chip.address, chip.dummy)
        };
        assert_eq!(read(0, 8 << 20, 0), (8 << 20, 0x0b, 3, 1));
        assert_eq!(read(1, 32 << 20, 3), (32 << 20, 0x0c, 4, 1));
        assert_eq!(read(1, 32 << 20, 1), (32 << 20, 0x13, 4, 0));
        assert_eq!(read(2, 32 << 20, 0), (32 << 20, 0x0b, 4, 1));
        // No four-byte command is told: only what three bytes reach is there.
        assert_eq!(read(1, 32 << 20, 0), (16 << 20, 0x0b, 3, 1));
        // Capacities of 2 Gbit and more are given as a power of two.
        let huge = Chip::from_tables(ID, 1 << 17, 0x8000_0000 | 33, 3).unwrap();
        assert_eq!(huge.len, 1 << 30);
        assert_eq!(Chip::from_tables(ID, 0, 0xffff_ffff, 0), None);
    }

    #[test]
    fn without_tables_the_id_tells() {
        let read = |code| chip([0x20, 0xba, code], vec![0xff; 64]).map(|c| (c.len, c.opcode));
        assert_eq!(read(0x17), Ok((8 << 20, 0x03)));
        assert_eq!(read(0x19), Ok((32 << 20, 0x13)));
        assert_eq!(read(0x20), Ok((64 << 20, 0x13)));
        assert_eq!(read(0x40), Err(ProbeError::Unknown([0x20, 0xba, 0x40])));
    }

    #[test]
    fn an_empty_socket_is_told_apart() {
        for byte in [0, 0xff] {
            assert_eq!(chip([byte; 3], vec![]), Err(ProbeError::NoChip([byte; 3])));
        }
        let mut dead = Bench::new(ID, vec![], vec![]);
        dead.dies_after = 2;
        assert_eq!(SpiNor::new(dead, clock(), 100).unwrap_err(), ProbeError::Port);
    }

    fn read(store: &mut SpiNor<'_, Bench>, offset: u64, len: usize) -> (Vec<u8>, Result<(), ReadError<Infallible>>) {
        let buf = vec![0u8; len + 7].leak();
        store.submit(ReadRequest { id: 5, offset, buf, start: 3, len }).unwrap();
        let done = store.wait().unwrap();
        assert_eq!((done.id, &done.buf[..3], &done.buf[3 + len..]), (5, &[0; 3][..], &[0; 4][..]));
        (done.buf[3..3 + len].to_vec(), done.result)
    }

    #[test]
    fn reads_are_the_chips_bytes() {
        for four_byte in [0, 1, 3] {
            let len = if four_byte == 0 { 1 << 20 } else { 32 << 20 };
            let bench = Bench::new(ID, tables(1, len, four_byte), content());
            let mut store = SpiNor::new(bench, clock(), 100).unwrap();
            for (offset, len) in [(0, 1), (1, 4096), (20_000, 12_288), (39_999, 1)] {
                let (bytes, result) = read(&mut store, offset, len);
                assert_eq!(result, Ok(()));
                assert!(bytes == content()[offset as usize..][..len], "{len} bytes at {offset}");
            }
            assert!(!store.port.selected);
            assert_eq!(read(&mut store, len - 3, 4).1, Err(ReadError::OutOfBounds));
        }
    }

    /// `poll` moves what is there and comes back; reads end in their order.
    #[test]
    fn polls_never_wait() {
        let mut bench = Bench::new(ID, tables(0, 1 << 20, 0), content());
        bench.stutter = 2;
        let mut store = SpiNor::new(bench, clock(), 100).unwrap();
        for id in 0..READS as u32 {
            store.submit(ReadRequest::whole(id, u64::from(id) * 100, vec![0; 50].leak())).unwrap();
        }
        let refused = store.submit(ReadRequest::whole(99, 0, vec![0; 50].leak()));
        assert_eq!(refused.unwrap_err().id, 99);
        let mut ended = vec![];
        for _ in 0..100_000 {
            let before = store.port.looks;
            if let Some(done) = store.poll() {
                let start = done.id as usize * 100;
                assert_eq!(done.buf, &content()[start..start + 50]);
                ended.push(done.id);
            }
            assert!(store.port.looks <= before + 2, "poll waited for the port");
        }
        assert_eq!(ended, (0..READS as u32).collect::<Vec<_>>());
        assert_eq!(store.in_flight(), 0);
    }

    #[test]
    fn a_chip_or_a_port_that_goes_away_is_noticed() {
        let mut store = SpiNor::new(Bench::new(ID, tables(0, 1 << 20, 0), content()), clock(), 100).unwrap();
        store.port.id = [0xff; 3];
        assert_eq!(read(&mut store, 0, 64).1, Err(ReadError::Gone));
        store.port.id = ID;
        assert_eq!(read(&mut store, 0, 64).1, Ok(()));
        store.port.dies_after = store.port.looks + 20;
        assert_eq!(read(&mut store, 0, 64).1, Err(ReadError::Gone));
        // It comes back.
        store.port.dies_after = usize::MAX;
        store.port.fifo.clear();
        assert_eq!(read(&mut store, 0, 64).1, Ok(()));
    }
}
