//! A host's run of an image: one arena, one store, one engine, one pool of threads.
//!
//! An image is looked at twice. [`ImageFile::probe`] reads its tables into memory of its own, to plan the arena and
//! to say exactly what a limit lacks; [`run`] then takes the arena, and everything lives in that.

use std::fs::File;
use std::io::{BufWriter, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use forebay::template::Template;
use forebay::trace;
use forebay_kernels::attention::KvFormat;
use forebay_kernels::exec::{Backend, Exec};
use forebay_kernels::pages::prefer_huge;
use forebay_kernels::pool::ThreadPool;
use forebay_kernels::weights::Encoding;
use forebay_runtime::arena::{Arena, PAGE, table_bytes};
use forebay_runtime::drive::{self, Observer};
use forebay_runtime::engine::{Engine, EngineError, Output, ReadFault};
use forebay_runtime::governor::Governor;
use forebay_runtime::model::Model;
use forebay_runtime::model::record::Role;
use forebay_runtime::open::Image;
use forebay_runtime::plan::{Limits, Plan, PlanError};
use forebay_runtime::policy::Choice;
use forebay_runtime::policy::Policy;
use forebay_runtime::sample::{Candidate, PENALTY_WINDOW, Sampler};
use forebay_runtime::tokenizer::{EncodeOptions, Tokenizer, TokenizerError};
use forebay_storage::image::{MAGIC, SUPERBLOCK_SLOT, SectionKind, Superblock};
use forebay_storage::{FileStore, MappedStore};
use zerocopy::FromZeros;

use crate::host::size::{Size, bytes_text};
use crate::host::store::{HostStore, StoreOptions};

/// An image on disk and its superblock.
#[derive(Debug)]
pub struct ImageFile {
    /// Where it is.
    pub path: PathBuf,
    /// Bytes of the file.
    pub len: u64,
    /// The superblock in force.
    pub superblock: Superblock,
}

impl ImageFile {
    /// Reads the superblocks of the image at `path`.
    pub fn open(path: &Path) -> Result<Self> {
        let what = || format!("opening {}", path.display());
        let file = File::open(path).with_context(what)?;
        let meta = file.metadata().with_context(what)?;
        ensure!(meta.is_file(), "{} is not a file; expected an image", path.display());
        let mut slots = Vec::new();
        file.take(2 * SUPERBLOCK_SLOT)
            .read_to_end(&mut slots)
            .with_context(|| format!("reading {}", path.display()))?;
        let magic = |at: usize| slots.get(at..at + MAGIC.len()) == Some(&MAGIC);
        ensure!(
            magic(0) || magic(SUPERBLOCK_SLOT as usize),
            "{} is not a Forebay image (it does not begin with the magic \"FOREBAY\"); make one with `forebay convert`",
            path.display()
        );
        let superblock = Superblock::parse(&slots, meta.len()).with_context(|| {
            format!("{} is damaged; convert the model again, or copy the image again", path.display())
        })?;
        Ok(Self { path: path.into(), len: meta.len(), superblock })
    }

    /// Bytes that the tables take in an arena.
    fn tables_len(&self) -> u64 {
        let page = u64::from(self.superblock.page());
        let arena_page = |len: u64| len.next_multiple_of(PAGE as u64);
        let sections: u64 = self.superblock.sections().map(|s| arena_page(s.len.next_multiple_of(page))).sum();
        sections + 2 * SUPERBLOCK_SLOT
    }

    /// A section that is text, such as the chat template.
    pub fn text(&self, kind: SectionKind) -> Result<Option<String>> {
        use std::os::unix::fs::FileExt;
        let Some(section) = self.superblock.section(kind) else { return Ok(None) };
        let what = || format!("reading the {kind} section of {}", self.path.display());
        let mut bytes = vec![0; usize::try_from(section.len)?];
        File::open(&self.path).and_then(|f| f.read_exact_at(&mut bytes, section.offset)).with_context(what)?;
        section.verify(&bytes).with_context(what)?;
        String::from_utf8(bytes).map(Some).with_context(what)
    }

    /// The chat template, with the tokens of `tokenizer`.
    pub fn chat_template(&self, tokenizer: &Tokenizer<'_>) -> Result<Template> {
        let path = self.path.display();
        let source = self.text(SectionKind::ChatTemplate)?.with_context(|| {
            format!("{path} has no chat template: its model was not made for chat; use `forebay run -p` instead")
        })?;
        Template::new(source, tokenizer).with_context(|| format!("the chat template of {path}"))
    }

    /// Opens the image in memory of its own and hands it to `look`.
    pub fn probe<T>(&self, look: impl FnOnce(&Image<'_>, Option<Tokenizer<'_>>) -> Result<T>) -> Result<T> {
        let len = self.tables_len();
        let mut memory = Memory::new(len, len)?;
        let memory = &mut memory;
        std::thread::scope(|scope| {
            let arena = memory.arena();
            let mut store = FileStore::open_cached_in(scope, &self.path, 1)
                .with_context(|| format!("opening {}", self.path.display()))?;
            let image = self.tables(&mut store, &arena, true)?;
            let tokenizer = self.tokenizer(&image)?;
            look(&image, tokenizer)
        })
    }

    /// The same for a board that uses the image where it lies: all of it is read into memory.
    pub fn probe_mapped<T>(&self, look: impl FnOnce(&Image<'_>) -> Result<T>) -> Result<T> {
        let bytes = std::fs::read(&self.path).with_context(|| format!("reading {}", self.path.display()))?;
        let mut pages = vec![0; bytes.len() + PAGE];
        let start = pages.as_ptr().align_offset(PAGE).min(PAGE);
        let mapped = &mut pages[start..start + bytes.len()];
        mapped.copy_from_slice(&bytes);
        look(&self.tables(&mut MappedStore::new(mapped), &Arena::new(&mut []), true)?)
    }

    fn tables<'a, S>(&self, store: &mut S, arena: &Arena<'a>, with_tokenizer: bool) -> Result<Image<'a>>
    where
        S: forebay_storage::store::BlockStore<'a>,
        S::Error: Send + Sync + 'static,
    {
        Image::open(store, arena, with_tokenizer).map_err(|e| anyhow!("opening {}: {e}", self.path.display()))
    }

    fn tokenizer<'a>(&self, image: &Image<'a>) -> Result<Option<Tokenizer<'a>>> {
        let parse = |section| {
            Tokenizer::parse(section).with_context(|| format!("{} is damaged; convert it again", self.path.display()))
        };
        image.tokenizer().map(parse).transpose()
    }
}

