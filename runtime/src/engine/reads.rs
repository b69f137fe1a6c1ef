//! What the engine reads: which read comes next, and what becomes of one that has finished.

use forebay_storage::image::ExtentRecord;
use forebay_storage::store::{Completion, ReadError, ReadRequest};

use super::{
    Engine, EngineError, GROUP_READ, Group, LayerState, Phase, READ_ATTEMPTS, ReadFault, ReadTarget, UnitNeed,
};
use crate::cache::{Claim, Residency};
use crate::model::record::{NO_LAYER, Router};
use crate::open::part;
use crate::policy::{Loading, Source};

/// A run of levels of a unit that is read and kept as one.
#[derive(Clone, Copy)]
struct Piece {
    layer: u16,
    unit: u16,
    /// First level, and how many.
    first: usize,
    levels: usize,
}

/// What a read was of.
#[derive(Clone, Copy)]
enum Wanted {
    Group(u16),
    Piece(Piece),
}

impl Wanted {
    fn target(self) -> ReadTarget {
        match self {
            Self::Group(layer) => ReadTarget::Group { layer },
            Self::Piece(Piece { layer, unit, .. }) => ReadTarget::Unit { layer, unit },
        }
    }
}

impl<'a> Engine<'a> {
    /// Takes back a read's buffer. A good read of a unit makes it resident once its checksum is right; a bad one
    /// is tried again, [`READ_ATTEMPTS`] times in all.
    pub fn complete<E>(&mut self, done: Completion<'a, E>) -> Result<(), EngineError> {
        let Completion { id, buf, result } = done;
        let unknown = EngineError::UnknownRead { id };
        let wanted = self.wanted(id).ok_or(unknown)?;
        let (offset, len) = self.range_of(wanted).ok_or(unknown)?;
        self.in_flight = self.in_flight.checked_sub(1).ok_or(unknown)?;
        let fault = match result {
            Ok(()) if self.verify(wanted, buf) => None,
            Ok(()) => Some(ReadFault::Checksum),
            Err(ReadError::Device(_)) => Some(ReadFault::Device),
            Err(ReadError::Short { .. }) => Some(ReadFault::Short),
            Err(ReadError::Gone) => Some(ReadFault::Gone),
            Err(_) => Some(ReadFault::Refused),
        };
        let settled = match wanted {
            Wanted::Group(layer) => {
                let group = if layer == NO_LAYER { &mut self.global } else { &mut self.layer_mut(layer.into())?.group };
                let reading = matches!(group, Group::Reading);
                if reading {
                    *group = if fault.is_none() { Group::Ready(buf) } else { Group::Waiting(buf) };
                }
                reading
            }
            Wanted::Piece(_) => self.pool.settle(id, buf, fault.is_none()),
        };
        if !settled {
            return Err(unknown);
        }
        let target = wanted.target();
        match (wanted, fault) {
            (Wanted::Group(_), None) => self.stats.resident_bytes += len,
            (Wanted::Piece(piece), None) => {
                self.stats.unit_reads += 1;
                self.stats.unit_bytes += len;
                self.layer_mut(piece.layer.into())?.stats.bytes += len;
            }
            (_, Some(fault)) => {
                self.stats.retries += 1;
                let tries = self.retrying.get(&id).copied().unwrap_or(0) + 1;
                if tries >= READ_ATTEMPTS || self.retrying.insert(id, tries).is_err() {
                    self.retrying.remove(&id);
                    let replaced = match wanted {
                        Wanted::Piece(piece) => self.replace(piece)?,
                        Wanted::Group(_) => false,
                    };
                    if !replaced {
                        return Err(EngineError::Read { target, offset, len, fault });
                    }
                    #[cfg(feature = "log")]
                    log::warn!("reading {target} (image offset {offset}, {len} bytes) failed: {fault}; it is replaced");
                    #[cfg(feature = "defmt")]
                    defmt::warn!(
                        "reading {} (image offset {}, {} bytes) failed: {}; it is replaced",
                        target,
                        offset,
                        len,
                        fault
                    );
                    return Ok(());
                }
                #[cfg(feature = "log")]
                log::warn!("reading {target} (image offset {offset}, {len} bytes) failed: {fault}; it is tried again");
                #[cfg(feature = "defmt")]
                defmt::warn!(
                    "reading {} (image offset {}, {} bytes) failed: {}; it is tried again",
                    target,
                    offset,
                    len,
                    fault
                );
                return Ok(());
            }
        }
        self.retrying.remove(&id);
        Ok(())
    }

