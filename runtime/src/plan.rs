//! The memory plan: every byte of the arena, computed from the image's tables and the caller's limits.

use forebay_kernels::attention::{KvFormat, KvShape, attention_scratch};
use forebay_kernels::weights::MatrixShape;

use crate::arena::{LINE, PAGE, table_bytes};
use crate::cache::{Entry, UnitUse, pinned_units};
use crate::engine::{LayerState, Predicted, UnitNeed};
use crate::model::record::{NO_LAYER, Operator, Role, Router};
use crate::model::{LayerShape, Model};
use crate::open::Image;
use crate::policy::{Choice, Policy};
use crate::pool::Slot;

/// Fewest units that the pool must hold: one to compute while the next is read.
pub const MIN_UNITS: usize = 2;

/// Most units of a dense layer that are computed together for a single token.
pub(crate) const TOGETHER: usize = 8;

/// Most tokens of a batch: beyond this nothing is gained, and every buffer's size fits 32 bits.
pub const MAX_BATCH: usize = 1 << 12;

/// What the caller allows.
#[derive(Clone, Copy, PartialEq, Debug)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Limits {
    /// Bytes of the whole arena, tables included.
    pub arena: u64,
    /// Tokens of the longest sequence.
    pub context: usize,
    /// Most tokens computed together when a prompt is read.
    pub batch: usize,
    /// Rows of logits that are kept at once.
    pub logit_rows: usize,
    /// How keys and values are kept.
    pub kv: KvFormat,
    /// Workers that will compute.
    pub workers: usize,
    /// Bytes that the caller takes from the arena for itself once the engine is made.
    pub reserved: u64,
    /// How experts are loaded and kept.
    pub policy: Policy,
}

/// Why no plan can be made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum PlanError {
    /// The arena is too small.
    #[error(
        "the arena of {have} bytes is too small: this model needs at least {need} bytes with a context of {context}"
    )]
    TooSmall {
        /// Fewest bytes that would do.
        need: u64,
        /// Bytes allowed.
        have: u64,
        /// The context asked for.
        context: usize,
    },
    /// The context is 0 or longer than the model was made for.
    #[error("a context of {context} tokens is outside of 1..={max}")]
    Context {
        /// The context asked for.
        context: usize,
        /// The model's longest.
        max: usize,
    },
    /// Batch, logit rows or workers is 0.
    #[error("{0} must be at least 1")]
    Zero(&'static str),
    /// The size does not fit this machine's addresses.
    #[error("the plan does not fit the address space")]
    Overflow,
}

/// Sizes of the working buffers for a batch; `f32`s unless the name says bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub(crate) struct Working {
    pub residual: usize,
    pub normed: usize,
    pub operator: usize,
    pub mixed: usize,
    pub output: usize,
    pub gate: usize,
    pub up: usize,
    pub gathered: usize,
    pub partial: usize,
    pub scores: usize,
    pub rotation: usize,
    pub attention: usize,
    pub logits: usize,
    pub act_bytes: usize,
    pub unit_act_bytes: usize,
    pub choices: usize,
    pub needs: usize,
    pub predicted: usize,
    pub tokens: usize,
}

impl Working {
    pub fn new(model: &Model<'_>, limits: &Limits, batch: usize) -> Self {
        let hidden = model.hidden();
        let mut w = Self {
            residual: batch * hidden,
            normed: batch * hidden,
            output: batch * hidden,
            gathered: batch * hidden,
            logits: limits.logit_rows.min(batch) * model.vocab(),
            tokens: batch,
            ..Self::default()
        };
        let act_bytes = |shape: &MatrixShape, tokens: usize| {
            shape.act_spec().map_or(0, |spec| spec.bytes(shape.cols as usize, tokens))
        };
        for t in model.tensors() {
            let role = Role::from_u16(t.role.get());
            let is_matrix = matches!(
                role,
                Some(
                    Role::Query
                        | Role::Key
                        | Role::Value
                        | Role::AttentionOut
                        | Role::ConvIn
                        | Role::ConvOut
                        | Role::ClusterGate
                )
            );
            if let Some(shape) = t.matrix.shape() {
                if is_matrix {
                    w.act_bytes = w.act_bytes.max(act_bytes(&shape, batch));
                } else if matches!(role, Some(Role::Embedding | Role::OutputHead)) {
                    w.act_bytes = w.act_bytes.max(act_bytes(&shape, limits.logit_rows.min(batch)));
                }
            }
        }
        for (index, layer) in (0..model.layer_count()).filter_map(|l| Some((l, model.layer(l)?))) {
            let (operator, mixed) = match layer.operator {
                Operator::Attention => {
                    let (q, kv) = (layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim);
                    let kv_shape = kv_shape(&layer, limits.context);
                    let scratch = attention_scratch(&kv_shape, layer.heads, batch, limits.workers);
                    w.attention = w.attention.max(scratch);
                    (q + 2 * kv, q)
                }
                Operator::ShortConv => (3 * hidden, hidden),
            };
            w.operator = w.operator.max(batch * operator);
            w.mixed = w.mixed.max(batch * mixed);
            // A batch of one unit, or some units of one token.
            let rows = match layer.router {
                Router::All => batch.max(layer.units.min(TOGETHER)),
                _ => batch,
            };
            w.gate = w.gate.max(rows * layer.unit_width);
            w.up = w.up.max(rows * layer.unit_width);
            w.needs = w.needs.max(layer.units);
            let inputs = act_bytes(&layer.unit.gate, batch).max(act_bytes(&layer.unit.up, batch));
            w.act_bytes = w.act_bytes.max(inputs);
            w.unit_act_bytes = w.unit_act_bytes.max(act_bytes(&layer.unit.down, rows));
            if model.predicts(index as u16) {
                w.scores = w.scores.max(batch * layer.units);
            }
            if layer.router != Router::All {
                w.partial = w.partial.max(batch * layer.top_k * hidden);
                w.scores = w.scores.max(batch * layer.units);
                w.choices = w.choices.max(batch * layer.top_k);
                if limits.policy.prefetch > 0 {
                    let units = layer.units.min(batch * layer.top_k);
                    w.predicted = w.predicted.max(usize::from(limits.policy.prefetch) * units);
                }
            }
        }
        if let Some(t) = model.tensor(NO_LAYER, Role::RopeInvFreq) {
            w.rotation = batch * t.shape.cols as usize;
        }
        w
    }

