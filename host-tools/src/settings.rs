//! The PLAN section: what the planner chose for a machine, kept in the image so that runs use it.
//!
//! It is JSON, so that people can read it with `forebay inspect`. Writing it follows `docs/format.md`, "Changing an
//! image": new bytes go where the superblock in force refers to nothing, and the other superblock slot is written last.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use forebay_runtime::cache::{Density, Eviction, Weights};
use forebay_runtime::policy::{Loading, Policy, Thresholds};
use forebay_storage::image::{
    ExtentTable, SUPERBLOCK_SLOT, Section, SectionKind, Superblock, crc32c, data_start, round_up,
};
use serde::{Deserialize, Serialize};

use crate::inspect::size;
use crate::profile::Device;
use crate::simulate::{MeasuredCosts, Prediction};

/// Version of the section.
pub const VERSION: u32 = 1;

/// What the planner chose, what for, and what it expects.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Settings {
    /// [`VERSION`].
    pub version: u32,
    /// Bytes of the arena.
    pub ram: u64,
    /// Tokens of the longest sequence.
    pub context: usize,
    /// Most tokens of a prompt that are computed together.
    pub batch: usize,
    /// The device that was reckoned with.
    pub device: Device,
    /// How experts are loaded and kept.
    pub policy: PlannedPolicy,
    /// Thresholds that were found to cost no more than was allowed, whether or not the policy uses them.
    pub profiled: Option<Profiled>,
    /// What is to be expected.
    pub predicted: Prediction,
    /// Share of experts' uses that LRU would find in the same pool, loading the same.
    pub lru_hit_rate: f64,
    /// Share that Belady's optimum would find with full precision in the same bytes.
    pub belady_hit_rate: f64,
    /// What computing takes on the machine that planned.
    pub costs: MeasuredCosts,
    /// How the image suits the device.
    pub layout: Layout,
    /// Tokens of the trace that was replayed.
    pub trace_tokens: usize,
}

/// A policy by its names.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct PlannedPolicy {
    /// `exact`, `scored` or `miss`.
    pub loading: String,
    /// HOBBIT's T1 and T2, where the loading has them.
    pub thresholds: Option<(f32, f32)>,
    /// Levels of low precision, where the loading has it.
    pub low_levels: Option<u8>,
    /// What gives way in the pool, as `--eviction` takes it.
    pub eviction: String,
    /// Layers ahead that experts are predicted.
    pub prefetch: u8,
}

impl PlannedPolicy {
    /// `policy` by its names; the rest of it is as by default.
    #[must_use]
    pub fn new(policy: &Policy) -> Self {
        let thresholds = match policy.loading {
            Loading::Scored(t) | Loading::Miss(t) => Some(t),
            _ => None,
        };
        Self {
            loading: policy.loading.name().into(),
            thresholds: thresholds.map(|t| (t.full, t.low)),
            low_levels: thresholds.map(|t| t.low_levels),
            eviction: eviction_text(&policy.eviction),
            prefetch: policy.prefetch,
        }
    }

    /// The loading policy with its thresholds, in a word.
    #[must_use]
    pub fn loading_text(&self) -> String {
        match self.thresholds {
            Some((full, low)) => format!("{} {full},{low} ({})", self.loading, self.low_levels.unwrap_or(1)),
            None => self.loading.clone(),
        }
    }

    /// The policy that is named.
    ///
    /// # Errors
    /// A name that this version does not know.
    pub fn policy(&self) -> Result<Policy> {
        let thresholds = || {
            let (full, low) = self.thresholds.context("a loading policy without its thresholds")?;
            Ok::<_, anyhow::Error>(Thresholds { full, low, low_levels: self.low_levels.unwrap_or(1) })
        };
        let loading = match self.loading.as_str() {
            "exact" => Loading::Exact,
            "scored" => Loading::Scored(thresholds()?),
            "miss" => Loading::Miss(thresholds()?),
            other => bail!("a loading policy {other:?}"),
        };
        let eviction = parse_eviction(&self.eviction).map_err(|error| anyhow!("eviction: {error}"))?;
        Ok(Policy { loading, eviction, prefetch: self.prefetch, ..Policy::default() })
    }
}

/// Thresholds found on a text.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Profiled {
    /// T1.
    pub full: f32,
    /// T2.
    pub low: f32,
    /// Levels of low precision.
    pub low_levels: u8,
    /// What they cost: perplexity on the calibration text over that of full precision, less 1.
    pub loss: f64,
    /// Standard error of that.
    #[serde(default)]
    pub error: f64,
    /// What they were allowed to cost.
    pub max_loss: f64,
    /// Tokens scored.
    pub tokens: u64,
}