    /// Does without a piece that cannot be read: its expert is used with the levels that are resident, or left out.
    /// Only HOBBIT's policy does that; `false` if the policy is another, or the unit not an expert.
    fn replace(&mut self, piece: Piece) -> Result<bool, EngineError> {
        let layer = self.layer(piece.layer.into())?;
        if !matches!(self.plan.limits.policy.loading, Loading::Miss(_)) || layer.shape.router == Router::All {
            return Ok(false);
        }
        let (count, id) = (self.count * layer.shape.top_k, layer.unit_base + u32::from(piece.unit));
        let ready = self.levels_held(piece.layer.into(), id).0;
        if self.phase == Phase::Units(piece.layer.into()) {
            let needs = &mut self.buffers.needs[..self.need_count];
            for need in needs.iter_mut().filter(|n| n.unit == piece.unit && !n.done && n.levels > ready) {
                need.levels = ready;
                need.done = ready == 0;
            }
            let choices = self.buffers.choices[..count].iter_mut();
            for choice in choices.filter(|c| c.unit == piece.unit && c.levels > ready) {
                choice.levels = ready;
                choice.source = if ready == 0 { Source::Skip } else { Source::Resident };
                self.stats.replaced += 1;
            }
        }
        // What was only foreseen is not asked for again.
        let predicted = &mut self.buffers.predicted[..self.predicted_count];
        for other in predicted.iter_mut().filter(|p| p.layer == piece.layer && p.unit == piece.unit) {
            other.levels = other.levels.min(ready);
        }
        Ok(true)
    }

    /// What the read with this id is of.
    fn wanted(&self, id: u32) -> Option<Wanted> {
        if id & GROUP_READ != 0 {
            let layer = (id & 0xffff) as u16;
            let exists = layer == NO_LAYER || usize::from(layer) < self.layers.len();
            return exists.then_some(Wanted::Group(layer));
        }
        let pieces = self.pool.directory.pieces();
        let mut layers = self.layers.iter().flatten().enumerate();
        let (layer, state, unit) =
            layers.find_map(|(layer, state)| Some((layer as u16, state, state.unit(id / pieces)?)))?;
        let piece = state.piece(layer, unit, (id % pieces) as usize, pieces as usize);
        (piece.first < state.levels.into()).then_some(Wanted::Piece(piece))
    }