/// Memory for an arena.
struct Memory {
    /// For what is read from the image.
    zeros: Box<[u8]>,
    /// For all else.
    bytes: Vec<u8>,
    /// Bytes of the two parts.
    filled: usize,
    rest: usize,
}

impl Memory {
    /// Room for `len` bytes, of which `filled` are for what is read from the image and may be given by the system page
    /// by page while reads are under way. If that is 0, all of it is given at once, in large pages where there are some:
    /// they are faster to compute with, but to touch one first can take longer than reading it.
    fn new(len: u64, filled: u64) -> Result<Self> {
        let refused = || format!("the system does not give {} of memory; give a smaller --ram", bytes_text(len));
        let size = |len: u64| usize::try_from(len).ok().filter(|len| len.checked_add(PAGE).is_some());
        let (filled, rest) = size(filled).zip(size(len.saturating_sub(filled))).with_context(refused)?;
        let zeros = <[u8]>::new_box_zeroed_with_elems(filled + PAGE).ok().with_context(refused)?;
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(rest + PAGE).with_context(refused)?;
        Ok(Self { zeros, bytes, filled, rest })
    }

    /// Exactly the bytes asked for, in whole pages.
    fn arena(&mut self) -> Arena<'_> {
        let zeros = self.zeros.as_ptr().align_offset(PAGE).min(PAGE);
        let spare = self.bytes.spare_capacity_mut();
        let start = spare.as_ptr().align_offset(PAGE).min(spare.len());
        let end = (start + self.rest).min(spare.len());
        if self.filled == 0 {
            prefer_huge(&mut spare[start..end]);
        }
        Arena::with_zeros(&mut self.zeros[zeros..zeros + self.filled], &mut spare[start..end])
    }
}

