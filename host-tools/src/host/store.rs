//! How a host reads an image: a file or memory, perhaps slowed down to another device.

use std::io;
use std::path::Path;
use std::thread::Scope;

use anyhow::{Context, Result};
use forebay_storage::layers::{DeviceProfile, StdClock, Throttled};
use forebay_storage::store::{BlockStore, Completion, Geometry, ReadError, ReadRequest};
use forebay_storage::{FileStore, MemoryStore};

use crate::host::session::ImageFile;

/// Reads of a file that may be in flight at once.
const FILE_DEPTH: u16 = 8;
/// Alignment of reads past the page cache.
const DIRECT_BLOCK: u32 = 4096;

/// Where the image's bytes come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum StoreKind {
    /// A file.
    Auto,
    /// A file, past the page cache where the system and the image's page allow it.
    File,
    /// A copy of the whole image in memory, beside the arena.
    Memory,
}

/// How an image is read.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// Where from.
    pub kind: StoreKind,
    /// The device whose speed is imitated.
    pub device: Option<DeviceProfile>,
}

impl StoreOptions {
    /// The whole image, if it is to be kept in memory.
    pub fn load(&self, path: &Path) -> Result<Option<Vec<u8>>> {
        match self.kind {
            StoreKind::Memory => {
                std::fs::read(path).map(Some).with_context(|| format!("reading {} into memory", path.display()))
            }
            _ => Ok(None),
        }
    }
}

/// A file or memory.
enum Source<'b, 'm> {
    File(FileStore<'b>),
    Memory(Box<MemoryStore<'b, 'm>>),
}

/// Memory does not fail, so the error is whatever the file's is.
fn infallible<E>(done: Completion<'_, core::convert::Infallible>) -> Completion<'_, E> {
    let result = done.result.map_err(|error| match error {
        ReadError::Device(never) => match never {},
        ReadError::OutOfBounds => ReadError::OutOfBounds,
        ReadError::Misaligned => ReadError::Misaligned,
        ReadError::Short { got } => ReadError::Short { got },
        _ => ReadError::Gone,
    });
    Completion { id: done.id, buf: done.buf, result }
}

impl<'b> BlockStore<'b> for Source<'b, '_> {
    type Error = io::Error;

    fn geometry(&self) -> Geometry {
        match self {
            Self::File(store) => store.geometry(),
            Self::Memory(store) => store.geometry(),
        }
    }
    fn submit(&mut self, request: ReadRequest<'b>) -> Result<(), ReadRequest<'b>> {
        match self {
            Self::File(store) => store.submit(request),
            Self::Memory(store) => store.submit(request),
        }
    }
    fn poll(&mut self) -> Option<Completion<'b, io::Error>> {
        match self {
            Self::File(store) => store.poll(),
            Self::Memory(store) => store.poll().map(infallible),
        }
    }
    fn in_flight(&self) -> usize {
        match self {
            Self::File(store) => store.in_flight(),
            Self::Memory(store) => store.in_flight(),
        }
    }
    fn wait(&mut self) -> Option<Completion<'b, io::Error>> {
        match self {
            Self::File(store) => store.wait(),
            Self::Memory(store) => store.wait().map(infallible),
        }
    }
}

/// At full speed, or at a device's.
enum Paced<'b, 'm> {
    Plain(Source<'b, 'm>),
    Slowed(Box<Throttled<'b, Source<'b, 'm>, StdClock>>),
}

/// The store of a session; remembers what the device last said was wrong.
pub struct HostStore<'b, 'm> {
    paced: Paced<'b, 'm>,
    last_error: Option<String>,
    name: String,
}

impl<'b, 'm> HostStore<'b, 'm> {
    /// Opens `file` as `options` say; `bytes` is the image if it was loaded.
    pub fn open_in<'scope, 'env>(
        scope: &'scope Scope<'scope, 'env>,
        file: &ImageFile,
        options: &StoreOptions,
        bytes: Option<&'m [u8]>,
    ) -> Result<Self>
    where
        'b: 'scope,
    {
        let (source, mut name) = match bytes {
            Some(bytes) => (Source::Memory(Box::new(MemoryStore::new(bytes))), "memory".to_owned()),
            None => {
                let aligned = file.superblock.page().is_multiple_of(DIRECT_BLOCK);
                let opened = if aligned {
                    FileStore::open_in(scope, &file.path, FILE_DEPTH)
                } else {
                    FileStore::open_cached_in(scope, &file.path, FILE_DEPTH)
                };
                let store = opened.with_context(|| format!("opening {}", file.path.display()))?;
                let how = if store.is_direct() { "file, O_DIRECT" } else { "file, through the page cache" };
                (Source::File(store), how.to_owned())
            }
        };
        let paced = match options.device {
            None => Paced::Plain(source),
            Some(profile) => {
                let rate = profile.bandwidth as f64 / 1e6;
                let latency = profile.latency_ns as f64 / 1e3;
                name += &format!(", slowed to {rate:.0} MB/s, {latency:.0} us, {} at once", profile.queue_depth);
                Paced::Slowed(Box::new(Throttled::new(source, profile, StdClock::new())))
            }
        };
        Ok(Self { paced, last_error: None, name })
    }

    /// Reads that may be in flight.
    pub fn depth(&self) -> usize {
        self.geometry().queue_depth.into()
    }

    /// For reports.
    pub fn name(&self) -> String {
        self.name.clone()
    }

    /// The last failure of a read in the device's own words.
    pub fn last_error(&self) -> Option<&str> {
        self.last_error.as_deref()
    }

    fn note(&mut self, done: &Completion<'b, io::Error>) {
        if let Err(error) = &done.result {
            self.last_error = Some(error.to_string());
        }
    }
}

impl<'b> BlockStore<'b> for HostStore<'b, '_> {
    type Error = io::Error;

    fn geometry(&self) -> Geometry {
        match &self.paced {
            Paced::Plain(store) => store.geometry(),
            Paced::Slowed(store) => store.geometry(),
        }
    }
    fn submit(&mut self, request: ReadRequest<'b>) -> Result<(), ReadRequest<'b>> {
        match &mut self.paced {
            Paced::Plain(store) => store.submit(request),
            Paced::Slowed(store) => store.submit(request),
        }
    }
    fn poll(&mut self) -> Option<Completion<'b, io::Error>> {
        let done = match &mut self.paced {
            Paced::Plain(store) => store.poll(),
            Paced::Slowed(store) => store.poll(),
        };
        done.inspect(|done| self.note(done))
    }
    fn in_flight(&self) -> usize {
        match &self.paced {
            Paced::Plain(store) => store.in_flight(),
            Paced::Slowed(store) => store.in_flight(),
        }
    }
    fn wait(&mut self) -> Option<Completion<'b, io::Error>> {
        let done = match &mut self.paced {
            Paced::Plain(store) => store.wait(),
            Paced::Slowed(store) => store.wait(),
        };
        done.inspect(|done| self.note(done))
    }
}