    fn unit_record(&self, layer: u16, unit: u16) -> Option<&'a ExtentRecord> {
        let first = self.layer(layer.into()).ok()?.shape.first_extent;
        self.model.extents().get(first as usize + usize::from(unit))
    }

    /// Image offset and length of what is read.
    fn range_of(&self, wanted: Wanted) -> Option<(u64, u64)> {
        match wanted {
            Wanted::Group(layer) => Some(self.model.group(layer)),
            Wanted::Piece(piece) => {
                let record = self.unit_record(piece.layer, piece.unit)?;
                let start = record.prefix_len(piece.first);
                Some((record.offset() + start, record.prefix_len(piece.first + piece.levels) - start))
            }
        }
    }

    /// Whether the bytes read have their checksums.
    fn verify(&self, wanted: Wanted, buf: &[u8]) -> bool {
        match wanted {
            Wanted::Group(layer) => {
                let (first, count) = self.model.group_extents(layer);
                let mut rest = buf;
                (first..first + count).all(|extent| {
                    let Some(record) = self.model.extents().get(extent as usize) else { return false };
                    let Some((bytes, after)) = rest.split_at_checked(record.total_len() as usize) else { return false };
                    rest = after;
                    record.verify(0, bytes) == Ok(1)
                })
            }
            Wanted::Piece(piece) => self.unit_record(piece.layer, piece.unit).is_some_and(|record| {
                let len = record.prefix_len(piece.first + piece.levels) - record.prefix_len(piece.first);
                buf.get(..len as usize).is_some_and(|bytes| record.verify(piece.first, bytes) == Ok(piece.levels))
            }),
        }
    }

    /// The first `levels` levels of a unit of a mapped image.
    pub(super) fn mapped_unit(&self, layer: usize, unit: u16, levels: u8) -> Option<&'a [u8]> {
        let record = self.unit_record(layer as u16, unit)?;
        part(self.mapped?, record.offset(), record.prefix_len(levels.into()))
    }

    /// Levels of unit `id` (over all layers) that are resident, and that are resident or on their way.
    pub(super) fn levels_held(&self, layer: usize, id: u32) -> (u8, u8) {
        if let (Some(_), Ok(state)) = (self.mapped, self.layer(layer)) {
            return (state.levels, state.levels);
        }
        let (ready, coming) = self.pool.directory.held(id);
        match (self.pool.directory.pieces(), self.layer(layer)) {
            (1, Ok(state)) => (ready * state.levels, coming * state.levels),
            _ => (ready, coming),
        }
    }

    /// The first piece of a unit that is neither resident nor on its way, of those that `levels` levels take.
    fn missing_piece(&self, id: u32, levels: u8) -> Option<u32> {
        if self.mapped.is_some() {
            return None;
        }
        let pieces = self.pool.directory.pieces();
        let wanted = if pieces == 1 { 1 } else { u32::from(levels) };
        let mut all = id * pieces..id * pieces + wanted.min(pieces);
        all.find(|piece| self.pool.directory.residency(*piece) == Residency::Absent)
    }

    /// The next read worth starting: what the present layer needs, then resident tensors in the order in which
    /// layers come, then the units of dense layers that follow, then experts that were predicted.
    pub(super) fn next_read(&mut self) -> Option<ReadRequest<'a>> {
        if self.in_flight >= self.queue_depth {
            return None;
        }
        let request = self
            .demand_read()
            .or_else(|| self.group_read())
            .or_else(|| self.ahead_read())
            .or_else(|| self.predicted_read())?;
        self.in_flight += 1;
        Some(request)
    }

    fn piece_read(&self, id: u32, buf: &'a mut [u8]) -> Option<ReadRequest<'a>> {
        let (offset, len) = self.range_of(self.wanted(id)?)?;
        Some(ReadRequest { id, offset, buf, start: 0, len: len as usize })
    }

    fn demand_read(&mut self) -> Option<ReadRequest<'a>> {
        let Phase::Units(layer) = self.phase else { return None };
        let state = self.layers.get(layer)?.as_ref()?;
        let base = state.unit_base;
        let needs = &self.buffers.needs[..self.need_count];
        let (unit, piece) = needs
            .iter()
            .filter(|need| !need.done)
            .find_map(|n| Some((n.unit, self.missing_piece(base + u32::from(n.unit), n.levels)?)))?;
        let present = layer as u16;
        let needed = |at: u16, id: u32| at == present && state.needs(needs, id);
        let predicted = &self.buffers.predicted[..self.predicted_count];
        let foreseen = |at: u16, id: u32| {
            predicted.iter().any(|p| p.layer == at && layer_unit(self.layers, at, id) == Some(p.unit))
        };
        let next_use = |at| next_use(self.layers, layer, at);
        let pinned = usize::from(unit) < state.pinned;
        let claim = Claim { piece, layer: present, present, ahead: false, pinned };
        let mut buf = match predicted.is_empty() {
            true => None,
            false => self.pool.claim(claim, |at, id| needed(at, id) || foreseen(at, id), next_use),
        };
        if buf.is_none() {
            buf = self.pool.claim(claim, needed, next_use);
        }
        if buf.is_none() && self.in_flight == 0 && self.computable(layer).is_none() {
            // Every slot holds something that is pinned or needed later in this layer: the last of the latter gives way.
            let held = |n: &&UnitNeed| {
                let id = base + u32::from(n.unit);
                let may_go = !n.done && n.unit != unit && usize::from(n.unit) >= state.pinned;
                may_go && self.pool.directory.held(id).0 > 0
            };
            let last = base + u32::from(needs.iter().rev().find(held)?.unit);
            buf = self.pool.claim(claim, |_, id| id != last, next_use);
        }
        self.piece_read(piece, buf?)
    }

    fn group_read(&mut self) -> Option<ReadRequest<'a>> {
        let groups = self.layers.iter_mut().flatten().map(|l| &mut l.group).enumerate();
        let groups = core::iter::once((usize::from(NO_LAYER), &mut self.global)).chain(groups);
        for (layer, group) in groups {
            if matches!(group, Group::Waiting(_))
                && let Group::Waiting(buf) = core::mem::replace(group, Group::Reading)
            {
                let (offset, len) = self.model.group(layer as u16);
                return Some(ReadRequest { id: GROUP_READ | layer as u32, offset, buf, start: 0, len: len as usize });
            }
        }
        None
    }

    /// Units of the following dense layers: which ones are needed next is certain, so they are read while the
    /// layers before them compute, as long as that displaces nothing that is needed sooner.
    fn ahead_read(&mut self) -> Option<ReadRequest<'a>> {
        let (layer, own) = match self.phase {
            Phase::Operator(layer) | Phase::Route(layer) => (layer, true),
            Phase::Units(layer) => (layer, false),
            Phase::Idle | Phase::Embed | Phase::Head(_) => (0, true),
        };
        if self.phase == Phase::Idle && self.count == 0 {
            return None;
        }
        let ahead = if own { layer } else { (layer + 1) % self.layers.len() };
        let state = self.layers.get(ahead)?.as_ref()?;
        if !state.certain() {
            return None;
        }
        let (base, units) = (state.unit_base, state.shape.units as u32);
        let piece = (base..base + units).find_map(|id| self.missing_piece(id, state.levels))?;
        let present = if own { None } else { Some(self.layers.get(layer)?.as_ref()?) };
        let needs = &self.buffers.needs[..self.need_count];
        let now = if own { layer.checked_sub(1).unwrap_or(self.layers.len() - 1) } else { layer };
        let next_use = |at| next_use(self.layers, now, at);
        let keep = |at: u16, id: u32| {
            // A unit that is needed again soon would only be read again: better to wait for one that is not.
            let soon = next_use(at).is_some_and(|layers| 2 * layers < self.layers.len());
            soon || usize::from(at) == ahead || present.is_some_and(|present| present.needs(needs, id))
        };
        let unit = (piece / self.pool.directory.pieces() - base) as usize;
        let pinned = unit < state.pinned;
        let claim = Claim { piece, layer: ahead as u16, present: layer as u16, ahead: true, pinned };
        let buf = self.pool.claim(claim, keep, next_use)?;
        self.stats.prefetched += 1;
        self.piece_read(piece, buf)
    }

    /// Experts that were predicted for the next layers. They take at most half of the queue, so that a read which a
    /// layer comes to need does not wait long behind them, and displace no unit of a dense layer.
    fn predicted_read(&mut self) -> Option<ReadRequest<'a>> {
        if self.in_flight * 2 >= self.queue_depth && self.in_flight > 0 {
            return None;
        }
        let present = match self.phase {
            Phase::Units(layer) | Phase::Operator(layer) | Phase::Route(layer) => layer,
            Phase::Idle | Phase::Embed | Phase::Head(_) => return None,
        };
        let predicted = &self.buffers.predicted[..self.predicted_count];
        let (layer, piece) = predicted.iter().find_map(|p| {
            let base = self.layers.get(usize::from(p.layer))?.as_ref()?.unit_base;
            Some((p.layer, self.missing_piece(base + u32::from(p.unit), p.levels)?))
        })?;
        let needs = &self.buffers.needs[..self.need_count];
        let keep = |at: u16, id: u32| {
            let unit = layer_unit(self.layers, at, id);
            let needed = matches!(self.phase, Phase::Units(_)) && usize::from(at) == present;
            (needed && needs.iter().any(|n| !n.done && Some(n.unit) == unit))
                || predicted.iter().any(|p| p.layer == at && Some(p.unit) == unit)
                || next_use(self.layers, present, at).is_some()
        };
        let claim = Claim { piece, layer, present: present as u16, ahead: true, pinned: false };
        let buf = self.pool.claim(claim, keep, |_| None)?;
        self.stats.prefetched += 1;
        self.piece_read(piece, buf)
    }

    /// A unit of the layer that can be computed now: for dense layers only the next in order.
    pub(super) fn computable(&self, layer: usize) -> Option<usize> {
        let state = self.layer(layer).ok()?;
        let ready =
            |n: &UnitNeed| !n.done && self.levels_held(layer, state.unit_base + u32::from(n.unit)).0 >= n.levels;
        let needs = &self.buffers.needs[..self.need_count];
        match state.shape.router {
            Router::All => {
                let next = needs.iter().position(|n| !n.done)?;
                ready(&needs[next]).then_some(next)
            }
            _ => needs.iter().position(ready),
        }
    }
}

