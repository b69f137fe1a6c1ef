//! What the engine computes at each step: the decoder's operators over a batch of tokens.

use forebay_kernels::activations::{Input, quantise};
use forebay_kernels::attention::{attention, store_keys, store_values};
use forebay_kernels::exec::Exec;
use forebay_kernels::matmul::{
    matmul, matmul_add, matmul_add_units, matmul_all, matmul_gated, matmul_gated_units, row_to_f32, units_fit,
};
use forebay_kernels::ops::{self, Activation};
use forebay_kernels::weights::{MatrixRef, MatrixShape};
use heapless::Vec;
use zerocopy::FromBytes;

use super::clusters::keeps;
use super::{Engine, EngineError, LayerState, UnitNeed};
use crate::model::record::{NO_LAYER, Operator, Role, Router};
use crate::model::unit::{MAX_LEVELS, UnitRef};
use crate::model::{LayerShape, Model};
use crate::plan::{TOGETHER, kv_shape};
use crate::policy::Choice;
use crate::pool::Pool;

pub(super) const MISSING: EngineError = EngineError::LogicBug("a tensor that was validated is missing");

/// The resident tensors of a layer, or of the model.
#[derive(Clone, Copy)]
pub(super) struct Tensors<'a> {
    model: Model<'a>,
    layer: u16,
    bytes: &'a [u8],
}

impl<'a> Tensors<'a> {
    fn bytes(&self, role: Role) -> Option<(MatrixShape, &'a [u8])> {
        let t = self.model.tensor(self.layer, role)?;
        let start = usize::try_from(t.offset).ok()?;
        let bytes = self.bytes.get(start..)?.get(..usize::try_from(t.len).ok()?)?;
        Some((t.shape, bytes))
    }

    pub fn matrix(&self, role: Role) -> Result<MatrixRef<'a>, EngineError> {
        let (shape, bytes) = self.bytes(role).ok_or(MISSING)?;
        MatrixRef::from_contiguous(shape, bytes).ok_or(MISSING)
    }

    /// A tensor of plain f32; `None` if the model has none of this role.
    pub fn optional(&self, role: Role) -> Option<&'a [f32]> {
        let (shape, bytes) = self.bytes(role)?;
        let len = shape.rows as usize * shape.cols as usize;
        <[f32]>::ref_from_bytes(bytes.get(..len * size_of::<f32>())?).ok()
    }

    pub(super) fn vector(&self, role: Role) -> Result<&'a [f32], EngineError> {
        self.optional(role).ok_or(MISSING)
    }
}

/// `x` as a matrix of this shape wants it.
fn input<'x>(exec: &Exec<'_>, shape: MatrixShape, x: &'x [f32], tokens: usize, scratch: &'x mut [u8]) -> Input<'x> {
    match shape.act_spec() {
        None => Input::F32(x),
        Some(spec) => Input::Quant(quantise(exec, spec, x, tokens, shape.cols as usize, scratch)),
    }
}

