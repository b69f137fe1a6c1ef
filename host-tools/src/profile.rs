//! Measuring a device: bandwidth and latency of its reads by size, number at once, and order.
//!
//! Reads go through the store that a run uses, past the page cache where that can be had. What is measured is fitted to
//! the model of [`DeviceProfile`], which the throttled store imitates and the planner reckons with.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use forebay_storage::FileStore;
use forebay_storage::layers::DeviceProfile;
use forebay_storage::store::{BlockStore, ReadRequest};
use rand_core::{RngCore, SeedableRng};
use rand_pcg::Pcg64Mcg;
use serde::{Deserialize, Serialize};

/// Sizes of reads, bytes.
pub const BLOCKS: [u64; 7] = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 8 << 20];
/// Reads in flight at once.
pub const DEPTHS: [u16; 6] = [1, 2, 4, 8, 16, 32];
/// Most bytes in flight at once: combinations of more are left out.
const MOST_IN_FLIGHT: u64 = 64 << 20;
/// Alignment of reads past the page cache.
const ALIGN: usize = 4096;
/// Reads of at least this size count as large.
const LARGE: u64 = 256 << 10;
/// A depth is enough if it gives this share of the best bandwidth.
const ENOUGH: f64 = 0.95;

/// What reads of one size, depth and order reached.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Cell {
    /// Bytes of a read.
    pub block: u64,
    /// Reads in flight.
    pub depth: u16,
    /// Whether reads were at random places rather than one after another.
    pub random: bool,
    /// Bytes a second.
    pub bandwidth: f64,
    /// From a read's start to its end, mean, microseconds.
    pub latency_us: f64,
    /// The same, not exceeded by 99 of 100 reads.
    pub latency_p99_us: f64,
    /// Reads measured.
    pub reads: u64,
}

/// The numbers of a [`DeviceProfile`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Device {
    /// Bytes a second.
    pub bandwidth: u64,
    /// Nanoseconds from a command to its first byte.
    pub latency_ns: u64,
    /// Commands a second; 0 is no limit.
    pub iops: u32,
    /// Reads that the device works on at once.
    pub queue_depth: u16,
}

impl From<DeviceProfile> for Device {
    fn from(p: DeviceProfile) -> Self {
        Self { bandwidth: p.bandwidth, latency_ns: p.latency_ns, iops: p.iops, queue_depth: p.queue_depth }
    }
}

impl Device {
    /// As the throttled store takes it.
    ///
    /// # Errors
    /// A bandwidth or queue depth of 0.
    pub fn profile(self) -> Result<DeviceProfile> {
        ensure!(self.bandwidth > 0 && self.queue_depth > 0, "a device with no bandwidth or no queue");
        let Self { bandwidth, latency_ns, iops, queue_depth } = self;
        Ok(DeviceProfile { bandwidth, latency_ns, iops, queue_depth })
    }
}

/// A measured device.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Measured {
    /// What was read.
    pub path: PathBuf,
    /// Whether reads went past the page cache.
    pub direct: bool,
    /// The model that fits best.
    pub device: Device,
    /// What was measured.
    pub cells: Vec<Cell>,
}

impl Measured {
    /// Reads what `forebay flash-profile -o` wrote.
    ///
    /// # Errors
    /// The file cannot be read or is something else.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        serde_json::from_str(&text)
            .with_context(|| format!("{} is no profile; make one with `forebay flash-profile -o`", path.display()))
    }
}

/// Memory for reads, from a page border on.
struct Buffers(Vec<u8>);

impl Buffers {
    fn new() -> Self {
        Self(vec![0; MOST_IN_FLIGHT as usize + ALIGN])
    }

    fn aligned(&mut self) -> &mut [u8] {
        let start = self.0.as_ptr().align_offset(ALIGN).min(ALIGN);
        &mut self.0[start..start + MOST_IN_FLIGHT as usize]
    }
}

/// Measures reads of the file `path`, each combination for `time`; `report` is told of each.
///
/// # Errors
/// The file cannot be opened or read, or is smaller than the smallest read.
pub fn measure(path: &Path, time: Duration, report: &mut dyn FnMut(&Cell)) -> Result<Measured> {
    let len = std::fs::metadata(path).with_context(|| format!("opening {}", path.display()))?.len();
    ensure!(len >= BLOCKS[0], "{} has {len} bytes, expected at least {}", path.display(), BLOCKS[0]);
    let mut memory = Buffers::new();
    let mut cells = Vec::new();
    let mut direct = false;
    for random in [false, true] {
        for depth in DEPTHS {
            for block in BLOCKS {
                if block * u64::from(depth) > MOST_IN_FLIGHT || block > len {
                    continue;
                }
                let cell;
                (cell, direct) = measure_cell(path, len, block, depth, random, time, &mut memory)
                    .with_context(|| format!("reading {}", path.display()))?;
                report(&cell);
                cells.push(cell);
            }
        }
    }
    let device = fit(&cells).context("nothing was measured")?;
    Ok(Measured { path: path.into(), direct, device, cells })
}