/// How an image's extents suit a device.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Layout {
    /// Pieces that a unit is kept in: 1, or its levels apart.
    pub pieces: usize,
    /// Bytes of the mean read.
    pub read_bytes: f64,
    /// Share of the device's bandwidth that reads of that size reach, as many at once as a layer wants.
    pub read_efficiency: f64,
    /// Share of the pool's bytes that slots leave empty, because pieces differ in length.
    pub slot_waste: f64,
    /// What another image, or another device setting, would do better.
    pub advice: Vec<String>,
}

impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (p, device) = (&self.predicted, &self.device);
        writeln!(
            f,
            "plan for {}, {:.1} MB/s and {:.0} us: {}, eviction {}, prefetch {}, units kept {}",
            size(self.ram),
            device.bandwidth as f64 / 1e6,
            device.latency_ns as f64 / 1e3,
            self.policy.loading_text(),
            self.policy.eviction,
            self.policy.prefetch,
            if self.layout.pieces > 1 { "level by level" } else { "whole" },
        )?;
        writeln!(
            f,
            "  foreseen: {:.2} tok/s, {} a token, {:.1} % hits (LRU {:.1} %, Belady {:.1} %); at worst {:.1} ms and {} a \
             token",
            p.tok_s,
            size(p.bytes_per_token as u64),
            100.0 * p.hit_rate,
            100.0 * self.lru_hit_rate,
            100.0 * self.belady_hit_rate,
            1e3 * p.worst_token_s,
            size(p.worst_token_bytes)
        )?;
        if let Some(found) = &self.profiled {
            writeln!(
                f,
                "  thresholds {} and {} with {} levels of low precision cost {:.2} % perplexity on the calibration text \
                 (standard error {:.2} %)",
                found.full,
                found.low,
                found.low_levels,
                100.0 * found.loss,
                100.0 * found.error
            )?;
        }
        Ok(())
    }
}

/// A name of `--eviction` with its parameters.
#[must_use]
pub fn eviction_text(eviction: &Eviction) -> String {
    match eviction {
        Eviction::Hobbit(Weights { lru, lfu, lhu, fld }) => format!("hobbit={lru},{lfu},{lhu},{fld}"),
        Eviction::Density(Density { recent, offset }) => format!("density={recent},{offset}"),
        other => other.name().into(),
    }
}

/// The eviction policy that `text` names, with parameters or without.
///
/// # Errors
/// Says what was expected.
pub fn parse_eviction(text: &str) -> Result<Eviction, String> {
    let numbers = |text: &str| -> Option<Vec<f32>> {
        let numbers: Option<Vec<f32>> = text.split(',').map(|w| w.trim().parse().ok()).collect();
        numbers.filter(|all| all.iter().all(|w| w.is_finite() && *w >= 0.0))
    };
    if let Some(weights) = text.strip_prefix("hobbit=") {
        return match numbers(weights).as_deref() {
            Some(&[lru, lfu, lhu, fld]) => Ok(Eviction::Hobbit(Weights { lru, lfu, lhu, fld })),
            _ => Err("expected four weights, such as hobbit=0.25,0.25,0.25,0.25".into()),
        };
    }
    if let Some(parameters) = text.strip_prefix("density=") {
        return match numbers(parameters).as_deref() {
            Some(&[recent, offset]) if recent <= 1.0 => Ok(Eviction::Density(Density { recent, offset })),
            _ => Err("expected a weight of at most 1 and a number of layers, such as density=0.1,2".into()),
        };
    }
    Eviction::by_name(text).ok_or_else(|| {
        let names: Vec<_> = Eviction::ALL.iter().map(|policy| policy.name()).collect();
        format!("expected one of {}", names.join(", "))
    })
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
            batch: 8,
            policy: PlannedPolicy::new(&Policy::default()),
            profiled: None,
            predicted: Prediction::default(),
            lru_hit_rate: 0.5,
            belady_hit_rate: 0.75,
            costs: MeasuredCosts::default(),
            layout: Layout::default(),
            trace_tokens: 100,
        }
    }

    #[test]
    fn a_policy_is_its_names() {
        let thresholds = Thresholds { full: 0.25, low: 0.75, low_levels: 2 };
        for loading in [Loading::Exact, Loading::Scored(thresholds), Loading::Miss(thresholds)] {
            for eviction in Eviction::ALL {
                let policy = Policy { loading, eviction, prefetch: 2, ..Policy::default() };
                assert_eq!(PlannedPolicy::new(&policy).policy().unwrap(), policy);
            }
        }
        let unknown = PlannedPolicy { loading: "magic".into(), ..PlannedPolicy::new(&Policy::default()) };
        assert!(unknown.policy().is_err());
        for bad in ["hobbit=1,2,3", "hobbit=1,2,3,-4", "density=2,1", "density=0.1", "newest"] {
            assert!(parse_eviction(bad).is_err(), "{bad}");
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
