//! The engine: a step machine over one arena that says what it wants read and computes on what it has.
//!
//! It never blocks, reads no clock and knows no device. [`Engine::step`] returns a read to start, or that it has
//! computed a piece, or that it waits, or logits; [`Engine::complete`] gives a read's buffer back. A buffer in
//! flight belongs to its read, so devices fill it while `step` goes on with what is resident.

mod clusters;
mod compute;
mod reads;
mod routing;
mod stats;

pub use stats::{LayerStats, Stats};

use forebay_kernels::exec::Exec;
use forebay_storage::store::ReadRequest;
use heapless::LinearMap;

use crate::arena::{Arena, OutOfArena, PAGE};
use crate::cache::{Directory, Entry, UnitUse};
use crate::model::record::{NO_LAYER, Operator, Router};
use crate::model::{LayerShape, Model};
use crate::open::{Image, part};
use crate::plan::{Plan, kv_shape, unit_levels};
pub use crate::policy::Choice;
use crate::pool::Pool;

/// How often a read is tried before its failure ends the run.
pub const READ_ATTEMPTS: u8 = 3;
/// Most reads that can have failed and be under way again at once.
const MAX_RETRYING: usize = 64;
/// Marks the id of a read of resident tensors; the other bits are the layer.
const GROUP_READ: u32 = 1 << 31;

/// What was being read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum ReadTarget {
    /// The resident tensors of a layer, or of the model ([`NO_LAYER`]).
    Group {
        /// The layer.
        layer: u16,
    },
    /// A unit of a layer.
    Unit {
        /// The layer.
        layer: u16,
        /// Expert or neuron cluster.
        unit: u16,
    },
}

impl core::fmt::Display for ReadTarget {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Group { layer: NO_LAYER } => f.write_str("the model's resident tensors"),
            Self::Group { layer } => write!(f, "the resident tensors of layer {layer}"),
            Self::Unit { layer, unit } => write!(f, "unit {unit} of layer {layer}"),
        }
    }
}

/// Why a read was not good, without the device's own words.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum ReadFault {
    /// The device reported an error.
    #[error("the device reported an error")]
    Device,
    /// The request did not suit the device.
    #[error("the device refused the request as out of bounds or misaligned")]
    Refused,
    /// Too few bytes arrived.
    #[error("too few bytes arrived")]
    Short,
    /// The device stopped answering.
    #[error("the device stopped answering")]
    Gone,
    /// The bytes do not have their checksum.
    #[error("checksum mismatch")]
    Checksum,
}

/// Why the engine stops.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum EngineError {
    /// The arena is smaller than its plan.
    #[error("{0}")]
    Arena(#[from] OutOfArena),
    /// A read failed [`READ_ATTEMPTS`] times.
    #[error("reading {target} (image offset {offset}, {len} bytes) failed {READ_ATTEMPTS} times: {fault}")]
    Read {
        /// What was read.
        target: ReadTarget,
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
        /// The last failure.
        fault: ReadFault,
    },
    /// A token is not in the vocabulary.
    #[error("token {token} is outside of the vocabulary of {vocab}")]
    Token {
        /// The token.
        token: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// The sequence would be longer than the context.
    #[error("the context of {context} tokens is full: {used} used, {more} more asked for")]
    ContextFull {
        /// Tokens the plan allows.
        context: usize,
        /// Tokens used.
        used: usize,
        /// Tokens given.
        more: usize,
    },
    /// More tokens were given than the plan's batch, or none.
    #[error("{count} tokens were given at once; the plan takes 1 to {batch}")]
    Batch {
        /// Tokens given.
        count: usize,
        /// The plan's batch.
        batch: usize,
    },
    /// Tokens were given while others were being computed.
    #[error("tokens were given before the former ones were finished")]
    Busy,
    /// The logits of a position are not numbers: the weights are damaged or overflow.
    #[error("the logits at position {position} are not finite: a weight is NaN or too large")]
    NonFinite {
        /// The position.
        position: usize,
    },
    /// The store returned a buffer of a read that the engine did not ask for.
    #[error("the store completed a read that was not asked for (id {id:#x})")]
    UnknownRead {
        /// The completion's id.
        id: u32,
    },
    /// More workers than the plan has scratch memory for.
    #[error("{count} workers compute, but the plan was made for {planned}")]
    Workers {
        /// Workers given.
        count: usize,
        /// Workers planned.
        planned: usize,
    },
    /// Reads are in flight, and the store has given up waiting for them.
    #[error("the store stopped answering with {in_flight} reads in flight")]
    NoAnswer {
        /// Reads that the store keeps.
        in_flight: usize,
    },
    /// The engine contradicts itself: a bug.
    #[error("internal error: {0}; please report it")]
    LogicBug(&'static str),
}

/// Which positions' logits are wanted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Output {
    /// None: the tokens only fill the state.
    None,
    /// The last token's.
    Last,
    /// Every token's.
    All,
}

/// What [`Engine::step`] did or wants.
#[derive(Debug)]
pub enum Step<'a> {
    /// Start this read; give its completion to [`Engine::complete`].
    Read(ReadRequest<'a>),
    /// A piece of the work is done.
    Computed,
    /// The layer's experts were chosen; [`Engine::choices`] has them until the layer is finished.
    Routed {
        /// The layer.
        layer: usize,
    },
    /// Nothing can be computed until a read completes.
    Wait,
    /// [`Engine::logits`] has `rows` rows, the first for `position`.
    Logits {
        /// Position of the first row.
        position: usize,
        /// Number of rows.
        rows: usize,
    },
    /// All tokens given are finished.
    Idle,
}

/// A unit that the present layer needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct UnitNeed {
    unit: u16,
    /// Levels that must be resident before it is computed.
    levels: u8,
    done: bool,
}

