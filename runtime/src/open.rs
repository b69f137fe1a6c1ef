//! Opening an image: its superblock and tables are read through the store into the arena and validated.

use forebay_storage::image::{ExtentTable, ImageError, SUPERBLOCK_SLOT, Section, SectionKind, Superblock};
use forebay_storage::store::{BlockStore, ReadError, ReadRequest};

use crate::arena::{Arena, LINE, OutOfArena};
use crate::model::{Model, ModelError};

/// Why an image cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError<E: core::fmt::Debug + core::fmt::Display> {
    /// The container is damaged or is none.
    #[error("{0}")]
    Image(#[from] ImageError),
    /// The model description is damaged.
    #[error("{0}")]
    Model(#[from] ModelError),
    /// A section that every image has is absent.
    #[error("the image has no {0:?} section; convert the model again")]
    MissingSection(SectionKind),
    /// The store failed to read one of the tables.
    #[error("reading {what} (image offset {offset}, {len} bytes): {error}")]
    Read {
        /// What was read.
        what: &'static str,
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
        /// Why it failed.
        error: ReadError<E>,
    },
    /// Bytes of a mapped image do not have their checksum.
    #[error("the image's {len} bytes at offset {offset}: checksum mismatch")]
    Extent {
        /// Where.
        offset: u64,
        /// How many.
        len: u64,
    },
    /// The store wants larger blocks than the image's pages.
    #[error(
        "the device reads blocks of {block} bytes but the image has pages of {page}; convert it with --page {block}"
    )]
    Block {
        /// The store's block.
        block: u32,
        /// The image's page.
        page: u32,
    },
    /// The arena does not even hold the tables.
    #[error("the arena is too small for the image's tables: {0}")]
    Arena(#[from] OutOfArena),
}

/// An opened image: everything but the weights.
#[derive(Clone, Copy, Debug)]
pub struct Image<'a> {
    superblock: Superblock,
    model: Model<'a>,
    tokenizer: Option<&'a [u8]>,
    tables_len: u64,
    mapped: Option<&'a [u8]>,
}

/// One blocking read of `len` bytes, padded to the arena's page.
fn read<'a, S: BlockStore<'a>>(
    store: &mut S,
    arena: &Arena<'a>,
    what: &'static str,
    offset: u64,
    len: u64,
    page: u32,
) -> Result<&'a [u8], OpenError<S::Error>> {
    let fail = |error| OpenError::Read { what, offset, len, error };
    // A section's padding belongs to the image, so the read may be as long as its pages.
    let padded = usize::try_from(len.next_multiple_of(page.into())).map_err(|_| fail(ReadError::OutOfBounds))?;
    if let Some(image) = store.mapped() {
        return part(image, offset, len).ok_or(fail(ReadError::OutOfBounds));
    }
    let buf = arena.pages(padded)?;
    let (buf, _) = buf.split_at_mut(padded);
    let submitted = store.submit(ReadRequest::whole(0, offset, buf)).is_ok();
    let done = if submitted { store.wait() } else { None };
    let done = done.ok_or(fail(ReadError::Gone))?;
    done.result.map_err(fail)?;
    let buf: &'a [u8] = done.buf;
    Ok(&buf[..len as usize])
}

/// The `len` bytes from `offset` on.
pub(crate) fn part(image: &[u8], offset: u64, len: u64) -> Option<&[u8]> {
    let start = usize::try_from(offset).ok()?;
    image.get(start..start.checked_add(usize::try_from(len).ok()?)?)
}

impl<'a> Image<'a> {
    /// Reads and validates the tables of the image in `store`. The tokenizer's tables are read only if
    /// `with_tokenizer` and the image has some. Blocks on the store; no other read may be in flight.
    ///
    /// Of a store that is mapped, from a multiple of [`LINE`] bytes on, nothing is copied, neither now nor later: all
    /// extents are verified here, once.
    pub fn open<S: BlockStore<'a>>(
        store: &mut S,
        arena: &Arena<'a>,
        with_tokenizer: bool,
    ) -> Result<Self, OpenError<S::Error>> {
        let before = arena.left();
        let geometry = store.geometry();
        let slots = (2 * SUPERBLOCK_SLOT).min(geometry.len);
        let block = geometry.block.max(1);
        let slots = slots - slots % u64::from(block);
        let superblock = Superblock::parse(read(store, arena, "the superblocks", 0, slots, 1)?, geometry.len)?;
        let page = superblock.page();
        if page % block != 0 {
            return Err(OpenError::Block { block, page });
        }
        let mut load = |section: Section, what| -> Result<&'a [u8], OpenError<S::Error>> {
            let bytes = read(store, arena, what, section.offset, section.len, page)?;
            section.verify(bytes)?;
            Ok(bytes)
        };
        let find = |kind| superblock.section(kind).ok_or(OpenError::MissingSection(kind));
        let model = load(find(SectionKind::Model)?, "the MODEL section")?;
        let tensors = load(find(SectionKind::Tensors)?, "the TENSORS section")?;
        let extents = load(find(SectionKind::Extents)?, "the EXTENTS section")?;
        let tokenizer = match superblock.section(SectionKind::Tokenizer) {
            Some(section) if with_tokenizer => Some(load(section, "the TOKENIZER section")?),
            _ => None,
        };
        let extents = ExtentTable::parse(extents, &superblock)?;
        let model = Model::parse(model, tensors, extents, page)?;
        // Tensors of f32 are read as such. Elsewhere units are copied, as from any store.
        let mapped = store.mapped().filter(|image| image.as_ptr().addr().is_multiple_of(LINE));
        if let Some(image) = mapped {
            for record in extents.records() {
                let (offset, len) = (record.offset(), record.total_len());
                let good = part(image, offset, len).is_some_and(|bytes| record.verify(0, bytes) == Ok(record.levels()));
                if !good {
                    return Err(OpenError::Extent { offset, len });
                }
            }
        }
        Ok(Self { superblock, model, tokenizer, tables_len: (before - arena.left()) as u64, mapped })
    }

    /// Reads and verifies a section that [`Self::open`] leaves out; `None` if the image has no such section. Blocks on
    /// the store; no other read may be in flight. To be called before the plan is made, so that the plan counts it.
    pub fn load<S: BlockStore<'a>>(
        &mut self,
        store: &mut S,
        arena: &Arena<'a>,
        kind: SectionKind,
    ) -> Result<Option<&'a [u8]>, OpenError<S::Error>> {
        let Some(section) = self.superblock.section(kind) else { return Ok(None) };
        let before = arena.left();
        let bytes = read(store, arena, "a section", section.offset, section.len, self.superblock.page())?;
        section.verify(bytes)?;
        self.tables_len += (before - arena.left()) as u64;
        Ok(Some(bytes))
    }

    /// The superblock in force.
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }
    /// The model's description.
    pub fn model(&self) -> &Model<'a> {
        &self.model
    }
    /// The tokenizer's tables, if the image has some and they were asked for.
    pub fn tokenizer(&self) -> Option<&'a [u8]> {
        self.tokenizer
    }
    /// The image's bytes, if it is mapped: then they are right, and units and resident tensors take no memory.
    pub fn mapped(&self) -> Option<&'a [u8]> {
        self.mapped
    }
    /// Arena bytes that the tables took.
    pub fn tables_len(&self) -> u64 {
        self.tables_len
    }
}
