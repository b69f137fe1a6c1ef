//! `forebay flash-profile`

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use forebay::profile::{BLOCKS, Cell, DEPTHS, Measured, measure};
use indicatif::ProgressBar;
use rand_core::{RngCore, SeedableRng};

use super::check_output;
use crate::host::size::{Size, bytes_text};

/// Measure how fast a device reads.
///
/// Reads of 4 KiB to 8 MiB, 1 to 32 at once, one after another and at random, go past the page cache through the store
/// that a run uses. The result says which --device stands for this one.
#[derive(Args)]
pub struct FlashProfileArgs {
    /// A file on the device, such as an image, or a folder, in which a file is made and removed again
    path: PathBuf,
    /// Bytes of the file that is made in a folder
    #[arg(long, value_name = "SIZE", default_value = "256M")]
    size: Size,
    /// Milliseconds for each combination
    #[arg(long, value_name = "MS", default_value = "250", value_parser = super::positive)]
    time: usize,
    /// Write the profile as JSON, to be given as --device
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Print the profile as JSON
    #[arg(long)]
    json: bool,
}

/// A file of noise that is removed again.
struct Temporary(PathBuf);

impl Temporary {
    fn create(folder: &Path, len: u64) -> Result<Self> {
        let made = Self(folder.join(format!(".forebay-profile-{}", std::process::id())));
        let what = || format!("writing {}", made.0.display());
        let mut file = std::fs::File::create(&made.0).with_context(what)?;
        // Noise, so that no device can compress it.
        let mut rng = rand_pcg::Pcg64Mcg::seed_from_u64(1);
        let mut chunk = vec![0; 1 << 20];
        for _ in 0..len.div_ceil(chunk.len() as u64) {
            rng.fill_bytes(&mut chunk);
            file.write_all(&chunk).with_context(what)?;
        }
        file.sync_all().with_context(what)?;
        Ok(made)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            eprintln!("note: {} could not be removed: {error}", self.0.display());
        }
    }
}

pub fn main(args: &FlashProfileArgs) -> Result<()> {
    args.output.as_deref().map_or(Ok(()), check_output)?;
    let made = match args.path.is_dir() {
        true => {
            ensure!(args.size.bytes >= BLOCKS[0], "--size {}: expected at least 4K", args.size.text);
            Some(Temporary::create(&args.path, args.size.bytes)?)
        }
        false => None,
    };
    let path = made.as_ref().map_or(args.path.as_path(), |made| &made.0);
    let bar = ProgressBar::new((2 * BLOCKS.len() * DEPTHS.len()) as u64);
    let measured = measure(path, Duration::from_millis(args.time as u64), &mut |_| bar.inc(1));
    bar.finish_and_clear();
    let measured = Measured { path: args.path.clone(), ..measured? };
    let json = serde_json::to_string_pretty(&measured)?;
    if let Some(output) = &args.output {
        std::fs::write(output, &json).with_context(|| format!("writing {}", output.display()))?;
    }
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{json}")?;
        return Ok(());
    }
    table(&mut out, &measured)?;
    let d = measured.device;
    writeln!(
        out,
        "\n--device bw={:.0}MB/s,lat={:.0}us,iops={},qd={}",
        d.bandwidth as f64 / 1e6,
        d.latency_ns as f64 / 1e3,
        d.iops,
        d.queue_depth
    )?;
    if !measured.direct {
        writeln!(out, "note: reads went through the page cache, which this file system or length does not let pass")?;
    }
    Ok(())
}

/// Bandwidth and latency, a row a size, a column a depth.
fn table(out: &mut impl Write, measured: &Measured) -> Result<()> {
    for random in [false, true] {
        writeln!(out, "{} reads: MB/s (latency, us)", if random { "random" } else { "sequential" })?;
        write!(out, "{:>10}", "")?;
        DEPTHS.iter().try_for_each(|depth| write!(out, "{:>18}", format!("{depth} at once")))?;
        writeln!(out)?;
        for block in BLOCKS {
            let cell = |depth| measured.cells.iter().find(|c| (c.block, c.depth, c.random) == (block, depth, random));
            if DEPTHS.iter().all(|depth| cell(*depth).is_none()) {
                continue;
            }
            write!(out, "{:>10}", bytes_text(block))?;
            for depth in DEPTHS {
                let text = |c: &Cell| format!("{:.0} ({:.0})", c.bandwidth / 1e6, c.latency_us);
                write!(out, "{:>18}", cell(depth).map_or("-".into(), text))?;
            }
            writeln!(out)?;
        }
    }
    Ok(())
}
