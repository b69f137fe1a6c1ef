//! The stores: each returns the right bytes in the right place, and refuses what it must.

use core::convert::Infallible;

use embedded_storage::ReadStorage;
use forebay_storage::store::{BlockStore, Completion, ReadError, ReadRequest};
use forebay_storage::{IoStore, MAX_DEPTH, MemoryStore, NorError, NorStore};

fn content(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 253) as u8).collect()
}

/// Reads through `store` at many offsets and lengths, as many at once as it takes, and compares; then everything
/// a store must refuse. `reads` are multiples of the store's block, and `buffers` aligned to it.
fn exercise<'b, S: BlockStore<'b>>(store: &mut S, content: &[u8], reads: &[(usize, usize)], buffers: &'b mut [u8]) {
    let depth = usize::from(store.geometry().queue_depth);
    let block = store.geometry().block as usize;
    assert_eq!(store.geometry().len, content.len() as u64);
    assert!(store.poll().is_none() && store.wait().is_none());

    let size = reads.iter().map(|read| read.1).max().unwrap() + 2 * block;
    let mut free: Vec<&'b mut [u8]> = buffers.chunks_exact_mut(size).take(depth).collect();
    assert!(!free.is_empty());
    let limit = free.len();
    let mut left: Vec<usize> = (0..reads.len()).rev().collect();
    let mut flying = 0;
    while !left.is_empty() || flying > 0 {
        if let (Some(&id), Some(buf)) = (left.last(), free.pop()) {
            left.pop();
            let (offset, len) = reads[id];
            buf.fill(0x5a);
            store
                .submit(ReadRequest { id: id as u32, offset: offset as u64, buf, start: block, len })
                .unwrap_or_else(|_| panic!("refused with {flying} of {limit} in flight"));
            flying += 1;
            assert_eq!(store.in_flight(), flying);
            continue;
        }
        let Completion { id, buf, result } = store.wait().unwrap();
        flying -= 1;
        let (offset, len) = reads[id as usize];
        assert!(result.is_ok(), "{result:?}");
        assert!(buf[block..block + len] == content[offset..offset + len], "read {id}");
        // Bytes around the range keep their value.
        assert!(buf[..block].iter().chain(&buf[block + len..]).all(|&byte| byte == 0x5a));
        free.push(buf);
    }

    let mut buf = free.pop().unwrap();
    let whole = buf.len();
    let end = content.len() as u64;
    let block64 = block as u64;
    for (offset, start, len) in [
        (end, 0, block),
        (end - block64, 0, 2 * block),
        (0u64.wrapping_sub(block64), 0, block),
        (0, whole, block),
        (0, usize::MAX, 2),
        (0, 0, whole + block),
    ] {
        store.submit(ReadRequest { id: 99, offset, buf, start, len }).unwrap();
        let done = store.wait().unwrap();
        assert!(matches!(done.result, Err(ReadError::OutOfBounds)), "{offset} {start} {len}: {:?}", done.result);
        buf = done.buf;
    }
    if block > 1 {
        for (offset, start, len) in [(1, 0, block), (0, 1, block), (0, 0, block - 1)] {
            store.submit(ReadRequest { id: 99, offset, buf, start, len }).unwrap();
            let done = store.wait().unwrap();
            assert!(matches!(done.result, Err(ReadError::Misaligned)));
            buf = done.buf;
        }
    }
    // Nothing at all is a read too.
    store.submit(ReadRequest { id: 5, offset: end, buf, start: 0, len: 0 }).unwrap();
    assert!(store.wait().unwrap().result.is_ok());
    assert_eq!(store.in_flight(), 0);
}

fn some_reads(len: usize) -> Vec<(usize, usize)> {
    let mut reads = vec![(0, 1), (0, len.min(3000)), (len - 1, 1), (len - 1000, 1000)];
    reads.extend((0..100).map(|i| ((i * 977) % (len - 2000), i * 17 % 2000)));
    reads
}

#[test]
fn memory() {
    let content = content(50_000);
    let mut buffers = vec![0; 100_000];
    exercise(&mut MemoryStore::new(&content), &content, &some_reads(content.len()), &mut buffers);
    let mut buffers = vec![0; 100_000];
    exercise(&mut MemoryStore::with_depth(&content, 1), &content, &some_reads(content.len()), &mut buffers);
}