/// How large the arena is to be.
#[derive(Clone, Debug)]
pub enum Ram {
    /// So many bytes.
    Given(Size),
    /// So many bytes, as the image's plan says.
    Planned(u64),
    /// Room for everything, but at most half of the machine's memory.
    Ample,
    /// A pool of at most a third of the streamed bytes.
    Streaming,
}

/// What the caller keeps in the arena beside the engine.
#[derive(Clone, Copy, Debug, Default)]
pub struct Extra {
    /// Candidates of the sampler.
    pub candidates: usize,
    /// Words of scratch for the tokenizer.
    pub scratch: usize,
}

impl Extra {
    fn bytes(&self, context: usize) -> u64 {
        table_bytes::<u32>(context) + table_bytes::<Candidate>(self.candidates) + table_bytes::<u32>(self.scratch)
    }
}

/// Everything that [`run`] is told.
#[derive(Debug)]
pub struct Setup {
    /// The arena's plan.
    pub plan: Plan,
    /// What else lies in the arena.
    pub extra: Extra,
    /// Who computes.
    pub backend: Backend,
    /// Threads that compute.
    pub threads: usize,
    /// How the image is read.
    pub store: StoreOptions,
    /// Whether the tokenizer's tables are read.
    pub with_tokenizer: bool,
    /// Milliseconds that a generated token may take, under a deadline.
    pub deadline_ms: Option<f64>,
    /// What comes from the image's plan, by name.
    pub planned: Vec<&'static str>,
}

/// What a plan is made from, besides the image.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Tokens of the longest sequence.
    pub context: usize,
    /// Most tokens computed together.
    pub batch: usize,
    /// Rows of logits kept at once.
    pub logit_rows: usize,
    /// How keys and values are kept.
    pub kv: KvFormat,
    /// Threads that compute.
    pub threads: usize,
    /// How experts are loaded and kept.
    pub policy: Policy,
    /// What else lies in the arena.
    pub extra: Extra,
}

/// Plans an arena for `request`.
pub fn plan(file: &ImageFile, image: &Image<'_>, request: &Request, ram: &Ram) -> Result<Plan> {
    let with = |arena: u64| {
        let limits = Limits {
            arena,
            context: request.context,
            batch: request.batch,
            logit_rows: request.logit_rows.min(request.batch),
            kv: request.kv,
            workers: request.threads,
            reserved: request.extra.bytes(request.context),
            policy: request.policy,
        };
        Plan::new(image, limits)
    };
    // With all the memory that an address can name, the plan says what everything takes, and the least that would do.
    let whole = with(isize::MAX as u64).with_context(|| format!("planning {}", file.path.display()))?;
    let page = PAGE as u64;
    // The tables' roundings are paid apart from `total`; a page covers them.
    let everything = whole.total().next_multiple_of(page) + page;
    let arena = match ram {
        Ram::Given(size) => size.bytes,
        Ram::Planned(bytes) => *bytes,
        Ram::Ample => everything.min(physical_memory().map_or(u64::MAX, |n| n / 2)),
        Ram::Streaming => {
            let share = image.model().streamed_len() / 3;
            // The largest arena whose pool keeps within the share.
            let (mut low, mut high) = (whole.least / page, everything / page);
            while low < high {
                let middle = low + (high - low).div_ceil(2);
                match with(middle * page) {
                    Ok(plan) if plan.pool <= share => low = middle,
                    Ok(_) => high = middle - 1,
                    Err(_) => low = middle,
                }
            }
            low * page
        }
    };
    with(arena / page * page).map_err(|error| match error {
        PlanError::TooSmall { need, context, .. } => {
            let given = match ram {
                Ram::Given(size) => format!("--ram {}", size.text),
                Ram::Planned(bytes) => format!("the memory of the image's plan ({})", bytes_text(*bytes)),
                _ => format!("half of this machine's memory ({})", bytes_text(arena)),
            };
            let path = file.path.display();
            anyhow!(
                "{given} is too small for {path} with a context of {context} tokens: give at least --ram {need} ({}), \
                 or a shorter context with -c",
                bytes_text(need)
            )
        }
        other => anyhow!(other).context(format!("planning {}", file.path.display())),
    })
}

