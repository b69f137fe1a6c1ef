//! A store over a file, read by threads.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Scope;

use heapless::Deque;

use crate::pending::{MAX_DEPTH, check, clamp_depth, target};
use crate::store::{BlockStore, Completion, Geometry, ReadError, ReadRequest};

/// Alignment of direct reads: the page of the kernels and the sector of the disks that matter.
const DIRECT_BLOCK: u32 = 4096;

/// How a file's bytes come in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mode {
    /// From the device into the buffer (`O_DIRECT`).
    Direct,
    /// Through the page cache, which is told to forget them.
    Forgetting,
    /// Through the page cache.
    Cached,
}

/// A file, read by as many threads as reads may be in flight.
///
/// The threads live in a [`std::thread::scope`], so the buffers need not be `'static`. No read allocates. Dropping
/// the store drops the reads that have not started, lets those that have finish, and ends the threads.
#[derive(Debug)]
pub struct FileStore<'b> {
    shared: Arc<Shared<'b>>,
    geometry: Geometry,
    mode: Mode,
    in_flight: usize,
}

#[derive(Debug)]
struct Shared<'b> {
    state: Mutex<State<'b>>,
    /// There are requests, or the store is closed.
    work: Condvar,
    /// There are completions, or a thread has ended.
    ready: Condvar,
}

#[derive(Debug)]
struct State<'b> {
    requests: Deque<ReadRequest<'b>, MAX_DEPTH>,
    completions: Deque<Completion<'b, io::Error>, MAX_DEPTH>,
    threads: usize,
    closed: bool,
}

impl<'b> FileStore<'b> {
    /// Opens `path` past the page cache, to be read by `depth` threads of `scope` (clamped to 1 to [`MAX_DEPTH`]).
    ///
    /// On Linux that is `O_DIRECT`, with an alignment of 4096 bytes. Where the file system has no direct reads, or
    /// the file's length is not a multiple of 4096, and on other systems, reads go through the page cache, without
    /// an alignment rule; on Linux it is told to drop what was read. [`is_direct`](Self::is_direct) says which it is.
    ///
    /// # Errors
    /// If the file cannot be opened or a thread cannot be started.
    pub fn open_in<'scope, 'env>(
        scope: &'scope Scope<'scope, 'env>,
        path: impl AsRef<Path>,
        depth: u16,
    ) -> io::Result<Self>
    where
        'b: 'scope,
    {
        if let Some(file) = sys::open_direct(path.as_ref())? {
            return Self::start(scope, file, depth, Mode::Direct);
        }
        Self::start(scope, File::open(path)?, depth, Mode::Forgetting)
    }

    /// Opens `path` to be read through the page cache, without an alignment rule: for images with a page below 4096
    /// bytes, and where the cache is welcome.
    ///
    /// # Errors
    /// If the file cannot be opened or a thread cannot be started.
    pub fn open_cached_in<'scope, 'env>(
        scope: &'scope Scope<'scope, 'env>,
        path: impl AsRef<Path>,
        depth: u16,
    ) -> io::Result<Self>
    where
        'b: 'scope,
    {
        Self::start(scope, File::open(path)?, depth, Mode::Cached)
    }

    /// Whether reads go past the page cache.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.mode == Mode::Direct
    }

    fn start<'scope>(scope: &'scope Scope<'scope, '_>, file: File, depth: u16, mode: Mode) -> io::Result<Self>
    where
        'b: 'scope,
    {
        let depth = clamp_depth(depth);
        let store = Self {
            geometry: Geometry {
                len: file.metadata()?.len(),
                block: if mode == Mode::Direct { DIRECT_BLOCK } else { 1 },
                queue_depth: depth,
            },
            shared: Arc::new(Shared {
                state: Mutex::new(State {
                    requests: Deque::new(),
                    completions: Deque::new(),
                    threads: 0,
                    closed: false,
                }),
                work: Condvar::new(),
                ready: Condvar::new(),
            }),
            mode,
            in_flight: 0,
        };
        let file = Arc::new(sys::Positioned::new(file));
        for _ in 0..depth {
            let shared = Arc::clone(&store.shared);
            let file = Arc::clone(&file);
            shared.lock().threads += 1;
            let spawned = std::thread::Builder::new()
                .name("forebay-read".into())
                .spawn_scoped(scope, move || Reader(shared).run(&file, mode));
            if let Err(error) = spawned {
                store.shared.lock().threads -= 1;
                return Err(error);
            }
        }
        Ok(store)
    }
}

impl<'b> BlockStore<'b> for FileStore<'b> {
    type Error = io::Error;

    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn submit(&mut self, mut request: ReadRequest<'b>) -> Result<(), ReadRequest<'b>> {
        if self.in_flight >= usize::from(self.geometry.queue_depth) {
            return Err(request);
        }
        let allowed = check(&self.geometry, &mut request);
        let mut state = self.shared.lock();
        // There is room in either queue: each is as long as the greatest depth.
        match allowed {
            Ok(()) => {
                let _ = state.requests.push_back(request);
                drop(state);
                self.shared.work.notify_one();
            }
            Err(error) => {
                let result = Err(error);
                let _ = state.completions.push_back(Completion { id: request.id, buf: request.buf, result });
            }
        }
        self.in_flight += 1;
        Ok(())
    }

    fn poll(&mut self) -> Option<Completion<'b, io::Error>> {
        let done = self.shared.lock().completions.pop_front()?;
        self.in_flight -= 1;
        Some(done)
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn wait(&mut self) -> Option<Completion<'b, io::Error>> {
        if self.in_flight == 0 {
            return None;
        }
        let mut state = self
            .shared
            .ready
            .wait_while(self.shared.lock(), |state| state.completions.is_empty() && state.threads > 0)
            .unwrap_or_else(PoisonError::into_inner);
        let done = state.completions.pop_front();
        drop(state);
        // Without a thread left nothing will ever complete.
        self.in_flight = if done.is_some() { self.in_flight - 1 } else { 0 };
        done
    }
}

