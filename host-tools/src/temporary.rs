//! A file that appears under its name only when it is complete.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

/// A file under its temporary name, beside the final one; removed unless it is finished.
#[derive(Debug)]
pub struct Temporary {
    /// The file, to be read and written.
    pub file: File,
    path: PathBuf,
    finished: bool,
}

impl Temporary {
    /// Creates the temporary file for `target`.
    ///
    /// # Errors
    /// `target` is a folder or a device, or its folder cannot be written to.
    pub fn create(target: &Path) -> Result<Self> {
        let name = target.file_name().context("the path names no file")?;
        if target.is_dir() {
            bail!("it is a folder, expected the name of a file to write");
        }
        let plain = std::fs::metadata(target).map_or(true, |meta| meta.is_file());
        ensure!(plain, "it is a device; write a file and copy that to the device, for example with dd");
        let path = target.with_file_name(format!(".{}.{}.part", name.to_string_lossy(), std::process::id()));
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .with_context(|| format!("creating {}", path.display()))?;
        Ok(Self { file, path, finished: false })
    }

    /// Gives the file its final name, `target`, once it is on the disk.
    ///
    /// # Errors
    /// The file cannot be written out or renamed.
    pub fn finish(mut self, target: &Path) -> Result<()> {
        self.file.sync_all()?;
        std::fs::rename(&self.path, target)?;
        self.finished = true;
        // The new name must survive a loss of power too.
        let folder = target.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder)?.sync_all()?;
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.finished {
            // Nothing is lost if this fails, and the error that led here is the one to report.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