/// Bytes of RAM of this machine, or of its control group.
fn physical_memory() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let total = info.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
    let total = total.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024;
    let group = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok();
    let group = group.and_then(|text| text.trim().parse().ok()).unwrap_or(u64::MAX);
    Some(total.min(group))
}

/// Cores of this machine that may be used, a core with two threads counted once.
pub fn cores() -> usize {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut cores: Vec<String> = (0..threads)
        .filter_map(|cpu| {
            std::fs::read_to_string(format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")).ok()
        })
        .collect();
    if cores.len() < threads {
        return threads;
    }
    cores.sort();
    cores.dedup();
    cores.len().max(1)
}

/// How keys and values are kept unless it is said: as `f32` where the weights are, else as `f16`.
pub fn default_kv(model: &Model<'_>) -> KvFormat {
    const ROLES: [Role; 4] = [Role::Query, Role::Key, Role::ConvIn, Role::ConvOut];
    let projection = |role: u16| Role::from_u16(role).is_some_and(|role| ROLES.contains(&role));
    let mut shapes = model.tensors().iter().filter(|t| projection(t.role.get())).filter_map(|t| t.matrix.shape());
    if shapes.all(|shape| shape.encoding == Encoding::F32) { KvFormat::F32 } else { KvFormat::F16 }
}

/// Bytes at the peak of this process's resident set.
pub fn peak_rss() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    Some(peak.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// A text's ids, and the words of scratch that finding them takes.
pub fn encode(tokenizer: &Tokenizer<'_>, text: &str, options: EncodeOptions) -> Result<(Vec<u32>, usize)> {
    let (mut scratch, mut ids) = (Vec::new(), Vec::new());
    loop {
        match tokenizer.encode(text, options, &mut scratch, &mut ids) {
            Ok(count) => {
                ids.truncate(count);
                return Ok((ids, scratch.len()));
            }
            Err(TokenizerError::ScratchTooSmall { needed, given }) if needed > given => scratch.resize(needed, 0),
            Err(TokenizerError::OutputTooSmall { needed, given }) if needed > given => ids.resize(needed, 0),
            Err(error) => return Err(error.into()),
        }
    }
}

/// A trace that is being written, and what went wrong with it first.
#[derive(Debug)]
struct Tracing {
    writer: trace::Writer<BufWriter<File>>,
    failure: Option<anyhow::Error>,
}

/// Measures how long the engine waits for the store, and writes down what it chooses.
#[derive(Debug, Default)]
struct Stall {
    since: Option<Instant>,
    total: Duration,
    tracing: Option<Tracing>,
}

impl Observer for Stall {
    fn routed(&mut self, layer: usize, choices: &[Choice]) {
        if let Some(tracing) = &mut self.tracing
            && tracing.failure.is_none()
        {
            tracing.failure = tracing.writer.event(layer, choices).err();
        }
    }
    fn wait_begins(&mut self) {
        self.since = Some(Instant::now());
    }
    fn wait_ends(&mut self) {
        self.total += self.since.take().map_or(Duration::ZERO, |since| since.elapsed());
    }
}

/// An engine with everything that it runs on.
pub struct Session<'a, 's> {
    /// The image.
    pub file: &'s ImageFile,
    /// The engine.
    pub engine: Engine<'a>,
    /// Its tokenizer.
    pub tokenizer: Option<Tokenizer<'a>>,
    /// The sequence: as many tokens as the context.
    pub history: &'a mut [u32],
    /// Bytes of all units of the image.
    pub streamed_len: u64,
    /// Whether the store reads past the page cache.
    pub store_name: String,
    store: HostStore<'a, 's>,
    candidates: &'a mut [Candidate],
    scratch: &'a mut [u32],
    workers: ThreadPool,
    backend: Backend,
    stall: Stall,
    governor: Option<Governor>,
    started: Instant,
    trace_head: trace::Head,
}

impl Session<'_, '_> {
    /// Feeds `history[from..to]` and chooses the token that comes next.
    pub fn next(&mut self, from: usize, to: usize, sampler: &mut Sampler) -> Result<u32> {
        let before = self.begin(to - from);
        let exec = Exec { backend: self.backend, workers: &self.workers };
        let (history, candidates) = (&*self.history, &mut *self.candidates);
        let recent = &history[to.saturating_sub(PENALTY_WINDOW)..to];
        let mut token = None;
        let fed = drive::prefill(
            &mut self.engine,
            &mut self.store,
            &exec,
            &history[from..to],
            Output::Last,
            &mut self.stall,
            |_, logits| token = Some(sampler.sample(logits, recent, candidates)),
        );
        fed.map_err(|e| self.explain(e))?;
        self.end(to - from, before);
        token.context("the engine gave no logits")
    }

    /// Feeds `tokens`; the logits that `output` wants go to `rows`: position of the first row, [rows][vocab].
    pub fn feed(&mut self, tokens: &[u32], output: Output, rows: impl FnMut(usize, &mut [f32])) -> Result<()> {
        let before = self.begin(tokens.len());
        let exec = Exec { backend: self.backend, workers: &self.workers };
        drive::prefill(&mut self.engine, &mut self.store, &exec, tokens, output, &mut self.stall, rows)
            .map_err(|e| self.explain(e))?;
        self.end(tokens.len(), before);
        Ok(())
    }

    /// Tells the engine what the governor lets `tokens` tokens read: a prompt what it wants, a single token its share.
    fn begin(&mut self, tokens: usize) -> (Instant, Duration, u64) {
        if let Some(governor) = &self.governor {
            self.engine.allow(if tokens == 1 { governor.allowance() } else { u64::MAX });
        }
        (Instant::now(), self.stall.total, self.engine.stats().unit_bytes)
    }

    /// Tells the governor what a single token took.
    fn end(&mut self, tokens: usize, (start, stalled, bytes): (Instant, Duration, u64)) {
        if let (Some(governor), 1) = (&mut self.governor, tokens) {
            let us = |time: Duration| time.as_secs_f64() * 1e6;
            let read = self.engine.stats().unit_bytes - bytes;
            governor.observe(us(start.elapsed()), us(self.stall.total - stalled), read);
        }
    }

    /// Tokens that took longer than their deadline, and how many had one.
    pub fn late(&self) -> Option<(u64, u64)> {
        self.governor.as_ref().map(Governor::late)
    }

    /// Time since the run began: before its memory was taken and its tables were read.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Feeds `tokens`, watched by `observer`; the logits that `output` wants go to `rows`, as [`Self::feed`] has it.
    pub fn watch(
        &mut self,
        tokens: &[u32],
        output: Output,
        observer: &mut impl Observer,
        rows: impl FnMut(usize, &mut [f32]),
    ) -> Result<()> {
        let exec = Exec { backend: self.backend, workers: &self.workers };
        drive::prefill(&mut self.engine, &mut self.store, &exec, tokens, output, observer, rows)
            .map_err(|e| self.explain(e))
    }

    /// Starts a new sequence.
    pub fn reset(&mut self) -> Result<()> {
        self.engine.reset().map_err(|e| self.explain(e))
    }

    /// Writes the ids of `text` to the history from `at` on and gives the position after them.
    pub fn encode(&mut self, text: &str, options: EncodeOptions, at: usize) -> Result<usize> {
        let tokenizer = self.tokenizer.context("the image has no tokenizer; give --token-ids")?;
        match tokenizer.encode(text, options, self.scratch, &mut self.history[at..]) {
            Ok(count) => Ok(at + count),
            Err(TokenizerError::OutputTooSmall { needed, given }) => {
                bail!(
                    "the text has {needed} tokens but only {given} of the context's {} are left; \
                     give a longer context with -c",
                    self.history.len()
                )
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Writes a trace of all that is computed from now on into `path`, until [`Self::end_trace`].
    pub fn begin_trace(&mut self, path: &Path) -> Result<()> {
        let out = File::create(path).with_context(|| format!("writing {}", path.display()))?;
        let writer = trace::Writer::new(BufWriter::new(out), self.trace_head.clone())?;
        self.stall.tracing = Some(Tracing { writer, failure: None });
        Ok(())
    }

    /// Ends the trace, if one was begun.
    pub fn end_trace(&mut self) -> Result<()> {
        let Some(Tracing { writer, failure }) = self.stall.tracing.take() else { return Ok(()) };
        failure.map_or(Ok(()), Err).and_then(|()| writer.finish().map(drop)).context("writing the trace")
    }

    /// Time spent waiting for the store.
    pub fn stalled(&self) -> Duration {
        self.stall.total
    }

    /// Reads that may be in flight.
    pub fn depth(&self) -> usize {
        self.store.depth()
    }

    /// Name of the instruction set.
    pub fn backend(&self) -> &'static str {
        self.backend.name()
    }

    /// What went wrong, where, and what to do about it.
    fn explain(&self, error: EngineError) -> anyhow::Error {
        let path = self.file.path.display();
        let EngineError::Read { fault, .. } = error else {
            return anyhow!("{path}: {error}");
        };
        let said = self.store.last_error().map_or_else(String::new, |said| format!(" ({said})"));
        let remedy = match fault {
            ReadFault::Checksum => "the image is damaged: copy or convert it again",
            ReadFault::Short => "the file ends before its image does: copy or convert it again",
            ReadFault::Refused => "the image's page does not suit the device: convert it with a larger --page",
            _ => "the device fails: check it, or copy the image to another one",
        };
        anyhow!("{path}: {error}{said}; {remedy}")
    }
}

/// Runs `body` with an engine for `file`.
pub fn run<T>(file: &ImageFile, setup: Setup, body: impl FnOnce(&mut Session<'_, '_>) -> Result<T>) -> Result<T> {
    let started = Instant::now();
    let bytes = setup.store.load(&file.path)?;
    let plan = &setup.plan;
    // What is read once and stays wants large pages, what is streamed an early first token.
    let filled = if plan.holds_all_units() { 0 } else { plan.tables + plan.resident + plan.pool };
    let mut memory = Memory::new(plan.limits.arena, filled)?;
    let memory = &mut memory;
    std::thread::scope(|scope| {
        let arena = memory.arena();
        let mut store = HostStore::open_in(scope, file, &setup.store, bytes.as_deref())?;
        let image = file.tables(&mut store, &arena, setup.with_tokenizer)?;
        let tokenizer = file.tokenizer(&image)?;
        let depth = store.depth();
        let context = setup.plan.limits.context;
        let engine = Engine::new(&image, setup.plan, &arena, depth)?;
        let mut session = Session {
            file,
            tokenizer,
            history: arena.table(context, || 0)?,
            candidates: arena.table(setup.extra.candidates, Candidate::default)?,
            scratch: arena.table(setup.extra.scratch, || 0)?,
            streamed_len: image.model().streamed_len(),
            store_name: store.name(),
            workers: ThreadPool::new(setup.threads),
            backend: setup.backend,
            stall: Stall::default(),
            governor: setup.deadline_ms.map(|ms| {
                let rate = setup.store.device.map_or(0.0, |device| device.bandwidth as f64);
                Governor::new(ms * 1e3, rate)
            }),
            started,
            trace_head: trace::Head::new(file.superblock.id(), image.model()),
            engine,
            store,
        };
        body(&mut session)
    })
}