impl Drop for FileStore<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closed = true;
        state.requests.clear();
        self.shared.work.notify_all();
        drop(self.shared.ready.wait_while(state, |state| state.threads > 0));
    }
}

impl<'b> Shared<'b> {
    /// The state is consistent whenever the lock is free, whatever became of the thread that held it.
    fn lock(&self) -> MutexGuard<'_, State<'b>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A thread's share of the store; says so when the thread ends, however it ends.
struct Reader<'b>(Arc<Shared<'b>>);

impl Reader<'_> {
    fn run(&self, file: &sys::Positioned, mode: Mode) {
        loop {
            let mut state = self
                .0
                .work
                .wait_while(self.0.lock(), |state| state.requests.is_empty() && !state.closed)
                .unwrap_or_else(PoisonError::into_inner);
            if state.closed {
                return;
            }
            let Some(mut request) = state.requests.pop_front() else {
                continue;
            };
            drop(state);
            let offset = request.offset;
            let result = target(&mut request).and_then(|target| {
                let result = read(file, offset, target);
                if mode == Mode::Forgetting {
                    file.forget(offset, target.len() as u64);
                }
                result
            });
            // There is room: no more reads are in flight than the queue holds.
            let _ = self.0.lock().completions.push_back(Completion { id: request.id, buf: request.buf, result });
            self.0.ready.notify_one();
        }
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        self.0.lock().threads -= 1;
        self.0.ready.notify_all();
    }
}

fn read(file: &sys::Positioned, offset: u64, buf: &mut [u8]) -> Result<(), ReadError<io::Error>> {
    let mut got = 0;
    while got < buf.len() {
        match file.read_at(&mut buf[got..], offset + got as u64) {
            Ok(0) => return Err(ReadError::Short { got: got as u64 }),
            Ok(n) => got += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(ReadError::Device(error)),
        }
    }
    Ok(())
}

/// What differs between systems.
#[cfg(unix)]
mod sys {
    use std::fs::File;
    use std::io;
    use std::os::unix::fs::FileExt;
    use std::path::Path;

    #[derive(Debug)]
    pub(super) struct Positioned(File);

    impl Positioned {
        pub(super) fn new(file: File) -> Self {
            Self(file)
        }

        pub(super) fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
            self.0.read_at(buf, offset)
        }

        /// Advises the kernel that these bytes will not be read again. Advice: nothing depends on its success.
        #[cfg(any(target_os = "linux", target_os = "android"))]
        pub(super) fn forget(&self, offset: u64, len: u64) {
            use rustix::fs::{Advice, fadvise};
            let _ = fadvise(&self.0, offset, core::num::NonZeroU64::new(len), Advice::DontNeed);
        }

        #[cfg(not(any(target_os = "linux", target_os = "android")))]
        pub(super) fn forget(&self, _offset: u64, _len: u64) {}
    }

    /// The file open for direct reads; `None` if it cannot be read that way.
    #[cfg(any(target_os = "linux", target_os = "android"))]
    pub(super) fn open_direct(path: &Path) -> io::Result<Option<File>> {
        use std::os::unix::fs::OpenOptionsExt;

        use super::DIRECT_BLOCK;

        #[repr(align(4096))]
        struct Probe([u8; DIRECT_BLOCK as usize]);

        let no_direct_reads = |error: &io::Error| error.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error());
        let opened =
            std::fs::OpenOptions::new().read(true).custom_flags(rustix::fs::OFlags::DIRECT.bits() as i32).open(path);
        let file = match opened {
            Err(error) if no_direct_reads(&error) => return Ok(None),
            other => other?,
        };
        if !file.metadata()?.len().is_multiple_of(DIRECT_BLOCK.into()) {
            return Ok(None);
        }
        // Some file systems take the flag and refuse the read.
        match file.read_at(&mut Probe([0; DIRECT_BLOCK as usize]).0, 0) {
            Err(error) if no_direct_reads(&error) => Ok(None),
            other => other.map(|_| Some(file)),
        }
    }

    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    pub(super) fn open_direct(_path: &Path) -> io::Result<Option<File>> {
        Ok(None)
    }
}

#[cfg(not(unix))]
mod sys {
    use std::fs::File;
    use std::io::{self, Read, Seek, SeekFrom};
    use std::path::Path;
    use std::sync::{Mutex, PoisonError};

    /// A file whose position only one thread at a time may move.
    #[derive(Debug)]
    pub(super) struct Positioned(Mutex<File>);

    impl Positioned {
        pub(super) fn new(file: File) -> Self {
            Self(Mutex::new(file))
        }

        pub(super) fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
            let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            file.seek(SeekFrom::Start(offset))?;
            file.read(buf)
        }

        pub(super) fn forget(&self, _offset: u64, _len: u64) {}
    }

    pub(super) fn open_direct(_path: &Path) -> io::Result<Option<File>> {
        Ok(None)
    }
}
