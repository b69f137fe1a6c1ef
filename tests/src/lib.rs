//! Helpers of the conformance tests: running an image's bytes under every condition that must not matter.

use std::io::Write;
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use forebay_kernels::attention::KvFormat;
use forebay_kernels::exec::{Backend, Exec, Serial, Workers};
use forebay_kernels::pool::ThreadPool;
use forebay_runtime::arena::{Arena, PAGE};
use forebay_runtime::drive::{Observer, prefill};
use forebay_runtime::engine::{Choice, Engine, Output, Stats};
use forebay_runtime::open::Image;
use forebay_runtime::plan::{Limits, Plan};
use forebay_runtime::policy::Policy;
use forebay_storage::store::BlockStore;
use forebay_storage::{MappedStore, MemoryStore};

pub mod hostile;
pub mod reference;

/// Conditions of a run; none of them may change a bit of the logits, except `kv` and `policy`.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Bytes of the arena; `None` is enough for everything.
    pub arena: Option<u64>,
    /// Tokens computed together.
    pub batch: usize,
    /// Rows of logits kept at once.
    pub logit_rows: usize,
    /// Key and value format.
    pub kv: KvFormat,
    /// Threads.
    pub workers: usize,
    /// Name of the back-end; `None` is the best.
    pub backend: Option<&'static str>,
    /// Reads under way at once.
    pub queue_depth: usize,
    /// Longest sequence.
    pub context: usize,
    /// How experts are loaded and kept. Loading that is not exact changes the logits.
    pub policy: Policy,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            arena: None,
            batch: 16,
            logit_rows: 4,
            kv: KvFormat::F32,
            workers: 1,
            backend: None,
            queue_depth: 4,
            context: 64,
            policy: Policy::default(),
        }
    }
}

impl Setup {
    /// The plan's limits.
    pub fn limits(&self, arena: u64) -> Limits {
        Limits {
            arena,
            context: self.context,
            batch: self.batch,
            logit_rows: self.logit_rows,
            kv: self.kv,
            workers: self.workers,
            reserved: 0,
            policy: self.policy,
        }
    }

    /// The back-end.
    pub fn backend(&self) -> Backend {
        self.backend.map_or_else(Backend::detect, |name| Backend::by_name(name).expect("this machine has the back-end"))
    }
}

/// What a run gave.
#[derive(Clone, Debug)]
pub struct Run {
    /// `[tokens][vocab]`.
    pub logits: Vec<f32>,
    /// Choices of each routed layer, in order of position: (layer, `[tokens][k]`).
    pub choices: Vec<(usize, Vec<Choice>)>,
    /// The engine's counts.
    pub stats: Stats,
    /// The plan that was made.
    pub plan: Plan,
}

impl Run {
    /// FNV-1a of the logits' bits: equal for bit-identical runs.
    pub fn hash(&self) -> u64 {
        let bytes = self.logits.iter().flat_map(|x| x.to_bits().to_le_bytes());
        bytes.fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
    }
}

/// Collects the routers' choices.
#[derive(Default)]
struct Routes(Vec<(usize, Vec<Choice>)>);

impl Observer for Routes {
    fn routed(&mut self, layer: usize, choices: &[Choice]) {
        if choices.is_empty() {
            return;
        }
        match self.0.iter_mut().find(|(l, _)| *l == layer) {
            Some((_, all)) => all.extend_from_slice(choices),
            None => self.0.push((layer, choices.to_vec())),
        }
    }
}

/// Memory for an arena of `bytes`, wherever its pages begin.
pub fn arena_memory(bytes: u64) -> Box<[MaybeUninit<u8>]> {
    Box::new_uninit_slice(bytes as usize + PAGE)
}

/// The pages of [`arena_memory`]: an arena of exactly `bytes` (a multiple of the page).
pub fn arena_of(memory: &mut [MaybeUninit<u8>], bytes: u64) -> Arena<'_> {
    let start = memory.as_ptr().align_offset(PAGE);
    Arena::new(&mut memory[start..start + bytes as usize])
}

/// The plan for an image under a setup; the arena's limit is the setup's, or ample.
pub fn plan(image: &[u8], setup: &Setup) -> Result<Plan> {
    let ample = (image.len() as u64 * 4).next_multiple_of(1 << 20) + (64 << 20);
    let mut memory = arena_memory(ample);
    let arena = arena_of(&mut memory, ample);
    let mut store = MemoryStore::new(image);
    let image = Image::open(&mut store, &arena, false)?;
    Ok(Plan::new(&image, setup.limits(setup.arena.unwrap_or(ample)))?)
}

/// Computes the logits of every token through `store`.
pub fn run_on<'a, S: BlockStore<'a>>(store: &mut S, arena: &Arena<'a>, setup: &Setup, tokens: &[u32]) -> Result<Run>
where
    S::Error: Send + Sync + 'static,
{
    let image = Image::open(store, arena, false)?;
    let plan = Plan::new(&image, setup.limits(arena.len() as u64))?;
    let mut engine = Engine::new(&image, plan, arena, setup.queue_depth)?;
    let threads = (setup.workers > 1).then(|| ThreadPool::new(setup.workers));
    let workers: &dyn Workers = threads.as_ref().map_or(&Serial, |pool| pool);
    let exec = Exec { backend: setup.backend(), workers };
    let mut routes = Routes::default();
    let mut logits = Vec::new();
    prefill(&mut engine, store, &exec, tokens, Output::All, &mut routes, |_, rows| logits.extend_from_slice(rows))?;
    ensure!(engine.position() == tokens.len(), "not every token was computed");
    Ok(Run { logits, choices: routes.0, stats: engine.stats(), plan })
}

/// [`run_on`] a memory store.
pub fn run(image: &[u8], setup: &Setup, tokens: &[u32]) -> Result<Run> {
    let bytes = match setup.arena {
        Some(bytes) => bytes,
        None => plan(image, setup)?.total().next_multiple_of(4096) + (1 << 20),
    };
    let mut memory = arena_memory(bytes);
    let arena = arena_of(&mut memory, bytes);
    run_on(&mut MemoryStore::new(image), &arena, setup, tokens)
}

/// [`run_on`] an image that is used where it lies, from the start of a page on. Without a bound the arena has 16 MiB.
pub fn run_mapped(image: &[u8], setup: &Setup, tokens: &[u32]) -> Result<Run> {
    let mut memory = vec![0; image.len() + PAGE];
    let start = memory.as_ptr().align_offset(PAGE);
    let mapped = &mut memory[start..start + image.len()];
    mapped.copy_from_slice(image);
    let bytes = setup.arena.unwrap_or(16 << 20);
    let mut arena = arena_memory(bytes);
    let arena = arena_of(&mut arena, bytes);
    run_on(&mut MappedStore::new(mapped), &arena, setup, tokens)
}

/// Says that a test was skipped, and why: past `eprintln!`, whose words the runner keeps to itself when a test passes.
pub fn skipped(why: &str) {
    // A closed standard error is no reason to fail.
    let _ = std::io::stderr().write_all(format!("\nSKIPPED: {why}\n").as_bytes());
}

/// The folder of references that the repository holds.
pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/references")
}

/// The folder of all references where there is one beside the repository.
pub fn shared_references() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/references");
    beside.is_dir().then_some(beside)
}

/// Converts a model and returns the image's bytes.
pub fn image_of(model: &Path, options: &forebay::convert::ConvertOptions) -> Result<Vec<u8>> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("model.fby");
    forebay::convert::convert(model, &path, options, &mut forebay::convert::Silent)
        .with_context(|| format!("converting {}", model.display()))?;
    Ok(std::fs::read(path)?)
}