/// An expert that a later layer will probably need.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Predicted {
    layer: u16,
    unit: u16,
    levels: u8,
}

/// Resident tensors of a layer, or of the model.
#[derive(Debug)]
enum Group<'a> {
    Waiting(&'a mut [u8]),
    Reading,
    Ready(&'a [u8]),
}

/// A layer's description, resident tensors and state.
#[derive(Debug)]
pub(crate) struct LayerState<'a> {
    shape: LayerShape,
    group: Group<'a>,
    /// Number of the layer's first unit, counted over all layers.
    unit_base: u32,
    /// Whether a predictor chooses the neuron clusters that a token uses; else a dense layer uses all of them.
    sparse: bool,
    /// The first units, as many, never give way once they are in the pool.
    pinned: usize,
    /// Levels of full precision: all, or the policy's most.
    levels: u8,
    /// Mean range of the router's selection scores, and how many tokens it was taken over.
    range: (f32, u32),
    stats: LayerStats,
    keys: &'a mut [u8],
    values: &'a mut [u8],
    conv: &'a mut [f32],
}

/// Where the engine is in its work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Idle,
    Embed,
    Operator(usize),
    Route(usize),
    Units(usize),
    Head(usize),
}

/// Buffers of the decoder's pass; see `Working` in the plan for their sizes.
#[derive(Debug)]
struct Buffers<'a> {
    residual: &'a mut [f32],
    normed: &'a mut [f32],
    operator: &'a mut [f32],
    mixed: &'a mut [f32],
    output: &'a mut [f32],
    gate: &'a mut [f32],
    up: &'a mut [f32],
    gathered: &'a mut [f32],
    partial: &'a mut [f32],
    scores: &'a mut [f32],
    cos: &'a mut [f32],
    sin: &'a mut [f32],
    attention: &'a mut [f32],
    logits: &'a mut [f32],
    acts: &'a mut [u8],
    unit_acts: &'a mut [u8],
    choices: &'a mut [Choice],
    needs: &'a mut [UnitNeed],
    predicted: &'a mut [Predicted],
    tokens: &'a mut [u32],
}

/// A model being run. One sequence at a time.
#[derive(Debug)]
pub struct Engine<'a> {
    model: Model<'a>,
    /// The image, if it is mapped: units and resident tensors are used where they are.
    mapped: Option<&'a [u8]>,
    plan: Plan,
    layers: &'a mut [Option<LayerState<'a>>],
    global: Group<'a>,
    pool: Pool<'a>,
    buffers: Buffers<'a>,
    phase: Phase,
    output: Output,
    /// Tokens before the present batch.
    position: usize,
    /// Tokens of the present batch.
    count: usize,
    /// The factor that the batch's rotations were computed with.
    rotated: Option<f32>,
    /// Needs of the present layer.
    need_count: usize,
    /// Scores of the present layer's clusters above this keep them.
    threshold: f32,
    /// What the last step computed: the first need, how many, and for how many tokens.
    computed: (usize, usize, usize),
    /// Experts predicted for later layers.
    predicted_count: usize,
    /// Bytes of units that may still be read for the present token.
    allowance: u64,
    /// Reads under way.
    in_flight: usize,
    queue_depth: usize,
    retrying: LinearMap<u32, u8, MAX_RETRYING>,
    stats: Stats,
}