    /// Arena bytes, each buffer rounded up to a line.
    fn bytes(&self) -> u64 {
        let floats = [
            self.residual,
            self.normed,
            self.operator,
            self.mixed,
            self.output,
            self.gate,
            self.up,
            self.gathered,
            self.partial,
            self.scores,
            self.rotation,
            self.rotation,
            self.attention,
            self.logits,
        ];
        let lines = |bytes: u64| bytes.next_multiple_of(LINE as u64);
        floats.iter().map(|n| lines(*n as u64 * 4)).sum::<u64>()
            + lines(self.act_bytes as u64)
            + lines(self.unit_act_bytes as u64)
            + table_bytes::<Choice>(self.choices)
            + table_bytes::<UnitNeed>(self.needs)
            + table_bytes::<Predicted>(self.predicted)
            + table_bytes::<u32>(self.tokens)
    }
}

/// Shape of a layer's key or value cache.
pub(crate) fn kv_shape(layer: &LayerShape, context: usize) -> KvShape {
    KvShape { kv_heads: layer.kv_heads, head_dim: layer.head_dim, capacity: context }
}

/// Levels that a layer's units are used with.
pub(crate) fn unit_levels(layer: &LayerShape, policy: &Policy) -> usize {
    layer.unit.levels().min(usize::from(policy.max_levels.max(1)))
}

/// Every byte of the arena.
#[derive(Clone, Copy, PartialEq, Debug)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Plan {
    /// The limits the plan was made for.
    pub limits: Limits,
    /// Superblocks, model description and tokenizer.
    pub tables: u64,
    /// Resident tensors.
    pub resident: u64,
    /// Keys and values, and the short convolutions' states.
    pub state: u64,
    /// Activations, scratch and logits.
    pub working: u64,
    /// The engine's own tables: layers, slots, units.
    pub bookkeeping: u64,
    /// Bytes of the expert pool.
    pub pool: u64,
    /// Pieces that the pool holds.
    pub slots: usize,
    /// Slots that are for pinned units ([`Self::pinned`]).
    pub pinned_slots: usize,
    /// Units of all dense layers.
    pub dense_units: usize,
    /// Pieces that there are.
    pub all_pieces: usize,
    /// Bytes of a slot: the largest piece.
    pub slot_len: u64,
    /// Pieces of a unit: 1, or as many as it has levels where the policy makes use of single ones.
    pub pieces: usize,
    /// Tokens computed together.
    pub batch: usize,
    /// Fewest bytes that would do with these limits and a batch of one.
    pub least: u64,
    pub(crate) work: Working,
}

