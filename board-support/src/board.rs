//! From a booted machine to an exit status.

use core::fmt::Display;
use core::mem::MaybeUninit;

use embedded_io::Write;
use forebay_kernels::exec::Workers;
use forebay_runtime::arena::Arena;
use forebay_storage::image::{MAGIC, SUPERBLOCK_SLOT};
use forebay_storage::store::BlockStore;
use forebay_storage::{MappedStore, MemoryStore};

use crate::app::{self, Clock, say};
use crate::console::{Console, Terminal};
use crate::cores::{Cores, Further};
use crate::options::{OptionError, Options, Source};
use crate::stack::Stack;
use crate::status::{HasStatus, Status};

/// A disk that has not been brought up.
pub trait Disk {
    /// The store over it.
    type Store: BlockStore<'static>;
    /// Why it does not come up.
    type Error: HasStatus;
    /// What kind of disk it is, for the report.
    const KIND: &'static str;

    /// Brings the disk up. Its store gives a read up when nothing has come for `patience` ticks of `clock`.
    fn bring_up(self, clock: &Clock, patience: u64) -> Result<Self::Store, Self::Error>;
}

/// No disk: for boards whose image can only be in mapped flash.
#[derive(Clone, Copy, Debug)]
pub enum NoDisk {}

impl Disk for NoDisk {
    type Store = MemoryStore<'static, 'static>;
    type Error = NoStore;
    const KIND: &'static str = "none";

    fn bring_up(self, _: &Clock, _: u64) -> Result<Self::Store, NoStore> {
        match self {}
    }
}

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
pub struct Board<'m, C, D> {
    /// Name of the board.
    pub name: &'static str,
    /// The processor and how it was found, for the first line.
    pub processor: &'m dyn Display,
    /// Where everything is printed, and lines come from.
    pub console: &'m mut C,
    /// The clock.
    pub clock: Clock,
    /// The command line without the program's name.
    pub command_line: &'m str,
    /// The memory that the model lives in.
    pub arena: &'static mut [MaybeUninit<u8>],
    /// The stack.
    pub stack: Stack,
    /// The first disk.
    pub disk: Option<D>,
    /// Memory-mapped flash.
    pub flash: &'static [u8],
    /// The cores.
    pub cores: &'m dyn Cores,
}

/// Runs the application and gives the exit status: after a failure its error was printed.
pub fn run<C: Console, D: Disk>(board: Board<'_, C, D>) -> u8 {
    let Board { name, processor, console, clock, command_line, arena, stack, disk, flash, cores } = board;
    let console = &mut Terminal(console);
    say!(console, "forebay {} on {name}, {processor}", env!("CARGO_PKG_VERSION"));
    let result = match Options::parse(command_line) {
        Ok(options) => with_options(console, &options, &clock, arena, disk, flash, (cores, &stack)),
        Err(error) => Err(failed(console, &error)),
    };
    say!(console, "stack: {} of {} bytes used", stack.high_water(), stack.len());
    let mut status = match result {
        Ok(()) => Status::Done,
        Err(Failed(status)) => status,
    };
    if let Some(Further { parts, stack_used: used, stack_len: len }) = cores.further() {
        say!(console, "further cores: {parts} parts of products computed");
        say!(console, "further cores' stacks: {used} of {len} bytes used");
        // They have no guard beneath them.
        if used == len {
            say!(console, "error: a further core's stack has overflown: results are not to be trusted");
            status = Status::Failed;
        }
    }
    status as u8
}

/// An error that was printed.
struct Failed(Status);

fn failed(console: &mut impl Write, error: &impl HasStatus) -> Failed {
    say!(console, "error: {error}");
    Failed(error.status())
}

impl HasStatus for OptionError<'_> {
    fn status(&self) -> Status {
        Status::Usage
    }
}

/// There is nothing to read an image from.
#[derive(Debug, thiserror::Error)]
#[error("there is no disk, and no image in flash: nothing to run")]
pub struct NoStore;

impl HasStatus for NoStore {
    fn status(&self) -> Status {
        Status::NoDisk
    }
}

/// Whether either superblock is there.
fn holds_image(flash: &[u8]) -> bool {
    let slot = |start: u64| flash.get(start as usize..).is_some_and(|bytes| bytes.starts_with(&MAGIC));
    slot(0) || slot(SUPERBLOCK_SLOT)
}

fn with_options<C: Console, D: Disk>(
    console: &mut C,
    options: &Options<'_>,
    clock: &Clock,
    arena: &'static mut [MaybeUninit<u8>],
    disk: Option<D>,
    flash: &'static [u8],
    (cores, stack): (&dyn Cores, &Stack),
) -> Result<(), Failed> {
    let len = options.arena.unwrap_or(arena.len()).min(arena.len());
    let arena = Arena::new(&mut arena[..len]);
    let workers = cores.start(options.cores);
    let flash_wanted = match (options.source, &disk) {
        (Source::Flash, _) => true,
        (Source::Any, None) => holds_image(flash),
        _ => false,
    };
    if flash_wanted {
        say!(console, "store: flash, {} bytes", flash.len());
        return with_store(console, MappedStore::new(flash), &arena, options, clock, (workers, stack));
    }
    let disk = disk.ok_or_else(|| failed(console, &NoStore))?;
    let patience = (options.patience as u64).saturating_mul(clock.hertz);
    let store = disk.bring_up(clock, patience).map_err(|error| failed(console, &error))?;
    say!(console, "store: {}, {} bytes", D::KIND, store.geometry().len);
    with_store(console, store, &arena, options, clock, (workers, stack))
}

/// Not inlined, so that the stack holds one engine and not one a store.
#[inline(never)]
fn with_store<S: BlockStore<'static>, C: Console>(
    console: &mut C,
    store: S,
    arena: &Arena<'static>,
    options: &Options<'_>,
    clock: &Clock,
    (workers, stack): (&dyn Workers, &Stack),
) -> Result<(), Failed> {
    app::run(console, store, arena, options, clock, workers, stack).map_err(|error| failed(console, &error))
}
