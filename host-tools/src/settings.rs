//! The PLAN section: what the planner chose for a machine, kept in the image so that runs use it.
//!
//! It is JSON, so that people can read it with `forebay inspect`. Writing it follows `docs/format.md`, "Changing an
//! image": new bytes go where the superblock in force refers to nothing, and the other superblock slot is written last.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use forebay_storage::image::{
    ExtentTable, SUPERBLOCK_SLOT, Section, SectionKind, Superblock, crc32c, data_start, round_up,
};
use serde::{Deserialize, Serialize};

use crate::profile::Device;
use crate::simulate::Prediction;

/// Version of the section.
pub const VERSION: u32 = 1;

/// What the planner chose, and what for.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Settings {
    /// [`VERSION`].
    pub version: u32,
    /// Bytes of the arena.
    pub ram: u64,
    /// Tokens of the longest sequence.
    pub context: usize,
    /// The device that was reckoned with.
    pub device: Device,
    /// How much of a chosen expert is loaded: `exact`, `scored` or `miss`.
    pub loading: String,
    /// HOBBIT's thresholds and the levels of low precision, where the loading has them.
    pub thresholds: Option<(f32, f32, u8)>,
    /// What gives way in the pool, by name.
    pub eviction: String,
    /// Layers ahead that experts are predicted.
    pub prefetch: u8,
    /// Tokens of a prompt that are computed together.
    pub batch: usize,
    /// What is to be expected.
    pub predicted: Prediction,
}

/// The image's superblock slots, and which one is in force.
fn superblocks(file: &File) -> Result<(Superblock, bool)> {
    let len = file.metadata()?.len();
    let mut slots = vec![0; 2 * SUPERBLOCK_SLOT as usize];
    file.read_exact_at(&mut slots, 0)?;
    let current = Superblock::parse(&slots, len)?;
    let (a, _) = slots.split_at(SUPERBLOCK_SLOT as usize);
    let in_a = Superblock::parse_slot(a, len).is_ok_and(|a| a == current);
    Ok((current, in_a))
}

fn bytes_of(file: &File, section: &Section) -> Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(section.len)?];
    file.read_exact_at(&mut bytes, section.offset)?;
    section.verify(&bytes)?;
    Ok(bytes)
}

impl Settings {
    /// The settings in the image at `path`; `None` if it has none, or of another version.
    ///
    /// # Errors
    /// The image cannot be read or is damaged.
    pub fn load(path: &Path) -> Result<Option<Self>> {
        let what = || format!("reading the plan of {}", path.display());
        let read = || -> Result<Option<Self>> {
            let file = File::open(path)?;
            let (superblock, _) = superblocks(&file)?;
            let Some(section) = superblock.section(SectionKind::Plan) else { return Ok(None) };
            let bytes = bytes_of(&file, &section)?;
            let version: serde_json::Value = serde_json::from_slice(&bytes)?;
            if version["version"] != VERSION {
                return Ok(None);
            }
            Ok(Some(serde_json::from_slice(&bytes)?))
        };
        read().with_context(what)
    }

    /// Puts the settings into the image at `path`. Whatever happens on the way, the image is whole: with the settings it
    /// had, or with these.
    ///
    /// # Errors
    /// The image cannot be read or written.
    pub fn store(&self, path: &Path) -> Result<()> {
        let what = || format!("writing the plan into {}", path.display());
        let write = || -> Result<()> {
            let file = OpenOptions::new().read(true).write(true).open(path)?;
            let update = Update::new(&file, &serde_json::to_vec_pretty(self)?)?;
            update.write_section(&file)?;
            file.sync_all()?;
            update.write_superblock(&file)?;
            file.sync_all()?;
            Ok(())
        };
        write().with_context(what)
    }
}

/// A change of an image's PLAN section, in two steps that each must be durable before the next.
struct Update {
    offset: u64,
    /// The section, padded to the page.
    bytes: Vec<u8>,
    superblock: Superblock,
    slot: u64,
}