impl Plan {
    /// Plans the arena. The pool gets what is left, at most what all units take; the batch is halved until the
    /// working buffers leave the pool at least three quarters of what both share.
    pub fn new(image: &Image<'_>, limits: Limits) -> Result<Self, PlanError> {
        let model = image.model();
        for (name, value) in [("batch", limits.batch), ("logit_rows", limits.logit_rows), ("workers", limits.workers)] {
            if value == 0 {
                return Err(PlanError::Zero(name));
            }
        }
        if limits.context == 0 || limits.context > model.context() {
            return Err(PlanError::Context { context: limits.context, max: model.context() });
        }
        // Everything below is sized by the context and fits an address once this does.
        let widest = (0..model.layer_count()).filter_map(|l| model.layer(l)).map(|l| l.kv_heads * l.head_dim).max();
        let cache = (widest.unwrap_or(0) as u64 + 1) * limits.context as u64 * 4;
        if usize::try_from(cache).is_err() {
            return Err(PlanError::Overflow);
        }
        let page = |bytes: u64| bytes.next_multiple_of(PAGE as u64);
        let groups = (0..model.layer_count() as u16).chain([NO_LAYER]);
        let mapped = image.mapped().is_some();
        let resident: u64 = if mapped { 0 } else { groups.map(|l| page(model.group(l).1)).sum() };
        let layers = || (0..model.layer_count()).filter_map(|l| model.layer(l));
        let state: u64 = layers().map(|layer| state_bytes(&layer, model.hidden(), &limits)).sum();
        let policy = &limits.policy;
        let pieces = match policy.by_level() && !mapped {
            true => layers().map(|layer| unit_levels(&layer, policy)).max().unwrap_or(1),
            false => 1,
        };
        let piece_len = |layer: &LayerShape| {
            let levels = unit_levels(layer, policy);
            let each = (0..levels).map(|level| page(layer.unit.level_len(level, model.page())));
            if pieces > 1 { each.max() } else { Some(page(layer.unit.prefix_len(levels, model.page()))) }
        };
        let slot_len = layers().filter_map(|layer| piece_len(&layer)).max().unwrap_or(PAGE as u64);
        // What is mapped needs no slot and no place in the pool's tables.
        let units = if mapped { 0 } else { model.unit_count() };
        let all = units * pieces;
        let fixed_tables = table_bytes::<Option<LayerState<'_>>>(model.layer_count())
            + table_bytes::<u32>(all)
            + table_bytes::<UnitUse>(units);
        let reserved = limits.reserved.next_multiple_of(LINE as u64);
        let fixed = image.tables_len() + resident + state + fixed_tables + reserved;
        // A slot costs its bytes and a row of two tables; the tables' rounding is paid once.
        let slot_cost = slot_len + (size_of::<Slot<'_>>() + size_of::<Entry>()) as u64;
        let rounding = 2 * LINE as u64;
        let need = |batch: usize| {
            let least_slots = (MIN_UNITS * pieces).min(all) as u64;
            fixed + Working::new(model, &limits, batch).bytes() + least_slots * slot_cost + rounding
        };
        let least = page(need(1));
        let arena = limits.arena / PAGE as u64 * PAGE as u64;
        if least > arena {
            return Err(PlanError::TooSmall { need: least, have: limits.arena, context: limits.context });
        }
        let shared = arena - fixed;
        let fits = |batch: usize| {
            let working = Working::new(model, &limits, batch).bytes();
            let all = all as u64 * slot_cost;
            need(batch) <= arena && (working <= shared / 4 || shared - working >= all + rounding)
        };
        let mut batch = limits.batch.min(limits.context).min(MAX_BATCH);
        while batch > 1 && !fits(batch) {
            batch /= 2;
        }
        let work = Working::new(model, &limits, batch);
        let slots = ((shared - work.bytes() - rounding) / slot_cost).min(all as u64) as usize;
        usize::try_from(arena).map_err(|_| PlanError::Overflow)?;
        #[cfg(feature = "log")]
        log::debug!("arena {arena}: batch {batch}, {slots} of {all} pieces fit the pool, {least} bytes would do");
        let mut plan = Self {
            limits,
            tables: image.tables_len(),
            resident,
            state,
            working: work.bytes(),
            bookkeeping: fixed_tables + table_bytes::<Slot<'_>>(slots) + table_bytes::<Entry>(slots),
            pool: slots as u64 * slot_len,
            slots,
            pinned_slots: 0,
            dense_units: layers().filter(|layer| layer.router == Router::All).map(|layer| layer.units).sum(),
            all_pieces: all,
            slot_len,
            pieces,
            batch,
            least,
            work,
        };
        plan.pinned_slots = layers().map(|layer| plan.pinned(&layer)).sum::<usize>() * pieces;
        Ok(plan)
    }

    /// Units of a layer, the first ones, that never give way once they are in the pool.
    pub fn pinned(&self, layer: &LayerShape) -> usize {
        match layer.router {
            Router::All => {
                let policy = &self.limits.policy;
                // What is hot is so where some clusters are left out.
                let hot: &[u16] = if policy.neurons_kept < 1.0 { &layer.hot } else { &[] };
                pinned_units(layer.units, self.dense_units, self.slots, self.pieces, policy.pinned, hot)
            }
            _ => 0,
        }
    }

    /// Whether every unit fits the pool, so that each is read once.
    pub fn holds_all_units(&self) -> bool {
        self.slots >= self.all_pieces
    }

    /// Bytes of the arena that are used.
    pub fn total(&self) -> u64 {
        self.tables + self.resident + self.state + self.working + self.bookkeeping + self.pool + self.limits.reserved
    }
}

/// Bytes of a layer's key and value caches, or of its convolution's state.
fn state_bytes(layer: &LayerShape, hidden: usize, limits: &Limits) -> u64 {
    let lines = |bytes: usize| bytes.next_multiple_of(LINE) as u64;
    match layer.operator {
        Operator::Attention => 2 * lines(kv_shape(layer, limits.context).bytes(limits.kv)),
        Operator::ShortConv => lines((layer.taps - 1) * hidden * 4),
    }
}