fn measure_cell(
    path: &Path,
    len: u64,
    block: u64,
    depth: u16,
    random: bool,
    time: Duration,
    memory: &mut Buffers,
) -> Result<(Cell, bool)> {
    let places = len / block;
    let mut rng = Pcg64Mcg::seed_from_u64(block ^ u64::from(depth));
    let mut at = rng.next_u64() % places;
    let mut next_place = move || {
        at = if random { rng.next_u64() % places } else { (at + 1) % places };
        at * block
    };
    let buffers = memory.aligned().chunks_exact_mut(block as usize).take(depth.into());
    std::thread::scope(|scope| {
        let mut store = FileStore::open_in(scope, path, depth)?;
        let mut started = vec![Instant::now(); depth.into()];
        let mut latencies = Vec::new();
        let start = Instant::now();
        let busy = |request| anyhow!("the store refuses a read: {request:?}");
        for (id, buf) in buffers.enumerate() {
            started[id] = Instant::now();
            let request = ReadRequest::whole(id as u32, next_place(), buf);
            store.submit(request).map_err(|request| busy(request.id))?;
        }
        let mut end = start;
        while let Some(done) = store.wait() {
            done.result.map_err(|e| anyhow!("{e}"))?;
            end = Instant::now();
            latencies.push((end - started[done.id as usize]).as_secs_f64() * 1e6);
            if end - start < time {
                started[done.id as usize] = end;
                let request = ReadRequest::whole(done.id, next_place(), done.buf);
                store.submit(request).map_err(|request| busy(request.id))?;
            }
        }
        let reads = latencies.len() as u64;
        let total: f64 = latencies.iter().sum();
        latencies.sort_by(f64::total_cmp);
        let p99 = latencies[(latencies.len() * 99 / 100).min(latencies.len() - 1)];
        let cell = Cell {
            block,
            depth,
            random,
            bandwidth: (reads * block) as f64 / (end - start).as_secs_f64().max(1e-9),
            latency_us: total / reads as f64,
            latency_p99_us: p99,
            reads,
        };
        Ok((cell, store.is_direct()))
    })
}

/// The device that fits `cells` best: the bandwidth of large random reads, the latency that is left of single reads
/// once their transfer is taken off, the most commands a second, and the fewest reads at once that are enough for reads
/// of any size. `None` without cells.
#[must_use]
pub fn fit(cells: &[Cell]) -> Option<Device> {
    let largest = cells.iter().map(|c| c.block).max()?;
    let large: Vec<&Cell> = cells.iter().filter(|c| c.random && c.block >= LARGE.min(largest)).collect();
    let best = |cells: &[&Cell]| cells.iter().map(|c| c.bandwidth).fold(0.0, f64::max);
    let bandwidth = best(&large);
    let singles = cells.iter().filter(|c| c.random && c.depth == 1);
    let mut latencies: Vec<f64> =
        singles.map(|c| c.latency_us * 1e3 - c.block as f64 / bandwidth * 1e9).filter(|ns| *ns > 0.0).collect();
    latencies.sort_by(f64::total_cmp);
    let latency = latencies.get(latencies.len() / 2).copied().unwrap_or(0.0);
    let iops = cells.iter().filter(|c| c.random).map(|c| c.bandwidth / c.block as f64).fold(0.0, f64::max);
    // The fewest reads at once that reach what any number does, for the size that needs most of them.
    let needed = |block: u64| {
        let same: Vec<&Cell> = cells.iter().filter(|c| c.random && c.block == block).collect();
        let enough = ENOUGH * best(&same);
        same.iter().filter(|c| c.bandwidth >= enough).map(|c| c.depth).min()
    };
    let depth = BLOCKS.into_iter().filter_map(needed).max()?;
    Some(Device {
        bandwidth: bandwidth.max(1.0) as u64,
        latency_ns: latency as u64,
        iops: iops.min(f64::from(u32::MAX)) as u32,
        queue_depth: depth,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device of 400 MB/s, 100 us and 4 reads at once, as its cells would be.
    #[test]
    fn a_modelled_device_is_found_again() {
        let (bandwidth, latency) = (400e6, 100e-6);
        let mut cells = Vec::new();
        for block in BLOCKS {
            for depth in DEPTHS {
                let transfer = block as f64 / bandwidth;
                let at_once = f64::from(depth.min(4));
                let interval = ((latency + transfer) / at_once).max(transfer);
                cells.push(Cell {
                    block,
                    depth,
                    random: true,
                    bandwidth: block as f64 / interval,
                    latency_us: (latency + transfer).max(interval * f64::from(depth)) * 1e6,
                    latency_p99_us: 0.0,
                    reads: 1,
                });
            }
        }
        let device = fit(&cells).unwrap();
        assert!((395_000_000..=400_000_000).contains(&device.bandwidth), "{device:?}");
        assert!((95_000..=105_000).contains(&device.latency_ns), "{device:?}");
        assert_eq!(device.queue_depth, 4);
        assert!(fit(&[]).is_none());
    }

    #[test]
    fn a_file_is_measured() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, vec![7u8; 1 << 20]).unwrap();
        let mut seen = 0;
        let measured = measure(&path, Duration::from_millis(1), &mut |_| seen += 1).unwrap();
        assert_eq!(seen, measured.cells.len());
        // Five sizes fit the file.
        assert_eq!(measured.cells.len(), 2 * DEPTHS.len() * 5);
        assert!(measured.cells.iter().all(|c| c.reads >= u64::from(c.depth) && c.bandwidth > 0.0));
        let saved = folder.path().join("profile.json");
        std::fs::write(&saved, serde_json::to_string(&measured).unwrap()).unwrap();
        assert_eq!(Measured::load(&saved).unwrap().device, measured.device);
        assert!(Measured::load(&path).is_err());
    }
}