/// Cuts the first `len` bytes, rounded up to a page, off `pages`; the result has `len` bytes.
fn cut<'a>(pages: &mut &'a mut [u8], len: usize) -> &'a mut [u8] {
    let all = core::mem::take(pages);
    let (piece, rest) = all.split_at_mut(len.next_multiple_of(PAGE).min(all.len()));
    *pages = rest;
    let len = len.min(piece.len());
    &mut piece[..len]
}

impl<'a> Group<'a> {
    /// The tensors from `offset` on, `len` bytes: in a mapped image, or to be read into the next of `pages`.
    fn new(image: Option<&'a [u8]>, pages: &mut &'a mut [u8], (offset, len): (u64, u64)) -> Result<Self, EngineError> {
        if let Some(image) = image {
            let bytes = part(image, offset, len).ok_or(EngineError::LogicBug("tensors outside of the image"))?;
            return Ok(Self::Ready(bytes));
        }
        Ok(Self::of(cut(pages, len as usize)))
    }

    fn of(buf: &'a mut [u8]) -> Self {
        if buf.is_empty() { Self::Ready(&[]) } else { Self::Waiting(buf) }
    }

    fn ready(&self) -> Option<&'a [u8]> {
        match self {
            Self::Ready(bytes) => Some(bytes),
            _ => None,
        }
    }
}

impl<'a> Engine<'a> {
    /// Splits the arena by the plan. `queue_depth` is the number of reads that may be under way at once (at
    /// least 1 is taken). Reads nothing yet.
    pub fn new(image: &Image<'a>, plan: Plan, arena: &Arena<'a>, queue_depth: usize) -> Result<Self, EngineError> {
        let model = *image.model();
        // Everything that devices fill comes first, in one piece: then no byte is lost to alignment.
        let mut pages = arena.pages((plan.resident + plan.pool) as usize)?;
        let mapped = image.mapped();
        let global = Group::new(mapped, &mut pages, model.group(NO_LAYER))?;
        let mut failed = None;
        let (mut index, mut unit_base) = (0, 0);
        let layers = arena.table(model.layer_count(), || {
            let layer = LayerState::new(&model, &plan, arena, (mapped, &mut pages), index, unit_base);
            index += 1;
            layer.inspect(|l| unit_base += l.shape.units as u32).map_err(|e| failed = Some(e)).ok()
        })?;
        if let Some(error) = failed {
            return Err(error);
        }
        let slots = arena.table(plan.slots, || Some(cut(&mut pages, plan.slot_len as usize)))?;
        let units = if mapped.is_some() { 0 } else { model.unit_count() };
        let directory = Directory::new(
            arena.table(plan.slots, Entry::default)?,
            arena.table(units * plan.pieces, || 0)?,
            arena.table(units, UnitUse::default)?,
            plan.pieces,
            model.layer_count(),
            plan.limits.policy.eviction,
        );
        let work = &plan.work;
        let buffers = Buffers {
            residual: arena.f32s(work.residual)?,
            normed: arena.f32s(work.normed)?,
            operator: arena.f32s(work.operator)?,
            mixed: arena.f32s(work.mixed)?,
            output: arena.f32s(work.output)?,
            gate: arena.f32s(work.gate)?,
            up: arena.f32s(work.up)?,
            gathered: arena.f32s(work.gathered)?,
            partial: arena.f32s(work.partial)?,
            scores: arena.f32s(work.scores)?,
            cos: arena.f32s(work.rotation)?,
            sin: arena.f32s(work.rotation)?,
            attention: arena.f32s(work.attention)?,
            logits: arena.f32s(work.logits)?,
            acts: arena.lines(work.act_bytes)?,
            unit_acts: arena.lines(work.unit_act_bytes)?,
            choices: arena.table(work.choices, Choice::default)?,
            needs: arena.table(work.needs, UnitNeed::default)?,
            predicted: arena.table(work.predicted, Predicted::default)?,
            tokens: arena.table(work.tokens, || 0)?,
        };
        Ok(Self {
            model,
            mapped,
            plan,
            layers,
            global,
            pool: Pool::new(slots, directory),
            buffers,
            phase: Phase::Idle,
            output: Output::None,
            position: 0,
            count: 0,
            rotated: None,
            need_count: 0,
            threshold: 0.0,
            computed: (0, 0, 0),
            predicted_count: 0,
            allowance: u64::MAX,
            in_flight: 0,
            queue_depth: queue_depth.max(1),
            retrying: LinearMap::new(),
            stats: Stats::default(),
        })
    }

