//! From a booted machine to an exit status.

use core::fmt::Display;
use core::mem::MaybeUninit;

use embedded_io::Write;
use forebay_runtime::arena::Arena;
use forebay_storage::MemoryStore;
use forebay_storage::image::{MAGIC, SUPERBLOCK_SLOT};
use forebay_storage::store::BlockStore;
use virtio_drivers::transport::Transport;

use crate::app::{self, Clock, say};
use crate::options::{Options, Source};
use crate::stack::Stack;
use crate::virtio::VirtioStore;

/// Seconds after which a disk that does not answer is given up.
const PATIENCE: u64 = 30;

/// An arena as a board declares it: a static that starts on a page.
#[repr(C, align(4096))]
#[derive(Debug)]
pub struct ArenaMemory<const BYTES: usize>(pub [MaybeUninit<u8>; BYTES]);

impl<const BYTES: usize> ArenaMemory<BYTES> {
    /// Memory that nothing has been written to.
    pub const fn new() -> Self {
        Self([const { MaybeUninit::uninit() }; BYTES])
    }
}

impl<const BYTES: usize> Default for ArenaMemory<BYTES> {
    fn default() -> Self {
        Self::new()
    }
}

/// A machine that has booted.
pub struct Board<'m, W, T> {
    /// Name of the board.
    pub name: &'static str,
    /// The processor and how it was found, for the first line.
    pub processor: &'m dyn Display,
    /// Where everything is printed.
    pub console: &'m mut W,
    /// The clock.
    pub clock: Clock,
    /// The command line without the program's name.
    pub command_line: &'m str,
    /// The memory that the model lives in.
    pub arena: &'static mut [MaybeUninit<u8>],
    /// The stack.
    pub stack: Stack,
    /// The first disk.
    pub disk: Option<T>,
    /// Memory-mapped flash.
    pub flash: &'static [u8],
}

/// Runs the application and gives the exit status: 0, or 1 after an error was printed.
pub fn run<W: Write, T: Transport>(board: Board<'_, W, T>) -> u8 {
    let Board { name, processor, console, clock, command_line, arena, stack, disk, flash } = board;
    say!(console, "forebay {} on {name}, {processor}", env!("CARGO_PKG_VERSION"));
    let result = Options::parse(command_line)
        .map_err(|error| failed(console, error))
        .and_then(|options| with_options(console, &options, &clock, arena, disk, flash));
    say!(console, "stack: {} of {} bytes used", stack.high_water(), stack.len());
    match result {
        Ok(()) => 0,
        Err(Failed) => 1,
    }
}

/// An error that was printed.
struct Failed;

fn failed(console: &mut impl Write, error: impl Display) -> Failed {
    say!(console, "error: {error}");
    Failed
}

/// Whether either superblock is there.
fn holds_image(flash: &[u8]) -> bool {
    let slot = |start: u64| flash.get(start as usize..).is_some_and(|bytes| bytes.starts_with(&MAGIC));
    slot(0) || slot(SUPERBLOCK_SLOT)
}

fn with_options<W: Write, T: Transport>(
    console: &mut W,
    options: &Options<'_>,
    clock: &Clock,
    arena: &'static mut [MaybeUninit<u8>],
    disk: Option<T>,
    flash: &'static [u8],
) -> Result<(), Failed> {
    let len = options.arena.unwrap_or(arena.len()).min(arena.len());
    let arena = Arena::new(&mut arena[..len]);
    let flash_wanted = match (options.source, &disk) {
        (Source::Flash, _) => true,
        (Source::Any, None) => holds_image(flash),
        _ => false,
    };
    if flash_wanted {
        say!(console, "store: flash, {} bytes", flash.len());
        return with_store(console, MemoryStore::new(flash), &arena, options, clock);
    }
    let disk = disk.ok_or_else(|| failed(console, "there is no disk, and no image in flash: nothing to run"))?;
    let store = VirtioStore::new(disk, clock.now, PATIENCE * clock.hertz).map_err(|e| failed(console, e))?;
    say!(console, "store: virtio-blk, {} bytes", store.geometry().len);
    with_store(console, store, &arena, options, clock)
}

/// Not inlined, so that the stack holds one engine and not one a store.
#[inline(never)]
fn with_store<S: BlockStore<'static>, W: Write>(
    console: &mut W,
    store: S,
    arena: &Arena<'static>,
    options: &Options<'_>,
    clock: &Clock,
) -> Result<(), Failed> {
    app::run(console, store, arena, options, clock).map(|_| ()).map_err(|error| failed(console, error))
}