impl LayerState<'_> {
    /// Whether every token uses every unit, in order.
    fn certain(&self) -> bool {
        self.shape.router == Router::All && !self.sparse
    }

    /// Which of the layer's units the unit numbered `id` over all layers is, if it is one.
    pub(super) fn unit(&self, id: u32) -> Option<u16> {
        id.checked_sub(self.unit_base).filter(|unit| (*unit as usize) < self.shape.units).map(|unit| unit as u16)
    }

    /// Whether unit `id` is the layer's and one of `needs` that is not done.
    fn needs(&self, needs: &[UnitNeed], id: u32) -> bool {
        self.unit(id).is_some_and(|unit| needs.iter().any(|n| !n.done && n.unit == unit))
    }

    fn piece(&self, layer: u16, unit: u16, piece: usize, pieces: usize) -> Piece {
        match pieces {
            1 => Piece { layer, unit, first: 0, levels: self.levels.into() },
            _ => Piece { layer, unit, first: piece, levels: 1 },
        }
    }
}

/// Which of layer `layer`'s units the unit numbered `id` over all layers is.
fn layer_unit(layers: &[Option<LayerState<'_>>], layer: u16, id: u32) -> Option<u16> {
    layers.get(usize::from(layer))?.as_ref()?.unit(id)
}

/// In how many layers the units of a dense layer are used again, `now` being the layer whose units are being used.
fn next_use(layers: &[Option<LayerState<'_>>], now: usize, layer: u16) -> Option<usize> {
    let state = layers.get(usize::from(layer))?.as_ref()?;
    let layer = usize::from(layer);
    state.certain().then_some((layer + layers.len() - now - 1) % layers.len())
}