    /// The plan in force.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }
    /// Counts since the engine was made.
    pub fn stats(&self) -> Stats {
        Stats { wasted: self.pool.directory.wasted(), ..self.stats }
    }
    /// Counts of a layer's units since the engine was made.
    pub fn layer_stats(&self, layer: usize) -> Option<LayerStats> {
        Some(self.layers.get(layer)?.as_ref()?.stats)
    }
    /// Tokens of the vocabulary.
    pub fn vocab(&self) -> usize {
        self.model.vocab()
    }
    /// Tokens in the sequence so far.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Starts a new sequence. The pool keeps what it holds.
    pub fn reset(&mut self) -> Result<(), EngineError> {
        if self.phase != Phase::Idle {
            return Err(EngineError::Busy);
        }
        self.position = 0;
        for layer in self.layers.iter_mut().flatten() {
            layer.conv.fill(0.0);
        }
        Ok(())
    }

    /// Bytes of units that may be read for the next token, under [`crate::policy::Loading::Deadline`]; other policies
    /// do not look at it. What prefetch reads is not counted.
    pub fn allow(&mut self, bytes: u64) {
        self.allowance = bytes;
    }

    /// Gives the next tokens of the sequence: 1 to [`Plan::batch`]. Then call [`Self::step`] until it is idle.
    pub fn feed(&mut self, tokens: &[u32], output: Output) -> Result<(), EngineError> {
        if self.phase != Phase::Idle {
            return Err(EngineError::Busy);
        }
        let count = tokens.len();
        let buffer = self.buffers.tokens.get_mut(..count).filter(|_| count > 0);
        let buffer = buffer.ok_or(EngineError::Batch { count, batch: self.plan.batch })?;
        let vocab = self.model.vocab();
        if let Some(&token) = tokens.iter().find(|t| **t as usize >= vocab) {
            return Err(EngineError::Token { token, vocab });
        }
        let context = self.plan.limits.context;
        if self.position + count > context {
            return Err(EngineError::ContextFull { context, used: self.position, more: count });
        }
        buffer.copy_from_slice(tokens);
        self.count = count;
        self.rotated = None;
        self.output = output;
        self.predicted_count = 0;
        self.pool.directory.begin_token();
        self.phase = Phase::Embed;
        Ok(())
    }

    /// Hands out a read, or computes one piece. Does not block.
    pub fn step(&mut self, exec: &Exec<'_>) -> Result<Step<'a>, EngineError> {
        let (count, planned) = (exec.workers.count(), self.plan.limits.workers);
        if count > planned {
            return Err(EngineError::Workers { count, planned });
        }
        self.computed = (0, 0, 0);
        if let Some(request) = self.next_read() {
            return Ok(Step::Read(request));
        }
        match self.phase {
            Phase::Idle => Ok(Step::Idle),
            Phase::Embed => match self.global.ready() {
                Some(_) => {
                    self.embed(exec)?;
                    self.phase = Phase::Operator(0);
                    Ok(Step::Computed)
                }
                None => self.waiting(),
            },
            Phase::Operator(layer) => match self.layer(layer)?.group.ready() {
                Some(_) => {
                    self.operator(exec, layer)?;
                    self.phase = Phase::Route(layer);
                    Ok(Step::Computed)
                }
                None => self.waiting(),
            },
            Phase::Route(layer) => {
                self.route(exec, layer)?;
                self.phase = Phase::Units(layer);
                Ok(Step::Routed { layer })
            }
            Phase::Units(layer) => self.step_units(exec, layer),
            Phase::Head(row) => self.step_head(exec, row),
        }
    }

    /// The routed layer's choices, `[tokens][k]`, each token's in descending order of selection score; empty for
    /// dense layers.
    pub fn choices(&self) -> &[Choice] {
        match self.phase {
            Phase::Units(layer) => match self.layer(layer) {
                Ok(state) if state.shape.router != Router::All => {
                    &self.buffers.choices[..self.count * state.shape.top_k]
                }
                _ => &[],
            },
            _ => &[],
        }
    }

    /// The rows that [`Step::Logits`] announced: `[rows][vocab]`.
    pub fn logits(&self) -> &[f32] {
        self.buffers.logits
    }

    /// The rows that [`Step::Logits`] announced, to be changed in place by a sampler.
    pub fn logits_mut(&mut self) -> &mut [f32] {
        self.buffers.logits
    }

    fn layer(&self, layer: usize) -> Result<&LayerState<'a>, EngineError> {
        self.layers.get(layer).and_then(Option::as_ref).ok_or(EngineError::LogicBug("a layer that does not exist"))
    }

