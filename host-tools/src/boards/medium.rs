//! Writing what a board reads.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use forebay_storage::image::{SUPERBLOCK_SLOT, Superblock};
use serde::Serialize;

use super::{BootFiles, Card, MODEL_START, Medium, MediumKind};
use crate::convert::Progress;
use crate::temporary::Temporary;

/// Bytes copied at once.
const STEP: usize = 1 << 20;

/// What was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Written {
    /// Bytes of the file.
    pub len: u64,
    /// Where in it the image starts.
    pub start: u64,
    /// Bytes of the image.
    pub image: u64,
    /// Bytes from the file's start on that matter; what follows is empty.
    pub used: u64,
}

/// Writes to `output` what `medium` holds: the image at `image`, and on a card what `boot` names. The file appears
/// under its name when it is complete.
///
/// # Errors
/// The image cannot be read or does not fit, or the file cannot be written.
pub fn write_medium(
    medium: &Medium,
    image: &Path,
    output: &Path,
    boot: &BootFiles<'_>,
    progress: &mut dyn Progress,
) -> Result<Written> {
    write(medium, image, output, boot, progress).with_context(|| format!("writing {}", output.display()))
}

fn write(
    medium: &Medium,
    image: &Path,
    output: &Path,
    boot: &BootFiles<'_>,
    progress: &mut dyn Progress,
) -> Result<Written> {
    let reading = || format!("reading {}", image.display());
    let mut from = File::open(image).with_context(reading)?;
    let mut slots = Vec::new();
    (&from).take(2 * SUPERBLOCK_SLOT).read_to_end(&mut slots).with_context(reading)?;
    let superblock = Superblock::parse(&slots, from.metadata()?.len()).with_context(reading)?;
    let len = superblock.image_len();
    let (start, total) = match medium.kind {
        MediumKind::Disk => (0, len.next_multiple_of(medium.block.into())),
        MediumKind::Flash => (0, medium.len.context("flash has a size")?),
        MediumKind::Card => (MODEL_START, Card::of(len).len),
    };
    ensure!(start + len <= total, "the image of {len} bytes does not fit {} of {total} bytes", medium.device);
    ensure!(
        superblock.page().is_multiple_of(medium.block),
        "{} reads blocks of {block} bytes and the image has pages of {}; convert it with --page {block}",
        medium.device,
        superblock.page(),
        block = medium.block
    );

    let temporary = Temporary::create(output)?;
    let mut file = &temporary.file;
    if medium.kind == MediumKind::Card {
        let [a, b, c, d, ..] = superblock.id();
        Card::of(len).write(file, u32::from_le_bytes([a, b, c, d]), boot)?;
    }
    progress.set_total(len);
    from.seek(SeekFrom::Start(0)).with_context(reading)?;
    file.seek(SeekFrom::Start(start))?;
    let mut buffer = vec![0; STEP];
    let mut left = len;
    while left > 0 {
        let part = left.min(STEP as u64) as usize;
        from.read_exact(&mut buffer[..part]).with_context(reading)?;
        file.write_all(&buffer[..part])?;
        progress.advance(part as u64);
        left -= part as u64;
    }
    if medium.kind == MediumKind::Flash {
        // What is not programmed reads as ones.
        buffer.fill(0xff);
        let mut left = total - len;
        while left > 0 {
            let part = left.min(STEP as u64) as usize;
            file.write_all(&buffer[..part])?;
            left -= part as u64;
        }
    }
    file.set_len(total)?;
    temporary.finish(output)?;
    Ok(Written { len: total, start, image: len, used: start + len })
}
