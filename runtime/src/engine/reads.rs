//! What the engine reads: which read comes next, and what becomes of one that has finished.

use forebay_storage::image::ExtentRecord;
use forebay_storage::store::{Completion, ReadError, ReadRequest};

use super::{
    Engine, EngineError, GROUP_READ, Group, LayerState, Phase, READ_ATTEMPTS, ReadFault, ReadTarget, UnitNeed,
};
use crate::model::record::{NO_LAYER, Router};
use crate::pool::Residency;

impl<'a> Engine<'a> {
    /// Takes back a read's buffer. A good read of a unit makes it resident once its checksum is right; a bad one
    /// is tried again, [`READ_ATTEMPTS`] times in all.
    pub fn complete<E>(&mut self, done: Completion<'a, E>) -> Result<(), EngineError> {
        let Completion { id, buf, result } = done;
        let unknown = EngineError::UnknownRead { id };
        let target = self.target(id).ok_or(unknown)?;
        let (offset, len) = self.extent_of(target).ok_or(unknown)?;
        self.in_flight = self.in_flight.checked_sub(1).ok_or(unknown)?;
        let fault = match result {
            Ok(()) if self.verify(target, buf) => None,
            Ok(()) => Some(ReadFault::Checksum),
            Err(ReadError::Device(_)) => Some(ReadFault::Device),
            Err(ReadError::Short { .. }) => Some(ReadFault::Short),
            Err(ReadError::Gone) => Some(ReadFault::Gone),
            Err(_) => Some(ReadFault::Refused),
        };
        let settled = match target {
            ReadTarget::Group { layer } => {
                let group = if layer == NO_LAYER { &mut self.global } else { &mut self.layer_mut(layer.into())?.group };
                let reading = matches!(group, Group::Reading);
                if reading {
                    *group = if fault.is_none() { Group::Ready(buf) } else { Group::Waiting(buf) };
                }
                reading
            }
            ReadTarget::Unit { .. } => self.pool.settle(id, buf, fault.is_none()),
        };
        if !settled {
            return Err(unknown);
        }
        match (target, fault) {
            (ReadTarget::Group { .. }, None) => self.stats.resident_bytes += len,
            (ReadTarget::Unit { .. }, None) => self.stats.unit_bytes += len,
            (_, Some(fault)) => {
                self.stats.retries += 1;
                let tries = self.retrying.get(&id).copied().unwrap_or(0) + 1;
                if tries >= READ_ATTEMPTS || self.retrying.insert(id, tries).is_err() {
                    return Err(EngineError::Read { target, offset, len, fault });
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

    /// What the read with this id is of.
    fn target(&self, id: u32) -> Option<ReadTarget> {
        if id & GROUP_READ != 0 {
            let layer = (id & 0xffff) as u16;
            let exists = layer == NO_LAYER || usize::from(layer) < self.layers.len();
            return exists.then_some(ReadTarget::Group { layer });
        }
        self.layers
            .iter()
            .flatten()
            .enumerate()
            .find_map(|(layer, state)| state.unit(id).map(|unit| ReadTarget::Unit { layer: layer as u16, unit }))
    }

    fn unit_record(&self, layer: u16, unit: u16) -> Option<&'a ExtentRecord> {
        let first = self.layer(layer.into()).ok()?.shape.first_extent;
        self.model.extents().get(first as usize + usize::from(unit))
    }

    /// Levels of a layer's units that are read.
    fn levels(&self, layer: u16) -> Option<usize> {
        Some(self.plan.limits.levels_of(&self.layer(layer.into()).ok()?.shape.unit))
    }

    /// Image offset and length of what a target reads.
    fn extent_of(&self, target: ReadTarget) -> Option<(u64, u64)> {
        match target {
            ReadTarget::Group { layer } => Some(self.model.group(layer)),
            ReadTarget::Unit { layer, unit } => {
                let record = self.unit_record(layer, unit)?;
                Some((record.offset(), record.prefix_len(self.levels(layer)?)))
            }
        }
    }

    /// Whether the bytes read have their checksums.
    fn verify(&self, target: ReadTarget, buf: &[u8]) -> bool {
        match target {
            ReadTarget::Group { layer } => {
                let (first, count) = self.model.group_extents(layer);
                let mut rest = buf;
                (first..first + count).all(|extent| {
                    let Some(record) = self.model.extents().get(extent as usize) else { return false };
                    let Some((bytes, after)) = rest.split_at_checked(record.total_len() as usize) else { return false };
                    rest = after;
                    record.verify(0, bytes) == Ok(1)
                })
            }
            ReadTarget::Unit { layer, unit } => self.unit_record(layer, unit).is_some_and(|record| {
                let Some(levels) = self.levels(layer) else { return false };
                let bytes = buf.get(..record.prefix_len(levels) as usize);
                bytes.is_some_and(|bytes| record.verify(0, bytes) == Ok(levels))
            }),
        }
    }

    /// The next read worth starting: what the present layer needs, then resident tensors in the order in which
    /// layers come, then the units of dense layers that follow.
    pub(super) fn next_read(&mut self) -> Option<ReadRequest<'a>> {
        if self.in_flight >= self.queue_depth {
            return None;
        }
        let request = self.demand_read().or_else(|| self.group_read()).or_else(|| self.ahead_read())?;
        self.in_flight += 1;
        Some(request)
    }

    fn unit_read(&self, layer: usize, unit: u16, buf: &'a mut [u8]) -> Option<ReadRequest<'a>> {
        let (offset, len) = self.extent_of(ReadTarget::Unit { layer: layer as u16, unit })?;
        let id = self.layer(layer).ok()?.unit_base + u32::from(unit);
        Some(ReadRequest { id, offset, buf, start: 0, len: len as usize })
    }

    fn demand_read(&mut self) -> Option<ReadRequest<'a>> {
        let Phase::Units(layer) = self.phase else { return None };
        let state = self.layers.get(layer)?.as_ref()?;
        let base = state.unit_base;
        let needs = &self.buffers.needs[..self.need_count];
        let missing =
            |need: &&UnitNeed| !need.done && self.pool.residency(base + u32::from(need.unit)) == Residency::Absent;
        let unit = needs.iter().find(missing)?.unit;
        let needed = |id| state.needs(needs, id);
        let id = base + u32::from(unit);
        let next_use = |id| next_use(self.layers, layer, id);
        let mut buf = self.pool.claim(id, needed, next_use);
        if buf.is_none() && self.in_flight == 0 && self.computable(layer).is_none() {
            // Every slot holds a unit that is needed later in this layer: the last of them gives way.
            let last = needs
                .iter()
                .rev()
                .find(|n| !n.done && self.pool.residency(base + u32::from(n.unit)) == Residency::Resident)?;
            let last = base + u32::from(last.unit);
            buf = self.pool.claim(id, |other| other != last, next_use);
        }
        self.unit_read(layer, unit, buf?)
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
        let unit = (0..units).find(|u| self.pool.residency(base + u) == Residency::Absent)?;
        let present = if own { None } else { Some(self.layers.get(layer)?.as_ref()?) };
        let needs = &self.buffers.needs[..self.need_count];
        let now = if own { layer.checked_sub(1).unwrap_or(self.layers.len() - 1) } else { layer };
        let next_use = |id| next_use(self.layers, now, id);
        let keep = |id: u32| {
            // A unit that is needed again soon would only be read again: better to wait for one that is not.
            let soon = next_use(id).is_some_and(|layers| 2 * layers < self.layers.len());
            soon || state.unit(id).is_some() || present.is_some_and(|present| present.needs(needs, id))
        };
        let buf = self.pool.claim(base + unit, keep, next_use)?;
        self.stats.prefetched += 1;
        self.unit_read(ahead, unit as u16, buf)
    }

    /// A unit of the layer that can be computed now: for dense layers only the next in order.
    pub(super) fn computable(&self, layer: usize) -> Option<usize> {
        let state = self.layer(layer).ok()?;
        let ready =
            |n: &UnitNeed| !n.done && self.pool.residency(state.unit_base + u32::from(n.unit)) == Residency::Resident;
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
    fn unit(&self, id: u32) -> Option<u16> {
        id.checked_sub(self.unit_base).filter(|unit| (*unit as usize) < self.shape.units).map(|unit| unit as u16)
    }

    /// Whether unit `id` is the layer's and one of `needs` that is not done.
    fn needs(&self, needs: &[UnitNeed], id: u32) -> bool {
        self.unit(id).is_some_and(|unit| needs.iter().any(|n| !n.done && n.unit == unit))
    }
}

/// In how many layers a unit of a dense layer is used again, `now` being the layer whose units are being used.
fn next_use(layers: &[Option<LayerState<'_>>], now: usize, id: u32) -> Option<usize> {
    let mut layer_of = layers.iter().flatten().enumerate();
    let (layer, state) = layer_of.find(|(_, state)| state.unit(id).is_some())?;
    state.certain().then_some((layer + layers.len() - now - 1) % layers.len())
}