    fn layer_mut(&mut self, layer: usize) -> Result<&mut LayerState<'a>, EngineError> {
        self.layers.get_mut(layer).and_then(Option::as_mut).ok_or(EngineError::LogicBug("a layer that does not exist"))
    }

    fn waiting(&self) -> Result<Step<'a>, EngineError> {
        match self.in_flight {
            0 => Err(EngineError::LogicBug("nothing can be computed and nothing is being read")),
            _ => Ok(Step::Wait),
        }
    }

    fn step_units(&mut self, exec: &Exec<'_>, layer: usize) -> Result<Step<'a>, EngineError> {
        if let Some(need) = self.computable(layer) {
            self.units(exec, layer, need)?;
            return Ok(Step::Computed);
        }
        if self.buffers.needs[..self.need_count].iter().any(|n| !n.done) {
            return self.waiting();
        }
        self.finish_units(exec, layer)?;
        let last = layer + 1 == self.layers.len();
        self.phase = match (last, self.output) {
            (false, _) => Phase::Operator(layer + 1),
            (true, Output::None) => self.finish(),
            (true, Output::Last) => Phase::Head(self.count - 1),
            (true, Output::All) => Phase::Head(0),
        };
        Ok(Step::Computed)
    }

    fn step_head(&mut self, exec: &Exec<'_>, row: usize) -> Result<Step<'a>, EngineError> {
        if row >= self.count {
            self.phase = self.finish();
            return Ok(Step::Computed);
        }
        let rows = (self.count - row).min(self.plan.limits.logit_rows);
        self.head(exec, row, rows)?;
        self.phase = Phase::Head(row + rows);
        Ok(Step::Logits { position: self.position + row, rows })
    }

    fn finish(&mut self) -> Phase {
        self.position += self.count;
        self.stats.tokens += self.count as u64;
        Phase::Idle
    }
}

impl<'a> LayerState<'a> {
    fn new(
        model: &Model<'_>,
        plan: &Plan,
        arena: &Arena<'a>,
        (mapped, pages): (Option<&'a [u8]>, &mut &'a mut [u8]),
        index: usize,
        unit_base: u32,
    ) -> Result<Self, EngineError> {
        let shape = model.layer(index).ok_or(EngineError::LogicBug("a layer that does not exist"))?;
        let group = Group::new(mapped, pages, model.group(index as u16))?;
        let (cache, taps) = match shape.operator {
            Operator::Attention => (kv_shape(&shape, plan.limits.context).bytes(plan.limits.kv), 0),
            Operator::ShortConv => (0, shape.taps - 1),
        };
        Ok(Self {
            shape,
            group,
            unit_base,
            sparse: shape.router == Router::All
                && model.predicts(index as u16)
                && plan.limits.policy.neurons_kept < 1.0,
            pinned: plan.pinned(&shape),
            levels: unit_levels(&shape, &plan.limits.policy) as u8,
            range: (0.0, 0),
            stats: LayerStats::default(),
            keys: &mut arena.lines(cache)?[..cache],
            values: &mut arena.lines(cache)?[..cache],
            conv: arena.f32s(taps * model.hidden())?,
        })
    }
}