impl Update {
    fn new(file: &File, content: &[u8]) -> Result<Self> {
        let (current, in_a) = superblocks(file)?;
        let page = current.page();
        let up = |n: u64| round_up(n, page).context("an image beyond 64 bits");
        let extents = current.section(SectionKind::Extents).context("the image has no extents")?;
        let table = bytes_of(file, &extents)?;
        let table = ExtentTable::parse(&table, &current)?;
        let mut end = data_start(page);
        for extent in table.records() {
            end = end.max(extent.offset() + extent.total_len());
        }
        let others = || current.sections().filter(|s| s.kind != SectionKind::Plan);
        for section in others() {
            end = end.max(up(section.offset + section.len)?);
        }
        let padded = up(content.len() as u64)?;
        // Behind everything else, before the section in force if it leaves room there, else behind it.
        let offset = match current.section(SectionKind::Plan) {
            Some(old) if old.offset < end + padded => up(old.offset + old.len)?.max(end),
            _ => end,
        };
        let old_end = current.section(SectionKind::Plan).map_or(Ok(0), |old| up(old.offset + old.len))?;
        // The image never gets shorter, so that the superblock before this one stays valid too.
        let image_len = current.image_len().max(offset + padded).max(old_end);
        let mut superblock = Superblock::new(page, current.generation() + 1, current.id(), image_len)?;
        for section in others() {
            superblock.push_section(section)?;
        }
        let len = content.len() as u64;
        ensure!(len > 0, "an empty plan");
        superblock.push_section(Section { kind: SectionKind::Plan, offset, len, crc: crc32c(content) })?;
        let mut bytes = content.to_vec();
        bytes.resize(usize::try_from(padded)?, 0);
        Ok(Self { offset, bytes, superblock, slot: if in_a { SUPERBLOCK_SLOT } else { 0 } })
    }

    fn write_section(&self, file: &File) -> Result<()> {
        if file.metadata()?.len() < self.superblock.image_len() {
            file.set_len(self.superblock.image_len())?;
        }
        Ok(file.write_all_at(&self.bytes, self.offset)?)
    }

    fn write_superblock(&self, file: &File) -> Result<()> {
        let mut slot = [0; SUPERBLOCK_SLOT as usize];
        self.superblock.write(&mut slot);
        Ok(file.write_all_at(&slot, self.slot)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::convert::{ConvertOptions, Silent, convert};

    fn settings(ram: u64) -> Settings {
        Settings {
            version: VERSION,
            ram,
            context: 64,
            device: Device { bandwidth: 400_000_000, latency_ns: 100_000, iops: 0, queue_depth: 8 },
            loading: "exact".into(),
            thresholds: None,
            eviction: "lru".into(),
            prefetch: 0,
            batch: 8,
            predicted: Prediction::default(),
        }
    }

    #[test]
    fn an_update_never_loses_what_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-lfm2moe");
        convert(&model, &path, &ConvertOptions::default(), &mut Silent).unwrap();
        let before = std::fs::read(&path).unwrap();
        assert_eq!(Settings::load(&path).unwrap(), None);
        settings(1).store(&path).unwrap();
        // Nothing but the other superblock and the end of the file was touched.
        let after = std::fs::read(&path).unwrap();
        let slot = SUPERBLOCK_SLOT as usize;
        assert!(after[..slot] == before[..slot] && after[2 * slot..before.len()] == before[2 * slot..]);
        for round in 2..6 {
            let old = settings(round - 1);
            assert_eq!(Settings::load(&path).unwrap(), Some(old.clone()));
            let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
            let whole = std::fs::read(&path).unwrap();
            let update = Update::new(&file, &serde_json::to_vec(&settings(round)).unwrap()).unwrap();
            // Power fails before the superblock is written, or in the middle of it: the old settings stand.
            update.write_section(&file).unwrap();
            assert_eq!(Settings::load(&path).unwrap(), Some(old.clone()), "round {round}");
            let mut new = [0; SUPERBLOCK_SLOT as usize];
            update.superblock.write(&mut new);
            file.write_all_at(&new[..100], update.slot).unwrap();
            assert_eq!(Settings::load(&path).unwrap(), Some(old), "round {round}");
            update.write_superblock(&file).unwrap();
            assert_eq!(Settings::load(&path).unwrap(), Some(settings(round)), "round {round}");
            // The file does not grow with every change.
            assert!(std::fs::metadata(&path).unwrap().len() <= whole.len() as u64 + 4096);
        }
        assert!(std::fs::metadata(&path).unwrap().len() <= before.len() as u64 + 2 * 4096);
    }
}