#[test]
fn memory_takes_as_many_reads_as_it_says() {
    let content = content(100);
    for (asked, depth) in [(0, 1), (1, 1), (3, 3), (u16::MAX, MAX_DEPTH)] {
        let mut buffers = [0; 2 * MAX_DEPTH];
        let mut buffers = buffers.chunks_exact_mut(1);
        let mut store = MemoryStore::with_depth(&content, asked);
        assert_eq!(usize::from(store.geometry().queue_depth), depth);
        for id in 0..depth as u32 {
            store.submit(ReadRequest::whole(id, u64::from(id % 100), buffers.next().unwrap())).unwrap();
        }
        let refused = store.submit(ReadRequest::whole(7, 8, buffers.next().unwrap())).unwrap_err();
        assert_eq!((refused.id, refused.offset, refused.len, refused.buf.len()), (7, 8, 1, 1));
        for id in 0..depth as u32 {
            let done = store.poll().unwrap();
            assert_eq!((done.id, done.buf[0]), (id, content[id as usize % 100]));
        }
        assert!(store.poll().is_none());
    }
}

/// A reader that hands out at most 100 bytes at a time, ends early, and fails at one offset.
struct Slow<'c> {
    content: &'c [u8],
    at: usize,
    end: usize,
}

impl embedded_io::ErrorType for Slow<'_> {
    type Error = embedded_io::ErrorKind;
}

impl embedded_io::Read for Slow<'_> {
    fn read(&mut self, buf: &mut [u8]) -> Result<usize, Self::Error> {
        if self.at == 666 {
            return Err(embedded_io::ErrorKind::Other);
        }
        let n = buf.len().min(100).min(self.end.saturating_sub(self.at));
        buf[..n].copy_from_slice(&self.content[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}

impl embedded_io::Seek for Slow<'_> {
    fn seek(&mut self, to: embedded_io::SeekFrom) -> Result<u64, Self::Error> {
        match to {
            embedded_io::SeekFrom::Start(at) => self.at = at as usize,
            embedded_io::SeekFrom::End(back) => self.at = self.content.len().checked_add_signed(back as isize).unwrap(),
            embedded_io::SeekFrom::Current(by) => self.at = self.at.checked_add_signed(by as isize).unwrap(),
        }
        Ok(self.at as u64)
    }
}

#[test]
fn embedded_io() {
    let content = content(50_000);
    let mut buffers = vec![0; 100_000];
    let mut store = IoStore::new(Slow { content: &content, at: 3, end: 50_000 }).unwrap();
    exercise(&mut store, &content, &some_reads(content.len()), &mut buffers);
    assert_eq!(store.into_inner().content.len(), 50_000);

    let (mut one, mut two) = ([0; 500], [0; 1]);
    let mut store = IoStore::new(Slow { content: &content, at: 0, end: 1000 }).unwrap();
    store.submit(ReadRequest::whole(1, 750, &mut one)).unwrap();
    assert!(store.submit(ReadRequest::whole(2, 666, &mut two)).is_err());
    let done = store.wait().unwrap();
    assert_eq!((done.id, done.result), (1, Err(ReadError::Short { got: 250 })));
    store.submit(ReadRequest::whole(3, 666, done.buf)).unwrap();
    assert_eq!(store.wait().unwrap().result, Err(ReadError::Device(embedded_io::ErrorKind::Other)));
}

/// NOR flash that claims `capacity` bytes, of which all are content, repeated.
struct Nor<'c> {
    content: &'c [u8],
    capacity: usize,
}

impl ReadStorage for Nor<'_> {
    type Error = &'static str;

    fn read(&mut self, offset: u32, bytes: &mut [u8]) -> Result<(), Self::Error> {
        if offset == 666 {
            return Err("bus fault");
        }
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = self.content[(offset as usize + i) % self.content.len()];
        }
        Ok(())
    }

    fn capacity(&self) -> usize {
        self.capacity
    }
}

#[test]
fn nor() {
    let content = content(50_000);
    let mut buffers = vec![0; 100_000];
    let mut store = NorStore::new(Nor { content: &content, capacity: content.len() });
    exercise(&mut store, &content, &some_reads(content.len()), &mut buffers);

    let mut buf = [0; 16];
    store.submit(ReadRequest::whole(0, 666, &mut buf)).unwrap();
    let error = store.wait().unwrap().result.unwrap_err();
    assert_eq!(error, ReadError::Device(NorError::Device("bus fault")));
    assert_eq!(error.to_string(), "the device reported an error: \"bus fault\"");
}

#[test]
#[cfg(target_pointer_width = "64")]
fn nor_above_32_bits() {
    let content = content(64);
    let mut buf = [0; 16];
    let mut buf = &mut buf[..];
    let mut store = NorStore::new(Nor { content: &content, capacity: 8 << 30 });
    for (offset, refused) in [((4 << 30) - 16, false), ((4 << 30) - 15, true), (4 << 30, true), (5 << 30, true)] {
        store.submit(ReadRequest::whole(0, offset, buf)).unwrap();
        let done = store.wait().unwrap();
        let expected = if refused { Err(ReadError::Device(NorError::Beyond32Bits { offset })) } else { Ok(()) };
        assert_eq!(done.result, expected, "{offset}");
        buf = done.buf;
    }
    assert_eq!(buf[..], content[48..]);
}