/// Products of the same input with several matrices; matrices that follow one another and want it alike share it.
pub(super) fn project(
    exec: &Exec<'_>,
    x: &[f32],
    tokens: usize,
    scratch: &mut [u8],
    mut products: &mut [(MatrixRef<'_>, &mut [f32])],
) {
    while let Some((first, _)) = products.first() {
        let shape = first.shape();
        let alike = products.iter().take_while(|(w, _)| w.shape().act_spec() == shape.act_spec()).count();
        let (group, rest) = products.split_at_mut(alike);
        matmul_all(exec, input(exec, shape, x, tokens, scratch), tokens, group);
        products = rest;
    }
}

/// Adds a bias to every row of `x`.
pub(super) fn add_bias(exec: &Exec<'_>, x: &mut [f32], bias: Option<&[f32]>) {
    if let Some(bias) = bias {
        x.chunks_exact_mut(bias.len()).for_each(|row| ops::add(exec, row, bias));
    }
}

/// Adds a sub-layer's output to the residual stream.
fn add_residual(exec: &Exec<'_>, residual: &mut [f32], output: &[f32], scale: f32) {
    match scale {
        1.0 => ops::add(exec, residual, output),
        _ => ops::add_scaled(exec, residual, output, scale),
    }
}

/// The matrices of a resident unit at a precision of `levels` levels. `mapped` is the unit, where the image is mapped;
/// else it is in the pool, numbered `id` over all layers.
fn unit_view<'p>(
    pool: &'p Pool<'_>,
    mapped: Option<&'p [u8]>,
    (shape, page): (&LayerShape, u32),
    id: u32,
    levels: u8,
) -> Result<UnitRef<'p>, EngineError> {
    let missing = EngineError::LogicBug("a unit that is not resident");
    let mut bytes: [&[u8]; MAX_LEVELS] = [&[]; MAX_LEVELS];
    let pieces = pool.directory.pieces();
    if pieces == 1 {
        let whole = mapped.or_else(|| pool.get(id)).ok_or(missing)?;
        bytes = shape.unit.split(levels.into(), page, whole).ok_or(missing)?;
    } else {
        for (level, bytes) in bytes.iter_mut().enumerate().take(levels.into()) {
            *bytes = pool.get(id * pieces + level as u32).ok_or(missing)?;
        }
    }
    let view = shape.unit.view(levels.into(), page, &bytes);
    view.ok_or(EngineError::LogicBug("a unit shorter than its shape"))
}

