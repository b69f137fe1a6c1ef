//! Finding the model to run: an image as it is, a model through the cache of images, or the bundled model.

use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use forebay::convert::{ConvertOptions, Progress, convert};
use forebay_runtime::model::record::RECORD_VERSION;
use forebay_storage::image::{MAGIC, VERSION_MAJOR, VERSION_MINOR};
use indicatif::{ProgressBar, ProgressStyle};

use crate::host::session::ImageFile;

/// Folder of the bundled model.
const BUNDLED: &str = "tiny-lfm2moe";

/// An image to run.
#[derive(Debug)]
pub struct Found {
    /// The image.
    pub file: ImageFile,
    /// Whether it is the bundled model.
    pub bundled: bool,
}

/// The image of `model`: itself, or what it is converted to (once) if it is a GGUF file or a Hugging Face folder; the
/// bundled model's if none is given.
pub fn find(model: Option<&Path>, options: &ConvertOptions) -> Result<Found> {
    let bundled = match model {
        Some(_) => None,
        None => Some(bundled_model()?),
    };
    let (path, bundled) = match (model, &bundled) {
        (Some(path), _) => (path, false),
        (None, Some(path)) => (path.as_path(), true),
        (None, None) => unreachable!("one of the two is there"),
    };
    let file = if is_model(path)? { converted(path, options)? } else { ImageFile::open(path)? };
    Ok(Found { file, bundled })
}

/// Folder of the bundled model: in `FOREBAY_MODELS`, beside the installed executable, or in the source tree.
fn bundled_model() -> Result<PathBuf> {
    let named = std::env::var_os("FOREBAY_MODELS").filter(|v| !v.is_empty()).map(PathBuf::from);
    let installed =
        std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.parent()?.join("share/forebay/models")));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("models");
    let folders: Vec<PathBuf> = match named {
        // Who names a folder does not want another one.
        Some(folder) => vec![folder],
        None => installed.into_iter().chain([source]).collect(),
    };
    let found = folders.iter().map(|folder| folder.join(BUNDLED)).find(|folder| folder.join("config.json").is_file());
    found.with_context(|| {
        let places: Vec<String> = folders.iter().map(|folder| folder.display().to_string()).collect();
        format!("the bundled model {BUNDLED} is not in {}; set FOREBAY_MODELS, or name a model", places.join(" or "))
    })
}

/// Whether `path` is a model that must be converted, rather than an image.
fn is_model(path: &Path) -> Result<bool> {
    let what = || format!("opening {}", path.display());
    if fs::metadata(path).with_context(what)?.is_dir() {
        return Ok(true);
    }
    let mut magic = Vec::new();
    fs::File::open(path).and_then(|f| f.take(MAGIC.len() as u64).read_to_end(&mut magic)).with_context(what)?;
    Ok(magic.starts_with(b"GGUF"))
}

/// The image of the model at `path`, from the cache or converted now.
fn converted(path: &Path, options: &ConvertOptions) -> Result<ImageFile> {
    let folder = cache_folder()?;
    let full = path.canonicalize().with_context(|| format!("opening {}", path.display()))?;
    let stem = full.file_stem().map_or_else(|| "model".into(), |s| s.to_string_lossy().into_owned());
    let image = folder.join(format!("{stem}-{:016x}.fby", identity(&full, options)?));
    if image.is_file() {
        // An image that does not open is from an interrupted disk or a foreign hand: make it again.
        if let Ok(file) = ImageFile::open(&image) {
            return Ok(file);
        }
    }
    let hint =
        || format!("creating the cache folder {}; set FOREBAY_CACHE to a folder that can be written", folder.display());
    fs::create_dir_all(&folder).with_context(hint)?;
    let mut bar = Bar::new(&format!("converting {stem}"));
    let report = convert(path, &image, options, &mut bar);
    bar.finish();
    report.with_context(|| format!("converting {} into the cache folder {}", path.display(), folder.display()))?;
    ImageFile::open(&image)
}

/// `FOREBAY_CACHE`, else the user's cache folder.
fn cache_folder() -> Result<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    variable("FOREBAY_CACHE")
        .or_else(|| variable("XDG_CACHE_HOME").map(|folder| folder.join("forebay")))
        .or_else(|| variable("HOME").map(|folder| folder.join(".cache/forebay")))
        .context("there is no folder for converted images; set FOREBAY_CACHE to one")
}

/// A number for a model's files (names, lengths, times of change), the options and the versions that make an image.
fn identity(path: &Path, options: &ConvertOptions) -> Result<u64> {
    let mut text =
        format!("{} {VERSION_MAJOR}.{VERSION_MINOR}.{RECORD_VERSION} {options:?}", env!("CARGO_PKG_VERSION"));
    let mut files = vec![path.to_path_buf()];
    if path.is_dir() {
        for entry in fs::read_dir(path).with_context(|| format!("reading {}", path.display()))? {
            files.push(entry.with_context(|| format!("reading {}", path.display()))?.path());
        }
    }
    files.sort();
    for file in files {
        let meta = fs::metadata(&file).with_context(|| format!("opening {}", file.display()))?;
        // A folder changes with any file put beside the model's; its files speak for themselves.
        let (len, time) = if meta.is_dir() { (0, (0, 0)) } else { (meta.len(), (meta.mtime(), meta.mtime_nsec())) };
        text += &format!("\n{} {len} {}.{}", file.display(), time.0, time.1);
    }
    Ok(fnv1a(text.as_bytes()))
}

/// FNV-1a of 64 bits.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// A bar on standard error, where that is a terminal.
pub struct Bar(ProgressBar);

impl Bar {
    /// A bar of bytes.
    pub fn new(what: &str) -> Self {
        let bar = ProgressBar::new(0);
        if let Ok(style) = ProgressStyle::with_template("{msg} [{bar:30}] {bytes}/{total_bytes} {eta}") {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(what.to_owned());
        Self(bar)
    }

    /// Removes the bar.
    pub fn finish(&self) {
        self.0.finish_and_clear();
    }
}

impl Progress for Bar {
    fn set_total(&mut self, bytes: u64) {
        self.0.set_length(bytes);
    }
    fn advance(&mut self, bytes: u64) {
        self.0.inc(bytes);
    }
    fn message(&mut self, text: &str) {
        self.0.suspend(|| eprintln!("note: {text}"));
    }
}

/// Refuses options of conversion where nothing is converted.
pub fn check_options(model: Option<&Path>, given: bool) -> Result<()> {
    if let Some(path) = model
        && given
        && path.exists()
    {
        ensure!(
            is_model(path)?,
            "{} is converted already: options such as --weights are for models that are not",
            path.display()
        );
    }
    Ok(())
}