#[test]
fn errors_say_what_happened() {
    let words = |error: ReadError<Infallible>| error.to_string();
    assert_eq!(words(ReadError::Short { got: 3 }), "short read: only 3 bytes arrived");
    assert_eq!(
        NorError::<()>::Beyond32Bits { offset: 5 }.to_string(),
        "the read at 5 ends above 4 GiB, the device's last offset"
    );
}

#[cfg(feature = "std")]
mod file {
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicU32, Ordering};

    use forebay_storage::FileStore;

    use super::*;

    /// A file of this content that is gone when the test is over.
    struct Temporary(PathBuf);

    impl Temporary {
        fn new(content: &[u8]) -> Self {
            static COUNT: AtomicU32 = AtomicU32::new(0);
            let number = COUNT.fetch_add(1, Ordering::Relaxed);
            let name = format!("forebay-store-{}-{number}", std::process::id());
            // Beside the build, which is on a disk more often than the system's temporary folder.
            let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
            std::fs::write(&path, content).unwrap();
            Self(path)
        }
    }

    impl Drop for Temporary {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    /// Part of `storage` that starts at a multiple of 4096.
    fn aligned(storage: &mut [u8]) -> &mut [u8] {
        let skip = storage.as_ptr().addr().wrapping_neg() % 4096;
        &mut storage[skip..]
    }

    fn pages(len: usize) -> Vec<(usize, usize)> {
        let pages = len / 4096;
        (0..200).map(|i| (i * 37 % (pages - 8) * 4096, (i % 8 + 1) * 4096)).collect()
    }

    #[test]
    fn direct() {
        let content = content(256 * 4096);
        let file = Temporary::new(&content);
        for depth in [1, 4, 16] {
            let mut buffers = vec![0; 16 * 10 * 4096 + 4096];
            std::thread::scope(|scope| {
                let mut store = FileStore::open_in(scope, &file.0, depth).unwrap();
                assert_eq!(store.geometry().queue_depth, depth);
                assert_eq!(store.geometry().block, if store.is_direct() { 4096 } else { 1 });
                exercise(&mut store, &content, &pages(content.len()), aligned(&mut buffers));
            });
        }
    }

    #[test]
    fn cached() {
        let content = content(50_000);
        let file = Temporary::new(&content);
        let mut buffers = vec![0; 100_000];
        std::thread::scope(|scope| {
            let mut store = FileStore::open_cached_in(scope, &file.0, 4).unwrap();
            assert!(!store.is_direct());
            exercise(&mut store, &content, &some_reads(content.len()), &mut buffers);
        });
    }

    /// A length that direct reads cannot reach the end of.
    #[test]
    fn an_odd_length_is_read_through_the_cache() {
        let content = content(50_000);
        let file = Temporary::new(&content);
        let mut buffers = vec![0; 100_000];
        std::thread::scope(|scope| {
            let mut store = FileStore::open_in(scope, &file.0, 2).unwrap();
            assert!(!store.is_direct());
            exercise(&mut store, &content, &some_reads(content.len()), &mut buffers);
        });
    }

    #[test]
    fn a_file_that_shrinks_reads_short() {
        let file = Temporary::new(&content(8192));
        let mut buffer = vec![0; 8192];
        std::thread::scope(|scope| {
            let mut store = FileStore::open_cached_in(scope, &file.0, 1).unwrap();
            std::fs::write(&file.0, [1; 5000]).unwrap();
            store.submit(ReadRequest::whole(0, 0, &mut buffer)).unwrap();
            assert!(matches!(store.wait().unwrap().result, Err(ReadError::Short { got: 5000 })));
        });
    }

    #[test]
    fn missing_files_are_an_error() {
        std::thread::scope(|scope| {
            for open in [FileStore::open_in, FileStore::open_cached_in] {
                let error = open(scope, "no/such/image.fby", 1).unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
            }
        });
    }

    /// The scope ends, and the buffers can be used again, whatever was in flight.
    #[test]
    fn dropped_with_reads_in_flight() {
        let content = content(256 * 4096);
        let file = Temporary::new(&content);
        let mut storage = vec![0; 33 * 16 * 4096];
        for round in 0..20 {
            std::thread::scope(|scope| {
                let mut store = FileStore::open_in(scope, &file.0, 16).unwrap();
                let buffers = aligned(&mut storage).chunks_exact_mut(16 * 4096);
                for (id, buf) in buffers.take(16).enumerate() {
                    store.submit(ReadRequest::whole(id as u32, id as u64 * 4096, buf)).unwrap();
                }
                for _ in 0..round % 5 {
                    assert!(store.wait().unwrap().result.is_ok());
                }
                drop(store);
                // The threads have ended before the scope does: a second store works at once.
                drop(FileStore::open_in(scope, &file.0, 1).unwrap());
            });
            storage.fill(0);
        }
    }
}