impl<'a> Engine<'a> {
    fn global_tensors(&self) -> Result<Tensors<'a>, EngineError> {
        let bytes = self.global.ready().ok_or(MISSING)?;
        Ok(Tensors { model: self.model, layer: NO_LAYER, bytes })
    }

    pub(super) fn layer_tensors(&self, layer: usize) -> Result<Tensors<'a>, EngineError> {
        let bytes = self.layer(layer)?.group.ready().ok_or(MISSING)?;
        Ok(Tensors { model: self.model, layer: layer as u16, bytes })
    }

    /// Embedding rows into the residual stream, and the batch's rotations.
    pub(super) fn embed(&mut self, exec: &Exec<'_>) -> Result<(), EngineError> {
        let tensors = self.global_tensors()?;
        let table = tensors.matrix(Role::Embedding)?;
        let hidden = self.model.hidden();
        let scale = self.model.record().embedding_scale.get();
        let rows = self.buffers.residual.chunks_exact_mut(hidden);
        for (row, &token) in rows.zip(&self.buffers.tokens[..self.count]) {
            row_to_f32(&table, token as usize, row);
            if scale != 1.0 {
                ops::scale(exec, row, scale);
            }
        }
        Ok(())
    }

    /// The rotations of the batch's positions, computed anew only where a layer scales them differently.
    fn rotations(&mut self, mscale: f32) -> Result<usize, EngineError> {
        let frequencies = self.global_tensors()?.vector(Role::RopeInvFreq)?;
        let half = frequencies.len();
        if self.rotated == Some(mscale) {
            return Ok(half);
        }
        self.rotated = Some(mscale);
        let rows = self.buffers.cos.chunks_exact_mut(half).zip(self.buffers.sin.chunks_exact_mut(half));
        for (t, (cos, sin)) in rows.enumerate().take(self.count) {
            ops::rope_tables((self.position + t) as u32, frequencies, mscale, cos, sin);
        }
        Ok(half)
    }

    /// Norm, then attention or short convolution, added to the residual stream; then the feed-forward's norm.
    pub(super) fn operator(&mut self, exec: &Exec<'_>, index: usize) -> Result<(), EngineError> {
        let tensors = self.layer_tensors(index)?;
        self.norm(exec, tensors.vector(Role::OperatorNorm)?);
        match self.layer(index)?.shape.operator {
            Operator::Attention => self.attention(exec, index, tensors)?,
            Operator::ShortConv => self.short_conv(exec, index, tensors)?,
        }
        let len = self.count * self.model.hidden();
        let scale = self.model.record().residual_scale.get();
        add_residual(exec, &mut self.buffers.residual[..len], &self.buffers.output[..len], scale);
        self.norm(exec, tensors.vector(Role::FfnNorm)?);
        Ok(())
    }

    /// RMSNorm of the batch's residual rows.
    fn norm(&mut self, exec: &Exec<'_>, weight: &[f32]) {
        let (hidden, eps) = (self.model.hidden(), self.model.record().norm_eps.get());
        let rows = self.buffers.residual.chunks_exact(hidden).zip(self.buffers.normed.chunks_exact_mut(hidden));
        for (x, out) in rows.take(self.count) {
            ops::rms_norm(exec, x, weight, eps, out);
        }
    }

    fn attention(&mut self, exec: &Exec<'_>, index: usize, tensors: Tensors<'a>) -> Result<(), EngineError> {
        let shape = self.layer(index)?.shape;
        let half = if shape.rope { self.rotations(shape.rope_mscale)? } else { 0 };
        let (n, eps) = (self.count, self.model.record().norm_eps.get());
        let (position, format) = (self.position, self.plan.limits.kv);
        let cache = kv_shape(&shape, self.plan.limits.context);
        let (q_len, kv_len) = (n * shape.heads * shape.head_dim, n * shape.kv_heads * shape.head_dim);
        let b = &mut self.buffers;
        let (q, rest) = b.operator.split_at_mut(q_len);
        let (k, rest) = rest.split_at_mut(kv_len);
        let v = &mut rest[..kv_len];
        let input = &b.normed[..n * self.model.hidden()];
        project(
            exec,
            input,
            n,
            b.acts,
            &mut [
                (tensors.matrix(Role::Query)?, q),
                (tensors.matrix(Role::Key)?, k),
                (tensors.matrix(Role::Value)?, v),
            ],
        );
        add_bias(exec, q, tensors.optional(Role::QueryBias));
        add_bias(exec, k, tensors.optional(Role::KeyBias));
        add_bias(exec, v, tensors.optional(Role::ValueBias));
        // The norm's output goes to `mixed`, which attention fills only later.
        for (x, weight) in [(&mut *q, Role::QueryNorm), (&mut *k, Role::KeyNorm)] {
            if let Some(weight) = tensors.optional(weight) {
                // As many values as there are weights are normalised together: a head, or a token's heads.
                for head in x.chunks_exact_mut(weight.len()) {
                    let normed = &mut b.mixed[..weight.len()];
                    ops::rms_norm(exec, head, weight, eps, normed);
                    head.copy_from_slice(normed);
                }
            }
        }
        for t in 0..n {
            let row = t * half..(t + 1) * half;
            for (x, heads) in [(&mut *q, shape.heads), (&mut *k, shape.kv_heads)] {
                let token = &mut x[t * heads * shape.head_dim..][..heads * shape.head_dim];
                if shape.rope {
                    let heads = token.chunks_exact_mut(shape.head_dim);
                    heads.for_each(|head| ops::rope(head, &b.cos[row.clone()], &b.sin[row.clone()]));
                }
            }
        }
        let layer = self.layers[index].as_mut().ok_or(MISSING)?;
        let width = shape.kv_heads * shape.head_dim;
        for t in 0..n {
            store_keys(exec, format, &cache, layer.keys, position + t, &k[t * width..][..width]);
            store_values(exec, format, &cache, layer.values, position + t, &v[t * width..][..width]);
        }
        let mixed = &mut b.mixed[..q_len];
        attention(
            exec,
            format,
            &cache,
            layer.keys,
            layer.values,
            q,
            shape.heads,
            n,
            position,
            shape.window,
            shape.attention_scale,
            b.attention,
            mixed,
        );
        let out = &mut b.output[..n * self.model.hidden()];
        project(exec, mixed, n, b.acts, &mut [(tensors.matrix(Role::AttentionOut)?, out)]);
        add_bias(exec, out, tensors.optional(Role::AttentionOutBias));
        Ok(())
    }

    /// LFM2's gated short convolution (`Lfm2ShortConv`): `out_proj(C * conv(B * x))`.
    fn short_conv(&mut self, exec: &Exec<'_>, index: usize, tensors: Tensors<'a>) -> Result<(), EngineError> {
        let (n, hidden) = (self.count, self.model.hidden());
        let taps = self.layer(index)?.shape.taps;
        let b = &mut self.buffers;
        let bcx = &mut b.operator[..n * 3 * hidden];
        project(exec, &b.normed[..n * hidden], n, b.acts, &mut [(tensors.matrix(Role::ConvIn)?, &mut *bcx)]);
        add_bias(exec, bcx, tensors.optional(Role::ConvInBias));
        let layer = self.layers[index].as_mut().ok_or(MISSING)?;
        let (weight, bias) = (tensors.vector(Role::ConvTaps)?, tensors.optional(Role::ConvTapsBias));
        let mixed = &mut b.mixed[..n * hidden];
        ops::short_conv(bcx, weight, bias, layer.conv, n, hidden, taps, mixed);
        let out = &mut b.output[..n * hidden];
        project(exec, mixed, n, b.acts, &mut [(tensors.matrix(Role::ConvOut)?, &mut *out)]);
        add_bias(exec, out, tensors.optional(Role::ConvOutBias));
        Ok(())
    }

    /// Computes a resident unit and as many resident ones after it as can be computed together with it.
    pub(super) fn units(&mut self, exec: &Exec<'_>, index: usize, need: usize) -> Result<(), EngineError> {
        self.computed = match self.together(exec, index, need)? {
            0 => (need, 1, self.unit(exec, index, need)?),
            count => (need, count, 1),
        };
        Ok(())
    }

    /// Computes the units of a dense layer from `first` on for a single token, in two rounds of the workers instead of
    /// two a unit: as many as are resident and the buffers hold. Returns how many; 0 where it takes another way.
    fn together(&mut self, exec: &Exec<'_>, index: usize, first: usize) -> Result<usize, EngineError> {
        let tensors = self.layer_tensors(index)?;
        let (shape, base, full) = {
            let layer: &LayerState<'_> = self.layer(index)?;
            (layer.shape, layer.unit_base, layer.levels)
        };
        let (hidden, width) = (self.model.hidden(), shape.unit_width);
        let biased = [Role::GateBias, Role::UpBias].iter().any(|role| tensors.optional(*role).is_some());
        let alike = shape.unit.gate.act_spec() == shape.unit.up.act_spec() && units_fit(&shape.unit.gate);
        if self.count != 1 || shape.router != Router::All || biased || !alike {
            return Ok(0);
        }
        let fits = |count: usize| {
            let acts = shape.unit.down.act_spec().map_or(0, |spec| spec.bytes(width, count));
            count * width <= self.buffers.gate.len() && acts <= self.buffers.unit_acts.len()
        };
        let mut gated: Vec<_, TOGETHER> = Vec::new();
        let mut downs: Vec<_, TOGETHER> = Vec::new();
        for need in &self.buffers.needs[first..self.need_count] {
            let id = base + u32::from(need.unit);
            let ready = self.levels_held(index, id).0 >= need.levels && need.levels == full && !need.done;
            if !ready || !fits(gated.len() + 1) {
                break;
            }
            let mapped = self.mapped_unit(index, need.unit, full);
            let view = unit_view(&self.pool, mapped, (&shape, self.model.page()), id, full)?;
            if gated.push([view.gate, view.up]).is_err() || downs.push(view.down).is_err() {
                break;
            }
        }
        let count = gated.len();
        if count < 2 {
            return Ok(0);
        }
        let b = &mut self.buffers;
        let x = self::input(exec, shape.unit.gate, &b.normed[..hidden], 1, b.acts);
        let (gate, up) = (&mut b.gate[..count * width], &mut b.up[..count * width]);
        matmul_gated_units(exec, shape.activation, &gated, x, [&mut *gate, up]);
        if shape.activation == Activation::Relu {
            self.stats.count_live(gate, width);
        }
        let x = self::input(exec, shape.unit.down, gate, count, b.unit_acts);
        matmul_add_units(exec, &downs, x, &mut b.gathered[..hidden], &mut b.output[..hidden]);
        drop((gated, downs));
        let pieces = self.pool.directory.pieces();
        let used = if pieces == 1 { 1 } else { u32::from(full) };
        for need in &mut self.buffers.needs[first..first + count] {
            self.pool.directory.touch(base + u32::from(need.unit), used, true);
            need.done = true;
        }
        Ok(count)
    }

    /// Computes one resident unit for the tokens that use it, each at its precision. Returns for how many the last was.
    fn unit(&mut self, exec: &Exec<'_>, index: usize, need: usize) -> Result<usize, EngineError> {
        let UnitNeed { unit, levels, .. } = self.buffers.needs[need];
        let layer: &LayerState<'_> = self.layer(index)?;
        let (dense, full, id) = (layer.shape.router == Router::All, layer.levels, layer.unit_base + u32::from(unit));
        let pieces = self.pool.directory.pieces();
        let used = if pieces == 1 { 1 } else { u32::from(levels) };
        self.pool.directory.touch(id, used, levels == full);
        let mut computed = 0;
        for precision in 1..=levels {
            if !dense || precision == full {
                computed = self.unit_at(exec, index, unit, precision)?.unwrap_or(computed);
            }
        }
        self.buffers.needs[need].done = true;
        Ok(computed)
    }

    /// Computes a unit for the tokens that use it with `levels` levels. Returns how many they are, if there are any.
    fn unit_at(&mut self, exec: &Exec<'_>, index: usize, unit: u16, levels: u8) -> Result<Option<usize>, EngineError> {
        let tensors = self.layer_tensors(index)?;
        let (shape, id, sparse) = {
            let layer: &LayerState<'_> = self.layer(index)?;
            (layer.shape, layer.unit_base + u32::from(unit), layer.sparse)
        };
        let (n, hidden, width) = (self.count, self.model.hidden(), shape.unit_width);
        let mapped = self.mapped_unit(index, unit, levels);
        let b = &mut self.buffers;
        let chosen = &b.choices[..if shape.router == Router::All { 0 } else { n * shape.top_k }];
        // Which (token, rank) pairs use the unit; a dense layer's units are used by every token.
        let uses = |at: usize| chosen[at].unit == unit && chosen[at].levels == levels;
        let (scores, threshold) = (&*b.scores, self.threshold);
        let kept = |token: &usize| keeps(scores[token * shape.units + usize::from(unit)], threshold);
        let tokens = match shape.router {
            Router::All if sparse => (0..n).filter(kept).count(),
            Router::All => n,
            _ => (0..chosen.len()).filter(|at| uses(*at)).count(),
        };
        if tokens == 0 {
            return Ok(None);
        }
        let view = unit_view(&self.pool, mapped, (&shape, self.model.page()), id, levels)?;
        // One buffer holds the gathered inputs and, once they are quantised or used, the unit's outputs.
        let input: &[f32] = if tokens == n {
            &b.normed[..n * hidden]
        } else {
            let mut gather = |(slot, token): (usize, usize)| {
                b.gathered[slot * hidden..][..hidden].copy_from_slice(&b.normed[token * hidden..][..hidden]);
            };
            match shape.router {
                Router::All => (0..n).filter(kept).enumerate().for_each(gather),
                _ => {
                    let users = (0..chosen.len()).filter(|at| uses(*at)).map(|at| at / shape.top_k);
                    users.enumerate().for_each(&mut gather);
                }
            }
            &b.gathered[..tokens * hidden]
        };
        let (gate, up) = (&mut b.gate[..tokens * width], &mut b.up[..tokens * width]);
        let neurons = usize::from(unit) * width..(usize::from(unit) + 1) * width;
        let biases = [Role::GateBias, Role::UpBias].map(|role| Some(&tensors.optional(role)?[neurons.clone()]));
        let shapes = [view.gate.shape(), view.up.shape()];
        if shapes[0].act_spec() == shapes[1].act_spec() {
            let x = self::input(exec, shapes[0], input, tokens, b.acts);
            matmul_gated(exec, shape.activation, [view.gate, view.up], biases, x, tokens, [&mut *gate, up]);
        } else {
            project(exec, input, tokens, b.acts, &mut [(view.gate, &mut *gate), (view.up, &mut *up)]);
            add_bias(exec, gate, biases[0]);
            add_bias(exec, up, biases[1]);
            ops::gate_mul(exec, shape.activation, gate, up);
        }
        if shape.activation == Activation::Relu {
            self.stats.count_live(gate, width);
        }
        let x = self::input(exec, view.down.shape(), gate, tokens, b.unit_acts);
        let out = &mut b.gathered[..tokens * hidden];
        if shape.router == Router::All && tokens == n {
            matmul_add(exec, &view.down, x, n, out, &mut b.output[..n * hidden]);
            return Ok(Some(tokens));
        }
        matmul(exec, &view.down, x, tokens, out);
        match shape.router {
            Router::All => {
                for (token, row) in (0..n).filter(kept).zip(out.chunks_exact(hidden)) {
                    ops::add(exec, &mut b.output[token * hidden..][..hidden], row);
                }
            }
            _ => {
                let slots = (0..chosen.len()).filter(|at| uses(*at));
                for (at, row) in slots.zip(out.chunks_exact(hidden)) {
                    b.partial[at * hidden..][..hidden].copy_from_slice(row);
                }
            }
        }
        Ok(Some(tokens))
    }

    /// Adds the units' outputs, in rank order whatever order they were computed in, to the residual stream.
    pub(super) fn finish_units(&mut self, exec: &Exec<'_>, index: usize) -> Result<(), EngineError> {
        let tensors = self.layer_tensors(index)?;
        let shape = self.layer(index)?.shape;
        let (n, hidden) = (self.count, self.model.hidden());
        let b = &mut self.buffers;
        let output = &mut b.output[..n * hidden];
        if shape.router != Router::All {
            output.fill(0.0);
            for (t, row) in output.chunks_exact_mut(hidden).enumerate() {
                let choices: &[Choice] = &b.choices[t * shape.top_k..][..shape.top_k];
                for (rank, choice) in choices.iter().enumerate().filter(|(_, choice)| choice.levels > 0) {
                    let part = &b.partial[(t * shape.top_k + rank) * hidden..][..hidden];
                    ops::add_scaled(exec, row, part, choice.weight);
                }
            }
        }
        add_bias(exec, output, tensors.optional(Role::DownBias));
        let scale = self.model.record().residual_scale.get();
        add_residual(exec, &mut b.residual[..n * hidden], output, scale);
        Ok(())
    }

    /// Final norm and output head for `rows` tokens of the batch from `row` on.
    pub(super) fn head(&mut self, exec: &Exec<'_>, row: usize, rows: usize) -> Result<(), EngineError> {
        let tensors = self.global_tensors()?;
        let weight = tensors.vector(Role::FinalNorm)?;
        let head = tensors.matrix(Role::OutputHead).or_else(|_| tensors.matrix(Role::Embedding))?;
        let record = self.model.record();
        let (hidden, vocab, eps) = (self.model.hidden(), self.model.vocab(), record.norm_eps.get());
        let b = &mut self.buffers;
        let from = b.residual[row * hidden..][..rows * hidden].chunks_exact(hidden);
        for (x, out) in from.zip(b.normed.chunks_exact_mut(hidden)) {
            ops::rms_norm(exec, x, weight, eps, out);
        }
        let logits = &mut b.logits[..rows * vocab];
        project(exec, &b.normed[..rows * hidden], rows, b.acts, &mut [(head, &mut *logits)]);
        if record.logit_scale.get() != 1.0 {
            ops::scale(exec, logits, record.logit_scale.get());
        }
        let bad = logits.chunks_exact(vocab).position(ops::has_non_finite);
        match bad {
            Some(bad) => Err(EngineError::NonFinite { position: self.position + row + bad }),
            None => Ok(()),
        }
    }
}
